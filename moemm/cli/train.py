"""`moemm train`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moemm.cli.subject import Plugins


@dataclass(kw_only=True)
class Train:
    """Train the model that a configuration describes, on the data that it names.

    One process: moemm train CONFIG. Several: deepspeed --num_accelerators 2 --module moemm train CONFIG, or
    torchrun --nproc-per-node 2 -m moemm train CONFIG. Any key of the configuration can be set behind it:
    --train.steps 100 --model.router.top_k 2 (moemm config explain lists them).
    """

    config: Positional[Annotated[Path, arg(metavar="CONFIG")]]
    """YAML file."""
    resume: bool = False
    """Go on from the newest complete checkpoint of train.output."""
    plugin: Plugins = ()

    def run(self, overrides: Sequence[str]) -> int:
        """Check the configuration before torch is imported, then train; returns the summary's exit code, 0 mostly."""
        from moemm.config import load_config
        from moemm.config.overrides import plugin_overrides

        loaded = load_config(self.config, [*overrides, *plugin_overrides(self.plugin)])
        collected = gc.isenabled()
        gc.disable()  # what starts up stays: looking through it again and again takes a sixth of the time
        try:
            from moemm.train import train
            from moemm.train.lean import CollectFromHere

            summary = train(loaded, resume=self.resume, extra_callbacks=[CollectFromHere()] if collected else None)
            return int(summary.get("exit_code", 0))
        finally:
            if collected:
                gc.enable()
