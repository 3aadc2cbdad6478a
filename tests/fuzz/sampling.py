"""Sampling parameters of every kind and size, through a real engine in this process: answered or refused."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.models import write_tokenizer
from tests.checkpoints import checkpoint
from tests.engines import engine
from tests.fuzz import mutation

if TYPE_CHECKING:
    from vllm import LLM

VOCABULARY = 211
LENGTH = 64  # of a sequence, at most


def number(rng: Random, low: float, high: float) -> Any:
    """Mostly within the bounds, where the engine has to work; sometimes at them, just beyond, or anything."""
    kind = rng.randrange(12)
    if kind < 6:
        return rng.uniform(low, high)
    if kind < 8:
        return rng.choice((low, high, int(low), int(high), 1, 0))
    if kind == 8:
        return rng.choice((low - 0.1, high + 0.1, 1e-300, 5e-324))
    if kind == 9:
        return rng.choice(mutation.NOT_FINITE)
    return rng.choice((0, 0.5, 1, 1e-5, mutation.number(rng)))


INTEGERS = [number for number in mutation.NUMBERS if type(number) is int]


def whole(rng: Random, low: int, high: int) -> int:
    """Of the right type: what has another is refused by the server, and not looked at by the engine."""
    return rng.choice(INTEGERS) if rng.random() < 0.03 else rng.randint(low, high)


def token(rng: Random) -> Any:
    if rng.random() < 0.02:
        return rng.choice((-1, VOCABULARY, 2**31, 2**63, -(2**63), 10**30))
    return rng.randrange(VOCABULARY)


def tokens(rng: Random, most: int = 5) -> list[Any]:
    found = [token(rng) for _ in range(rng.randint(0, most))]
    return found * 2 if rng.random() < 0.1 else found


def words(rng: Random) -> list[str]:
    return [rng.choice((f"t{rng.randrange(VOCABULARY)}", f"t{token(rng)} t3", mutation.text(rng)))[:300]] * rng.randint(
        1, 2
    )


STRUCTURES: list[dict[str, Any]] = [
    *({"regex": pattern} for pattern in ("t1", "(t[0-9])+", "t1( t[0-9]+)*", "((", "", "[^\\x00]*", "(a|b){1,3}")),
    *({"choice": choice} for choice in (["t1", "t2 t3"], [], ["t1"], [""])),
    *({"json": schema} for schema in ('{"type": "integer"}', "{}", "{", '{"type": "nothing"}', '{"$ref": "#"}')),
    *({"grammar": text} for text in ('root ::= "t1" | "t2"', "root ::=", "")),
    *({"json_object": True}, {"regex": "t1", "choice": ["t2"]}),
]

SETTINGS: dict[str, Callable[[Random], Any]] = {
    "n": lambda rng: rng.choice((1, 1, 2, 3, 0, -1, 10**30)),
    "temperature": lambda rng: number(rng, 0, 2),
    "top_p": lambda rng: number(rng, 0, 1),
    "top_k": lambda rng: whole(rng, -2, 2 * VOCABULARY),
    "min_p": lambda rng: number(rng, 0, 1),
    "presence_penalty": lambda rng: number(rng, -2, 2),
    "frequency_penalty": lambda rng: number(rng, -2, 2),
    "repetition_penalty": lambda rng: number(rng, 0, 3),
    "seed": lambda rng: whole(rng, -3, 2**40),
    "stop": words,
    "stop_token_ids": tokens,
    "bad_words": words,
    "logit_bias": lambda rng: {token(rng): number(rng, -100, 100) for _ in range(rng.randint(0, 3))},
    "allowed_token_ids": tokens,
    "min_tokens": lambda rng: whole(rng, 0, 3),
    "logprobs": lambda rng: whole(rng, -1, 8),
    "prompt_logprobs": lambda rng: whole(rng, -1, 8),
    "ignore_eos": lambda rng: rng.random() < 0.5,
    "skip_special_tokens": lambda rng: rng.random() < 0.5,
    "include_stop_str_in_output": lambda rng: rng.random() < 0.5,
}
# The API of the server has these under the same names; the rest is the engine's own.
ENGINE_SETTINGS: dict[str, Callable[[Random], Any]] = {
    **SETTINGS,
    "detokenize": lambda rng: rng.random() < 0.8,
    "logprob_token_ids": tokens,
    "thinking_token_budget": lambda rng: whole(rng, -1, 5),
    "skip_reading_prefix_cache": lambda rng: rng.random() < 0.5,
    "structured_outputs": lambda rng: rng.choice(STRUCTURES),
}
SELDOM = {"structured_outputs": 0.02, "n": 0.05}  # these take long


def settings(
    rng: Random, of: dict[str, Callable[[Random], Any]], shares: Sequence[float] = (0.05, 0.1, 0.2, 0.5)
) -> dict[str, Any]:
    """Some of them; the fewer, the likelier that all are in order."""
    share = rng.choice(shares)
    return {name: make(rng) for name, make in of.items() if rng.random() < min(share, SELDOM.get(name, 1))}


def prompt(rng: Random) -> list[Any]:
    kind = rng.randrange(20)
    if kind == 0:
        return rng.choice(([], [VOCABULARY], [-1], [2**31], [2**63], [0] * LENGTH, [0] * (LENGTH + 1), [10**30]))
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]


@contextmanager
def engine_requests() -> Iterator[Callable[[Sequence[Random]], list[str]]]:
    """All at once; every one that the engine takes must end, with as many tokens as it may have."""
    folder = checkpoint("qwen2", num_hidden_layers=1)
    write_tokenizer(folder, VOCABULARY)
    logging.disable(logging.ERROR)  # vLLM tells the story of each refused grammar
    with engine(folder, skip_tokenizer_init=False, max_model_len=LENGTH, max_num_seqs=64) as llm:
        known = answer(llm)

        def check(rngs: Sequence[Random]) -> list[str]:
            became = {str(number): take(llm, str(number), rng) for number, rng in enumerate(rngs)}
            while llm.llm_engine.has_unfinished_requests():
                for output in llm.llm_engine.step():
                    if output.finished:
                        assert all(len(sample.token_ids) <= 3 for sample in output.outputs)
                        became[output.request_id.split("_")[-1]] = "answered"
            assert "taken" not in became.values(), "a request has no end"
            assert answer(llm) == known, "the engine answers otherwise than before"
            return list(became.values())

        try:
            yield check
        finally:
            logging.disable(logging.NOTSET)


def take(llm: "LLM", name: str, rng: Random) -> str:
    """Give the engine a request; it may refuse it with what vLLM's server makes a status of 400 of."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    given = settings(rng, ENGINE_SETTINGS)
    try:
        if "structured_outputs" in given:
            given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
        params = SamplingParams(max_tokens=rng.randint(1, 3), output_kind=RequestOutputKind.FINAL_ONLY, **given)
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt(rng)}, params)
    except (VLLMClientError, ValueError, TypeError, OverflowError):
        return "refused"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} for {given!r:.1000}") from error
    return "taken"


def answer(llm: "LLM") -> list[int]:
    """A greedy one, which no request may change."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [3, 5, 7, 11]}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)
