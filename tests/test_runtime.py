"""Starting up: the device that is asked for, the MindSpore that is needed, and the line that says what runs."""

import logging
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from vllm_ms_models import devices, runtime

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def davinci(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Ascend devices of this host: those that the test adds."""
    devices: list[str] = []
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(devices) if str(folder) == "/dev" else iter(()))
    return devices


# --- device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "auto", "cpu", "CPU", "Auto"])
def test_the_cpu_is_what_auto_means(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("VLLM_MS_DEVICE", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_MS_DEVICE", value)
    assert runtime.device() == "cpu"


def test_ascend_on_a_host_without_it(monkeypatch: pytest.MonkeyPatch, davinci: list[str]) -> None:
    monkeypatch.setenv("VLLM_MS_DEVICE", "ascend")
    with pytest.raises(ValueError) as caught:
        runtime.device()
    assert str(caught.value) == (
        "VLLM_MS_DEVICE=ascend: this host has no Ascend device; set VLLM_MS_DEVICE=cpu to serve from the CPU."
    )


@pytest.mark.parametrize("value", ["auto", "ascend", None])
def test_ascend_on_a_host_that_has_it(monkeypatch: pytest.MonkeyPatch, davinci: list[str], value: str | None) -> None:
    monkeypatch.delenv("VLLM_MS_DEVICE", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_MS_DEVICE", value)
    davinci += ["/dev/davinci1", "/dev/davinci0", "/dev/davinci_manager"]
    assert runtime.device() == "ascend"
    assert devices.visible() == [0, 1]


def test_the_devices_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch, davinci: list[str]) -> None:
    davinci += [f"/dev/davinci{number}" for number in range(8)]
    monkeypatch.setenv(devices.VISIBLE, "6,2")
    assert devices.visible() == [6, 2]
    devices.check(1, 2)
    with pytest.raises(ValueError, match=r"3 ranks on this host .* but only 2 can be used .*VISIBLE_DEVICES=6,2"):
        devices.check(2, 3)
    for wrong in ("8", "first", "0,-1"):
        monkeypatch.setenv(devices.VISIBLE, wrong)
        with pytest.raises(ValueError, match=f"VISIBLE_DEVICES={wrong} does not name devices of this host, which has"):
            runtime.device()


def test_no_device_is_left(monkeypatch: pytest.MonkeyPatch, davinci: list[str]) -> None:
    davinci.append("/dev/davinci0")
    monkeypatch.setenv(devices.VISIBLE, "")
    monkeypatch.delenv("VLLM_MS_DEVICE", raising=False)
    assert runtime.device() == "cpu"
    monkeypatch.setenv("VLLM_MS_DEVICE", "ascend")
    with pytest.raises(ValueError, match="VLLM_MS_DEVICE=ascend: ASCEND_RT_VISIBLE_DEVICES leaves no Ascend device"):
        runtime.device()


@pytest.mark.parametrize("value", ["gpu", "cpu:0", "", "ascend910"])
def test_other_devices(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_MS_DEVICE", value)
    with pytest.raises(ValueError) as caught:
        runtime.device()
    assert str(caught.value) == f"VLLM_MS_DEVICE={value} is not a device; set it to auto, cpu or ascend."


# --- MindSpore ---------------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    """Let the installed MindSpore be `found` (None: there is none)."""
    original = runtime.version

    def version(name: str) -> str:
        if name != "mindspore":
            return original(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(runtime, "version", version)


def test_the_mindspore_that_is_installed_is_the_right_one() -> None:
    runtime.require_mindspore()


def test_no_mindspore(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(ImportError) as caught:
        runtime.require_mindspore()
    assert str(caught.value) == ("MindSpore is not installed in this environment; run `pip install mindspore==2.10.0`.")
    assert caught.value.__suppress_context__  # one sentence, not two stack traces


@pytest.mark.parametrize("found", ["2.9.0", "2.10.0rc1", "2.10.1", "3.0"])
def test_another_mindspore(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    pretend(monkeypatch, found)
    with pytest.raises(ImportError) as caught:
        runtime.require_mindspore()
    assert str(caught.value) == (
        f"MindSpore {found} is installed but vllm-ms-models is made for 2.10.0; run `pip install mindspore==2.10.0`."
    )


def test_start_checks_mindspore_and_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MS_DEVICE", "tpu")
    with pytest.raises(ValueError, match="VLLM_MS_DEVICE=tpu is not a device"):
        runtime.start("float32")
    pretend(monkeypatch, "2.9.0")
    with pytest.raises(ImportError, match=r"MindSpore 2\.9\.0"):
        runtime.start("float32")


# --- the line ----------------------------------------------------------------------------------------------------


def test_the_line_of_this_process(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from vllm_ms_models import kernels

    monkeypatch.setenv("VLLM_MS_KERNELS", "reference")
    monkeypatch.setenv("VLLM_MS_DEVICE", "auto")
    monkeypatch.setattr(kernels, "_active", None)
    monkeypatch.setattr(runtime.logger, "propagate", True)
    monkeypatch.setattr(runtime.logger, "handlers", [caplog.handler])  # vLLM's logger does not propagate
    caplog.set_level(logging.INFO, runtime.logger.name)
    runtime.start("bfloat16")
    lines = {record.getMessage() for record in caplog.records if record.name == runtime.logger.name}
    assert lines == {
        "MindSpore 2.10.0 on cpu, kernels: reference (plain MindSpore operators), dtype: bfloat16",
    }
    assert kernels.get().name == "reference"


START = """
import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from vllm_ms_models import devices, runtime
runtime.start("float16")
import mindspore
print("sum", (mindspore.Tensor([1.0, 2.0]) + 1).asnumpy().sum())
"""


def test_the_line_of_a_fresh_process() -> None:
    """What an engine's worker prints: the one line, and nothing of MindSpore's complaints about NumPy."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment |= {"VLLM_MS_KERNELS": "reference"}
    ran = subprocess.run(
        [sys.executable, "-c", START], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "sum 5.0\n"
    lines = [line for line in ran.stderr.splitlines() if "INFO" in line and "vllm_ms_models" not in line]
    assert lines == ["INFO MindSpore 2.10.0 on cpu, kernels: reference (plain MindSpore operators), dtype: float16"]
    assert not re.search(r"NumPy 1\.x|SystemError|Traceback", ran.stderr)


def test_every_variable_that_is_read_is_known() -> None:
    """Others with vLLM's prefix are warned about (`validate_environ`), so the list must be complete."""
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "vllm_ms_models").rglob("*.py"))
    assert set(re.findall(r"VLLM_MS_[A-Z_]+", sources)) == set(runtime.ENVIRONMENT)
