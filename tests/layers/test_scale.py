"""Hidden states times a number, against torch's product in float32: to the bit."""

import pytest
import torch

from tests.layer_testing import (
    back_end,  # noqa: F401 (autouse)
    call,
    normal,
)
from vllm_ms_models.layers.scale import Scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [12.0, 54.545456, 1 / 3, 0.125, 1.0])
@pytest.mark.parametrize("size", [1, 37, 64])
def test_products(size: int, factor: float, dtype: torch.dtype) -> None:
    x = torch.cat([normal(0, 4, size), 1000 * normal(1, 4, size), 1e-4 * normal(2, 4, size), torch.zeros(1, size)])
    x = x.to(dtype)
    want = (x.float() * torch.tensor(factor)).to(dtype)
    assert torch.equal(call(Scale(factor, size), x), want)
