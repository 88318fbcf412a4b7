"""Found by the Python programs that ``nnunet-lowmem run`` starts: does what the start-up hook does, where that is not.

Then it makes way for the ``sitecustomize`` that it hides, if there is one.
"""

import importlib
import os
import sys

own = sys.modules.pop(__name__)
here = os.path.dirname(os.path.abspath(__file__))
try:
    importlib.import_module("nnunet_lowmem.startup")
except ImportError as error:
    sys.stderr.write(
        f"nnunet-lowmem run: {sys.executable} cannot import nnunet_lowmem, so it predicts as usual: {error}\n"
    )
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
try:
    importlib.import_module("sitecustomize")
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
finally:
    sys.modules.setdefault(__name__, own)
