"""`moemm merge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import MorePlugins
from moemm.errors import CheckpointError, ConfigError


@dataclass(kw_only=True)
class Merge:
    """Average runs of one model into one run, or merge the routed experts of a run into fewer.

    Prints scores on val, writes a run folder with a receipt. The test split is not read.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN...")]]
    """Run folders."""
    output: Path
    """Run folder to write."""
    method: Literal["uniform", "greedy", "fisher", "task-vector"] | None = None
    """uniform (when not given): the plain mean. greedy: runs from the best on val, each kept where the mean on val does
    not fall. fisher: each parameter weighted by how much outputs depend on it. task-vector: a base, and alpha times
    what the other runs learned on top of it, with the best alpha on val."""
    experts: int | None = None
    """Of one run: merge the routed experts of each group into so many."""
    base: Path | None = None
    """task-vector: the run that the others began with; the first RUN when not given."""
    alphas: Annotated[str | None, arg(metavar="A,B,...")] = None
    """task-vector: coefficients to try; 0,0.1,...,1 when not given."""
    samples: int | None = None
    """fisher, --experts: training samples to measure on; 256 when not given."""
    plugin: MorePlugins = ()
    json: bool = False
    """Print the receipt as JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Merge, print and write; 0, or 1 where a proof of the receipt fails."""
        del overrides
        from moemm.config.suggest import missing_path

        for folder in (*self.runs, *([self.base] if self.base is not None else [])):
            if not folder.is_dir():
                raise CheckpointError(missing_path(folder, what="run folder"))
        alphas = self._alphas()
        from moemm import growth

        receipt = growth.merge(
            self.runs,
            output=self.output,
            method=self.method,
            experts=self.experts,
            base=self.base,
            alphas=alphas,
            samples=self.samples,
            plugins=self.plugin,
            tell=_tell,
        )
        if self.json:
            show_json(receipt.to_dict())
        else:
            from moemm.observe.merge_table import render_merge

            show(render_merge(receipt.to_dict()))
            show(f"\nto score    moemm evaluate {self.output}")
            show(f"to train    moemm train {self.output / 'config.yaml'} --resume")
        return 0 if receipt.ok else 1

    def _alphas(self) -> list[float] | None:
        if self.alphas is None:
            return None
        try:
            return [float(word) for word in self.alphas.split(",") if word.strip()]
        except ValueError:
            raise ConfigError(f"--alphas {self.alphas}: must be numbers with commas, such as 0,0.25,0.5,1") from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
