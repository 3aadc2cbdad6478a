"""The package's shape: who may import whom, no patching of vLLM outside compat.py, and nothing too long to read.

Every rule reads the syntax tree, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_ms_models"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# A zone is a folder or a file directly under the package; every folder with a model.py is in the zone "models".
MODELS = {path.parent.name for path in PACKAGE.glob("*/model.py")} - {"bridge"}
HOST = {"platform", "worker", "model_runner", "bridge", "compat", "cli"}
TOP = {"platform", "worker", "model_runner", "bridge", "cli"}

MAY_IMPORT_TORCH = HOST
MAY_IMPORT_VLLM = HOST | {"registry", "__init__"}
MAY_NOT_IMPORT_MINDSPORE = {"checkpoint", "__init__"}
MAY_NOT_IMPORT_ZONES = {
    "kernels": TOP | {"models", "layers", "quantization", "checkpoint", "registry", "suites"},
    "checkpoint": TOP | {"models", "layers", "quantization", "kernels", "registry", "suites"},
    "distributed": TOP | {"models", "layers", "quantization", "registry", "suites"},
    "quantization": TOP | {"models", "layers", "registry", "suites"},
    "layers": TOP | {"models", "registry", "suites"},
    "models": TOP | {"kernels", "suites"},
    "suites": TOP | {"models", "registry"},
}
# (model, other model it builds on): empty until a model states it here.
MODEL_MAY_IMPORT_MODEL: set[tuple[str, str]] = set()
PATCHABLE = {"vllm", "torch", "transformers", "mindspore"}


def own_module(path: Path) -> str:
    """Dotted name of the package that relative imports in `path` start from, e.g. vllm_ms_models.layers."""
    return ".".join(("vllm_ms_models", *path.relative_to(PACKAGE).parent.parts))


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def zone_of(name: str) -> str:
    return "models" if name in MODELS else name


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` gives a.b, importlib with a literal name counts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                yield node.lineno, str(node.args[0].value)


def direction_faults(path: Path, source: str) -> Iterator[str]:
    """Every import in `source`, taken as the file `path`, that goes against the design."""
    folder = folder_of(path)
    zone = zone_of(folder)
    for line, name in imported(ast.parse(source), own_module(path)):
        top, *rest = name.split(".")
        fault = None
        if top == "torch" and zone not in MAY_IMPORT_TORCH:
            fault = f"torch is imported only in {', '.join(sorted(MAY_IMPORT_TORCH))}"
        elif top == "vllm" and zone not in MAY_IMPORT_VLLM:
            fault = f"vllm is imported only in {', '.join(sorted(MAY_IMPORT_VLLM))}"
        elif top == "mindspore" and zone in MAY_NOT_IMPORT_MINDSPORE:
            fault = f"{zone} works without MindSpore"
        elif top == "vllm_ms_models" and rest:
            other = rest[0]
            if zone_of(other) in MAY_NOT_IMPORT_ZONES.get(zone, ()):
                fault = f"{zone} may not import {zone_of(other)}"
            elif {folder, other} <= MODELS and folder != other and (folder, other) not in MODEL_MAY_IMPORT_MODEL:
                fault = "a model imports another only if MODEL_MAY_IMPORT_MODEL says so"
        if fault:
            yield f"{path.relative_to(ROOT)}:{line}: imports {name}, but {fault}"


def foreign_names(tree: ast.AST) -> set[str]:
    """Names bound by importing from the libraries that must not be patched."""
    names = {"sys.modules"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in PATCHABLE}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in PATCHABLE:
            names |= {a.asname or a.name for a in node.names}
    return names


def belongs_to(target: ast.AST, names: set[str]) -> bool:
    """Is `target` one of `names`, or an attribute or item of one?"""
    while ast.unparse(target) not in names:
        if not isinstance(target, ast.Attribute | ast.Subscript):
            return False
        target = target.value
    return True


def patching_faults(path: Path, source: str) -> Iterator[str]:
    """Assignments and setattr that change an imported vLLM, torch, transformers or MindSpore object."""
    tree = ast.parse(source)
    names = foreign_names(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [leaf for t in node.targets for leaf in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        changed: list[ast.expr] = [
            t for t in targets if isinstance(t, ast.Attribute | ast.Subscript) and belongs_to(t.value, names)
        ]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr") and node.args:
            changed += [arg for arg in node.args[:1] if belongs_to(arg, names)]
        for target in changed:
            yield f"{path.relative_to(ROOT)}:{target.lineno}: changes {ast.unparse(target)}; patches live in compat.py"


def files(folder: str, suffix: str) -> list[Path]:
    """What lies in hidden folders (benchmarks/.peers) is not ours."""
    found = sorted((ROOT / folder).rglob(f"*.{suffix}"))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in files(folder, "py")]


def all_sources() -> list[Path]:
    folders = ("vllm_ms_models", "tests", "benchmarks", "examples", "scripts")
    return [path for folder in folders for suffix in ("py", "cpp", "h") for path in files(folder, suffix)]


def report(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_imports_point_down():
    report([fault for path in python_files("vllm_ms_models") for fault in direction_faults(path, path.read_text())])


def test_nothing_is_patched_outside_compat():
    files = [path for path in python_files("vllm_ms_models") if path != PACKAGE / "compat.py"]
    report([fault for path in files for fault in patching_faults(path, path.read_text())])


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in all_sources()}
    report([f"{p}: {n} lines (at most {MAX_FILE_LINES})" for p, n in lengths.items() if n > MAX_FILE_LINES])


def test_functions_are_short():
    faults = []
    for path in python_files("vllm_ms_models", "tests", "benchmarks", "examples", "scripts"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    faults.append(f"{where}: {node.name} has {length} lines (at most {MAX_FUNCTION_LINES})")
    report(faults)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layers/norm.py", "import torch"),
        ("layers/norm.py", "def f():\n    from torch.nn import functional"),
        ("layers/norm.py", "import vllm.config as c"),
        ("layers/norm.py", "from ..bridge import tensors"),
        ("layers/norm.py", "from vllm_ms_models import qwen2"),
        ("kernels/cpu/loader.py", "from ...layers.norm import RMSNorm"),
        ("kernels/reference.py", "import importlib\nimportlib.import_module('vllm_ms_models.bridge.tensors')"),
        ("qwen2/model.py", "from vllm_ms_models import kernels"),
        ("qwen2/model.py", "from vllm_ms_models.llama.model import Llama"),
        ("quantization/w8a8.py", "from vllm_ms_models.bridge import tensors"),
        ("checkpoint/loader.py", "from mindspore import Tensor"),
        ("__init__.py", "import mindspore"),
        ("registry.py", "import torch"),
        ("layers/norm.py", "from vllm_ms_models import suites"),
        ("suites/mindone/model.py", "from vllm_ms_models.bridge import tensors"),
    ],
)
def test_a_wrong_import_is_found(file, source):
    assert len(list(direction_faults(PACKAGE / file, source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layers/norm.py", "from vllm_ms_models import kernels\nfrom .context import ModelContext\nimport mindspore"),
        ("bridge/model.py", "import torch, vllm\nfrom vllm_ms_models.layers.batch import Batch"),
        ("qwen2/model.py", "from vllm_ms_models.layers.norm import AddRMSNorm\nfrom . import config"),
        ("registry.py", "from vllm import ModelRegistry"),
        ("checkpoint/loader.py", "import numpy, torchless, mindsporeless"),
    ],
)
def test_a_right_import_passes(file, source):
    assert not list(direction_faults(PACKAGE / file, source))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import vllm\nvllm.envs.X = 1", 1),
        ("from vllm.v1 import engine as e\ndef f():\n    e.core.run = print", 1),
        ("from vllm.config import VllmConfig\nsetattr(VllmConfig, 'x', 1)", 1),
        ("import torch\ndel torch.cuda.is_available", 1),
        ("import sys\nsys.modules['vllm.x'] = None", 1),
        ("import torch\na, torch.load = 1, None", 1),
        ("import vllm\nconfig = vllm.Config()\nconfig.x = 1\nself.vllm = vllm", 0),
    ],
)
def test_patching_is_found(source, count):
    assert len(list(patching_faults(PACKAGE / "platform.py", source))) == count
