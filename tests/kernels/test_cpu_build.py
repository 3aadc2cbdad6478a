"""Building and caching the C++ kernels.

A stand-in for the compiler makes most builds instant: a shell script that notes each call and writes a constant file.
"""

import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ms_models.kernels.cpu import KernelBuildError, loader

SCRIPT = """#!/bin/sh
case " $* " in *" --version "*) echo "stand-in $VERSION"; exit 0;; esac
case " $* " in *" -shared "*) echo build >> "$LOG";; esac
while [ "$1" != "-o" ]; do shift; done
sleep 0.01
echo "compiled" > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, as $CXX, with a cache directory of its own; its log has one line a build."""
    script = tmp_path / "compiler"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(tmp_path / "cache"))
    return script


def builds(compiler: Path) -> int:
    log = compiler.with_name("log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_builds_once_and_says_so(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader.logger.addHandler(caplog.handler)  # vLLM's loggers do not propagate
    try:
        with caplog.at_level(logging.INFO, logger=loader.logger.name):
            path = loader.library()
            assert loader.library() == path
    finally:
        loader.logger.removeHandler(caplog.handler)
    assert builds(compiler) == 1
    texts = [record.getMessage() for record in caplog.records if record.name == loader.logger.name]
    assert len(set(texts)) == 2
    assert texts[0].startswith("Building the CPU kernels (once") and "Built the CPU kernels in" in texts[-1]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not list(path.parent.glob("build-*"))


def test_several_processes_build_once(compiler: Path) -> None:
    code = "from vllm_ms_models.kernels.cpu.loader import library; print(library())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1 and Path(paths.pop()).exists()
    assert builds(compiler) == 1


@pytest.mark.parametrize("damage", [b"", b"compi", b"another"])
def test_a_damaged_library_is_built_again(compiler: Path, damage: bytes) -> None:
    path = loader.library()
    path.write_bytes(damage)
    assert loader.library() == path
    assert path.read_text() == "compiled\n"
    assert builds(compiler) == 2


def test_a_library_without_checksum_is_built_again(compiler: Path) -> None:
    """As a process that was killed between the two renames leaves it."""
    path = loader.library()
    path.with_suffix(".sha256").unlink()
    assert loader.library() == path
    assert builds(compiler) == 2


def test_what_decides_the_contents_is_in_the_name(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [loader.library()]
    monkeypatch.setenv("VERSION", "2")
    paths.append(loader.library())
    monkeypatch.setattr(loader, "FLAGS", (*loader.FLAGS, "-g"))
    paths.append(loader.library())
    monkeypatch.setattr(loader.importlib.metadata, "version", lambda _: "9.9.9")
    paths.append(loader.library())
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in [*loader.SOURCES.glob("*.cpp"), *loader.SOURCES.glob("*.h")]:
        (sources / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(loader, "SOURCES", sources)
    assert loader.library() == paths[-1]  # the place does not matter
    with (sources / "tile.h").open("a") as file:
        file.write("// changed\n")
    paths.append(loader.library())
    assert len(set(paths)) == len(paths) == builds(compiler)


def test_no_compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match="There is no C\\+\\+ compiler 'no-such-compiler'"):
        loader.library()


def test_without_a_compiler_what_was_built_before_is_used(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = loader.library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert loader.library() == built
    monkeypatch.setattr(loader.importlib.metadata, "version", lambda _: "9.9.9")  # built for another MindSpore
    with pytest.raises(KernelBuildError, match="There is no C"):
        loader.library()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler on this machine")
def test_the_kernels_build_in_under_a_minute(tmp_path: Path) -> None:
    """Elsewhere a build that fails only skips tests; here it fails."""
    environment = {**os.environ, "VLLM_MS_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "vllm_ms_models.kernels.cpu"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, which whatever else the machine does lengthens less; two compilers run at a time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 60


def test_a_failed_build_names_the_error_and_leaves_nothing(compiler: Path) -> None:
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no luck" >&2\nexit 1\n')
    with pytest.raises(KernelBuildError, match=r"Building the CPU kernels failed: x\.cpp:1: error: no luck"):
        loader.library()
    assert [path.name for path in (compiler.parent / "cache").iterdir()] == ["lock"]


def test_a_library_that_is_none_cannot_be_loaded(compiler: Path) -> None:
    with pytest.raises(KernelBuildError, match="cannot be loaded"):
        loader.load()


def test_a_directory_others_can_write_is_refused(compiler: Path) -> None:
    cache = compiler.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(KernelBuildError, match="can be written by other users"):
        loader.library()


def test_a_directory_of_another_user_is_refused(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.library()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(KernelBuildError, match="belongs to another user"):
        loader.library()


def test_a_directory_that_everyone_can_exchange_is_refused(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = compiler.parent / "public"
    (public / "mine").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(public / "mine"))
    public.chmod(0o777)
    with pytest.raises(KernelBuildError, match=rf"is in {public}, where every user could exchange it; run `chmod o-w"):
        loader.library()
    public.chmod(0o1777)  # as /tmp: only an owner can rename
    assert loader.library().parent == public / "mine"


def test_a_link_is_judged_by_where_it_leads(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = compiler.parent / "target", compiler.parent / "link"
    target.mkdir(mode=0o700)
    link.symlink_to(target)
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(link))
    assert loader.library().parent == link
    target.chmod(0o770)
    with pytest.raises(KernelBuildError, match="can be written by other users"):
        loader.library()


@pytest.mark.parametrize("suffix", [".so", ".sha256"])
@pytest.mark.parametrize("how", ["link", "writable by all", "of another user"])
def test_files_that_others_could_have_left_are_built_again(
    compiler: Path, how: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may have been open to others before."""
    path = loader.library().with_suffix(suffix)
    if how == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    elif how == "writable by all":
        path.chmod(0o666)
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root can give files away")
    assert loader.library().with_suffix(suffix) == path
    assert builds(compiler) == 2
    assert stat.S_ISREG(path.lstat().st_mode) and path.stat().st_uid == os.geteuid()
    loader.library()
    assert builds(compiler) == 2


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_what_is_built_is_closed_to_others_whatever_the_umask(compiler: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = loader.library()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert loader.library() == path and builds(compiler) == 1


def test_a_link_in_place_of_the_lock_is_not_followed(compiler: Path) -> None:
    victim = compiler.parent / "victim"
    loader.cache_directory()
    (compiler.parent / "cache" / "lock").symlink_to(victim)
    with pytest.raises(KernelBuildError, match="cannot be written to"):
        loader.library()
    assert not victim.exists()


def test_a_file_in_place_of_the_directory_is_refused(compiler: Path) -> None:
    (compiler.parent / "cache").write_text("")
    with pytest.raises(KernelBuildError, match="cannot be used"):
        loader.library()
