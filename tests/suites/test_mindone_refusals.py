"""What models of mindone cannot do is refused at the start, in a sentence."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoint
from tests.quantization import writers_compressed
from tests.quantization.models import written

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def configure(folder: Path, **options: Any) -> Any:
    """vLLM's configuration of a server whose models come from mindone."""
    from vllm import EngineArgs

    options = {"skip_tokenizer_init": True, "max_model_len": 64} | options
    return EngineArgs(str(folder), additional_config={"model_source": "mindone"}, **options).create_engine_config()


CASES: dict[str, tuple[Callable[[], Path], dict[str, Any], str]] = {
    "adapters": (lambda: checkpoint("llama"), {"enable_lora": True}, "--enable-lora is not supported for models of"),
    "stages": (
        lambda: checkpoint("llama"),
        {"pipeline_parallel_size": 2},
        "--pipeline-parallel-size 2 is not supported for models of mindone",
    ),
    "a draft": (
        lambda: checkpoint("llama"),
        {"speculative_config": {"model": str(checkpoint("llama", 1)), "num_speculative_tokens": 2}},
        "--speculative-config with a draft model is not supported for models of mindone",
    ),
    "experts on different ranks": (
        lambda: checkpoint("mixtral", num_local_experts=4),
        {"enable_expert_parallel": True, "tensor_parallel_size": 2},
        "--enable-expert-parallel is not supported for models of mindone",
    ),
    "pooling": (
        lambda: checkpoint("llama"),
        {"runner": "pooling"},
        "--runner pooling is not supported for models of mindone",
    ),
    "another architecture": (
        lambda: checkpoint("opt"),
        {},
        "OPTForCausalLM is not served from mindone; its models that are served here are .*LlamaForCausalLM",
    ),
    "frequencies of the longest sequence": (
        lambda: checkpoint("llama", rope_parameters=DYNAMIC),
        {},
        "Rotary embeddings of the type 'dynamic' are not supported with model_source 'mindone'",
    ),
    "heads that nothing says how to split": (
        lambda: checkpoint("phi3"),
        {"tensor_parallel_size": 2},
        "--tensor-parallel-size 2 is not supported for Phi3ForCausalLM of mindone",
    ),
    "quantized": (
        lambda: written("llama", writers_compressed.SCHEMES["w8a8 dynamic"]).folder,
        {},
        "A quantized checkpoint is not supported for models of mindone",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    folder, options, sentence = CASES[name]
    with pytest.raises(ValueError, match=sentence) as raised:
        configure(folder(), **options)
    assert re.search(r"(leave|use|serve)", str(raised.value))  # the remedy


def test_served() -> None:
    """The same without what was refused."""
    configure(checkpoint("llama"), tensor_parallel_size=2)
