"""The fake server as a fixture."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _load() -> Any:
    # Test folders are no packages, so a helper module is loaded by its path.
    spec = importlib.util.spec_from_file_location(
        "octavo_fake_server", Path(__file__).with_name("fake_server.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server() -> Iterator[Any]:
    """A running FakeServer."""
    with _load().FakeServer().running() as fake:
        yield fake
