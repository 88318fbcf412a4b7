"""Arguments by the signature of the nnU-Net that is installed: newer and forked versions take some of their own.

Positions and defaults are those of the installed method, and what only it knows is told apart from what ours takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def merged(stock: Any, own: Callable[..., Any]) -> inspect.Signature:
    """Return the parameters of the installed method, then those that only ours has.

    Parameters
    ----------
    stock : callable, or None
        Ours alone counts without one, or where it does not say what it takes by position.
    own : callable
    """
    ours = [p for p in inspect.signature(own).parameters.values() if p.kind is not p.VAR_KEYWORD]
    try:
        theirs = list(inspect.signature(stock).parameters.values())
    except (TypeError, ValueError):
        theirs = []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in theirs):
        theirs = []
    known = {parameter.name for parameter in theirs}
    together = [*theirs, *(parameter for parameter in ours if parameter.name not in known)]
    return inspect.Signature(sorted(together, key=lambda parameter: parameter.kind))


def sort_out(
    stock: Any, own: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name all arguments; return those that ours takes, and the others, unless they say what they say by default.

    Raises
    ------
    TypeError
        If an argument is missing, or neither knows it.
    """
    bound = merged(stock, own).bind(*arguments, **keywords)
    bound.apply_defaults()
    ours = set(inspect.signature(own).parameters)
    known, foreign = {}, {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            foreign.update(value)
        elif name in ours:
            known[name] = value
        elif not _is_same(value, parameter.default):
            foreign[name] = value
    return known, foreign


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, int | float | str) and value == default
    )
