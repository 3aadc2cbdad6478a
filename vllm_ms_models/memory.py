"""How much memory the KV cache gets on a CPU host, where the operating system and others need some too."""

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

GIB = 2**30

# vLLM's own default of --gpu-memory-utilization: the user said nothing.
DEFAULT_UTILIZATION = 0.92
# What the cache takes then, unless one sequence needs more.
DEFAULT_CACHE = 4 * GIB
# Left for activations and the sampler.
RESERVE = 1 * GIB
# On a device, where a model reads images. Of 65536 patches (16384 embeddings) in 16 bits, a layer of Qwen2.5-VL's tower
# has 0.9 GB of gate and up (6840 features of each) and 0.5 GB of queries, keys and values (3840), some of it twice.
ENCODER_RESERVE = 4 * GIB

_HUGE_PAGE = 2 << 20


class InsufficientMemoryError(ValueError):
    """The model or its cache does not fit; the message has the numbers."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of this host (or container)."""

    total: int
    available: int


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def space_from_environment() -> int | None:
    """`VLLM_CPU_KVCACHE_SPACE` (GiB) in bytes, or None; ValueError unless it is a number above 0."""
    text = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if not text:
        return None
    try:
        size = int(float(text) * GIB)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"VLLM_CPU_KVCACHE_SPACE={text} is not a number of GiB above 0; correct or unset it.")
    return size


def check_weights(needed: int, host: HostMemory, ranks: int = 1) -> None:
    """InsufficientMemoryError unless `needed` bytes, for all ranks of the host, fit beside each rank's reserve."""
    if needed + ranks * RESERVE > host.available:
        raise InsufficientMemoryError(
            f"The model's weights need {gib(needed)} and {gib(ranks * RESERVE)} for working space, but only "
            f"{gib(host.available)} of this host's {gib(host.total)} memory is available; free memory, "
            f"or serve a smaller or quantized model."
        )


def cache_size(
    host: HostMemory,
    utilization: float,
    resident: int,
    one_sequence: int,
    most: int,
    requested: int | None,
    ranks: int = 1,
) -> int:
    """Bytes for the KV cache of one of `ranks` ranks on the host, each of which may take as much of it as the others.

    `resident` is what this process holds already, `one_sequence` the cache of one sequence of maximal length, `most`
    that of as many such sequences as can run at once. `requested` (--kv-cache-memory-bytes) wins; otherwise it is
    `utilization` of the host's memory less `resident`; at the default utilization DEFAULT_CACHE or one sequence.
    InsufficientMemoryError if that does not fit, or cannot hold one sequence.
    """
    free = host.available // ranks - RESERVE
    each = "" if ranks == 1 else f" to each of {ranks} ranks"
    if requested is not None:
        if requested > free:
            raise InsufficientMemoryError(
                f"--kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE) asks for {gib(requested)}, but only "
                f"{gib(max(free, 0))} of this host's {gib(host.total)} memory is available{each}; "
                f"ask for less or free memory."
            )
        return requested
    size = min(int(utilization * host.total / ranks) - resident, free, most)
    if utilization == DEFAULT_UTILIZATION:
        size = min(size, max(DEFAULT_CACHE // ranks, one_sequence))
    if size < one_sequence:
        raise InsufficientMemoryError(
            f"The KV cache of one sequence of --max-model-len tokens needs {gib(one_sequence)}, but only "
            f"{gib(max(size, 0))} is left for it{each} ({gib(host.available)} of {gib(host.total)} available, "
            f"--gpu-memory-utilization {utilization}); lower --max-model-len or free memory."
        )
    return size


def device_cache_size(
    device: HostMemory, utilization: float, one_sequence: int, requested: int | None, reserve: int = RESERVE
) -> int:
    """Bytes for the KV cache on an accelerator, of which `device` says what it has and what is left beside the weights.

    `requested` (--kv-cache-memory-bytes) wins; otherwise what `utilization` of the memory leaves, less `reserve`.
    InsufficientMemoryError if that does not fit, or cannot hold `one_sequence`, the cache of one of maximal length.
    """
    if requested is not None:
        size = requested
    else:
        size = int(utilization * device.total) - (device.total - device.available) - reserve
    if size > device.available:
        raise InsufficientMemoryError(
            f"--kv-cache-memory-bytes asks for {gib(size)}, but only {gib(device.available)} of the device's "
            f"{gib(device.total)} is available; ask for less."
        )
    if size < one_sequence:
        raise InsufficientMemoryError(
            f"The KV cache of one sequence of --max-model-len tokens needs {gib(one_sequence)}, but only "
            f"{gib(max(size, 0))} of the device's {gib(device.total)} is left for it (--gpu-memory-utilization "
            f"{utilization}); lower --max-model-len, or use more devices."
        )
    return size


def fresh(size: int) -> memoryview:
    """`size` writable bytes, zero, straight from the system: none is resident before it is first touched.

    They come in huge pages where the system has them: blocks of a KV cache are scattered, and with pages of 4 KB each
    needs new entries of the TLB (decode attention was measured to be a tenth to a third slower).
    """
    region = mmap.mmap(-1, size + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not every system has such pages
        region.madvise(mmap.MADV_HUGEPAGE)
    begin = -np.frombuffer(region, np.uint8).ctypes.data % _HUGE_PAGE
    return memoryview(region)[begin : begin + size]
