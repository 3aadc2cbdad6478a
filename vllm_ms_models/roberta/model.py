"""RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2020): bge-m3, multilingual-e5, bge-reranker.

BERT's encoder, whose positions are counted from behind that of the padding: the first token has `pad_token_id + 1`.
"""

from typing import Any

import mindspore as ms

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.encoder import Encoder
from vllm_ms_models.layers.score import DenseScoreHead, ScoreHead
from vllm_ms_models.registry import register_model
from vllm_ms_models.roberta.config import first_position


@register_model("RobertaModel", "XLMRobertaModel")
class RobertaModel(Encoder):
    """The encoder by itself; what its own `pooler` makes of the first token is not used to embed."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__("", config, context, first_position(config))


@register_model("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification")
class RobertaForSequenceClassification(Encoder):
    """Scores of the first token, by a head of two layers."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__("roberta.", config, context, first_position(config))

    @staticmethod
    def head(config: Any, labels: int, dtype: ms.Type) -> DenseScoreHead:
        return DenseScoreHead(labels, config.hidden_size, dtype, "classifier.dense", "classifier.out_proj")


@register_model("RobertaForTokenClassification", "XLMRobertaForTokenClassification")
class RobertaForTokenClassification(Encoder):
    """Scores of every token."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__("roberta.", config, context, first_position(config))

    @staticmethod
    def head(config: Any, labels: int, dtype: ms.Type) -> ScoreHead:
        return ScoreHead(labels, config.hidden_size, dtype, "classifier")
