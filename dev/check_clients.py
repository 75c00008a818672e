"""Talk to a running server as other programs do, and print what was said: once with the official openai client, once
with litellm if it is installed, and with the requests of tests/client_requests.py.

    python -m scripts.chat_web                          # in another terminal
    python dev/check_clients.py --url http://127.0.0.1:8000
    pip install litellm                                 # 1.110.2 was used; not a dependency of the project

Needs a model that knows sums, such as the miniature; with another one the replies are to be read. Exits with status 1
if a request was refused or an answer is not as it should be.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import run_main
from tests.client_requests import CHAT, COMPLETION, QUESTION, REQUESTS

MESSAGES = [{"role": "user", "content": QUESTION}]
TIMEOUT_SECONDS = 120


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--api-key", default="none", help="its key, if it asks for one")
    return parser.parse_args()


def openai_replies(url: str, key: str) -> Iterator[tuple[str, str]]:
    """What was asked for, and what came."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=TIMEOUT_SECONDS)
    create, model = client.chat.completions.create, client.models.list().data[0].id
    yield "models", f"{model}: {client.models.retrieve(model).model_dump()['nanochat']}"
    yield "chat", create(model=model, messages=MESSAGES, temperature=0).choices[0].message.content
    stream = create(model=model, messages=MESSAGES, temperature=0, stream=True)
    yield "stream", "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    token = requests.post(f"{url}/tokenize", json={"prompt": "5", "add_special_tokens": False}, **with_key(key)).json()
    bias = {str(token["tokens"][0]): -100}
    reply = create(model=model, messages=MESSAGES, temperature=0, logit_bias=bias).choices[0].message
    assert "5" not in reply.content
    yield "logit_bias: no 5", reply.content
    completion = client.completions.create(model=model, prompt=QUESTION, max_tokens=0, echo=True, logprobs=1)
    found = completion.choices[0].logprobs
    assert found.token_logprobs[0] is None
    yield "echo", ", ".join(f"{t} {p}" for t, p in zip(found.tokens, found.token_logprobs, strict=True))


def litellm_replies(url: str, key: str) -> Iterator[tuple[str, str]]:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download
    import litellm

    server = {"api_base": f"{url}/v1", "api_key": key}
    options = {"model": "openai/default", "messages": MESSAGES, **server}
    yield "chat", litellm.completion(**options, temperature=0).choices[0].message.content
    stream = litellm.completion(**options, temperature=0, stream=True, stream_options={"include_usage": True})
    yield "stream", "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    more = {"seed": 1, "n": 2, "logit_bias": {"7": -5}, "presence_penalty": 0.5, "user": "me", "logprobs": True}
    yield "options", " | ".join(choice.message.content for choice in litellm.completion(**options, **more).choices)
    plain = {"model": "text-completion-openai/default", "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    text = litellm.text_completion(**plain, **server)
    yield "text", text.choices[0].text
    try:
        litellm.completion(**options, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    except litellm.BadRequestError as error:
        yield "tools are refused", str(error).partition("\n")[0]
    else:
        raise AssertionError("tools were not refused")


def request_replies(url: str, key: str) -> Iterator[tuple[str, str]]:
    for name, (path, body) in REQUESTS.items():
        answer = requests.post(url + path, json=body, timeout=TIMEOUT_SECONDS, **with_key(key))
        answer.encoding = "utf-8"
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and line != "data: [DONE]"]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        field = {CHAT: "delta" if body.get("stream") else "message", COMPLETION: ""}[path]
        text = "".join((choice[field].get("content") or "") if field else choice["text"] for choice in choices)
        yield name, f"{text}\n      ignored: {answer.headers.get('x-nanochat-ignored', '')}"


def with_key(key: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def check(title: str, replies: Callable[[str, str], Iterator[tuple[str, str]]], args: argparse.Namespace) -> bool:
    """Print what a program was told; False if something was wrong."""
    print(f"--- {title}")
    try:
        for name, said in replies(args.url, args.api_key):
            print(f"{name}: {said}")
    except (AssertionError, openai.APIError) as error:
        print(f"WRONG: {error}")
        return False
    except ImportError as error:
        print(f"left out: {error}")
    return True


def main(args: argparse.Namespace) -> None:
    kinds = {"openai": openai_replies, "litellm": litellm_replies, "requests of other programs": request_replies}
    if not all([check(title, replies, args) for title, replies in kinds.items()]):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, parse_args)
