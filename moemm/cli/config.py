"""`moemm config show` and `moemm config explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json


@dataclass(kw_only=True)
class Show:
    """Print the complete configuration as YAML: defaults, base files and overrides merged, each with its origin."""

    config: Positional[Annotated[Path, arg(metavar="CONFIG")]]
    """YAML file."""
    for_deepspeed: Annotated[int | None, arg(metavar="RANKS")] = None
    """Print instead what DeepSpeed gets in a run on so many ranks, as JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0."""
        from moemm import config

        loaded = config.load_config(self.config, overrides)
        if self.for_deepspeed is None:
            show(config.show(loaded).rstrip("\n"))
        else:
            show_json(config.deepspeed_section(loaded.config, world_size=self.for_deepspeed))
        return 0


@dataclass(kw_only=True)
class Explain:
    """Say what a key takes, its default, what it does, and what DeepSpeed makes of it; without KEY, list all keys."""

    key: Positional[Annotated[str | None, arg(metavar="KEY")]] = None
    """Key with dots: model.router.top_k."""
    markdown: bool = False
    """Print docs/config.md."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0."""
        del overrides
        from moemm.config.document import document
        from moemm.config.explain import explain, explain_all

        show(document() if self.markdown else explain(self.key) if self.key else explain_all())
        return 0
