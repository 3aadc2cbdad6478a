"""What a server would find here: versions, plugins, kernels, memory. Nothing is built or loaded."""

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vllm_ms_models import devices, memory, runtime
from vllm_ms_models.kernels.cpu import loader

PACKAGE = "vllm-ms-models"
PLUGINS = {"vllm.platform_plugins": "mindspore", "vllm.general_plugins": "mindspore_models"}
TORCH = "2.13.0"
ADVICE = "; run scripts/setup.sh, or install it as the README says"

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDED = {  # /proc/cpuinfo's flags for each instruction set of the kernels, best first
    "avx512_bf16": {*_AVX512, "avx512_vnni", "avx512_bf16"},
    "avx512_vnni": {*_AVX512, "avx512_vnni"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
}


@dataclass(frozen=True)
class Finding:
    """One thing about this place. `problem`: a sentence if nothing can be served; `warning` if it may work."""

    name: str
    value: str
    problem: str | None = None
    warning: str | None = None


def findings() -> Iterator[Finding]:
    """Everything but the model."""
    yield _python()
    yield Finding("system", platform.platform())
    yield from _versions()
    yield from _plugins()
    yield from _kernels()
    from vllm_ms_models.bridge.host import host_memory

    host = host_memory()
    yield Finding("memory", f"{memory.gib(host.available)} available of {memory.gib(host.total)}")


def _python() -> Finding:
    found, wanted = platform.python_version(), metadata(PACKAGE)["Requires-Python"]
    fits = SpecifierSet(wanted).contains(found)
    problem = None if fits else f"Python {found} is not supported ({wanted} is); make an environment with another."
    return Finding("python", f"{found} ({sys.executable})", problem)


def _versions() -> Iterator[Finding]:
    """Ours, what we are made for, and what vLLM is made for; its device-less build takes any torch."""
    yield Finding(PACKAGE, version(PACKAGE))
    for package, of in (("mindspore", PACKAGE), ("vllm", PACKAGE), ("torch", "vllm"), ("transformers", "vllm")):
        wanted = _wanted(package, of)
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(package, "not installed", f"{package} is not installed{ADVICE}.")
            continue
        problem = None
        if not wanted.contains(found.split("+")[0], prereleases=True):
            problem = f"{package} {found} is installed, but {of} is made for {package}{wanted}{ADVICE}."
        warning = None
        if package == "torch" and found.split("+")[0] != TORCH:
            warning = f"torch {found} is installed; all tests ran with torch {TORCH}, which scripts/setup.sh installs."
        yield Finding(package, f"{found} (supported: {wanted or TORCH})", problem, warning)


def _wanted(package: str, of: str) -> SpecifierSet:
    try:
        found = [Requirement(line) for line in requires(of) or ()]
    except PackageNotFoundError:
        found = []
    return next((one.specifier for one in found if one.name == package and one.marker is None), SpecifierSet())


def _plugins() -> Iterator[Finding]:
    allowed = os.environ.get("VLLM_PLUGINS")
    yield Finding("VLLM_PLUGINS", "not set: all plugins" if allowed is None else allowed)
    for group, name in PLUGINS.items():
        points = [point for point in entry_points(group=group) if point.name == name]
        problem = None
        if not points:
            problem = f"The entry point {name} of {group} is not there: {PACKAGE} is not installed; run `pip install`."
        elif allowed is not None and name not in allowed.split(","):
            problem = f"VLLM_PLUGINS={allowed} leaves out {name}, which makes vLLM use MindSpore; add it."
        yield Finding(group, ", ".join(f"{point.name} = {point.value}" for point in points) or "none", problem)
    device = os.environ.get("VLLM_TARGET_DEVICE")
    if device == "cpu":
        problem = "VLLM_TARGET_DEVICE=cpu makes vLLM ignore plugins; unset it."
        yield Finding("VLLM_TARGET_DEVICE", device, problem)


def cpu() -> tuple[str, str]:
    """The CPU's name and the best instruction set of the kernels that it has."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    values = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set(values.get("flags", "").split())
    best = next((isa for isa, needed in NEEDED.items() if needed <= flags), "portable")
    return values.get("model name", platform.machine()), best


def _kernels() -> Iterator[Finding]:
    """Which would run, by the rules of `kernels.choose` and of CpuKernels; the sentence is theirs, or like theirs."""
    name, best = cpu()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", f"{name}, {usable} CPUs to use, {platform.machine()}")
    try:
        if runtime.device() == "ascend":
            numbers = ", ".join(map(str, devices.visible()))
            yield Finding("device", f"Ascend {numbers}", warning="The Ascend back end was not run on hardware.")
    except ValueError as error:
        yield Finding("device", os.environ.get("VLLM_MS_DEVICE", ""), str(error))
    isas = list(loader.isa_flags())
    runs = isas[isas.index(best) :] if best in isas else ["portable"]
    isa = os.environ.get("VLLM_MS_ISA") or best
    problem = None if isa in runs else f"VLLM_MS_ISA={isa!r} is not available here; use one of {', '.join(runs)}."
    yield Finding("instruction set", f"{isa} (this CPU: {', '.join(runs)})", problem)
    yield _library(isa)


def _library(isa: str) -> Finding:
    wanted = os.environ.get("VLLM_MS_KERNELS", "auto").lower()
    if wanted not in ("auto", "cpp", "reference"):
        return Finding("kernels", wanted, f"VLLM_MS_KERNELS={wanted} is unknown; set it to auto, cpp or reference.")
    if wanted == "reference":
        return Finding("kernels", "reference", warning="VLLM_MS_KERNELS=reference chooses the slow kernels; unset it.")
    header = Path(sysconfig.get_path("include"), "Python.h")
    try:
        path, compiler = loader.locate()
        if compiler is None:
            return Finding("kernels", f"C++ for {isa}, built: {path}")
        if not header.exists():
            raise loader.KernelBuildError(f"Python's headers are missing ({header}); install python3-dev.")
    except loader.KernelBuildError as error:
        if wanted == "cpp":
            return Finding("kernels", "none", str(error))
        return Finding("kernels", "reference", warning=f"{error} Until then much slower kernels serve.")
    return Finding("kernels", f"C++ for {isa}, to be built at the first start by {' '.join(compiler)} (half a minute)")
