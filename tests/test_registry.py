"""Which class implements which architecture: here, in other packages, and in the eyes of vLLM."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from vllm_ms_models import registry
from vllm_ms_models.registry import (
    BUILT_IN,
    DRAFTS,
    ENCODERS,
    MULTIMODAL,
    UnsupportedArchitectureError,
    register_model,
)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it; our own modules register when they are first imported."""
    for module in (BUILT_IN | DRAFTS).values():
        import_module(module)
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """The entry points of other packages: those that the test adds."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
    return points


# --- the decorator -----------------------------------------------------------------------------------------------


def test_a_class_for_one_or_more_architectures() -> None:
    @register_model("FirstForCausalLM", "SecondForCausalLM")
    class Model:
        pass

    assert Model.__name__ == "Model"  # the class itself, not a wrapper
    assert registry.lookup("FirstForCausalLM") is registry.lookup("SecondForCausalLM") is Model
    assert {"FirstForCausalLM", "SecondForCausalLM"} <= set(registry.architectures())


def test_two_classes_for_one_architecture(installed: list[EntryPoint]) -> None:
    class Mine:
        pass

    class Yours:
        pass

    register_model("SameForCausalLM")(Mine)
    with pytest.raises(ValueError) as caught:
        register_model("SameForCausalLM")(Yours)
    prefix = f"{__name__}.test_two_classes_for_one_architecture.<locals>"
    assert str(caught.value) == (
        f"Architecture SameForCausalLM is registered twice: by {prefix}.Mine and by {prefix}.Yours; "
        "uninstall or rename one of them."
    )
    assert registry.lookup("SameForCausalLM") is Mine


def test_a_module_that_is_imported_again_registers_again() -> None:
    def define() -> type:
        class Model:
            pass

        return register_model("AgainForCausalLM")(Model)

    first, again = define(), define()
    assert first is not again


# --- finding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", BUILT_IN | DRAFTS)
def test_built_in_modules_register_what_they_are_named_for(architecture: str) -> None:
    module = import_module((BUILT_IN | DRAFTS)[architecture])
    found = registry.lookup(architecture)
    assert found.__module__ == module.__name__


def test_every_decorator_is_in_the_table() -> None:
    for module in {*BUILT_IN.values(), *DRAFTS.values()}:
        import_module(module)
    ours = {name for name, cls in registry._classes.items() if cls.__module__.startswith("vllm_ms_models.")}
    assert ours == {*BUILT_IN, *DRAFTS}
    folders = {
        f"vllm_ms_models.{path.parent.name}.model" for path in (REPOSITORY / "vllm_ms_models").glob("*/model.py")
    }
    assert folders - {"vllm_ms_models.bridge.model"} == set(BUILT_IN.values())


@pytest.mark.parametrize("architecture", DRAFTS)
def test_drafts_are_not_served_by_themselves(architecture: str) -> None:
    assert architecture not in registry.architectures()
    with pytest.raises(UnsupportedArchitectureError, match=architecture):
        registry.check(architecture)


def test_unknown_architectures_list_the_known_ones(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("ZebraForCausalLM", "zebra.model:Zebra", registry.ENTRY_POINT_GROUP))
    for look in (registry.check, registry.lookup):
        with pytest.raises(UnsupportedArchitectureError) as caught:
            look("GPT2LMHeadModel")
        assert str(caught.value) == (
            f"Architecture GPT2LMHeadModel has no MindSpore implementation here; supported are "
            f"{', '.join(sorted(BUILT_IN))}, ZebraForCausalLM. "
            "Another package can add one through the entry-point group vllm_ms_models.models."
        )


@pytest.mark.parametrize(
    ("architecture", "decoder"),
    [
        ("Qwen2Model", "Qwen2ForCausalLM"),
        ("Qwen3ForSequenceClassification", "Qwen3ForCausalLM"),
        ("LlamaForTokenClassification", "LlamaForCausalLM"),
        ("MistralForCausalLM", "MistralForCausalLM"),
        ("EmbeddingModel", "EmbeddingModel"),  # registered under that very name
    ],
)
def test_what_embeds_or_classifies_has_the_decoder_of_a_language_model(
    installed: list[EntryPoint], architecture: str, decoder: str
) -> None:
    installed.append(EntryPoint("EmbeddingModel", "other.model:Embedding", registry.ENTRY_POINT_GROUP))
    assert registry.unconverted(architecture) == decoder
    registry.check(decoder)


def test_other_packages_are_imported_only_when_used(
    installed: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_package.py").write_text(
        "from vllm_ms_models.registry import register_model\n@register_model('LateForCausalLM')\nclass Late: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    installed.append(EntryPoint("LateForCausalLM", "late_package:Late", registry.ENTRY_POINT_GROUP))
    assert "LateForCausalLM" in registry.architectures()
    registry.check("LateForCausalLM")
    assert "late_package" not in sys.modules
    assert registry.lookup("LateForCausalLM").__name__ == "Late"
    monkeypatch.delitem(sys.modules, "late_package")


def test_a_package_without_the_class_it_names(
    installed: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty_package.py").write_text("class Forgotten: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed.append(EntryPoint("EmptyForCausalLM", "empty_package:Forgotten", registry.ENTRY_POINT_GROUP))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        registry.lookup("EmptyForCausalLM")
    assert str(caught.value) == (
        "empty_package is named for EmptyForCausalLM but registers no class for it: "
        'decorate the class with @register_model("EmptyForCausalLM").'
    )
    monkeypatch.delitem(sys.modules, "empty_package")


# --- a process of vLLM -------------------------------------------------------------------------------------------

VLLM = """
import contextlib, io, json, sys

facts = {}

def stage(name):
    facts[name] = sorted({"mindspore", "torch", "vllm"} & set(sys.modules))

import vllm_ms_models.registry
vllm_ms_models.registry.architectures()
vllm_ms_models.register_platform()
stage("registry")

import vllm_ms_models.platform
stage("platform")

from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "--help"]
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    try:
        main()
    except SystemExit as end:
        facts["exit"] = end.code
facts["help"] = "serve" in printed.getvalue()
stage("command line")

from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
stage("plugins")

known = {}
for name in vllm_ms_models.registry.architectures():
    entry = ModelRegistry.models[name]
    model, seen = entry.load_model_cls(), entry.inspect_model_cls()
    known[name] = [model.__module__, model.architecture, seen.is_text_generation_model]
facts["models"] = known
facts["device"] = type(current_platform).__name__
stage("inspected")
print("FACTS", json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts() -> Iterator[dict[str, Any]]:
    """What a process of vLLM's has imported and knows after each stage of its life before a model runs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    ran = subprocess.run(
        [sys.executable, "-c", VLLM], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("FACTS ")]
    yield json.loads(line.removeprefix("FACTS "))


def test_the_registry_imports_nothing_large(facts: dict[str, Any]) -> None:
    assert facts["registry"] == []


def test_nothing_before_the_model_imports_mindspore(facts: dict[str, Any]) -> None:
    """The platform, `vllm --help`, the plugins, and vLLM's look at each class: seconds saved in every process."""
    assert (facts["exit"], facts["help"]) == (0, True)
    for stage in ("platform", "command line", "plugins", "inspected"):
        assert facts[stage] == ["torch", "vllm"], stage


def test_vllm_knows_our_models(facts: dict[str, Any]) -> None:
    """Under the architecture's name it has our class, not its own of the same name; encoders generate no text."""
    assert facts["device"] == "MindSporePlatform"
    for name in BUILT_IN:
        module = "encoder" if name in ENCODERS else "multimodal" if name in MULTIMODAL else "model"
        assert facts["models"].pop(name) == [f"vllm_ms_models.bridge.{module}", name, name not in ENCODERS]
    assert not facts["models"]


def test_encoders_are_built_in() -> None:
    assert set(BUILT_IN) >= ENCODERS
