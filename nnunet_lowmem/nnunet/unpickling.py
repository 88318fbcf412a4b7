"""Reads a checkpoint with torch's restricted unpickler, and only then builds what it holds beside tensors.

For every name that torch does not read by itself, its unpickler gets a stand-in that records what was to be built and
builds nothing. When the whole file is read, the records are turned into values by the table in `harmless`, or the names
are refused, with the place in the checkpoint. So nothing that a file names is called while it is read.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nnunet_lowmem.nnunet import harmless
from nnunet_lowmem.nnunet.harmless import NONE, Parts

#: Files that name more kinds of things are no checkpoints.
_MOST_NAMES = 1000
_NOT_LISTED = re.compile(r"Unsupported global: GLOBAL (\S+)")
#: Types of which nothing is made; told apart early, since a checkpoint holds many.
_PLAIN = frozenset({type(None), bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter})
# torch's list of names belongs to the whole process
_LOCK = threading.RLock()


class RefusedError(Exception):
    """The checkpoint holds what is not built.

    Attributes
    ----------
    names : dict of str to str
        Each name, and where in the checkpoint it was met first.
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__(", ".join(f"{name} at {where}" for name, where in names.items()))
        self.names = names


class _Record:
    """What an object was to be built from; one subclass for each name of a file."""

    __slots__ = ("arguments", "called", "state")
    arguments: tuple[Any, ...]
    called: bool
    state: Any
    name: str
    noted: dict[int, tuple[Any, _Record]]

    def __new__(cls, *arguments: Any) -> Any:
        record = super().__new__(cls)
        record.arguments, record.called, record.state = arguments, False, NONE
        if cls.name not in harmless.CONTAINERS:
            return record
        container = harmless.CONTAINERS[cls.name]()
        cls.noted[id(container)] = container, record
        return container

    def __init__(self, *arguments: Any) -> None:
        self.called = True  # and not made by __new__ alone

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return self.name  # torch's messages show what it refuses


def load(path: Path, device: str, find: Callable[[str], Any]) -> Any:
    """Read a checkpoint, its tensors to a device.

    Parameters
    ----------
    path : Path
    device : str
    find : callable
        Returns the class or function that the user trusts under a name, or None.

    Raises
    ------
    RefusedError
        If it holds what is not built.
    pickle.UnpicklingError
        If torch's unpickler refuses it.
    """
    names = {*harmless.BUILT, *harmless.VALUES}
    while True:
        noted: dict[int, tuple[Any, _Record]] = {}
        try:
            with _stand_ins(names, noted):
                # as an attribute of torch, and with stock's types: tools put loaders of their own in its place
                read = torch.load(str(path), map_location=torch.device(device), weights_only=True)
            break
        except pickle.UnpicklingError as error:
            found = _NOT_LISTED.search(str(error))
            name = "" if found is None else found[1] if "." in found[1] else f"builtins.{found[1]}"
            if not name or name in names or len(names) > _MOST_NAMES:
                raise
            names.add(name)
    building = _Building(noted, find)
    built = building.value(read, "")
    if building.refused:
        raise RefusedError(building.refused)
    return built


@contextlib.contextmanager
def _stand_ins(names: set[str], noted: dict[int, tuple[Any, _Record]]) -> Iterator[None]:
    """Let torch's unpickler make records for these names; what else the program has listed stays listed."""
    with _LOCK:
        former = torch.serialization.get_safe_globals()
        listed = [entry for entry in former if _name(entry) not in names]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*listed, *((_record_class(name, noted), name) for name in names)])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(former)


def _record_class(name: str, noted: dict[int, tuple[Any, _Record]]) -> type:
    # and classes by their module and name
    module, _, attribute = name.rpartition(".")
    return type(attribute, (_Record,), {"__slots__": (), "__module__": module, "name": name, "noted": noted})


def _name(listed: Any) -> str:
    return str(listed[1]) if isinstance(listed, tuple) else f"{listed.__module__}.{listed.__qualname__}"


class _Building:
    """Turns records into values, inside the containers that hold them; what is none stays as it is.

    Attributes
    ----------
    refused : dict of str to str
        Names that may not be built, and where they were met first.
    """

    def __init__(self, noted: dict[int, tuple[Any, _Record]], find: Callable[[str], Any]) -> None:
        self.refused: dict[str, str] = {}
        self._noted = noted
        self._find = find
        self._done: dict[int, tuple[Any, Any]] = {}  # with the original, so that its id stays its own

    def value(self, read: Any, where: str) -> Any:
        """Return what `read` stands for."""
        if isinstance(read, type) and issubclass(read, _Record):
            return self._named(read.name, where)
        if id(read) in self._done:
            return self._done[id(read)][1]
        change = self._change_of(read)
        if change is None:
            return read
        if change in (self._dict, self._list):
            self._done[id(read)] = read, read  # may hold itself
        self._done[id(read)] = read, change(read, where)
        return self._done[id(read)][1]

    def _change_of(self, read: Any) -> Callable[[Any, str], Any] | None:
        if id(read) in self._noted:
            return self._container
        if isinstance(read, _Record):
            return self._object
        if type(read) in (dict, OrderedDict, Counter):
            return self._dict
        if type(read) is list:
            return self._list
        return self._unchangeable if type(read) in (tuple, set) else None

    def _dict(self, read: Any, where: str) -> Any:
        built = [(self.value(key, where), self._item(item, where, key)) for key, item in read.items()]
        if any(
            old is not new for pair in zip(read.items(), built, strict=True) for old, new in zip(*pair, strict=True)
        ):
            read.clear()
            for key, item in built:
                read[key] = item
        return read

    def _list(self, read: list[Any], where: str) -> Any:
        read[:] = [self._item(item, where, position) for position, item in enumerate(read)]
        return read

    def _unchangeable(self, read: Any, where: str) -> Any:
        built = [self._item(item, where, position) for position, item in enumerate(read)]
        return read if all(old is new for old, new in zip(read, built, strict=True)) else type(read)(built)

    def _item(self, item: Any, where: str, key: Any) -> Any:
        return item if type(item) in _PLAIN else self.value(item, f"{where}[{key!r}]")

    def _container(self, read: Any, where: str) -> Any:
        container, record = self._noted[id(read)]
        items = self._dict(container, where) if isinstance(container, dict) else self._list(container, where)
        return self._object(record, where, items)

    def _named(self, name: str, where: str) -> Any:
        found = harmless.value_of(name)
        found = self._find(name) if found is NONE else found
        if found is None:
            self.refused.setdefault(name, where)
        return found

    def _object(self, record: _Record, where: str, items: Any = NONE) -> Any:
        build = harmless.builder_of(record.name)
        trusted = self._find(record.name) if build is None else None
        if build is None and trusted is None and not harmless.is_kept(record.name):
            self.refused.setdefault(record.name, where)
        arguments = tuple(self.value(argument, where) for argument in record.arguments)
        state = self.value(record.state, where)
        if trusted is not None:
            return _as_pickle_does(trusted, record.called, arguments, state)
        if build is None or self.refused:
            return record
        try:
            return build(Parts(arguments, state, items))
        except Exception as error:
            self.refused.setdefault(record.name, f"{where} ({type(error).__name__}: {error})")
            return record


def _as_pickle_does(trusted: Any, called: bool, arguments: tuple[Any, ...], state: Any) -> Any:
    made = trusted(*arguments) if called else trusted.__new__(trusted, *arguments)
    if state is NONE:
        return made
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return made
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    vars(made).update(attributes or {})
    for name, value in (slots or {}).items():
        setattr(made, name, value)
    return made
