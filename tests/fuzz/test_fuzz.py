"""A slice of each target of `make fuzz`; the inputs are others than its first ones."""

import json
from collections.abc import Iterator
from random import Random

import httpx
import pytest

from tests.fuzz import http_bodies
from tests.fuzz.targets import AT_ONCE, TARGETS, run
from tests.servers import Server

SEED = 1
SLICE = {"headers": 1000, "indexes": 1000, "quantization": 4000, "rope": 4000, "sampling": 1024}


@pytest.mark.parametrize("name", SLICE)
def test_slice(name: str) -> None:
    result = run(name, SLICE[name], SEED)
    assert result.fault is None, f"at input {result.at}: {result.fault}"
    assert result.counts.total() == SLICE[name]
    assert min(result.counts["refused"], result.counts["taken"] + result.counts["answered"]) > 0.01 * SLICE[name]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with http_bodies.server() as found:
        yield found


@pytest.mark.serving
@pytest.mark.parametrize("name", ["requests", "prompts"])
def test_slice_for_a_server(server: Server, name: str) -> None:
    make = {"requests": http_bodies.structured, "prompts": http_bodies.hostile}[name]
    became = http_bodies.feed(server, make)([Random(f"{name} {SEED} {number}") for number in range(512)])
    assert min(became.count("refused"), became.count("answered")) > 50


@pytest.mark.serving
def test_half_a_surrogate_pair_is_the_clients_fault(server: Server) -> None:
    """Not a fault of the server, which could not send it to its engine; Python's JSON lets it pass."""
    for name in ("stop", "bad_words", "vllm_xargs"):
        value: object = {"a": "\ud800"} if name == "vllm_xargs" else ["\ud800"]
        body = {"model": "demo", "prompt": [3, 5, 7], "max_tokens": 1, name: value}
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=headers, timeout=60)
        assert response.status_code == 400 and "must be Unicode text" in response.text, response.text


def test_every_target_has_a_slice() -> None:
    assert {*SLICE, "requests", "prompts"} == set(TARGETS) and set(AT_ONCE) == {"sampling", "requests", "prompts"}
