"""Bodies and prompts of every kind for a real server: answered, or refused with 4xx; it lives and answers as before.

What vLLM itself answers with 5xx though the request is at fault is listed in KNOWN, by its words, and counted apart.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import aiohttp

from tests.fuzz import mutation
from tests.fuzz.sampling import SETTINGS, STRUCTURES, settings, words
from tests.servers import DEMO, Server, serve

LENGTH = 128  # tokens of a sequence, at most
CLIENTS = 48  # requests at a time
SECONDS = 120  # for one request
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OTHERS = ("/tokenize", "/detokenize", "/v1/models", "/v1/responses", "/v1/messages", "/health", "/nothing")

KNOWN: list[tuple[str, str]] = [
    # `structured_outputs` that is no object: its own check asks it for a key before it looks at its type.
    (r"'(str|int|float|list|bool)' object has no attribute 'get'", r'"structured_outputs": ?[^{n]'),
    # A grammar or schema that only the engine's process finds wrong, or that the allowed tokens cannot spell.
    (r'"message": ?"Internal server error"', r'"(structured_outputs|response_format|tool_choice)"'),
    # Half a surrogate pair in a name of the request, which the platform is not shown.
    (r'"message": ?""', r'"(request_id|cache_salt)": ?"[^"]*\\ud[89a-f]'),
]
"""Of each answer with 5xx that is vLLM's own: a pattern for the answer, and one for the body that leads to it."""

Input = tuple[str, str, bytes, str]
"""Method, path, body, content type."""


def text(rng: Random) -> str:
    """Of a prompt; seldom a megabyte."""
    if rng.random() < 0.002:
        return rng.choice(("a", " ", "\0", "😀", "\n\n", "12 + 7 ")) * 2**20
    if rng.random() < 0.3:
        return "".join(mutation.text(rng)[:200] for _ in range(rng.randint(0, 4)))
    return rng.choice(
        ("What is 12 + 7?", "Spell cat backwards.", "<|im_start|>", "<|im_end|>", "\x07\x1b[2J", "\u200b")
    )


def token(rng: Random) -> Any:
    if rng.random() < 0.9:
        return rng.randrange(256)
    return rng.choice((-1, 2**31, 2**63, -(2**63), 10**30, 1.5, 3.0, "7", None, True, [3], float("nan")))


def prompt(rng: Random) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return text(rng)
    if kind < 5:
        return [token(rng) for _ in range(rng.choice((0, 1, 3, 9, LENGTH, 10 * LENGTH)))]
    if kind == 5:
        return [text(rng) for _ in range(rng.randint(0, 3))]
    if kind == 6:
        return [[token(rng) for _ in range(rng.randint(0, 5))] for _ in range(rng.randint(0, 3))]
    return mutation.nested(rng) if rng.random() < 0.2 else mutation.value(rng)


def message(rng: Random) -> Any:
    role = rng.choice(("user", "user", "user", "system", "assistant", "tool", "developer", mutation.text(rng)[:50]))
    parts = [
        {"type": rng.choice(("text", "image_url", "nothing")), "text": text(rng)} for _ in range(rng.randint(0, 2))
    ]
    content = rng.choice((text(rng), text(rng), parts, mutation.value(rng)))
    return {"role": role, "content": content} if rng.random() < 0.95 else mutation.value(rng)


def body(rng: Random, chat: bool, hostile: bool) -> dict[str, Any]:
    """With `hostile` the prompt is anything, else something simple."""
    found: dict[str, Any] = {"model": "demo", "max_tokens": rng.randint(1, 2)}
    if chat:
        messages = [message(rng) for _ in range(rng.randint(0, 3))] if hostile else [{"role": "user", "content": "Hi"}]
        return found | {"messages": messages}
    return found | {"prompt": prompt(rng) if hostile else [3, 5, 7]}


FORMATS: list[dict[str, Any]] = [
    *({"type": kind} for kind in ("text", "json_object", "json_schema", "structural_tag", "x")),
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
]

MORE: dict[str, Callable[[Random], Any]] = {
    **SETTINGS,
    "logit_bias": lambda rng: {str(rng.choice((rng.randrange(300), -1, "a", 10**20))): rng.uniform(-120, 120)},
    "stream": lambda rng: rng.random() < 0.7,
    "stream_options": lambda rng: {"include_usage": rng.random() < 0.5},
    "echo": lambda rng: rng.random() < 0.5,
    "suffix": mutation.text,
    "user": mutation.text,
    "best_of": lambda rng: rng.randint(-1, 3),
    "top_logprobs": lambda rng: rng.randint(-2, 22),
    "response_format": lambda rng: rng.choice(FORMATS),
    "structured_outputs": lambda rng: rng.choice(STRUCTURES),
    "tools": lambda rng: [{"type": "function", "function": {"name": mutation.text(rng)[:90], "parameters": {}}}],
    "tool_choice": lambda rng: rng.choice(("auto", "none", "required", "x", {"type": "function"})),
    "truncate_prompt_tokens": lambda rng: rng.randint(-3, 2 * LENGTH),
    "continue_final_message": lambda rng: True,
    "add_generation_prompt": lambda rng: False,
    "chat_template": lambda rng: "{% for x in range(10 ** 9) %}{% endfor %}",
    "chat_template_kwargs": lambda rng: {"messages": mutation.value(rng)},
    "priority": lambda rng: rng.randint(-9, 9),
    "request_id": mutation.text,
    "kv_transfer_params": lambda rng: {"a": mutation.value(rng)},
    "vllm_xargs": lambda rng: {"a": mutation.value(rng)},
    "return_token_ids": lambda rng: True,
    "prompt_embeds": lambda rng: "AAAA",
    "documents": lambda rng: [{"text": mutation.text(rng)}],
    "reasoning_effort": lambda rng: rng.choice(("low", "none", "x")),
    "stop": words,
}


def structured(rng: Random) -> Input:
    """A body with some of all settings, and sometimes damage anywhere in it."""
    chat = rng.random() < 0.5
    content: Any = body(rng, chat, False) | settings(rng, MORE, (0.02, 0.04, 0.1, 0.3))
    if rng.random() < 0.4:
        content = mutation.tree(rng, content, list(MORE), 3)
    path = CHAT if chat else COMPLETIONS
    return "POST", path if rng.random() < 0.99 else rng.choice(OTHERS), mutation.written(content), "application/json"


def hostile(rng: Random) -> Input:
    """A prompt of any kind; sometimes bytes that are no JSON, or no body for the path."""
    chat = rng.random() < 0.5
    raw = mutation.written(body(rng, chat, True))
    kind = rng.randrange(20)
    if kind == 0:
        raw = mutation.damaged(rng, raw)
    elif kind == 1:
        raw = raw.replace(b'"', b'"' + rng.choice((b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5", b"\0")), 6)
    elif kind == 2 and rng.random() < 0.1:
        raw = rng.choice((b"[", b'{"prompt":', b'{"model":"demo","messages":[[')) * rng.choice((10, 1000, 100_000))
    path = rng.choice(OTHERS) if rng.random() < 0.03 else CHAT if chat else COMPLETIONS
    method = rng.choice(("GET", "PUT", "DELETE")) if rng.random() < 0.005 else "POST"
    kinds = ("", "text/plain", "application/xml", "application/json; charset=utf-16", "a")
    return method, path, raw, rng.choice(kinds) if rng.random() < 0.02 else "application/json"


async def exchange(session: aiohttp.ClientSession, url: str, given: Input) -> tuple[int, str]:
    """Status and body of an answer."""
    method, path, raw, content_type = given
    async with session.request(method, url + path, data=raw, headers={"Content-Type": content_type}) as response:
        return response.status, (await response.read()).decode(errors="replace")


async def ask(session: aiohttp.ClientSession, url: str, given: Input) -> str:
    """What the server says: AssertionError if it says that it is at fault, or nothing."""
    method, path, raw, _ = given
    for attempt in range(3):
        try:
            status, said = await exchange(session, url, given)
            break
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # After some answers of 500 the server closes the connection, which the next request may be sent on: that
            # one is sent again, as clients do.
            if attempt == 2:
                raise AssertionError(f"{error!r} for {method} {path} {raw[:1000]!r}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AssertionError(f"{error!r} for {method} {path} {raw[:1000]!r}") from error
    if found := re.search(r'data: \{"error".*"code": ?(5\d\d)', said):  # in a stream
        status = int(found[1])
    if status >= 500:
        if any(re.search(answer, said) and re.search(cause, raw.decode(errors="replace")) for answer, cause in KNOWN):
            return "known 5xx"
        raise AssertionError(f"{status} {said[:600]!r} for {method} {path} {raw[:1000]!r}")
    return "answered" if status < 400 else "refused"


async def ask_all(url: str, inputs: Sequence[Input]) -> list[str]:
    limit = asyncio.Semaphore(CLIENTS)
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:

        async def one(given: Input) -> str:
            async with limit:
                return await ask(session, url, given)

        return list(await asyncio.gather(*map(one, inputs)))


def answer(server: Server) -> str:
    """A greedy one, which no request may change."""
    found = server.client.completions.create(model="demo", prompt=[3, 5, 7, 11], max_tokens=4, temperature=0)
    return str(found.choices[0].text)


@contextmanager
def server() -> Iterator[Server]:
    options = ["--served-model-name", "demo", "--max-model-len", str(LENGTH), "--max-num-seqs", "64"]
    options += ["--disable-uvicorn-access-log", "--kv-cache-memory-bytes", str(2**26)]
    with serve(DEMO, *options, env={"VLLM_MAX_N_SEQUENCES": "4", "VLLM_LOGGING_LEVEL": "ERROR"}) as found:
        yield found


def feed(found: Server, make: Callable[[Random], Input]) -> Callable[[Sequence[Random]], list[str]]:
    """Inputs made by `make` for a server that is there."""
    known = answer(found)

    def check(rngs: Sequence[Random]) -> list[str]:
        try:
            became = asyncio.run(ask_all(found.url, [make(rng) for rng in rngs]))
            assert answer(found) == known, "the server answers otherwise than before"
        except Exception as error:
            code = found.process.poll()
            raise AssertionError(f"{error}\nThe server's code: {code}, its log:\n{found.log[-3000:]}") from error
        return became

    return check


@contextmanager
def bodies() -> Iterator[Callable[[Sequence[Random]], list[str]]]:
    with server() as found:
        yield feed(found, structured)


@contextmanager
def prompts() -> Iterator[Callable[[Sequence[Random]], list[str]]]:
    with server() as found:
        yield feed(found, hostile)
