"""What adapters cost: a batch over several of them beside the plain batch. `python -m benchmarks.lora`.

One engine with --enable-lora serves the same prompts without adapters and with as many as --adapters, which take turns
from request to request; all seven linear layers of each decoder layer are adapted. Plain and adapted runs take turns
too; medians are compared, and the quickest of each, which a busy machine disturbs less. Decoding is timed as
generations of many tokens minus those of one.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.engines import vllm_options
from benchmarks.models import CONFIGS, checkpoint, split


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the adapted modules of a layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def write_adapter(folder: Path, config: dict[str, Any], rank: int, seed: int) -> Path:
    """A random adapter in bf16, as PEFT would save it."""
    folder.mkdir()
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for module, (outputs, inputs) in shapes(config).items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for matrix, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = random.standard_normal(shape, np.float32) * 0.02
                tensors[f"{name}.lora_{matrix}.weight"] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[1024], help="tokens of each of 4 prompts read at once"
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that is busy")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as folder:
        config = CONFIGS[split(options.model)[0]]
        paths = [write_adapter(Path(folder, str(n)), config, options.rank, n) for n in range(options.adapters)]
        requests = [LoRARequest(f"adapter {n}", n + 1, str(path)) for n, path in enumerate(paths)]
        settings = {"enable_lora": True, "max_loras": options.adapters, "max_lora_rank": max(options.rank, 8)}
        llm = LLM(str(checkpoint(options.model)), **vllm_options(options.model), **settings)

        def seconds(batch: int, length: int, tokens: int, adapted: bool) -> float:
            prompts = [{"prompt_token_ids": [10 + (7 * n + i) % 1000 for i in range(length)]} for n in range(batch)]
            chosen = [requests[n % len(requests)] if adapted else None for n in range(batch)]
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            begin = clock()
            llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
            return clock() - begin

        def compare(name: str, run: Any) -> None:
            run(True)
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(options.rounds):
                for adapted, found in times.items():
                    found.append(run(adapted))
            plain, adapted = (statistics.median(times[kind]) * 1e3 for kind in (False, True))
            least = min(times[True]) / min(times[False])
            print(
                f"{name:20} plain {plain:8.2f} ms   {options.adapters} adapters {adapted:8.2f} ms   "
                f"ratio {adapted / plain:.3f} (of the quickest: {least:.3f})",
                flush=True,
            )

        print(f"{options.model}, rank {options.rank}, all linear layers")
        for batch in options.batches:

            def decode(adapted: bool, batch: int = batch) -> float:
                one = seconds(batch, 16, 1, adapted)
                return (seconds(batch, 16, 1 + options.steps, adapted) - one) / options.steps

            compare(f"decode, batch {batch}", decode)
        for length in options.prompts:
            compare(f"prefill, 4 x {length}", lambda adapted, length=length: seconds(4, length, 1, adapted))


if __name__ == "__main__":
    main()
