"""What a model folder may name and hold: a stranger's model runs no code.

A model names code in two ways. Its checkpoints are pickles; they are read by torch's restricted unpickler, which makes
nothing but tensors and plain containers; what may lie beside them is in `harmless`. Its plans hold names of classes
and functions; each is looked up where nnU-Net looks, and then the object that was found is judged, not its name: a
dotted path can walk through a good module into another (``torch.nn.init.torch.os.system``).
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_lowmem.errors import ModelError, because, twin
from nnunet_lowmem.nnunet import harmless, unpickling
from nnunet_lowmem.overrides.bypassed import READERS, RESAMPLINGS, SCHEMES

try:
    from nnunetv2.paths import nnUNet_extTrainer
except ImportError:  # new in nnU-Net 2.8
    nnUNet_extTrainer = None  # noqa: N816  # nnU-Net's spelling

#: Where a model's names may lead without being asked for.
TRUSTED = ("torch.nn", "dynamic_network_architectures", "nnunetv2")
_ARCHITECTURES = "dynamic_network_architectures.architectures"
_TRAINERS = "nnunetv2.training.nnUNetTrainer"
#: Names that one refusal lists.
_SHOWN = 4

#: Entry of the plans, where nnU-Net looks for the name, what it must be there, and the names of nnU-Net's own.
_NAMES: tuple[tuple[str, str, type, Collection[str]], ...] = (
    ("image_reader_writer", "nnunetv2.imageio", BaseReaderWriter, [reader.partition(":")[2] for reader in READERS]),
    ("label_manager", "nnunetv2.utilities.label_handling", LabelManager, ["LabelManager"]),
    ("preprocessor_name", "nnunetv2.preprocessing", DefaultPreprocessor, ["DefaultPreprocessor"]),
    ("normalization_schemes", "nnunetv2.preprocessing.normalization", ImageNormalization, SCHEMES),
    *(
        (f"resampling_fn_{what}", "nnunetv2.preprocessing.resampling", FunctionType, RESAMPLINGS)
        for what in ("data", "seg", "probabilities")
    ),
)


@dataclass(frozen=True)
class Trust:
    """Whose code a model may run.

    Attributes
    ----------
    packages : tuple of str
        Packages that the user named, beside `TRUSTED`.
    everything : bool
        Whether the user trusts the model as a whole; nothing is judged then.
    """

    packages: tuple[str, ...] = ()
    everything: bool = False

    def load_checkpoint(self, path: Path, device: str = "cpu") -> dict[str, Any]:
        """Read a checkpoint, its tensors to a device; to "meta" their bytes are not read.

        Raises
        ------
        ModelError
            If the file cannot be read as a checkpoint, or holds what no trainer of nnU-Net stores.
        """
        try:
            checkpoint = self._load(path, device)
        except ModelError:
            raise
        except unpickling.RefusedError as error:
            raise ModelError(_holds(path, error.names)) from error
        except Exception as error:
            raise because(ModelError, _why_unreadable(path, error), error) from error
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
            raise twin(ModelError, KeyError)(
                f"checkpoint {path} holds no 'network_weights': it was not written by an nnU-Net v2 trainer"
            )
        return checkpoint

    def _load(self, path: Path, device: str) -> Any:
        if self.everything:
            # as an attribute of torch, and with stock's types: tools put loaders of their own in its place
            return torch.load(str(path), map_location=torch.device(device), weights_only=False)
        # CVE-2025-32434: before 2.6 a prepared file runs code in spite of weights_only
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
            raise ModelError(
                f"torch {torch.__version__} cannot read a stranger's checkpoint safely, 2.6 is needed: install a newer "
                "torch, or give --trust_model if you know who made this model"
            )
        return unpickling.load(path, device, self._find_trusted)

    def _find_trusted(self, name: str) -> Any:
        """Import what a checkpoint names, if the user named its package and it was made there."""
        module, _, attribute = name.rpartition(".")
        found = getattr(_import(module), attribute, None) if self._trusts(module) else None
        return found if self._trusts(getattr(found, "__module__", None) or "") else None

    def check_plans(self, plans: dict[str, Any], configuration: dict[str, Any]) -> None:
        """Look every name up that `plans` and its `configuration` hold, and judge what it leads to.

        Raises
        ------
        ModelError
            With the entry and its value, if it leads out of what is trusted or to no such thing.
        """
        if self.everything:
            return
        for entry, package, kind, own in _NAMES:
            for value in (holder[entry] for holder in (plans, configuration) if entry in holder):
                for name in value if isinstance(value, list) else [value]:
                    found = _find(package, name)
                    # what stands under a name of nnU-Net's own was put there by nnU-Net or by the running program
                    if found is None or name not in own:
                        self._judge(f"plans.json: {entry!r}", name, found, package, kind)
        architecture = configuration["architecture"]
        arguments = architecture["arch_kwargs"]
        for entry in architecture["_kw_requires_import"]:
            if arguments[entry] is not None:
                self._locate(f"plans.json: {entry!r}", arguments[entry])
        self._locate("plans.json: 'network_class_name'", architecture["network_class_name"])

    def trainer_class(self, name: Any) -> Any:
        """Return the trainer of that name: nnU-Net's, the running program's, or one from ``nnUNet_extTrainer``.

        Tools add trainers to nnU-Net at run time; what a program has imported already is no stranger's code.

        Raises
        ------
        ModelError
            If there is none, or it lies outside of what is trusted.
        """
        where = "the checkpoint's 'trainer_name'"
        found = _find(_TRAINERS, name)
        if found is None and (imported := _imported_trainer(name)) is not None:
            return imported
        if found is None and nnUNet_extTrainer is not None and _is_identifier(name):
            found = self._external_trainer(where, name)
        if not self.everything:
            self._judge(where, name, found, _TRAINERS, _trainer_base())
        elif found is None:
            raise twin(ModelError, RuntimeError)(f"{where} is {name!r}, which the installed nnU-Net does not have")
        return found

    def _external_trainer(self, where: str, name: str) -> Any:
        """Find the file that defines the trainer by its text, so that nothing is imported that is not trusted."""
        for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep):  # noqa: SIM112  # nnU-Net's spelling
            for file in sorted(Path(folder).rglob("*.py")) if folder.strip() else []:
                if not re.search(rf"^class {name}\b", file.read_text(errors="replace"), re.MULTILINE):
                    continue
                module = ".".join(file.relative_to(folder).with_suffix("").parts)
                if not self._trusts(module):
                    raise ModelError(_refusal(where, name, f"a class in {file}", module))
                sys.path.insert(0, folder)
                try:
                    return getattr(importlib.import_module(module), name)
                finally:
                    sys.path.remove(folder)
        return None

    def _locate(self, where: str, path: Any) -> None:
        """Walk a dotted path as ``pydoc.locate`` does, and never leave what is trusted on the way."""
        if not isinstance(path, str) or not all(map(_is_identifier, path.split("."))):
            raise ModelError(f"{where} is {path!r}, which is not the dotted name of a class")
        root = next((package for package in (*TRUSTED, *self.packages) if _within(path, package)), None)
        if root is None:
            raise ModelError(_refusal(where, path, None, path.rpartition(".")[0] or path))
        found: Any = _import(root)
        for part in path.split(".")[root.count(".") + 1 :]:
            if isinstance(found, ModuleType) and hasattr(found, "__path__"):
                _import(f"{found.__name__}.{part}")
            found = getattr(found, part, None)
            if isinstance(found, ModuleType) and not (self._trusts(found.__name__) or _in_trusted(found.__name__)):
                raise ModelError(_refusal(where, path, f"the module {found.__name__}", found.__name__))
        if found is None:  # nnU-Net finds classes that have moved, too
            found = _find(_ARCHITECTURES, path.rpartition(".")[2])
        self._judge(where, path, found, None, nn.Module)

    def _judge(self, where: str, name: Any, found: Any, package: str | None, kind: type) -> None:
        """Judge an object by where it was made and what it is; in a package that the user named, anything goes."""
        if found is None:
            stocks = ImportError if kind is nn.Module else RuntimeError
            raise twin(ModelError, stocks)(f"{where} is {name!r}, which the installed packages do not have")
        module = getattr(found, "__module__", None)
        module = module if isinstance(module, str) else type(found).__module__
        if self._trusts(module) and callable(found):
            return
        if not (_within(module, package) if package and kind is FunctionType else _in_trusted(module)):
            raise ModelError(_refusal(where, name, f"a {type(found).__name__} of {module}", module))
        if not (
            isinstance(found, kind) if kind is FunctionType else isinstance(found, type) and issubclass(found, kind)
        ):
            needed = "a function" if kind is FunctionType else f"a class derived from {kind.__name__}"
            raise ModelError(f"{where} is {name!r}, a {type(found).__name__} of {module}; {needed} is needed")

    def _trusts(self, module: str) -> bool:
        return self.everything or any(_within(module, package) for package in self.packages)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _in_trusted(module: str) -> bool:
    return any(_within(module, package) for package in TRUSTED)


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _find(package: str, name: Any) -> Any:
    """Look below a package as nnU-Net does; imports modules of that package alone."""
    if not _is_identifier(name):
        return None
    root, *parts = package.split(".")
    return recursive_find_python_class(str(Path(importlib.import_module(root).__path__[0], *parts)), name, package)


def _trainer_base() -> type:
    """Return nnU-Net's trainer. Its module imports the predictor, so this one cannot import it for itself."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    return nnUNetTrainer  # type: ignore[no-any-return]  # nnU-Net ships no types


def _imported_trainer(name: Any) -> type | None:
    """Look among the trainers that exist in this process; nothing is imported."""
    waiting: list[type] = [_trainer_base()]
    while waiting:
        waiting += (found := waiting.pop()).__subclasses__()
        if found.__name__ == name:
            return found
    return None


def _import(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and _within(module, error.name):
            return None
        raise


def _refusal(where: str, name: Any, found: str | None, module: str) -> str:
    """One line; the standard library is never offered as something to trust."""
    leads = f" and leads to {found}" if found else ""
    package = module.partition(".")[0]
    cure = "" if package in sys.stdlib_module_names else f"; if you trust that code, give --trust {package}"
    return f"{where} is {name!r}{leads}, outside of {', '.join(TRUSTED)}: it is not run{cure}"


def _holds(path: Path, names: dict[str, str]) -> str:
    """One line; names the packages that are not Python's own, whose objects the user may ask for."""
    words = {name: name if re.fullmatch(r"[\w.]+", name) else repr(name) for name in names}
    found = [f"{words[name]} at {where}" if where else words[name] for name, where in names.items()]
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    foreign = {word.partition(".")[0] for name, word in words.items() if name not in harmless.BUILT}
    packages = sorted(foreign - {*sys.stdlib_module_names, "__main__"})
    cure = (
        f"if you trust that code, give {' '.join(f'--trust {package}' for package in packages)}; " if packages else ""
    )
    return (
        f"checkpoint {path} holds {shown}, which may run code when it is built and which no trainer of nnU-Net stores: "
        f"it is not loaded; {cure}if you know who made this model, give --trust_model"
    )


def _why_unreadable(path: Path, error: Exception) -> str:
    """Name what the restricted unpickler refused; torch's own text is a page on how to switch it off."""
    text = " ".join(str(error).split()) or "no reason given"
    refused = re.search(r"(?:GLOBAL |got <class '|unrecognized function )(\w+(?:\.\w+)+)", text)
    if refused is not None:
        return _holds(path, {refused[1]: ""})
    if opcode := re.search(r"Unsupported operand (\d+)", text):
        return (
            f"checkpoint {path} is stored in a way that is not read without running code: opcode {opcode[1]} of pickle "
            "is none that torch.save uses by itself (protocol 2). Store it again with torch.save, or, if you know who "
            "made this model, give --trust_model"
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation of torch.load")[0]
    return f"checkpoint {path} cannot be read: {type(error).__name__}: {reason[:300]}"
