"""MindSpore Transformers (mindformers) as a source of models: its inference models, fed from our batches.

On a CPU its norms, rotary embeddings and core attention, whose operators MindSpore has for Ascend only, give way to
Cells on our kernels (`cpu`). On Ascend nothing of it is replaced (`ascend`, not run on hardware).

What the models are built with is in `network`, which imports mindformers; this module imports neither it nor MindSpore.
"""

from collections.abc import Collection
from typing import Any

from vllm_ms_models import suites

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

# Architecture -> the package of mindformers.models that has it.
MODELS = {
    "Glm4ForCausalLM": "glm4",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def check() -> None:
    """SuiteError unless a version of mindformers that works here is installed, and all that it imports."""
    suites.require("mindformers", "mindformers", VERSIONS, NEEDED)


def architectures() -> Collection[str]:
    return MODELS


def build(architecture: str, hf_config: Any, context: Any) -> Any:
    """The Cell of `architecture`, as `bridge/model.py` wants it."""
    from vllm_ms_models import kernels
    from vllm_ms_models.suites.mindformers import network

    made = network.make(MODELS[architecture], hf_config, context)
    if kernels.get().name == "ascend":
        from vllm_ms_models.suites.mindformers.ascend import AscendCausalLM

        return AscendCausalLM(made, context)
    from vllm_ms_models.suites.mindformers.cpu import CpuCausalLM

    return CpuCausalLM(made, hf_config, context)
