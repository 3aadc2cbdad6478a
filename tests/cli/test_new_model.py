"""`vllm-ms new-model`: what it writes is a model that works as the copied one does, and it overwrites nothing."""

import ast
import shutil
from pathlib import Path

import pytest

from vllm_ms_models import registry
from vllm_ms_models.cli import main
from vllm_ms_models.cli.new_model.command import with_entry
from vllm_ms_models.cli.new_model.source import choices, open_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What of this repository is looked at."""
    for name in ("pyproject.toml", "vllm_ms_models/registry.py", "tests/zoo/family.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("like", choices())
def test_every_model_can_be_copied(like: str) -> None:
    """No name of it is left, every import leads to a file, and nothing is lost."""
    source = open_source(like)
    files = source.renamed("FreshForCausalLM", "fresh")
    assert set(files) >= {"model.py"}
    modules = {f"fresh.{name.removesuffix('.py')}" for name in files}
    for name, text in files.items():
        tree = ast.parse(text)
        original = ast.parse(source.modules[name.removesuffix(".py")])
        assert len(tree.body) == len(original.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert not module.startswith(f"vllm_ms_models.{like}")
                if module.split(".")[0] == "fresh":
                    assert {module, *(f"{module}.{alias.name}" for alias in node.names)} & modules
    assert files["model.py"].count('@register_model("FreshForCausalLM")\nclass FreshForCausalLM(') == 1
    assert f"class {source.main}" not in files["model.py"]


def test_in_the_repository(clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(clone)
    monkeypatch.chdir(clone / "tests")
    assert main(["new-model", "stablelm", "--like", "llama"]) == 0
    after = contents(clone)
    assert set(after) - set(before) == {
        "vllm_ms_models/stablelm/__init__.py",
        "vllm_ms_models/stablelm/model.py",
        "vllm_ms_models/stablelm/README.md",
        "tests/zoo/families/stablelm.py",
    }
    assert "| `StableLmForCausalLM` |" in after["vllm_ms_models/stablelm/README.md"]
    assert "StableLmConfig" in after["tests/zoo/families/stablelm.py"]
    table: dict[str, dict[str, str]] = {}
    exec(after["vllm_ms_models/registry.py"], table)
    assert table["BUILT_IN"] == {**registry.BUILT_IN, "StableLmForCausalLM": "vllm_ms_models.stablelm.model"}
    assert list(table["BUILT_IN"]) == sorted(table["BUILT_IN"]) or list(registry.BUILT_IN) != sorted(registry.BUILT_IN)
    assert {name for name in before if before[name] != after[name]} == {"vllm_ms_models/registry.py"}
    capsys.readouterr()
    assert main(["new-model", "stablelm", "--like", "llama"]) == 1
    assert "would be overwritten; choose another name or folder" in capsys.readouterr().err
    assert contents(clone) == after


def test_as_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["new-model", "my_model", "--like", "qwen3_moe", "--architecture", "MyMoeForCausalLM", "--folder", "here"]
    assert main(words) == 0
    assert "transformers has no such model: correct the name" in capsys.readouterr().out
    written = contents(tmp_path)
    assert set(written) == {
        "here/pyproject.toml",
        "here/README.md",
        "here/tiny.py",
        "here/my_model/__init__.py",
        "here/my_model/model.py",
        "here/tests/test_my_model.py",
    }
    assert 'MyMoeForCausalLM = "my_model.model:MyMoeForCausalLM"' in written["here/pyproject.toml"]
    for name, text in written.items():
        if name.endswith(".py"):
            ast.parse(text)
    assert main(words) == 1
    assert contents(tmp_path) == written


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["My-Model", "--like", "qwen2"], "My-Model cannot be a module's name"),
        (["class", "--like", "qwen2"], "class cannot be a module's name"),
        (["new", "--like", "gpt"], "--like gpt is not a folder of a model here; use one of deepseek_v3, "),
        (["new", "--like", "qwen2", "--architecture", "Qwen3ForCausalLM"], "Qwen3ForCausalLM is there already"),
        (["new", "--like", "qwen2", "--architecture", "no class"], "cannot be a class's name"),
        (["json", "--like", "qwen2"], "A module json is installed already"),
    ],
)
def test_refusals(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-model", *words]) == 1
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_entries_stay_in_order() -> None:
    text = 'BUILT_IN = {\n    "AForCausalLM": "a",\n    "CForCausalLM": "c",\n}\n'
    assert with_entry(text, "BForCausalLM", "b").splitlines()[2] == '    "BForCausalLM": "b",'
    assert with_entry(text, "DForCausalLM", "d").splitlines()[3] == '    "DForCausalLM": "d",'
