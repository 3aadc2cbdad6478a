"""A model folder's tensors: `open_checkpoint` checks every file and reads no weights."""

import os
from dataclasses import dataclass
from pathlib import Path

from vllm_ms_models.checkpoint.errors import CheckpointError, enumerate_names, quote
from vllm_ms_models.checkpoint.files import find_files
from vllm_ms_models.checkpoint.header import TensorInfo, read_header


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder: its weight files and its tensors by name, in file and offset order."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """The size of all tensors on disk, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Finds and validates the safetensors files of a model folder. Raises `CheckpointError`."""
    folder = Path(folder)
    files, weight_map = find_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for tensor in sorted(read_header(path).values(), key=lambda tensor: tensor.offset):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"Tensor {quote(tensor.name)} is in both {tensors[tensor.name].path} and {path}; remove the file "
                    "that does not belong to the model."
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    return Checkpoint(folder, tuple(files), tensors)


def list_tensors(folder: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Every tensor of a model folder: name -> dtype, shape, file. Raises `CheckpointError`."""
    return open_checkpoint(folder).tensors


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Raises unless each tensor of the index is in the file that the index names."""
    absent = [name for name, file in weight_map.items() if name not in tensors or tensors[name].path != folder / file]
    if not absent:
        return
    name = absent[0]
    elsewhere = f" (it is in {tensors[name].path.name})" if name in tensors else ""
    more = f"; the same holds for {enumerate_names(absent[1:])}" if len(absent) > 1 else ""
    raise CheckpointError(
        f"The index of {folder} says that tensor {quote(name)} is in {quote(weight_map[name])}, which does not have it"
        f"{elsewhere}{more}; download the index and the weights again."
    )
