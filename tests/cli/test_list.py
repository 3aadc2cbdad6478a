"""`vllm-ms list`: every architecture, counted as `wc -l` counts; other packages' are named as such and not imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ms_models import registry
from vllm_ms_models.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose module must not run."""
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError\n")
    (folder / "model.py").write_text("raise RuntimeError\n" * 7)
    information = tmp_path / "others-2.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 2.5\n")
    points = "OtherForCausalLM = others.model:Other\nGoneForCausalLM = gone.model:Gone\n"
    (information / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["list", *options]) == 0
    return capsys.readouterr().out


def test_json(other_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["architecture"]: entry for entry in json.loads(listed(capsys, "--json"))}
    assert set(found) >= {*registry.BUILT_IN, *registry.DRAFTS, "OtherForCausalLM", "GoneForCausalLM"}
    for name in registry.BUILT_IN | registry.DRAFTS:
        entry = found[name]
        folder = Path(entry["folder"])
        assert (folder / "__init__.py").exists()
        module = Path(ROOT, *entry["module"].split(".")).with_suffix(".py")
        counts = [subprocess.check_output(["wc", "-l", *paths]) for paths in ([module], sorted(folder.rglob("*.py")))]
        assert [entry["lines"], entry["folder_lines"]] == [int(count.split()[-2]) for count in counts]
        assert entry["package"] == "vllm-ms-models"
        assert ("text" in entry["kinds"]) == (name not in registry.ENCODERS and name not in registry.DRAFTS)
    other = found["OtherForCausalLM"]
    assert (other["package"], other["version"], other["folder"]) == ("others", "2.5", str(other_package))
    assert (other["lines"], other["folder_lines"]) == (7, 8)
    assert found["GoneForCausalLM"]["folder"] is None


def test_table(other_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys)
    (line,) = [line for line in text.splitlines() if line.startswith("OtherForCausalLM")]
    assert line.split("  ")[-1] == "others 2.5 (third party)"
    assert "lines" not in text
    assert listed(capsys, "--lines").splitlines()[0].endswith("model.py  folder's lines")


def test_it_is_quick() -> None:
    """No framework is imported."""
    code = (
        "import sys\nfrom vllm_ms_models.cli import main\nassert main(['list', '--lines']) == 0\n"
        "print({'mindspore', 'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


def test_the_page_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "models.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "models.md").read_text()
    assert all(f"`{architecture}`" in text for architecture in registry.BUILT_IN)
