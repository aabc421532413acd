"""Modules that are imported when something of them is used, not because another module names them in passing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _DeferredModule(ModuleType):
    """Stands for a module until anything is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(
            "__"
        ):  # as of every module that is there; whoever looks through them all needs nothing of it
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def defer_import(name: str) -> None:
    """``import name`` does nothing from now on, unless it has been done; to use anything of the module imports it."""
    sys.modules.setdefault(name, _DeferredModule(name))
