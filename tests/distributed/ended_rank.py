"""One rank of test_ended_ranks.py, which adds until it cannot.

python -m tests.distributed.ended_rank STORE SIZE RANK
"""

import signal
import time
from types import FrameType

import torch

from tests.distributed import rank_process
from vllm_ms_models.bridge.tensors import to_mindspore


def leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(f"{time.monotonic()} leaves")


def main() -> None:
    group = rank_process.sharing(rank_process.start())
    x = to_mindspore(torch.zeros(500, 400))
    group.barrier()
    signal.signal(signal.SIGTERM, leave)  # as vLLM's workers do
    print("begins", flush=True)
    count = 0
    try:
        while True:
            group.all_reduce(x)
            count += 1
    except RuntimeError as error:
        try:
            group.barrier()
        except RuntimeError as later:
            print(f"{time.monotonic()} {count} {error} | {later}", flush=True)


if __name__ == "__main__":
    main()
