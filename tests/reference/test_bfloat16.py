"""In bfloat16 and float16 the answers are no further from float32's than those of torch in the same dtype.

The yardstick is the float32 torch model with the same (already rounded) weights. A second torch model, in 16 bits,
shows how far rounding of activations moves the log-probabilities at all; ours may move them no further. No tolerance
is chosen anywhere: both bounds are torch's own errors on the very sequence that is compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.reference import torch_reference

# Large enough for bfloat16 to matter: sums over 256 to 512 terms, four layers. With weights of 0.06, logits get a
# standard deviation of 1 and attention is neither uniform nor on one token.
_SIZES: dict[str, Any] = {
    "vocab_size": 509,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "initializer_range": 0.06,
}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
_EXPERTS = {"num_experts": 8, "moe_intermediate_size": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LATENT = {  # without experts: which of them a token has, rounding decides now and then
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 4,
    "num_nextn_predict_layers": 0,
}

# Family, dtype, config.
CASES: dict[str, tuple[str, torch.dtype, Mapping[str, Any]]] = {
    "qwen2": ("qwen2", torch.bfloat16, {}),
    "qwen2_large_weights": ("qwen2", torch.bfloat16, {"initializer_range": 0.1, "num_key_value_heads": 8}),
    "qwen2_windows_tied": ("qwen2", torch.bfloat16, _WINDOWS | {"tie_word_embeddings": True}),
    "llama_one_kv_head": ("llama", torch.bfloat16, {"num_key_value_heads": 1, "rope_parameters": _LLAMA3}),
    "llama_biases": ("llama", torch.bfloat16, {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "mistral_window": ("mistral", torch.bfloat16, {"sliding_window": 40}),
    "deepseek_latent": ("deepseek_v3", torch.bfloat16, _LATENT),
    "qwen3": ("qwen3", torch.bfloat16, {"head_dim": 64}),
    # All experts: where rounding changes which are chosen, either side is off by much more, and who is by chance.
    "qwen3_moe": ("qwen3_moe", torch.bfloat16, _EXPERTS | {"num_experts_per_tok": 8, "head_dim": 64}),
    "mixtral": ("mixtral", torch.bfloat16, {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen2_float16": ("qwen2", torch.float16, {}),
    "llama_float16": ("llama", torch.float16, {"num_key_value_heads": 1}),
    "deepseek_float16": ("deepseek_v3", torch.float16, _LATENT | {"q_lora_rank": None}),
}
LENGTHS = (2, 33, 100, 200)
TOKENS = 48


@dataclass(frozen=True)
class Sequence:
    """A prompt and what we generated after it: logits of torch, log-probabilities of ours, one row a position."""

    prompt_length: int
    float32: torch.Tensor
    torch16: torch.Tensor
    ours: np.ndarray

    @property
    def exact(self) -> np.ndarray:
        return torch.log_softmax(self.float32, -1).numpy()

    @property
    def our_errors(self) -> np.ndarray:
        return np.abs(self.ours - self.exact)

    @property
    def torch_errors(self) -> np.ndarray:
        return np.abs(torch.log_softmax(self.torch16, -1).numpy() - self.exact)

    @property
    def noise(self) -> float:
        """The most that torch's 16 bits move any logit of this sequence."""
        return (self.torch16 - self.float32).abs().max().item()

    @property
    def decided(self) -> np.ndarray:
        """Where float32 prefers its best token by more than noise can undo.

        Noise may lower the best and raise the second best logit; so the margin must exceed it twice.
        """
        best = self.float32.topk(2, -1).values
        return (best[:, 0] - best[:, 1] > 2 * self.noise).numpy()


@pytest.fixture(scope="module", params=CASES)
def sequences(request: pytest.FixtureRequest) -> Iterator[list[Sequence]]:
    family, dtype, options = CASES[request.param]
    folder = checkpoint(family, 0, dtype, **(_SIZES | dict(options)))
    vocab_size = _SIZES["vocab_size"]
    prompts = random_prompts(LENGTHS, vocab_size)
    with engine(folder, dtype=str(dtype).removeprefix("torch.")) as llm:
        outputs = greedy(llm, prompts, TOKENS, logprobs=-1, prompt_logprobs=-1)
        generated = token_ids(outputs)
        ours = [distributions([*output.prompt_logprobs, *output.outputs[0].logprobs], vocab_size) for output in outputs]
    exact, rounded = torch_reference.load(folder), torch_reference.load(folder, dtype)
    result = []
    for prompt, tokens, rows in zip(prompts, generated, ours, strict=True):
        logits = [torch_reference.logits(model, prompt + tokens)[:-1] for model in (exact, rounded)]
        result.append(Sequence(len(prompt), logits[0], logits[1], rows))
    yield result


def test_top_token_wherever_noise_cannot_decide(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        best = sequence.exact.argmax(-1)
        np.testing.assert_array_equal(sequence.ours.argmax(-1)[sequence.decided], best[sequence.decided])
    # The test is not empty: that is so for a good part of the positions.
    assert np.concatenate([sequence.decided for sequence in sequences]).mean() > 0.2


def test_mean_error_of_prompts(sequences: list[Sequence]) -> None:
    """Prefill: over the whole vocabulary at every position of every prompt."""
    ours = np.concatenate([sequence.our_errors[: sequence.prompt_length - 1] for sequence in sequences])
    torches = np.concatenate([sequence.torch_errors[: sequence.prompt_length - 1] for sequence in sequences])
    assert ours.mean() <= torches.mean()


def test_mean_error_of_generated_tokens(sequences: list[Sequence]) -> None:
    """Decode: the same of the rows that were computed one at a time, from the KV cache."""
    for sequence in sequences:
        rows = slice(sequence.prompt_length - 1, None)
        assert sequence.our_errors[rows].mean() <= sequence.torch_errors[rows].mean()


def test_errors_are_those_of_the_dtype(sequences: list[Sequence]) -> None:
    """Neither side computes in float32 by mistake: then its errors would be a thousand times smaller than 16 bits'."""
    for sequence in sequences:
        assert sequence.our_errors.mean() > sequence.torch_errors.mean() / 10
