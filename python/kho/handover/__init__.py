"""Operations on whole handovers: write, describe, attribute to owners, check, convert, compare, extract, draw."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a module of this package on first use."""
        if name not in {module.name for module in iter_modules(__path__)}:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f".{name}", __name__)
