"""The torch-facing shell round a Cell: what vLLM's registry, loader and runner see of a model.

vLLM inspects the class in processes that run no model, so MindSpore is imported only when one is built.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from vllm_ms_models import registry, suites

if TYPE_CHECKING:
    from vllm_ms_models.bridge.lora import AdapterManager
    from vllm_ms_models.checkpoint.index import Checkpoint
    from vllm_ms_models.checkpoint.slots import Slot
    from vllm_ms_models.layers.context import ModelContext

logger = logging.getLogger("vllm.ms_models")

# vLLM's names of what a stage of a pipeline hands to the next, `[tokens, hidden]` each.
STREAM = ("hidden_states", "residual")


class Shell(torch.nn.Module):
    """What vLLM's loader sees of a model: a Cell, and maybe a head that classifies, `score`."""

    architecture: ClassVar[str]
    dtype: torch.dtype
    cell: Any
    score: Any

    def slots(self) -> Iterator["Slot"]:
        """Every checkpoint tensor that the model reads."""
        for cell in self._cells():
            if hasattr(cell, "slots"):
                yield from cell.slots()

    def finish_loading(self) -> None:
        """Let each linear's scheme do what it does once, after all weights have arrived."""
        from vllm_ms_models.bridge.settle import settle

        for cell in self._cells():
            if hasattr(cell, "finish_loading"):
                cell.finish_loading()
        settle(self)

    def _cells(self) -> Iterator[Any]:
        """Everything that may have weights."""
        yield from (cell for _, cell in self.cell.cells_and_names())
        if self.score is not None:
            yield self.score

    def named(self, weights: "Checkpoint") -> "Checkpoint":
        """`weights` under the names that the slots have."""
        raise NotImplementedError

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        from vllm_ms_models.bridge.tensors import download, upload

        return download(self.cell.embed(upload(input_ids)))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        raise NotImplementedError("Weights are read by the load formats mindspore and mindspore_dummy only.")


class CausalLMShell(Shell):
    """A text-generation model to vLLM; all work is done by the Cell registered for `architecture`, or by a suite's.

    With `--runner pooling` it embeds or classifies instead (bridge/pooling.py): then it has a `pooler` and no head.

    A Cell offers `construct(input_ids, batch, inputs_embeds=None)` -> hidden states `[tokens, hidden]`,
    `embed(input_ids)` and `logits(hidden)` -> float32 `[rows, vocab]`; its parts offer `slots()`. It may name in
    `ignored` (patterns) the checkpoint's tensors that this model does not need. One that can be split over the stages
    of a pipeline names in `elsewhere` those that other stages read, and takes and gives a `Stream` (layers/decoder.py).
    """

    supports_pp: ClassVar[Literal[True]] = True  # vLLM asks before a Cell can be looked at

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """`prefix` goes before the names that vLLM knows the attention layers by (a draft model has one)."""
        super().__init__()
        from vllm_ms_models.bridge.attention_backend import attend_both_ways, cached_layer
        from vllm_ms_models.bridge.context import model_context
        from vllm_ms_models.bridge.tensors import Staging

        model_config = self.model_config(vllm_config)
        make_cell = self.maker(vllm_config)
        self.hidden_size = model_config.get_hidden_size()
        self.dtype = model_config.dtype
        self.staging = Staging(self.hidden_size, self.dtype)
        context = model_context(vllm_config, model_config, getattr(make_cell, "renamed", ()))
        self.stage = context.pipeline
        self.received = [Staging(self.hidden_size, self.dtype) for _ in STREAM]
        self.cell: Any = make_cell(self.cell_config(model_config), context)
        if self.stage.size > 1 and not hasattr(self.cell, "elsewhere"):
            raise ValueError(
                f"{self.architecture} cannot be split over the stages of a pipeline; "
                "leave out --pipeline-parallel-size, or use --tensor-parallel-size."
            )
        self.cell.set_train(False)
        self.score = None
        self.pools = model_config.runner_type == "pooling"
        self.drafted = vllm_config.speculative_config is not None
        self.takes_embeds = vllm_config.model_config.supports_multimodal_inputs  # or no image is allowed
        if self.pools:
            from vllm_ms_models.bridge.pooling import make_pooler

            self.pooler, self.score = make_pooler(model_config)
        self.adapters: AdapterManager | None = None  # the runner sets it with --enable-lora
        # vLLM's proposer hands `model.embed_tokens` and `lm_head` to a draft that has none of its own.
        self.model: Any = getattr(self.cell, "model", None)
        self.lm_head: Any = getattr(self.cell, "lm_head", None)
        self.run = self._runs()
        layers = vllm_config.compilation_config.static_forward_context
        if self.pools and model_config.attn_type == "encoder_only":
            attend_both_ways(self.cell, self.architecture)
        for _, cell in self.cell.cells_and_names():
            if (layer := cached_layer(cell, self.dtype)) is not None:
                if prefix:
                    cell.name = f"{prefix}.{cell.name}"
                layers[cell.name] = layer

    def maker(self, vllm_config: VllmConfig) -> Callable[[Any, "ModelContext"], Any]:
        """Makes the Cell of this architecture: the class registered for it, or a suite's adapter if one was chosen."""
        source = suites.source(vllm_config)
        if source == suites.NATIVE:
            return registry.lookup(self.architecture)
        suites.adapter(source).check()
        logger.info("%s comes from %s.", self.architecture, source)
        return partial(suites.adapter(source).build, self.architecture)

    @staticmethod
    def model_config(vllm_config: VllmConfig) -> ModelConfig:
        """The configuration of this model within vLLM's."""
        return vllm_config.model_config

    @staticmethod
    def cell_config(model_config: ModelConfig) -> Any:
        """transformers' configuration that the Cell is made from."""
        return model_config.hf_text_config

    def named(self, weights: "Checkpoint") -> "Checkpoint":
        from vllm_ms_models import checkpoint

        weights = checkpoint.renamed(weights, getattr(self.cell, "renamed", ()))
        return checkpoint.of_whole_model(weights) if self.pools else weights

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states `[tokens, hidden]`; or, for the next stage of a pipeline, these and the residual.

        Zeros in runs without a cache to attend to, when this rank is idle.
        """
        from vllm_ms_models.bridge.tensors import download, to_mindspore, upload
        from vllm_ms_models.layers.batch import Batch

        caches = get_forward_context().attn_metadata
        if caches is None:
            self._idle(positions.shape[-1])
            zeros = self.make_empty_intermediate_tensors(positions.shape[-1], self.dtype, positions.device)
            return zeros[STREAM[0]] if self.stage.is_last else zeros
        adaptation = None if self.adapters is None else self.adapters.adaptation(positions.shape[-1])
        # Those of sections are made into angles on the host.
        places = upload(positions) if positions.ndim == 1 else to_mindspore(positions)
        batch = Batch(places, caches, adaptation)
        if not self.stage.is_first:
            assert intermediate_tensors is not None
            sent = (intermediate_tensors[name] for name in STREAM)
            stream = tuple(way.upload(tensor) for way, tensor in zip(self.received, sent, strict=True))
            result = self.run(None, batch, None, stream)
        else:
            ids = upload(input_ids) if inputs_embeds is None else None
            embeds = None if inputs_embeds is None else self.received[0].upload(inputs_embeds)
            result = self.run(ids, batch, embeds)
        if self.stage.is_last:
            return self._hidden_states(result)
        return IntermediateTensors(dict(zip(STREAM, map(download, result), strict=True)))

    def _runs(self) -> Callable[..., Any]:
        """The Cell; or graphs of it, of its language model if it has encoders, if the kernels are to be compiled."""
        from vllm_ms_models import kernels

        if not kernels.get().compiled:
            return self.cell
        from vllm_ms_models.bridge.graph import GraphedCell, Takes
        from vllm_ms_models.bridge.tensors import DTYPES

        decoder = getattr(self.cell, "language_model", self.cell)
        takes: Takes = "embeds" if self.takes_embeds else "ids"
        takes = takes if self.stage.is_first else "stream"
        return GraphedCell(decoder, kernels.get(), DTYPES[self.dtype], takes, self.hidden_size)

    def _hidden_states(self, result: Any) -> Any:
        """For vLLM, which pools them, drafts by them, or takes rows for `compute_logits` and nothing else."""
        from vllm_ms_models import kernels
        from vllm_ms_models.bridge.on_device import RowsOnDevice
        from vllm_ms_models.bridge.tensors import download

        stays = kernels.get().own_memory and not self.pools and not self.drafted
        return RowsOnDevice(result) if stays else download(result)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a stage takes in vLLM's dummy runs: zeros for `batch_size` tokens."""
        return IntermediateTensors({name: torch.zeros(batch_size, self.hidden_size, dtype=dtype) for name in STREAM})

    def _idle(self, tokens: int) -> None:
        """Serve other data-parallel ranks."""
        for _, cell in self.cell.cells_and_names():
            if hasattr(cell, "idle"):
                cell.idle(tokens)

    def compute_logits(self, hidden_states: Any) -> Any:
        from vllm_ms_models import kernels
        from vllm_ms_models.bridge.on_device import OnDevice
        from vllm_ms_models.bridge.tensors import to_torch

        if isinstance(hidden_states, OnDevice):
            return OnDevice(self.cell.logits(hidden_states.tensor))
        logits = self.cell.logits(self.staging.upload(hidden_states))
        return OnDevice(logits) if kernels.get().own_memory else to_torch(logits)


def shell(architecture: str) -> type[CausalLMShell]:
    """The class that vLLM knows `architecture` by."""
    return type(architecture, (CausalLMShell,), {"architecture": architecture, "__module__": __name__})
