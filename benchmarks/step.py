"""One decode step, kernel by kernel: `python -m benchmarks.step --model deepseek-v3-2b`.

Times every kernel call of steps at batch 1 inside vLLM's engine, and counts the bytes of weights and cache that each
call is given. Two ratios say what a step reads beyond what it must (the active weights and the cache, `cost.py`): the
bytes given over those, and the bytes that memory could have delivered while the kernels ran over those. The bandwidth
is measured before and after.
"""

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks import limits
from benchmarks.engines import vllm_options
from benchmarks.models import NAMES, checkpoint
from benchmarks.summary import shape_of

WEIGHTED = ("linear", "linear_split", "linear_gated", "embedding")
KERNELS = (
    *WEIGHTED,
    "linear_heads",
    "experts",
    "choose_experts",
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "write_kv",
    "paged_attention",
    "write_latent",
    "mla_attention",
    "mla_prefill",
)


def weight_bytes(weight: Any) -> int:
    return int(weight.data.nbytes)


def given_bytes(name: str, arguments: tuple[Any, ...]) -> int:
    """Of the weights and the cache that a call with these arguments reads."""
    if name == "embedding":
        ids, weight = arguments[0], arguments[1]
        return int(ids.shape[0]) * weight_bytes(weight) // weight.out_features
    if name in WEIGHTED:
        return weight_bytes(arguments[1])
    if name == "linear_heads":
        return sum(map(weight_bytes, arguments[1]))
    if name == "experts":
        chosen = set(arguments[3].asnumpy().ravel().tolist())
        return sum(weight_bytes(weights[expert]) for weights in arguments[1:3] for expert in chosen)
    if name in ("paged_attention", "mla_attention", "mla_prefill"):
        cache, sequences = arguments[1], arguments[2]
        positions = cache.shape[0] * cache.shape[3 if name == "paged_attention" else 1]
        return int(sequences.seq_lens.asnumpy().sum()) * int(cache.nbytes) // positions
    return 0


class Meter:
    """Times and bytes of kernel calls, by kernel."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def attach(self, kernels: Any) -> None:
        for name in KERNELS:
            setattr(kernels, name, self._timed(name, getattr(kernels, name)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[name] += time.perf_counter() - begin
            self.bytes[name] += given_bytes(name, arguments)
            self.calls[name] += 1
            return result

        return timed

    def subtract(self) -> None:
        """From now on, count what comes on top of as much as was counted until now."""
        for counter in (self.seconds, self.bytes, self.calls):
            negative = {name: -count for name, count in counter.items()}
            counter.clear()
            counter.update(negative)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="qwen2.5-0.5b")
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(str(checkpoint(options.model)), **vllm_options(options.model))
    from vllm_ms_models import kernels

    meter, prompt = Meter(), list(range(10, 20))
    meter.attach(kernels.get())

    def generate(tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)

    generate(8)
    for counter in (meter.seconds, meter.bytes, meter.calls):
        counter.clear()
    before = limits.measure()["read_gb_s"]
    generate(1)
    meter.subtract()  # the prompt
    generate(1 + options.steps)
    bandwidth = statistics.mean((before, limits.measure()["read_gb_s"]))
    print(f"{options.model}: ms and MB a step, read bandwidth {bandwidth:.1f} GB/s")
    for name, seconds in meter.seconds.most_common():
        count, size = meter.calls[name] / options.steps, meter.bytes[name] / options.steps
        if not count:
            continue
        print(f"{name:16} {count:6.1f} calls {seconds / options.steps * 1e3:8.3f} ms {size / 1e6:9.2f} MB")
    needed = shape_of(options.model).decode_step([len(prompt) + options.steps / 2]).bytes
    given = meter.bytes.total() / options.steps
    possible = meter.seconds.total() / options.steps * bandwidth * 1e9
    print(f"needed {needed / 1e6:.1f} MB; given {given / needed:.3f} times that; ", end="")
    print(f"the bandwidth during the kernels' {meter.seconds.total() / options.steps * 1e3:.2f} ms: ", end="")
    print(f"{possible / needed:.3f} times")


if __name__ == "__main__":
    main()
