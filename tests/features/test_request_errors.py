"""A request that asks for what cannot be is refused with 4xx and a sentence, and the server serves on."""

import re
from typing import Any

import pytest

from tests.features.service import Service

PROMPT = [40, 41, 42]
CHAT = [{"role": "user", "content": "Hello"}]
IMAGE = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]}
]

COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"n": 0}, "n must be at least 1"),
    "temperature": ({"temperature": -1}, "temperature must be"),
    "temperature above 2": ({"temperature": 3}, "temperature must be"),
    "top_p": ({"top_p": 1.5}, "top_p must be in"),
    "top_k": ({"top_k": -5}, "top_k must be"),
    "min_p": ({"min_p": 2}, "min_p must be in"),
    "presence_penalty": ({"presence_penalty": 3}, "presence_penalty must be in"),
    "frequency_penalty": ({"frequency_penalty": -3}, "frequency_penalty must be in"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty must be"),
    "seed": ({"seed": "x"}, "seed"),
    "max_tokens": ({"max_tokens": 10**6}, "max_tokens"),
    "min_tokens": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be"),
    "logit_bias of no token": ({"logit_bias": {"99999": 1}}, "vocab"),
    "allowed tokens that are none": ({"allowed_token_ids": [99999]}, "allowed_token_ids"),
    "no allowed tokens": ({"allowed_token_ids": []}, "allowed_token_ids"),
    "prompt of no token": ({"prompt": [99999]}, "out of vocabulary"),
    "long prompt": ({"prompt": PROMPT * 400}, "maximum context length"),
    "empty prompt": ({"prompt": []}, "[Pp]rompt"),
    "stop": ({"stop": [""]}, "stop cannot contain an empty string"),
    "bad words": ({"bad_words": [""]}, "bad_words"),
    "logprobs": ({"logprobs": -2}, "logprobs"),
    "prompt_logprobs in a stream": ({"prompt_logprobs": 1, "stream": True}, "not available when `stream=True`"),
    "regex": ({"structured_outputs": {"regex": "(["}}, "regex"),
    "grammar": ({"structured_outputs": {"grammar": "root ::= nothing"}}, "grammar"),
    "schema": ({"structured_outputs": {"json": {"type": "nothing"}}}, "[Ss]chema|JSON|json|type"),
    "two constraints": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "only use one kind"),
    "beams in a stream": ({"use_beam_search": True, "stream": True}, "not.*support.*beam search"),
    "suffix": ({"suffix": "x", "prompt": "a"}, "suffix|FIM"),
    "prompt embeddings": ({"prompt_embeds": "AAAA"}, "enable-prompt-embeds"),
    "empty salt": ({"cache_salt": ""}, "cache_salt"),
    "repetition detection": ({"repetition_detection": {"max_pattern_size": -1}}, "max_pattern_size"),
}
CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"messages": IMAGE}, "served is not a multimodal model"),
    "no messages": ({"messages": []}, "at least one message"),
    "no model": ({"model": "other"}, "The model `other` does not exist"),
    "tool choice without tools": ({"tool_choice": "required"}, "tools"),
    "tool that is not there": (
        {
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "subtract"}},
        },
        "tool",
    ),
    "top_logprobs": ({"top_logprobs": 2}, "logprobs"),
    "response format": ({"response_format": {"type": "json_schema"}}, "json_schema"),
    "stream options": ({"stream_options": {"include_usage": True}}, "only be.*stream=True"),
}


NO_IMAGES = pytest.mark.feature("images and audio", refused="served is not a multimodal model")


def check_refused(service: Service, path: str, body: dict[str, Any], words: str) -> None:
    reply = service.post(path, body)
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
    message = reply.json()["error"]["message"]
    assert re.search(words, message), message
    assert service.tokens(PROMPT, max_tokens=1)


@pytest.mark.feature("impossible requests are refused")
@pytest.mark.parametrize("case", COMPLETIONS)
def test_completion(service: Service, case: str) -> None:
    options, words = COMPLETIONS[case]
    check_refused(service, "/v1/completions", {"model": "served", "prompt": PROMPT, "max_tokens": 4} | options, words)


@pytest.mark.feature("impossible requests are refused")
@pytest.mark.parametrize("case", [pytest.param(case, marks=NO_IMAGES if case == "image" else ()) for case in CHATS])
def test_chat(service: Service, case: str) -> None:
    options, words = CHATS[case]
    body = {"model": "served", "messages": CHAT, "max_completion_tokens": 4} | options
    check_refused(service, "/v1/chat/completions", body, words)


@pytest.mark.feature("impossible requests are refused")
@pytest.mark.parametrize(
    ("path", "status"), [("/v1/embeddings", 404), ("/classify", 404), ("/v1/audio/transcriptions", 404)]
)
def test_what_a_text_model_does_not_do(service: Service, path: str, status: int) -> None:
    assert service.post(path, {"model": "served", "input": "x"}).status_code == status
