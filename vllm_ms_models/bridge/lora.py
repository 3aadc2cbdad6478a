"""Adapters (LoRA) in place of vLLM's manager, which replaces torch modules: what the runner asks it for, on our layers.

A loaded adapter is, for each linear layer that it changes, a pair of matrices of its own rank (`Linear.adapters`). The
kernels take any number of adapters in a batch, so there are no slots to copy them to: --max-loras bounds how many
different ones vLLM's scheduler puts into a step, and --max-cpu-loras how many are kept; the least recently used is
dropped for another, and read again when it is asked for.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from vllm_ms_models.bridge.model import CausalLMShell

if TYPE_CHECKING:
    from vllm_ms_models.checkpoint.adapter import Adapter
    from vllm_ms_models.layers.batch import Adaptation
    from vllm_ms_models.layers.linear import Linear
    from vllm_ms_models.layers.low_rank import LowRankWeights

logger = logging.getLogger("vllm.ms_models")

# Modules that adapters are known to change elsewhere, and why not here; by the end of their names.
NOT_ADAPTED = {
    "lm_head": "adapters of the embedding and the head are not supported",
    "embed_tokens": "adapters of the embedding and the head are not supported",
    "kv_b_proj": "latent attention absorbs this matrix into others",
}


def refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """One sentence for each thing about adapters that was asked for and cannot be served."""
    lora = vllm_config.lora_config
    if lora is None:
        return
    if vllm_config.speculative_config is not None:
        yield "--enable-lora is not supported with --speculative-config; leave out one of them."
    if vllm_config.model_config.runner_type == "pooling":
        yield "--enable-lora is not supported yet for models that embed or classify; leave it out."
    unsupported = {
        "--fully-sharded-loras": lora.fully_sharded_loras,
        "--lora-target-modules": lora.target_modules,
        "--default-mm-loras": lora.default_mm_loras,
        "--enable-tower-connector-lora": lora.enable_tower_connector_lora,
        "--specialize-active-lora": lora.specialize_active_lora,
        "--enable-mixed-moe-lora-format": lora.enable_mixed_moe_lora_format,
        "--enable-moe-shared-loras": lora.enable_moe_shared_loras,
        "--max-lora-cls-labels": lora.max_lora_cls_labels is not None,
    }
    for flag, value in unsupported.items():
        if value:
            yield f"{flag} is not supported; leave it out."


class AdapterManager:
    """The adapters of one model: loading, dropping, and which of them the tokens of a step have.

    Its methods are those of vLLM's `LRUCacheWorkerLoRAManager` that runner and worker call.
    """

    def __init__(self, config: LoRAConfig, model: CausalLMShell) -> None:
        from vllm_ms_models.bridge.tensors import DTYPES
        from vllm_ms_models.layers.linear import Linear

        self.config = config
        self.dtype = DTYPES[config.lora_dtype]
        self.linears = [cell for _, cell in model.cell.cells_and_names() if isinstance(cell, Linear)]
        self.names = {part.name for linear in self.linears for part in linear.scheme.parts}
        self.elsewhere = list(getattr(model.cell, "elsewhere", ()))
        self.kept: OrderedDict[int, str] = OrderedDict()  # names by numbers, the least recently used first
        self.pinned: set[int] = set()
        self.active: tuple[tuple[int, ...], np.ndarray] | None = None
        model.adapters = self

    @property
    def most_bytes(self) -> int:
        """Memory for as many adapters as are kept, of the largest rank, on all linear layers."""
        each = sum(
            linear.scheme.in_features * len(linear.scheme.sizes) + sum(linear.scheme.sizes) for linear in self.linears
        )
        itemsize = 4 if self.config.lora_dtype == torch.float32 else 2
        return self.config.max_cpu_loras * self.config.max_lora_rank * each * itemsize

    # --- loading ---------------------------------------------------------------------------------------------------

    def add_adapter(self, request: LoRARequest) -> bool:
        """Loads an adapter, unless it is there; true. ValueError, and nothing is changed, if it cannot be."""
        number = request.lora_int_id
        if number in self.kept and not request.load_inplace:
            self.kept.move_to_end(number)
        elif not self._load(request, needed=set()):
            raise ValueError(
                f"All {len(self.kept)} adapters that --max-cpu-loras allows are pinned; raise it, or unload one."
            )
        return True

    def _load(self, request: LoRARequest, needed: set[int], beyond: bool = False) -> bool:
        """Reads an adapter, in place of another that is neither pinned nor `needed`.

        False, and it is not kept, if there is none, unless it may go `beyond` their number.
        """
        number = request.lora_int_id
        matrices = self._read(request)
        while number not in self.kept and len(self.kept) >= self.config.max_cpu_loras:
            oldest = next((kept for kept in self.kept if kept not in self.pinned | needed), None)
            if oldest is not None:
                self.remove_adapter(oldest)
            elif beyond:
                break
            else:
                return False
        self.remove_adapter(number)
        for linear, weights in matrices:
            linear.adapters[number] = weights.result
        self.kept[number] = request.lora_name
        logger.info("Adapter %s changes %d linear layers.", request.lora_name, len(matrices))
        return True

    def remove_adapter(self, number: int) -> bool:
        """Drops an adapter; false if it is not there."""
        for linear in self.linears:
            linear.adapters.pop(number, None)
        self.pinned.discard(number)
        return self.kept.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        for number in list(self.kept):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Never drop this one for another; true."""
        if number not in self.kept:
            raise ValueError(f"Adapter number {number} is not loaded, so it cannot be pinned; load it first.")
        self.pinned.add(number)
        return True

    def list_adapters(self) -> set[int]:
        return set(self.kept)

    def _read(self, request: LoRARequest) -> "list[tuple[Linear, LowRankWeights]]":
        """An adapter's matrices for each linear of this rank that it changes."""
        from dataclasses import replace

        from vllm.lora.utils import get_adapter_absolute_path

        from vllm_ms_models import checkpoint
        from vllm_ms_models.checkpoint.adapter import open_adapter
        from vllm_ms_models.layers.low_rank import LowRankWeights

        folder = get_adapter_absolute_path(request.lora_path)
        if not os.path.isdir(folder):
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        adapter = open_adapter(Path(folder))
        self._check(adapter)
        matrices = []
        for linear in self.linears:
            parts = linear.scheme.parts
            factors = [adapter.modules.get(part.name) for part in parts]
            if any(factors):
                matrices.append((linear, LowRankWeights(parts, factors, self.dtype)))
        slots = [slot for _, weights in matrices for slot in weights.slots()]
        wanted = {slot.name for slot in slots}
        tensors = {name: tensor for name, tensor in adapter.checkpoint.tensors.items() if name in wanted}
        checkpoint.load(replace(adapter.checkpoint, tensors=tensors), slots, progress=False)
        return matrices

    def _check(self, adapter: "Adapter") -> None:
        """Raises ValueError for an adapter that is not for this model, or larger than it may be."""
        folder = adapter.checkpoint.folder
        if adapter.rank > self.config.max_lora_rank:
            raise ValueError(
                f"Adapter {folder} has rank {adapter.rank}, which is more than --max-lora-rank "
                f"{self.config.max_lora_rank}; raise it."
            )
        shapes = {part.name: part.shape for linear in self.linears for part in linear.scheme.parts}
        for module, factors in adapter.modules.items():
            if module not in shapes:
                if any(fnmatchcase(module, pattern) for pattern in self.elsewhere):
                    continue
                raise ValueError(_not_adapted(folder, module, factors.down))
            outputs, inputs = shapes[module]
            for name, shape in ((factors.down, (factors.rank, inputs)), (factors.up, (outputs, factors.rank))):
                found = adapter.checkpoint.tensors[name].shape
                if found != shape:
                    raise ValueError(
                        f"Tensor {name!r} of adapter {folder} has shape {list(found)} where {list(shape)} is expected; "
                        "the adapter belongs to another model."
                    )

    # --- a step ----------------------------------------------------------------------------------------------------

    def activate(self, requests: Collection[LoRARequest], numbers: np.ndarray, tokens: np.ndarray) -> None:
        """The adapter's number of each request of the step (0: none) and how many tokens it has in it."""
        needed = {request.lora_int_id for request in requests}
        for request in requests:
            if request.lora_int_id not in self.kept:
                # Pinned ones and those of this step may be more than --max-cpu-loras; its requests come first.
                self._load(request, needed, beyond=True)
            self.kept.move_to_end(request.lora_int_id)
        if not numbers.any():
            self.active = None
            return
        distinct, places = np.unique(numbers, return_inverse=True)
        if distinct[0] == 0:
            distinct, places = distinct[1:], places - 1
        self.active = tuple(distinct.tolist()), places.astype(np.int32).repeat(tokens)

    def deactivate(self) -> None:
        """The next step has no adapters."""
        self.active = None

    def adaptation(self, tokens: int) -> "Adaptation | None":
        """What the layers take of `activate`, for a step of so many tokens; those beyond the requests' are padding."""
        from mindspore import Tensor

        from vllm_ms_models.layers.batch import Adaptation

        if self.active is None:
            return None
        numbers, rows = self.active
        if tokens > len(rows):
            rows = np.pad(rows, (0, tokens - len(rows)), constant_values=-1)
        return Adaptation(numbers, Tensor.from_numpy(rows))


def _not_adapted(folder: Path, module: str, tensor: str) -> str:
    leaf = module.rpartition(".")[2]
    if ".experts." in module:
        reason = "adapters of experts are not supported"
    else:
        reason = NOT_ADAPTED.get(leaf, "the model has no linear layer of that name")
    return (
        f"Tensor {tensor!r} of adapter {folder} is for {module}: {reason}; "
        f"use an adapter of this model, trained without {leaf} among its target_modules."
    )
