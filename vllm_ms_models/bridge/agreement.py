"""Ranks that serve one model together must have the same software, configuration and checkpoint."""

from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from vllm.config import VllmConfig

from vllm_ms_models.bridge.host import everyone


def check_ranks(what: dict[str, Any], remedy: str) -> None:
    """ValueError, on every rank, unless each of the entries of `what` is the same on all; all ranks call it.

    The sentence names the first rank and entry that differ from rank 0's.
    """
    (first_host, first), *others = everyone(what)
    for rank, (host, found) in enumerate(others, 1):
        for name, value in found.items():
            if value != first[name]:
                theirs, ours = f"{name} {value}", first[name]
                raise ValueError(
                    f"Rank {rank} (on {host}) has {theirs}, but rank 0 (on {first_host}) has {ours}; {remedy}"
                )


def check_software(vllm_config: VllmConfig) -> None:
    """Ranks on several hosts may have been installed, and started, at different times."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names = ("vllm-ms-models", "vllm", "mindspore")
    check_ranks({name: version(name) for name in names}, "install the same versions on all hosts.")
    model = vllm_config.model_config
    settings: dict[str, Any] = {"--dtype": model.dtype, "--max-model-len": model.max_model_len}
    check_ranks(settings, "start all ranks with the same options.")
    entries = model.hf_config.to_dict()
    ours = {f"config.json's {name} =": entries[name] for name in sorted(entries) if not name.startswith("_")}
    check_ranks({"the number of entries of config.json =": len(ours)} | ours, "copy the same model to all hosts.")
