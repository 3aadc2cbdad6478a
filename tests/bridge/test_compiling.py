"""Which models run as graphs on Ascend, and why the others do not. Nothing of it runs here."""

from typing import Any

import pytest
import torch
from vllm import EngineArgs

from tests.checkpoints import checkpoint
from vllm_ms_models import runtime
from vllm_ms_models.bridge.compiling import problem


def reason(family: str = "llama", model: dict[str, Any] | None = None, **options: Any) -> str | None:
    folder = checkpoint(family, dtype=torch.bfloat16, **({"head_dim": 32} if model is None else model))
    given: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 64, **options}
    return problem(EngineArgs(str(folder), **given).create_engine_config())


def test_what_is_compiled() -> None:
    assert reason() is None
    assert reason(tensor_parallel_size=2) is None
    assert reason(pipeline_parallel_size=2) is None
    assert reason(data_parallel_size=2) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"enforce_eager": True}, "--enforce-eager"),
        ({"enable_lora": True}, "adapters are not compiled yet"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype int8_per_token_head"),
        ({"runner": "pooling"}, "what embeds or classifies is not compiled yet"),
        ({"model": {"head_dim": 20}}, "heads are not of a multiple of 16"),
        ({"family": "gpt_oss", "model": {}}, "graphs of GptOssForCausalLM are not supported yet"),
        ({"family": "gemma2", "model": {"head_dim": 16}}, "attention with soft caps is no fused operator"),
    ],
    ids=str,
)
def test_what_runs_operator_by_operator(
    options: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "device", lambda: "ascend")
    assert reason(**options) == sentence
