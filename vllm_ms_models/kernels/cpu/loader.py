"""Builds the C++ kernels once, keeps the library in a cache directory, and loads it.

The library's name is a hash of everything that decides what is in it: sources, flags, compiler, Python ABI and
MindSpore version. A file lock lets one of several processes build while the others wait; the result appears by an
atomic rename, with a checksum beside it, so that a half-written or damaged library is rebuilt, never loaded.

What is loaded is code, so nobody else may be able to put it there: the folder is this user's and closed to others, no
folder above it lets everyone exchange it, and files that another user has left in it are not taken.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

logger = logging.getLogger("vllm.ms_models")

MODULE = "_vllm_ms_cpu"
SOURCES = Path(__file__).parent
KERNELS = (
    "attention",
    "gemm_integers",
    "gemm",
    "elementwise",
    "kv_cache",
    "experts",
    "low_rank",
    "pack",
)  # once per ISA, slowest first
COMMON = (  # compiled once, for any machine
    "module",
    "memory",
    "threads",
    "pack_integers",
    "float8",
    "routing",
    "ranks",
    "collectives",
)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")


class KernelBuildError(RuntimeError):
    """The C++ kernels cannot be built or loaded; the text is a sentence for the user."""


def isa_flags() -> dict[str, tuple[str, ...]]:
    """Compiler flags of each instruction set of this architecture."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        vnni = (*_AVX512, "-mavx512vnni")
        bf16 = (*vnni, "-mavx512bf16")
        return {"avx512_bf16": bf16, "avx512_vnni": vnni, "avx512": _AVX512, "avx2": _AVX2, "portable": ()}
    return {"portable": ()}


def load() -> ModuleType:
    """The compiled module, built first if necessary. Raises KernelBuildError."""
    path = library()
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise KernelBuildError(f"The CPU kernels {path} are not a Python module.")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise KernelBuildError(f"The CPU kernels {path} cannot be loaded: {error}.") from error
    return module


def library() -> Path:
    """Path of the compiled library, built first if necessary. Raises KernelBuildError."""
    path, compiler = locate()
    if compiler is None:
        return path
    try:
        with _locked(path.parent / "lock"):
            if not _intact(path):  # nobody else built it while we waited
                _build(compiler, path)
    except OSError as error:
        raise KernelBuildError(f"The CPU kernels cannot be written to {path.parent}: {error}.") from error
    return path


def locate() -> tuple[Path, list[str] | None]:
    """Where the library is or will be, and the compiler that has to build it first; None if it is there.

    Raises KernelBuildError if it is not, and there is no compiler.
    """
    directory = cache_directory()
    try:
        compiler = _compiler()
    except KernelBuildError:  # a host without one can use what was built before
        built = [path for path in directory.glob(f"kernels-{_source_key()}-*.so") if _intact(path)]
        if not built:
            raise
        return max(built, key=lambda path: path.stat().st_mtime), None
    path = directory / f"kernels-{_source_key()}-{_compiler_key(compiler)}.so"
    return path, None if _intact(path) else compiler


def cache_directory() -> Path:
    """$VLLM_MS_CACHE_DIR or ~/.cache/vllm_ms_models, created if need be and safe to load code from."""
    configured = os.environ.get("VLLM_MS_CACHE_DIR")
    directory = Path(configured).expanduser() if configured else Path.home() / ".cache" / "vllm_ms_models"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise KernelBuildError(
            f"The kernel cache {directory} cannot be used: {error}; set VLLM_MS_CACHE_DIR to a directory of yours."
        ) from error
    if status.st_uid != os.geteuid():
        raise KernelBuildError(
            f"The kernel cache {directory} belongs to another user, who could replace the code in it; "
            "set VLLM_MS_CACHE_DIR to a directory of yours."
        )
    if status.st_mode & _OTHERS_WRITE:
        raise KernelBuildError(
            f"The kernel cache {directory} can be written by other users, who could replace the code in it; "
            f"run `chmod 700 {directory}` or set VLLM_MS_CACHE_DIR to another directory."
        )
    for above in Path(os.path.realpath(directory)).parents:
        mode = above.stat().st_mode
        # Not of groups: where each user has a group of his own, folders are made writable for it.
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise KernelBuildError(
                f"The kernel cache {directory} is in {above}, where every user could exchange it; "
                f"run `chmod o-w {above}` or set VLLM_MS_CACHE_DIR to another directory."
            )
    return directory


def _compiler() -> list[str]:
    """The compiler's command line: $CXX, or g++."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if not command or shutil.which(command[0]) is None:
        name = command[0] if command else "g++"
        raise KernelBuildError(f"There is no C++ compiler {name!r}; install g++ or set CXX to build the CPU kernels.")
    return command


def _source_key() -> str:
    """Hash of the sources and of what loads the library."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        mindspore = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        mindspore = "none"
    abi = sysconfig.get_config_var("EXT_SUFFIX")
    digest.update(repr((abi, platform.machine(), mindspore)).encode())
    return digest.hexdigest()[:16]


def _compiler_key(compiler: list[str]) -> str:
    """Hash of what compiles it."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256(repr((compiler, version, FLAGS, isa_flags())).encode()).hexdigest()[:8]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(path: Path) -> bool:
    """Whether the library exists, is what was built, and was put there by this user."""
    checksum = path.with_suffix(".sha256")
    try:
        return _is_own(path) and _is_own(checksum) and checksum.read_text() == _checksum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _is_own(path: Path) -> bool:
    """A regular file of this user, no link, that others cannot write; the folder may have been open to them before."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise KernelBuildError(f"Building the CPU kernels failed: {reason.strip()} (command: {shlex.join(command)})")


def _build(compiler: list[str], path: Path) -> None:
    """Compile everything beside `path` and move the library there."""
    logger.info("Building the CPU kernels (once, about 30 s) ...")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as build:
        include = f"-I{sysconfig.get_path('include')}"
        jobs = []
        for name in KERNELS:
            for isa, flags in isa_flags().items():
                target = f"{build}/{name}-{isa}.o"
                jobs.append([*FLAGS, *flags, f"-DISA_NS={isa}", f"{SOURCES / name}.cpp", "-o", target])
        for name in COMMON:
            jobs.append([*FLAGS, include, f"{SOURCES / name}.cpp", "-o", f"{build}/{name}.o"])
        workers = max(2, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda job: _run([*compiler, "-c", *job]), jobs))
        result = f"{build}/kernels.so"
        _run([*compiler, "-shared", *(job[-1] for job in jobs), "-o", result, "-lpthread"])
        checksum = Path(build, "kernels.sha256")
        checksum.write_text(_checksum(Path(result)))
        os.chmod(result, 0o600)  # whatever the umask is
        os.chmod(checksum, 0o600)
        os.replace(result, path)
        os.replace(checksum, path.with_suffix(".sha256"))
    logger.info("Built the CPU kernels in %.0f s: %s", time.monotonic() - start, path)
