"""A real `vllm.LLM` in this process, one after another, without leaving anything behind."""

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

# Enough for a dozen sequences of a tiny model; a small cache starts quickly.
_CACHE_BYTES = 32 * 2**20

_DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",  # "auto" would round a float32 checkpoint to bfloat16
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_logprobs": -1,  # any number
    "kv_cache_memory_bytes": _CACHE_BYTES,
}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """`os.environ` with `values` for the time of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def engine(folder: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> "Iterator[LLM]":
    """vLLM's engine, scheduler and worker in this process, serving `folder`; shut down at the end of the block.

    `options` are those of `LLM`. `env` is set for the time of the block, e.g. {"VLLM_MS_KERNELS": "reference"}.
    """
    from vllm import LLM

    # vLLM collects garbage ten times between start and end; frozen, all that was imported is not searched again.
    gc.freeze()
    with environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | dict(env or {})):
        llm = LLM(str(folder), **(_DEFAULTS | options))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()  # worker and torch.distributed; it also undoes the freeze
            # A test may hold on to `llm` (a failure's traceback does): the model must not stay with it.
            llm.llm_engine.__dict__.clear()
            del llm
            gc.collect()


def greedy_on_data_parallel_ranks(
    folder: Path, prompts: Sequence[Sequence[int]], tokens: int, ranks: int, **options: Any
) -> "list[list[RequestOutput]]":
    """For each prompt: what each of the ranks answers, all prompts at once; and the first, alone, when others idle."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    sampling = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=-1,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    arguments = AsyncEngineArgs(str(folder), data_parallel_size=ranks, **(_DEFAULTS | options))

    async def run() -> "list[list[RequestOutput]]":
        llm = AsyncLLM.from_engine_args(arguments)

        async def answer(prompt: Sequence[int], rank: int, name: str) -> "RequestOutput":
            given = {"prompt_token_ids": list(prompt)}
            return [o async for o in llm.generate(given, sampling, name, data_parallel_rank=rank)][-1]

        try:
            requests = [(number, rank) for number in range(len(prompts)) for rank in range(ranks)]
            coming = [answer(prompts[number], rank, f"{number} on {rank}") for number, rank in requests]
            found = await asyncio.wait_for(asyncio.gather(*coming), 120)
            alone = [await asyncio.wait_for(answer(prompts[0], rank, f"alone {rank}"), 120) for rank in range(ranks)]
            return [found[number * ranks : (number + 1) * ranks] for number in range(len(prompts))] + [alone]
        finally:
            llm.shutdown()

    return asyncio.run(run())


def answer_once(folder: Path, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
    """What reference/answer_once.py prints: an engine in a process of its own, one prompt, the most memory it took."""
    program = Path(__file__).parent / "reference" / "answer_once.py"
    arguments = [str(folder), json.dumps(options), *map(str, prompt)]
    run = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ANSWER ")]
    answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
    return answer


def greedy(
    llm: "LLM",
    prompts: Sequence[Sequence[int]],
    tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> "list[RequestOutput]":
    """Exactly `tokens` most likely tokens after each prompt; `logprobs` -1 asks for the whole vocabulary's."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)


def token_ids(outputs: "Sequence[RequestOutput]") -> list[list[int]]:
    """The tokens generated for each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def distributions(positions: Sequence[Mapping[int, Any] | None], vocab_size: int) -> np.ndarray:
    """Log-probabilities `[positions, vocab]` from vLLM's dictionaries of the whole vocabulary.

    The first position of a prompt has none (None) and is left out.
    """
    rows = [position for position in positions if position is not None]
    result = np.full((len(rows), vocab_size), np.nan)
    for row, position in zip(result, rows, strict=True):
        for token, entry in position.items():
            row[token] = entry.logprob
    assert not np.isnan(result).any(), "a token of the vocabulary has no log-probability"
    return result


def counter(llm: "LLM", name: str) -> int:
    """One of vLLM's Prometheus counters, e.g. `vllm:num_preemptions`; the engine needs `disable_log_stats=False`."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
