"""What `moemm plan` says of memory and network against what runs take.

    python -m benchmarks.planner

With --measured FILE what was measured is kept there, and cases that it holds are not run again: predictions can then be
compared anew in seconds.

Each case trains three steps on one process and on two (gloo), each process with one thread. Memory is the peak of
process 0, VmHWM, over its whole life; "framework" is the same of a model of 4,000 parameters with two samples: what
Python, torch, DeepSpeed and moemm take. "above the framework" is what a model adds: predicted without, and measured
less, that figure. Bytes of collectives are counted at the process group, in the third step. On a GPU: not measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.memory import ENVIRONMENT
from benchmarks.planner_job import write_data, write_run
from benchmarks.record import Row, write
from moemm.config import load_config
from moemm.plan.devices import parse_cluster
from moemm.plan.layout import Layout, make_layout
from moemm.plan.memory import Memory, memory
from moemm.plan.network import collectives
from moemm.plan.parameters import ModelShape, build_shape, parameters
from moemm.plan.source import from_data
from moemm.plan.workload import workload
from moemm.testing.distributed import run_distributed

TARGET = 0.10
KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def case(stage: int, precision: str = "fp32", *, batch: int, model: dict[str, Any], **train: Any) -> dict[str, Any]:
    """The sections of a configuration. batch: samples of a rank and micro-batch."""
    train = {"batch_size": batch, "precision": precision, **train}
    return {"model": model, "train": train, "deepspeed": {"zero_stage": stage}}


def _model(dim: int, layers: int, groups: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"dim": dim, "layers": layers, "heads": 8, "experts": {"groups": groups}, **more}


def _routed(count: int, width: int) -> list[dict[str, Any]]:
    return [{"kind": "routed", "count": count, "width": width}]


FIRST = "framework"
FRAMEWORK = case(0, batch=2, model={**_model(16, 1, _routed(2, 8)), "heads": 2})
_WIDE = _model(512, 2, _routed(24, 1024))
_LONG = _model(256, 4, [*_routed(4, 256), {"kind": "shared", "width": 256}], router={"top_k": 2})
_MIXED = _model(
    256, 3, [{"kind": "shared", "width": 384}, {"kind": "modality", "width": 256}, *_routed(8, 192)],
    activation="swiglu", dropout=0.1, router={"top_k": 2},
)  # fmt: skip
CASES = {
    "53 M parameters, ZeRO 0": case(0, batch=2, model=_WIDE),
    "53 M parameters, ZeRO 2, bf16": case(2, "bf16", batch=2, model=_WIDE),
    "53 M parameters, ZeRO 3": case(3, batch=8, model=_WIDE),
    "8,192 tokens, ZeRO 0": case(0, batch=64, model=_LONG),
    "8,192 tokens, ZeRO 1, checkpointing": case(1, batch=64, model=_LONG, activation_checkpointing=True),
    "swiglu, dropout, modality experts, ZeRO 1, two micro-batches": case(1, batch=40, model=_MIXED, accumulation=2),
}


def configuration(folder: Path, values: dict[str, Any], ranks: int) -> Path:
    """The file of a case on so many ranks."""
    values = copy.deepcopy(values)
    values["train"]["batch_size"] *= ranks * values["train"].get("accumulation", 1)
    return write_run(folder, values)


def run(path: Path, ranks: int) -> dict[str, Any]:
    """What process 0 measured."""
    output = tempfile.mkdtemp(dir=path.parent)
    done = run_distributed(
        "benchmarks.planner_job:measure", ranks=ranks, arguments={"path": str(path), "output": f"{output}/run"},
        environ=ENVIRONMENT, timeout_s=900,
    )  # fmt: skip
    value: dict[str, Any] = done[0].value
    return value


def label_of(name: str, ranks: int) -> str:
    """Of a case on so many ranks."""
    return f"{name}, {ranks} rank{'s' if ranks > 1 else ''}"


def bytes_by_kind(shape: ModelShape, layout: Layout) -> dict[str, int]:
    """Payloads of a step on a rank by kind of collective, as the planner has them."""
    sent: Counter[str] = Counter()
    for one in collectives(shape, workload(shape), layout, parse_cluster("cpu").device):
        sent[one.kind] += one.payload
    return dict(sent)


def predicted(path: Path, ranks: int) -> tuple[Memory, dict[str, int]]:
    """Memory of a rank, and bytes of a step by kind of collective."""
    loaded = load_config(path)
    train, stage = loaded.config.train, loaded.config.deepspeed.zero_stage
    shape = build_shape(loaded.config, from_data(loaded))
    work, device = workload(shape), parse_cluster("cpu").device
    micro = train.batch_size // ranks // train.accumulation
    layout = make_layout(shape, ranks=ranks, stage=stage, micro_batch=micro, accumulation=train.accumulation)
    return memory(shape, work, layout, device), bytes_by_kind(shape, layout)


def rows_of(label: str, ranks: int, path: Path, found: dict[str, Any], framework: float) -> list[Row]:
    """What a case gives."""
    held, sent = predicted(path, ranks)
    total, peak = held.total / 1e6, found["peak"] / 1e6
    base = parse_cluster("cpu").device.base / 1e6
    shape = build_shape(load_config(path).config, from_data(load_config(path)))
    assert sum(parameters(shape).values()) == found["total"], "the model has other parameters than the plan says"
    rows = [
        Row(case=label, metric="peak measured", value=peak, unit="MB"),
        Row(case=label, metric="peak predicted", value=total, unit="MB"),
        Row(case=label, metric="off by", value=abs(total / peak - 1), better="lower", target=TARGET),
        Row(
            case=label, metric="off by, above the framework", better="lower",
            value=abs((total - base) / (peak - framework / 1e6) - 1),
        ),
    ]  # fmt: skip
    counted = Counter[str](found["traffic"])
    for kind in KINDS if ranks > 1 else ():
        if counted[kind] or sent.get(kind):
            rows.append(Row(case=label, metric=f"{kind}: counted", value=counted[kind] / 1e6, unit="MB"))
            off = float(abs(counted[kind] - sent.get(kind, 0)))
            rows.append(Row(case=label, metric=f"{kind}: bytes off", value=off, better="lower", target=0.0))
    print(f"{label}: {peak:.0f} MB measured, {total:.0f} predicted ({held.moment}) {found['marks']}", flush=True)
    print({part: round(value / 1e6) for part, value in held.parts.items()}, dict(counted), sent, flush=True)
    return rows


def main() -> None:
    """Run all cases, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path)
    kept: Path | None = parser.parse_args().measured
    found: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    began, rows = time.perf_counter(), []
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        for name, values in {FIRST: FRAMEWORK, **CASES}.items():
            for ranks in (1,) if name == FIRST else (1, 2):
                label = label_of(name, ranks)
                if label not in found:
                    found[label] = run(configuration(folder, values, ranks), ranks)
                    if kept:
                        kept.write_text(json.dumps(found, indent=1))
        framework = found[label_of(FIRST, 1)]["peak"]
        rows.append(Row(case=label_of(FIRST, 1), metric="peak measured", value=framework / 1e6, unit="MB"))
        for name, values in CASES.items():
            for ranks in (1, 2):
                path, label = configuration(folder, values, ranks), label_of(name, ranks)
                rows += rows_of(label, ranks, path, found[label], framework)
    rows.append(Row(case="GPU", metric="off by", value=None, better="lower", target=TARGET, note="no GPU was at hand"))
    print(json.dumps([row.__dict__ for row in rows if row.ok is False], indent=1))
    write("planner", rows, seeds=[0], seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
