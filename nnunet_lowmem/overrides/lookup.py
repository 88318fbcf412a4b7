"""What of nnU-Net our way bypasses, and whether somebody has put something else in its place.

Programs subclass nnU-Net's predictor, set methods on objects, and patch classes and modules. Whatever our way calls is
theirs by itself; what it does *instead* is listed in `ROWS`. Where a name of a row is neither nnU-Net's nor ours,
nnU-Net's way is taken from that step on.

A function counts as nnU-Net's if it was compiled from the file of nnU-Net's module that it lives in, under its own
name, and nothing but torch's context decorator (``@torch.inference_mode()``) is wrapped around it. So it does not
matter who was imported first.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.normalization import default_normalization_schemes

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.overrides import signatures
from nnunet_lowmem.overrides.bypassed import HOMES, PREDICTOR, ROWS, Row, Step

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

# nnU-Net preprocesses and exports in fresh processes, where what was replaced in this one may or may not be seen
IN_WORKERS_BEFORE = (Step.PREPROCESSING, Step.NORMALISATION, Step.RESAMPLING)
IN_WORKERS_AFTER = (Step.LABELS, Step.EXPORT, Step.WRITING, Step.RESAMPLING)
OF_FILES = (Step.FILES, Step.ITERATION, Step.READING, *IN_WORKERS_BEFORE, *IN_WORKERS_AFTER)

_OURS = "nnunet_lowmem"
_MEAN = "predict_logits_from_preprocessed_data"
_TORCHS_DECORATOR = "torch.utils._contextlib"


def found(step: Step, *holders: object) -> list[str]:
    """Name what somebody else's has taken the place of, among the rows of a step.

    Parameters
    ----------
    step : Step
    *holders : object
        Instances or classes to look at: the predictor, the label manager, the preprocessor's class, ... A row about a
        class is passed over where no holder is of that class; rows about modules always count.
    """
    return [
        f"{row.owner.rpartition('.')[2].replace(':', '.')}.{name}"
        for row in ROWS
        if row.step is step
        for places in _places(row.owner, holders)
        for name in row.names
        if _is_replaced(places, name, row)
    ]


def replaced(predictor: Any, *steps: Step) -> list[str]:
    """Name what somebody else's has taken the place of for a predictor with a model, among the rows of some steps."""
    configuration, labels = predictor.configuration_manager, predictor.label_manager
    adapter = predict_from_raw_data.PreprocessAdapterFromNpy
    schemes = [getattr(default_normalization_schemes, name, None) for name in configuration.normalization_schemes]
    classes = (configuration.preprocessor_class, predictor.plans_manager.image_reader_writer_class, adapter, *schemes)
    return [name for step in steps for name in found(step, predictor, labels, *classes)]


def tell(predictor: Any, *steps: Step) -> bool:
    """Log what is replaced, and what that costs; return whether anything is."""
    told = {step: names for step in steps if (names := replaced(predictor, step))}
    for step, names in told.items():
        logger.warning("%s: not nnU-Net's own; %s", ", ".join(names), step.value)
    return bool(told)


def of_validation(trainer: Any) -> list[str]:
    """Name what is replaced of that which a trainer's own validation uses."""
    steps = (Step.VALIDATION, Step.LOGITS, Step.WINDOW, Step.RESAMPLING, Step.LABELS)
    return [name for step in steps for name in found(step, nnUNetPredictor, trainer.label_manager)]


def of_prediction(fast: bool) -> tuple[Step, ...]:
    """Return the steps from a preprocessed image to its labels, in this process."""
    return (*((Step.NETWORK,) if fast else ()), Step.LOGITS, Step.WINDOW, Step.LABELS, Step.EXPORT)


def unless_replaced(method: Method) -> Method:
    """Let a method of ours give way to what stands under its name in nnU-Net's class, if that is not nnU-Net's own.

    So it does for a call that says something which only the installed method understands.
    """
    name = method.__name__
    row = next(row for row in ROWS if row.step is Step.ENTRY and name in row.names)
    is_told_of = any(name in other.names for other in ROWS if other.step is Step.LOGITS)  # once per run, not per fold

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        standing = vars(nnUNetPredictor).get(name)
        if not _is_replaced([vars(nnUNetPredictor)], name, row):
            known, foreign = _sorted_out(standing, method, (self, *arguments), keywords)
            if not foreign:
                return method(**known)
            _tell_of_foreign(self, name, foreign)
        elif not is_told_of:
            logger.warning("nnUNetPredictor.%s: not nnU-Net's own; %s", name, Step.ENTRY.value)
        bound: Any = standing.__get__(self, type(self)) if hasattr(type(standing), "__get__") else standing
        return bound(*arguments, **keywords)

    call.__signature__ = signatures.merged(vars(nnUNetPredictor).get(name), method)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]  # of the same signature


def as_installed(constructor: Method) -> Method:
    """Let a constructor be called as that of the installed nnU-Net; what only that knows comes as keywords."""

    @functools.wraps(constructor)
    def call(self: Any, *arguments: Any, **keywords: Any) -> None:
        known, foreign = _sorted_out(vars(nnUNetPredictor)["__init__"], constructor, (self, *arguments), keywords)
        constructor(**known, **foreign)

    call.__signature__ = signatures.merged(vars(nnUNetPredictor)["__init__"], constructor)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _sorted_out(
    standing: Any, method: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return signatures.sort_out(standing, method, arguments, keywords)
    except TypeError as error:
        raise TypeError(f"{type(arguments[0]).__name__}.{method.__name__}(): {error}") from None


def _tell_of_foreign(predictor: Any, name: str, foreign: Mapping[str, Any]) -> None:
    """Say that nnU-Net's own method is called; one that loads a model runs what is in it, which a user must ask for."""
    told = ", ".join(f"{keyword}={value!r:.60}" for keyword, value in foreign.items())
    if name == "initialize_from_trained_model_folder" and not predictor.trust_model:
        raise UsageError(
            f"{name}({told}): only nnU-Net's own loading knows this, and that runs whatever code the checkpoint holds; "
            "leave it out, or give trust_model=True if you know who made the model"
        )
    logger.warning("%s(%s): known to the installed nnU-Net alone; %s", name, told, Step.ENTRY.value)


def _places(owner: str, holders: tuple[object, ...]) -> Iterator[list[Mapping[str, Any]]]:
    """Give for each holder where Python looks for its names, one place after the other.

    A class derived from one of nnU-Net's is a class of its own, which the plans name: what it overrides replaces
    nothing. Of the predictor, derived classes are what programs are made of.
    """
    module, _, name = owner.partition(":")
    if not name:
        if module in sys.modules:  # what is not imported has not been patched
            yield [vars(sys.modules[module])]
        return
    for holder in holders:
        classes = list((holder if isinstance(holder, type) else type(holder)).__mro__)
        names = [(cls.__module__, cls.__qualname__) for cls in classes]
        if (module, name) in names:
            first = 0 if owner == PREDICTOR else names.index((module, name))
            own = [] if isinstance(holder, type) else [getattr(holder, "__dict__", {})]
            yield [*own, *map(vars, classes[first:])]


def _is_replaced(places: Sequence[Mapping[str, Any]], name: str, row: Row) -> bool:
    values = (place[name] for place in places if name in place)
    standing = next((value for value in values if _package(value) != _OURS), None)
    if standing is None or _package(standing) in row.superseded:
        return False
    module, _, cls = row.owner.partition(":")
    home = module if cls else HOMES.get(name, module)
    return not is_stocks(standing, name, home) or (name == _MEAN and not _is_mean_of_folds(standing))


@functools.cache
def _is_mean_of_folds(function: Any) -> bool:
    """Whether nnU-Net's method returns the mean over folds, as ours does: the installed one may be a fork's.

    That of ``nnunetv2-neuropoly`` 2.6.2 counts the first fold twice. One that cannot be asked counts as known.
    """
    for folds in ([1.0], [1.0, 2.0, 4.0]):
        loaded: list[float] = []
        asked = SimpleNamespace(
            list_of_parameters=folds,
            network=SimpleNamespace(load_state_dict=loaded.append),
            predict_sliding_window_return_logits=lambda _, loaded=loaded: torch.full((1,), loaded[-1]).half(),
            verbose=False,
        )
        try:
            logits = function(asked, torch.zeros(1))
        except Exception:
            return True
        if logits.tolist() != (torch.full((1,), sum(folds)).half() / len(folds)).tolist():
            return False
    return True


def is_stocks(value: Any, name: str, home: str | None = None) -> bool:
    """Whether what stands under a name is what nnU-Net put there.

    Parameters
    ----------
    value : object
    name : str
    home : str, optional
        The module of nnU-Net that defines it, or the package it comes from; by `HOMES` if not given.
    """
    home = HOMES[name] if home is None else home
    function = _bare(value)
    module = _module(function)
    if home.partition(".")[0] != "nnunetv2":
        return module.partition(".")[0] == home and getattr(function, "__name__", None) == name
    code = getattr(function, "__code__", None)
    if code is None:
        return module == home and getattr(function, "__qualname__", None) == name
    file = code.co_filename.replace("\\", "/")
    return bool(module == home and code.co_name == name and file.endswith(module.replace(".", "/") + ".py"))


def is_class(value: type, owner: str) -> bool:
    """Whether a class is nnU-Net's, ``module:Class``, and not what somebody has put under its name."""
    return f"{value.__module__}:{value.__qualname__}" == owner


def _bare(value: Any) -> Any:
    """Take off what binds a function to a class, and torch's decorator."""
    value = getattr(value, "__func__", value)  # static methods, class methods, bound methods
    while _module(value) == _TORCHS_DECORATOR:
        value = value.__wrapped__
    return value


def _package(value: Any) -> str:
    return _module(_bare(value)).partition(".")[0]


def _module(value: Any) -> str:
    """Where a function was compiled, whatever it says of itself; where a class says it was."""
    namespace = getattr(value, "__globals__", None)
    name = namespace.get("__name__") if isinstance(namespace, dict) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""
