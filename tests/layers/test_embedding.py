"""Embedding and output head against torch's, whole and split over ranks that do not divide the vocabulary."""

import pytest
import torch
from hypothesis import assume, given
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
from vllm_ms_models.layers.embedding import LearnedEmbedding, ParallelLMHead, VocabParallelEmbedding, vocabulary_rows

ranks = st.integers(1, 4)
vocabularies = st.one_of(st.integers(1, 20), st.sampled_from((97, 130, 211)))


@given(vocabularies, st.integers(1, 8))
def test_every_row_has_one_owner(vocabulary, size):
    """The ranks' rows follow one another, padding comes only after the last row, and all store equally many."""
    shares = [vocabulary_rows(vocabulary, Group(rank, size)) for rank in range(size)]
    assert [row for rows, _ in shares for row in range(rows.start, rows.stop)] == list(range(vocabulary))
    (stored,) = {stored for _, stored in shares}
    assert (stored - 1) * size < vocabulary <= stored * size
    assert all(rows.start == min(rank * stored, vocabulary) for rank, (rows, _) in enumerate(shares))


@examples
@given(
    seeds,
    dtypes,
    dtypes,
    st.sampled_from((torch.int32, torch.int64)),
    ranks,
    token_counts,
    vocabularies,
    sizes,
    st.sampled_from((1.0, 8.0, 2304**0.5)),
)
def test_embedding(seed, dtype, stored, id_dtype, size, tokens, vocabulary, hidden, scale):
    """Summed over the ranks exactly torch's: the others give zeros. A scale is rounded to the dtype, as the product."""
    weight = normal(seed, vocabulary, hidden, dtype=stored)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (tokens,), generator=generator, dtype=id_dtype)
    ids[:1] = vocabulary - 1

    def run(group: Group) -> torch.Tensor:
        cell = VocabParallelEmbedding("embed", vocabulary, hidden, context(dtype, group), scale)
        load(cell, {"embed.weight": weight})
        return call(cell, ids)

    want = torch.nn.functional.embedding(ids, weight.to(dtype)) * torch.tensor(scale).to(dtype)
    for result in on_ranks(size, run):
        assert result.dtype == dtype
        assert torch.equal(result, want)


@examples
@given(seeds, dtypes, token_counts, vocabularies, sizes, st.integers(0, 2))
def test_learned_embedding(seed, dtype, tokens, size, hidden, first):
    """Number 0 has row `first` of the table, whatever comes before it."""
    weight = normal(seed, size + first, hidden, dtype=dtype)
    numbers = torch.randint(size, (tokens,), generator=torch.Generator().manual_seed(seed))
    cell = LearnedEmbedding("table", size + first, hidden, context(dtype).dtype, first)
    load(cell, {"table.weight": weight})
    assert torch.equal(call(cell, numbers), weight[numbers + first])


@pytest.mark.parametrize("tied", [False, True])
@examples
@given(seeds, dtypes, ranks, token_counts, vocabularies, sizes)
def test_head(tied, seed, dtype, size, rows, vocabulary, hidden):
    """Every rank gets float32 logits of exactly the vocabulary, without the rows that some ranks are padded with."""
    assume((size - 1) * -(-vocabulary // size) < vocabulary)  # every rank has a row: no matrix is empty
    weight = normal(seed, vocabulary, hidden, dtype=dtype)
    x = normal(seed + 1, rows, hidden, dtype=dtype)

    def run(group: Group) -> torch.Tensor:
        given = context(dtype, group)
        embedding = VocabParallelEmbedding("embed", vocabulary, hidden, given) if tied else None
        head = ParallelLMHead("lm_head", vocabulary, hidden, given, embedding)
        load(head, {} if tied else {"lm_head.weight": weight})
        if embedding is not None:
            load(embedding, {"embed.weight": weight})
        return call(head, x)

    for logits in on_ranks(size, run):
        assert logits.is_contiguous()
        assert_close(logits, *linear(x, weight, None), torch.float32)
