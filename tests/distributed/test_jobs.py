"""Real jobs of two processes with gloo. Few jobs with many checks each: starting one takes seconds."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import BAGS

from moemm.data.build import build_catalogue
from moemm.data.loader import train_loader
from moemm.testing.distributed import run_distributed
from moemm.testing.tiny import tiny_config, write_tiny_data

HERE = Path(__file__).parent
SOAK = os.environ.get("MOEMM_SOAK") == "1"
pytestmark = [pytest.mark.soak] if SOAK else []  # which tries more of the same
STAGES = [0, 1, 2, 3]
MOST = STAGES if SOAK else [0, 2, 3]
"""Where other tests have every stage: ZeRO 1 and 2 differ in when gradients are cut up, not in what comes of them."""
HARMONIZED = [
    *product(("upgrad sample",), STAGES),
    *product(("pcgrad batch",), STAGES if SOAK else [2]),
    ("gradvac modality", 2),
    ("curriculum accumulated", 2),
    *product(("mgda apart",), [0, 3] if SOAK else [3]),
    ("upgrad trunk", 3),
    ("mgda trunk accumulated", 2),
    *product(("uncertainty",), MOST),
    ("dwa", 2),
    ("famo accumulated", 2),
    ("famo upgrad apart", 3),
    *product(("gradnorm",), [0, 3] if SOAK else [3]),
]
RECOMPUTED = [*product(("settled",), MOST), ("every block", 2), ("every block", 3), ("without dropout", 3)]
CASES = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")]


def job(name: str, *, ranks: int = 2, **arguments: Any) -> list[Any]:
    results = run_distributed(f"jobs:{name}", ranks=ranks, arguments=arguments, path=[HERE], timeout_s=300)
    return [result.value for result in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    write_tiny_data(made)
    (made / "rank_1").mkdir()
    write_tiny_data(made / "rank_1")
    return made


@pytest.fixture(scope="module")
def losses(folder: Path) -> dict[str, np.ndarray]:
    alone = job("parity", ranks=1, folder=str(folder), stages=[0])[0]
    both = job("parity", folder=str(folder), stages=STAGES)
    assert both[0] == both[1], "ranks report different losses"
    found = {f"two {name}": np.array(value) for name, value in both[0].items()}
    return found | {f"one {name}": np.array(value) for name, value in alone.items()}


@pytest.mark.parametrize(
    ("case", "stage"), [*product(("mixed", "apart"), STAGES), ("accumulated", 0), ("accumulated", 2)]
)
def test_two_ranks_with_half_the_batch_give_the_losses_of_one(
    losses: dict[str, np.ndarray], case: str, stage: int
) -> None:
    one, two = losses[f"one {case} 0"], losses[f"two {case} {stage}"]
    assert one.shape == two.shape == (6, 4)
    assert one[-1, 0] < one[0, 0] - 0.05, "the losses must move for this to mean anything"
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_the_ranks_of_that_run_hold_different_numbers_of_samples(losses: dict[str, np.ndarray]) -> None:
    alone, both = losses["one samples"].tolist(), losses["two samples"].tolist()
    assert [sum(step) for step in both] == [step[0] for step in alone] == [8] * 6
    assert any(first != second for first, second in both)


@pytest.fixture(scope="module")
def lacking(folder: Path) -> dict[str, np.ndarray]:
    alone = job("absent", ranks=1, folder=str(folder), stages=[0], kinds=["bank", "predict"])[0]
    both = job("absent", folder=str(folder), stages=[0, 2, 3], kinds=["bank", "predict"])
    found = {f"two {name}": np.array(value) for name, value in both[0].items()}
    return found | {f"one {name}": np.array(value) for name, value in alone.items()}


@pytest.mark.parametrize(("kind", "stage"), list(product(("bank", "predict"), (0, 2, 3))))
def test_a_rank_whose_samples_lack_a_modality_trains_as_one_would(
    lacking: dict[str, np.ndarray], kind: str, stage: int
) -> None:
    one, two = lacking[f"one {kind} 0"], lacking[f"two {kind} {stage}"]
    assert one.shape == (6, 4 if kind == "predict" else 3), "the regression's loss is reported where there is one"
    assert one[-1, 0] < one[0, 0] - 0.05, "the losses must move for this to mean anything"
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def joined(folder: Path) -> dict[str, np.ndarray]:
    data = str(HERE.parents[1] / "data" / "quickstart")
    alone = job("joint", ranks=1, folder=str(folder), data=data, stages=[0])[0]
    both = job("joint", folder=str(folder), data=data, stages=MOST)
    assert both[0] == both[1], "ranks report different losses"
    found = {f"two {name}": np.array(value) for name, value in both[0].items()}
    return found | {f"one {name}": np.array(value) for name, value in alone.items()}


@pytest.mark.parametrize(
    ("case", "stage"), [*product(("mixed", "apart"), MOST), *product(("every block", "settled"), (0, 3))]
)
def test_samples_of_two_tasks_train_on_two_ranks_as_on_one(
    joined: dict[str, np.ndarray], case: str, stage: int
) -> None:
    one, two = joined[f"one {case} 0"], joined[f"two {case} {stage}"]
    assert one.shape == two.shape == (6, 5), "loss, router, and three tasks"
    assert one[-1, 0] < one[0, 0] - 0.05, "the losses must move for this to mean anything"
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    if case == "settled":
        plain = joined["one apart 0"]  # the same batches
        assert np.abs(one - plain)[1:].max() > 1e-4, "settling must change something to mean anything"


@pytest.mark.parametrize("stage", MOST)
def test_pairs_are_judged_on_two_ranks_as_on_one(joined: dict[str, np.ndarray], stage: int) -> None:
    one, two = joined["one judged 0"], joined[f"two judged {stage}"]
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    assert np.abs(one - joined["one unjudged 0"]).max() > 1e-2, "something must be left out to mean anything"


@pytest.fixture(scope="module")
def pretexts(folder: Path) -> dict[str, np.ndarray]:
    alone = job("pretext", ranks=1, folder=str(folder), stages=[0])[0]
    both = job("pretext", folder=str(folder), stages=MOST)
    assert both[0] == both[1], "ranks report different losses"
    found = {f"two {name}": np.array(value) for name, value in both[0].items()}
    return found | {f"one {name}": np.array(value) for name, value in alone.items()}


@pytest.mark.parametrize(("case", "stage"), [*product(("mixed", "siglip", "mil_nce", "apart", "unlabelled"), MOST)])
def test_objectives_without_labels_are_those_of_the_global_batch(
    pretexts: dict[str, np.ndarray], case: str, stage: int
) -> None:
    one, two = pretexts[f"one {case} 0"], pretexts[f"two {case} {stage}"]
    # loss, router; 2 tasks where labels are used; 4 objectives
    assert one.shape == two.shape == (6, 6 if case == "unlabelled" else 8)
    assert (np.abs(np.diff(one[:, -4:], axis=0)).max(0) > 1e-3).all(), "the losses must move for this to mean anything"
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_bags_of_that_run_lie_on_two_ranks(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, **BAGS)
    straddle = 0
    with train_loader(build_catalogue(loaded.config.data, base=tmp_path), loaded.config) as loader:
        for batch in islice(loader, 6):
            first, second = (batch.bag[half][batch.presence[half].sum(1) > 1] for half in (slice(8), slice(8, 16)))
            straddle += int((first[:, None] == second).sum())
    assert straddle > 0


@pytest.fixture(scope="module")
def settled(folder: Path) -> dict[str, np.ndarray]:
    names = ["sum", *dict.fromkeys(case for case, _ in HARMONIZED)]
    alone = job("harmonized", ranks=1, folder=str(folder), cases=[(case, 0) for case in names])[0]
    both = job("harmonized", folder=str(folder), cases=HARMONIZED)
    assert both[0] == both[1], "ranks report different losses"
    found = {f"two {name}": np.array(value) for name, value in both[0].items()}
    return found | {f"one {name}": np.array(value) for name, value in alone.items()}


@pytest.mark.parametrize(("case", "stage"), HARMONIZED)
def test_conflicts_are_settled_as_one_rank_would(settled: dict[str, np.ndarray], case: str, stage: int) -> None:
    one, two = settled[f"one {case} 0"], settled[f"two {case} {stage}"]
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    if not case.endswith(("apart", "accumulated")):  # those see other batches
        assert np.abs(one[1:] - settled["one sum 0"][1:]).max() > 5e-3, "this must change something to mean anything"


PLACED = [("fp32", 1), ("bf16", 2), ("fp32", 3), ("bf16", 3)]


@pytest.fixture(scope="module")
def trapped(folder: Path) -> list[Any]:
    calls = [
        ("traps", {"stages": STAGES}),
        ("poisoned", {"stages": [0, 2]}),
        ("full_disk", {"failures": 2}),
        ("full_disk", {"failures": 9}),
        ("interrupted", {}),
        ("recomputed", {"cases": RECOMPUTED}),
        ("full_disk", {"failures": 2, "background": True}),
        ("placed", {"cases": PLACED}),
    ]
    return job("several", folder=str(folder), calls=calls)


@pytest.mark.parametrize(("precision", "stage"), PLACED)
def test_no_device_gets_more_of_the_weights_than_it_trains_with(trapped: list[Any], precision: str, stage: int) -> None:
    for rank in trapped:
        here, types, whole = rank[7][f"{precision} {stage}"]
        assert types == [{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]]
        assert here == (0 if stage == 3 else whole), "ZeRO-3 holds each tensor in parts from the start"


@pytest.mark.parametrize("stage", STAGES)
def test_guard_lets_equal_gradients_pass(trapped: list[Any], stage: int) -> None:
    for rank in trapped:
        for mode in ("same", "zero rows"):
            assert rank[0][f"{stage} {mode}"] == "changed: no error"


@pytest.mark.parametrize("stage", STAGES)
def test_guard_fires_where_the_parameters_differ(trapped: list[Any], stage: int) -> None:
    for rank in trapped:
        text = rank[0][f"{stage} set"]
        assert text.startswith("unchanged: Ranks differ in their gradients")
        assert "only rank 0: image.weight; only rank 1: audio.weight" in text
        assert "zero rows" in text


@pytest.mark.parametrize("stage", STAGES)
def test_guard_fires_where_only_the_order_differs(trapped: list[Any], stage: int) -> None:
    for rank in trapped:
        text = rank[0][f"{stage} order"]
        assert text.startswith("unchanged: Ranks differ in their gradients")
        assert "in another order, from number 1 on: rank 0 has audio.weight, rank 1 has image.weight" in text


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_a_kernel_leaves_out_is_zero(trapped: list[Any], stage: int) -> None:
    for rank in trapped:
        assert rank[0][f"{stage} no gradient"] == "changed: no error"


def test_guard_fires_where_the_graph_hides_parameters(trapped: list[Any]) -> None:
    for rank in trapped:
        assert rank[0]["0 hidden"].startswith("unchanged: Ranks differ in their gradients")


@pytest.mark.parametrize("stage", [0, 2])
def test_non_finite_loss_stops_all_ranks_before_it_is_applied(trapped: list[Any], stage: int) -> None:
    for rank in trapped:
        text, step, finite = rank[1][str(stage)]
        assert text.startswith("The loss of step 3 is not finite")
        assert "rank 1, " in text and "of task shapes has an infinite value in modality image\nNothing" in text
        assert step == 2 and finite


def test_full_disk_on_one_rank(trapped: list[Any]) -> None:
    for rank in trapped:
        passing, lasting = rank[2], rank[3]
        assert passing["error"] == "" and passing["step"] == 12
        assert len(passing["messages"]) == 2
        assert all("No space left" in text and "of 3 failures" in text for text in passing["messages"])
        assert "3 saves in a row failed" in lasting["error"] and lasting["step"] == 8
        behind = rank[6]
        assert behind["error"] == "" and len(behind["messages"]) == 2 and "of 3 failures" in behind["messages"][1]
    assert trapped[0][2]["left"] == trapped[0][6]["left"] == ["latest", "step_000010", "step_000012"]
    assert trapped[0][3]["left"] == ["latest", "step_000002"]


def test_signal_to_one_rank_stops_both_at_one_boundary(trapped: list[Any]) -> None:
    for rank in trapped:
        found = rank[4]
        assert (found["finished"], found["step"], found["stopped_by"]) == (False, 3, signal.SIGTERM)
    assert trapped[0][4]["saved"] == ["latest", "step_000002", "step_000003"], "what was under way is waited for"


@pytest.mark.parametrize(("case", "stage"), RECOMPUTED)
def test_blocks_that_are_computed_again_change_nothing(trapped: list[Any], case: str, stage: int) -> None:
    for rank in trapped:
        kept, again = rank[5][f"{case} {stage}"]
        assert again == kept, "losses, what the routers did, and the weights at the end, with dropout"
        assert np.ptp(np.array(kept[0])[:, 0]) > 0.05 and kept[3] == 6, "the losses must move to mean anything"


@pytest.fixture(scope="module")
def resumes(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = job("whole", folder=str(folder), cases=CASES)[0]
    for stage, precision in CASES:
        newest = folder / f"{stage}_{precision}" / "checkpoints" / "step_000006"
        if stage == 1:  # cut short: the run must fall back
            shard = next(path for path in newest.glob("optimizer_*"))
            shard.write_bytes(shard.read_bytes()[:-100])
        else:
            shutil.rmtree(newest)
    return whole, job("resumed", folder=str(folder), cases=CASES)[0]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_resume_is_bit_equal_with_dropout(
    resumes: tuple[dict[str, Any], dict[str, Any]], stage: int, precision: str
) -> None:
    (losses, weights, _), (again, weights_again, skipped) = (part[f"{stage} {precision}"] for part in resumes)
    assert again == losses[3:]
    assert weights_again == weights
    assert [name for name, _ in skipped] == (["step_000006"] if stage == 1 else [])
    assert all("cut short" in reason for _, reason in skipped)
