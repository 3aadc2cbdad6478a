"""CPU versions of the Triton kernels that speculative decoding launches (`triton_overrides.py` registers them).

Each has the argument names of the kernel it replaces, and writes its results into the tensors it is given. `drafts`
below are the draft tokens of all requests in a row; `cu_num_draft_tokens_ptr` int32 `[requests]` tells their ends.
Tokens are int32, positions and slots int64.
"""

# ruff: noqa: N803 (the kernels' own argument names)

import numpy as np
import torch

Array = np.ndarray


def _places(ends: Array) -> tuple[Array, Array, Array]:
    """How many each request has, and of each of all: its request, and its number within that."""
    counts = np.diff(ends, prepend=0)
    rows = np.repeat(np.arange(len(ends)), counts)
    return counts, rows, np.arange(len(rows)) - np.repeat(ends - counts, counts)


# --- verification: vllm/v1/sample/rejection_sampler.py ------------------------------------------------------------


def expand(
    output_ptr: torch.Tensor,
    input_ptr: torch.Tensor,
    cu_num_tokens_ptr: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int,
) -> None:
    """A value of each request, `input_ptr` `[requests]`, once for each of its tokens; `replace_from` is replaced."""
    values = input_ptr.numpy()
    values = np.where(values == replace_from, np.asarray(replace_to, values.dtype), values)
    ends = cu_num_tokens_ptr.numpy()
    output_ptr.numpy()[: ends[-1]] = np.repeat(values, np.diff(ends, prepend=0))


def _write(output: Array, ends: Array, accepted: Array, tokens: Array, bonus: Array, chosen: Array) -> None:
    """Each request's tokens up to the first that is not accepted, or all and the bonus; of `chosen` requests only."""
    counts, rows, columns = _places(ends)
    grid = np.zeros(output.shape, bool)
    grid[rows, columns] = accepted
    kept = np.logical_and.accumulate(grid, 1).sum(1)
    written = chosen[rows] & (columns <= kept[rows])
    output[rows[written], columns[written]] = tokens[written]
    full = chosen & (kept == counts)
    output[full, counts[full]] = bonus[full]


def rejection_greedy_sample(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    target_argmax_ptr: torch.Tensor,
    bonus_token_ids_ptr: torch.Tensor,
    is_greedy_ptr: torch.Tensor | None,
    max_spec_len: int,
    uniform_probs_ptr: torch.Tensor | None,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    SYNTHETIC_MODE: bool,
) -> None:
    """Drafts as far as they are the model's best tokens, then that token: into `[requests, max_spec_len + 1]`.

    In synthetic mode a draft is accepted at a given rate instead.
    """
    ends, drafts, best = (t.numpy() for t in (cu_num_draft_tokens_ptr, draft_token_ids_ptr, target_argmax_ptr))
    accepted = drafts == best
    if SYNTHETIC_MODE:
        assert uniform_probs_ptr is not None and synthetic_conditional_rates_ptr is not None
        rates = synthetic_conditional_rates_ptr.numpy()[_places(ends)[2]]
        accepted = (uniform_probs_ptr.numpy() < rates) & (drafts >= 0)
    chosen = np.ones(len(ends), bool) if is_greedy_ptr is None else is_greedy_ptr.numpy()
    tokens = np.where(accepted, drafts, best)
    _write(output_token_ids_ptr.numpy(), ends, accepted, tokens, bonus_token_ids_ptr.view(-1).numpy(), chosen)


def rejection_random_sample(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    draft_probs_ptr: torch.Tensor | None,
    target_probs_ptr: torch.Tensor,
    bonus_token_ids_ptr: torch.Tensor,
    recovered_token_ids_ptr: torch.Tensor,
    uniform_probs_ptr: torch.Tensor,
    is_greedy_ptr: torch.Tensor,
    max_spec_len: int,
    vocab_size: int,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    NO_DRAFT_PROBS: bool,
    SYNTHETIC_MODE: bool,
) -> None:
    """Speculative sampling (arXiv:2211.17192): a draft is accepted with probability target / draft, else recovered.

    `draft_probs_ptr`, `target_probs_ptr`: `[drafts, vocab_size]`; without the former, drafts were certain.
    """
    ends, drafts = cu_num_draft_tokens_ptr.numpy(), draft_token_ids_ptr.numpy()
    uniform, real = uniform_probs_ptr.numpy(), drafts >= 0  # -1 only fills a row
    if SYNTHETIC_MODE:
        assert synthetic_conditional_rates_ptr is not None
        accepted = real & (uniform < synthetic_conditional_rates_ptr.numpy()[_places(ends)[2]])
    else:
        at = np.arange(len(drafts)), np.maximum(drafts, 0)
        target = target_probs_ptr.numpy()[at]
        draft = np.ones_like(target) if draft_probs_ptr is None else draft_probs_ptr.numpy()[at]
        ratio = np.divide(target, draft, where=draft > 0, out=np.full_like(target, -1))
        accepted = real & (ratio >= uniform)
    tokens = np.where(accepted, drafts, recovered_token_ids_ptr.numpy())
    bonus = bonus_token_ids_ptr.view(-1).numpy()
    _write(output_token_ids_ptr.numpy(), ends, accepted, tokens, bonus, ~is_greedy_ptr.numpy())


def sample_recovered_tokens(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    draft_probs_ptr: torch.Tensor | None,
    target_probs_ptr: torch.Tensor,
    inv_q_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    NO_DRAFT_PROBS: bool,
    USE_FP64_GUMBEL: bool,
) -> None:
    """What takes a rejected draft's place: a sample of max(target - draft, 0), by the request's noise.

    `inv_q_ptr` `[requests, vocab_size]` is one over exponential noise: the largest product is such a sample.
    """
    _, rows, _ = _places(cu_num_draft_tokens_ptr.numpy())
    drafts, tokens = draft_token_ids_ptr.long(), len(rows)
    if draft_probs_ptr is None:
        rest = target_probs_ptr[:tokens].clone()
        real = torch.nonzero(drafts[:tokens] >= 0).view(-1)
        rest[real, drafts[real]] = 0
    else:
        rest = (target_probs_ptr[:tokens] - draft_probs_ptr[:tokens]).clamp_(min=0)
    output_token_ids_ptr[:tokens] = (rest * inv_q_ptr[torch.from_numpy(rows)]).argmax(1)


# --- drafting: vllm/v1/spec_decode/utils.py -----------------------------------------------------------------------


def prepare_inputs_padded(
    cu_num_draft_tokens_ptr: torch.Tensor,
    valid_sampled_tokens_count_ptr: torch.Tensor,
    query_start_loc_gpu_ptr: torch.Tensor,
    token_indices_to_sample_ptr: torch.Tensor,
    num_rejected_tokens_gpu_ptr: torch.Tensor,
    num_reqs: int,
) -> None:
    """Of each request: how many drafts were rejected, and which of all tokens is the last that was not."""
    drafts = np.diff(cu_num_draft_tokens_ptr.numpy()[:num_reqs], prepend=0)
    rejected = np.where(drafts > 0, drafts + 1 - valid_sampled_tokens_count_ptr.numpy()[:num_reqs], 0)
    num_rejected_tokens_gpu_ptr.numpy()[:num_reqs] = rejected
    ends = query_start_loc_gpu_ptr.numpy()[1 : num_reqs + 1]
    token_indices_to_sample_ptr.numpy()[:num_reqs] = ends - 1 - rejected


def prepare_next_token_padded(
    sampled_token_ids_ptr: torch.Tensor,
    discard_request_mask_ptr: torch.Tensor,
    backup_next_token_ids_ptr: torch.Tensor,
    next_token_ids_ptr: torch.Tensor,
    valid_sampled_tokens_count_ptr: torch.Tensor,
    vocab_size: int,
    num_sampled_tokens_per_req: int,
    num_reqs: int,
    stride_sampled_token_ids: int,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """Of each request: how many of its sampled tokens are valid (not -1), and the last of them, or the backup."""
    sampled = sampled_token_ids_ptr.numpy()[:num_reqs, :num_sampled_tokens_per_req]
    discarded = discard_request_mask_ptr.numpy()[:num_reqs]
    valid = (sampled != -1) & (sampled < vocab_size) & ~discarded[:, None]
    last = valid.shape[1] - 1 - valid[:, ::-1].argmax(1)
    tokens = sampled[np.arange(num_reqs), last]
    next_token_ids_ptr.numpy()[:num_reqs] = np.where(valid.any(1), tokens, backup_next_token_ids_ptr.numpy()[:num_reqs])
    valid_sampled_tokens_count_ptr.numpy()[:num_reqs] = valid.sum(1)


def step_slot_mapping_metadata(
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    seq_lens_ptr: torch.Tensor,
    out_clamped_positions_ptr: torch.Tensor,
    out_slot_mapping_ptr: torch.Tensor,
    block_size: int,
    max_model_len: int,
    n_blocks_per_req: int,
    PAD_ID: int,
    batch_size: int,
) -> None:
    """One token further in each request: its position, slot and sequence length (int32, in place).

    Beyond `max_model_len` the position is 0, the slot PAD_ID and the length 1; slots after `batch_size` are PAD_ID.
    """
    positions = positions_ptr.numpy()[:batch_size] + 1
    beyond = positions >= max_model_len
    positions = np.where(beyond, 0, positions)
    blocks, offsets = np.divmod(positions, block_size)
    table = block_table_ptr.numpy()
    found = table[np.arange(batch_size), np.minimum(blocks, n_blocks_per_req - 1)].astype(np.int64)
    slots, lengths = out_slot_mapping_ptr.numpy(), seq_lens_ptr.numpy()
    slots[:batch_size] = np.where(beyond, PAD_ID, found * block_size + offsets)
    slots[batch_size:] = PAD_ID
    lengths[:batch_size] = np.minimum(np.where(beyond, 1, lengths[:batch_size] + 1), max_model_len)
    out_clamped_positions_ptr.numpy()[:batch_size] = positions


def copy_and_expand_inputs(
    target_token_ids_ptr: torch.Tensor,
    target_positions_ptr: torch.Tensor,
    next_token_ids_ptr: torch.Tensor,
    out_input_ids_ptr: torch.Tensor,
    out_positions_ptr: torch.Tensor,
    out_is_rejected_token_mask_ptr: torch.Tensor,
    out_is_masked_token_mask_ptr: torch.Tensor,
    out_new_token_indices_ptr: torch.Tensor,
    out_hidden_state_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    query_end_loc_ptr: torch.Tensor,
    padding_token_id: int,
    parallel_drafting_token_id: int,
    total_input_tokens: int,
    num_padding_slots_per_request: int,
    shift_input_ids: bool,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """A draft model's tokens: of each request its valid ones, the new one, room for more, and its rejected ones.

    Positions go on from the request's first, and are 0 for rejected tokens. `query_end_loc_ptr` `[requests]` is the
    last valid token of each. With `shift_input_ids` the first token of each is left out.
    """
    starts, last = query_start_loc_ptr.numpy(), query_end_loc_ptr.numpy()
    requests, room, shift = len(last), num_padding_slots_per_request, int(shift_input_ids)
    starts, lengths = starts[:requests], np.diff(starts[: requests + 1])
    _, rows, columns = _places(np.cumsum(lengths + room - shift))
    new = columns - (last - starts + 1 - shift)[rows]  # 0 for the new token, negative before it
    source = np.minimum(starts[rows] + shift + columns, total_input_tokens - 1)
    rejected, masked = new >= room, (new > 0) & (new < room)
    tokens = np.where(new < 0, target_token_ids_ptr.numpy()[source], next_token_ids_ptr.numpy()[rows])
    tokens = np.where(masked, parallel_drafting_token_id, np.where(rejected, padding_token_id, tokens))
    total = len(rows)
    out_input_ids_ptr.numpy()[:total] = tokens
    out_positions_ptr.numpy()[:total] = np.where(rejected, 0, target_positions_ptr.numpy()[starts[rows]] + columns)
    out_is_rejected_token_mask_ptr.numpy()[:total] = rejected
    out_is_masked_token_mask_ptr.numpy()[:total] = masked
    fresh = np.flatnonzero((new >= 0) & (new < room))
    out_new_token_indices_ptr.numpy()[rows[fresh] * room + new[fresh]] = fresh
    if shift_input_ids:
        kept = np.flatnonzero(columns < lengths[rows])
        out_hidden_state_mapping_ptr.numpy()[starts[rows[kept]] + columns[kept]] = kept


_REJECTION, _DRAFTING = "vllm.v1.sample.rejection_sampler.", "vllm.v1.spec_decode.utils."

KERNELS = {
    f"{_REJECTION}expand_kernel": expand,
    f"{_REJECTION}rejection_greedy_sample_kernel": rejection_greedy_sample,
    f"{_REJECTION}rejection_random_sample_kernel": rejection_random_sample,
    f"{_REJECTION}sample_recovered_tokens_kernel": sample_recovered_tokens,
    f"{_DRAFTING}eagle_prepare_inputs_padded_kernel": prepare_inputs_padded,
    f"{_DRAFTING}eagle_prepare_next_token_padded_kernel": prepare_next_token_padded,
    f"{_DRAFTING}eagle_step_slot_mapping_metadata_kernel": step_slot_mapping_metadata,
    f"{_DRAFTING}copy_and_expand_eagle_inputs_kernel": copy_and_expand_inputs,
}
"""vLLM's kernel -> ours."""
