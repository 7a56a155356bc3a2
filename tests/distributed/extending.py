"""What runs inside the ranks of test_extending.py. Arguments and results are JSON."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import torch

from moemm.checkpoint import newest_complete
from moemm.checkpoint.store import read_weights
from moemm.config import load_config
from moemm.distributed import connect, on_main
from moemm.train import train


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(newest_complete(run / "checkpoints").folder)


def through(run: str, stages: list[int], precisions: list[str]) -> dict[str, dict[str, list[str]]]:
    """For each stage train copies of an extended run, one through and one stopped in the middle.

    Old tensors that moved, new ones that did not, and tensors in which the two differ.
    """
    world = connect(timeout_s=60)
    first = weights(Path(run))
    new = {name for name in first if "spectrum" in name}
    found = {}
    for stage, precision in zip(stages, precisions, strict=True):
        ends = {}
        for case in ("whole", "broken"):
            copy = Path(f"{run}_{stage}_{case}")
            source = Path(run) if case == "whole" else Path(f"{run}_{stage}_whole")
            if world.is_main:
                shutil.copytree(source, copy)
                if case == "broken":
                    shutil.rmtree(copy / "checkpoints" / "step_000004")
                    (copy / "summary.json").unlink()
            on_main(lambda: None)  # the others wait
            extra = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000}
            words = [f"train.output={copy}", f"train.precision={precision}", f"deepspeed.zero_stage={stage}"]
            words += [f"deepspeed.extra.zero_optimization={extra}"] if stage == 3 else []
            summary = train(load_config(copy / "config.yaml", words), resume=True)
            assert summary["exit_code"] == 0
            gc.collect()
            ends[case] = weights(copy)
        whole, broken = ends["whole"], ends["broken"]
        found[str(stage)] = {
            "moved": [name for name in set(first) - new if not torch.equal(first[name], whole[name])],
            "stayed": [name for name in new if torch.equal(first[name], whole[name])],
            "differ": [name for name in whole if not torch.equal(whole[name], broken[name])],
        }
    return found
