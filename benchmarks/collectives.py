"""What collectives between ranks of this host take: `python -m benchmarks.collectives [--ranks 2] [--hidden 896]`.

Through shared memory and by gloo, by turns: each round times either for a while, so that whatever else the machine does
meets both. Of each round the median, of the rounds the median, and the lowest.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROUNDS = 7
SECONDS = 0.25  # of either in a round, about


def everyones(value: Any, ranks: int) -> list[Any]:
    import torch.distributed as dist

    values = [None] * ranks
    dist.all_gather_object(values, value)
    return values


def start(store: str, rank: int, ranks: int) -> dict[str, Any]:
    """The group by each of the two ways, once the rank runs on its CPUs."""
    import mindspore as ms
    import torch
    import torch.distributed as dist

    from vllm_ms_models import compat, cores
    from vllm_ms_models.bridge.ranks import TorchGroup
    from vllm_ms_models.distributed.shared_memory import share_memory
    from vllm_ms_models.kernels.cpu import CpuKernels

    cores.bind(rank, ranks)
    torch.set_num_threads(1)
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    compat.absorb_numpy_warning()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    general = TorchGroup(rank, ranks, dist.group.WORLD)
    shared = share_memory(general, "benchmark", CpuKernels().collectives, partial(everyones, ranks=ranks))
    return {"gloo": general, "shared memory": shared}


def median_time(collective: Any, x: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        collective(x)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def compare(groups: dict[str, Any], name: str, x: Any, ranks: int) -> dict[str, list[float]]:
    """Seconds of one call, by way, for each round; rank 0 says how many calls a round has."""
    collectives = {way: getattr(group, name) for way, group in groups.items()}
    repeats = {}
    for way, collective in collectives.items():
        median_time(collective, x, 3)
        repeats[way] = everyones(max(3, min(2000, int(SECONDS / median_time(collective, x, 5)))), ranks)[0]
    found: dict[str, list[float]] = {way: [] for way in groups}
    for _ in range(ROUNDS):
        for way, collective in collectives.items():
            found[way].append(median_time(collective, x, repeats[way]))
    return found


def run(store: str, rank: int, ranks: int, hidden: int, vocabulary: int) -> None:
    groups = start(store, rank, ranks)
    import torch
    import torch.distributed as dist

    from vllm_ms_models.bridge.tensors import to_mindspore

    bf16, f32 = torch.bfloat16, torch.float32
    cases = [("all_reduce", rows, hidden, bf16) for rows in (1, 8, 32, 128, 512)]
    cases += [("all_reduce", 8192, 3584, bf16), ("all_gather", 1, vocabulary // ranks, f32)]
    for name, rows, columns, dtype in cases:
        x = to_mindspore(torch.zeros(rows, columns, dtype=dtype))
        found = compare(groups, name, x, ranks)
        if rank:
            continue
        texts = [
            f"{way} {statistics.median(times) * 1e6:.0f} us (lowest {min(times) * 1e6:.0f})"
            for way, times in found.items()
        ]
        print(f"{ranks} ranks, {name} of {str(dtype)[6:]} [{rows}, {columns}]: {', '.join(texts)}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151936)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=run, args=(store, rank, options.ranks, options.hidden, options.vocabulary))
            for rank in range(options.ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()


if __name__ == "__main__":
    main()
