"""MindSpore infers whole graphs of the real operators, for tensors of any size; then a CPU lacks the first kernel."""

from typing import Any

import mindspore as ms
import pytest

from tests.ascend.whole_graphs import STEPS, check_inferred, family_config, graphs_of, uncapped
from tests.checkpoints import DEEPSEEK, config
from tests.quantization.test_quantized_experts import SCHEMES
from tests.zoo.family import families
from vllm_ms_models.bridge.compiling import COMPILED
from vllm_ms_models.bridge.graph import Takes
from vllm_ms_models.distributed.communication import GraphGroup
from vllm_ms_models.distributed.rows import DataParallel
from vllm_ms_models.distributed.stage import Stage

STEPS_AND_DTYPES = [
    pytest.param(
        kind, dtype, id=f"{kind}-{dtype}", marks=() if (kind, dtype) == ("mixed", ms.bfloat16) else pytest.mark.slow
    )
    for kind in STEPS
    for dtype in (ms.float16, ms.bfloat16)
]
STEP = pytest.mark.parametrize(("kind", "dtype"), STEPS_AND_DTYPES)
WIDE = DEEPSEEK | {"qk_rope_head_dim": 32, "n_routed_experts": 16, "num_experts_per_tok": 4}
WIDE |= {"n_group": 4, "topk_group": 2, "q_lora_rank": 64}  # MindSpore cannot print a few numbers in bfloat16
QUANTIZED: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "deepseek_v3": WIDE,
}
# What the operators do not multiply as one: experts whose inputs are no multiple of a group's.
FORMATS = {
    "llama": ("w8a8 dynamic", "w8a8 static", "w8a16", "packed w4a16"),
    "qwen3_moe": ("w8a8 dynamic", "w8a8 static", "w8a16"),
    "deepseek_v3": ("w8a8 dynamic", "w8a8 static", "w8a16"),
}
QUICK = ("deepseek_v3", "w8a8 dynamic")


@pytest.mark.slow
@STEP
@pytest.mark.parametrize(
    ("family", "case"),
    [
        (name, case)
        for name, family in families().items()
        if set(family.architectures) & COMPILED
        for case in uncapped(name)
    ],
)
def test_families(family: str, case: str, kind: str, dtype: Any) -> None:
    known = families()[family]
    made = family_config(family, dict(known.cases[case]))
    check_inferred(graphs_of(known.architectures[0], made, dtype), kind)


@STEP
@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) == QUICK else pytest.mark.slow)
        for family, names in FORMATS.items()
        for name in names
    ],
)
def test_formats(family: str, name: str, kind: str, dtype: Any) -> None:
    settings = dict(SCHEMES[name].config or {}) | {"ignore": ["lm_head", "re:.*kv_b_proj$", "re:.*mlp.gate$"]}
    architecture = families()[family].architectures[0]
    graphs = graphs_of(architecture, config(family, **QUANTIZED[family]), dtype, settings)
    assert check_inferred(graphs, kind)["ApplyRotaryPosEmb"] == len(graphs.layers)


@STEP
def test_experts_of_other_ranks(kind: str, dtype: Any) -> None:
    """And the sum over ranks, as it is compiled."""
    context: dict[str, Any] = {"tensor_parallel": GraphGroup(1, 2, "nobody"), "expert_parallel": True}
    made = config("qwen3_moe", **QUANTIZED["qwen3_moe"])
    graphs = graphs_of("Qwen3MoeForCausalLM", made, dtype, **context)
    # Of the embedding, and of each layer's attention and experts.
    assert check_inferred(graphs, kind)["AllReduce"] == 1 + 2 * len(graphs.layers)


@STEP
def test_experts_for_data_parallel_ranks(kind: str, dtype: Any) -> None:
    tokens = sum(rows for rows, _ in STEPS[kind])
    ranks = DataParallel(GraphGroup(1, 2, "nobody"), lambda: (3, tokens))
    made = config("qwen3_moe", **QUANTIZED["qwen3_moe"])
    graphs = graphs_of("Qwen3MoeForCausalLM", made, dtype, data_parallel=ranks, expert_parallel=True)
    counts = check_inferred(graphs, kind)
    assert counts["AllGather"] == counts["ReduceScatter"] == len(graphs.layers) and not counts["AllReduce"]


@STEP
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stages(stage: int, kind: str, dtype: Any) -> None:
    """Of a pipeline: what the second takes and the first gives are hidden states and residual."""
    own = Stage(stage, 2, (range(1), range(1, 3))[stage])
    takes: Takes = "ids" if own.is_first else "stream"
    made = config("qwen2", head_dim=32, num_hidden_layers=3)
    check_inferred(graphs_of("Qwen2ForCausalLM", made, dtype, takes=takes, pipeline=own), kind)


@STEP
@pytest.mark.parametrize("takes", ["embeds", *(pytest.param(x, marks=pytest.mark.slow) for x in ("stream", "ids"))])
def test_positions_of_images(takes: Takes, kind: str, dtype: Any) -> None:
    """As Qwen2.5-VL's decoder has them: of its first stage, a later one, and where no images are allowed."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    made = config("qwen2", head_dim=32, rope_parameters=rope)
    graphs = graphs_of("Qwen2ForCausalLM", made, dtype, takes=takes)
    assert graphs.sectioned is not None
    check_inferred(graphs, kind)
