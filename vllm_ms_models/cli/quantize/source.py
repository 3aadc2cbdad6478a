"""The model that is quantized: its configuration, its tensors row by row, and the files that are kept."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ms_models.checkpoint import FLOATS, Checkpoint, CheckpointError, open_checkpoint
from vllm_ms_models.checkpoint.errors import quote
from vllm_ms_models.checkpoint.files import inside, read_json
from vllm_ms_models.checkpoint.header import DTYPES
from vllm_ms_models.checkpoint.reading import Reader, aligned_buffer, make_region
from vllm_ms_models.quantization.formats import DESCRIPTIONS

KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken", "")
"""Of files that go along: tokenizer, chat template, generation defaults, the model's own code, licence."""
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "*.tiktoken", "LICENSE*"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PIECE = 1 << 20
"""Values that are worked on at once: what is made of them stays in the CPU's caches."""


@dataclass(frozen=True)
class Source:
    """A model in floats. `config` is config.json; `dtype` safetensors' name of the dtype that it is served in."""

    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    dtype: str

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding's matrix."""
        return bool(self.hf_config().tie_word_embeddings)

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(f'{self.folder / "config.json"} names no architecture; add "architectures".')
        return names[0]

    def hf_config(self) -> Any:
        """transformers' object of the configuration, a new one each time."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder).get_text_config()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some rows of it, in the dtype it is stored in."""
        tensor = self.checkpoint.tensors[name]
        region = make_region(tensor, () if rows is None else (rows,))
        with Reader(tensor.path) as reader:
            return reader.read(region, aligned_buffer(region.nbytes))

    def pieces(self, name: str) -> Iterator[slice]:
        """Rows of a tensor in pieces of about PIECE values."""
        shape = self.checkpoint.tensors[name].shape
        if not shape:
            return
        step = max(1, PIECE // max(prod(shape[1:]), 1))
        for first in range(0, shape[0], step):
            yield slice(first, min(first + step, shape[0]))

    def kept_files(self) -> list[Path]:
        """What goes along unchanged. Raises CheckpointError for a link out of the folder."""
        found = [path for path in sorted(self.folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        names = [path.name for path in found if path.suffix.lower() in KEPT_SUFFIXES and _is_kept(path.name)]
        return [inside(self.folder, name) for name in names]  # a link must not bring in a file of the user's


def _is_kept(name: str) -> bool:
    return name != "config.json" and not name.endswith(".index.json") and not name.startswith("quantization_report.")


def open_source(model: str, remedy: str = "quantize the model in floats that it was made from") -> Source:
    """Opens a folder, or downloads a Hugging Face repository. Raises CheckpointError.

    Quantized models are refused too, with `remedy`.
    """
    folder = Path(model) if os.path.exists(model) else _download(model)
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path} cannot be read (No such file or directory); give the folder of a model.")
    config = read_json(folder, path.name)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a dictionary of settings; download it again.")
    checkpoint = open_checkpoint(folder)
    _require_floats(folder, config, checkpoint, remedy)
    name = config.get("dtype") or config.get("torch_dtype")
    stored = next((tensor.dtype for tensor in checkpoint.tensors.values() if tensor.name.endswith(".weight")), "F32")
    source = Source(folder, config, checkpoint, DTYPE_NAMES.get(str(name).removeprefix("torch."), stored))
    source.kept_files()  # what is wrong with them is said now, not after hours
    return source


def _download(model: str) -> Path:
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"Model folder {model} does not exist; give a folder or the id of a Hugging Face model.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED, ignore_patterns=["*/*"]))
    except Exception as error:  # of a dozen classes: network, access, no such repository
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{quote(model)} is no folder here and could not be downloaded ({reason[0] if reason else error!r}); check "
            "the name."
        ) from error


def _require_floats(folder: Path, config: dict[str, Any], checkpoint: Checkpoint, remedy: str) -> None:
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            raise CheckpointError(f"{folder} is quantized already: its config.json has {name}; {remedy}.")
    for name in DESCRIPTIONS:
        if (folder / name).exists():
            raise CheckpointError(f"{folder} is quantized already: it has {name}; {remedy}.")
    for tensor in checkpoint.tensors.values():
        if tensor.dtype not in DTYPES or (tensor.dtype not in FLOATS and tensor.name.endswith(".weight")):
            raise CheckpointError(
                f"{folder} is not in floats: its tensor {quote(tensor.name)} is {tensor.dtype}, where "
                f"{', '.join(FLOATS)} are expected; {remedy}."
            )
