"""Keeps a running `lina serve` busy with concurrent streams, some of which are given up, and watches its memory.

usage: python soak_server.py [--base-url http://127.0.0.1:8000] [--minutes 5] [--streams 64] [--tokens 200]

Needs nothing but Python. Each prompt is first answered alone, with the likeliest tokens; every stream of it must then
say the same, piece after piece. One stream in eight is closed after a few pieces and must leave the engine. The server
must have room for all streams (--max-running and --max-queue). Ends with 1 if anything was wrong, or if memory grew by
more than --growth-mib between the end of the first fifth and the end.
"""

import argparse
import http.client
import json
import random
import sys
import threading
import time
from urllib.parse import urlsplit

PROMPTS = [f"Chapter {number}. In the {place}, " for number in range(1, 9) for place in ("harbour", "forest")]
GIVEN_UP_ONE_IN = 8
TIMEOUT_S = 120


class Server:
    def __init__(self, base_url: str, api_key: str | None):
        self.netloc = urlsplit(base_url).netloc
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.netloc, timeout=TIMEOUT_S)

    def get(self, path: str) -> str:
        connection = self.connect()
        connection.request("GET", path, headers=self.headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {text}")
        return text

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"{name} ")]
        return float(lines[0].split()[1]) if lines else float("nan")

    def status(self) -> dict:
        return json.loads(self.get("/status"))


def stream(server: Server, connection: http.client.HTTPConnection, body: dict):
    """The text pieces of an answer."""
    connection.request("POST", "/v1/completions", json.dumps(body), server.headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status} {response.read().decode()}")
    ended = False
    for line in response:
        line = line.decode().strip()
        if not line:
            continue
        if ended:
            raise RuntimeError(f"something follows the end: {line}")
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            ended = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["text"]
    if not ended:
        raise RuntimeError("the stream breaks off")


class Soak:
    def __init__(self, server: Server, model: str, tokens: int):
        self.server = server
        self.body = lambda prompt: {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        self.expected = {prompt: "".join(stream(server, server.connect(), self.body(prompt))) for prompt in PROMPTS}
        self.lock = threading.Lock()
        self.complete = self.given_up = self.characters = 0
        self.errors: list[str] = []
        self.stop = threading.Event()

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        connection = self.server.connect()
        while not self.stop.is_set() and len(self.errors) < 10:
            prompt = chance.choice(PROMPTS)
            leaves_after = chance.randrange(1, 20) if chance.randrange(GIVEN_UP_ONE_IN) == 0 else None
            try:
                complete, characters = self.one(connection, prompt, leaves_after)
            except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                with self.lock:
                    self.errors.append(f"{type(error).__name__}: {error}")
                connection = self.server.connect()
                continue
            with self.lock:
                self.complete += complete
                self.given_up += not complete
                self.characters += characters
            if not complete:
                connection.close()
                connection = self.server.connect()

    def one(self, connection: http.client.HTTPConnection, prompt: str, leaves_after: int | None) -> tuple[bool, int]:
        """Whether the answer was read to its end, and how much was read."""
        expected, text = self.expected[prompt], ""
        for number, piece in enumerate(stream(self.server, connection, self.body(prompt))):
            text += piece
            if not expected.startswith(text):
                raise RuntimeError(f"the stream says {text[-40:]!r} where alone it said {expected[:len(text)][-40:]!r}")
            if number == leaves_after:
                return False, len(text)
        if text != expected:
            raise RuntimeError(f"the stream ends after {len(text)} of {len(expected)} characters")
        return True, len(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--growth-mib", type=float, default=16)
    arguments = parser.parse_args()
    server = Server(arguments.base_url, arguments.api_key)
    model = server.status()["model"]
    soak = Soak(server, model, arguments.tokens)
    before = server.status()
    memory = lambda: server.metric("process_resident_memory_bytes") / 2**20
    begin = time.monotonic()
    print(f"start: {memory():.1f} MiB")
    clients = [threading.Thread(target=soak.client, args=(seed,), daemon=True) for seed in range(arguments.streams)]
    for client in clients:
        client.start()
    samples = []
    for fifth in range(1, 6):
        end = begin + arguments.minutes * 60 * fifth / 5
        while time.monotonic() < end and len(soak.errors) < 10:
            time.sleep(min(0.5, max(0.0, end - time.monotonic())))
        samples.append(memory())
        print(f"{time.monotonic() - begin:.0f} s: {samples[-1]:.1f} MiB, {soak.complete} answers, {soak.given_up} given up")
    soak.stop.set()
    for client in clients:
        client.join(TIMEOUT_S)
    wall_s = time.monotonic() - begin
    # What was given up last leaves at the engine's next step.
    deadline = time.monotonic() + 10
    while (after := server.status())["running"] + after["queued"] + after["kv_pages_used"] and time.monotonic() < deadline:
        time.sleep(0.1)
    problems = list(soak.errors)
    if after["running"] or after["queued"] or after["kv_pages_used"]:
        problems.append(f"something is left in the engine: {after['running']} run, {after['kv_pages_used']} pages are used")
    finished = after["finished_requests"] - before["finished_requests"]
    cancelled = after["cancelled_requests"] - before["cancelled_requests"]
    if finished + cancelled != soak.complete + soak.given_up:
        problems.append(f"the engine counts {finished} + {cancelled}, the clients {soak.complete} + {soak.given_up}")
    if finished < soak.complete:
        problems.append(f"the engine has finished {finished} requests, the clients {soak.complete}")
    growth = samples[-1] - samples[0]
    if growth > arguments.growth_mib:
        problems.append(f"memory grew by {growth:.1f} MiB, expected at most {arguments.growth_mib}")
    print(f"end: {memory():.1f} MiB, {growth:+.1f} MiB since the first fifth")
    tokens = after["generated_tokens"] - before["generated_tokens"]
    print(
        f"{arguments.streams} streams for {wall_s:.0f} s: {soak.complete} answers, {soak.given_up} given up "
        f"({cancelled} before their end), {tokens} tokens ({tokens / wall_s:.0f}/s), {len(soak.errors)} errors"
    )
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
