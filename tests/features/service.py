"""A running server of one family, and the ways in which tests ask it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.features.families import Family
from tests.servers import Server

# What the openai client sends by itself; anything else of vLLM's goes through `extra_body`.
_OPENAI = {"max_tokens", "temperature", "n", "seed", "stop", "logprobs", "echo", "logit_bias", "top_p", "stream"}
_OPENAI |= {"presence_penalty", "frequency_penalty", "stream_options"}

# Against the tokenizer's tokens of white space, of which grammars allow any number between the parts of a JSON; and for
# the end, wherever a grammar allows it.
TERSE = {str(token): -100.0 for token in (*range(197, 202), *range(216, 221))} | {"1023": 50.0}

NOTHING = -9999.0  # how vLLM's HTTP API writes the log-probability of what is impossible


@dataclass(frozen=True)
class Service:
    """A server, the model that it serves, and the folder of its traces."""

    server: Server
    family: Family
    traces: Path

    @property
    def client(self) -> Any:
        return self.server.client

    def complete(self, prompt: Any, **options: Any) -> Any:
        """A text completion through the real client: greedy, of eight tokens whatever they are, with their ids."""
        options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | options
        own = {name: options.pop(name) for name in list(options) if name not in _OPENAI}
        return self.client.completions.create(model="served", prompt=prompt, extra_body=own, **options)

    def tokens(self, prompt: Any, **options: Any) -> list[int]:
        """The ids of a completion's only choice."""
        (choice,) = self.complete(prompt, **options).choices
        return list(choice.token_ids)

    def chat(self, content: str, **options: Any) -> Any:
        """A chat of one question; greedy unless the options say otherwise."""
        messages = [{"role": "user", "content": content}]
        options = {"temperature": 0, "max_completion_tokens": 16, "messages": messages} | options
        return self.client.chat.completions.create(model="served", **options)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.server.url}{path}", json=body, timeout=120)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.server.url}{path}", timeout=60)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.post("/tokenize", {"model": "served", "prompt": text}).json()["tokens"]
        return ids

    def counter(self, name: str) -> float:
        """One of the server's counters."""
        return self.gauge(f"{name}_total")

    def gauge(self, name: str) -> float:
        """Another of its metrics."""
        found = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", self.get("/metrics").text, re.M)
        assert found, name
        return sum(map(float, found))


def distribution(top: dict[str, float], vocabulary: int) -> np.ndarray:
    """Log-probabilities `[vocab]`, -inf of what is impossible, from the answer to `return_tokens_as_token_ids`."""
    result = np.full(vocabulary, np.nan)
    for name, value in top.items():
        result[int(name.removeprefix("token_id:"))] = -np.inf if value <= NOTHING else value
    assert not np.isnan(result).any(), "a token of the vocabulary has no log-probability"
    return result
