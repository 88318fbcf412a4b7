"""Versions of what is installed, for a reader to see, and to tell whether a case may be continued.

nnU-Net may come from a distribution of another name, and there is no metadata in a source tree or a frozen program.
"""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions, version


def version_of(package: str) -> str:
    """Return the version of a package: that of its distribution, whatever its name, or its own word, or "unknown"."""
    module = package.replace("-", "_")
    own = getattr(sys.modules.get(module), "__version__", "unknown")
    if found := of_distribution(package):
        return found
    names = packages_distributions().get(module, ())
    return next((f"{found} ({name})" for name in names if (found := of_distribution(name))), str(own))


def of_distribution(name: str) -> str | None:
    """Return the version of a distribution; None where it is not installed, or does not tell."""
    try:
        found: object = version(name)
    except Exception:  # whatever half-removed metadata leads to
        return None
    return None if found is None else str(found)
