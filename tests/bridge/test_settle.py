"""What is refused of a model whose decoder becomes graphs. Nothing of it runs on the hardware."""

from types import SimpleNamespace

import pytest
import torch
from mindspore import nn

from tests.ascend.standin import StandIn
from vllm_ms_models import kernels
from vllm_ms_models.bridge.settle import settle
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.layers.norm import RMSNorm


@pytest.mark.parametrize("beside", [False, True])
def test_a_layer_outside_the_decoder(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to be made beside the graphs, as encoders are."""
    monkeypatch.setattr(kernels, "_active", AscendGraphKernels(StandIn()))
    cell, decoder = nn.Cell(), nn.Cell()
    cell.language_model = decoder
    if beside:
        with kernels.making_uncompiled():
            cell.norm = RMSNorm("norm", 16, 1e-6)
    else:
        cell.norm = RMSNorm("norm", 16, 1e-6)
    model = SimpleNamespace(cell=cell, dtype=torch.bfloat16, run=SimpleNamespace(cell=decoder, start=lambda: None))
    if beside:
        settle(model)
        return
    with pytest.raises(TypeError, match=r"RMSNorm is not part of the decoder; make it within `making_encoders\(\)`\."):
        settle(model)
