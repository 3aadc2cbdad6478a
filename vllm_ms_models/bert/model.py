"""BERT (Devlin et al., 2019), which most embedding models are: bge, e5, MiniLM; and, as classifiers, many rerankers."""

from typing import Any

import mindspore as ms

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.encoder import Encoder
from vllm_ms_models.layers.score import DenseScoreHead, ScoreHead
from vllm_ms_models.registry import register_model


@register_model("BertModel")
class BertModel(Encoder):
    """The encoder by itself; what its own `pooler` makes of the first token is not used to embed."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__("", config, context)


@register_model("BertForSequenceClassification")
class BertForSequenceClassification(Encoder):
    """Scores of the first token; of two texts, with token types, it is a cross-encoder."""

    ignored = ("*embeddings.position_ids",)

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__("bert.", config, context)

    @staticmethod
    def head(config: Any, labels: int, dtype: ms.Type) -> DenseScoreHead:
        return DenseScoreHead(labels, config.hidden_size, dtype, "bert.pooler.dense", "classifier")


@register_model("BertForTokenClassification")
class BertForTokenClassification(Encoder):
    """Scores of every token."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__("bert.", config, context)

    @staticmethod
    def head(config: Any, labels: int, dtype: ms.Type) -> ScoreHead:
        return ScoreHead(labels, config.hidden_size, dtype, "classifier")
