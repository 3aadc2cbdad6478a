"""What the torch models of transformers say, prompt by prompt and without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# The project promises 1e-3. Both sides compute in float32 (eps 6e-8) but sum in different orders; through three to five
# layers of these models, whose logits have a standard deviation of 1.6 to 2.2, the largest difference over all cases is
# 7e-5 (AVX-512; typically 2e-5). Other instruction sets and versions of torch sum differently again: four times that.
LOGPROB_TOLERANCE = 3e-4
# Identical tokens can be asked for only where that difference, on the best and on the second best token, cannot decide.
# Checked for every token of every case, so that a failure is a fault and not a tie.
LEAST_MARGIN = 2 * LOGPROB_TOLERANCE


@dataclass(frozen=True)
class Answer:
    """Of one prompt: the greedy tokens, and the logits of every position but the last (float32, `[.., vocab]`)."""

    tokens: list[int]
    prompt_logits: torch.Tensor  # row i is what the prompt's tokens 0...i say of token i + 1
    token_logits: torch.Tensor  # row i is what chose tokens[i]

    @property
    def margin(self) -> float:
        """By how much the closest decision among the greedy tokens was taken."""
        best = self.token_logits.topk(2, -1).values
        return (best[:, 0] - best[:, 1]).min().item()


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The checkpoint in `dtype`, whatever it is stored in; experts one by one, since torch's grouped product takes no
    odd sizes; scores that are capped by plain operators, since torch's own attention does not cap."""
    capped = getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None)
    attention = {"attn_implementation": "eager"} if capped else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager", **attention).eval()


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """Of all positions of one sequence, as float32 `[len(tokens), vocab]`."""
    return model(torch.tensor([list(tokens)])).logits[0].float()


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: Sequence[int], tokens: int) -> Answer:
    """By transformers' own `generate`, with its cache."""
    result = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    chosen = result.sequences[0, len(prompt) :].tolist()
    return Answer(chosen, logits(model, prompt)[:-1], torch.cat(result.logits).float())


def greedy_at_length(model: torch.nn.Module, prompt: Sequence[int], tokens: int, length: int) -> Answer:
    """As `greedy`, with every forward pass over `length` tokens.

    What follows a position cannot change its logits, except through a rotary embedding that depends on the length of
    the sequence (dynamic): this gives the model whose frequencies are those of `length` throughout.
    """
    sequence = list(prompt)
    while len(sequence) < len(prompt) + tokens:
        filler = [0] * (length - len(sequence))
        sequence.append(int(logits(model, sequence + filler)[len(sequence) - 1].argmax()))
    rows = logits(model, sequence + [0] * (length - len(sequence)))
    first = len(prompt)
    return Answer(sequence[first:], rows[: first - 1], rows[first - 1 : len(sequence) - 1])
