"""`moemm upcycle`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import MorePlugins


@dataclass(kw_only=True)
class Upcycle:
    """Make sparse experts of a dense run, or more experts of a sparse one; prove that the output is the same.

    Writes a run folder that `moemm evaluate` scores and `moemm train OUTPUT/config.yaml --resume` trains, with
    receipt.json in it. Exit code 1 where something that should hold does not.
    """

    sources: Annotated[Positional[tuple[Path, ...]], arg(name="sources", metavar="RUN|FILE...")]
    """Folder of a dense run (of several, for branch; of a sparse one, for expand); with --rules a safetensors file, or
    a folder of them."""
    method: Literal["copy", "noise", "modality", "virtual", "drop", "branch", "multiplet", "expand"] = "copy"
    """copy: equal copies. noise: with noise on each. modality: one for each modality. virtual: cut into shards, a group
    of which is used together. drop: part of each copy drawn anew. branch: one from each of several runs. multiplet: one
    from each of several stages of training. expand: more experts of the routed ones that are there."""
    recipe: Path | None = None
    """Configuration whose `model` and `train` sections the new run has; when not given, the method's own groups."""
    rules: Path | None = None
    """YAML file of rules from the names of a foreign model to those of a dense moemm model; needs --recipe."""
    output: Path | None = None
    """Folder of the new run; RUN-METHOD when not given."""
    experts: int | None = None
    """copy, noise, virtual, drop: copies of the dense network. multiplet: experts, a stage less. 4 when not given."""
    top_k: int | None = None
    """Copies that a token uses: 1 when not given, 2 for branch and multiplet."""
    granularity: int | None = None
    """Shards that a copy is cut into; as few as hold it when not given, for virtual 2, or all slots of a recipe."""
    noise: float | None = None
    """noise: deviation, as a share of that of each matrix; 0.05 when not given."""
    drop: float | None = None
    """drop: share of each copy's hidden units that is drawn anew; 0.5 when not given."""
    clusters: int | None = None
    """multiplet: clusters of samples that each stage tells apart; 4 when not given."""
    steps: int | None = None
    """multiplet: training steps of each stage, and of the routers; 200 when not given."""
    factor: int | None = None
    """expand: how many times as many experts; 2 when not given."""
    duplicates: Literal["even", "gradient"] | None = None
    """expand: equally many copies of each expert, which changes nothing, or more of those with larger gradients."""
    optimizer: Literal["keep", "fresh"] = "fresh"
    """keep: training goes on where the run stood: its optimizer's states, step, schedule and place in the data. fresh:
    it begins at step 0. keep is for every method but branch and multiplet."""
    samples: int = 64
    """Samples of the batch that is measured on."""
    seed: int = 0
    """Seed of what is drawn for the copies; routers are drawn by train.seed."""
    plugin: MorePlugins = ()
    json: bool = False
    """Print the receipt as JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Upcycle, and print the receipt; 0, or 1 where a proof fails."""
        del overrides
        from moemm.growth import Wanted, upcycle

        same = [name for name in Wanted.__dataclass_fields__ if name != "plugins"]
        wanted = Wanted(**{name: getattr(self, name) for name in same}, plugins=self.plugin)
        receipt = upcycle(self.sources, wanted, tell=_tell)
        if self.json:
            show_json(receipt.to_dict())
        else:
            from moemm.observe.receipt_table import render_receipt

            show(render_receipt(receipt.to_dict()))
            show(f"\nto train    moemm train {Path(receipt.target) / 'config.yaml'} --resume")
        return 0 if receipt.ok else 1


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
