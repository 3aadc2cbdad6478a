"""One rank of test_collectives.py: `python -m tests.distributed.collective_rank STORE SIZE RANK`.

Each dtype and shape, an empty one too; every rank can work out what all of them have, and so what comes of it.
"""

import functools
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.distributed import rank_process
from vllm_ms_models.bridge.ranks import TorchGroup
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.distributed.shared_memory import SharedMemoryGroup
from vllm_ms_models.kernels.cpu import backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64, torch.int8)
# The last one is of several pieces of shared memory, for most dtypes.
SHAPES: tuple[tuple[int, ...], ...] = ((6, 40), (3, 1), (0, 40), (12,), (3, 2, 5), (300, 37), (999, 401))
REPEATS = 1000


@functools.lru_cache(maxsize=64)
def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-100, 100, shape, generator=generator, dtype=dtype)


def check_sum(group: Group, found: torch.Tensor, everyone: Sequence[torch.Tensor]) -> None:
    dtype = found.dtype
    if not dtype.is_floating_point:
        assert torch.equal(found, torch.stack(everyone).sum(0, dtype=dtype))
    elif isinstance(group, SharedMemoryGroup) and dtype != torch.float64:
        total = everyone[0].float()
        for x in everyone[1:]:
            total = total + x.float()
        assert torch.equal(found, total.to(dtype))  # added in float32, in order, rounded once
    else:
        exact = torch.stack(everyone).double().sum(0)
        # Each of the additions is rounded, at most by half a unit of the sum of magnitudes.
        bound = torch.stack(everyone).double().abs().sum(0) * torch.finfo(dtype).eps / 2 * (group.size - 1)
        assert ((found.double() - exact).abs() <= bound).all()


def collect(group: Group, collective: str, mine: torch.Tensor, *arguments: int) -> torch.Tensor:
    found: torch.Tensor = to_torch(getattr(group, collective)(to_mindspore(mine.clone()), *arguments))
    assert found.dtype == mine.dtype
    return found


def check(group: Group, collective: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> None:
    everyone = [values(rank, shape, dtype, seed) for rank in range(group.size)]
    mine = everyone[group.rank]
    rows = shape[0] // group.size
    part = slice(group.rank * rows, (group.rank + 1) * rows)
    if collective == "all_reduce":
        check_sum(group, collect(group, collective, mine), everyone)
    elif collective == "reduce_scatter":
        check_sum(group, collect(group, collective, mine), [x[part] for x in everyone])
    elif collective == "all_gather":
        assert torch.equal(collect(group, collective, mine), torch.cat(everyone, -1))
    elif collective == "all_to_all":
        assert torch.equal(collect(group, collective, mine), torch.cat([x[part] for x in everyone]))
    else:
        source = seed % group.size
        assert torch.equal(collect(group, "broadcast", mine, source), everyone[source])


COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")


def check_ranks_agree(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit."""
    summed = collect(group, "all_reduce", values(group.rank, shape, dtype)).contiguous()
    copies = [torch.empty_like(summed) for _ in range(group.size)]
    dist.all_gather(copies, summed)
    assert all(torch.equal(copy, summed) for copy in copies), "ranks disagree"


def check_all(group: Group) -> None:
    for dtype in (*FLOATS, *INTEGERS, torch.float64):
        for shape in SHAPES:
            for collective in COLLECTIVES:
                check(group, collective, shape, dtype)
        check_ranks_agree(group, SHAPES[-1], dtype)
    strided = to_mindspore(torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))).T
    assert torch.equal(to_torch(group.all_reduce(strided)), group.size * torch.arange(12.0).reshape(3, 4).T)
    group.barrier()


def check_many(group: Group) -> None:
    """One after another, with sizes from a few bytes to several pieces: nothing of one is in the next."""
    chance = random.Random(0)
    for seed in range(REPEATS):
        rows, columns = group.size * int(10 ** chance.uniform(0, 2)), int(10 ** chance.uniform(0, 3))
        check(group, chance.choice(COLLECTIVES), (rows, columns), chance.choice(FLOATS + INTEGERS), seed)
        if chance.random() < 0.1:
            group.barrier()


def check_instruction_sets(general: Group) -> None:
    """Sums of each that this machine runs."""
    for isa in backend.load_module().isas():
        group = rank_process.sharing(general, isa=isa)
        for dtype in FLOATS + INTEGERS:
            check(group, "all_reduce", (300, 37), dtype)


def check_nothing_is_left() -> None:
    """No descriptor of the memory, no mapping, and never a name."""
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not any("vllm_ms_models" in name for name in open_files), open_files
    maps = Path("/proc/self/maps").read_text()
    assert "memfd:vllm_ms_models" not in maps and "/dev/shm/vllm_ms" not in maps


def main() -> None:
    general = rank_process.start()
    check_all(general)
    group = rank_process.sharing(general)
    assert isinstance(group, SharedMemoryGroup)
    assert "memfd:vllm_ms_models (deleted)" in Path("/proc/self/maps").read_text()
    check_all(group)
    check_many(group)
    check_instruction_sets(general)
    del group
    check_nothing_is_left()
    assert isinstance(rank_process.sharing(general, compiled=general.rank != 1), TorchGroup)
    check_nothing_is_left()
    dist.destroy_process_group()
    print(f"rank {general.rank} is done")


if __name__ == "__main__":
    main()
