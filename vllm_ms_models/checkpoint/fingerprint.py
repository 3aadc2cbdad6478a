"""Whether two folders hold the same weights, from some thousands of bytes."""

import hashlib

from vllm_ms_models.checkpoint.index import Checkpoint

SAMPLED_TENSORS = 1000
SAMPLE_BYTES = 256


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hexadecimal digest of all names, dtypes and shapes, and of bytes from the middle of up to SAMPLED_TENSORS.

    How the tensors are spread over files does not count.
    """
    tensors = sorted(checkpoint.tensors.items())
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for name, tensor in tensors[:: -(-len(tensors) // SAMPLED_TENSORS)]:
        with checkpoint.tensors[name].path.open("rb") as file:
            file.seek(tensor.offset + tensor.nbytes // 2)
            digest.update(file.read(min(SAMPLE_BYTES, tensor.nbytes - tensor.nbytes // 2)))
    return digest.hexdigest()
