"""Puts a predictor into the place of ``nnUNetPredictor``, for tools that know nothing of it; and takes it back.

The name is exchanged in nnU-Net's module and in every module that took it from there. Where nnU-Net is not imported
yet, this waits for it. What is put in place is a subclass made for the purpose: so whoever holds it got it from
nnU-Net, and taking it back leaves alone those who imported the predictor itself.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from nnunet_lowmem.errors import ModelError, UsageError
from nnunet_lowmem.nnunet import model_files, predictors
from nnunet_lowmem.nnunet.rebinding import rebind, unreachable

logger = logging.getLogger(__name__)

MODULE = "nnunetv2.inference.predict_from_raw_data"
CLASS = "nnUNetPredictor"
#: The predictor that this name chooses is the one that the plans of each model name.
BY_PLANS = "plans"
#: Names the predictor that programs use, when Python starts.
VARIABLE = "nnUNet_predictor"


@dataclass(frozen=True)
class Choice:
    """Which predictor is wanted, and its keyword arguments over those of the environment."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Exchange:
    """What is in place of what."""

    choice: Choice
    stock: type
    replacement: type


def enable(name: str = predictors.OWN.name, **options: Any) -> ExitStack:
    """Replace ``nnUNetPredictor`` in this process by the predictor of that name.

    What it returns restores what was before, as a context manager.

    Parameters
    ----------
    name : str
        Of the entry-point group ``nnunetv2.predictors``, or ``plans`` for the one that each model's plans name.
    **options
        Keyword-only arguments of the predictor, such as ``max_ram="4G"``. They overrule the environment, and what a
        tool passes overrules them.

    Raises
    ------
    UsageError
        If there is no such predictor, or it cannot be loaded.
    """
    if name != BY_PLANS:
        predictors.find(name)
    elif options:
        raise UsageError(f"enable({BY_PLANS!r}) takes no options: the plans and the environment give them")
    restoring = ExitStack()
    restoring.callback(want, want(Choice(name, options)))
    return restoring


def disable() -> None:
    """Put ``nnUNetPredictor`` back everywhere; does nothing where it is in its place."""
    want(None)


_lock = threading.RLock()
_wanted: Choice | None = None
_exchange: _Exchange | None = None
_warned = False


def want(choice: Choice | None) -> Choice | None:
    """Make it so, now or when nnU-Net is imported; return what was wanted before. The name is not checked."""
    global _wanted
    with _lock:
        before, _wanted = _wanted, choice
        _finder.watch(choice)
    if MODULE in sys.modules:
        importlib.import_module(MODULE)  # another thread may be in the middle of it
        _apply()
    return before


def _apply() -> None:
    """Bring what is in place in line with what is wanted, unless what this needs is still loading."""
    choice = _wanted
    module = sys.modules.get(MODULE)
    if module is None or _finder.is_busy():
        return
    if choice is not None and choice.name != BY_PLANS:
        predictors.load(choice.name)  # outside the lock: importing waits for other threads' imports
    with _lock:
        # if it changed meanwhile, who changed it brings it in line
        if choice is _wanted:
            _exchange_in(module, choice)


def _exchange_in(module: ModuleType, choice: Choice | None) -> None:
    global _exchange
    current = vars(module)[CLASS]
    if _exchange is not None:
        if _exchange.choice == choice and current is _exchange.replacement:
            return
        rebind(_exchange.replacement, _exchange.stock, spared=())
        _exchange = None
    if choice is not None:
        stock = vars(module)[CLASS]
        replacement = _by_plans(stock) if choice.name == BY_PLANS else _with_options(choice)
        spared = {"nnunet_lowmem", *(cls.__module__.partition(".")[0] for cls in replacement.__mro__[1:-1])}
        spared.discard(stock.__module__.partition(".")[0])
        rebind(stock, replacement, spared)
        _exchange = _Exchange(choice, stock, replacement)
        _warn_of(unreachable(stock, replacement, spared))


def _warn_of(places: Sequence[str]) -> None:
    global _warned
    if places and not _warned:
        _warned = True
        logger.warning(
            "%s is still stock's in %s: call nnunet_lowmem.enable() before these are imported, or set nnUNet_predictor",
            CLASS,
            ", ".join(places),
        )


# -- what is put in place -----------------------------------------------------------------------------------------


def _with_options(choice: Choice) -> type:
    base: Any = predictors.load(choice.name)

    @functools.wraps(base.__init__)
    def __init__(self: Any, *arguments: Any, **given: Any) -> None:  # noqa: N807  # becomes the method
        chosen = {**predictors.options(choice.name, base), **choice.options}
        _announce(choice.name, base, chosen)
        base.__init__(self, *arguments, **{**chosen, **given})

    return _in_place_of_stock(base, {"__init__": __init__})


def _by_plans(stock: type) -> type:
    """Make a class whose instances become the predictor that the plans name, as soon as they see plans."""
    base: Any = stock

    @functools.wraps(base.__init__)
    def __init__(self: Any, *arguments: Any, **given: Any) -> None:  # noqa: N807
        self._given = arguments, given
        base.__init__(self, *arguments, **given)

    @functools.wraps(base.initialize_from_trained_model_folder)
    def from_folder(self: Any, model_training_output_dir: str, *arguments: Any, **given: Any) -> None:
        try:
            plans = model_files.read_json(Path(model_training_output_dir, "plans.json"))
        except ModelError:
            plans = {}  # nnU-Net reads it next and says what is wrong
        initializer = _become(self, base, plans)
        initializer.initialize_from_trained_model_folder(self, model_training_output_dir, *arguments, **given)

    @functools.wraps(base.manual_initialization)
    def manually(self: Any, network: Any, plans_manager: Any, *arguments: Any, **given: Any) -> None:
        initializer = _become(self, base, plans_manager.plans)
        initializer.manual_initialization(self, network, plans_manager, *arguments, **given)

    def see(self: Any, manager: Any) -> None:
        vars(self)["plans_manager"] = manager
        if manager is not None and _become(self, base, manager.plans) is not base:
            self.plans_manager = manager  # the attribute of another class now, which began without

    # tools that load a model themselves set it and call no method
    seen = property(lambda self: vars(self)["plans_manager"], see)
    methods = {"initialize_from_trained_model_folder": from_folder, "manual_initialization": manually}
    return _in_place_of_stock(base, {"__init__": __init__, "plans_manager": seen, **methods})


def _become(instance: Any, stock: Any, plans: Mapping[str, Any]) -> Any:
    """Turn a predictor into the one that the plans name; return the class whose methods are to be used."""
    name = plans.get("predictor")
    if name is None or "_given" not in vars(instance):
        return stock
    arguments, given = vars(instance).pop("_given")
    predictor: Any = predictors.load(name)
    if type(instance).__mro__[1] is not stock:
        logger.warning("the plans ask for predictor %r, which cannot replace the subclass %r", name, type(instance))
        return stock
    chosen = predictors.options(name, predictor, plans)
    _announce(name, predictor, chosen)
    instance.__class__ = predictor
    predictor.__init__(instance, *arguments, **{**chosen, **given})
    return predictor


def _in_place_of_stock(base: type, methods: dict[str, Any]) -> type:
    where = {"__module__": MODULE, "__qualname__": CLASS, "__doc__": base.__doc__}
    return type(base)(CLASS, (base,), {**where, **methods})


def _announce(name: str, predictor: type, options: Mapping[str, Any]) -> None:
    settings = "".join(f", {option}={value}" for option, value in sorted(options.items()))
    origin = f"{predictor.__module__}.{predictor.__qualname__}"
    logger.info("predictor %r in place of %s: %s%s", name, CLASS, origin, settings)


# -- waiting for nnU-Net ------------------------------------------------------------------------------------------


class _Finder(MetaPathFinder):
    """Lets the ordinary finders find modules, and has `_apply` called when one of those watched has been executed.

    Watched are nnU-Net's module and the package of the predictor: whichever of its modules a process imports first (a
    worker begins with the function that it is given) may import nnU-Net's, and the predictor needs them all.
    """

    def __init__(self) -> None:
        self._package: str | None = None
        self._loading: set[str] = set()
        self._finding = threading.local()

    def watch(self, choice: Choice | None) -> None:
        if choice is None:
            self._package = None
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            return
        # an unknown name is told when nnU-Net is imported: at a start-up it would be lost
        entry = predictors.entry_of(choice.name)
        self._package = None if entry is None else entry.module.partition(".")[0]
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def is_busy(self) -> bool:
        return any(map(self._is_watched, tuple(self._loading)))

    def _is_watched(self, name: str) -> bool:
        return name == MODULE or name.partition(".")[0] == self._package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self._is_watched(fullname) or getattr(self._finding, "name", None) == fullname:
            return None
        self._finding.name = fullname
        try:
            spec = find_spec(fullname)
        finally:
            self._finding.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = _TellingLoader(spec.loader, self._loading)
        return spec


class _TellingLoader(Loader):
    """Loads by another loader, which it leaves in its place afterwards."""

    def __init__(self, loader: Loader, loading: set[str]) -> None:
        self._loader = loader
        self._loading = loading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loading.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._loading.discard(module.__name__)
        _apply()


_finder = _Finder()
