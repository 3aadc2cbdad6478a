"""One rank of test_collectives.py: `collective_rank.py STORE SIZE RANK`.

Each dtype and shape, an empty one too; every rank can work out what all of them have, and so what comes of it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import mindspore as ms
import numpy as np
import torch
import torch.distributed as dist

from vllm_ms_models import compat
from vllm_ms_models.bridge.ranks import TorchGroup
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch

SHAPES = ((6, 40), (3, 1), (0, 40), (300, 37))


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def check(group: TorchGroup, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    everyone = [values(rank, shape, dtype) for rank in range(group.size)]
    mine = everyone[group.rank]

    def result(collective: str, *arguments: int) -> torch.Tensor:
        given = to_mindspore(mine.clone())
        got: torch.Tensor = to_torch(getattr(group, collective)(given, *arguments))
        assert got.dtype == dtype
        return got

    summed = result("all_reduce")
    exact = torch.stack(everyone).double().sum(0)
    # Each of the additions is rounded, at most by half a unit of the sum of magnitudes.
    bound = torch.stack(everyone).double().abs().sum(0) * torch.finfo(dtype).eps / 2 * (group.size - 1)
    assert ((summed.double() - exact).abs() <= bound).all()
    if summed.numel():
        copies = [torch.empty_like(summed) for _ in range(group.size)]
        dist.all_gather(copies, summed.contiguous())
        assert all(torch.equal(copy, summed) for copy in copies), "ranks disagree"
    assert torch.equal(result("all_gather"), torch.cat(everyone, -1))
    assert torch.equal(result("broadcast", 1), everyone[1])
    if shape[0] % group.size == 0:
        rows = shape[0] // group.size
        part = slice(group.rank * rows, (group.rank + 1) * rows)
        assert torch.equal(result("reduce_scatter"), summed[part])
        assert torch.equal(result("all_to_all"), torch.cat([x[part] for x in everyone]))


def main(store: str, size: int, rank: int) -> None:
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    compat.absorb_numpy_warning()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = TorchGroup(rank, size, dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            check(group, shape, dtype)
    strided = to_mindspore(torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))).T
    assert torch.equal(to_torch(group.all_reduce(strided)), size * torch.arange(12.0).reshape(3, 4).T)
    group.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} is done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
