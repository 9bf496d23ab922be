"""Stands for packages that a stack imports and does not use here: Triton (a gigabyte, for GPUs), torchaudio."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class Nothing(ModuleType):
    """Whatever is imported from it is nothing too; as a decorator it leaves a function as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> ModuleType:
        return Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_for(*names: str) -> None:
    sys.meta_path.insert(0, _Finder(names))
