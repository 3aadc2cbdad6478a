"""The CPU versions of vLLM's kernels for speculation, as vLLM launches them, against loops over requests and tokens."""

import inspect
import re
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode import utils

from vllm_ms_models.bridge import speculation_kernels as ours
from vllm_ms_models.bridge import triton_overrides

examples = settings(max_examples=120, deadline=None)
seeds = st.integers(0, 2**32 - 1)
counts_of_drafts = st.lists(st.integers(0, 4), min_size=1, max_size=6)
VOCAB, UNTOUCHED = 13, -777


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    triton_overrides.register()


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def ends(counts: list[int]) -> torch.Tensor:
    return int32(np.cumsum(counts))


def untouched(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, UNTOUCHED, dtype=dtype)


def parameters_of(name: str) -> list[str]:
    module, kernel = name.rsplit(".", 1)
    declared = inspect.getsource(import_module(module)).split(f"def {kernel}(")[1].split("):\n")[0]
    names = [re.split(r"[:=#]", line)[0].strip(" ,") for line in declared.splitlines()]
    return [name for name in names if name]


@pytest.mark.parametrize("name", ours.KERNELS)
def test_the_arguments_have_the_names_of_the_kernel(name: str) -> None:
    """vLLM passes them by name only then; by position, a new argument would go to the wrong one."""
    kernel: Any = ours.KERNELS[name]
    assert list(inspect.signature(kernel).parameters) == parameters_of(name)


# --- verification ------------------------------------------------------------------------------------------------


@examples
@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.int32]))
def test_expand(seed: int, counts: list[int], dtype: torch.dtype) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, len(counts))).to(dtype)
    got = rejection_sampler.expand_batch_to_tokens(values, ends(counts), sum(counts), replace_from=0, replace_to=7)
    want = [
        7 if value == 0 else value for value, count in zip(values.tolist(), counts, strict=True) for _ in range(count)
    ]
    assert got.dtype == dtype
    assert got.tolist() == want


def accepted_by_loop(counts: list[int], accepted: list[bool], tokens: list[int], bonus: list[int]) -> list[list[int]]:
    """Request by request: tokens up to and with the first that is not accepted, or all and the bonus."""
    result, at = [], 0
    for count, extra in zip(counts, bonus, strict=True):
        row = []
        for token in range(at, at + count):
            row.append(tokens[token])
            if not accepted[token]:
                break
        else:
            row.append(extra)
        result.append(row)
        at += count
    return result


def rows_of(output: torch.Tensor) -> list[list[int]]:
    return [[token for token in row if token != UNTOUCHED] for row in output.tolist()]


@examples
@given(seeds, counts_of_drafts, st.booleans(), st.booleans())
def test_greedy_rejection(seed: int, counts: list[int], mixed: bool, synthetic: bool) -> None:
    rng = np.random.default_rng(seed)
    total = sum(counts)
    drafts, best = rng.integers(-1, 2, total), rng.integers(0, 2, total)
    uniform, rates = rng.random(total), rng.random(max(counts) + 1).astype(np.float32)
    greedy = rng.integers(0, 2, len(counts)).astype(bool) if mixed else None
    bonus = rng.integers(100, 200, len(counts))
    output = untouched(len(counts), max(counts) + 1)
    rejection_sampler._rejection_greedy_sample(
        output,
        ends(counts),
        int32(drafts),
        torch.from_numpy(best),
        int32(bonus)[:, None],
        None if greedy is None else torch.from_numpy(greedy),
        max(counts),
        torch.from_numpy(uniform) if synthetic else None,
        torch.from_numpy(rates) if synthetic else None,
    )
    places = [number for count in counts for number in range(count)]
    accepted = [
        bool(uniform[i] < rates[place] and drafts[i] >= 0) if synthetic else bool(drafts[i] == best[i])
        for i, place in enumerate(places)
    ]
    tokens = [int(drafts[i] if accepted[i] else best[i]) for i in range(total)]
    want = accepted_by_loop(counts, accepted, tokens, bonus.tolist())
    chosen = [True] * len(counts) if greedy is None else greedy.tolist()
    assert rows_of(output) == [row if take else [] for row, take in zip(want, chosen, strict=True)]


def distributions(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Float32 `[rows, VOCAB]`, each of which sums to 1 and has zeros."""
    values = rng.random((rows, VOCAB)) * rng.integers(0, 2, (rows, VOCAB)) + 1e-9
    return (values / values.sum(1, keepdims=True)).astype(np.float32)


@examples
@given(seeds, counts_of_drafts, st.booleans(), st.booleans())
def test_random_rejection(seed: int, counts: list[int], known: bool, synthetic: bool) -> None:
    rng = np.random.default_rng(seed)
    total = sum(counts)
    drafts, recovered = rng.integers(-1, VOCAB, total), rng.integers(0, VOCAB, total)
    target, draft = distributions(rng, total), distributions(rng, total)
    draft[rng.random(draft.shape) < 0.1] = 0
    uniform, rates = rng.random(total), rng.random(max(counts) + 1).astype(np.float32)
    greedy, bonus = rng.random(len(counts)) < 0.3, rng.integers(100, 200, len(counts))
    output = untouched(len(counts), max(counts) + 1)
    rejection_sampler._rejection_random_sample(
        output,
        ends(counts),
        int32(drafts),
        torch.from_numpy(draft) if known else None,
        torch.from_numpy(target),
        int32(bonus)[:, None],
        int32(recovered),
        torch.from_numpy(uniform),
        torch.from_numpy(greedy),
        max(counts),
        torch.from_numpy(rates) if synthetic else None,
    )
    places = [number for count in counts for number in range(count)]
    accepted = []
    for i, (place, token) in enumerate(zip(places, drafts, strict=True)):
        certain = draft[i, token] if known else np.float32(1)
        rate = rates[place] if synthetic else target[i, token] / certain if certain > 0 else -1.0
        accepted.append(bool(token >= 0 and (uniform[i] < rate if synthetic else rate >= uniform[i])))
    tokens = [int(drafts[i] if accepted[i] else recovered[i]) for i in range(total)]
    want = accepted_by_loop(counts, accepted, tokens, bonus.tolist())
    assert rows_of(output) == [[] if skip else row for row, skip in zip(want, greedy.tolist(), strict=True)]


@examples
@given(seeds, counts_of_drafts, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_recovered_tokens(seed: int, counts: list[int], known: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    total = sum(counts)
    drafts, target, draft = rng.integers(-1, VOCAB, total), distributions(rng, total), distributions(rng, total)
    inverse = torch.from_numpy(1 / rng.exponential(size=(len(counts), VOCAB))).to(dtype)
    output = untouched(total + 2)
    rejection_sampler._sample_recovered_tokens(
        output,
        ends(counts),
        int32(drafts),
        torch.from_numpy(draft) if known else None,
        torch.from_numpy(target),
        inverse,
        max_spec_len=max(counts),
    )
    want = []
    for i, request in enumerate(np.repeat(np.arange(len(counts)), counts)):
        rest = [
            max(target[i, v] - draft[i, v], np.float32(0)) if known else target[i, v] * np.float32(v != drafts[i])
            for v in range(VOCAB)
        ]
        noise = inverse[request].numpy()
        want.append(int(np.argmax([value * noise[v] for v, value in enumerate(rest)])))
    assert output.tolist() == [*want, UNTOUCHED, UNTOUCHED]


# --- drafting ----------------------------------------------------------------------------------------------------


@examples
@given(seeds, counts_of_drafts)
def test_prepare_inputs(seed: int, counts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    valid = [int(rng.integers(1, count + 2)) for count in counts]
    lengths = [count + int(rng.integers(1, 5)) for count in counts]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    last, rejected = untouched(len(counts)), untouched(len(counts))
    utils._eagle_prepare_inputs_padded(ends(counts), int32(valid), int32(starts), last, rejected, len(counts))
    dropped = [count + 1 - good if count else 0 for count, good in zip(counts, valid, strict=True)]
    assert rejected.tolist() == dropped
    assert last.tolist() == [int(end) - 1 - drop for end, drop in zip(starts[1:], dropped, strict=True)]


@examples
@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_prepare_next_token(seed: int, requests: int, width: int) -> None:
    """Also from a tensor that is wider than what is looked at."""
    rng = np.random.default_rng(seed)
    sampled = torch.from_numpy(rng.integers(-1, VOCAB + 2, (requests, width + 2)).astype(np.int32))[:, :width]
    discarded, backup = rng.random(requests) < 0.3, rng.integers(100, 200, requests)
    tokens, valid = untouched(requests), untouched(requests)
    utils._eagle_prepare_next_token_padded(
        sampled,
        torch.from_numpy(discarded),
        int32(backup),
        tokens,
        valid,
        VOCAB,
        width,
        requests,
        sampled.stride(0),
        BLOCK_SIZE_TOKENS=8,
    )
    for i, row in enumerate(sampled.tolist()):
        good = [] if discarded[i] else [token for token in row if token != -1 and token < VOCAB]
        assert (int(tokens[i]), int(valid[i])) == (good[-1] if good else backup[i], len(good))


@examples
@given(seeds, st.integers(1, 6), st.integers(0, 3), st.sampled_from([1, 4, 16]))
def test_one_token_further(seed: int, requests: int, padding: int, block_size: int) -> None:
    """The clamped positions go to where the old ones came from, as in vLLM's proposer."""
    rng = np.random.default_rng(seed)
    blocks = 5
    longest = blocks * block_size - int(rng.integers(0, block_size))
    positions = torch.from_numpy(rng.integers(0, longest, requests))
    before, lengths = positions.tolist(), rng.integers(1, longest + 1, requests)
    table = rng.integers(0, 1000, (requests, blocks)).astype(np.int32)
    slots, new = untouched(requests + padding, dtype=torch.int64), int32(lengths)
    utils.eagle_step_update_slot_mapping_and_metadata(
        positions, torch.from_numpy(table), new, block_size, longest, positions, slots, requests + padding
    )
    for i, position in enumerate(before):
        at = position + 1
        if at >= longest:
            assert (int(positions[i]), int(slots[i]), int(new[i])) == (0, -1, 1)
        else:
            slot = int(table[i, at // block_size]) * block_size + at % block_size
            assert (int(positions[i]), int(slots[i])) == (at, slot)
            assert int(new[i]) == min(int(lengths[i]) + 1, longest)
    assert slots[requests:].tolist() == [-1] * padding


@examples
@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_copy_and_expand(seed: int, lengths: list[int], room: int, shift: bool) -> None:
    rng = np.random.default_rng(seed)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    rejected = [int(rng.integers(0, length)) for length in lengths]
    first, tokens = rng.integers(0, 50, len(lengths)), rng.integers(0, 99, sum(lengths))
    positions = np.concatenate([start + np.arange(n) for start, n in zip(first, lengths, strict=True)])
    new = rng.integers(100, 200, len(lengths))
    total = sum(lengths) + len(lengths) * (room - shift)
    ids, places = untouched(total + 1), untouched(total + 1, dtype=torch.int64)
    is_rejected, is_masked = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.bool)
    indices, mapping = untouched(len(lengths) * room), untouched(sum(lengths))
    utils._copy_and_expand_eagle_inputs(
        int32(tokens),
        torch.from_numpy(positions),
        int32(new),
        ids,
        places,
        is_rejected,
        is_masked,
        indices,
        mapping,
        int32(starts),
        int32(starts[1:] - 1 - np.array(rejected)),
        padding_token_id=0,
        parallel_drafting_token_id=-5,
        total_input_tokens=sum(lengths),
        num_padding_slots_per_request=room,
        shift_input_ids=shift,
        BLOCK_SIZE_TOKENS=4,
        batch_size=len(lengths),
        num_blocks=3,
    )
    want: list[tuple[int, int, bool, bool]] = []
    fresh: list[int] = []
    where: list[int] = []
    for i, length in enumerate(lengths):
        begin = len(want)
        where += range(begin, begin + length)
        kept = tokens[starts[i] + shift : starts[i + 1] - rejected[i]].tolist()
        fresh += range(begin + len(kept), begin + len(kept) + room)
        row = [*kept, int(new[i]), *[-5] * (room - 1)]
        want += [(token, int(first[i]) + j, False, j > len(kept)) for j, token in enumerate(row)]
        want += [(0, 0, True, False)] * rejected[i]
    assert (
        list(zip(ids.tolist()[:total], places.tolist(), is_rejected.tolist(), is_masked.tolist(), strict=False)) == want
    )
    assert (ids[total], places[total]) == (UNTOUCHED, UNTOUCHED)
    assert indices.tolist() == fresh
    assert mapping.tolist() == (where if shift else [UNTOUCHED] * sum(lengths))
