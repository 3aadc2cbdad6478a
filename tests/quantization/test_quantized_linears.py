"""Each linear of each format against its arithmetic in NumPy, on the same inputs; whole, and rank by rank.

The one thing that differs is rounding to float32. With activations in floats that is a sum of as many products as
there are inputs, with a zero point of its own (`layer_testing` has the bound). With int8 activations sums are exact:
what remains are the sum's conversion, two products of scales and the bias, each off by 2^-24 of its result.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch

from tests.layer_testing import (
    UNIT,
    back_end,  # noqa: F401 (autouse)
)
from tests.quantization import writers_compressed, writers_others
from tests.quantization.models import Quantized, written
from tests.quantization.writers import Scheme
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.checkpoint import CheckpointError, load, open_checkpoint
from vllm_ms_models.quantization.base import LinearScheme, Part
from vllm_ms_models.quantization.schemes import FromCheckpoint
from vllm_ms_models.quantization.specs import AwqWeight, Fp8Weight

SCHEMES: dict[str, Scheme] = {
    **{f"compressed-tensors {name}": scheme for name, scheme in writers_compressed.SCHEMES.items()},
    **writers_others.SCHEMES,
    **{f"{name}, as int8": scheme for name, scheme in writers_others.FP8_AS_INT8.items()},
}
PREFIX = "model.layers.1"
FUSED = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj"]
TOKENS = 9
ROWS = ("compressed-tensors w8a8 static", "awq", "gptq, activation order", "fp8 in blocks")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are read 32 or 16 rows at a time, as large ones are."""
    monkeypatch.setattr("vllm_ms_models.checkpoint.slots.PIECE", 3000)


def quantization(model: Quantized, name: str) -> FromCheckpoint:
    """As the bridge recognises it."""
    from vllm_ms_models.bridge.quantization import checkpoint_format

    config = SimpleNamespace(quantization_config=SCHEMES[name].config)
    options = {"fp8": "int8"} if name.endswith("as int8") else {}
    described = SimpleNamespace(model=str(model.folder), hf_config=config, revision=None)
    format = checkpoint_format(SimpleNamespace(model_config=described, additional_config=options))
    assert format is not None
    return FromCheckpoint(format)


def build(
    model: Quantized, name: str, linears: Sequence[str], rank: int = 0, size: int = 1, by_rows: bool = True
) -> LinearScheme:
    """The scheme of some linears of the model, filled from its folder; with `by_rows` each rank has rows of it."""
    parts = []
    for linear in linears:
        module = SHAPES[linear]
        rows, columns = slice(0, module[0]), slice(0, module[1])
        if by_rows:
            rows = slice(module[0] * rank // size, module[0] * (rank + 1) // size)
        else:
            columns = slice(module[1] * rank // size, module[1] * (rank + 1) // size)
        parts.append(Part(f"{PREFIX}.{linear}", module, rows, columns))
    return filled(model, name, parts, linears == FUSED and (by_rows or rank == 0))


def filled(model: Quantized, name: str, parts: Sequence[Part], bias: bool) -> LinearScheme:
    scheme = quantization(model, name).linear(parts, bias, ms.float32)
    checkpoint = open_checkpoint(model.folder)
    names = {slot.name for slot in scheme.slots()}
    others = [tensor for tensor in checkpoint.tensors if tensor not in names]
    load(checkpoint, scheme.slots(), ignored=others, progress=False)
    scheme.finish()
    return scheme


SHAPES = {
    "self_attn.q_proj": (80, 80),
    "self_attn.k_proj": (40, 80),
    "self_attn.v_proj": (40, 80),
    "self_attn.o_proj": (80, 80),
    "mlp.gate_proj": (144, 80),
    "mlp.up_proj": (144, 80),
    "mlp.down_proj": (80, 144),
}


def inputs(width: int) -> np.ndarray:
    x = np.random.default_rng(3).normal(size=(TOKENS, width)).astype(np.float32)
    x[4] = 0
    return x


def product(scheme: LinearScheme, x: np.ndarray) -> np.ndarray:
    return to_torch(scheme.multiply(to_mindspore(torch.from_numpy(x)))).double().numpy()


def expected(model: Quantized, linear: str, x: np.ndarray) -> np.ndarray:
    return model.linears[f"{PREFIX}.{linear}"].multiply(x)


def bound(model: Quantized, linear: str, x: np.ndarray, name: str) -> np.ndarray:
    """How far float32 may be off. Weights are at most 1.3 and zero points at most as large as the range of a group."""
    want = np.abs(expected(model, linear, x))
    if SCHEMES[name].int8_inputs:
        bias = 4.0  # nothing is added but a bias, all of which are smaller
        return 4 * UNIT * (want + 2 * bias)
    magnitude = np.abs(x).sum(1, keepdims=True) * 3
    return (x.shape[1] + 8) * UNIT * magnitude + 4 * UNIT * want


@pytest.mark.parametrize("name", SCHEMES)
def test_linears(name: str) -> None:
    """Alone, fused with a bias, and gated."""
    model = written("qwen2", SCHEMES[name])
    x = inputs(80)
    scheme = build(model, name, FUSED)
    want = np.concatenate([expected(model, linear, x) for linear in FUSED], 1)
    allowed = np.concatenate([bound(model, linear, x, name) for linear in FUSED], 1)
    assert (np.abs(product(scheme, x) - want) <= allowed).all()
    parts = [to_torch(part).double().numpy() for part in scheme.multiply_split(to_mindspore(torch.from_numpy(x)))]
    assert [part.shape[1] for part in parts] == [80, 40, 40]
    assert (np.abs(np.concatenate(parts, 1) - want) <= allowed).all()
    wide = inputs(144)
    down = product(build(model, name, ["mlp.down_proj"]), wide)
    assert (np.abs(down - expected(model, "mlp.down_proj", wide)) <= bound(model, "mlp.down_proj", wide, name)).all()
    gated = build(model, name, GATED).multiply_gated(to_mindspore(torch.from_numpy(x)), "silu")
    gate, up = (torch.from_numpy(expected(model, linear, x)) for linear in GATED)
    torch.testing.assert_close(to_torch(gated).double(), torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [name if name in ROWS else pytest.param(name, marks=pytest.mark.slow) for name in SCHEMES]
)
def test_rows_of_one_matrix(name: str) -> None:
    """Two outputs, the first of two stretches, as where a checkpoint has queries, keys and values in one matrix."""
    model, linear, x = written("qwen2", SCHEMES[name]), "mlp.up_proj", inputs(80)
    stretches = slice(96, 144), slice(0, 32), slice(32, 80)
    whole = SHAPES[linear]
    scheme = filled(
        model,
        name,
        [Part(f"{PREFIX}.{linear}", whole, rows, slice(0, 80), rows.start == 0) for rows in stretches],
        False,
    )
    parts = [to_torch(part).double().numpy() for part in scheme.multiply_split(to_mindspore(torch.from_numpy(x)))]
    assert [part.shape[1] for part in parts] == [80, 48]
    rows = np.r_[96:144, 0:32, 32:80]
    off = np.abs(np.concatenate(parts, 1) - expected(model, linear, x)[:, rows])
    assert (off <= bound(model, linear, x, name)[:, rows]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gptq, activation order", "golden stick w8a8", "compressed-tensors w8a8 static"])
def test_results_have_the_dtype_of_the_inputs(name: str, dtype: torch.dtype) -> None:
    model = written("qwen2", SCHEMES[name])
    x = torch.from_numpy(inputs(80)).to(dtype)
    want = np.concatenate([expected(model, linear, x.float().numpy()) for linear in FUSED], 1)
    scheme = build(model, name, FUSED)
    whole = to_torch(scheme.multiply(to_mindspore(x)))
    parts = [to_torch(part) for part in scheme.multiply_split(to_mindspore(x))]
    wide = to_torch(scheme.multiply(to_mindspore(x), ms.float32))
    assert (whole.dtype, wide.dtype, {part.dtype for part in parts}) == (dtype, torch.float32, {dtype})
    for found in (whole, torch.cat(parts, 1), wide):
        torch.testing.assert_close(found.double(), torch.from_numpy(want), rtol=2.0**-8, atol=2.0**-8)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_ranks_with_rows(name: str, size: int) -> None:
    """Each rank's rows of fused linears, side by side, are those of the whole; 40 rows cut packed words in four."""
    model = written("qwen2", SCHEMES[name])
    x = inputs(80)
    for linear in FUSED:
        whole = product(build(model, name, [linear]), x)
        parts = [product(build(model, name, [linear], rank, size), x) for rank in range(size)]
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_ranks_with_columns(name: str, size: int) -> None:
    """The sum over ranks is the whole product, or one sentence says that a group or an order would be cut.

    Ranks that round their share of a token by its own largest value compute another product, as near to the floats'.
    """
    model, x, linear, share = written("qwen2", SCHEMES[name]), inputs(144), "mlp.down_proj", 144 // size
    spec = quantization(model, name).format.spec(f"{PREFIX}.{linear}")
    group_size = getattr(spec, "group_size", 0)
    if getattr(spec, "ordered", False) or (group_size and share % group_size):
        with pytest.raises(CheckpointError, match="--tensor-parallel-size"):
            build(model, name, [linear], 1, size, False)
        return
    columns = [slice(share * rank, share * (rank + 1)) for rank in range(size)]
    total = sum(product(build(model, name, [linear], rank, size, False), x[:, columns[rank]]) for rank in range(size))
    want = expected(model, linear, x)
    by_token = "dynamic" in name or "as int8" in name
    np.testing.assert_allclose(total, want, rtol=1e-4, atol=(0.05 if by_token else 1e-5) * np.abs(want).max())


def test_the_correction_of_a_sum_over_ranks_is_added_once() -> None:
    """`quant_bias` of ModelSlim belongs to the first rank; with activations that are all zero nothing else is left."""
    name, linear, zeros = "modelslim w8a8", "mlp.down_proj", np.zeros((1, 72), np.float32)
    model = written("qwen2", SCHEMES[name])
    first, second = (build(model, name, [linear], rank, 2, False) for rank in (0, 1))
    tensors = model.linears[f"{PREFIX}.{linear}"].tensors
    offset, scale = int(tensors["input_offset"][0]), tensors["deq_scale"]
    halves = [tensors["weight"][:, columns].astype(np.int64).sum(1) for columns in (slice(0, 72), slice(72, 144))]
    np.testing.assert_allclose(product(second, zeros)[0], offset * halves[1] * scale, rtol=1e-6)
    np.testing.assert_allclose(
        product(first, zeros)[0], (offset * halves[0] + tensors["quant_bias"]) * scale, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_is_counted_as_it_is_stored(name: str) -> None:
    """The bytes of the integers and, in these small matrices, up to half as much for scales and zero points."""
    module = SHAPES["mlp.down_proj"]
    part = Part(f"{PREFIX}.mlp.down_proj", module, slice(0, module[0]), slice(0, module[1]))
    scheme = quantization(written("qwen2", SCHEMES[name]), name).linear([part], False, ms.float32)
    counted = sum(math.prod(slot.part_shape) * (slot.itemsize or 4) for slot in scheme.slots() if not slot.optional)
    spec = quantization(written("qwen2", SCHEMES[name]), name).format.spec(part.name)
    bits = 4 if isinstance(spec, AwqWeight) else getattr(spec, "bits", 8)
    if isinstance(spec, Fp8Weight) and not spec.requantized:
        bits = 32  # the model's dtype
    values = math.prod(module) * bits // 8
    assert values <= counted <= 1.5 * values + 8 * sum(module)
