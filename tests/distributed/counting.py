"""Jobs of test_counting.py: what ranks send in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moemm.data.loader import train_loader
from moemm.distributed import connect
from moemm.testing.tiny import tiny_config
from moemm.testing.traffic import count_rows, count_traffic
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer


def count(folder: str, stages: list[int], accumulation: int, precision: str, ep: int) -> list[list[Any]]:
    """For each stage, of the tiny run's second step: the bytes of each kind of collective, the rows of each exchange.
    """  # fmt: skip
    world, found = connect(timeout_s=60.0), []
    for stage in stages:
        train = {
            "output": f"{folder}/{precision}_{stage}", "steps": 9, "batch_size": 8, "log_every": 9,
            "accumulation": accumulation, "precision": precision,
        }  # fmt: skip
        loaded = tiny_config(
            Path(folder) / str(world.rank), deepspeed={"zero_stage": stage, "ep_size": ep}, train=train
        )
        setup, _ = prepare(loaded, resume=False)
        trainer = Trainer(setup, world, [], StopRequest())
        loader = train_loader(
            setup.catalogue,
            loaded.config,
            rank=world.rank,
            world_size=world.size,
            total_steps=9,
            prepare=trainer._prepare,
        )
        batches = iter(loader)
        trainer.engine.model.train()
        trainer._one_step(batches)  # ZeRO-3 says at first in which order modules come
        with count_traffic() as traffic, count_rows() as rows:
            trainer._one_step(batches)
        found.append([dict(traffic.bytes), rows])
        trainer.close()
    return found
