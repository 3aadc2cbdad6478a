"""`vllm-ms new-model`: which files are written, and where."""

import keyword
import re
from importlib.util import find_spec
from pathlib import Path

from vllm_ms_models import registry
from vllm_ms_models.cli.new_model import templates
from vllm_ms_models.cli.new_model.source import Source, open_source, stem

NAME = re.compile(r"[a-z][a-z0-9_]*")
ARCHITECTURE = re.compile(r"[A-Z]\w*")


def new_model(name: str, like: str, architecture: str | None, folder: str | None) -> None:
    """Writes everything or, with a ValueError, nothing."""
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(f"{name} cannot be a module's name; use small letters, digits and underscores.")
    source = open_source(like)
    model_type, config, known = _of_transformers(name, architecture)
    architecture = architecture or known or templates.class_name(name) + "ForCausalLM"
    if not ARCHITECTURE.fullmatch(architecture):
        raise ValueError(f"--architecture {architecture} cannot be a class's name; give it as config.json has it.")
    if architecture in registry.BUILT_IN | registry.DRAFTS:
        raise ValueError(f"{architecture} is there already, in {(registry.BUILT_IN | registry.DRAFTS)[architecture]}.")
    config = config or f"{stem(architecture)}Config"
    root = repository(Path(folder or "."))
    if root is not None:
        files, changed = _inside(root, name, source, architecture, config)
    else:
        root = Path(folder or name)
        files, changed = _outside(root, name, source, architecture, config), {}
    _write(root, files, changed)
    print(f"Written in {root}: {', '.join(sorted(map(str, files)))}.")
    for path in changed:
        print(f"Added to {path}: {architecture}.")
    print(templates.next_steps(name, model_type is not None, bool(changed), root))


def repository(folder: Path) -> Path | None:
    """`folder` or the one above it that is this project's repository; None outside of it."""
    for place in (folder.resolve(), *folder.resolve().parents):
        project = place / "pyproject.toml"
        if project.exists() and 'name = "vllm-ms-models"' in project.read_text():
            return place
    return None


def _of_transformers(name: str, architecture: str | None) -> tuple[str | None, str | None, str | None]:
    """model_type, config class and architecture that transformers has for `architecture`, or else for `name`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

    kinds = [kind for kind, found in MODELS.items() if found == architecture]
    kind = next(iter(kinds), None) if architecture else (name if name in MODELS else None)
    if kind is None:
        return None, None, None
    found = MODELS[kind]
    return kind, CONFIG_MAPPING_NAMES.get(kind), found if isinstance(found, str) else found[0]


def _inside(
    root: Path, name: str, source: Source, architecture: str, config: str
) -> tuple[dict[Path, str], dict[Path, str]]:
    """New files, and those that are added to, of this repository."""
    folder = Path("vllm_ms_models", name)
    files = {folder / file: text for file, text in source.renamed(architecture, f"vllm_ms_models.{name}").items()}
    files[folder / "__init__.py"] = ""
    files[folder / "README.md"] = templates.readme(architecture, source.folder)
    files[Path("tests", "zoo", "families", f"{name}.py")] = templates.family(architecture, config)
    path = Path("vllm_ms_models", "registry.py")
    text = with_entry((root / path).read_text(), architecture, f"vllm_ms_models.{name}.model")
    return files, {path: text}


def with_entry(text: str, architecture: str, module: str) -> str:
    """registry.py with one more line in BUILT_IN, in the order of names."""
    lines = text.splitlines()
    start = lines.index("BUILT_IN = {") + 1
    end = lines.index("}", start)
    line = f'    "{architecture}": "{module}",'
    later = (number for number in range(start, end) if lines[number].startswith('    "') and lines[number] > line)
    at = next(later, end)
    return "\n".join([*lines[:at], line, *lines[at:]]) + "\n"


def _outside(root: Path, name: str, source: Source, architecture: str, config: str) -> dict[Path, str]:
    """A package of its own."""
    spec = find_spec(name)
    if spec is not None and spec.origin is not None and not (root / name).exists():
        raise ValueError(f"A module {name} is installed already, which a package of that name would hide; use another.")
    files = {Path(name, file): text for file, text in source.renamed(architecture, name).items()}
    return files | {
        Path(name, "__init__.py"): "",
        Path("pyproject.toml"): templates.project(name, architecture),
        Path("README.md"): templates.readme(architecture, source.folder),
        Path("tiny.py"): templates.tiny(architecture, config),
        Path("tests", f"test_{name}.py"): templates.test(architecture),
    }


def _write(root: Path, files: dict[Path, str], changed: dict[Path, str]) -> None:
    existing = [str(path) for path in files if (root / path).exists()]
    if existing:
        raise ValueError(f"{', '.join(existing)} in {root} would be overwritten; choose another name or folder.")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with (root / path).open("x") as file:
            file.write(text)
    for path, text in changed.items():
        (root / path).write_text(text)
