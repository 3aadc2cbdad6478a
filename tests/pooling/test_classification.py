"""Classifiers and rerankers by vLLM's engine, and by transformers.

Scores are sums like a language model's logits, and have their bound; sigmoid and softmax make differences smaller.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import random_model
from tests.engines import engine
from tests.pooling.models import (
    OPTIONS,
    VOCABULARY,
    classifier,
    hidden,
    logits,
    prompts,
    save,
    sigmoid,
    softmax,
    token_prompts,
    tokenizer,
)
from tests.reference.torch_reference import LOGPROB_TOLERANCE

LENGTHS = (5, 1, 70, 40)
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen2": ("qwen2", 3, {}),
    "one_label": ("qwen3", 1, {"head_dim": 20}),
    "llama": ("llama", 2, {}),
    "mistral": ("mistral", 5, {"sliding_window": 16}),
    "mixtral": ("mixtral", 3, {"num_local_experts": 4}),
}
CASES = [pytest.param(name, marks=() if name in ("qwen2", "one_label") else pytest.mark.slow) for name in FAMILIES]
QUESTION = "What is the opposite of hot?"
ANSWERS = ["cold", "Spell cat backwards.", "The opposite of hot is cold."]


def classified(llm: Any, given: list[list[int]], **options: Any) -> list[np.ndarray]:
    return [np.array(output.outputs.probs) for output in llm.classify(token_prompts(given), use_tqdm=False, **options)]


def close(found: Any, wanted: Any) -> None:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < LOGPROB_TOLERANCE


@pytest.mark.feature("classification", families=["qwen2", "qwen3", "llama", "mixtral"])
@pytest.mark.parametrize("name", CASES)
def test_sequences(name: str) -> None:
    """`...ForSequenceClassification`: probabilities (of one label its sigmoid) and scores."""
    from vllm import PoolingParams

    family, labels, options = FAMILIES[name]
    model = classifier(family, labels, **options)
    given = prompts(LENGTHS)
    wanted = [logits(model, prompt) for prompt in given]
    assert np.ptp(np.stack(wanted)) > 1, "scores must differ"
    with engine(save(model), **OPTIONS) as llm:
        for found, row in zip(classified(llm, given), wanted, strict=True):
            close(found, sigmoid(row) if labels == 1 else softmax(row))
        scores = classified(llm, given, pooling_params=PoolingParams(use_activation=False))
        for found, row in zip(scores, wanted, strict=True):
            close(found, row)


def test_tokens_with_a_bias_in_chunks() -> None:
    """`...ForTokenClassification`: each token's probabilities, put together from chunks of 16."""
    model = classifier("qwen2", 3, tokens=True)
    given = prompts(LENGTHS)
    with engine(save(model), pooler_config={"task": "token_classify"}, max_num_batched_tokens=16, **OPTIONS) as llm:
        outputs = llm.encode(token_prompts(given), pooling_task="token_classify", use_tqdm=False)
        for output, prompt in zip(outputs, given, strict=True):
            close(output.outputs.data, softmax(logits(model, prompt)))


@pytest.mark.slow
def test_reference_kernels() -> None:
    model = classifier("qwen2", 3)
    given = prompts(LENGTHS)
    with engine(save(model), {"VLLM_MS_KERNELS": "reference"}, **OPTIONS) as llm:
        for found, prompt in zip(classified(llm, given), given, strict=True):
            close(found, softmax(logits(model, prompt)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_several_ranks(sizes: dict[str, Any]) -> None:
    model = classifier("qwen2", 3)
    given = prompts(LENGTHS)
    with engine(save(model), **sizes, **OPTIONS) as llm:
        for found, prompt in zip(classified(llm, given), given, strict=True):
            close(found, softmax(logits(model, prompt)))


def reranker(tied: bool) -> tuple[torch.nn.Module, Path]:
    """A language model that says how well a document answers, by its next token."""
    model = random_model("qwen3", vocab_size=VOCABULARY, tie_word_embeddings=tied)
    return model, save(model)


def overrides(**entries: Any) -> dict[str, Any]:
    return {"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"], **entries}}


QWEN3_RERANKER = overrides(classifier_from_token=["cold", "hot"], is_original_qwen3_reranker=True)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_reranker_that_says_yes_or_no(tied: bool) -> None:
    """As Qwen3-Reranker's own program: the softmax over the logits of both words, of query and document together."""
    model, folder = reranker(tied)
    no, yes = tokenizer().convert_tokens_to_ids(["cold", "hot"])
    with engine(folder, **QWEN3_RERANKER, **OPTIONS) as llm:
        outputs = llm.score(QUESTION, ANSWERS, use_tqdm=False)
    for output, answer in zip(outputs, ANSWERS, strict=True):
        tokens = tokenizer()(QUESTION + answer)["input_ids"]
        assert output.prompt_token_ids == tokens
        close(output.outputs.score, softmax(logits(model, tokens)[-1][[no, yes]])[1])


def test_a_classifier_of_tokens() -> None:
    """`no_post_processing`: the logits of the named tokens, which need not be two."""
    from vllm import PoolingParams

    model, folder = reranker(False)
    words = ["cold", "hot", "cat"]
    words = [word for word in words if word in tokenizer().get_vocab()]
    ids = tokenizer().convert_tokens_to_ids(words)
    given = prompts(LENGTHS)
    chosen = overrides(classifier_from_token=words, method="no_post_processing")
    with engine(folder, **chosen, **OPTIONS) as llm:
        scores = classified(llm, given, pooling_params=PoolingParams(use_activation=False))
        for found, prompt in zip(scores, given, strict=True):
            close(found, logits(model, prompt)[-1][ids])


@pytest.mark.slow
def test_scores_of_a_model_that_embeds() -> None:
    """Two texts are read apart, and scored by their cosine."""
    model = random_model("llama", vocab_size=VOCABULARY)
    with engine(save(model), **OPTIONS) as llm:
        outputs = llm.score(QUESTION, ANSWERS, use_tqdm=False)

    def embedded(text: str) -> np.ndarray:
        vector = hidden(model.model, tokenizer()(text)["input_ids"])[-1]
        return vector / np.linalg.norm(vector)

    for output, answer in zip(outputs, ANSWERS, strict=True):
        assert abs(output.outputs.score - embedded(QUESTION) @ embedded(answer)) < 1e-5


def test_another_number_of_labels() -> None:
    """config.json and weights that disagree are refused, by the tensor's name."""
    folder = save(classifier("qwen2", 3))
    labels = {str(number): str(number) for number in range(4)}
    config = json.loads((folder / "config.json").read_text()) | {"id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    sentence = r"'score.weight' has shape \[3, 64\] where \[4, 64\] is expected"
    with pytest.raises(ValueError, match=sentence), engine(folder, **OPTIONS):
        pass
