"""Expanded latent attention of the Ascend back end, of operators that do what is documented. Not run on hardware."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.comparing import DTYPES, both, close, unit
from tests.ascend.steps import BLOCK, STEPS, Step, normal, numpy_of, step_of, weight_of
from vllm_ms_models.kernels import Kernels, Weight

HEADS, RANK = 3, 64


class Layer:
    """One layer's latents, query and matrices, for a cache of each back end."""

    def __init__(self, step: Step, dtype: Any, nope: int, rope: int, value: int, rng: np.random.Generator) -> None:
        self.step, self.dtype, self.width = step, dtype, RANK + rope
        self.old, self.new = (
            [normal(rng, (n, w), dtype) for w in (RANK, rope)] for n in (step.earlier.shape[0], step.tokens)
        )
        self.query = normal(rng, (step.tokens, HEADS * (nope + rope)), dtype)
        self.matrices = [rng.normal(size=(rows, RANK)) / 8 for rows in HEADS * (nope, value)]

    def cache(self, kernels: Kernels) -> Tensor:
        shape = kernels.latent_cache_shape(self.step.blocks, BLOCK, self.width)
        cache = Tensor.from_numpy(np.zeros(shape, numpy_of(self.dtype)))
        for (latent, key), slots in ((self.old, self.step.earlier), (self.new, self.step.slots)):
            kernels.write_latent(latent, key, cache, slots)
        return cache

    def weights(self, kernels: Kernels) -> tuple[list[Weight], list[Weight]]:
        loaded = [weight_of(kernels, matrix, [len(matrix)], self.dtype) for matrix in self.matrices]
        return loaded[::2], loaded[1::2]


@DTYPES
@pytest.mark.parametrize("name", ["one token", "ragged prefill"])
@pytest.mark.parametrize(
    ("nope", "rope", "value"),
    [(32, 16, 32), (16, 8, 24), (128, 64, 128)],
    ids=["shorter values", "no multiples of 16", "DeepSeek-V3"],
)
def test_prompts_are_expanded(dtype: Any, name: str, nope: int, rope: int, value: int) -> None:
    """Keys and values are rounded as in the reference, whose sums may be of another order: to a neighbour, rarely."""
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    layer = Layer(step_of(STEPS[name], rng), dtype, nope, rope, value, rng)
    got, want = (
        k.mla_prefill(layer.query, layer.cache(k), layer.step.sequences, *layer.weights(k), 0.1)
        for k in (ascend, reference)
    )
    assert standin.called.count("flash_attention") == 1 and "paged_attention" not in standin.called
    close(got, want, 2 * unit(dtype))  # a neighbour of a value of 2, whose share is at most 1


def test_a_prompt_behind_other_sequences() -> None:
    """As layers/mla.py does it: of one write, the first rows absorbed and the last, two whole prompts, expanded."""
    ascend, reference, standin = both()
    rng = np.random.default_rng(1)
    layer = Layer(step_of([(1, 20), (2, 2), (17, 17), (33, 33)], rng), ms.float16, 32, 16, 32, rng)
    last = layer.step.sequences.part(2, 4)
    spare = normal(rng, (2, layer.query.shape[1]), ms.float16)
    query = ms.mint.cat([layer.query[3:], spare])  # and two rows that are no one's
    got, want = (k.mla_prefill(query, layer.cache(k), last, *layer.weights(k), 0.1)[:50] for k in (ascend, reference))
    assert standin.called.count("flash_attention") == 1
    close(got, want, 2 * unit(ms.float16))


def test_prompts_with_context_are_not_expanded() -> None:
    ascend, _, standin = both()
    rng = np.random.default_rng(1)
    layer = Layer(step_of([(33, 40), (20, 20)], rng), ms.float16, 32, 16, 32, rng)
    ascend.mla_prefill(layer.query, layer.cache(ascend), layer.step.sequences, *layer.weights(ascend), 0.1)
    assert "paged_attention" in standin.called and "flash_attention" not in standin.called  # test_meaning.py compares
