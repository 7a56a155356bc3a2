"""What a plan says: operations, memory, network, the choice, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from moemm.cli.app import main
from moemm.config import LoadedConfig, load_config
from moemm.config.deepspeed import BUCKET_SIZE
from moemm.data.loader import train_loader
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.evaluate.cost import count_cost
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.plan import flops, kinds
from moemm.plan.devices import DEVICES, parse_cluster
from moemm.plan.layout import Layout, make_layout
from moemm.plan.memory import memory, remote_rows
from moemm.plan.network import all_to_all_bytes, collectives, seconds
from moemm.plan.parameters import ModelShape, build_shape
from moemm.plan.search import Wanted, search
from moemm.plan.source import Description, described, from_data
from moemm.plan.step import make_plan, warnings
from moemm.plan.workload import Workload, workload
from moemm.testing.tiny import NUM_SAMPLES, tiny_config
from moemm.train.setup import Setup, learn_modalities, seeded_model

HALF = ("--train.precision", "bf16", "--deepspeed.zero-stage", "1")
Run = Callable[..., "tuple[int, str, str]"]
DESCRIBED: dict[str, Any] = {
    "modalities": {
        "image": {"kind": "image", "shape": [3, 32, 32]},
        "text": {"kind": "text", "length": 40, "vocabulary": 1000},
        "record": {"kind": "tabular", "numeric": 2, "categories": [4]},
        "accel": {"kind": "sensor", "shape": [3], "length": 64},
        "radar": {"kind": "radar", "parameters": 500, "tokens": 7},
    },
    "tasks": {"first": {"outputs": 5, "samples": 1000, "modalities": ["image", "text", "record", "accel", "radar"],
                        "present": {"text": 0.5}}},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "data": {"tasks": [{"name": "first", "file": "nowhere.h5"}]},
    "model": {"dim": 64, "layers": 3, "heads": 4, "router": {"top_k": 2},
              "experts": {"groups": [{"kind": "shared", "width": 64}, {"kind": "routed", "count": 16, "width": 128}]}},
    "train": {"batch_size": 256, "steps": 100},
}  # fmt: skip


@pytest.fixture
def moemm(capsys: pytest.CaptureFixture[str]) -> Run:
    """`moemm` in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration whose data are not there, and their description."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(DESCRIBED))
    return tmp_path / "run.yaml", tmp_path / "data.yaml"


def shape_of(files: tuple[Path, Path], *overrides: str) -> ModelShape:
    loaded = load_config(files[0], overrides)
    return build_shape(loaded.config, described(loaded.config, _description(DESCRIBED), source="here"))


def _description(values: dict[str, Any]) -> Description:
    from pydantic import TypeAdapter

    return TypeAdapter(Description).validate_python(values)


def epoch(loaded: LoadedConfig) -> tuple[Model, PackedBatch]:
    """A model, and every training sample once."""
    catalogue, specs = learn_modalities(loaded)
    model = seeded_model(Setup(loaded.config, catalogue, specs, Path(), 10), torch.device("cpu"))
    loader = train_loader(catalogue, loaded.config, total_steps=1, prepare=prepare_functions(specs))
    return model.train(), next(iter(loader))


@pytest.mark.parametrize(
    "model",
    [
        {"experts": {"backend": "torch", "groups": [
            {"kind": "shared", "width": 16}, {"kind": "modality", "width": 8},
            {"kind": "routed", "count": 4, "width": 8},
        ]}, "activation": "swiglu", "router": {"top_k": 2}},
        {"moe": "dense", "predict_every_block": True, "untie": ["qkv"], "share": [["image", "record"]]},
        {"experts": {"backend": "torch", "groups": [
            {"kind": "routed", "width": 8, "id": "all"}, {"kind": "routed", "width": 8, "per_modality": True},
        ]}, "router": {"kind": "hard"}, "latents": 2},
    ],
    ids=["moe", "dense", "hard and latents"],
)  # fmt: skip
def test_operations_are_those_of_a_forward_pass(model: dict[str, Any], tmp_path: Path) -> None:
    train = {"steps": 1, "batch_size": NUM_SAMPLES}
    loaded = tiny_config(tmp_path, model={"dim": 16, "heads": 2, "layers": 2, **model}, train=train)
    shape = build_shape(loaded.config, from_data(loaded))
    built, batch = epoch(loaded)
    with count_cost(built) as cost, FlopCounterMode(display=False) as by_torch:
        built(batch)
    counted = {part: sum(parts[part] for parts in cost.operations.values()) for part in cost.operations["image"]}
    work = workload(shape)
    planned = flops.forward(shape, work)
    lines = [signal for signal in shape.data.signals if signal.kind != "tabular"]  # cost.py counts no table's bins
    planned["tokenizer"] = sum(2.0 * 16 * kinds.inputs(signal) * work.raw[signal.name] for signal in lines)
    for part, value in counted.items():
        off = 2e-3 if part == "latents" else 1e-6  # squares of means, in place of means of squares
        assert planned[part] * batch.num_samples == pytest.approx(value, rel=off), part
    # torch counts the padding of attention, too.
    whole = sum(flops.forward(shape, work).values()) * batch.num_samples
    assert by_torch.get_total_flops() == pytest.approx(whole, rel=0.1)


def test_a_backward_pass_is_two_forward_passes_but_for_the_inputs(files: tuple[Path, Path]) -> None:
    shape, again = shape_of(files), shape_of(files, "--train.activation-checkpointing", "true")
    work = workload(shape)
    parts = flops.forward(shape, work)
    whole = 3 * sum(parts.values()) - parts["tokenizers"] - parts["position"]
    assert flops.training(shape, work) == pytest.approx(whole)
    blocks = parts["attention"] + parts["experts"] + parts["router"]
    assert flops.training(again, work) == pytest.approx(whole + blocks)


def test_described_data_have_the_tokens_that_they_say(files: tuple[Path, Path]) -> None:
    work = workload(shape_of(files))
    assert work.tokens == {
        ("image", None): 16.0, ("text", None): 20.0, ("record", None): 3.0, ("accel", None): 24.0, ("radar", None): 7.0,
    }  # fmt: skip
    # Squares: all others are always there, the text in half of the samples.
    assert work.pairs == pytest.approx((90.0**2 + 50.0**2) / 2)


def layout(shape: ModelShape, **given: Any) -> Layout:
    return make_layout(shape, **{"ranks": 8, "stage": 0, "micro_batch": 32, **given})


def held(shape: ModelShape, **given: Any) -> dict[str, float]:
    return dict(memory(shape, workload(shape), layout(shape, **given), DEVICES["H100"]).moments)


def test_memory_shrinks_with_what_shards_it(files: tuple[Path, Path]) -> None:
    wide = shape_of(files, "--model.dim", "1024", *HALF)
    updates = [held(wide, stage=stage)["update"] for stage in (1, 2, 3)]
    assert updates[0] == updates[1] > updates[2]
    one, more = (held(wide, ranks=ranks, stage=1)["update"] for ranks in (1, 64))
    parameters = layout(wide).held
    assert one - more == pytest.approx(parameters * 20 * 63 / 64, rel=0.01)  # master, two moments, gradients and a copy
    assert held(wide, stage=1, ep=8)["update"] < held(wide, stage=1)["update"]
    assert held(wide, micro_batch=64)["backward"] > held(wide)["backward"]
    again = shape_of(files, "--model.dim", "1024", *HALF, "--train.activation-checkpointing", "true")
    assert held(again, micro_batch=512)["backward"] < held(wide, micro_batch=512)["backward"]


def test_one_bucket_is_sent_after_the_activations_and_several_beside_them(files: tuple[Path, Path]) -> None:
    small, large = shape_of(files), shape_of(files, "--model.dim", "2048", "--model.layers", "4")
    assert layout(small).trained < BUCKET_SIZE < layout(large).trained
    for shape, later in ((small, 4 * layout(small).trained), (large, 0)):
        moments = [held(shape, ranks=ranks, stage=2) for ranks in (2, 1)]
        two, one = (found["reduce"] - found["backward"] for found in moments)
        assert two - one == pytest.approx(later), "the flat copy, but for what is there at both moments"


def test_rows_that_go_to_other_ranks(files: tuple[Path, Path]) -> None:
    shape = shape_of(files)
    work, layer = workload(shape), shape.layers[0]
    assert remote_rows(shape, layer, work, 1) == 0.0
    # Two slots on two ranks: one of the four ways is here and here.
    assert remote_rows(shape, layer, work, 2) == pytest.approx(1 - 0.25)
    assert remote_rows(shape, layer, work, 16) == pytest.approx(15 * (1 - (15 / 16) ** 2))
    rows = 3 * (2 * 0.75) * 32 * work.total  # the own rank is as likely
    there_and_back = 64 * 4 * 2 + 2 * 2 * 4  # two rows of D; gates and numbers of two experts
    counts = 3 * 2 * 8
    assert all_to_all_bytes(shape, work, layout(shape, ranks=2, ep=2)) == pytest.approx(
        2 * rows * there_and_back + counts
    )
    assert all_to_all_bytes(shape, work, layout(shape, ranks=2)) == 0.0


def payloads(shape: ModelShape, **given: Any) -> dict[str, int]:
    found = collectives(shape, workload(shape), layout(shape, **given), DEVICES["H100"])
    sums: dict[str, int] = {}
    for one in found:
        if "routers" not in one.what and "agreement" not in one.what:
            sums[one.kind] = sums.get(one.kind, 0) + one.payload
    return sums


def test_collectives_by_stage(files: tuple[Path, Path]) -> None:
    shape = shape_of(files)
    total = 4 * (layout(shape).dense + layout(shape).experts)
    assert collectives(shape, workload(shape), layout(shape, ranks=1), DEVICES["H100"]) == []
    assert payloads(shape) == payloads(shape, accumulation=4) == {"all_reduce": total}
    assert payloads(shape, stage=1, accumulation=4)["all_reduce"] == total
    assert payloads(shape, stage=2, accumulation=4)["all_reduce"] == 4 * total
    assert total <= payloads(shape, stage=2)["all_gather"] < total + 4 * 64
    assert payloads(shape, stage=3, accumulation=4)["reduce_scatter"] >= 4 * total
    spread = payloads(shape, stage=1, ep=8)
    assert spread["all_reduce"] == 4 * layout(shape).dense  # no rank shares its experts with another one


def test_links_inside_a_node_are_faster() -> None:
    device = DEVICES["H100"]
    assert seconds("all_reduce", 1e9, 1, device) == 0.0
    assert seconds("all_to_all", 1e9, 8, device) < seconds("all_to_all", 1e9, 16, device)
    ring = 2 * 7 / 8 * 1e9 / (0.8 * 450e9)
    assert seconds("all_reduce", 1e9, 8, device) == pytest.approx(ring, rel=0.05)


def test_the_best_fits_and_is_the_fastest(files: tuple[Path, Path]) -> None:
    shape = shape_of(files)
    plans = search(shape, workload(shape), parse_cluster("8xA100"), Wanted())
    assert plans[0].fits and plans[0].seconds <= min(plan.seconds for plan in plans if plan.fits) * 1.01
    assert {plan.layout.stage for plan in plans} == {0, 1, 2, 3}
    assert {plan.layout.ep for plan in plans} == {1, 2, 4, 8}
    assert all(plan.layout.batch == 256 for plan in plans)
    only = search(shape, workload(shape), parse_cluster("8xA100"), Wanted(stage=2, ep=4, micro_batch=8))
    assert [(p.layout.stage, p.layout.ep, p.layout.micro_batch, p.layout.accumulation) for p in only] == [(2, 4, 8, 4)]


def test_bf16_is_not_planned_without_zero(files: tuple[Path, Path]) -> None:
    shape = shape_of(files, *HALF)
    plans = search(shape, workload(shape), parse_cluster("2xH100"), Wanted())
    assert {plan.layout.stage for plan in plans} == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"--zero 0.*bf16"):
        search(shape, workload(shape), parse_cluster("2xH100"), Wanted(stage=0))


def test_warnings(files: tuple[Path, Path]) -> None:
    def told(**given: Any) -> str:
        work: Workload = workload(shape)
        plan = make_plan(shape, work, layout(shape, **given), DEVICES["H100"])
        return " ".join(warnings(shape, work, plan, DEVICES["H100"]))

    shape = shape_of(files, "--train.batch-size", "100")
    assert "no multiple of 8 ranks" in told(micro_batch=13)
    assert "an expert gets" in told(micro_batch=1) and "an expert gets" not in told(micro_batch=512)
    assert "the fullest of 16 experts" in told(micro_batch=1) and "the fullest" not in told(micro_batch=512)
    assert "as starting its kernels does" in told(micro_batch=1)
    work, device = workload(shape), DEVICES["cpu"]
    slow = make_plan(shape, work, layout(shape, micro_batch=1), device)
    assert "goes to the network" in " ".join(warnings(shape, work, slow, device))


def test_the_command(files: tuple[Path, Path], moemm: Run) -> None:
    config, data = files
    code, out, _ = moemm("plan", config, "--data", data, "--gpus", "64xH100", "--json")
    values = json.loads(out)
    assert code == 0 and values["gpus"]["count"] == 64 and values["choice"]["fits"]
    assert sum(values["choice"]["memory"]["parts"].values()) == pytest.approx(values["choice"]["memory"]["total"])
    assert values["choice"]["gpu_hours"] == pytest.approx(64 * values["choice"]["hours"])
    assert values["host_bytes_at_start"] == 8 * 4 * values["parameters"]["total"], (
        "each of a node's ranks has all of it"
    )
    code, out, _ = moemm("plan", config, "--data", data, "--gpus", "4xA100", "--tokens", "image=196")
    assert code == 0 and "each of 4 ranks builds the whole model" in " ".join(out.replace("│", " ").split())
    assert "memory of a rank" in out and "--deepspeed.zero-stage" in out
    _, more, _ = moemm("plan", config, "--data", data, "--json", "--tokens", "image=196")
    assert json.loads(more)["data"]["tokens_per_sample"]["image"] == 196


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "64*"], "is not a number of GPUs and their kind"),
        (["--gpus", "0xH100"], "is not a number of GPUs and their kind"),
        (["--gpus", "8xH10"], "did you mean H100?"),
        (["--tokens", "image"], "is not NAME=N"),
        (["--tokens", "imag=3"], "did you mean image?"),
        (["--zero", "4"], "allowed: 0, 1, 2, 3"),
        (["--gpus", "8xH100", "--ep", "3"], "allowed: 1, 2, 4, 8"),
        (["--micro-batch", "7"], "allowed: divisors of"),
        (["--efficiency", "1.5"], "allowed: above 0, to 1"),
        (["--memory", "1"], "nothing fits into 1xH100"),
        (["--model.dmi", "3"], "model.dmi"),
    ],
)
def test_errors(arguments: list[str], said: str, files: tuple[Path, Path], moemm: Run) -> None:
    code, out, err = moemm("plan", files[0], "--data", files[1], *arguments)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


def test_data_that_are_not_there(files: tuple[Path, Path], moemm: Run) -> None:
    code, _, err = moemm("plan", files[0])
    assert code == 2 and "--data FILE" in err and "modalities:" in err and "tasks: first" in err
    assert moemm("plan", files[0].parent / "nowhere")[0] == 2
    assert moemm("plan", files[0].parent)[0] == 4


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("tasks",), {"second": DESCRIBED["tasks"]["first"]}, "no task 'first'"),
        (("modalities", "image", "shape"), [32, 32], "[channels, height, width]"),
        (("modalities", "text", "length"), None, "a text needs `length`"),
        (("modalities", "radar", "tokens"), None, "the kind radar has no formula"),
        (("modalities", "accel", "shape"), [], "needs `shape`"),
        (("modalities", "image", "size"), 3, "modalities.image.size"),
    ],
)
def test_descriptions_that_say_too_little(
    place: tuple[str, ...], value: Any, said: str, files: tuple[Path, Path], moemm: Run
) -> None:
    values = json.loads(json.dumps(DESCRIBED))
    holder = values
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    files[1].write_text(yaml.safe_dump(values))
    code, _, err = moemm("plan", files[0], "--data", files[1])
    assert code == 2 and said in err
