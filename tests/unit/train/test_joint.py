"""Several labels of one sample in one pass, on the quickstart's avclip: a digit that is seen, heard and moves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moemm.config import LoadedConfig
from moemm.data import Packer, SplitDataset
from moemm.data.catalogue import Catalogue
from moemm.data.labels import labelled_items
from moemm.data.loader import train_loader
from moemm.data.mixture import MixtureSampler
from moemm.data.sample import PackedBatch, rows_of
from moemm.distributed import World
from moemm.errors import CheckpointError
from moemm.evaluate import EvaluationPlan, evaluate_model, evaluate_subsets
from moemm.models import Model, build_model
from moemm.objectives import supervised_losses
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train
from moemm.train.health import find
from moemm.train.labels import Labels
from moemm.train.setup import learn_modalities, total_steps
from moemm.train.step import Objective, Window

QUICKSTART = Path(__file__).parents[3] / "data" / "quickstart"
TASKS = [
    {"name": "vowel", "file": "vowels.h5"},
    {"name": "digit", "file": "avclip.h5"},
    {"name": "motion", "file": "avclip.h5", "label": "label_motion", "weight": 2.0},
]
Load = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(joint, **sections): vowels, and the two labels of avclip, which are `joint` or not."""

    def config(joint: bool, *, data: dict[str, Any] | None = None, **sections: dict[str, Any]) -> LoadedConfig:
        own = {"root": str(QUICKSTART), "tasks": TASKS, "joint_labels": joint, **(data or {})}
        sections["modalities"] = {"video": {"patch": [1, 8, 8]}}
        return tiny_config(tmp_path, data={**own, "num_workers": 0}, **sections)

    return config


def made(loaded: LoadedConfig) -> tuple[Catalogue, Model]:
    catalogue, specs = learn_modalities(loaded)
    torch.manual_seed(0)
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks)
    for query in model.heads.pool.query.values():
        torch.nn.init.normal_(query)  # the queries must differ for this to mean anything
    return catalogue, model


def pack(catalogue: Catalogue, *picks: tuple[str, int]) -> PackedBatch:
    """(task, item of its train split) of each sample."""
    sets = {name: SplitDataset(catalogue, task=name, split="train") for name, _ in picks}
    return Packer(catalogue)([sets[name][item] for name, item in picks])


def test_tasks_that_differ_in_their_label_alone_are_a_group(load: Load) -> None:
    assert learn_modalities(load(False))[0].groups == ((0,), (1,), (2,))
    catalogue = learn_modalities(load(True))[0]
    assert catalogue.groups == ((0,), (1, 2))
    assert [task.drawn_with for task in catalogue.tasks] == [None, None, "digit"]
    other = [*TASKS, {**TASKS[2], "name": "heard", "modalities": ["audio"]}]
    assert learn_modalities(load(True, data={"tasks": other}))[0].groups == ((0,), (1, 2), (3,))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every block": {"predict_every_block": True},
    "latents": {"latents": 2},
    "bank": {"missing": {"kind": "bank"}},
    "predict": {"missing": {"kind": "predict"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_joint_batch_is_two_batches_of_the_same_samples(load: Load, name: str) -> None:
    (joint, model), (apart, twin) = (made(load(flag, model=OPTIONS[name])) for flag in (True, False))
    twin.load_state_dict(model.state_dict())
    items = [3, 8, 2]
    batch = pack(joint, ("digit", 3), ("vowel", 5), ("digit", 8), ("digit", 2))
    parts = [pack(apart, ("digit", 3), ("vowel", 5), ("digit", 8), ("digit", 2))]
    parts.append(pack(apart, *(("motion", item) for item in items)))
    if name in ("bank", "predict"):  # then a modality must be missing: sample 3 loses its sound
        batch = without_audio_of_the_first(batch)
        parts = [without_audio_of_the_first(part) for part in parts]
    output, others = model(batch), [twin(part) for part in parts]
    for one, *pair in zip([output.outputs, *output.earlier], *([o.outputs, *o.earlier] for o in others), strict=True):
        assert {name: len(rows) for name, rows in one.items()} == {"vowel": 1, "digit": 3, "motion": 3}
        together = {name: torch.cat([rows[name] for rows in pair]) for name in one}
        torch.testing.assert_close(one, together, atol=1e-5, rtol=1e-5)
    losses = supervised_losses(output.outputs, batch.targets, joint.tasks)
    apart_losses = [supervised_losses(o.outputs, p.targets, apart.tasks) for o, p in zip(others, parts, strict=True)]
    for task in losses:
        torch.testing.assert_close(losses[task], sum(one[task] for one in apart_losses), atol=1e-5, rtol=1e-5)
    torch.stack(list(losses.values())).sum().backward()
    for one in apart_losses:
        torch.stack(list(one.values())).sum().backward()
    assert min(query.grad.abs().sum() for query in model.heads.pool.query.values()) > 0
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5, rtol=1e-4, msg=lambda text, k=key: k + text)


def test_counting_absent_modalities_asks_no_device(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue, model = made(load(True, model=OPTIONS["bank"]))
    batches = [
        without_audio_of_the_first(pack(catalogue, ("digit", 3), ("vowel", 5), ("digit", 8))),
        without_audio_of_the_first(pack(catalogue, ("motion", 3), ("vowel", 5))),
    ]
    monkeypatch.setattr(torch, "bincount", None)
    assert model.missing is not None
    for batch in batches:
        absent = model.missing.absent(batch)
        names = [list(batch.modalities)[number] for number in absent.modality_A.tolist()]
        assert names == ["audio"] and absent.sample_A.tolist() == [0]


def without_audio_of_the_first(batch: PackedBatch) -> PackedBatch:
    audio, column = batch.modalities["audio"], list(batch.modalities).index("audio")
    assert audio.lengths is not None and audio.sample[0] == 0
    first = int(audio.lengths[0])
    rest = replace(
        audio, fields={"data": audio.fields["data"][first:]}, lengths=audio.lengths[1:], sample=audio.sample[1:]
    )
    presence = batch.presence.clone()
    presence[0, column] = False
    return replace(batch, modalities={**batch.modalities, "audio": rest}, presence=presence)


def test_a_batch_drawn_for_the_second_task_alone_is_as_without_the_first(load: Load) -> None:
    (joint, model), (apart, twin) = (made(load(flag)) for flag in (True, False))
    twin.load_state_dict(model.state_dict())
    picks = [("motion", 4), ("motion", 9)]
    batch, other = pack(joint, *picks), pack(apart, *picks)
    assert {name: len(rows) for name, rows in batch.targets.items()} == {"vowel": 0, "digit": 0, "motion": 2}
    assert rows_of(batch.task, joint.tasks, 2).tolist() == [True, True]
    torch.testing.assert_close(model(batch).outputs, twin(other).outputs)
    mixed = pack(joint, ("motion", 4), ("digit", 9), ("motion", 9))
    assert rows_of(mixed.task, joint.tasks, 1).tolist() == [False, True, False]
    rows = model(mixed).outputs
    torch.testing.assert_close(rows["motion"][[0, 2]], twin(other).outputs["motion"])
    torch.testing.assert_close(rows["motion"][1], rows["motion"][2])  # sample 9, whoever it was drawn for
    assert torch.equal(mixed.targets["motion"][1], mixed.targets["motion"][2])


def test_every_sample_is_drawn_once_an_epoch_with_all_its_labels(load: Load) -> None:
    loaded = load(True, train={"batch_size": 21, "steps": None, "epochs": 1.0})
    catalogue = learn_modalities(loaded)[0]
    sizes = [catalogue.tasks[number].sizes["train"] for number in (0, 1)]
    steps = total_steps(loaded.config, catalogue)
    assert steps == -(-sum(sizes) // 21)
    drawn: Counter[tuple[int, int]] = Counter()
    labels: dict[int, tuple[int, int]] = {}
    with train_loader(catalogue, loaded.config) as loader:
        for number, batch in enumerate(islice(loader, steps)):
            pairs = list(zip(batch.task.tolist(), batch.index.tolist(), strict=True))
            drawn.update(pairs[: sum(sizes) - number * 21])
            digits = [index for task, index in pairs if task == 1]
            found = zip(batch.targets["digit"].tolist(), batch.targets["motion"].tolist(), strict=True)
            labels.update(zip(digits, found, strict=True))
    assert set(drawn.values()) == {1} and Counter(task for task, _ in drawn) == {0: sizes[0], 1: sizes[1]}
    file = SplitDataset(catalogue, task="digit", split="train").file
    truth = [file.targets(name) for name in ("label", "label_motion")]
    assert len(labels) == sizes[1]
    assert all(pair == (truth[0][index], truth[1][index]) for index, pair in labels.items())


def test_what_comes_when_depends_on_the_number_of_the_draw_alone(load: Load) -> None:
    loaded = load(True, data={"modality_dropout": 0.4, "temperature": 2.0}, train={"batch_size": 8})
    catalogue = learn_modalities(loaded)[0]

    def batches(count: int, **options: Any) -> list[PackedBatch]:
        with train_loader(catalogue, loaded.config, **options) as loader:
            return list(islice(loader, count))

    alone = batches(4)
    for later, same in zip(batches(2, start_step=2), alone[2:], strict=True):
        assert tensors(later) == tensors(same)
    for step, halves in enumerate(zip(*(batches(4, rank=rank, world_size=2) for rank in (0, 1)), strict=True)):
        for key in ("task", "index", "presence"):
            assert torch.equal(torch.cat([getattr(half, key) for half in halves]), getattr(alone[step], key))


def tensors(batch: PackedBatch) -> list[Any]:
    found: list[Any] = []
    batch.map(lambda tensor: found.append(tensor.tolist()) or tensor)  # type: ignore[func-returns-value]
    return found


def test_without_the_flag_each_task_draws_its_own_samples(load: Load) -> None:
    loaded = load(False, train={"batch_size": 16})
    catalogue = learn_modalities(loaded)[0]
    sizes = [task.sizes["train"] for task in catalogue.tasks]
    sets = [SplitDataset(catalogue, task=task.name, split="train") for task in catalogue.tasks]
    sampler = MixtureSampler(sizes, batch_size=16)
    with train_loader(catalogue, loaded.config) as loader:
        for step, batch in enumerate(islice(loader, 5)):
            draws = sampler.batch(step)
            samples = [sets[draw.task][draw.item] for draw in draws]
            assert not any(sample.others for sample in samples)
            assert tensors(batch) == tensors(Packer(catalogue)(samples))
            assert sum(len(rows) for rows in batch.targets.values()) == 16


@pytest.mark.parametrize("objectives", [{}, {"masked": {"weight": 1.0}}])
def test_of_a_share_of_the_labels_only_known_ones_count(load: Load, objectives: dict[str, Any]) -> None:
    loaded = load(True, data={"label_share": 0.1}, train={"batch_size": 64}, objectives=objectives)
    catalogue = learn_modalities(loaded)[0]
    items = labelled_items(catalogue, share=0.1, seed=loaded.config.train.seed)
    indices = SplitDataset(catalogue, task="digit", split="train").indices
    digit, motion = ({int(index) for index in indices[items[number]]} for number in (1, 2))
    assert digit - motion and motion - digit, "each task has labels of its own"
    labels, drawn, known = Labels(catalogue, loaded.config, torch.device("cpu")), set[int](), Counter[str]()
    with train_loader(catalogue, loaded.config) as loader:
        for batch in islice(loader, 6):
            of_avclip = batch.index[batch.task == 1]
            drawn |= set(of_avclip.tolist())
            outputs = {name: torch.arange(len(rows))[:, None] for name, rows in batch.targets.items()}
            rows, targets = labels.pick(outputs, batch)
            for name, have in (("digit", digit), ("motion", motion)):
                assert set(of_avclip[rows[name][:, 0]].tolist()) == set(of_avclip.tolist()) & have
                assert torch.equal(targets[name], batch.targets[name][rows[name][:, 0]])
                known[name] += len(targets[name])
    assert min(known.values()) > 0
    if objectives:
        assert drawn - digit - motion, "the others learn without labels"
    else:
        assert drawn <= digit | motion


def test_losses_and_counts_of_both_labels(load: Load) -> None:
    loaded = load(True, train={"batch_size": 4})
    catalogue, model = made(loaded)
    batch = pack(catalogue, ("digit", 3), ("vowel", 5), ("digit", 8), ("digit", 2))
    objective = Objective(catalogue, loaded.config, World(), total_steps=1, allowed_LME=model.trunk.allowed())
    window = Window(catalogue.tasks, loaded.config, World())
    output = model(batch)
    loss = objective(output, batch)
    window.add(loss, output)
    means = window.take()
    sums = supervised_losses(output.outputs, batch.targets, catalogue.tasks)
    expected = (sums["vowel"] + sums["digit"] + 2.0 * sums["motion"]) / 4
    torch.testing.assert_close(loss.backward - loss.router, expected)
    counts = {"vowel": 1, "digit": 3, "motion": 3}
    assert means.losses == pytest.approx({name: float(sums[name].detach()) / n for name, n in counts.items()})
    assert set(means.accuracy) == set(counts)


def test_a_broken_output_of_the_second_task_names_its_samples(load: Load) -> None:
    catalogue, model = made(load(True))
    batch = pack(catalogue, ("vowel", 1), ("digit", 3), ("digit", 8))
    output = model(batch)
    output.outputs["motion"][1] = float("nan")
    found = find(["motion"], catalogue.tasks, output, batch)
    assert found.lines == [f"task motion, samples {int(batch.index[2])} of its file"]
    assert found.samples == [("motion", int(batch.index[2]))] and not found.tasks
    output.outputs["motion"][1] = 0.0
    assert find(["motion"], catalogue.tasks, output, batch).tasks == ["motion"], "its outputs are finite"


def test_scores_of_both_tasks_come_from_one_pass(load: Load) -> None:
    (joint, model), (apart, twin) = (made(load(flag)) for flag in (True, False))
    twin.load_state_dict(model.state_dict())
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    plan = EvaluationPlan(split="val", prepare={}, batch_size=64)
    scores = evaluate_model(model, joint, plan)
    assert list(scores) == ["vowel", "digit", "motion"] and scores == evaluate_model(twin, apart, plan)
    sizes = [-(-joint.tasks[number].sizes["val"] // 64) for number in (0, 1)]
    assert len(calls) == sum(sizes)
    one = evaluate_model(model, joint, replace(plan, tasks=["motion"], drop=["audio"]))
    assert one == evaluate_model(twin, apart, replace(plan, tasks=["motion"], drop=["audio"]))
    assert evaluate_model(model, joint, replace(plan, drop=["audio", "video"]))["motion"].value is None
    subsets = evaluate_subsets(model, joint, plan)["motion"]
    assert subsets["complete"] == scores["motion"].value and len(subsets["subsets"]) == 3


@pytest.mark.usefixtures("alone")
def test_train_resume_and_evaluate(load: Load, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"dropout": 0.1}}
    steps = {"output": str(tmp_path / "run"), "steps": 4, "batch_size": 16, "log_every": 2, "baselines": False}
    summary = train(load(True, train=steps, **sections))
    assert set(summary["tasks"]) == {"vowel", "digit", "motion"} and summary["tasks"]["motion"]["n"] == 599
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["losses"] for line in found if line["event"] == "train"]
    assert all(set(one) == {"vowel", "digit", "motion"} for one in logged)
    run = load_run(tmp_path / "run")
    assert run.catalogue.groups == ((0,), (1, 2)) and run.model.heads.num_passes == 2
    scores = evaluate_model(run.model, run.catalogue, EvaluationPlan(split="test", prepare={}))
    assert {n: s.value for n, s in scores.items()} == pytest.approx({n: s["test"] for n, s in summary["tasks"].items()})
    with pytest.raises(
        CheckpointError, match=r"data\.joint_labels: was true when the run began, is false.*--data\.joint"
    ):
        train(load(False, train={**steps, "steps": 6}, **sections), resume=True)


def test_a_run_from_before_there_were_joint_labels_is_still_the_same(load: Load) -> None:
    from moemm.train.setup import check_catalogue, describe, stored_catalogue

    apart, joint = (learn_modalities(load(flag))[0] for flag in (False, True))
    assert all("drawn_with" not in task for task in describe(apart)["tasks"])
    check_catalogue(describe(apart), apart)
    check_catalogue(describe(joint), joint)
    assert stored_catalogue(describe(joint)).groups == joint.groups
    with pytest.raises(CheckpointError, match=r"was false when the run began, is true"):
        check_catalogue(describe(apart), joint)


def test_a_unit_of_the_comparison_takes_each_label_alone(load: Load) -> None:
    from moemm.analyze.units import make_unit

    catalogue, specs = learn_modalities(load(True))
    unit = make_unit(catalogue, specs, ["audio"], samples=5, seed=0)
    assert unit.catalogue.groups == ((0,), (1,))
    for task in unit.catalogue.tasks:
        assert len(unit.targets(task, "train")) == 5
    assert sum(batch.num_samples for batch in unit.train) == 10


def test_pooling_is_counted_once_a_pass(load: Load) -> None:
    from moemm.evaluate import count_cost

    catalogue, model = made(load(True))
    model.eval()
    found = {}
    for task in ("vowel", "digit", "motion"):
        with count_cost(model) as cost, torch.no_grad():
            model(pack(catalogue, (task, 0), (task, 1)))
        found[task] = sum(parts["pooling"] for parts in cost.operations.values()) / sum(cost.tokens.values())
    once = 4.0 * 16**2
    assert found == {"vowel": once, "digit": 2 * once, "motion": 2 * once}
