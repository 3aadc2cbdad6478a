"""What `vllm-ms doctor` says of this place, and of one where something is wrong."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ms_models.cli.doctor import environment
from vllm_ms_models.cli.doctor.environment import Finding, findings
from vllm_ms_models.kernels.cpu import loader

ROOT = Path(__file__).resolve().parents[2]


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in findings()}


def test_here() -> None:
    """Nothing is refused where the tests run, and the CPU's instruction sets are those that the kernels find."""
    from vllm_ms_models import kernels, runtime

    here = found()
    assert [finding.problem for finding in here.values() if finding.problem] == []
    runtime.start_mindspore()
    module = loader.load()
    assert environment.cpu()[1] == module.isas()[0]
    assert str(loader.library()) in here["kernels"].value
    assert kernels.choose("cpu").describe().startswith("C++")


@pytest.mark.parametrize(
    ("name", "variable", "value", "sentence"),
    [
        ("vllm.general_plugins", "VLLM_PLUGINS", "mindspore", "VLLM_PLUGINS=mindspore leaves out mindspore_models"),
        ("vllm.platform_plugins", "VLLM_PLUGINS", "others", "VLLM_PLUGINS=others leaves out mindspore,"),
        ("VLLM_TARGET_DEVICE", "VLLM_TARGET_DEVICE", "cpu", "VLLM_TARGET_DEVICE=cpu makes vLLM ignore plugins"),
        ("device", "VLLM_MS_DEVICE", "ascend", "this host has no Ascend device"),
        ("instruction set", "VLLM_MS_ISA", "sse2", "VLLM_MS_ISA='sse2' is not available here; use one of"),
        ("kernels", "VLLM_MS_KERNELS", "fast", "VLLM_MS_KERNELS=fast is unknown"),
    ],
)
def test_settings(name: str, variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    problem = found()[name].problem
    assert problem is not None and sentence in problem


def test_isa_that_is_refused_is_refused_by_the_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ms_models.kernels.cpu import CpuKernels

    monkeypatch.setenv("VLLM_MS_ISA", "sse2")
    with pytest.raises(ValueError) as raised:
        CpuKernels()
    assert str(raised.value) == found()["instruction set"].problem


def test_kernels_that_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(tmp_path))
    assert "to be built at the first start by g++" in found()["kernels"].value
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    warning = found()["kernels"].warning
    assert warning is not None and "There is no C++ compiler 'no-such-compiler'" in warning
    monkeypatch.setenv("VLLM_MS_KERNELS", "cpp")
    problem = found()["kernels"].problem
    assert problem is not None and "There is no C++ compiler 'no-such-compiler'" in problem


def test_unsafe_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(stat.S_IRWXU | stat.S_IRWXO)
    monkeypatch.setenv("VLLM_MS_CACHE_DIR", str(tmp_path))
    warning = found()["kernels"].warning
    assert warning is not None and "can be written by other users" in warning


@pytest.mark.parametrize(
    ("package", "version", "sentence"),
    [
        ("mindspore", "2.9.0", "mindspore 2.9.0 is installed, but vllm-ms-models is made for mindspore==2.10.0"),
        ("vllm", "0.31.1", "vllm 0.31.1 is installed, but vllm-ms-models is made for vllm==0.32.0"),
        ("transformers", "4.57.1", "transformers 4.57.1 is installed, but vllm is made for transformers<"),
        ("vllm", "0.32.0+empty", None),
        ("mindspore", None, "mindspore is not installed"),
    ],
)
def test_versions(package: str, version: str | None, sentence: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.version

    def installed(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise environment.PackageNotFoundError
        return version

    monkeypatch.setattr(environment, "version", installed)
    problem = found()[package].problem
    assert problem is None if sentence is None else sentence in (problem or "")


@pytest.mark.slow
def test_a_broken_place_is_said_before_the_model() -> None:
    words = [sys.executable, "-m", "vllm_ms_models.cli", "doctor", "nowhere"]
    env = {**os.environ, "VLLM_PLUGINS": "mindspore"}
    run = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "not looked at: nothing can be served before the above is put right" in run.stdout


def test_options_without_a_model() -> None:
    words = [sys.executable, "-m", "vllm_ms_models.cli", "doctor", "--block-size"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "options of vllm serve belong to a model: name it first" in run.stderr
