"""Exchanges an object for another in every module that holds it under some name.

Modules are looked at through their dictionaries only: asking a lazy module for an attribute would load it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from types import FunctionType
from typing import Any

Namespace = dict[str, Any]


def rebind(old: object, new: object, spared: Collection[str]) -> None:
    """Let every global name that means `old` mean `new`, except in the packages `spared`."""
    for _, namespace in _namespaces(spared):
        for name, value in list(namespace.items()):
            if value is old:
                namespace[name] = new


def unreachable(target: type, replacement: type, spared: Collection[str]) -> list[str]:
    """List the subclasses, class attributes, arguments and containers of modules that hold `target`.

    The replacement is a subclass, too, but no place that was missed.
    """
    return sorted(
        f"{module}.{name}"
        for module, namespace in _namespaces(spared)
        for name, value in list(namespace.items())
        if value is not replacement and _holds(module, value, target)
    )


def _namespaces(spared: Collection[str]) -> Iterator[tuple[str, Namespace]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in spared:
            try:
                # not vars(): a lazy module overrides how its attributes are read, its dictionary included
                yield name, object.__getattribute__(module, "__dict__")
            except AttributeError:
                continue


def _holds(module: str, value: Any, target: type) -> bool:
    # type() instead of isinstance(), which asks the object itself for its class
    kind = type(value)
    if kind is FunctionType:
        held = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return value.__module__ == module and _contains(held, target)
    if issubclass(kind, type):
        bases, members = type.__getattribute__(value, "__mro__"), type.__getattribute__(value, "__dict__")
        own = members.get("__module__") == module
        return own and value is not target and _contains([*bases, *members.values()], target)
    if kind is dict:
        return _contains(list(value.values()), target)
    return kind in (list, tuple) and _contains(value, target)


def _contains(values: Collection[Any], target: type) -> bool:
    return any(value is target for value in values)
