"""Where models come from: this package, or one of MindSpore's own suites of models, which are optional.

`--additional-config '{"model_source": "mindone"}'` chooses a suite; nothing of it is imported otherwise. Each suite has
one package here, its adapter, which imports neither the suite nor MindSpore before `build` is called:

- `check()` raises `SuiteError`, one sentence, unless a version of the suite that works here is installed;
- `TENSOR_PARALLEL` says whether its models can be split over ranks;
- `architectures()` are those that it can serve, by their names in config.json;
- `check_model(architecture, hf_config, dtype, ranks)` raises `SuiteError` for a model that cannot be built, such as one
  that so many tensor-parallel ranks cannot share, or that the suite would build otherwise than its config says;
- `build(architecture, hf_config, context)` makes the Cell that `bridge/model.py` serves.

Like the platform, this is imported by every process of vLLM: no MindSpore here.
"""

from collections.abc import Collection
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, cast

NATIVE = "native"
OPTION = "model_source"

SOURCES = {
    "mindone": "vllm_ms_models.suites.mindone",
    "mindformers": "vllm_ms_models.suites.mindformers",
}

# Architectures that this package has no model of -> the suites that have one.
ADDED: dict[str, tuple[str, ...]] = {
    "ArceeForCausalLM": ("mindone",),
    "Ernie4_5ForCausalLM": ("mindone",),
    "Exaone4ForCausalLM": ("mindone",),
    "HeliumForCausalLM": ("mindone",),
    "HunYuanDenseV1ForCausalLM": ("mindone",),
    "OlmoForCausalLM": ("mindone",),
    "SeedOssForCausalLM": ("mindone",),
    "SmolLM3ForCausalLM": ("mindone",),
    "Starcoder2ForCausalLM": ("mindone",),
}


class SuiteError(ValueError):
    """A suite that cannot be used: unknown, not installed, of another version, or without the model."""


class Adapter(Protocol):
    """What the package of a suite offers."""

    TENSOR_PARALLEL: bool

    def check(self) -> None: ...

    def architectures(self) -> Collection[str]: ...

    def check_model(self, architecture: str, hf_config: Any, dtype: str, ranks: int) -> None: ...

    def build(self, architecture: str, hf_config: Any, context: Any) -> Any: ...


def source(vllm_config: Any) -> str:
    """What `--additional-config` names as the source of models, "native" by default; SuiteError if it is not known."""
    options = vllm_config.additional_config
    name = options.get(OPTION, NATIVE) if isinstance(options, dict) else NATIVE
    if not (isinstance(name, str) and name in (NATIVE, *SOURCES)):
        raise SuiteError(
            f"--additional-config: {OPTION} {name!r} is not known; it is one of {', '.join((NATIVE, *SOURCES))}."
        )
    return name


def adapter(name: str) -> Adapter:
    """The adapter of the suite `name`, one of SOURCES. Imports neither the suite nor MindSpore."""
    return cast(Adapter, import_module(SOURCES[name]))


def check_architecture(name: str, architecture: str) -> None:
    """SuiteError, with the names of those that there are, unless the suite can serve `architecture`."""
    known = sorted(adapter(name).architectures())
    if architecture not in known:
        raise SuiteError(
            f"{architecture} is not served from {name}; its models that are served here are {', '.join(known)}; "
            f"leave out {OPTION} to use this package's own."
        )


def require(name: str, distribution: str, versions: Collection[str], others: Collection[str] = ()) -> None:
    """SuiteError, in one sentence, unless one of `versions` of the suite's distribution on PyPI is installed.

    `others` are distributions that it cannot be imported without, and that vLLM does not bring.
    """
    found = _installed(distribution)
    missing = [other for other in others if _installed(other) is None]
    if found in versions and not missing:
        return
    *_, newest = versions
    if found in versions:
        problem = f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
    else:
        problem = f"works with {distribution} {' or '.join(versions)}, and {found or 'none'} is installed"
    wanted = ([] if found in versions else [f"{distribution}=={newest}"]) + missing
    raise SuiteError(
        f"{OPTION} {name!r} {problem}; run `pip install --no-deps {' '.join(wanted)}` (what pip would add by itself "
        "replaces packages of vLLM)."
    )


def _installed(distribution: str) -> str | None:
    """Its version; None without it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
