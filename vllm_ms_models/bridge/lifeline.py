"""Ranks on other hosts end with rank 0, whose host has the server: vLLM sees only its own host's processes end."""

import logging
import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from vllm.config import ParallelConfig

from vllm_ms_models import faults

logger = logging.getLogger("vllm.ms_models")

_INTERVAL = 1.0  # seconds between looks at rank 0
_GRACE = 3.0  # seconds in which this process ends by itself when the whole server stops


def end_with_first_rank(parallel: ParallelConfig) -> None:
    """In a rank that may be on another host than rank 0: end soon after it. All ranks call this; no MindSpore here.

    Rank 0's process keeps the store by which torch's process groups find each other: when that cannot be reached any
    more, it has ended. A host that falls silent (no power, no network) is noticed by the next exchange of tensors.
    """
    several_hosts_possible = parallel.nnodes > 1 or parallel.data_parallel_size > 1
    if several_hosts_possible and dist.is_initialized() and dist.get_rank() > 0:
        threading.Thread(target=_end_after, args=(_get_default_store(),), name="EndWithRank0", daemon=True).start()


def _end_after(store: dist.Store) -> None:
    try:
        while True:
            store.check(["of no meaning"])
            time.sleep(_INTERVAL)
    except RuntimeError:  # DistNetworkError: the connection is gone
        time.sleep(_GRACE)
    logger.error("Rank 0 has ended without stopping this rank, %d, which ends too.", dist.get_rank())
    faults.end_process()
