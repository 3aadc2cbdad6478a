"""Which drafts are accepted: those that the model itself would have sampled, so that speculation changes no token.

vLLM's rejection sampler draws other random numbers than its sampler does, and of a request with a seed also for tokens
that it then throws away: the same seed gives other tokens with speculation than without. Here each position is sampled
as without speculation, from the request's generator, as long as the drafts agree with what was drawn. A draft is
accepted with the model's probability of it, exactly as by rejection sampling where the drafts are certain (n-grams, and
draft models by default: they propose their best token). Only where drafts were sampled from the draft's distribution
(`draft_sample_method` "probabilistic") rejection sampling accepts more: there it serves all requests without a seed.
"""

from dataclasses import replace

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    PLACEHOLDER_TOKEN_ID,
    RejectionSampler,
    apply_sampling_constraints,
    rejection_sample,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_ms_models.bridge.sampler import argmax


def _untouched(sampling_metadata: SamplingMetadata) -> bool:
    """Whether no request asks for anything that changes logits but temperature, top-k and top-p."""
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.no_penalties
        and sampling_metadata.allowed_token_ids_mask is None
        and not sampling_metadata.bad_words_token_ids
        and (holder is None or not holder.has_tracked_requests())
        # With speculation vLLM has no other processor than this one.
        and not any(
            not isinstance(processor, MinTokensLogitsProcessor) or processor.min_toks
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
        )
    )


class MatchingSampler(RejectionSampler):
    """vLLM's rejection sampler with its choice of tokens replaced; logits processors and log-probabilities are its."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """`logits` `[drafts + requests, vocab]`: a row for each draft and one more for each request.

        Returns the tokens `[requests, most drafts + 1]`, int32, -1 after the last of each request.
        """
        raw = logits.to(torch.float32)
        scores = self._processed(raw, metadata, sampling_metadata)
        best = argmax(scores)
        scores = apply_sampling_constraints(scores, metadata.cu_num_sampled_tokens, sampling_metadata)
        tokens = self._match(scores, best, metadata, sampling_metadata, draft_probs is not None)
        if draft_probs is not None and not sampling_metadata.all_greedy:
            tokens = self._reject(tokens, scores, draft_probs, metadata, sampling_metadata)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            shown = scores if self.is_processed_logprobs_mode else raw
            target, bonus = metadata.target_logits_indices, metadata.bonus_logits_indices
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs, metadata, logits, shown[target], shown[bonus], tokens
            )
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def _processed(
        self, raw: torch.Tensor, metadata: SpecDecodeMetadata, sampling_metadata: SamplingMetadata
    ) -> torch.Tensor:
        """Logits after penalties, masks and whatever else depends on the tokens before; a copy if they may change."""
        if _untouched(sampling_metadata):
            return raw if sampling_metadata.all_greedy else raw.clone()
        scores = torch.empty_like(raw)
        target, bonus = metadata.target_logits_indices, metadata.bonus_logits_indices
        # The last rows first: a thinking budget is counted there.
        scores[bonus] = self.sampler.apply_logits_processors(raw[bonus], sampling_metadata, predict_bonus_token=True)
        scores[target] = self.apply_logits_processors(raw[target], sampling_metadata, metadata)
        return scores

    def _match(
        self,
        scores: torch.Tensor,
        best: torch.Tensor,
        metadata: SpecDecodeMetadata,
        sampling_metadata: SamplingMetadata,
        seeded_only: bool,
    ) -> torch.Tensor:
        """Each request's tokens as drawn without drafts, up to the first that is not the draft.

        With `seeded_only`, greedy requests and those with a seed; the others' are left empty.
        """
        counts, generators = metadata.num_draft_tokens, sampling_metadata.generators
        drafts = [rows.tolist() for rows in metadata.draft_token_ids.split(counts)]
        firsts = (metadata.cu_num_sampled_tokens - torch.tensor(counts) - 1).tolist()
        greedy = [sampling_metadata.all_greedy] * len(counts)
        if sampling_metadata.temperature is not None and not sampling_metadata.all_greedy:
            greedy = (sampling_metadata.temperature == GREEDY_TEMPERATURE).tolist()
        tokens = torch.full((len(counts), metadata.max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
        going = [i for i in range(len(counts)) if greedy[i] or i in generators or not seeded_only]
        for position in range(metadata.max_spec_len + 1):
            rows = torch.tensor([firsts[i] + position for i in going], dtype=torch.long)
            drawn = best[rows]
            random = [at for at, i in enumerate(going) if not greedy[i]]
            if random:
                own = {k: generators[going[at]] for k, at in enumerate(random) if going[at] in generators}
                probs = scores[rows[random]].softmax(dim=-1, dtype=torch.float32)
                drawn[random] = random_sample(probs, own, self.use_fp64_gumbel)
            tokens[going, position] = drawn.int()
            agreed = zip(going, drawn.tolist(), strict=True)
            going = [i for i, token in agreed if drafts[i][position : position + 1] == [token]]
            if not going:
                break
        return tokens

    def _reject(
        self,
        tokens: torch.Tensor,
        scores: torch.Tensor,
        draft_probs: torch.Tensor,
        metadata: SpecDecodeMetadata,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """`tokens`, with those of random requests without a seed from vLLM's rejection sampling."""
        unseeded = replace(sampling_metadata, generators={})
        probs = scores[metadata.bonus_logits_indices].softmax(dim=-1, dtype=torch.float32)
        sampled = rejection_sample(
            metadata.draft_token_ids,
            metadata.num_draft_tokens,
            metadata.max_spec_len,
            metadata.cu_num_draft_tokens,
            draft_probs,
            scores[metadata.target_logits_indices],
            random_sample(probs, {}, self.use_fp64_gumbel).int().unsqueeze(1),
            unseeded,
            use_fp64_gumbel=self.use_fp64_gumbel,
        )
        left = tokens[:, :1] == PLACEHOLDER_TOKEN_ID
        return torch.where(left, sampled, tokens)
