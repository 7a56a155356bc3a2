"""The planner's bytes of collectives are those that two ranks send, for every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moemm.distributed import connect
from moemm.plan.devices import DEVICES
from moemm.plan.layout import make_layout
from moemm.plan.network import bytes_of_rows, collectives
from moemm.plan.parameters import build_shape
from moemm.plan.source import from_data
from moemm.plan.workload import workload
from moemm.testing import distributed
from moemm.testing.tiny import tiny_config, write_tiny_data
from moemm.testing.traffic import count_traffic


@pytest.mark.parametrize(
    ("stages", "accumulation", "precision", "ep"),
    [([0, 1, 2, 3], 2, "fp32", 1), ([2], 1, "bf16", 1), ([1], 1, "fp32", 2)],
)
def test_bytes_are_those_of_the_plan(
    stages: list[int], accumulation: int, precision: str, ep: int, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_tiny_data(tmp_path / str(rank))
    given = {"folder": str(tmp_path), "stages": stages, "accumulation": accumulation, "precision": precision, "ep": ep}
    ranks = distributed.run_distributed("counting:count", ranks=2, arguments=given, path=[Path(__file__).parent])
    loaded = tiny_config(
        tmp_path / "0", train={"batch_size": 8, "steps": 9, "precision": precision}, deepspeed={"zero_stage": 1}
    )
    shape = build_shape(loaded.config, from_data(loaded))
    for place, stage in enumerate(stages):
        layout = make_layout(
            shape, ranks=2, stage=stage, ep=ep, micro_batch=4 // accumulation, accumulation=accumulation
        )
        planned: dict[str, int] = {}
        for one in collectives(shape, workload(shape), layout, DEVICES["cpu"]):
            planned[one.kind] = planned.get(one.kind, 0) + one.payload
        counted, rows = zip(*(rank.value[place] for rank in ranks), strict=True)
        assert len(rows[0]) == (len(shape.layers) * accumulation if ep > 1 else 0)
        if ep > 1:  # the plan knows how many tokens go where on average; it is exact for those that went
            sent = sum(one.pop("all_to_all") for one in counted)
            assert planned.pop("all_to_all") == pytest.approx(sent / 2, rel=0.3)
            means = (sum(here) / 2 for here in zip(*rows, strict=True))
            parts = zip(shape.layers, means, strict=True)
            assert 2 * sum(bytes_of_rows(shape, layer, mean, layout) for layer, mean in parts) == sent
        assert list(counted) == [planned, planned], f"ZeRO {stage}"


def test_one_rank_sends_nothing_and_collectives_work_afterwards() -> None:
    connect(timeout_s=60.0)
    row = torch.ones(3)
    with count_traffic() as traffic:
        dist.all_reduce(row)
    dist.all_reduce(row)  # as it was before
    dist.all_gather([torch.empty(3)], row)
    assert not traffic.bytes and not traffic.calls
