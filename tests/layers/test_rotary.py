"""RotaryEmbedding against transformers' own rotation; the angles of each scaling type have their own tests."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, PhiConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from tests.layer_testing import (
    UNIT,
    assert_close,
    back_end,  # noqa: F401 (autouse)
    context,
    dtypes,
    examples,
    normal,
    seeds,
    token_counts,
)
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.layers.rotary import AxialRotary, RotaryEmbedding

LENGTH = 600
counts = st.tuples(st.integers(1, 5), st.integers(1, 3))  # of heads and KV heads


def config(kind: type, head_size: int, **options: Any) -> Any:
    return kind(hidden_size=head_size * 4, num_attention_heads=4, max_position_embeddings=LENGTH, **options)


def rotate(cell: RotaryEmbedding, states: list[torch.Tensor], positions: torch.Tensor) -> list[torch.Tensor]:
    """Copies of `states` (query and key), rotated by `cell`."""
    rotated = [state.clone() for state in states]
    return list(map(to_torch, cell(*map(to_mindspore, rotated), to_mindspore(positions))))


def make(seed: int, dtype: torch.dtype, tokens: int, heads: tuple[int, int], head_size: int) -> Any:
    """Query, key, and positions in any order, repeated, up to the last one."""
    states = [normal(seed + i, tokens, count * head_size, dtype=dtype) for i, count in enumerate(heads)]
    positions = torch.randint(LENGTH, (tokens,), generator=torch.Generator().manual_seed(seed))
    positions[:1] = LENGTH - 1
    return states, positions


def error_of(head: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Cosine and sine are at most 1 and off by a unit against torch's; two products and their sum follow."""
    return 4 * UNIT * (head.abs() + partner.abs())


def check(states: list[torch.Tensor], got: list[torch.Tensor], size: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Against transformers' `apply_rotary_pos_emb` in float64, on the first features of each head."""
    rotating = cos.shape[-1]
    for before, after in zip(states, got, strict=True):
        heads = before.double().view(1, len(before), before.shape[1] // size, size)
        turning, still = heads[..., :rotating], heads[..., rotating:]
        want, _ = apply_rotary_pos_emb(turning, turning, cos.double(), sin.double(), unsqueeze_dim=2)
        error = torch.cat([error_of(turning, turning.roll(rotating // 2, -1)), torch.zeros_like(still)], -1)
        result = torch.cat([want, still], -1)
        assert_close(after, result.view(before.shape), error.view(before.shape), before.dtype)
        assert torch.equal(after.reshape(-1, size)[:, rotating:], before.reshape(-1, size)[:, rotating:])


@pytest.mark.parametrize(
    ("kind", "embedding", "theta"),
    [(LlamaConfig, LlamaRotaryEmbedding, 5e5), (Qwen2Config, Qwen2RotaryEmbedding, 1e6)],
)
@examples
@given(seeds, dtypes, token_counts, counts, st.sampled_from((2, 6, 20, 64, 80)))
def test_whole_heads(kind, embedding, theta, seed, dtype, tokens, heads, head_size):
    given = config(kind, head_size, rope_parameters={"rope_type": "default", "rope_theta": theta})
    states, positions = make(seed, dtype, tokens, heads, head_size)
    cos, sin = embedding(given)(torch.zeros(1), positions[None])
    got = rotate(RotaryEmbedding(given, context(max_model_len=LENGTH)), states, positions)
    check(states, got, head_size, cos, sin)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 1.0])
@examples
@given(seeds, dtypes, token_counts, counts, st.sampled_from((40, 80)))
def test_parts_of_heads(share, seed, dtype, tokens, heads, head_size):
    """With a partial rotary factor the rest of each head stays as it is, to the bit."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    given = config(PhiConfig, head_size, rope_parameters=rope)
    states, positions = make(seed, dtype, tokens, heads, head_size)
    cos, sin = PhiRotaryEmbedding(given)(torch.zeros(1), positions[None])
    assert cos.shape[-1] == head_size * share
    got = rotate(RotaryEmbedding(given, context(max_model_len=LENGTH)), states, positions)
    check(states, got, head_size, cos, sin)


@pytest.mark.parametrize("share", [0.5, 1.0])
@examples
@given(seeds, dtypes, token_counts, counts, st.sampled_from((4, 20, 64)))
def test_interleaved_pairs(share, seed, dtype, tokens, heads, head_size):
    """Features 2i and 2i + 1 are a complex number, which is turned by position * theta^(-2i / rotating)."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    given = config(LlamaConfig, head_size, rope_parameters=rope)
    states, positions = make(seed, dtype, tokens, heads, head_size)
    rotating = int(head_size * share)
    frequencies = 1e4 ** -(torch.arange(0, rotating, 2) / rotating)  # in float32, as the models are trained
    angles = (positions[:, None] * frequencies).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    got = rotate(RotaryEmbedding(given, context(max_model_len=LENGTH), interleaved=True), states, positions)
    for before, after in zip(states, got, strict=True):
        split = before.double().view(tokens, before.shape[1] // head_size, head_size)
        pairs = split[..., :rotating].reshape(*split.shape[:2], rotating // 2, 2)
        want = split.clone()
        want[..., :rotating] = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
        # A unit of a float32 frequency, rounded differently, turns an angle of p by p units, before its rounding.
        units = 4 + 3 * positions.double().view(-1, 1, 1)
        error = torch.zeros_like(want)
        error[..., :rotating] = units * UNIT * (pairs.abs() + pairs.flip(-1).abs()).flatten(-2)
        assert_close(after, want.view(before.shape), error.view(before.shape), dtype)


def test_query_and_key_of_other_head_counts_are_not_mixed_up():
    """Rotation keeps lengths, so a fixed key rotates alike whatever query stands beside it."""
    cell = RotaryEmbedding(config(LlamaConfig, 16), context(max_model_len=LENGTH))
    (query, key), positions = make(3, torch.float32, 7, (4, 2), 16)
    _, alone = rotate(cell, [query[:, :16].contiguous(), key], positions)
    _, beside = rotate(cell, [query, key], positions)
    assert torch.equal(alone, beside)


def test_lengths_beyond_the_rope_are_refused():
    with pytest.raises(ValueError) as caught:
        RotaryEmbedding(config(LlamaConfig, 16), context(max_model_len=LENGTH + 1))
    assert str(caught.value) == (
        "--max-model-len 601 is beyond the 600 positions that the model's rotary embedding (default) covers; "
        "use 600 or less."
    )


SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


@examples
@given(seeds, dtypes, token_counts, counts)
def test_positions_of_three_dimensions(seed: int, dtype: torch.dtype, tokens: int, groups: tuple[int, int]) -> None:
    """M-RoPE; positions may be beyond the longest sequence. Tokens of text are rotated as by a table."""
    heads = (groups[0] * groups[1], groups[1])
    states, _ = make(seed, dtype, tokens, heads, 32)
    settings = config(Qwen2_5_VLTextConfig, 32, rope_parameters=SECTIONS)
    cell = RotaryEmbedding(settings, context(dtype, max_model_len=LENGTH))
    positions = torch.randint(5 * LENGTH, (3, tokens), generator=torch.Generator().manual_seed(seed))
    cos, sin = Qwen2_5_VLRotaryEmbedding(settings)(torch.zeros(1), positions[:, None])
    check(states, rotate(cell, states, positions), 32, cos, sin)
    plain = RotaryEmbedding(config(Qwen2Config, 32), context(dtype, max_model_len=LENGTH))
    text = positions[0] % LENGTH
    for ours, theirs in zip(rotate(cell, states, text.expand(3, -1)), rotate(plain, states, text), strict=True):
        assert torch.equal(ours, theirs)


@examples
@given(seeds, dtypes, token_counts)
def test_rows_and_columns(seed: int, dtype: torch.dtype, tokens: int) -> None:
    """Of an image: half the pairs each."""
    states, _ = make(seed, dtype, tokens, (3, 3), 20)
    places = torch.randint(200, (tokens, 2), generator=torch.Generator().manual_seed(seed))
    settings = Qwen2_5_VLVisionConfig(hidden_size=60, num_heads=3)
    settings.head_dim = 20
    cos, sin = Qwen2_5_VLVisionRotaryEmbedding(settings)(torch.zeros(1), places)
    cell = AxialRotary(20, 10000.0)
    rotated = [state.clone() for state in states]
    cell(*map(to_mindspore, rotated), cell.rotation(places.T.numpy()))
    check(states, rotated, 20, cos[None], sin[None])
