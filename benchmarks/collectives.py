"""What an all-reduce between the ranks of this host takes: `python -m benchmarks.collectives [--ranks 2]`."""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

REPEATS = 200


def run(store: str, rank: int, ranks: int, hidden: int) -> None:
    import mindspore as ms
    import torch
    import torch.distributed as dist

    from vllm_ms_models import compat, cores
    from vllm_ms_models.bridge.ranks import TorchGroup
    from vllm_ms_models.bridge.tensors import to_mindspore

    cores.bind(rank, ranks)
    torch.set_num_threads(1)
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    compat.absorb_numpy_warning()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = TorchGroup(rank, ranks, dist.group.WORLD)
    for rows in (1, 8, 512):
        x = to_mindspore(torch.zeros(rows, hidden, dtype=torch.bfloat16))
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            group.all_reduce(x)
            times.append(time.perf_counter() - begin)
        if rank == 0:
            print(f"{ranks} ranks, bfloat16 [{rows}, {hidden}]: {statistics.median(times) * 1e6:.0f} us (median)")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=896)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=run, args=(store, rank, options.ranks, options.hidden))
            for rank in range(options.ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()


if __name__ == "__main__":
    main()
