"""What a host with Ascend devices refuses, before anything is loaded. Nothing of it runs here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs

from tests.checkpoints import checkpoint
from vllm_ms_models import runtime


@pytest.fixture(autouse=True)
def ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver shows one device."""
    monkeypatch.setattr(runtime, "device", lambda: "ascend")


def configure(folder: Path, **options: Any) -> Any:
    return EngineArgs(str(folder), skip_tokenizer_init=True, max_model_len=64, **options).create_engine_config()


def test_sixteen_bits_are_taken() -> None:
    for dtype in ("bfloat16", "float16", "auto"):
        configure(checkpoint("llama", dtype=torch.bfloat16), dtype=dtype)


def test_float32() -> None:
    with pytest.raises(ValueError, match=r"float32 is not supported on Ascend, .*; use --dtype bfloat16"):
        configure(checkpoint("llama"), dtype="float32")
