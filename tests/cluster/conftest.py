"""Clusters that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from clusters import Cluster


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as stack:

        def begin(*names: str, flags: Sequence[Any] = ()) -> Cluster:
            folder = tmp_path / "cluster"
            folder.mkdir()
            cluster = Cluster(folder, stack, flags)
            for name in names:
                cluster.join(name)
            return cluster

        yield begin


@pytest.fixture
def cases(images) -> list[list[str]]:
    return [images(name) for name in ("head", "small", "head_margin")]
