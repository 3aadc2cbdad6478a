"""Parity with the torch models of transformers in float32, from the checkpoint to the tokens, through vLLM.

Every model answers prompts whose lengths lie below, at and above a KV block (32 tokens) and the sliding windows.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE, Answer

TOKENS = 64
LENGTHS = (1, 5, 32, 33, 100, 150)
MAX_MODEL_LEN = 256

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0} | parameters


def factors(pairs: int, first: float, last: float) -> list[float]:
    """One factor for each rotating pair, from `first` to `last`."""
    return np.linspace(first, last, pairs).tolist()


@dataclass(frozen=True)
class Case:
    """A model, and how it is asked.

    `without` is the config of a model that lacks the feature the case is about: it must answer differently.
    `frequencies_of` is the length whose rotary frequencies are used throughout (dynamic).
    """

    family: str
    options: dict[str, Any]
    lengths: tuple[int, ...] = LENGTHS
    without: dict[str, Any] = field(default_factory=dict)
    max_model_len: int = MAX_MODEL_LEN
    frequencies_of: int | None = None
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        return self.options.get("vocab_size", 211)

    @property
    def folder(self) -> Path:
        return checkpoint(self.family, self.seed, **self.options)

    @property
    def prompts(self) -> list[list[int]]:
        return random_prompts(self.lengths, self.vocab_size, self.seed)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
WITHOUT_ROPE = {"rope_parameters": DEFAULT_ROPE}


def qwen2(*args: Any, **kwargs: Any) -> Case:
    return Case("qwen2", *args, **kwargs)


def llama(*args: Any, **kwargs: Any) -> Case:
    return Case("llama", *args, **kwargs)


def mistral(*args: Any, **kwargs: Any) -> Case:
    return Case("mistral", *args, **kwargs)


def qwen3(*args: Any, **kwargs: Any) -> Case:
    return Case("qwen3", *args, **kwargs)


def qwen3_moe(options: dict[str, Any], **kwargs: Any) -> Case:
    return Case("qwen3_moe", {"moe_intermediate_size": 48} | options, **kwargs)


def mixtral(*args: Any, **kwargs: Any) -> Case:
    return Case("mixtral", *args, **kwargs)


CASES = {
    # --- Qwen2: biases on q, k and v always ---
    "qwen2 1 query head a KV head": qwen2({"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, seed=1),
    "qwen2 2, tied": qwen2({"tie_word_embeddings": True, "vocab_size": 257}),
    "qwen2 4, sharded": qwen2(
        {"num_attention_heads": 8, "vocab_size": 129, "num_hidden_layers": 5, "max_shard_size": "100KB"}
    ),
    "qwen2 8, linear, head size 20": qwen2(
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "rope_parameters": rope("linear", factor=4.0),
        },
        without=WITHOUT_ROPE,
    ),
    "qwen2 7, theta 1e6": qwen2(
        {
            "hidden_size": 112,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "intermediate_size": 149,
            "rope_parameters": rope("default", rope_theta=1e6),
        },
        without=WITHOUT_ROPE,
    ),
    "qwen2 half of the layers with a window": qwen2(
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "num_hidden_layers": 4},
        without={"layer_types": ["full_attention"] * 4},
    ),
    "qwen2 one layer of three with a window, head size 72": qwen2(
        {
            "use_sliding_window": True,
            "sliding_window": 40,
            "max_window_layers": 2,
            "head_dim": 72,
            "rope_parameters": YARN,
        },
        without={"layer_types": ["full_attention"] * 3},
        seed=1,
    ),
    "qwen2 window in all layers": qwen2(
        {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 0, "tie_word_embeddings": True},
        without={"layer_types": ["full_attention"] * 3},
    ),
    "qwen2 yarn": qwen2(
        {"rope_parameters": YARN, "max_position_embeddings": 256, "num_attention_heads": 8}, without=WITHOUT_ROPE
    ),
    "qwen2 dynamic within the trained length": qwen2({"rope_parameters": rope("dynamic", factor=2.0)}, seed=2),
    "qwen2 dynamic beyond": qwen2(
        {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": 64},
        lengths=(1, 33, 100),
        max_model_len=192,
        frequencies_of=192,
        without=WITHOUT_ROPE,
    ),
    "qwen2 llama3 rope, gelu": qwen2(
        {"rope_parameters": LLAMA3, "hidden_act": "gelu", "vocab_size": 1021}, without={"hidden_act": "silu"}, seed=2
    ),
    # --- Llama ---
    "llama 1": llama({"num_key_value_heads": 4, "vocab_size": 320, "intermediate_size": 172}),
    "llama 2, all biases": llama({"attention_bias": True, "mlp_bias": True}),
    "llama 4, llama3 rope": llama({"num_attention_heads": 8, "rope_parameters": LLAMA3}, without=WITHOUT_ROPE, seed=1),
    "llama 8, tied, head_dim 32": llama(
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "vocab_size": 509,
            "rope_parameters": LLAMA3 | {"factor": 32.0},
        },
        without=WITHOUT_ROPE,
    ),
    "llama 7, head size 72, biases of attention": llama(
        {
            "hidden_size": 84,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "head_dim": 72,
            "attention_bias": True,
            "max_shard_size": "150KB",
        }
    ),
    "llama linear, head size 20, gelu_pytorch_tanh": llama(
        {"head_dim": 20, "hidden_act": "gelu_pytorch_tanh", "rope_parameters": rope("linear", factor=2.0)},
        without=WITHOUT_ROPE,
        seed=1,
    ),
    "llama dynamic within the trained length": llama({"rope_parameters": rope("dynamic", factor=2.0)}),
    "llama dynamic beyond": llama(
        {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 100, "attention_bias": True},
        lengths=(5, 100),
        max_model_len=181,
        frequencies_of=181,
        without=WITHOUT_ROPE,
    ),
    "llama yarn, attention_factor, mlp_bias": llama(
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}, "mlp_bias": True},
        without={"rope_parameters": YARN},
    ),
    "llama longrope within the trained length": llama(
        {
            "rope_parameters": rope(
                "longrope",
                original_max_position_embeddings=256,
                short_factor=factors(8, 1.0, 1.7),
                long_factor=factors(8, 1.5, 9.0),
            ),
        },
        without=WITHOUT_ROPE,
    ),
    "llama longrope beyond": llama(
        {
            "rope_parameters": rope(
                "longrope",
                original_max_position_embeddings=64,
                short_factor=factors(8, 1.0, 1.7),
                long_factor=factors(8, 1.5, 9.0),
            ),
        },
        lengths=(65, 100, 150),  # transformers gives shorter prompts the short factors
        without=WITHOUT_ROPE,
        seed=1,
    ),
    "mistral window": mistral({"sliding_window": 24}, without={"sliding_window": None}, seed=2),
    "mistral window, head size 20, odd vocabulary": mistral(
        {
            "sliding_window": 33,
            "num_attention_heads": 8,
            "head_dim": 20,
            "vocab_size": 131,
            "rope_parameters": rope("default", rope_theta=1e6),
        },
        without={"sliding_window": None},
    ),
    "mistral without a window": mistral({"sliding_window": None, "tie_word_embeddings": True}),
    # --- Qwen3: norms on the heads of q and k always; its head_dim is not hidden_size / heads ---
    "qwen3 2, head_dim 32, tied": qwen3({"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 8, head_dim 20, all biases, yarn": qwen3(
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "attention_bias": True,
            "rope_parameters": YARN,
        },
        without=WITHOUT_ROPE,
        seed=1,
    ),
    "qwen3 half of the layers with a window": qwen3(
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
            "num_hidden_layers": 4,
            "rope_parameters": rope("default", rope_theta=1e6),
        },
        without={"layer_types": ["full_attention"] * 4},
        seed=4,
    ),
    # --- Mixtures of experts ---
    "qwen3_moe 8 of 16 experts": qwen3_moe(
        {"num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 32},
        without={"norm_topk_prob": False},
    ),
    "qwen3_moe 3 of 7 experts, shares as they are, biases, tied": qwen3_moe(
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "moe_intermediate_size": 33,
        },
        without={"norm_topk_prob": True},
    ),
    "qwen3_moe every second layer but one, window, gelu": qwen3_moe(
        {
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 24,
            "hidden_act": "gelu",
        },
        without={"num_experts_per_tok": 3},
        seed=1,
    ),
    "mixtral 2 of 8": mixtral({}, without={"num_experts_per_tok": 1}),
    "mixtral 1 of 3, window, head size 20": mixtral(
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 24, "head_dim": 20},
        without={"sliding_window": None},
        seed=3,
    ),
    "mixtral 4 of 6, sharded, odd sizes": mixtral(
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 4,
            "intermediate_size": 77,
            "hidden_size": 84,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "max_shard_size": "150KB",
            "rope_parameters": rope("default", rope_theta=1e6),
        },
        without={"num_experts_per_tok": 3},
    ),
}


@dataclass(frozen=True)
class Result:
    """What both sides said to each prompt; log-probabilities are of the whole vocabulary."""

    case: Case
    expected: list[Answer]
    tokens: list[list[int]]
    prompt_logprobs: list[np.ndarray]
    token_logprobs: list[np.ndarray]


def reference_answers(case: Case) -> list[Answer]:
    model = torch_reference.load(case.folder)
    if case.frequencies_of is not None:
        return [torch_reference.greedy_at_length(model, prompt, TOKENS, case.frequencies_of) for prompt in case.prompts]
    return [torch_reference.greedy(model, prompt, TOKENS) for prompt in case.prompts]


def run(case: Case, folder: Path | None = None) -> Result:
    with engine(folder or case.folder, max_model_len=case.max_model_len) as llm:
        outputs = greedy(llm, case.prompts, TOKENS, logprobs=-1, prompt_logprobs=-1)
        prompt_logprobs = [distributions(output.prompt_logprobs, case.vocab_size) for output in outputs]
        token_logprobs = [distributions(output.outputs[0].logprobs, case.vocab_size) for output in outputs]
        return Result(case, reference_answers(case), token_ids(outputs), prompt_logprobs, token_logprobs)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_").replace(",", ""))
def result(request: pytest.FixtureRequest) -> Iterator[Result]:
    yield run(CASES[request.param])


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    return torch.log_softmax(logits, -1).numpy()


def check_tokens(result: Result) -> None:
    for length, answer, tokens in zip(result.case.lengths, result.expected, result.tokens, strict=True):
        assert answer.margin > LEAST_MARGIN, f"a tie in the prompt of {length} tokens: choose another seed"
        assert tokens == answer.tokens, f"prompt of {length} tokens"


@pytest.mark.feature("offline LLM", families=["qwen2", "llama", "qwen3", "qwen3_moe", "mixtral"])
def test_greedy_tokens_are_those_of_generate(result: Result) -> None:
    check_tokens(result)


def test_prompt_logprobs(result: Result) -> None:
    """Of every token of the vocabulary at every position of every prompt."""
    for length, answer, found in zip(result.case.lengths, result.expected, result.prompt_logprobs, strict=True):
        assert found.shape == (length - 1, result.case.vocab_size)
        np.testing.assert_allclose(
            found, log_softmax(answer.prompt_logits), rtol=0, atol=LOGPROB_TOLERANCE, err_msg=f"prompt of {length}"
        )


def test_token_logprobs(result: Result) -> None:
    """The same of every generated token, which went through the KV cache."""
    for length, answer, found in zip(result.case.lengths, result.expected, result.token_logprobs, strict=True):
        np.testing.assert_allclose(
            found, log_softmax(answer.token_logits), rtol=0, atol=LOGPROB_TOLERANCE, err_msg=f"prompt of {length}"
        )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.without])
def test_cases_can_see_their_feature(name: str) -> None:
    """Without the window, rope type or activation that a case is about, torch itself answers otherwise."""
    case = CASES[name]
    prompt = random_prompts([150], case.vocab_size)[0]
    model = torch_reference.load(case.folder)
    other = type(model).from_pretrained(case.folder, experts_implementation="eager", **case.without).eval()
    difference = (torch_reference.logits(model, prompt) - torch_reference.logits(other, prompt)).abs().max().item()
    assert difference > 1000 * LOGPROB_TOLERANCE


@pytest.mark.parametrize("name", ["qwen2 yarn", "llama 4, llama3 rope"])
def test_older_config_files(name: str, tmp_path: Path) -> None:
    """`rope_theta` beside `rope_scaling`, and `type` for `rope_type`, as most published checkpoints have them."""
    case = CASES[name]
    folder = tmp_path / "older"
    shutil.copytree(case.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    if name.startswith("qwen2"):
        scaling["type"] = scaling.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    check_tokens(run(case, folder))
