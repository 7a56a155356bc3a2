"""Plugins of the tests leave nothing behind: no names in the registries, none in the user's list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moemm import plugins


@pytest.fixture(autouse=True)
def again() -> Iterator[Callable[[], None]]:
    """Forget what was loaded, as a new process would; not what this user has named."""
    before = {what: dict(registry) for what, registry in plugins._REGISTRIES.items()}

    def forget() -> None:
        for what, registry in plugins._REGISTRIES.items():
            registry.clear()
            registry.update(before[what])
        for plugin in plugins._LOADED.values():
            sys.modules.pop(plugin.module, None)
        plugins._LOADED.clear()

    yield forget
    forget()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a user who has never run a plugin."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder
