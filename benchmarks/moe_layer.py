"""The experts of a MoE layer against every other way to run them that a CPU has, and the limit.

    python -m benchmarks.moe_layer             # or: moemm bench moe; some fifteen minutes on two quiet cores
    python -m benchmarks.moe_layer --threads 1 --rounds 9

The ways are moemm's parts one by one, a loop over experts, torch's grouped_mm, Hugging Face's experts (eager and
grouped), DeepSpeed's layer and Tutel's; a library that is not installed is left out, with a line that says so. The
limit ("dense") is a dense SwiGLU network of equal active FLOPs in plain torch. Before a case is timed, outputs and
gradients of every way are compared with moe_ffn's. Ways take turns, in an order and with routing drawn anew each round.
Figures are medians of the ratio of moe_ffn to another way in the same round: wall-clock time, or with one thread the
CPU time of the process (the machine may be shared). A case ends when its rounds are done, or three of them and
CASE_SECONDS are over. Extra memory: benchmarks/memory.py. Busy cores: benchmarks/busy.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import busy, libraries, memory, record, tables, ways
from benchmarks.cases import CASES, FP32, MEMORY, SHARED, Case
from benchmarks.record import Matrix, Row
from benchmarks.ways import DENSE, OURS, Setting

CASE_SECONDS = 40.0
LEAST_ROUNDS = 3
PHASES = {"step": "forward and backward", "forward": "forward alone"}
BUSY_THREADS = 2
IMBALANCE = Case(tokens=8192, experts=16, dtype=FP32, top_k=1)


def timed(setting: Setting, run: libraries.Run, routing: Sequence[torch.Tensor]) -> dict[str, float]:
    """Seconds of a step, forward and backward, and of a forward pass that keeps nothing."""
    setting.forget()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    ways.step(setting, run, routing)
    step = clock() - began
    with torch.no_grad():
        began = clock()
        run(setting.x_TD, *routing)
        return {"step": step, "forward": clock() - began}


def rounds_of(case: Case, rounds: int, chosen: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """For each way of a case, round by round, the seconds of each phase."""
    setting, order = Setting(case), random.Random(0)
    routing = case.routing()
    chosen = ways.feasible(case, chosen, routing[1])
    runs = {name: setting.way(name) for name in chosen}
    ways.check(setting, runs, routing)  # which warms up as well
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    began = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > CASE_SECONDS:
            break
        routing = case.routing()
        for name in order.sample(list(chosen), len(chosen)):
            seconds[name].append(timed(setting, runs[name], routing))
    return seconds


def measure(case: Case, rounds: int, chosen: Sequence[str]) -> list[Row]:
    """Rows of one case: moe_ffn against every way, and every way against the dense network."""
    seconds = rounds_of(case, rounds, chosen)
    rows = []
    for phase in PHASES:
        took = {name: [one[phase] for one in found] for name, found in seconds.items()}
        for name in chosen:
            if name == OURS:
                continue
            target = 1.0 if name != DENSE else case.dense if phase == "step" else None
            rows.append(ratio(case.name, f"{phase}: {OURS} / {name}", took[OURS], took.get(name), target))
        if phase == "step":
            typical = 1e3 * statistics.median(took[DENSE])
            rows.append(Row(case=case.name, metric="step: dense", value=typical, unit="ms", better="lower"))
            others = [name for name in chosen if name not in (OURS, DENSE)]
            rows += [ratio(case.name, f"step: {name} / dense", took.get(name), took[DENSE]) for name in others]
    return rows


def ratio(
    case: str, metric: str, top: Sequence[float] | None, bottom: Sequence[float] | None, target: float | None = None
) -> Row:
    """The median, over rounds, of top / bottom in the same round; not measured where one of them is None."""
    if top is None or bottom is None:
        return Row(case=case, metric=metric, value=None, better="lower", target=target)
    ratios = [a / b for a, b in zip(top, bottom, strict=True)]
    value, deviation = statistics.median(ratios), statistics.pstdev(ratios)
    return Row(case=case, metric=metric, value=value, deviation=deviation, better="lower", target=target)


WORKLOADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": torch.ones_like,
    "linear": lambda e: e + 1,
    "Zipf 1": lambda e: 1 / (e + 1),
    "Zipf 2": lambda e: 1 / (e + 1) ** 2,
    "halving": lambda e: 0.5**e,
    "half on one": lambda e: torch.where(e == 0, 15.0, 1.0),
    "half idle": lambda e: (e % 2 == 0).double(),
    "all on one": lambda e: (e == 3).double(),
}


def imbalance(rounds: int) -> list[Row]:
    """Step time of each load, relative to uniform; and of routing that changes, relative to one that stays."""
    case = IMBALANCE
    setting = Setting(case)
    run = setting.way(OURS)
    gates_TK = torch.ones(case.tokens, 1)
    seconds: dict[str, list[float]] = {name: [] for name in (*WORKLOADS, "fixed")}
    share_E = torch.arange(case.experts, dtype=torch.float64)
    fixed_TK = torch.randint(0, case.experts, (case.tokens, 1))
    for number in range(rounds + 1):
        for name in seconds:
            weights = WORKLOADS[name](share_E) if name in WORKLOADS else None
            experts_TK = (
                fixed_TK if weights is None else torch.multinomial(weights, case.tokens, replacement=True)[:, None]
            )
            took = timed(setting, run, (gates_TK, experts_TK))["step"]
            if number:
                seconds[name].append(took)
    rows = [ratio(case.name, "routing drawn anew / fixed", seconds["uniform"], seconds["fixed"], 1.05)]
    for name in list(WORKLOADS)[1:]:
        rows.append(ratio(case.name, f"{name} / uniform", seconds[name], seconds["uniform"], 1.15))
    return rows


def extra_memory(threads: int, chosen: Sequence[str]) -> list[Row]:
    """Rows of the memory that each way's step takes over weights, inputs, output and gradients, with our limit."""
    found = {name: memory.measure(name, threads) for name in chosen}
    rows = []
    for case in MEMORY:
        limit = memory.limit(case) / 1e6
        rows.append(Row(case=case.name, metric="memory: limit", value=limit, unit="MB", better="lower"))
        for name in chosen:
            taken = found[name].get(case.name)
            row = Row(
                case=case.name, metric=f"memory: {name}", value=None if taken is None else taken / 1e6, unit="MB",
                better="lower", target=limit if name == OURS else None,
            )  # fmt: skip
            rows.append(row)
    return rows


def busy_cores(rounds: int, chosen: Sequence[str]) -> list[Row]:
    """Rows of the CPU time of a step with two threads while every core is shared, relative to cores of its own."""
    setting = Setting(SHARED)
    routing = SHARED.routing()

    def step(name: str) -> Callable[[], object]:
        run = setting.way(name)
        return lambda: ways.step(setting, run, routing)

    before = torch.get_num_threads()
    torch.set_num_threads(BUSY_THREADS)
    try:
        found = busy.growth([step(name) for name in chosen], rounds)
    finally:
        torch.set_num_threads(before)
    return [
        Row(
            case=SHARED.name, metric=f"busy: {name}", value=statistics.median(ratios),
            deviation=statistics.pstdev(ratios), better="lower", target=1.3 if name == OURS else None,
        )
        for name, ratios in zip(chosen, found, strict=True)
    ]  # fmt: skip


def matrices(chosen: Sequence[str], threads: int) -> list[Matrix]:
    """How the rows are shown."""
    how = "1 thread, CPU time" if threads == 1 else f"{threads} threads, wall-clock time"
    others = [name for name in chosen if name != OURS]
    peers = [name for name in others if name != DENSE]
    shown = [
        Matrix(
            title=f"moe_ffn / other, {label} ({how}); below 1: moe_ffn is faster",
            columns={name: f"{phase}: {OURS} / {name}" for name in others},
        )
        for phase, label in PHASES.items()
    ]
    against_dense = {OURS: f"step: {OURS} / {DENSE}"} | {name: f"step: {name} / dense" for name in peers}
    dense_ms = {"dense, ms": "step: dense"}
    return [
        *shown,
        Matrix(title=f"way / dense, forward and backward ({how})", columns=dense_ms | against_dense),
        Matrix(
            title=f"extra memory of a step, MB ({threads} {'thread' if threads == 1 else 'threads'})",
            columns={name: f"memory: {name}" for name in ("limit", *chosen)},
        ),
        Matrix(
            title=f"CPU time of a step, cores shared with a busy process each / alone ({BUSY_THREADS} threads)",
            columns={name: f"busy: {name}" for name in chosen},
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="at most, of a case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for line in ways.not_here():
        print(line)
    chosen, began, rows = ways.names(), time.perf_counter(), []
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        *((case.name, lambda case=case: measure(case, options.rounds, chosen)) for case in CASES),  # type: ignore[misc]
        ("imbalance", lambda: imbalance(options.rounds)),
        ("extra memory", lambda: extra_memory(options.threads, chosen)),
        ("busy cores", lambda: busy_cores(options.rounds, chosen)),
    ]
    for number, (name, part) in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {name}", flush=True)
        rows += part()
    shown = matrices(chosen, options.threads)
    path = record.write("moe_layer", rows, seeds=[0], seconds=time.perf_counter() - began, matrices=shown)
    tables.show([path])


if __name__ == "__main__":
    main()
