"""Model folders on disk: finding and checking their weights, and streaming them into a model's slots."""

from vllm_ms_models.checkpoint.errors import CheckpointError
from vllm_ms_models.checkpoint.fingerprint import fingerprint
from vllm_ms_models.checkpoint.header import TensorInfo
from vllm_ms_models.checkpoint.index import Checkpoint, list_tensors, open_checkpoint
from vllm_ms_models.checkpoint.loader import LoadReport, check, load
from vllm_ms_models.checkpoint.names import of_encoder, of_whole_model, renamed, with_wanted_names
from vllm_ms_models.checkpoint.slots import FLOATS, Slot

__all__ = [
    "FLOATS",
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "Slot",
    "TensorInfo",
    "check",
    "fingerprint",
    "list_tensors",
    "load",
    "of_encoder",
    "of_whole_model",
    "open_checkpoint",
    "renamed",
    "with_wanted_names",
]
