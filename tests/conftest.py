"""Session fixtures: small images cut from the real ones, and small model folders, each made once, when asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
from images import IMAGES, write_image

pytest.register_assert_rewrite("oracle")

# read when torch is imported; test processes beside each other (pytest -n) share the cores and do not wait by spinning
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole default run; a part of it starts faster in one, what is slow fills the machine."""
    is_whole = config.args == config.getini("testpaths") and config.option.markexpr.startswith("not slow")
    return 2 if is_whole else 0


class Images:
    """The input files of a named image, written with any ending: ``images("head", ".nii.gz")``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, ending: str = ".nii.gz") -> list[str]:
        folder = self.root / f"{name}{ending}"
        if not folder.exists():
            folder.mkdir()
            for i, channel in enumerate(IMAGES[name]()):
                write_image(channel, folder / f"{name}_{i:04d}{ending}")
        return [str(p) for p in sorted(folder.glob(f"*{ending}"))]


class Models:
    """Model folders by their specification, made once: ``models(ModelSpec(labels=5), files)``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}
        self.numbers = count()

    def __call__(self, spec, image: Sequence[str], previous_stage: str | None = None) -> str:
        from factory import write_model

        key = repr((spec, image, previous_stage))
        if key not in self.made:
            self.made[key] = write_model(self.root / f"model_{next(self.numbers)}", spec, image, previous_stage)
        return str(self.made[key])


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))
