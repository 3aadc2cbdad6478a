"""MindSpore Transformers (mindformers) as a source of models: its inference models, fed from our batches.

On a CPU its norms, rotary embeddings, core attention and experts, whose operators MindSpore has for Ascend only, give
way to Cells on our kernels (`cpu`, `parts`). On Ascend nothing of it is replaced (`ascend`, not run on hardware).

`network` imports mindformers; this module imports neither it nor MindSpore.
"""

from collections.abc import Collection
from typing import Any

from vllm_ms_models import runtime, suites
from vllm_ms_models.suites.mindformers import checks

VERSIONS = ("1.9.0",)

# What its `__init__` imports besides what vLLM depends on; pip is not asked to choose them (suites.require).
NEEDED = (
    "datasets",
    "deprecated",
    "jieba",
    "mindpet",
    "multiprocess",
    "nltk",
    "pandas",
    "pyarrow",
    "rouge-chinese",
    "tensorboardX",
    "wrapt",
    "xxhash",
)

TENSOR_PARALLEL = False

# Architecture -> the module of mindformers that has it.
MODELS = {
    "DeepseekV3ForCausalLM": "mindformers.models.deepseek3.modeling_deepseek_v3_infer",
    "Glm4ForCausalLM": "mindformers.models.glm4.modeling_glm4_infer",
    "Glm4MoeForCausalLM": "mindformers.models.glm4_moe.modeling_glm4_moe_infer",
    "Qwen2ForCausalLM": "mindformers.models.qwen2.modeling_qwen2_infer",
    "Qwen3ForCausalLM": "mindformers.models.qwen3.modeling_qwen3_infer",
    "Qwen3MoeForCausalLM": "mindformers.models.qwen3_moe.modeling_qwen3_moe_infer",
}


def check() -> None:
    """SuiteError unless a version of mindformers that works here is installed, and all that it imports."""
    suites.require("mindformers", "mindformers", VERSIONS, NEEDED)


def architectures() -> Collection[str]:
    return MODELS


def check_model(architecture: str, hf_config: Any, dtype: str, ranks: int) -> None:
    """SuiteError for a model that mindformers would build otherwise than its config says, or not at all."""
    if found := " ".join(checks.problems(architecture, hf_config, dtype, runtime.device())):
        raise suites.SuiteError(found)


def build(architecture: str, hf_config: Any, context: Any) -> Any:
    """The Cell of `architecture`, as `bridge/model.py` wants it."""
    from vllm_ms_models import kernels
    from vllm_ms_models.suites.mindformers import network

    device = "ascend" if kernels.get().name == "ascend" else "cpu"
    made = network.make(architecture, MODELS[architecture], hf_config, context, device)
    if device == "ascend":
        from vllm_ms_models.suites.mindformers.ascend import AscendCausalLM

        return AscendCausalLM(made, hf_config, context)
    from vllm_ms_models.suites.mindformers.cpu import CpuCausalLM

    return CpuCausalLM(made, hf_config, context)
