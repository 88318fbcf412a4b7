"""One tool at a time: its environment takes several GB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tool_environments import Environment, environment


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> Iterator[Environment]:
    """The environment of the module's tool; the first test that asks for it waits for the installation."""
    requirements: list[str] = request.module.REQUIREMENTS
    with environment(requirements[0].partition("=")[0], requirements) as made:
        yield made
