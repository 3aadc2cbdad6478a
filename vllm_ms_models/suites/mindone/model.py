"""A model of mindone as the Cell that vLLM is served from (bridge/model.py)."""

import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Tensor, nn

from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.suites import OPTION, SuiteError
from vllm_ms_models.suites.mindone import MODELS, attention, importing, names, operators
from vllm_ms_models.suites.mindone.config import as_mindone_reads, check, plan
from vllm_ms_models.suites.mindone.noted import NotedEmbedding, NotedLinear
from vllm_ms_models.suites.mindone.parts import Maker, kv_group

# What mindone's modules of attention call the numbers of their heads.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")


@functools.cache
def prepare() -> None:
    """Let mindone's modules be imported in this process, and their models call our attention. Once."""
    overrides: dict[str, dict[str, Any]] = {
        "mindspore.nn": {"Dense": NotedLinear, "Embedding": NotedEmbedding},
        "mindspore.mint.nn": {"Linear": NotedLinear, "Embedding": NotedEmbedding},
    }
    more = [names.supplied()]
    if ms.get_context("device_target") == "CPU":
        more.append(operators.spellings())
        # Operators that are this small wait for their threads longer than these compute; it can be set once only.
        ms.device_context.cpu.op_tuning.threads_num(1)
    for module, values in (item for source in more for item in source.items()):
        overrides[module] = {**overrides.get(module, {}), **values}
    importing.install(names.BYPASSED, overrides)
    modeling: Any = import_module("mindone.transformers.modeling_utils")
    modeling.AttentionInterface.register(attention.NAME, attention.attend)
    modeling._init_weights = False  # mindone's own switch: no random numbers, the checkpoint has them all


def mindone_class(architecture: str) -> type[Any]:
    """mindone's class of that name, its modules imported as importing.py says."""
    prepare()
    return getattr(import_module(MODELS[architecture]), architecture)


def window_of(config: Any, layer: int) -> int | None:
    """What the config says of one layer; not every module of mindone passes it on, for some have it in their masks."""
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if windowed else None


class _Output(tuple):
    """What mindone's decoders give: the hidden states, by number and by name."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    past_key_values = hidden_states = attentions = router_logits = None


class _Given(nn.Cell):
    """In the place of the decoder when logits are computed: what it gave is already there."""

    def construct(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output((inputs_embeds,))


class MindOneModel(nn.Cell):
    """A language model of mindone: its own code round our linears, embeddings and attention.

    `config` is transformers' own. The step's tokens are one sequence to mindone's code, which only attention looks
    into; their positions are the ones that vLLM gives.
    """

    def __init__(self, architecture: str, config: Any, context: ModelContext) -> None:
        super().__init__()
        check(architecture, config, context.tensor_parallel.size)
        cls = mindone_class(architecture)
        config = as_mindone_reads(config, attention.NAME)
        self.dtype = context.dtype
        self.step = attention.Step()
        self.num_layers = config.num_hidden_layers
        self.language_model = cls(config)
        self.language_model.set_train(False)
        self.group = context.tensor_parallel
        Maker(config, context, plan(config)).replace(self.language_model)
        self._add_attention(config)
        self.weights = list(self._take_parameters(self.language_model))
        prefix = self.language_model.base_model_prefix
        self.decoder = getattr(self.language_model, prefix)
        setattr(self.language_model, prefix, _Given())
        if hasattr(self.decoder, "_update_causal_mask"):  # our attention needs no mask
            self.decoder._update_causal_mask = lambda *_, **__: None

    def _add_attention(self, config: Any) -> None:
        """Each module of attention gets ours, with this rank's heads; they know which layer they are in."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        own = self.group.share(heads, "The number of attention heads")
        own_kv = kv_heads // kv_group(config, self.group).size
        modules = [
            (name, cell)
            for name, cell in self.language_model.cells_and_names()
            if isinstance(getattr(cell, "layer_idx", None), int) and hasattr(cell, "is_causal")
        ]
        if len(modules) != config.num_hidden_layers:
            raise SuiteError(
                f"{len(modules)} modules of attention were found in {config.num_hidden_layers} layers of "
                f"{type(self.language_model).__name__} of mindone; leave out {OPTION}."
            )
        for name, cell in modules:
            ours = Attention(f"{name}.attn", own, own_kv, size, window=window_of(config, cell.layer_idx))
            cell.paged_attention = attention.PagedAttention(ours, self.step)
            # Some count heads, or features of all heads, in the shapes that they give to tensors.
            for count in HEAD_COUNTS:
                if hasattr(cell, count):
                    setattr(cell, count, own_kv if "key_value" in count else own)
            if getattr(cell, "hidden_size", None) == heads * size:
                cell.hidden_size = own * size

    def _take_parameters(self, model: nn.Cell) -> Iterator[tuple[nn.Cell, str, str, tuple[int, ...]]]:
        """The parameters that are not in layers of ours: (module, name in it, name in the checkpoint, shape).

        They become plain tensors, in the model's dtype once loaded: MindSpore makes no parameter of bfloat16 beside
        NumPy 2.
        """
        for prefix, cell in model.cells_and_names():
            for name, parameter in list(cell._params.items()):
                if parameter is not None and not name.endswith("inv_freq"):  # computed, and not in checkpoints
                    delattr(cell, name)
                    yield cell, name, f"{prefix}.{name}" if prefix else name, parameter.shape

    def slots(self) -> Iterator[Slot]:
        for cell, attribute, name, shape in self.weights:

            def load(source: np.ndarray, cell: nn.Cell = cell, attribute: str = attribute) -> None:
                cell.__dict__[attribute] = self._tensor(source)

            yield Slot(name, shape, load)

    def _tensor(self, source: np.ndarray) -> Tensor:
        """A copy of `source` in the model's dtype."""
        if self.dtype == ms.bfloat16:
            return Tensor.from_numpy(source.astype(ml_dtypes.bfloat16).view(np.int16)).view(ms.bfloat16)
        return Tensor.from_numpy(source.astype(np.float16 if self.dtype == ms.float16 else np.float32))

    def construct(self, input_ids: Tensor | None, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """Hidden states `[tokens, hidden]`."""
        self.step.batch, self.step.attended = batch, 0
        try:
            result = self.decoder(
                input_ids=None if input_ids is None else input_ids.expand_dims(0),
                inputs_embeds=None if inputs_embeds is None else inputs_embeds.expand_dims(0),
                position_ids=batch.positions.expand_dims(0),
                cache_position=batch.positions,
                use_cache=False,
            )
        finally:
            self.step.batch = None
        if self.step.attended != self.num_layers:
            raise RuntimeError(
                f"{self.step.attended} of {self.num_layers} layers of {type(self.language_model).__name__} of mindone "
                "called the attention that they were given; it cannot be served from mindone."
            )
        return result[0].squeeze(0)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings `[tokens, hidden]`."""
        return self.decoder.get_input_embeddings()(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[rows, vocab]` of hidden states `[rows, hidden]`, by mindone's own code."""
        if 0 in hidden.shape:
            return self.language_model.get_output_embeddings().inner(hidden)
        result = self.language_model(inputs_embeds=hidden.expand_dims(0))
        return result[0].view(hidden.shape[0], -1)
