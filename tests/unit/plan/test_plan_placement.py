"""Placement and simulation, on records with a known answer, and on a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moemm.cli.app import main
from moemm.config import from_dict
from moemm.errors import CheckpointError, ConfigError
from moemm.plan.devices import parse_cluster
from moemm.plan.parameters import ModelShape, build_shape
from moemm.plan.placement import as_yaml, place, to_dict, units_of
from moemm.plan.simulate import Setting, Simulation, rank_counts, sweep
from moemm.plan.source import DescribedModality, DescribedTask, Description, described
from moemm.plan.trace import Trace, read_trace

WINDOWS = 30


def shape_of(groups: list[dict[str, Any]], **model: Any) -> ModelShape:
    """Two modalities, each in a task of its own."""
    modality = DescribedModality(kind="timeseries", shape=(4,), length=32.0)
    tasks = {name: DescribedTask(outputs=2, samples=100, modalities=(name,)) for name in ("left", "right")}
    config = from_dict(
        {
            "data": {"tasks": [{"name": name, "file": f"{name}.h5"} for name in tasks]},
            "model": {"dim": 32, "layers": 1, "experts": {"groups": groups}, **model},
            "train": {"steps": 10},
        },
        origin="here",
    )
    return build_shape(
        config, described(config, Description(modalities=dict.fromkeys(tasks, modality), tasks=tasks), source="")
    )


def trace_of(load_WLME: np.ndarray, tokens_WM: np.ndarray) -> Trace:
    return Trace(
        layers=(0,), rows=("left", "right"), experts=tuple(f"routed_{n}" for n in range(load_WLME.shape[3])),
        load_WLME=load_WLME, tokens_WM=tokens_WM, steps_W=np.ones(WINDOWS), ends_W=np.arange(1, WINDOWS + 1),
    )  # fmt: skip


def opposite(count: int, seed: int = 0) -> Trace:
    """Half of the experts serve the left modality, half the right one; windows have much of one of them."""
    random = np.random.default_rng(seed)
    share_W = np.where(np.arange(WINDOWS) % 2, 0.9, 0.1)
    tokens_WM = np.stack([share_W, 1 - share_W], axis=1) * 10_000
    load_WLME = np.zeros((WINDOWS, 1, 2, count))
    for row in range(2):
        # In turn on two ranks: even ids on one, odd ids on the other. Each modality uses ids of one parity.
        load_WLME[:, 0, row, row::2] = (
            tokens_WM[:, [row]] / (count / 2) * random.uniform(0.98, 1.02, (WINDOWS, count // 2))
        )
    return trace_of(load_WLME, tokens_WM)


def test_experts_that_are_busy_together_are_spread() -> None:
    shape, trace = shape_of([{"kind": "routed", "count": 8, "width": 16}]), opposite(8)
    (found,) = place(shape, trace, 2)
    # In turn, the rank with the experts of the modality of the window has 0.9 of the work: 1.8 times the mean.
    assert found.before[0] == pytest.approx(1.8, abs=0.01)
    assert found.after[0] < 1.03
    for parity in (0, 1):
        assert sorted(found.rank_U[parity::2].tolist()) == [0, 0, 1, 1]
    assert np.bincount(found.rank_U).tolist() == [4, 4]


def test_by_mean_load_alone_nothing_would_be_seen() -> None:
    trace = opposite(8)
    mean_E = trace.load_WLME.sum((0, 1, 2))
    assert mean_E.max() / mean_E.min() < 1.05  # the windows tell what the mean does not


def test_modality_experts_have_the_work_of_their_tokens() -> None:
    shape = shape_of([{"kind": "modality", "width": 16}, {"kind": "routed", "count": 2, "width": 8}])
    trace = opposite(2)
    units = units_of(shape, 0, trace)
    assert units.ids == (("modality_left",), ("modality_right",), ("routed_0",), ("routed_1",))
    np.testing.assert_allclose(units.load_WU[:, 0], trace.tokens_WM[:, 0] * 2 * 32 * 16)
    np.testing.assert_allclose(units.load_WU[:, 2], trace.load_WLME[:, 0, :, 0].sum(1) * 2 * 32 * 8)


def test_ranks_get_as_many_experts_of_each_width() -> None:
    shape = shape_of([{"kind": "modality", "width": 16}, {"kind": "routed", "count": 6, "width": 8}])
    (found,) = place(shape, opposite(6), 2)
    widths = np.array(found.units.widths)
    for width in (8, 16):
        assert len(set(np.bincount(found.rank_U[widths == width], minlength=2).tolist())) == 1


def test_lora_experts_stay_with_their_base() -> None:
    groups = [
        {"kind": "routed", "width": 16, "id": "base"}, {"kind": "routed", "count": 3, "width": 16},
        {"kind": "lora", "base": "base", "rank": 2},
    ]  # fmt: skip
    shape, trace = shape_of(groups), opposite(6)
    trace = replace(trace, experts=("base", "routed_0", "routed_1", "routed_2", "lora_0", "unused"))
    units = units_of(shape, 0, trace)
    assert units.ids == (("base", "lora_0"), ("routed_0",), ("routed_1",), ("routed_2",))


def test_the_section_says_where_each_expert_is() -> None:
    shape = shape_of([{"kind": "routed", "count": 8, "width": 16}])
    found = place(shape, opposite(8), 2)
    section = yaml.safe_load(as_yaml(shape, found, 2))["deepspeed"]
    assert section["ep_size"] == 2
    assert section["placement"] == {f"routed_{n}": [rank] for n, rank in enumerate(found[0].rank_U.tolist())}
    values = to_dict(found, 2)
    assert values["gain"] > 0.9 and values["placed"] < values["in_turn"]


@pytest.mark.parametrize("ep", [1, 9])
def test_groups_that_cannot_be_filled(ep: int) -> None:
    with pytest.raises(ConfigError, match="allowed: 2 to 8"):
        place(shape_of([{"kind": "routed", "count": 8, "width": 16}]), opposite(8), ep)


def test_too_few_windows_and_nothing_to_place() -> None:
    trace = opposite(8)
    with pytest.raises(ConfigError, match="the record has 2"):
        place(shape_of([{"kind": "routed", "count": 8, "width": 16}]), trace.part(slice(0, 2)), 2)
    with pytest.raises(ConfigError, match="nothing to place"):
        place(shape_of([{"kind": "shared", "width": 16}]), trace, 2)


def simulation(count: int = 8) -> Simulation:
    return Simulation(
        shape_of([{"kind": "routed", "count": count, "width": 64}]), opposite(count), parse_cluster("64xH100")
    )


def test_one_rank_loses_nothing_and_many_do() -> None:
    points = sweep(simulation(), 64, Setting(stage=1, ep=8, micro_batch=64, jitter=0.02))
    assert [point.ranks for point in points] == [1, 2, 4, 8, 16, 32, 64]
    first, last = points[0], points[-1]
    assert first.tokens == first.experts == first.network == 0.0 and first.to_dict()["efficiency"] > 0.95
    assert min(last.tokens, last.experts, last.jitter, last.network) > 0.0
    assert last.even == pytest.approx(first.even, rel=0.1)  # a rank's own work stays as it is
    assert last.to_dict()["efficiency"] < points[3].to_dict()["efficiency"] < 1.0


def test_a_placement_lowers_what_experts_cost() -> None:
    simulated = simulation()
    placed = {one.layer: one.rank_U for one in place(simulated.shape, simulated.trace, 2)}
    setting = Setting(stage=1, ep=2, micro_batch=512)
    turn, better = (simulated.point(16, replace(setting, positions=given)) for given in (None, placed))
    assert better.fullest < turn.fullest and better.experts < turn.experts
    assert better.even == pytest.approx(turn.even, rel=1e-6) and better.network == pytest.approx(turn.network, rel=0.05)


def test_without_groups_experts_cost_nothing_more() -> None:
    point = simulation().point(32, Setting(stage=0, ep=1, micro_batch=64))
    assert point.experts == point.jitter == 0.0 and point.tokens > 0.0


def test_the_same_seed_gives_the_same_figures() -> None:
    setting = Setting(stage=1, ep=4, micro_batch=8, jitter=0.1)
    assert simulation().point(8, setting) == simulation().point(8, setting)


def test_rank_counts() -> None:
    assert rank_counts(1) == [1] and rank_counts(8) == [1, 2, 4, 8] and rank_counts(12) == [1, 2, 4, 8, 12]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, without its data: two modalities, eight routed experts."""
    trace = opposite(8)
    names = {"event": "routing_names", "layers": [0], "rows": ["left", "right"], "experts": list(trace.experts)}
    lines = [names] + [
        {"event": "routing", "step": n + 1, "load": trace.load_WLME[n].tolist(), "tokens": trace.tokens_WM[n].tolist()}
        for n in range(WINDOWS)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "rou')
    info = {"kind": "timeseries", "ragged": True, "shape": [4]}
    options = {"patch": [8], "normalize": "train", "dropout": 0.0, "noise": 0.0}
    modalities = [{"name": name, **info} for name in ("left", "right")]
    task = {"label": "label", "target": "classification", "outputs": 3, "metric": "accuracy"}
    tasks = [
        {
            "name": n,
            "file": f"{n}.h5",
            "modalities": [n],
            "sizes": {"train": 100, "val": 9, "test": 9, "ood": 0},
            **task,
        }
        for n in ("left", "right")
    ]
    (tmp_path / "catalogue.json").write_text(json.dumps({"tasks": tasks, "modalities": modalities}))
    specs = {one["name"]: {"info": one, "kind": "timeseries", "options": options, "fitted": {}} for one in modalities}
    (tmp_path / "modalities.json").write_text(json.dumps(specs))
    config = {
        "data": {"tasks": [{"name": n, "file": f"{n}.h5"} for n in ("left", "right")]},
        "model": {"dim": 32, "layers": 1, "experts": {"groups": [{"kind": "routed", "count": 8, "width": 16}]}},
        "train": {"steps": 30, "batch_size": 100},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_run_without_its_data_is_planned_by_its_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    # 10,000 tokens a window of one step of 100 samples, of which each has one modality.
    assert values["data"]["tokens_per_sample_total"] == pytest.approx(100.0)
    assert "the record of" in values["data"]["source"]


def test_the_rate_of_a_run_is_taken_where_that_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(run), "--gpus", "2xcpu", "--measured", "--json"]
    assert main(arguments) == 4 and "give --efficiency" in capsys.readouterr().err
    manifest = run / "checkpoints" / "step_00000030" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"world_size": 2}')
    reports = [{"event": "train", "tokens_per_second": rate} for rate in (1.0, 5000.0, 5000.0)]
    record = run / "metrics.jsonl"
    record.write_text("\n".join(map(json.dumps, reports)) + "\n" + record.read_text())
    assert main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gpus"]["efficiency_from"] == "measured in the run"
    # Two ranks like those of the run compute as it did.
    computed = (
        values["choice"]["batch_size"] * values["data"]["tokens_per_sample_total"] / values["choice"]["computing"]
    )
    assert computed == pytest.approx(5000.0, rel=1e-6)
    assert main(["plan", str(run / "config.yaml"), "--measured"]) in (2, 3)


def test_the_verbs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrow terminal breaks the headings
    section = tmp_path / "placed.yaml"
    assert main(["plan", "placement", str(run), "--ep", "2", "--output", str(section)]) == 0
    assert len(yaml.safe_load(section.read_text())["deepspeed"]["placement"]) == 8
    capsys.readouterr()
    assert (
        main(["plan", "simulate", str(run), "--gpus", "16xH100", "--ep", "2", "--json", "--plot", str(tmp_path / "p")])
        == 0
    )
    values = json.loads(capsys.readouterr().out)
    assert [point["ranks"] for point in values["points"]["placed"]] == [1, 2, 4, 8, 16]
    assert (tmp_path / "p.svg").stat().st_size > 5000 and (tmp_path / "p.png").exists()
    assert main(["plan", "simulate", str(run), "--gpus", "4xH100", "--ep", "1", "--model.dim", "64"]) == 0
    assert "efficiency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["placement", "--ep", "9"], "allowed: 2 to 8"),
        (["placement", "--late", "0"], "--late 0"),
        (["placement", "--output", "/nowhere/at/all"], "cannot be written"),
        (["simulate", "--ep", "0"], "--ep 0"),
        (["simulate", "--zero", "7"], "allowed: 0, 1, 2, 3"),
        (["simulate", "--jitter", "-1"], "--jitter -1"),
        (["simulate", "--gpus", "4xV100"], "is not known"),
    ],
)
def test_errors_of_the_verbs(arguments: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = arguments
    assert main(["plan", verb, str(run), *rest]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_recorded_no_routing(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"event": "train"}\n')
    with pytest.raises(CheckpointError, match="holds 0 windows"):
        read_trace(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_trace(run)
    (run / "catalogue.json").write_text("{}")
    assert main(["plan", str(run)]) == 4
