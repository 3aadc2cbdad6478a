"""What vLLM does with many requests at once: chunks, cached prefixes, preemption, priorities. No token changes by it."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.features.service import Service


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 97 + 31 * i * i + 7 * i) % 1000 for i in range(length)]


@pytest.mark.representative
@pytest.mark.feature("chunked prefill")
def test_a_prompt_is_read_in_chunks(service: Service) -> None:
    """Of 64 tokens, the server's --max-num-batched-tokens: 300 take five steps."""
    assert service.post("/reset_prefix_cache", {}).status_code == 200
    long, steps = prompt(1, 300), service.gauge("iteration_tokens_total_count")
    tokens = service.tokens(long)
    service.family.check_greedy(long, tokens)
    assert service.gauge("iteration_tokens_total_count") - steps == 5 + len(tokens) - 1


@pytest.mark.representative
@pytest.mark.feature("prefix caching")
@pytest.mark.feature("prefix caching with a salt")
def test_prefixes_are_cached_for_those_with_the_same_salt(service: Service) -> None:
    beginning = prompt(2, 96)

    def cached(last: int, **options: str) -> int:
        whole = [*beginning, last]
        reply = service.complete(whole, max_tokens=4, **options)
        service.family.check_greedy(whole, list(reply.choices[0].token_ids))
        details = reply.usage.prompt_tokens_details
        return details.cached_tokens if details else 0

    assert service.post("/reset_prefix_cache", {}).status_code == 200
    assert [cached(1), cached(2)] == [0, 96]
    assert [cached(3, cache_salt="a"), cached(4, cache_salt="a"), cached(5, cache_salt="b")] == [0, 96, 0]
    assert service.post("/reset_prefix_cache", {}).status_code == 200
    assert cached(6) == 0


@pytest.mark.representative
@pytest.mark.feature("preemption")
def test_requests_that_do_not_fit_are_preempted(service: Service) -> None:
    """Ten times 170 tokens, and room for 1280."""
    before = service.counter("num_preemptions")
    prompts = [prompt(seed, 90 + seed) for seed in range(10)]
    reply = service.complete(prompts, max_tokens=80)
    assert service.counter("num_preemptions") > before
    for choice in reply.choices:
        service.family.check_greedy(prompts[choice.index], list(choice.token_ids))


@pytest.mark.representative
@pytest.mark.feature("priority scheduling")
def test_the_urgent_overtake(service: Service) -> None:
    """Four times as many requests as run at once (16), then an urgent one: others still wait when it is done."""
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(service.complete, [prompt(seed, 8) for seed in range(64)], max_tokens=60, priority=10)
        end = time.monotonic() + 60
        while service.gauge("num_requests_waiting") < 40:
            assert time.monotonic() < end and not patient.done()
        service.tokens(prompt(99, 8), max_tokens=1, priority=-10)
        waiting = service.gauge("num_requests_waiting")
        assert len(patient.result().choices) == 64
    assert waiting > 0
