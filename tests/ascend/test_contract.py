"""Every operator call of the Ascend back end is one that MindSpore takes. Nothing here runs on the hardware."""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint

from tests.ascend.checks import ContractError
from tests.ascend.contract import PRIMITIVES, Contract, lacks_kernel
from tests.ascend.steps import BLOCK, STEPS, Step, normal, step_of, weight_of
from vllm_ms_models.kernels import Integers, Weight
from vllm_ms_models.kernels.ascend import AscendKernels, operators

DTYPES = (ms.float16, ms.bfloat16)


@pytest.fixture(scope="module")
def contract() -> Iterator[Contract]:
    contract = Contract()
    yield contract
    signatures = len(contract.seen)
    functions = len({call[0] for call in contract.seen})
    print(
        f"\nAscend: {contract.calls} calls of {functions} operators checked, {signatures} distinct in dtypes and shapes"
    )


@pytest.fixture(scope="module")
def kernels(contract: Contract) -> AscendKernels:
    return AscendKernels(contract)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("size", [64, 128])
def test_a_decoder_layer(
    kernels: AscendKernels, contract: Contract, dtype: Any, name: str, heads: int, kv_heads: int, size: int
) -> None:
    rng = np.random.default_rng(0)
    step, hidden = step_of(STEPS[name], rng), 192
    before = contract.calls
    table = weight_of(kernels, rng.normal(size=(40, hidden)), [40], dtype)
    sizes = [heads * size, kv_heads * size, kv_heads * size]
    qkv = weight_of(kernels, rng.normal(size=(sum(sizes), hidden)), sizes, dtype)
    output = weight_of(kernels, rng.normal(size=(hidden, sizes[0])), [hidden], dtype)
    gate_up = weight_of(kernels, rng.normal(size=(2 * 160, hidden)), [160, 160], dtype)
    norm, of_heads = mint.ones(hidden), mint.ones(size)
    cache = mint.zeros(kernels.cache_shape(step.blocks, BLOCK, kv_heads, size), dtype=dtype)

    residual = kernels.embedding(mint.zeros(step.tokens, dtype=ms.int64), table)
    query, key, value = kernels.linear_split(kernels.rms_norm(residual, norm, 1e-6), qkv, mint.zeros(sum(sizes)))
    query, key = kernels.rms_norm(query, of_heads, 1e-6), kernels.rms_norm(key, of_heads, 1e-6)
    kernels.rotary(query, key, step.positions, mint.zeros((64, size)), size, False)
    kernels.write_kv(key, value, cache, step.slots)
    attended = kernels.paged_attention(query, cache, step.sequences, size**-0.5)
    assert attended.shape == query.shape and attended.dtype == dtype
    again = kernels.paged_attention(query, cache, step.sequences, size**-0.5)  # its keys are only in the cache now
    assert again.shape == query.shape
    x, residual = kernels.add_rms_norm(kernels.linear(attended, output), residual, norm, 1e-6)
    for activation in ("silu", "gelu", "gelu_tanh"):
        kernels.linear_gated(x, gate_up, activation)
    logits = kernels.linear(x, table, dtype=ms.float32)
    assert logits.shape == (step.tokens, 40) and logits.dtype == ms.float32
    assert (contract.calls == before) == (name == "empty")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_the_other_elementwise_kernels(kernels: AscendKernels, dtype: Any, name: str) -> None:
    rng = np.random.default_rng(0)
    step = step_of(STEPS[name], rng)
    x, residual = (normal(rng, (step.tokens, 96), dtype) for _ in range(2))
    for activation in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu"):
        assert kernels.activate(x, activation).shape == x.shape
    assert kernels.take_rows(x, np.arange(step.tokens)[::-1]).shape == x.shape
    assert kernels.layer_norm(x, mint.ones(96), mint.zeros(96), 1e-5).dtype == dtype
    assert kernels.add_layer_norm(x, residual, mint.ones(96), mint.zeros(96), 1e-5)[0].shape == x.shape
    assert kernels.silu_and_mul(x, residual).shape == x.shape
    assert kernels.gelu_and_mul(x, residual, True).shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_latent_attention(kernels: AscendKernels, dtype: Any, name: str) -> None:
    rng = np.random.default_rng(0)
    step = step_of(STEPS[name], rng)
    heads, nope, rope, rank, value = 4, 128, 64, 512, 128
    cache = mint.zeros(kernels.latent_cache_shape(step.blocks, BLOCK, rank + rope), dtype=dtype)
    query, latent, key = (normal(rng, (step.tokens, n), dtype) for n in (heads * (nope + rope), rank, rope))
    keys = [kernels.new_weight([nope], rank, dtype) for _ in range(heads)]
    values = [kernels.new_weight([value], rank, dtype) for _ in range(heads)]
    absorbing = [kernels.new_weight([rank], nope, dtype) for _ in range(heads)]
    kernels.rotary(query, key, step.positions, mint.zeros((64, rope)), nope + rope, True, nope)
    kernels.write_latent(latent, key, cache, step.slots)
    absorbed = kernels.linear_heads(query, absorbing, rope)
    means = kernels.mla_attention(absorbed, cache, step.sequences, 0.1, rank)
    assert means.shape == (step.tokens, heads * rank)
    assert kernels.linear_heads(means, values).shape == (step.tokens, heads * value)
    assert kernels.mla_prefill(query, cache, step.sequences, keys, values, 0.1).shape == (step.tokens, heads * value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_weights_of_int8(kernels: AscendKernels, dtype: Any, name: str, activations: Any) -> None:
    rng = np.random.default_rng(0)
    step = step_of(STEPS[name], rng)
    weight = int8_weight(kernels, rng, activations)
    x = normal(rng, (step.tokens, 64), dtype)
    assert [part.shape[1] for part in kernels.linear_split(x, weight, mint.ones(96))] == [48, 48]
    assert kernels.linear_gated(x, weight, "silu").shape == (step.tokens, 48)


def int8_weight(kernels: AscendKernels, rng: np.random.Generator, activations: Any) -> Weight:
    weight = kernels.new_integer_weight([48, 48], 64, Integers(8, 0, activations))
    for part in range(2):
        kernels.load_integers(weight, part, 0, rng.integers(-127, 128, (48, 64)).astype(np.int8))
        kernels.load_scales(weight, part, 0, rng.uniform(0.01, 0.1, (48, 1)).astype(np.float32))
        if activations == "static":
            kernels.set_input(weight, part, 0.05 + 0.01 * part, part)
    return weight


# --- that a wrong call is found --------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = ms.float16) -> Tensor:
    return mint.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rms_norm", lambda: (zeros(3, 64), zeros(63), 1e-6), r"\[gamma\] must be aligned"),
        ("add_rms_norm", lambda: (zeros(3, 64), zeros(3, 32), zeros(64), 1e-6), "not consistent"),
        ("matmul", lambda: (zeros(3, 64), zeros(8, 63)), "dimensions must be equal"),
        ("matmul", lambda: (zeros(3, 64), zeros(8, 64, dtype=ms.int8)), "should be same"),
        ("swiglu", lambda: (zeros(3, 7),), "divisible by 2"),
        (
            "reshape_and_cache",
            lambda: (zeros(3, 64), zeros(3, 64), *2 * (zeros(2, 16, 1, 64),), zeros(2, dtype=ms.int32)),
            "slot mapping num_tokens: 2, key num_tokens: 3",
        ),
        (
            "apply_rotary_pos_emb",
            lambda: (zeros(3, 64), zeros(3, 64), zeros(3, 64), zeros(3, 64), zeros(1, dtype=ms.float32)),
            r"\[position_ids\] must be a type of",
        ),
        (
            "paged_attention",
            lambda: (
                *(zeros(1, 64, dtype=ms.float32), *2 * (zeros(2, 16, 1, 64, dtype=ms.float32),)),
                *(zeros(1, 1, dtype=ms.int32), zeros(1, dtype=ms.int32), None, None, 1, 1, 1.0, 0),
            ),
            "must be a type of .*BFloat16.*Float16.*but got Tensor.Float32",
        ),
        (
            "quant_matmul",
            lambda: (zeros(3, 64), zeros(8, 64), zeros(8, dtype=ms.float32), None, None, ms.float16),
            r"\[x1\] must be a type of",
        ),
    ],
)
def test_mindspore_itself_finds_a_wrong_call(name: str, arguments: Any, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as caught:
        getattr(operators, name)(*arguments())
    assert not lacks_kernel(PRIMITIVES[name], caught.value)


class Spoiled(Contract):
    """Changes one argument of the calls of one operator."""

    def __init__(self, name: str, place: int, change: Any) -> None:
        super().__init__()
        self.spoiled, self.place, self.change = name, place, change

    def _check(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == self.spoiled:
            changed = self.change(arguments[self.place])
            arguments = (*arguments[: self.place], changed, *arguments[self.place + 1 :])
        return super()._check(name, arguments)


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("reshape_and_cache", 4, lambda slots: slots.astype(ms.int64)),
        ("reshape_and_cache", 3, lambda cache: cache.astype(ms.int8)),
        ("paged_attention", 1, lambda cache: cache.view(*cache.shape[:2], -1)),
        ("paged_attention", 3, lambda tables: tables.astype(ms.float32)),
        ("paged_attention", 5, lambda mask: mask.astype(ms.float32)),
        ("paged_attention", 6, lambda lengths: lengths + 1),
        ("paged_attention", 7, lambda heads: heads + 1),
    ],
)
def test_a_spoiled_call_fails(name: str, place: int, change: Any) -> None:
    rng = np.random.default_rng(0)
    step: Step = step_of(STEPS["mixed with context"], rng)

    def attend(kernels: AscendKernels) -> None:
        query, key = normal(rng, (step.tokens, 256), ms.float16), normal(rng, (step.tokens, 128), ms.float16)
        cache = mint.zeros(kernels.cache_shape(step.blocks, BLOCK, 2, 64), dtype=ms.float16)
        kernels.write_kv(key, key, cache, step.slots)
        kernels.paged_attention(query, cache, step.sequences, 0.125)

    attend(AscendKernels(Contract()))
    with pytest.raises((ContractError, RuntimeError, TypeError, ValueError)):
        attend(AscendKernels(Spoiled(name, place, change)))


def test_what_is_missing_is_said() -> None:
    kernels = AscendKernels(Contract())
    with pytest.raises(NotImplementedError, match="take float16 and bfloat16, not Float32"):
        kernels.rms_norm(zeros(3, 64, dtype=ms.float32), mint.ones(64), 1e-6)
    assert "not run on hardware" in kernels.describe()
