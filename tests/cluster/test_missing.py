"""Where Dask is not installed, one line says what to do."""

from __future__ import annotations

import pytest

from nnunet_lowmem import options
from nnunet_lowmem.errors import UsageError


def test_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    asked = options.Options()
    assert not options.asks_for_cluster(asked)
    asked.workers = 2
    with pytest.raises(UsageError, match=r"pip install 'nnunet_lowmem\[dask\]'"):
        options.asks_for_cluster(asked)
