"""What pip and vLLM see of the package: versions, entry points, cheap import, and the files inside the wheel."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import vllm_ms_models
from vllm_ms_models.cli.doctor.environment import TORCH

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = [
    (group, name, target) for group, points in PROJECT["entry-points"].items() for name, target in points.items()
]


def test_versions_agree():
    assert PROJECT["version"] == vllm_ms_models.__version__ == distribution("vllm-ms-models").version


@pytest.mark.parametrize(("group", "name", "target"), ENTRY_POINTS)
def test_entry_points_resolve(group, name, target):
    module, _, attribute = target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    installed = [p.value for p in distribution("vllm-ms-models").entry_points if (p.group, p.name) == (group, name)]
    assert installed == [target]


def test_the_platform_is_a_class_path():
    module, _, name = (vllm_ms_models.register_platform() or "").rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import vllm_ms_models as m; m.register_platform()", {"mindspore", "torch", "vllm"}),
        ("from vllm_ms_models import suites; suites.adapter('mindone').architectures()", {"mindspore", "mindone"}),
        ("import vllm_ms_models.platform", {"mindspore"}),  # the command line needs the platform, not the framework
    ],
)
def test_imports_are_cheap(code, unwanted):
    code = f"import sys; {code}; print('loaded:', *{unwanted} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].split() == ["loaded:"]


def test_torchvision_can_be_imported():
    """Whatever torch it was built for, in a process that knows nothing of this package."""
    code = "import torchvision, transformers.image_utils; print('loaded:', torchvision.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("loaded: 0.28.0")


def test_setup_script_installs_the_declared_versions():
    script = (ROOT / "scripts" / "setup.sh").read_text()
    for name in ("vllm", "mindspore"):
        (stated,) = re.findall(rf"{name.upper()}=([\d.]+)", script.split("VLLM_VERSION_OVERRIDE")[0])
        assert f"{name}=={stated}" in PROJECT["dependencies"]
    assert re.findall(r"TORCH=([\d.]+)", script)[0] == TORCH


def test_wheel_holds_the_sources(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "vllm_ms_models", tree / "vllm_ms_models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = ["build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", str(tmp_path), str(tree)]
    run = subprocess.run([sys.executable, "-m", *build], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("vllm_ms_models-*-py3-none-any.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    kinds = ("*.py", "*.cpp", "*.h", "README.md", "py.typed")
    written = {str(path.relative_to(tree)) for kind in kinds for path in (tree / "vllm_ms_models").rglob(kind)}
    assert any(name.endswith(".cpp") for name in written)
    assert written <= packed, f"missing in the wheel: {sorted(written - packed)}"
    assert not [name for name in packed if name.startswith(("tests/", "examples/"))]
