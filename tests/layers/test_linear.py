"""The linear layers against torch's, whole and as the slices of two to four ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.layer_testing import (
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    context,
    dtypes,
    examples,
    linear,
    load,
    normal,
    on_ranks,
    seeds,
    sizes,
    token_counts,
)
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

QKV = ["q_proj", "k_proj", "v_proj"]
ranks = st.integers(2, 4)
ONE_MATRIX = [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear]


def matrices(
    seed: int, shapes: dict[str, tuple[int, int]], bias: bool, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A checkpoint with a weight, and a bias if asked for, of each name."""
    tensors = {}
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        tensors[f"{name}.weight"] = normal(seed + 2 * number, rows, columns, dtype=dtype)
        if bias:
            tensors[f"{name}.bias"] = normal(seed + 2 * number + 1, rows, dtype=dtype)
    return tensors


def expected(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str = "proj"
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's result; weights have the dtype of `x`, biases stay as they are in the checkpoint."""
    return linear(x, tensors[f"{name}.weight"].to(x.dtype), tensors.get(f"{name}.bias"))


# --- one rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ONE_MATRIX)
@examples
@given(seeds, dtypes, dtypes, token_counts, sizes, sizes, st.booleans())
def test_one_matrix(layer, seed, dtype, stored, tokens, inputs, outputs, bias):
    tensors = matrices(seed, {"proj": (outputs, inputs)}, bias, stored)
    cell = layer("proj", inputs, outputs, context(dtype), bias)
    load(cell, tensors)
    x = normal(seed + 9, tokens, inputs, dtype=dtype)
    assert_close(call(cell, x), *expected(x, tensors), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replicated_linear_gives_the_dtype_asked_for(dtype):
    """Routers and heads need float32: more digits than the activations have, not a rounded result widened."""
    tensors = matrices(0, {"proj": (11, 37)}, True, dtype)
    cell = ReplicatedLinear("proj", 37, 11, context(dtype), True)
    load(cell, tensors)
    x = normal(1, 4, 37, dtype=dtype)
    assert_close(call(cell, x, dtype=context().dtype), *expected(x, tensors), torch.float32)


@examples
@given(seeds, dtypes, token_counts, sizes, st.lists(sizes, min_size=1, max_size=3), st.booleans())
def test_merged_matrices(seed, dtype, tokens, inputs, outputs, bias):
    names = [f"part{number}" for number in range(len(outputs))]
    tensors = matrices(seed, {name: (size, inputs) for name, size in zip(names, outputs, strict=True)}, bias)
    cell = MergedColumnParallelLinear(names, inputs, outputs, context(dtype), bias)
    load(cell, tensors)
    x = normal(seed + 9, tokens, inputs, dtype=dtype)
    for name, part in zip(names, call(cell, x), strict=True):
        assert part.is_contiguous()
        assert_close(part, *expected(x, tensors, name), dtype)


# --- several ranks -----------------------------------------------------------------------------------------------


@examples
@given(seeds, dtypes, ranks, token_counts, sizes, st.integers(1, 30), st.booleans())
def test_columns_of_the_ranks_side_by_side(seed, dtype, size, tokens, inputs, share, bias):
    tensors = matrices(seed, {"proj": (size * share, inputs)}, bias)
    x = normal(seed + 9, tokens, inputs, dtype=dtype)

    def run(group: Group) -> torch.Tensor:
        cell = ColumnParallelLinear("proj", inputs, size * share, context(dtype, group), bias)
        load(cell, tensors)
        return call(cell, x)

    parts = on_ranks(size, run)
    assert [part.shape[1] for part in parts] == [share] * size
    assert_close(torch.cat(parts, 1), *expected(x, tensors), dtype)


@examples
@given(seeds, dtypes, ranks, token_counts, sizes, st.lists(st.integers(1, 20), min_size=2, max_size=2), st.booleans())
def test_merged_columns_of_the_ranks_side_by_side(seed, dtype, size, tokens, inputs, shares, bias):
    """Each rank has its share of every part, not one part or the other."""
    names = ["gate_proj", "up_proj"]
    outputs = [size * share for share in shares]
    tensors = matrices(seed, {name: (rows, inputs) for name, rows in zip(names, outputs, strict=True)}, bias)
    x = normal(seed + 9, tokens, inputs, dtype=dtype)

    def run(group: Group) -> tuple[torch.Tensor, ...]:
        cell = MergedColumnParallelLinear(names, inputs, outputs, context(dtype, group), bias)
        load(cell, tensors)
        return call(cell, x)

    for name, parts in zip(names, zip(*on_ranks(size, run), strict=True), strict=True):
        assert_close(torch.cat(parts, 1), *expected(x, tensors, name), dtype)


@examples
@given(seeds, dtypes, ranks, token_counts, st.integers(1, 30), sizes, st.booleans())
def test_rows_of_the_ranks_summed(seed, dtype, size, tokens, share, outputs, bias):
    """Every rank ends with the whole result, in which the bias is once."""
    tensors = matrices(seed, {"proj": (outputs, size * share)}, bias)
    x = normal(seed + 9, tokens, size * share, dtype=dtype)

    def run(group: Group) -> torch.Tensor:
        cell = RowParallelLinear("proj", size * share, outputs, context(dtype, group), bias)
        load(cell, tensors)
        return call(cell, x[:, group.rank * share : (group.rank + 1) * share])

    want, error = expected(x, tensors)
    # A rank rounds its sum before they are added; the sums are at most the magnitude that `error` is a multiple of.
    magnitude = error / (error.new_tensor(size * share + 2) * 2.0**-24)
    for result in on_ranks(size, run):
        assert_close(result, want, error + magnitude * torch.finfo(dtype).eps / 2, dtype)


def test_only_the_first_rank_reads_the_bias_of_a_row_parallel_linear():
    """The others name it too, or the loader would call it unexpected, but take nothing of it."""
    for rank in range(2):
        cell = RowParallelLinear("proj", 6, 5, context(group=Group(rank, 2)), True)
        (bias,) = [slot for slot in cell.slots() if slot.name == "proj.bias"]
        taken = torch.arange(5.0)[bias.index]
        assert (bias.shape, len(taken)) == ((5,), 5 if rank == 0 else 0)


# --- query, key and value ----------------------------------------------------------------------------------------


def qkv_shapes(inputs: int, heads: int, kv_heads: int, head_size: int) -> dict[str, tuple[int, int]]:
    counts = (heads, kv_heads, kv_heads)
    return {name: (count * head_size, inputs) for name, count in zip(QKV, counts, strict=True)}


def kv_owners(size: int, kv_heads: int) -> list[list[int]]:
    """The KV heads of each rank: those that its share of the query heads reads."""
    return [
        sorted({head * kv_heads // size for head in range(rank, rank + 1)})
        if size >= kv_heads
        else list(range(rank * kv_heads // size, (rank + 1) * kv_heads // size))
        for rank in range(size)
    ]


@examples
@given(
    seeds,
    dtypes,
    token_counts,
    sizes,
    st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (3, 3), (3, 1), (4, 4), (4, 2)]),
    st.integers(1, 3),
    st.sampled_from((1, 5, 8, 24)),
    st.booleans(),
)
def test_heads_of_the_ranks(seed, dtype, tokens, inputs, kv_heads_and_ranks, group_size, head_size, bias):
    """Query heads are split; KV heads are split or, with more ranks than KV heads, held by neighbours."""
    kv_heads, size = kv_heads_and_ranks
    heads = max(kv_heads, size) * group_size
    tensors = matrices(seed, qkv_shapes(inputs, heads, kv_heads, head_size), bias)
    x = normal(seed + 9, tokens, inputs, dtype=dtype)

    def run(group: Group) -> tuple[torch.Tensor, ...]:
        cell = QKVParallelLinear(QKV, inputs, heads, kv_heads, head_size, context(dtype, group), bias)
        load(cell, tensors)
        query, key, value = call(cell, x)
        assert (cell.num_heads * head_size, cell.num_kv_heads * head_size) == (query.shape[1], key.shape[1])
        return query, key, value

    queries, keys, values = zip(*on_ranks(size, run), strict=True)
    assert_close(torch.cat(queries, 1), *expected(x, tensors, "q_proj"), dtype)
    columns = torch.arange(kv_heads * head_size).view(kv_heads, head_size)
    for name, parts in (("k_proj", keys), ("v_proj", values)):
        want, error = expected(x, tensors, name)
        for part, owned in zip(parts, kv_owners(size, kv_heads), strict=True):
            chosen = columns[owned].flatten()
            assert_close(part, want[:, chosen], error[:, chosen], dtype)


# --- what does not divide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda given: ColumnParallelLinear("model.proj", 8, 9, given),
            "The output size of model.proj (9) is not divisible by the number of ranks that share it, 4; "
            "choose a --tensor-parallel-size that divides it.",
        ),
        (
            lambda given: RowParallelLinear("model.proj", 10, 8, given),
            "The input size of model.proj (10) is not divisible by the number of ranks that share it, 4; "
            "choose a --tensor-parallel-size that divides it.",
        ),
        (
            lambda given: QKVParallelLinear(QKV, 8, 6, 2, 4, given),
            "The number of heads of q_proj (6) is not divisible by the number of ranks that share it, 4; "
            "choose a --tensor-parallel-size that divides it.",
        ),
        (
            lambda given: QKVParallelLinear(QKV, 8, 12, 6, 4, given),
            "The number of KV heads of k_proj (6) is not divisible by the number of ranks that share it, 4; "
            "choose a --tensor-parallel-size that divides it.",
        ),
        (
            lambda given: QKVParallelLinear(QKV, 8, 12, 3, 4, given),
            "The number of KV heads of k_proj (3) does not divide the tensor parallel size 4; "
            "choose a --tensor-parallel-size that it divides, or one that divides it.",
        ),
    ],
)
def test_sizes_that_do_not_divide(build, sentence):
    with pytest.raises(ValueError) as caught:
        build(context(group=Group(1, 4)))
    assert str(caught.value) == sentence


def test_the_sentence_names_the_tensor_parallel_size_of_the_user():
    """Eight ranks of three KV heads are not four of anything."""
    with pytest.raises(ValueError, match=r"KV heads of k_proj \(3\) does not divide the tensor parallel size 8"):
        QKVParallelLinear(QKV, 8, 24, 3, 4, context(group=Group(0, 8)))
