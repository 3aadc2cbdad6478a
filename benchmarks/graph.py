"""Would a compiled graph be quicker on a CPU? `python -m benchmarks.graph`.

Two decoders of 24 layers whose matrices are so small (64 x 64) that only calls take time: this package's Qwen2 in
vLLM's engine, one token a step, and one of MindSpore's stock operators as a `mindspore.jit` graph, compiled before it
is timed, which does no more than that: norms, projections, rotation, attention over 64 positions, gated MLP, float32.
By turns, medians. What calls take of a step of a model of real size is the first figure over that step's time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

LAYERS, HIDDEN, HEADS, MLP, CONTEXT = 24, 64, 4, 128, 64


def engine_step() -> Callable[[], list[float]]:
    """A function that generates some tokens, and says how long the model took for each, in seconds."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoModelForCausalLM, Qwen2Config
    from vllm import LLM, SamplingParams

    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS}
    config = Qwen2Config(**sizes, num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=256)
    folder = tempfile.mkdtemp(prefix="vllm_ms_models_graph_")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 256, "kv_cache_memory_bytes": 2**25}
    llm = LLM(folder, dtype="float32", disable_log_stats=True, **options)
    shell = llm.apply_model(lambda model: model)[0]
    forward, times = shell.forward, []

    def timed(*arguments: Any, **given: Any) -> Any:
        start = time.perf_counter()
        result = forward(*arguments, **given)
        times.append(time.perf_counter() - start)
        return result

    shell.forward = timed

    def run() -> list[float]:
        times.clear()
        sampling = SamplingParams(max_tokens=64, ignore_eos=True, detokenize=False, temperature=0)
        llm.generate([{"prompt_token_ids": list(range(32))}], sampling, use_tqdm=False)
        return times[1:]  # the first is the prompt's

    return run


def graph_step() -> Callable[[], list[float]]:
    """The same of the graph."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn, ops

    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> Tensor:
        return Tensor((rng.normal(size=shape) / 8).astype(np.float32))

    class Block(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = matrix(HIDDEN, 3 * HIDDEN), matrix(HIDDEN, HIDDEN)
            self.gate_up, self.down = matrix(HIDDEN, 2 * MLP), matrix(MLP, HIDDEN)
            self.keys, self.values = (matrix(HEADS, CONTEXT, HIDDEN // HEADS) for _ in range(2))

        def norm(self, x: Tensor) -> Tensor:
            return x * ops.rsqrt(ops.ReduceMean(True)(x * x, -1) + 1e-6)

        def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            query, _, _ = ops.split(ops.matmul(self.norm(x), self.qkv), HIDDEN, 1)
            first, second = ops.split(query.reshape(HEADS, 1, HIDDEN // HEADS), HIDDEN // HEADS // 2, 2)
            query = ops.concat((first * cos - second * sin, second * cos + first * sin), 2)
            scores = ops.softmax(ops.matmul(query, self.keys.swapaxes(1, 2)), -1)
            x = x + ops.matmul(ops.matmul(scores, self.values).reshape(1, HIDDEN), self.out)
            gate, up = ops.split(ops.matmul(self.norm(x), self.gate_up), MLP, 1)
            return x + ops.matmul(gate * ops.sigmoid(gate) * up, self.down)

    class Blocks(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.CellList([Block() for _ in range(LAYERS)])

        def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, cos, sin)
            return x

    graph = ms.jit(Blocks().construct, jit_level="O1")
    given = matrix(1, HIDDEN), matrix(HIDDEN // HEADS // 2), matrix(HIDDEN // HEADS // 2)
    for _ in range(20):
        graph(*given).asnumpy()

    def run() -> list[float]:
        times = []
        for _ in range(64):
            start = time.perf_counter()
            graph(*given).asnumpy()
            times.append(time.perf_counter() - start)
        return times

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ours, graph = engine_step(), graph_step()
    medians = [(statistics.median(ours()), statistics.median(graph())) for _ in range(rounds)]
    for name, values in zip(("eager", "graph"), zip(*medians, strict=True), strict=True):
        print(f"{name}: {1000 * statistics.median(values):.3f} ms a step of {LAYERS} layers")
    print(f"graph / eager: {statistics.median(theirs / own for own, theirs in medians):.2f}")


if __name__ == "__main__":
    main()
