"""The model that is copied, and its files under new names."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import vllm_ms_models
from vllm_ms_models import registry

PACKAGE = Path(vllm_ms_models.__file__).parent
ENDS = ("ForCausalLM", "LMHeadModel", "Model")
REGISTRATION = re.compile(r"@register_model\([^)]*\)\nclass (\w+)")


def stem(architecture: str) -> str:
    """What the names of an architecture's classes begin with: `Qwen2` of `Qwen2ForCausalLM`."""
    return next((architecture.removesuffix(end) for end in ENDS if architecture.endswith(end)), architecture)


@dataclass(frozen=True)
class Source:
    """A model of this package: its folder's name, the class that is registered, and the modules it needs."""

    folder: str
    main: str
    modules: dict[str, str]

    def renamed(self, architecture: str, package: str) -> dict[str, str]:
        """File name -> content, with `architecture` as the class's name and `package` as that of the folder."""
        old, new = stem(self.main), stem(architecture)
        found = {}
        for name, text in self.modules.items():
            # QWen2Attention, Qwen2Config and Qwen2 alone, but not Qwen2.5 or Qwen2_5
            text = re.sub(rf"\b{self.main}\b", architecture, text)
            text = re.sub(rf"\b{old}(?=[A-Z]|\b(?!\.\d))", new, text)
            text = re.sub(rf"\bvllm_ms_models\.{self.folder}\b", package, text)
            text = REGISTRATION.sub(rf'@register_model("{architecture}")\nclass \1', text)
            found[f"{name}.py"] = _with_docstring(text, _docstring(name, new, self.folder))
        return found


def _docstring(module: str, new: str, like: str) -> str:
    part = "" if module == "model" else f", {module}"
    return f'"""{new}{part}: so far a copy of {like}; say here what the model is, and where it is described."""'


def _with_docstring(text: str, docstring: str) -> str:
    """`text` with its module's docstring replaced."""
    first = ast.parse(text).body[0]
    lines = text.splitlines()
    assert isinstance(first, ast.Expr) and first.end_lineno is not None, "every module here has one"
    return "\n".join([docstring, *lines[first.end_lineno :]]) + "\n"


def choices() -> list[str]:
    """The folders that can be copied."""
    modules = {module for name, module in registry.BUILT_IN.items() if name not in registry.ENCODERS}
    return sorted(module.split(".")[1] for module in modules)


def open_source(like: str) -> Source:
    """The model in the folder `like`; ValueError with those that there are."""
    if like not in choices():
        raise ValueError(f"--like {like} is not a folder of a model here; use one of {', '.join(choices())}.")
    modules: dict[str, str] = {}
    wanted = ["model"]
    while wanted:
        name = wanted.pop()
        if name not in modules:
            modules[name] = (PACKAGE / like / f"{name}.py").read_text()
            wanted += _siblings(like, modules[name])
    match = REGISTRATION.search(modules["model"])
    if match is None:
        raise ValueError(f"--like {like} cannot be copied: its model.py registers no class; use another.")
    return Source(like, match[1], modules)


def _siblings(folder: str, text: str) -> list[str]:
    """Modules of the same folder that `text` imports."""
    found = []
    package = f"vllm_ms_models.{folder}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == package:
                found += [alias.name for alias in node.names]
            elif node.module.startswith(f"{package}."):
                found.append(node.module.removeprefix(f"{package}."))
    return found
