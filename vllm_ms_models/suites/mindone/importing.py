"""Importing mindone's modules beside vLLM's transformers, without changing a module of anybody.

mindone is written for another version of transformers, and its packages import all that they hold: neither can be
imported here. A finder on `sys.meta_path` therefore loads what lies in mindone's folder, and only that, in its own way:

- the packages of `BYPASSED` are made without running their `__init__`, so that a module is imported alone;
- what its modules import from `mindspore`, `transformers` and mindone itself, they see through `View`s: the modules as
  they are, but with the names of `overrides` in place of, or besides, their own.

Views are what other modules do not see: to them, mindspore and transformers stay what they are.
"""

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "mindone"

Overrides = Mapping[str, Mapping[str, Any]]
"""Dotted name of a module -> names in it -> what mindone's modules see under that name."""


class View(ModuleType):
    """A module as mindone sees it: `names` come first, modules within it are seen in the same way."""

    def __init__(self, module: ModuleType, views: "Views") -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__["_module"] = module
        self.__dict__["_views"] = views
        self.__dict__.update(views.overrides.get(module.__name__, {}))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, ModuleType):
            value = self._views.of(value)
        self.__dict__[name] = value
        return value


class Views:
    """One view of each module that `overrides` says something of, or of what lies in it."""

    def __init__(self, overrides: Overrides) -> None:
        self.overrides = overrides
        self.parents = {".".join(name.split(".")[:n]) for name in overrides for n in range(1, name.count(".") + 2)}
        self.made: dict[str, View] = {}

    def of(self, module: ModuleType) -> ModuleType:
        name = module.__name__
        if name not in self.parents or isinstance(module, View):
            return module
        if name not in self.made:
            self.made[name] = View(module, self)
        return self.made[name]

    def import_module(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`__import__` of mindone's modules."""
        return self.of(builtins.__import__(name, globals, locals, fromlist or (), level))


class _Loader(Loader):
    """Loads a module of mindone as `inner` does, with another `__import__`."""

    def __init__(self, inner: Loader, views: Views) -> None:
        self.inner = inner
        self.builtins = {**vars(builtins), "__import__": views.import_module}

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self.builtins
        self.inner.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        """`get_source` and the like, for tracebacks and `inspect`."""
        return getattr(self.inner, name)


class _Nothing(Loader):
    """Makes a package without running its `__init__`."""

    def exec_module(self, module: ModuleType) -> None:
        """Its modules are found by its path, which the import system sets."""


class Finder(MetaPathFinder):
    """Finds mindone's modules where Python would, and loads them as this module's text says."""

    def __init__(self, bypassed: Sequence[str], overrides: Overrides) -> None:
        self.bypassed = bypassed
        self.views = Views(overrides)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Nothing() if fullname in self.bypassed else _Loader(spec.loader, self.views)
        return spec


def install(bypassed: Sequence[str], overrides: Overrides) -> None:
    """Have mindone imported so from now on in this process."""
    sys.meta_path.insert(0, Finder(bypassed, overrides))
