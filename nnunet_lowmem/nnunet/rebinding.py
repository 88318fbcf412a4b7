"""Exchanges an object for another in every module that holds it under some name.

Modules are looked at through their dictionaries only: asking a lazy module for an attribute would load it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial
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
    """List what modules hold `target` in other ways than by a name of their own.

    Instances, subclasses, class attributes, default arguments, closures, partials and containers.

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
    if kind is target:
        return True
    if kind is FunctionType:
        return value.__module__ == module and _contains(_held_by_function(value), target)
    if issubclass(kind, type):
        own = type.__getattribute__(value, "__dict__").get("__module__") == module
        return own and value is not target and _contains(_held_by_class(value), target)
    if kind is partial:
        return _contains([value.func, *value.args, *value.keywords.values()], target)
    if kind is dict:
        return _contains(list(value.values()), target)
    return kind in (list, tuple, set, frozenset) and _contains(value, target)


def _held_by_class(value: type) -> Iterator[Any]:
    yield from type.__getattribute__(value, "__mro__")
    for member in list(type.__getattribute__(value, "__dict__").values()):
        yield member
        if type(member) is FunctionType:
            yield from _held_by_function(member)


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing in it yet
            yield cell.cell_contents


def _contains(values: Iterable[Any], target: type) -> bool:
    return any(value is target for value in values)
