"""vLLM load formats that fill a shell's Cell: from safetensors, or with random values."""

import logging
import os
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.model_executor.model_loader import BaseModelLoader
from vllm.model_executor.model_loader.weight_utils import (
    download_weights_from_hf,
    maybe_download_from_modelscope,
)

from vllm_ms_models import memory
from vllm_ms_models.bridge.agreement import check_ranks
from vllm_ms_models.bridge.host import host_memory, over_host
from vllm_ms_models.bridge.model import Shell

if TYPE_CHECKING:
    from vllm_ms_models.checkpoint import Checkpoint, Slot

logger = logging.getLogger("vllm.ms_models")

# vLLM's load formats that mean "the safetensors of a Hugging Face folder", and ours.
LOAD_FORMATS = {
    "auto": "mindspore",
    "hf": "mindspore",
    "safetensors": "mindspore",
    "mindspore": "mindspore",
    "dummy": "mindspore_dummy",
    "mindspore_dummy": "mindspore_dummy",
}

# Present in some checkpoints though they are computed, not stored.
COMPUTED = ("*.rotary_emb.inv_freq",)


class SafetensorsLoader(BaseModelLoader):
    """`--load-format mindspore`: reads this rank's slices, straight into the kernels' layout."""

    def _folder(self, model_config: ModelConfig) -> str:
        model = maybe_download_from_modelscope(model_config.model, model_config.revision) or model_config.model
        if os.path.isdir(model):
            return model
        return download_weights_from_hf(
            model,
            self.load_config.download_dir,
            ["*.safetensors", "*.safetensors.index.json"],
            model_config.revision,
            ignore_patterns=self.load_config.ignore_patterns,
        )

    def download_model(self, model_config: ModelConfig) -> None:
        self._folder(model_config)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        from vllm_ms_models import checkpoint

        assert isinstance(model, Shell)
        slots = _fitting_slots(model)
        weights = checkpoint.open_checkpoint(self._folder(model_config))
        check_ranks({"weights": checkpoint.fingerprint(weights)}, "copy the same model to all hosts.")
        weights, ignored = as_wanted(weights, model, model_config, slots)
        progress = self.load_config.use_tqdm_on_load and is_global_first_rank()
        report = checkpoint.load(weights, slots, ignored=ignored, progress=progress)
        model.finish_loading()
        logger.info("Read %d tensors, %.2f GiB, in %.1f s.", report.tensors, report.bytes_read / 2**30, report.seconds)


class DummyLoader(BaseModelLoader):
    """`--load-format dummy`: random weights of the right shapes, the same ones in every run."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to download."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        assert isinstance(model, Shell)
        values = np.random.default_rng(0).uniform(-0.05, 0.05, 1_000_003).astype(np.float32)
        slots = [slot for slot in _fitting_slots(model) if not slot.optional]
        for slot in sorted(slots, key=lambda slot: not slot.early):
            slot.load(_random(slot, values) if slot.example is None else slot.example(slot.part_shape))
        model.finish_loading()


def _random(slot: "Slot", values: np.ndarray) -> np.ndarray:
    """So many of `values`, over and over; a piece of a matrix goes on where the last one ended, so that rows differ."""
    before = (slot.index[0].start or 0) * prod(slot.shape[1:]) if slot.index else 0
    return np.resize(np.roll(values, -before), slot.part_shape)


def as_wanted(
    weights: "Checkpoint", model: Shell, model_config: ModelConfig, slots: Iterable["Slot"]
) -> "tuple[Checkpoint, list[str]]":
    """The checkpoint under the names that `model` has for its tensors, and patterns of those that it may leave out."""
    from vllm_ms_models import checkpoint

    ignored = [*COMPUTED, *getattr(model.cell, "ignored", ()), *getattr(model.cell, "elsewhere", ())]
    if model_config.hf_text_config.tie_word_embeddings:
        ignored.append("lm_head.weight")
    weights = checkpoint.with_wanted_names(weights, (slot.name for slot in slots))
    return model.named(weights), ignored


def weight_bytes(slots: Iterable["Slot"], dtype: torch.dtype) -> int:
    """What the tensors that `slots` load take in a model of that dtype."""
    return sum(prod(slot.part_shape) * (slot.itemsize or dtype.itemsize) for slot in slots)


def _fitting_slots(model: Shell) -> list["Slot"]:
    """The model's slots, if there is memory for what they load (storage is allocated, but not touched before)."""
    slots = list(model.slots())
    needed = weight_bytes(slots, model.dtype)
    # All ranks are asked before any of them takes memory, so that they come to the same answer.
    memory.check_weights(sum(over_host(needed)), _memory_of_all(), len(over_host(1)))
    return slots


def _memory_of_all() -> memory.HostMemory:
    host = host_memory()
    return memory.HostMemory(host.total, min(over_host(host.available)))
