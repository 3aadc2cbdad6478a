"""Adapters (LoRA, arXiv:2106.09685) as PEFT saves them: a folder of adapter_config.json and adapter_model.safetensors.

The config says how the matrices of a module are scaled: by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
`use_rslora` (arXiv:2312.03732), where `rank_pattern` and `alpha_pattern` may have other values for some modules. Which
modules are adapted is told by the tensors, `base_model.model.<module>.lora_A.weight` `[r, in]` and `lora_B` `[out, r]`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.checkpoint.files import inside
from vllm_ms_models.checkpoint.header import TensorInfo, read_header, strict_json
from vllm_ms_models.checkpoint.index import Checkpoint
from vllm_ms_models.checkpoint.slots import FLOATS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")

# Entries that make an adapter more than two matrices for each module, and what they ask for.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "modules of its own in place of the model's",
    "trainable_token_indices": "embeddings of its own",
    "target_parameters": "parameters outside of linear layers, such as fused experts",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "arrow_config": "a router among adapters (Arrow)",
    "fan_in_fan_out": "transposed weights",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal matrices",
    "use_qalora": "QALoRA",
}

# Ways to start training that leave the model's own weights alone; others have changed them.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga", "mica")


@dataclass(frozen=True)
class Factors:
    """An adapter's two matrices for one module: their tensors' names, their rank, their product's scale."""

    down: str  # [rank, in]
    up: str  # [out, rank]
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: its file and its tensors, and the factors of each module by the module's name in the model."""

    checkpoint: Checkpoint
    modules: dict[str, Factors]

    @property
    def rank(self) -> int:
        """The largest of all modules."""
        return max(factors.rank for factors in self.modules.values())


def open_adapter(folder: Path) -> Adapter:
    """Checks an adapter's config and the header of its weights. Raises `CheckpointError`."""
    config = _read_config(folder)
    path = inside(folder, WEIGHTS)
    if not path.exists():
        raise CheckpointError(
            f"Adapter {folder} has no {WEIGHTS}; save it with PEFT's save_pretrained, which writes one (pickle "
            "files can run any code when opened, and are not read)."
        )
    tensors = read_header(path)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors.values():
        match = TENSOR.fullmatch(tensor.name)
        if match is None or tensor.dtype not in FLOATS:
            what = f"of dtype {tensor.dtype}" if match else "which is no lora_A or lora_B of a linear layer"
            raise CheckpointError(
                f"Tensor {quote(tensor.name)} of adapter {folder}, {what}, is not supported; train the adapter on "
                "linear layers only, and save it in a float dtype."
            )
        pairs.setdefault(match["module"], {})[match["matrix"]] = tensor
    if not pairs:
        raise CheckpointError(f"Adapter {folder} has no tensors; save it again.")
    modules = {module: _factors(folder, module, pair, config) for module, pair in pairs.items()}
    return Adapter(Checkpoint(folder, (path,), tensors), modules)


def _read_config(folder: Path) -> dict[str, Any]:
    path = inside(folder, CONFIG)
    try:
        config = strict_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give the folder of an adapter that PEFT has saved."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} has peft_type {quote(kind)}; only LORA adapters are supported.")
    for name, what in UNSUPPORTED.items():
        if config.get(name):
            raise CheckpointError(
                f"{path} asks for {what} ({name}), which is not supported; train the adapter without {name}."
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path} asks for bias {quote(config['bias'])}, which is not supported; use none.")
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise CheckpointError(
            f"{path} has init_lora_weights {quote(start)}, with which PEFT changes the model's own weights; convert "
            "the adapter to a plain one (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name)):
            raise CheckpointError(f"{path} has {name} {quote(config.get(name))} where a number above 0 is expected.")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(_is_positive(value) for value in pattern.values()):
            raise CheckpointError(f"{path} has a {name} that does not map modules to numbers above 0.")
    return config


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _factors(folder: Path, module: str, pair: Mapping[str, TensorInfo], config: dict[str, Any]) -> Factors:
    if len(pair) < 2:
        (present,) = pair.values()
        missing = {"A": "lora_B", "B": "lora_A"}[next(iter(pair))]
        raise CheckpointError(f"Adapter {folder} has {quote(present.name)}, but no {missing} for it; save it again.")
    down, up = pair["A"], pair["B"]
    rank = _of_module(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _of_module(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    for tensor, axis in ((down, 0), (up, 1)):
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            shape = f"[{rank}, ...]" if axis == 0 else f"[..., {rank}]"
            raise CheckpointError(
                f"Tensor {quote(tensor.name)} of adapter {folder} has shape {list(tensor.shape)} where {shape} is "
                f"expected, since {CONFIG} says that its rank is {rank}; save the adapter again."
            )
    return Factors(down.name, up.name, rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_module(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the name's end after a dot, or all of it."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return default
