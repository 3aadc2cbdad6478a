"""The command `vllm-ms` itself."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_ms_models.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_is_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["vllm-ms"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


HELP: dict[str, tuple[str, ...]] = {
    "quantize": ("--scheme", "--format", "--calibration", "--smoothquant", "--lm-head"),
    "list": ("--lines", "--json"),
    "doctor": ("--json", "any option of vllm serve"),
    "verify": ("--prompt", "--tokens", "--max-tokens", "--dtype", "--tolerance", "--layers", "--json"),
    "new-model": ("--like", "--architecture", "--folder"),
}


@pytest.mark.parametrize("command", [None, *HELP])
def test_help_is_cheap(command: str | None) -> None:
    """Without any framework, and it names every option."""
    frameworks = "{'mindspore', 'torch', 'vllm', 'transformers', 'matplotlib'}"
    words = ["--help"] if command is None else [command, "--help"]
    code = (
        f"import sys\nfrom vllm_ms_models.cli import main\ntry:\n    main({words})\n"
        f"except SystemExit as end:\n    print('code', end.code, {frameworks} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "code 0 set()"
    assert all(option in run.stdout for option in (HELP if command is None else HELP[command]))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["quantize", "a", "b"],
        ["quantize", "a", "b", "--scheme", "w3a3"],
        ["quantize", "a", "b", "--scheme", "w8a8-dynamic", "--smoothquant", "1.5"],
        ["quantize", "a", "b", "--scheme", "w8a8-dynamic", "--calibration-tokens", "0"],
        ["list", "--rows"],
        ["list", "qwen2"],
        ["doctor", "--block-size", "32"],
        ["verify"],
        ["verify", "a", "--max-tokens", "0"],
        ["new-model", "a"],
    ],
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: vllm-ms" in capsys.readouterr().err
