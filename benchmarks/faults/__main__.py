"""The fault table: every row with its count, and the share of its cases that went as it must.

    python -m benchmarks.faults                  # or: make soak; about an hour on two cores
    python -m benchmarks.faults --share 0.02     # a fiftieth of each row; writes no results
    python -m benchmarks.faults --rows 8,11      # the other rows keep their results
    python -m benchmarks.faults --rows 2 --unmeasured    # says that they were not tried

Rows are those of docs/faults.md. Ranks are forked from one process that has imported everything.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.faults import golden, launched, long, ranks, samples, saves, values
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.saves import Runs
from benchmarks.record import Row
from moemm.testing.forked import Nursery

Make = Callable[[Nursery, Path, int], Outcome]


def _of_runs(row: Callable[[Runs, int], Outcome]) -> Make:
    return lambda nursery, folder, count: row(Runs(nursery, folder), count)


GROWTH: list[float] = []


def _long(nursery: Nursery, folder: Path, steps: int) -> Outcome:
    outcome, grown = long.run(nursery, folder, steps)
    GROWTH.append(grown)
    return outcome


ROWS: dict[int, tuple[int, Make]] = {
    1: (len(saves.KILLS), _of_runs(saves.kill_in_save)),
    2: (200, _of_runs(saves.kill_at_random)),
    3: (len(ranks.KILLED), ranks.kill_in_phase),
    4: (1000, _of_runs(saves.damage)),
    5: (len(saves.FULL), _of_runs(saves.full_disk)),
    6: (len(saves.SIGNALS) + len(launched.LAUNCHED), _of_runs(saves.stop_by_signal)),
    7: (30, _of_runs(saves.go_on)),
    8: (len(values.CASES), values.run),
    9: (len(ranks.DEATHS), ranks.die),
    11: (len(samples.CASES), lambda nursery, folder, count: samples.run(folder, count)),
    16: (len(golden.ALL), golden.run),
    18: (2000, _long),
}
"""Number of the row -> how many cases it has (18: steps of its one case), and what tries them."""


WHAT = {
    1: saves.KILL_IN_SAVE, 2: saves.KILL_AT_RANDOM, 3: ranks.KILL_IN_PHASE, 4: saves.DAMAGE, 5: saves.FULL_DISK,
    6: saves.SIGNAL, 7: saves.GO_ON, 8: values.BROKEN_VALUES, 9: ranks.DIE, 11: samples.CORRUPT, 16: golden.GOLDEN,
    18: long.LONG,
}  # fmt: skip
NOT_TRIED = "not tried on this machine yet"


def _number(row: dict[str, Any]) -> str:
    return str(row["case"]).partition(":")[0]


def rows_of(number: int, outcome: Outcome) -> list[Row]:
    """The lines of the table."""
    case = f"{number}: {outcome.case}"
    return [
        Row(case=case, metric="cases", value=outcome.count),
        Row(case=case, metric="as it must", value=outcome.share, target=1.0, note="; ".join(outcome.wrong)[:300]),
    ]


def main() -> None:
    """Try the rows, print, write results/faults.json; the exit status is 1 unless all went as they must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of each row's cases; below 1 writes no results")
    parser.add_argument("--rows", default="", help="numbers, with commas; all when not given; the others' results stay")
    parser.add_argument("--unmeasured", action="store_true", help="write the rows as not tried")
    options = parser.parse_args()
    wanted = [int(number) for number in options.rows.split(",") if number] or list(ROWS)
    unknown = [number for number in wanted if number not in ROWS]
    if unknown:
        parser.error(f"--rows: no row {unknown[0]}; there are {', '.join(map(str, ROWS))}")
    # A shell gives its background jobs an ignored SIGINT, which every launcher would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began, found, failed = time.perf_counter(), list[Row](), False
    for number in wanted if not options.unmeasured else []:
        count, row = ROWS[number]
        # A nursery each: what one row left in a process does not reach the next.
        with Nursery() as nursery, tempfile.TemporaryDirectory() as folder:
            outcome = row(nursery, Path(folder), max(1, round(options.share * count)))
        found += rows_of(number, outcome)
        failed |= bool(outcome.wrong)
        took = time.perf_counter() - began
        print(f"row {number}: {outcome.count} cases, {outcome.share:.1%} as it must ({took:.0f} s so far)", flush=True)
        for text in outcome.wrong:
            print(f"  {text}", flush=True)
    if GROWTH:
        row_18 = "18: memory of a rank"
        found.append(Row(case=row_18, metric="growth", value=GROWTH[0], better="lower", target=0.02))
    if options.unmeasured:
        found = [
            Row(case=f"{n}: {WHAT[n]}", metric="as it must", value=None, target=1.0, note=NOT_TRIED) for n in wanted
        ]
    if options.share == 1.0:
        mine = [str(number) for number in wanted]
        kept = record.keep("faults", mine, _number)
        rows = sorted([*kept.rows, *map(record.as_dict, found)], key=lambda one: int(_number(one)))
        record.write("faults", [], seconds=time.perf_counter() - began, kept=kept._replace(rows=rows))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
