"""The table of what a checkpoint may hold beside what torch reads by itself, and how each is built.

Nothing here calls what a file names: a value is built with public constructors, from arguments that were looked at. So
nothing reaches numpy's ``__setstate__``, which believes flags and lengths, or an import.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import random
import re
import sys
import types
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

#: State and items of what has none.
NONE: Any = object()


@dataclass(frozen=True)
class Parts:
    """What one object is to be built from.

    Attributes
    ----------
    arguments : tuple
    state : object
        `NONE` without one.
    items : object
        Of a container: dict or list.
    """

    arguments: tuple[Any, ...]
    state: Any
    items: Any


def _checked(make: Callable[..., Any], *kinds: type | tuple[type, ...]) -> Callable[[Parts], Any]:
    """Build with `make` from arguments of these kinds, the last of which may be left out or repeated."""

    def build(parts: Parts) -> Any:
        for position, argument in enumerate(parts.arguments):
            if not isinstance(argument, kinds[min(position, len(kinds) - 1)]):
                raise TypeError(f"argument {position} is a {type(argument).__name__}")
        return make(*parts.arguments)

    return build


def _with_attributes(make: Callable[[], Any]) -> Callable[[Parts], Any]:
    def build(parts: Parts) -> Any:
        made = make()
        vars(made).update({} if parts.state is NONE else {str(name): value for name, value in parts.state.items()})
        return made

    return build


def _path(concrete: type, pure: type) -> Callable[[Parts], Any]:
    """Build a path; one of the other kind of system is only its name here."""
    same_system = issubclass(type(pathlib.Path()), concrete)
    return _checked(concrete if same_system else pure, str)


def _default_dict(parts: Parts) -> Any:
    (factory,) = parts.arguments or (None,)
    if factory is not None and factory not in _FACTORIES:
        raise TypeError(f"its factory is {factory!r}")
    return collections.defaultdict(factory, parts.items)


def _deque(parts: Parts) -> Any:
    items, length = (*parts.arguments, None, None)[:2]
    return collections.deque([*(items or ()), *parts.items], length)


def _partial(parts: Parts) -> Any:
    function, arguments, keywords, _ = parts.state
    if function not in _FACTORIES:
        raise TypeError(f"it calls {function!r}")
    return functools.partial(function, *arguments, **(keywords or {}))


def _fraction(*parts: int | str) -> Any:
    for part in parts:  # a text may have an exponent, which costs without end
        if isinstance(part, str) and not re.fullmatch(r"-?\d+(/\d+)?", part, re.ASCII):
            raise ValueError(f"{part[:40]!r} is not written as a fraction")
    return fractions.Fraction(*parts)


def _random(parts: Parts) -> Any:
    made = random.Random()
    made.setstate(parts.state)
    return made


def _type_of_constant(parts: Parts) -> Any:
    (constant,) = parts.arguments
    if not any(constant is known for known in (None, Ellipsis, NotImplemented)):
        raise TypeError("it is the type of more than a constant")
    return type(constant)


# -- numpy


def _dtype(parts: Parts) -> np.dtype[Any]:
    """Build a dtype from its code and state; what numpy's own ``__setstate__`` takes over unseen is derived anew."""
    code = parts.arguments[0]
    _, order, subarray, names, fields, size, _, flags = (*parts.state, 0)[:8]
    if subarray is not None:
        of_arrays: np.dtype[Any] = np.dtype((subarray[0], subarray[1]))
        return of_arrays
    if names is not None:
        titled = {name: (*fields[name], None)[:3] for name in names}
        layout: Any = {
            "names": list(names),
            "formats": [titled[name][0] for name in names],
            "offsets": [titled[name][1] for name in names],
            "titles": [titled[name][2] for name in names],
            "itemsize": size,
        }
        of_records: np.dtype[Any] = np.dtype(layout, align=bool(flags & 0x80))
        return of_records
    if not isinstance(code, str) or not re.fullmatch(r"[?bBiufcSUVOMm]\d*", code, re.ASCII):
        raise TypeError(f"{code!r} is not the code of a dtype")
    if code[0] in "mM" and len(parts.state) > 8:
        unit, number = parts.state[8][1][:2]
        unit = unit.decode() if isinstance(unit, bytes) else unit
        code += "" if unit == "generic" else f"[{int(number)}{unit}]"
    return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


def _scalar(parts: Parts) -> Any:
    dtype, content = parts.arguments
    if dtype.hasobject:
        raise TypeError("a scalar of numpy holds no objects")
    return _from_bytes((), dtype, content, fortran=False)[()]


def _array(parts: Parts) -> np.ndarray[Any, Any]:
    kind, *_ = parts.arguments
    _, shape, dtype, fortran, content = parts.state
    if kind is not np.ndarray:
        raise TypeError(f"it is a {kind!r}")
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    if not dtype.hasobject:
        return _from_bytes(shape, dtype, content, fortran)
    if not isinstance(content, list):
        raise TypeError(f"objects of type {dtype} stored as {type(content).__name__}")
    line = np.empty(len(content), dtype)
    for position, item in enumerate(content):
        line[position] = item
    return np.asarray(line.reshape(shape), order="F" if fortran else "C")


def _from_bytes(shape: Any, dtype: np.dtype[Any], content: bytes, fortran: bool) -> np.ndarray[Any, Any]:
    """Copy bytes into an array; numpy refuses fewer than the shape needs, and objects."""
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, content, order="F" if fortran else "C")
    if array.nbytes != len(content):
        raise ValueError(f"{len(content)} bytes for an array of {array.nbytes}")
    return array.copy(order="K")


# -- the table


#: Functions and classes that a checkpoint may call, by the names under which it calls them.
BUILT: dict[str, Callable[[Parts], Any]] = {
    # numbers, and what Python builds from plain values
    "builtins.bytes": _checked(lambda: b"", ()),
    "builtins.frozenset": _checked(frozenset, (list, tuple, set)),
    "builtins.range": _checked(range, int),
    "builtins.slice": _checked(slice, object),
    "builtins.type": _type_of_constant,
    "decimal.Decimal": _checked(decimal.Decimal, str),
    "fractions.Fraction": _checked(_fraction, (int, str)),
    "uuid.UUID": lambda parts: uuid.UUID(int=parts.state["int"]),
    "random.Random": _random,
    # containers: their items are those of a dict or list
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    "collections.UserDict": _with_attributes(collections.UserDict),
    "collections.UserList": _with_attributes(collections.UserList),
    "collections.ChainMap": _with_attributes(collections.ChainMap),
    "argparse.Namespace": _with_attributes(argparse.Namespace),
    "types.SimpleNamespace": _with_attributes(types.SimpleNamespace),
    # calls nothing before it is called, and then a class of `_FACTORIES`
    "functools.partial": _partial,
    # dates are kept as bytes, which their constructors check
    "datetime.date": _checked(datetime.date, (bytes, int)),
    "datetime.time": _checked(datetime.time, (bytes, int), (int, datetime.tzinfo)),
    "datetime.datetime": _checked(datetime.datetime, (bytes, int), (int, datetime.tzinfo)),
    "datetime.timedelta": _checked(datetime.timedelta, int),
    "datetime.timezone": _checked(datetime.timezone, datetime.timedelta, str),
    # names of files; none is opened
    **{
        f"{module}.{name}": _path(getattr(pathlib, name), getattr(pathlib, pure))
        for module in ("pathlib", "pathlib._local")  # Python 3.13
        for name, pure in (
            ("PosixPath", "PurePosixPath"),
            ("WindowsPath", "PureWindowsPath"),
            ("PurePosixPath", "PurePosixPath"),
            ("PureWindowsPath", "PureWindowsPath"),
        )
    },
    "torch.torch_version.TorchVersion": _checked(torch.torch_version.TorchVersion, str),
    # numpy moved the functions that rebuild; checkpoints hold the names of the numpy that wrote them
    "numpy.dtype": _dtype,
    **{
        f"numpy.{module}.multiarray.{name}": build
        for module in ("core", "_core")
        for name, build in (("scalar", _scalar), ("_reconstruct", _array))
    },
}

#: Containers that receive their items after they are made; torch's unpickler adds items to these types alone.
CONTAINERS: Mapping[str, type] = {"collections.defaultdict": collections.OrderedDict, "collections.deque": list}

#: What a factory or a partial may call: makes an empty or a converted value.
_FACTORIES: tuple[Any, ...] = (
    *(bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, object),
    *(collections.OrderedDict, collections.Counter, collections.deque, collections.defaultdict),
)

#: Names that stand for themselves.
VALUES: dict[str, Any] = {
    "builtins.Ellipsis": Ellipsis,
    "builtins.NotImplemented": NotImplemented,
    "builtins.bytearray": bytearray,
    **{f"{kind.__module__}.{kind.__name__}": kind for kind in _FACTORIES},
    **{f"numpy.{kind.__name__}": kind for kind in {*np.sctypeDict.values(), np.ndarray, np.dtype}},
    "numpy.bool_": np.bool_,
}

#: Objects of these remain records: their constructors believe what they are given, and no prediction needs them.
_KEPT = (
    *("numpy.random._pickle.", "numpy.random._mt19937.", "numpy.random._pcg64.", "numpy.random._philox."),
    *("numpy.random._sfc64.", "numpy.random.bit_generator.", "numpy.random.mtrand.", "numpy.random._generator."),
    *("numpy.ma.core._mareconstruct", "numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray", "torch._C.Generator"),
    "re._compile",
)
#: Classes of these, too: parts of a network and of its training, where somebody has stored them whole.
_KEPT_CLASSES = ("torch.nn", "torch.optim", "torch.amp", "torch.cuda.amp", "dynamic_network_architectures", "nnunetv2")
#: Enumerations and named tuples of these are plain values.
_PLAIN_HOMES = (*sys.stdlib_module_names, "numpy", "torch", "nnunetv2")


def value_of(name: str) -> Any:
    """Return what a name by itself stands for, `NONE` where it may not stand for anything."""
    if name in VALUES:
        return VALUES[name]
    found = _loaded_class(name)
    return NONE if found is None or not (name in BUILT or is_kept(name) or _is_plain(name, found)) else found


def builder_of(name: str) -> Callable[[Parts], Any] | None:
    """Return how an object of that name is built; None where it may not be."""
    if name in BUILT:
        return BUILT[name]
    found = _loaded_class(name)
    return functools.partial(_plain, found) if found is not None and _is_plain(name, found) else None


def is_kept(name: str) -> bool:
    """Whether objects of that name are left as records."""
    module = name.rpartition(".")[0]
    in_kept_class = any(name.startswith(f"{home}.") for home in _KEPT_CLASSES)
    return name.startswith(_KEPT) or (in_kept_class and (module not in sys.modules or _loaded_class(name) is not None))


def _plain(kind: type, parts: Parts) -> Any:
    if issubclass(kind, enum.Enum):
        (value,) = parts.arguments
        return kind(value)
    return kind.__new__(kind, *parts.arguments)


def _is_plain(name: str, kind: type) -> bool:
    """Whether it is an enumeration or a named tuple, of which any may be made."""
    named_tuple = issubclass(kind, tuple) and (hasattr(kind, "_fields") or hasattr(kind, "n_sequence_fields"))
    return name.partition(".")[0] in _PLAIN_HOMES and (issubclass(kind, enum.Enum) or named_tuple)


def _loaded_class(name: str) -> type | None:
    """Look a class up without importing anything: a module that nobody has loaded may do things when it is."""
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    at_home = isinstance(found, type) and str(found.__module__).partition(".")[0] == name.partition(".")[0]
    return found if at_home else None
