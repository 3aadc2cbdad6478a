"""The drafts' logits of DeepSeek-V3's MTP layer against torch's in float32, as vLLM's proposer asks for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams

from tests.checkpoints import random_prompts
from tests.engines import engine, token_ids
from tests.reference import torch_reference
from tests.speculation.mtp import DraftLayer, in_fp8, with_draft_layer

# Both sides are float32 and sum in different orders; four layers, as in tests/reference, with logits of the same size.
TOLERANCE = torch_reference.LOGPROB_TOLERANCE
LENGTH, TOKENS = 75, 12


def recorded_logits(llm: LLM) -> list[torch.Tensor]:
    """A list that grows by the logits `[requests, vocab]` of each draft token, as the draft computes them."""
    executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
    model = executor.driver_worker.worker.model_runner.drafter.model
    logits: list[torch.Tensor] = []
    compute = model.compute_logits

    def record(hidden: torch.Tensor) -> torch.Tensor:
        logits.append(compute(hidden).clone())
        return logits[-1]

    model.compute_logits = record
    return logits


@pytest.mark.parametrize("case", ["some right", "wrong", "some right, fp8"])
def test_logits_of_drafts(case: str, tmp_path: Path) -> None:
    """Of both drafts of every step; rows of the cache that rejected drafts left are written anew.

    The prompt is read at once: at the end of a chunk vLLM gives the draft the prompt's last token, not the next one.
    """
    folder = served = with_draft_layer(tmp_path / "model", 1.0 if case == "wrong" else 0.03)
    if "fp8" in case:
        served = tmp_path / "fp8"
        in_fp8(folder, served)
    (prompt,) = random_prompts([LENGTH])
    with engine(
        served, max_num_batched_tokens=256, speculative_config={"method": "mtp", "num_speculative_tokens": 2}
    ) as llm:
        logits = recorded_logits(llm)
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        (answer,) = token_ids(llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False))

    steps = list(zip(logits[0::2], logits[1::2], strict=True))

    model, draft = torch_reference.load(folder), DraftLayer(folder).eval()
    tokens = torch.tensor(prompt + answer)
    with torch.inference_mode():
        hidden = model.model(tokens[None]).last_hidden_state[0]
    position, accepted = LENGTH - 1, 0  # the last position that the model has read
    for first, second in steps:
        want, normed = draft(hidden[: position + 1], tokens[1 : position + 2])
        np.testing.assert_allclose(first[0], want[-1], rtol=0, atol=TOLERANCE)
        guess = first[0].argmax()
        # The second step goes on from the draft's own hidden state and the token it has just proposed.
        own = torch.cat((hidden[: position + 1], normed[-1:]))
        want, _ = draft(own, torch.cat((tokens[1 : position + 2], guess[None])))
        np.testing.assert_allclose(second[0], want[-1], rtol=0, atol=TOLERANCE)
        right = 0
        for token in (guess, second[0].argmax()):
            if position + right + 2 >= len(tokens) or tokens[position + right + 2] != token:
                break
            right += 1
        position, accepted = position + 1 + right, accepted + right
    assert position >= LENGTH + TOKENS - 4  # every step was looked at
    assert len(steps) > 2


def test_the_draft_layer_shares_embedding_and_head(tmp_path: Path) -> None:
    """The checkpoint's copies are not read: the model's are used."""
    folder = with_draft_layer(tmp_path / "model")
    with engine(folder, speculative_config={"method": "mtp", "num_speculative_tokens": 1}) as llm:
        executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
        runner = executor.driver_worker.worker.model_runner
        draft, cell = runner.drafter.model, runner.model.cell
        assert draft.model.embed_tokens is cell.model.embed_tokens
        assert draft.lm_head is cell.lm_head
