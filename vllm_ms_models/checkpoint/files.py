"""Which files of a model folder hold its weights, none of them outside of the folder."""

import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_ms_models.checkpoint.errors import MOST_NAMES, CheckpointError, enumerate_names, quote
from vllm_ms_models.checkpoint.header import MAX_HEADER_BYTES, strict_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAIN_INDEX = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack")
NOT_THE_MODEL = ("consolidated", "adapter_model")
"""Beginnings of names of files that repeat the weights in another layout, or that belong to an adapter."""

SHARD_NUMBER = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,9})-of-(?P<total>[0-9]{1,9})\.safetensors")


def find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a model, and tensor name -> file name if an index says so.

    An index decides alone; without one, `model*.safetensors` are taken, or else all safetensors files but
    repetitions (`consolidated*`) and adapters. Raises `CheckpointError` if there is none, or if one is missing or
    leads outside of the folder.
    """
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise CheckpointError(f"Model folder {folder} {what}; give the folder that holds config.json and the weights.")
    names = _listing(folder)
    index = _index_name(folder, names)
    weight_map = None
    if index is not None:
        weight_map = _read_weight_map(folder, index)
        shards = sorted(set(weight_map.values()))
    else:
        shards = _without_index(folder, names)
    paths = [inside(folder, name) for name in shards]
    missing = [name for name, path in zip(shards, paths, strict=True) if not os.path.exists(path)]
    if missing:
        others = [name for name in names if name.endswith(SUFFIX) and name not in shards]
        hint = f" (it does hold {enumerate_names(others)}: does the index belong to them?)" if others else ""
        raise CheckpointError(
            f"{len(missing)} of the {len(shards)} weight files of {folder} are missing: {enumerate_names(missing)}"
            f"{hint}; download the model again."
        )
    return paths, weight_map


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, unless that is outside of the folder.

    The target of a symbolic link must be in the folder too, or, in a Hugging Face cache
    (`models--<org>--<name>/snapshots/<revision>`), among the same model's `blobs`: that cache is made of such links. No
    other link is followed, since a folder from elsewhere (an archive, a repository) could lead to any file of the user
    who serves it, and what becomes of its bytes can be asked for. `blobs` must be a folder itself for the same reason.
    """
    parts = name.split("/")
    if not name or "\0" in name or ".." in parts or os.path.isabs(name):
        raise CheckpointError(
            f"{folder} names the weight file {quote(name)}, which is not a path inside of the folder; refusing to "
            "follow it: correct the index."
        )
    path = folder / name
    try:
        target = Path(os.path.realpath(path))
        root = Path(os.path.realpath(folder))
        allowed = [root]
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            allowed.append(root.parent.parent / "blobs")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{quote(str(path))} cannot be looked up ({error}); correct the name.") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a symbolic link to {target}, outside of the model folder; refusing to follow it: put the file "
            "itself into the folder, or link the whole folder."
        )
    return path


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of a model folder, which is no larger than a header may be. Raises CheckpointError."""
    path = inside(folder, name)
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES or not path.is_file():
            raise CheckpointError(
                f"{path} is not a file of JSON: {size} bytes found, a regular file of at most {MAX_HEADER_BYTES} "
                "expected; download it again."
            )
        return strict_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check its permissions or download it again."
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"Model folder {folder} cannot be read ({error.strerror}); check its permissions."
        ) from error


def _index_name(folder: Path, names: list[str]) -> str | None:
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX) and not name.startswith(NOT_THE_MODEL)]
    if MAIN_INDEX in indexes:
        return MAIN_INDEX
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder} has {len(indexes)} index files and none is {MAIN_INDEX}: {enumerate_names(indexes)}; "
            "keep the one that belongs to the weights."
        )
    return indexes[0] if indexes else None


def _read_weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor name -> file name out of an index file; the file names are not yet checked."""
    path = folder / index
    content = read_json(folder, index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; download it again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(SUFFIX):
            raise CheckpointError(
                f"{path} maps tensor {quote(tensor)} to {quote(name)}, where the name of a {SUFFIX} file is expected; "
                "download the index again, or convert the weights to safetensors."
            )
    return weight_map


def _without_index(folder: Path, names: list[str]) -> list[str]:
    """The file names of the model when only the listing tells."""
    found = [name for name in names if name.endswith(SUFFIX)]
    chosen = (
        [name for name in found if name == "model.safetensors"]
        or [name for name in found if name.startswith("model")]
        or [name for name in found if not name.startswith(NOT_THE_MODEL)]
        or [name for name in found if name.startswith("consolidated")]
    )
    if not chosen:
        others = [name for name in names if name.endswith(OTHER_FORMATS)]
        if others:
            raise CheckpointError(
                f"{folder} has its weights only in formats that are not loaded ({enumerate_names(others)}; pickle "
                "files can run any code when opened): convert them to safetensors, for example with transformers' "
                "save_pretrained, or choose a revision that has safetensors."
            )
        raise CheckpointError(
            f"{folder} has no weights: {MAIN_INDEX}, model.safetensors or other *{SUFFIX} files are expected; download "
            "the model again or correct the path."
        )
    _check_shard_numbers(folder, chosen)
    return chosen


def _check_shard_numbers(folder: Path, names: list[str]) -> None:
    """Raises if files named `<stem>-00001-of-00004.safetensors` are not all there."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := SHARD_NUMBER.fullmatch(name):
            numbers.setdefault((match["stem"], int(match["total"])), set()).add(int(match["number"]))
    for (stem, total), present in numbers.items():
        first = 0 if 0 in present else 1
        expected = range(first, first + total)
        count = total - sum(number in expected for number in present)
        if count > 0:
            missing = islice((str(number) for number in expected if number not in present), MOST_NAMES)
            raise CheckpointError(
                f"{folder} lacks {count} of the {total} shards {stem}-*-of-*{SUFFIX}: number {', '.join(missing)}"
                f"{', ...' if count > MOST_NAMES else ''}; download the model again."
            )
