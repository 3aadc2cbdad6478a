"""What vLLM does with many requests: chunks, cached prefixes, preemption, priorities. No token changes by it."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.features.service import Service


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 97 + 31 * i * i + 7 * i) % 1000 for i in range(length)]


@pytest.mark.representative
@pytest.mark.feature("chunked prefill")
def test_a_prompt_is_read_in_chunks(service: Service) -> None:
    """Of 64 tokens, the server's --max-num-batched-tokens (test_profiling.py sees the chunks)."""
    long = prompt(1, 300)
    service.family.check_greedy(long, service.tokens(long))


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
    """Ten times 145 tokens, and room for 1280."""
    before = service.counter("num_preemptions")
    prompts = [prompt(seed, 90 + seed) for seed in range(10)]
    reply = service.complete(prompts, max_tokens=50)
    assert service.counter("num_preemptions") > before
    for choice in reply.choices:
        service.family.check_greedy(prompts[choice.index], list(choice.token_ids))


@pytest.mark.representative
@pytest.mark.feature("priority scheduling")
def test_the_urgent_overtake(service: Service) -> None:
    """Six times as many requests as run at once (16), then an urgent one: it is done while others still wait."""
    requests, tokens = 96, 70
    left = dict.fromkeys(range(requests), tokens)
    unfinished = None
    with ThreadPoolExecutor(1) as pool:
        urgent = None
        prompts = [prompt(seed, 8) for seed in range(requests)]
        for chunk in service.complete(prompts, max_tokens=tokens, priority=10, stream=True):
            urgent = urgent or pool.submit(service.tokens, prompt(99, 8), max_tokens=1, priority=-10)
            for choice in chunk.choices:
                left[choice.index] -= len(choice.token_ids or ())
            if unfinished is None and urgent.done():
                unfinished = sum(1 for number in left.values() if number > 0)
        assert urgent is not None and urgent.result()
    assert not any(left.values())
    assert unfinished is not None and unfinished > 16


@pytest.mark.feature("requests that their client gives up")
def test_a_client_that_hangs_up(service: Service) -> None:
    """What it asked for is not computed on."""
    before = service.counter("generation_tokens")
    stream = service.complete([prompt(seed, 8) for seed in range(4)], max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 30
    while service.gauge("num_requests_running") + service.gauge("num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert service.counter("generation_tokens") - before < 4 * 400
    answered = prompt(5, 8)
    service.family.check_greedy(answered, service.tokens(answered))
