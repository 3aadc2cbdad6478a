"""A model's tensors by name, dtype and shape, without downloading weights."""

import os
from pathlib import Path

from vllm.config import LoadConfig, ModelConfig

from vllm_ms_models.checkpoint import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from vllm_ms_models.checkpoint.errors import quote


def open_headers(model: ModelConfig, load: LoadConfig) -> Checkpoint:
    """Of a folder, of what the Hub's cache has already, or of the Hub, which is asked for the headers only.

    Raises CheckpointError.
    """
    if os.path.isdir(model.model):
        return open_checkpoint(model.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
        )
        if any(Path(folder).glob("*.safetensors")):
            return open_checkpoint(folder)
    except LocalEntryNotFoundError:
        pass
    return _from_hub(model.model, model.revision)


def _from_hub(name: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(name, revision=revision)
    except Exception as error:  # of a dozen classes: network, access, no safetensors
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"The headers of the weights of {quote(name)} could not be read ({reason[0] if reason else error!r}); "
            "check the name, or download the model and give its folder."
        ) from error
    tensors = {
        tensor: TensorInfo(
            tensor,
            info.dtype,
            tuple(info.shape),
            Path(file),
            info.data_offsets[0],
            info.data_offsets[1] - info.data_offsets[0],
        )
        for file, content in metadata.files_metadata.items()
        for tensor, info in content.tensors.items()
    }
    return Checkpoint(Path(name), tuple(map(Path, metadata.files_metadata)), tensors)
