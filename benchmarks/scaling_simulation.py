"""What is lost on the way to 1,024 ranks, by routing that a run recorded; and what a placement of experts wins.

    python -m benchmarks.scaling_simulation

Trains the quickstart with 32 routed experts (300 steps on this machine's CPU, each step's routing recorded), takes the
second half of the record, and asks `moemm plan placement` and `moemm plan simulate` of a model of the width of a
cluster's (dim 1024) with the same routing. No GPU runs: rates, links and the spread of ranks' speeds are assumptions of
moemm/plan. With --run FOLDER the run is kept there, and not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import Row, write
from benchmarks.runs import ROOT, moemm
from moemm.observe.plots import save_figure, scaling_figure

GROUPS = [
    {"kind": "shared", "width": 64}, {"kind": "modality", "width": 32}, {"kind": "routed", "count": 32, "width": 32},
]  # fmt: skip
WIDE = [{**group, "width": 32 * int(group["width"])} for group in GROUPS]  # type: ignore[call-overload]
STEPS = 300
EP = (4, 8, 16)
MODEL = (
    "--model.dim", "1024", "--model.heads", "16", "--train.precision", "bf16", "--deepspeed.zero-stage", "1",
    "--model.experts.groups", json.dumps(WIDE), "--micro-batch", "256",
)  # fmt: skip
FIGURE = ROOT / "docs" / "scaling_simulation"


def train(folder: Path) -> None:
    """The run whose routing is looked at."""
    if not (folder / "summary.json").exists():
        moemm(
            "train", "configs/recipes/quickstart.yaml", "--model.experts.groups", json.dumps(GROUPS),
            "--model.router.top_k", "2", "--train.steps", str(STEPS), "--train.log_every", "1",
            "--train.baselines", "false", "--train.output", str(folder),
        )  # fmt: skip


def placements(folder: Path) -> list[Row]:
    """Load of the fullest rank over the mean, in windows that the placement has not seen."""
    rows = []
    for ep in EP:
        values = json.loads(moemm("plan", "placement", str(folder), "--ep", str(ep), "--json"))
        case = f"placement on {ep} ranks"
        rows += [
            Row(case=case, metric="in turn: fullest / mean", value=values["in_turn"], better="lower"),
            Row(
                case=case, metric="placed: fullest / mean", value=values["placed"], better="lower",
                target=values["in_turn"],
            ),
            Row(case=case, metric="share of the excess that goes", value=values["gain"], target=0.0),
        ]  # fmt: skip
    return rows


def simulated(folder: Path, ep: int) -> dict[str, Any]:
    """What `moemm plan simulate` says for groups of `ep` ranks."""
    text = moemm("plan", "simulate", str(folder), *MODEL, "--gpus", "1024xH100", "--ep", str(ep), "--json")
    values: dict[str, Any] = json.loads(text)
    return values


def main() -> None:
    """Train, ask, draw, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    given: Path | None = parser.parse_args().run
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given or Path(temporary) / "run").resolve()
        train(folder)
        rows = placements(folder)
        for ep in (1, 8):
            values = simulated(folder, ep)
            for way, points in values["points"].items():
                for point in points:
                    if point["ranks"] in (1, 8, 64, 1024):
                        case = f"ep {ep}, {way}, {point['ranks']} ranks" if ep > 1 else f"ep 1, {point['ranks']} ranks"
                        rows.append(Row(case=case, metric="efficiency (simulated)", value=point["efficiency"]))
                        step = 1e3 * point["seconds"]
                        rows.append(Row(case=case, metric="step (simulated)", value=step, unit="ms", better="lower"))
            if ep > 1:
                save_figure(scaling_figure(values), FIGURE)[0].unlink()  # the SVG says the same and is smaller
    write("scaling_simulation", rows, seeds=[0], seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
