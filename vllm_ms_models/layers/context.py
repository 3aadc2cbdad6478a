"""How a model is to be built, apart from its architecture."""

from dataclasses import dataclass, field

import mindspore as ms

from vllm_ms_models.distributed.group import Group
from vllm_ms_models.distributed.rows import DataParallel
from vllm_ms_models.distributed.stage import Stage
from vllm_ms_models.quantization.base import Quantization, Unquantized


@dataclass(frozen=True)
class ModelContext:
    """Handed to every layer's constructor.

    `dtype` is that of activations, of unquantized weights and of the KV cache; `max_model_len` the longest sequence
    (tokens) to be served; `tensor_parallel` the ranks among which heads, columns and vocabulary are split; `pipeline`
    says which layers are this process's; `head` is whether there is a language-model head at all (what embeds or
    classifies has none); `data_parallel` are the ranks that have tokens of their own. They and the
    tensor-parallel ones share the experts: each rank has some of them (`expert_parallel`), or a part of every one.
    """

    dtype: ms.Type
    max_model_len: int
    tensor_parallel: Group = field(default_factory=Group)
    quantization: Quantization = field(default_factory=Unquantized)
    data_parallel: DataParallel = field(default_factory=DataParallel)
    expert_parallel: bool = False
    pipeline: Stage = field(default_factory=Stage)
    head: bool = True
