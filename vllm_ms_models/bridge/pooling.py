"""What a model that embeds or classifies has in place of a language-model head: vLLM's pooler, and a MindSpore head.

vLLM pools, normalises and activates (torch on host tensors, few rows); labels are scored by a layer of `layers/score`.
vLLM itself makes such a model of one for text generation (its `--convert`): it subclasses the shell, and takes the
pooler that it finds there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.pooler import DispatchPooler, Pooler
from vllm.model_executor.layers.pooler.tokwise import pooler_for_token_classify
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.config import try_get_dense_modules

if TYPE_CHECKING:
    from vllm_ms_models.layers.layer import Layer
    from vllm_ms_models.layers.score import ScoreHead, TokenScoreHead

# vLLM's names of how a reranker that answers with a token becomes a classifier (`--hf-overrides`).
TWO_WAY = "from_2_way_softmax"
METHODS = (TWO_WAY, "no_post_processing")


def make_pooler(model: ModelConfig) -> "tuple[Pooler, ScoreHead | TokenScoreHead | None]":
    """The pooler of `model`, and its classification head, which is still to be loaded. In every process alike."""
    assert model.pooler_config is not None
    if model.convert_type != "classify":
        pooler = DispatchPooler.for_embedding(model.pooler_config)
        _check_dense_layers(model, pooler)
        return pooler, None
    head = _head(model)
    return DispatchPooler.for_seq_cls(model.pooler_config, classifier=_classifier(head)), head


def make_encoder_pooler(model: ModelConfig, cell: Any) -> "tuple[Pooler, Layer | None]":
    """The same for an encoder: `cell` has a function `head(config, labels, dtype)` if it classifies."""
    assert model.pooler_config is not None
    if not hasattr(cell, "head"):
        pooler = DispatchPooler.for_embedding(model.pooler_config)
        _check_dense_layers(model, pooler)
        return pooler, None
    from vllm_ms_models.bridge.tensors import DTYPES

    _check_token_types(model)
    head = cell.head(model.hf_config, model.hf_config.num_labels, DTYPES[model.head_dtype])
    classify = _classifier(head)
    if model.architecture.endswith("ForTokenClassification"):
        tokens = pooler_for_token_classify(model.pooler_config, classifier=classify)
        return DispatchPooler({"token_classify": tokens}), head
    return DispatchPooler.for_seq_cls(model.pooler_config, classifier=classify), head


def _check_token_types(model: ModelConfig) -> None:
    """ValueError if a pair's second text has tokens of a type that the model does not know."""
    types = model.hf_text_config.type_vocab_size
    if types > 1 or model.skip_tokenizer_init or model.score_type != "cross-encoder":
        return
    if "token_type_ids" in getattr(cached_tokenizer_from_config(model), "model_input_names", ()):
        raise ValueError(
            f"type_vocab_size in config.json is {types}, but the tokenizer gives the second text of a pair tokens of "
            "type 1; correct config.json, or model_input_names in tokenizer_config.json."
        )


def _classifier(head: "Layer") -> Callable[[torch.Tensor], torch.Tensor]:
    from vllm_ms_models.bridge.tensors import download, upload

    return lambda pooled: download(head(upload(pooled)))


def _check_dense_layers(model: ModelConfig, pooler: DispatchPooler) -> None:
    """ValueError if a dense layer of sentence-transformers', behind the pooling, is missing: vLLM leaves it out."""
    wanted = try_get_dense_modules(model.model, revision=model.revision) or []
    for part in pooler.poolers_by_task.values():
        found = sum(isinstance(module, torch.nn.Linear) for module in part.modules())
        if found < len(wanted):
            folders = ", ".join(module["folder"] for module in wanted)
            raise ValueError(
                f"Only {found} of the {len(wanted)} dense layers that modules.json of {model.model} names could be "
                f"read ({folders}); download their folders again."
            )


def _head(model: ModelConfig) -> "ScoreHead | TokenScoreHead":
    from vllm_ms_models.bridge.tensors import DTYPES
    from vllm_ms_models.layers.score import ScoreHead, TokenScoreHead

    hidden, dtype = model.get_hidden_size(), DTYPES[model.head_dtype]
    method, tokens = _setting(model, "method"), _setting(model, "classifier_from_token")
    if method is None and tokens is not None:
        raise ValueError(f'classifier_from_token needs "method" in --hf-overrides, one of {", ".join(METHODS)}.')
    if method is None:
        return ScoreHead(model.hf_config.num_labels, hidden, dtype)
    text = model.hf_text_config
    name = "model.embed_tokens.weight" if text.tie_word_embeddings else "lm_head.weight"
    shape = (text.vocab_size, hidden)
    return TokenScoreHead(_token_ids(model, tokens), method == TWO_WAY, name, shape, dtype)


def _setting(model: ModelConfig, name: str) -> Any:
    """Of config.json, or of its text part."""
    return getattr(model.hf_config, name, getattr(model.hf_text_config, name, None))


def _token_ids(model: ModelConfig, tokens: list[str]) -> list[int]:
    vocabulary = cached_tokenizer_from_config(model).get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ValueError(
            f"classifier_from_token has {', '.join(map(repr, missing))}, which is no token of {model.tokenizer}; "
            "correct --hf-overrides."
        )
    return [vocabulary[token] for token in tokens]
