"""Drives a running `lina serve` with the official `openai` client: completions, conversations, streams, errors.

usage: python check_openai.py [--base-url http://127.0.0.1:8000] [--api-key KEY] [--chat | --no-chat]

Needs `pip install openai`. The model may be any: what is compared is its answers with each other. With --chat or
--no-chat, the model must have a chat template or must not have one.
"""

import argparse
import sys

import openai

PROMPT = "The first thing to know is that"
TOKENS = 24


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def expect_error(kind: type, call, *words: str) -> None:
    """`call` must fail with this error of the client's, in one sentence that has these words."""
    try:
        call()
    except kind as error:
        body = error.body
        expect(isinstance(body, dict) and body.keys() == {"message", "type", "param", "code"}, f"the shape of {body}")
        for word in words:
            expect(word in body["message"], f"{word!r} in {body['message']!r}")
        return
    raise AssertionError(f"no {kind.__name__}")


class Checks:
    def __init__(self, client: openai.OpenAI, chat: bool | None):
        self.client = client
        self.chat = chat
        self.model = client.models.list().data[0].id

    def complete(self, **more):
        more = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **more}
        return self.client.completions.create(model=self.model, **more)

    def talk(self, **more):
        more = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "temperature": 0, **more}
        return self.client.chat.completions.create(model=self.model, **more)

    def models(self) -> None:
        expect(self.client.models.retrieve(self.model).id == self.model, "the model by its name")
        expect_error(openai.NotFoundError, lambda: self.client.models.retrieve("no-such-model"), "no-such-model")

    def completion(self) -> None:
        answer = self.complete()
        choice, usage = answer.choices[0], answer.usage
        expect(choice.finish_reason in ("stop", "length"), choice.finish_reason)
        expect(usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= TOKENS, str(usage))
        expect(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, str(usage))
        expect(self.complete().choices[0].text == choice.text, "the likeliest tokens are the same each time")
        two = self.complete(prompt=[PROMPT, PROMPT])
        expect([it.index for it in two.choices] == [0, 1], "two prompts, two choices")
        expect(all(it.text == choice.text for it in two.choices), "prompts together answer as alone")

    def completion_stream(self) -> None:
        whole = self.complete()
        pieces = list(self.complete(stream=True, stream_options={"include_usage": True}))
        text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        expect(text == whole.choices[0].text, f"the stream {text!r}, the whole {whole.choices[0].text!r}")
        reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
        expect(reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1]), str(reasons))
        expect(pieces[-1].usage == whole.usage and not pieces[-1].choices, "the last piece has the usage")
        expect(all(piece.usage is None for piece in pieces[:-1]), "the others have none")

    def completion_logprobs(self) -> None:
        choice = self.complete(logprobs=3).choices[0]
        found = choice.logprobs
        count = len(found.tokens)
        expect(0 < count <= TOKENS, f"{count} tokens")
        expect(len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == count, "four lists")
        for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
            expect(logprob <= 0 and top[token] == logprob, f"{token!r} has {logprob} and {top}")
            expect(max(top.values()) == logprob, "the likeliest is taken")
        expect(found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset), str(found.text_offset))

    def seeds(self) -> None:
        draw = lambda seed: self.complete(temperature=1, top_p=0.95, seed=seed, extra_body={"top_k": 50}).choices[0].text
        expect(draw(7) == draw(7), "the same seed draws the same")
        expect(len({draw(seed) for seed in range(6)}) > 1, "seeds differ")

    def stop(self) -> None:
        text = self.complete().choices[0].text
        stop = text[len(text) // 2 :][:3]
        for answer in (self.complete(stop=stop), self.complete(stop=["\x00never", stop])):
            expect(answer.choices[0].text == text[: text.index(stop)], f"ends before {stop!r}")
            expect(answer.choices[0].finish_reason == "stop", answer.choices[0].finish_reason)

    def conversation(self) -> None:
        try:
            answer = self.talk(logprobs=True, top_logprobs=2)
        except openai.BadRequestError as error:
            expect(self.chat is not True and "chat template" in error.body["message"], str(error))
            return
        expect(self.chat is not False, "the model has a chat template")
        choice = answer.choices[0]
        expect(choice.message.role == "assistant" and choice.finish_reason in ("stop", "length"), str(choice))
        for token in choice.logprobs.content:
            expect(token.logprob <= 0 and len(token.top_logprobs) == 2, str(token))
            expect(token.top_logprobs[0].logprob == token.logprob, "the likeliest is taken")
        pieces = list(self.talk(stream=True, stream_options={"include_usage": True}))
        expect(pieces[0].choices[0].delta.role == "assistant", "a stream opens with the role")
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        expect(text == choice.message.content, f"the stream {text!r}, the whole {choice.message.content!r}")
        expect(pieces[-1].usage == answer.usage, "the last piece has the usage")

    def errors(self) -> None:
        bad = openai.BadRequestError
        expect_error(bad, lambda: self.complete(temperature=3), "`temperature` is 3", "0 to 2")
        expect_error(bad, lambda: self.complete(n=2), "`n` is 2", "not support")
        expect_error(bad, lambda: self.complete(prompt=""), "prompt")
        expect_error(bad, lambda: self.complete(max_tokens=10**9), "1000000000", "at most")
        expect_error(bad, lambda: self.complete(extra_body={"temprature": 1}), "`temprature`", "not a field")
        expect_error(bad, lambda: self.talk(messages=[]), "`messages` is an empty list")
        unknown = lambda: self.client.completions.create(model="no-such-model", prompt="a")
        expect_error(openai.NotFoundError, unknown, "no-such-model", self.model)
        if self.client.api_key != "none":
            stranger = self.client.with_options(api_key="another-key")
            expect_error(openai.AuthenticationError, stranger.models.list, "API key")

    def leaving_early(self) -> None:
        stream = self.complete(stream=True)
        next(iter(stream))
        stream.close()
        expect(self.complete(max_tokens=2).usage.completion_tokens > 0, "the next request is answered")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction)
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.base_url}/v1", api_key=arguments.api_key, max_retries=0, timeout=120)
    checks = Checks(client, arguments.chat)
    names = [name for name, value in vars(Checks).items() if not name.startswith("_") and name not in ("complete", "talk")]
    failures = 0
    for name in names:
        try:
            getattr(checks, name)()
            print(f"{name}: ok")
        except (AssertionError, openai.OpenAIError) as error:
            failures += 1
            print(f"{name}: FAILED: {error}")
    print(f"openai {openai.__version__}: {len(names) - failures} of {len(names)} checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
