"""Renders the templates of this folder with Hugging Face transformers and writes cases.json, which the tests expect.

    python3 render.py
"""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = pathlib.Path(__file__).parent
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
ASK = {"role": "user", "content": " What is 1 < 2 & 3 > 2?\n"}
REPLY = {"role": "assistant", "content": "<think>\nWell …\n</think>\n\nBoth are 'true'. 漢字 \"é\""}
MORE = {"role": "user", "content": "Are they?"}
CHATS = [[ASK], [SYSTEM, ASK], [ASK, REPLY], [SYSTEM, ASK, REPLY, MORE], [ASK, MORE], [REPLY, ASK]]


def case(template, messages, add_generation_prompt):
    described = {
        "template": template.name,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "special_tokens": SPECIAL_TOKENS,
    }
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template.read_text(), add_generation_prompt=add_generation_prompt, **SPECIAL_TOKENS
        )
        return described | {"text": rendered[0]}
    except Exception as error:
        return described | {"error": str(error)}


cases = [
    case(template, messages, add_generation_prompt)
    for template in sorted(FOLDER.glob("*.jinja"))
    for messages in CHATS
    for add_generation_prompt in (False, True)
]
(FOLDER / "cases.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
