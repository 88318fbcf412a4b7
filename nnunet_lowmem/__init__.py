"""nnU-Net v2 prediction in bounded memory, with stock nnU-Net's labels.

``from nnunet_lowmem import LowMemPredictor`` gives a drop-in replacement for ``nnUNetPredictor``. Importing this
package imports neither torch nor nnU-Net; the predictor is loaded when it is first asked for. ``enable`` puts it in
the place of ``nnUNetPredictor`` for tools that know nothing of it, ``disable`` takes it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_lowmem.nnunet.switching import disable, enable
    from nnunet_lowmem.predictor import LowMemPredictor

__version__ = "0.1.0"
__all__ = ["LowMemPredictor", "__version__", "disable", "enable"]


def __getattr__(name: str) -> object:
    if name == "LowMemPredictor":
        from nnunet_lowmem.predictor import LowMemPredictor

        return LowMemPredictor
    if name in ("enable", "disable"):
        from nnunet_lowmem.nnunet import switching

        return getattr(switching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
