"""The tests' own packing of integers, against that of the libraries that write and read such checkpoints."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

from tests.quantization.writers import packed
from tests.quantization.writers_others import AWQ_FIELDS
from vllm_ms_models.quantization.packing import centred, unpack, unpack_awq, words_of


def fields(bits: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << bits, (rows, columns))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 24), (5, 13)])
def test_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    values = fields(bits, *shape)
    signed = torch.from_numpy((values - (1 << (bits - 1))).astype(np.int8))
    assert np.array_equal(packed(values, bits), pack_to_int32(signed, bits).numpy())
    assert np.array_equal(packed(values.T, bits).T, pack_to_int32(signed, bits, packed_dim=0).numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int) -> None:
    values = fields(bits, 16, 24)  # [in, out]
    assert np.array_equal(packed(values.T, bits).T, gptq_pack(torch.from_numpy(values), bits, 16, 24).numpy())


def test_awq() -> None:
    values = fields(4, 16, 24)  # [in, out]
    assert np.array_equal(packed(values, 4, AWQ_FIELDS), awq_pack(torch.from_numpy(values), 4, 16, 24).numpy())
    assert np.array_equal(unpack_awq(packed(values, 4, AWQ_FIELDS)), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking(bits: int) -> None:
    values = fields(bits, 3, 24)
    found = unpack(packed(values, bits), bits)
    assert np.array_equal(found, values)
    assert np.array_equal(centred(found, bits), values - (1 << (bits - 1)))
    words, cut = words_of(slice(5, 19), 32 // bits)
    assert np.array_equal(unpack(packed(values, bits)[:, words], bits)[:, cut], values[:, 5:19])
