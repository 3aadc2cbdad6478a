"""The greedy choice is torch's, ties and NaN included."""

import pytest
import torch

from vllm_ms_models.bridge.sampler import argmax


@pytest.mark.parametrize("vocab", [1, 5, 1023, 1024, 1025, 4096, 10007])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_argmax(rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(rows + vocab)
    few = torch.randint(0, 3, (rows, vocab), generator=generator).float()  # ties everywhere
    for logits in (torch.randn(rows, vocab, generator=generator), few, torch.full((rows, vocab), -torch.inf)):
        assert torch.equal(argmax(logits), logits.argmax(1))


def test_argmax_of_nan() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    logits[0, 4990] = logits[1, 0] = logits[2, 2000] = torch.nan
    logits[2, 3000] = torch.nan
    logits[3, 17] = torch.inf
    assert argmax(logits).tolist() == [4990, 0, 2000, 17]
