"""Predictors by name, and their options from the environment and from plans.json.

Any package can offer a predictor: a subclass of ``nnUNetPredictor`` under a name in the entry-point group
``nnunetv2.predictors``. Nothing is imported until a predictor is asked for.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nnunet_lowmem.errors import ModelError, UsageError
from nnunet_lowmem.options import NOT_FOR_MODELS

logger = logging.getLogger(__name__)

GROUP = "nnunetv2.predictors"
#: Known without looking through the installed packages, so that a start-up costs nothing and needs no metadata.
OWN = EntryPoint("lowmem", "nnunet_lowmem.predictor:LowMemPredictor", GROUP)

# names a file, in `nnunet_lowmem.system.clock`, and no option
_TRACE_VARIABLE = "nnunet_lowmem_trace"
_TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def predictors() -> dict[str, type]:
    """Load every predictor that there is; one that cannot be loaded is named in a warning and left out."""
    found: dict[str, type] = {}
    for entry in _entries():
        try:
            found.setdefault(entry.name, _load(entry))
        except UsageError as error:
            logger.warning("%s", error)
    return found


def find(name: str) -> EntryPoint:
    """Return where the predictor of that name is, without loading it.

    Raises
    ------
    UsageError
        If there is none; lists those that exist.
    """
    if (entry := entry_of(name)) is not None:
        return entry
    known = ", ".join(sorted(predictors()))
    raise UsageError(f"there is no predictor named {name!r}; installed are: {known} (entry-point group {GROUP})")


def entry_of(name: str) -> EntryPoint | None:
    """Return where the predictor of that name is, or None, without loading any."""
    return next((entry for entry in _entries() if entry.name == name), None)


def load(name: str) -> type:
    """Return the predictor class of that name.

    Raises
    ------
    UsageError
        If there is none, or it cannot be loaded.
    """
    return _load(find(name))


def options(name: str, predictor: type, plans: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword-only arguments of a predictor from outside the code.

    Those of ``"predictor_options"`` in plans that name this predictor, overruled by the variables
    ``nnUNet_<name>_<argument>``.

    Raises
    ------
    UsageError
        If an option does not exist or its value cannot be read.
    """
    return {**_from_plans(name, predictor, plans or {}), **_from_environment(name, predictor)}


def _entries() -> Iterator[EntryPoint]:
    yield OWN
    yield from (entry for entry in entry_points(group=GROUP) if entry.name != OWN.name)


def _load(entry: EntryPoint) -> type:
    try:
        predictor = entry.load()
    except Exception as error:
        origin = "" if entry.dist is None else f" of {entry.dist.name} {entry.dist.version}"
        raise UsageError(
            f"predictor {entry.name!r} ({entry.value}{origin}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(predictor, type):
        raise UsageError(f"predictor {entry.name!r} ({entry.value}) is no class but {predictor!r}")
    return predictor


def _from_environment(name: str, predictor: type) -> dict[str, Any]:
    prefix = f"nnunet_{name}_".lower()
    found = {}
    for variable, text in os.environ.items():
        # the names are upper case on Windows
        if variable.lower().startswith(prefix) and variable.lower() != _TRACE_VARIABLE:
            option = variable[len(prefix) :].lower()
            argument, value = _argument(predictor, option, text, variable)
            found[argument] = value
    return found


def _from_plans(name: str, predictor: type, plans: Mapping[str, Any]) -> dict[str, Any]:
    if plans.get("predictor") != name:
        return {}
    block = plans.get("predictor_options", {})
    if not isinstance(block, dict):
        raise ModelError(f"'predictor_options' of the plans must be a JSON object, got {block!r}")
    found = {}
    for option, value in block.items():
        origin = f"'predictor_options' of the plans: {option}"
        argument, converted = _argument(predictor, option, str(value), origin)
        if "PathLike" in _keywords(predictor)[argument] or argument in NOT_FOR_MODELS:
            raise ModelError(f"{origin} is not for a model to choose; it may choose sizes and numbers")
        found[argument] = converted
    return found


def _argument(predictor: type, option: str, text: str, origin: str) -> tuple[str, Any]:
    """Return the argument that `option` means, as ``worker_timeout`` means ``worker_timeout_s``, and its value."""
    keywords = _keywords(predictor)
    argument = option if option in keywords else f"{option}_s"
    if argument not in keywords:
        raise UsageError(f"{origin}: {predictor.__name__} has no option {option!r}; it has: {', '.join(keywords)}")
    try:
        return argument, _converter(keywords[argument])(text)
    except (ValueError, KeyError):
        raise UsageError(f"{origin} must be of type {keywords[argument]}, got {text!r}") from None


def _keywords(predictor: type) -> dict[str, str]:
    """Keyword-only arguments and their types as text; without callbacks, which no text can give."""
    parameters = inspect.signature(predictor).parameters.values()
    types = {p.name: inspect.formatannotation(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: text.strip("'") for name, text in types.items() if "Callable" not in text}


def _converter(annotation: str) -> Callable[[str], Any]:
    if annotation == "bool | str":
        return lambda text: _TRUTHS.get(text.lower(), text)
    if "bool" in annotation:
        return lambda text: _TRUTHS[text.lower()]
    if "Sequence" in annotation:
        return lambda text: tuple(word.strip() for word in text.split(",") if word.strip())
    if "str" in annotation or "Path" in annotation:
        return str
    return float if "float" in annotation else int
