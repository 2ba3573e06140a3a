"""A registry that fills itself from the modules of one package, so that a new kind is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from engine.errors import InvalidArgumentError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to entries; modules of ``package`` register theirs when first imported.

    Args:
        kind: what an entry is, for messages ("model type").
        package: dotted name of the package whose modules register entries; imported at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._filled = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: enters its argument under every name. A name taken twice is a bug, so it asserts."""

        def enter(entry: T) -> T:
            for name in names:
                assert name not in self._entries, f"two {self._kind}s are called {name!r}"
                self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            InvalidArgumentError: naming the known ones.
        """
        self._fill()
        if name not in self._entries:
            raise InvalidArgumentError(
                f"unknown {self._kind} {name!r}; accepted: {', '.join(sorted(self._entries))}", reason="UNSUPPORTED"
            )
        return self._entries[name]

    def names(self) -> Iterable[str]:
        """All names, sorted."""
        self._fill()
        return sorted(self._entries)

    def _fill(self) -> None:
        if self._filled:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._filled = True
