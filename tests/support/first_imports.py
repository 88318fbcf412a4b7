"""Imports modules as the first of nnU-Net, each in a process of its own, with the predictor switched on.

Each is imported in a process of its own, forked from one that has all of the other packages: starting Python with torch
takes seconds. Called with the text of `Choice.name` and the modules; ``name:function`` is called with ``-h``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys

from forked import forked

from nnunet_lowmem.nnunet import switching

OURS = ("nnunetv2", "nnunet_lowmem")


def others() -> str:
    """Names of the modules of other packages that nnU-Net's trainer and our predictor need."""
    before = set(sys.modules)
    for name in ("nnunetv2.run.run_training", "nnunet_lowmem.predictor"):
        importlib.import_module(name)
    return " ".join(name for name in sys.modules if name not in before and name.split(".")[0] not in OURS)


def first(choice: str, target: str) -> str:
    """Import a module, or call a function with -h; return what nnU-Net's name means afterwards."""
    module, _, function = target.partition(":")
    switching.want(switching.Choice(choice))
    sys.argv = [module, "-h"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        call = getattr(importlib.import_module(module), function) if function else str
        call()
    predictor = importlib.import_module(switching.MODULE).nnUNetPredictor
    return " ".join(cls.__qualname__ for cls in predictor.__mro__)


if __name__ == "__main__":
    for name in forked(others).split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert not any(name.split(".")[0] == "nnunetv2" for name in sys.modules)
    for target in sys.argv[2:]:
        print(target, repr(forked(lambda target=target: first(sys.argv[1], target))), flush=True)
