"""Two ranks against one at equal global batch, for each ZeRO stage and with experts on one rank or two.

    python -W ignore -m benchmarks.scaling                 # the quickstart's model and data; minutes on 2 quiet cores
    python -W ignore -m benchmarks.scaling --steps 4       # to see that it works

Each rank computes with one thread. Time of a step: median over `--steps`, after some that warm it up; cases are run in
turn, `--rounds` times. Bytes: payloads of the collectives of a step on rank 0, as testing.traffic counts them, and what
`moemm plan` says they are: all-to-alls with even routing, and, over both ranks, for the tokens that were sent. Both
ranks share this machine's memory, so that a message costs a copy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.planner import bytes_by_kind
from benchmarks.record import Matrix, Row
from benchmarks.runs import ROOT, deviation
from moemm.config import load_config
from moemm.distributed import connect
from moemm.plan.layout import Layout, make_layout
from moemm.plan.network import bytes_of_rows
from moemm.plan.parameters import ModelShape, build_shape
from moemm.plan.source import from_data
from moemm.testing.distributed import run_distributed
from moemm.testing.traffic import Traffic, count_rows, count_traffic
from moemm.train.callbacks import Callback

RECIPE = ROOT / "configs" / "recipes" / "quickstart.yaml"
WARM, COUNTED = 3, 2
"""Steps before times count; steps whose bytes are counted, behind those."""
ALONE = (1, 0, 1)
CASES = [(2, stage, ep_size) for stage in range(4) for ep_size in (1, 2)]
"""Ranks, ZeRO stage, ep_size."""
KINDS = ("all_reduce", "reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
Case = tuple[int, int, int]


class Watch(Callback):
    """Seconds of each step, and the collectives of some."""

    every_rank = True

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.traffic = Traffic()
        self.rows: list[int] = []
        self._last = 0.0
        self._counting = ExitStack()

    def on_step(self, trainer: Any, *, stopping: bool) -> None:
        """Note the time since the last step; begin or end to count."""
        now = time.perf_counter()
        if trainer.step > WARM + COUNTED:
            self.seconds.append(now - self._last)
        if trainer.step == WARM:
            self.traffic = self._counting.enter_context(count_traffic())
            self.rows = self._counting.enter_context(count_rows())
        elif trainer.step == WARM + COUNTED:
            self._counting.close()
        self._last = time.perf_counter()


def measure(folder: str, stage: int, ep_size: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step, bytes a step by kind, and rows of each exchange that was counted, on this rank."""
    from moemm.train.setup import prepare
    from moemm.train.signals import StopRequest
    from moemm.train.trainer import Trainer

    world = connect(timeout_s=300)
    loaded = load_config(
        RECIPE,
        [
            f"--train.output={folder}", f"--train.steps={WARM + COUNTED + steps}", "--train.epochs=null",
            "--train.log_every=100000", "--data.num_workers=0", "--data.modality_dropout=0",
            f"--deepspeed.zero_stage={stage}", f"--deepspeed.ep_size={ep_size}",
        ],
    )  # fmt: skip
    setup, _ = prepare(loaded, resume=False)
    watch = Watch()
    trainer = Trainer(setup, world, [watch], StopRequest())
    trainer.run()
    trainer.close()
    sent = {kind: amount / COUNTED for kind, amount in watch.traffic.bytes.items()}
    return {"seconds": statistics.median(watch.seconds), "bytes": sent, "rows": watch.rows}


def run(case: Case, folder: Path, steps: int) -> list[dict[str, Any]]:
    """What each rank of a case measured."""
    ranks, stage, ep_size = case
    arguments = {"folder": str(folder), "stage": stage, "ep_size": ep_size, "steps": steps}
    results = run_distributed(
        "benchmarks.scaling:measure", ranks=ranks, arguments=arguments, path=[ROOT], timeout_s=1200
    )
    return [result.value for result in results]


def layout_of(case: Case) -> tuple[ModelShape, Layout]:
    """What the planner knows of a case."""
    ranks, stage, ep_size = case
    loaded = load_config(RECIPE, ["--data.modality_dropout=0"])
    shape = build_shape(loaded.config, from_data(loaded))
    micro_batch = loaded.config.train.batch_size // ranks
    return shape, make_layout(shape, ranks=ranks, stage=stage, ep=ep_size, micro_batch=micro_batch)


def planned(case: Case) -> dict[str, int]:
    """Bytes of a step on a rank by kind, as the planner has them: all-to-alls for even routing."""
    return bytes_by_kind(*layout_of(case))


def planned_for(case: Case, rows: Sequence[Sequence[int]]) -> float:
    """Bytes of a step's all-to-alls on both ranks, as the planner has them for the rows of each exchange that went.

    rows: of each rank.
    """
    shape, layout = layout_of(case)
    layers = shape.layers * (len(rows[0]) // len(shape.layers))
    means = [sum(one) / len(rows) for one in zip(*rows, strict=True)]
    parts = [bytes_of_rows(shape, layer, mean, layout) for layer, mean in zip(layers, means, strict=True)]
    return len(rows) * sum(parts) / COUNTED


def rows_of(case: Case, found: list[list[dict[str, Any]]], alone: list[float], plan: Mapping[str, int]) -> list[Row]:
    """The rows of a case: found, of each round and rank; alone, seconds of a step of one rank in each round; plan, as
    `planned` gives it."""
    name = f"2 ranks, ZeRO {case[1]}, ep {case[2]}"
    ratios = [ranks[0]["seconds"] / one for ranks, one in zip(found, alone, strict=True)]
    seconds = [ranks[0]["seconds"] * 1000 for ranks in found]
    sent = found[0][0]["bytes"]
    rows = [
        Row(case=name, metric="step", value=statistics.median(seconds), unit="ms", better="lower"),
        Row(case=name, metric="step / 1 rank", value=statistics.median(ratios), deviation=deviation(ratios),
            better="lower"),
    ]  # fmt: skip
    others = set(sent) - set(KINDS)
    assert not others, f"say in KINDS what {others} are"
    rows += [Row(case=name, metric=kind, value=sent.get(kind, 0.0) / 1e6, unit="MB", better="lower") for kind in KINDS]
    rows.append(Row(case=name, metric="all kinds", value=sum(sent.values()) / 1e6, unit="MB", better="lower"))
    rows.append(Row(case=name, metric="planned", value=sum(plan.values()) / 1e6, unit="MB", better="lower"))
    fixed = [sum(amount for kind, amount in one.items() if kind != "all_to_all") for one in (sent, plan)]
    off = abs(fixed[0] - fixed[1]) / fixed[0] if fixed[0] else 0.0
    rows.append(Row(case=name, metric="planned, off", value=off, better="lower", target=0.0))
    exchanged = sum(rank["bytes"].get("all_to_all", 0.0) for rank in found[0])
    if exchanged:
        off = abs(planned_for(case, [rank["rows"] for rank in found[0]]) - exchanged) / exchanged
        metric = "all_to_all, planned for what went, off"
        rows.append(Row(case=name, metric=metric, value=off, better="lower", target=0.0))
    return rows


def main() -> None:
    """Measure, write results/scaling.json, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    began = time.perf_counter()
    alone: list[float] = []
    found: dict[Case, list[list[dict[str, Any]]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.rounds):
            for case in (ALONE, *CASES):
                folder = Path(temporary) / "_".join(map(str, (number, *case)))
                measured = run(case, folder, options.steps)
                print(f"round {number}, {case}: {measured[0]['seconds'] * 1000:.1f} ms", flush=True)
                if case == ALONE:
                    alone.append(measured[0]["seconds"])
                else:
                    found[case].append(measured)
    rows = [Row(case="1 rank", metric="step", value=statistics.median(alone) * 1000, unit="ms", better="lower")]
    rows += [row for case in CASES for row in rows_of(case, found[case], alone, planned(case))]
    columns = {
        "ms": "step",
        "step / 1 rank": "step / 1 rank",
        **{kind: kind for kind in (*KINDS, "all kinds", "planned")},
    }
    matrix = Matrix(title="a step of 2 ranks, MB on rank 0", columns=columns, digits=2)
    path = record.write("scaling", rows, seeds=[0], seconds=time.perf_counter() - began, matrices=[matrix])
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
