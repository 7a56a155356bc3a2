"""`moemm train`."""

from __future__ import annotations

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
    """Python file that registers modalities, routers ... of your own; its code runs. In place of `plugins` of the
    configuration, or of the run's own copies; may be given several times."""

    def run(self, overrides: Sequence[str]) -> int:
        """Check the configuration before torch is imported, then train; returns the summary's exit code, 0 mostly."""
        from moemm.config import load_config
        from moemm.config.overrides import plugin_overrides

        loaded = load_config(self.config, [*overrides, *plugin_overrides(self.plugin)])
        from moemm.train import train

        summary = train(loaded, resume=self.resume)
        return int(summary.get("exit_code", 0))
