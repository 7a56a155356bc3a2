"""`moemm upcycle` of tiny runs: what each method makes, its receipt, that the new run is a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import DENSE, TRUNK, WIDTH, sparse, trained

import moemm
from moemm.checkpoint.manifest import FILE_NAME
from moemm.cli.app import main
from moemm.config import load_config
from moemm.errors import CheckpointError, ConfigError, DataError
from moemm.growth import Receipt, Wanted, read_receipt, upcycle
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose layers have one shared expert each."""
    return trained(tmp_path_factory.mktemp("dense"), model=DENSE, data={"root": "."})


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `moe: dense`, whose first matrices have two halves."""
    model = {**sparse({}, {"kind": "modality", "width": 8}), "moe": "dense", "activation": "swiglu"}
    return trained(tmp_path_factory.mktemp("swiglu"), model=model)


def quiet(line: str) -> None:
    """Tell nobody."""


def grown(source: Path, target: Path, **wanted: Any) -> tuple[Receipt, dict[str, torch.Tensor]]:
    """The receipt, and the weights of the new run."""
    receipt = upcycle(source, Wanted(output=target, **wanted), tell=quiet)
    return receipt, load_run(target).model.state_dict()


def recipe(folder: Path, **model: Any) -> Path:
    """A configuration file of the tiny data with this `model` section."""
    folder.mkdir(exist_ok=True)
    tiny_config(folder, model=model, train={"output": "unused", "steps": 9, "batch_size": 4})
    return folder / "tiny.yaml"


POOL = {"kind": "routed", "count": 4}
EXPERTS = "trunk.blocks.{}.ffn.experts.{}.w{}"


@pytest.mark.parametrize("source", ["dense", "swiglu"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("copy", {}), ("copy", {"experts": 3, "top_k": 2}), ("modality", {}), ("virtual", {}),
        ("virtual", {"granularity": 4, "top_k": 2, "experts": 2}), ("copy", {"top_k": 4}),
    ],
)  # fmt: skip
def test_the_output_is_the_same(
    source: str, method: Any, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    receipt, _ = grown(request.getfixturevalue(source), tmp_path / "out", method=method, **options)
    assert receipt.ok and receipt.proofs[0].most == 1e-5, receipt.proofs
    assert receipt.after.total > receipt.before.total
    assert any("gradient" in proof.what for proof in receipt.proofs) == (method != "modality")


def test_it_is_measured_against_what_the_run_scores(dense: Path, tmp_path: Path) -> None:
    """The proof's own claim, by another way: the scores of the test split."""
    grown(dense, tmp_path / "out", method="virtual")
    before, after = (moemm.evaluate_run(load_run(folder)) for folder in (dense, tmp_path / "out"))
    assert before["tasks"] == after["tasks"] and len(before["tasks"]) == 2


def test_the_receipt_says_what_was_done(dense: Path, tmp_path: Path) -> None:
    made, _ = grown(dense, tmp_path / "out", experts=3)
    stored = read_receipt(tmp_path / "out")
    assert stored is not None and stored["operation"] == "upcycle copy" and stored["ok"]
    assert stored["sources"][0]["folder"] == str(dense) and stored["sources"][0]["step"] == 6
    assert stored["before"]["total"] < stored["after"]["total"] and "not kept" in stored["optimizer"]
    assert stored["details"]["options"]["experts"] == 3 and stored["details"]["gates"] == "straight_through"
    assert made.to_dict()["proofs"] == stored["proofs"]
    text = "\n".join(stored["changed"])
    assert f"{WIDTH} hidden units" in text and "router.rows.all.routed_*" in text


def test_copies_and_shards_hold_what_they_should(dense: Path, tmp_path: Path) -> None:
    w1 = load_run(dense).model.state_dict()["trunk.blocks.1.ffn.shared.shared.w1_FD"]
    _, copies = grown(dense, tmp_path / "copy")
    assert all(torch.equal(copies[EXPERTS.format(1, f"routed_{n}", "1_FD")], w1) for n in range(4))
    _, shards = grown(dense, tmp_path / "virtual", method="virtual", experts=2)
    parts = [shards[EXPERTS.format(1, f"routed_{n}", "1_FD")] for n in range(4)]
    assert torch.equal(torch.cat(parts[:2]), w1) and torch.equal(torch.cat(parts[2:]), w1)
    rows = [shards[f"trunk.blocks.1.ffn.router.rows.all.routed_{n}"] for n in range(4)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3]) and not torch.equal(rows[0], rows[2])


def test_noise_is_as_large_as_asked(dense: Path, tmp_path: Path) -> None:
    _, plain = grown(dense, tmp_path / "plain")
    receipt, noisy = grown(dense, tmp_path / "noisy", method="noise", noise=0.1)
    names = [name for name in plain if ".experts." in name]
    shares = [float((noisy[n] - plain[n]).std() / plain[n].std()) for n in names]
    assert min(shares) > 0.07 and max(shares) < 0.13
    assert len({float(noisy[n].sum()) for n in names if n.endswith("w1_FD")}) == len(names) // 2, "each has its own"
    assert receipt.proofs[0].most is None and 1e-5 < receipt.proofs[0].value < 0.5


def test_dropped_units_are_dropped_in_both_matrices(dense: Path, tmp_path: Path) -> None:
    _, plain = grown(dense, tmp_path / "plain")
    _, other = grown(dense, tmp_path / "drop", method="drop", drop=0.25)
    seen = set()
    for expert in range(4):
        names = [EXPERTS.format(0, f"routed_{expert}", part) for part in ("1_FD", "2_DF")]
        first = (plain[names[0]] != other[names[0]]).all(1)
        second = (plain[names[1]] != other[names[1]]).all(0)
        assert torch.equal(first, second) and int(first.sum()) == WIDTH // 4
        assert torch.equal(plain[names[0]][~first], other[names[0]][~first])
        seen.add(tuple(first.tolist()))
        assert 0.5 < float(other[names[0]][first].std() / plain[names[0]].std()) < 1.5
    assert len(seen) == 4, "each drops others"


def test_seeds_decide_what_is_drawn(dense: Path, tmp_path: Path) -> None:
    (_, one), (_, same), (_, other) = (
        grown(dense, tmp_path / f"drop{number}", method="drop", seed=seed) for number, seed in enumerate((1, 1, 2))
    )
    name = EXPERTS.format(0, "routed_0", "1_FD")
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_a_recipe_is_taken_with_its_training(dense: Path, tmp_path: Path) -> None:
    groups = [
        {"kind": "shared", "width": 16},
        {"kind": "modality", "width": 8},
        {"kind": "routed", "count": 2, "width": 16},
    ]
    path = recipe(tmp_path / "r", **TRUNK, untie=["norms", "qkv"], experts={"groups": groups})
    receipt, weights = grown(dense, tmp_path / "out", recipe=path)
    config = load_config(tmp_path / "out" / "config.yaml").config
    assert receipt.ok and config.train.steps == 9 and config.train.output == str(tmp_path / "out")
    assert config.model.router.gates == "straight_through", "raw ones would scale the output"
    assert any("in place of raw" in line for line in receipt.changed)
    assert any("w2 = 0" in line for line in receipt.changed), "there is room for more than 32 units"
    source = load_run(dense).model.state_dict()
    for name in ("image", "record", "series"):
        member = f"trunk.blocks.0.attention.qkv.members.{name}.weight"
        assert torch.equal(weights[member], source["trunk.blocks.0.attention.qkv.weight"])


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "sigmoid", "bias_rate": 0.01}, {"kind": "sigmoid", "top_k": 2, "gates": "renormalised"},
        {"kind": "noisy", "top_k": 2}, {"kind": "laplace", "scope": "modality"}, {"kind": "top_p", "p": 0.4},
        {"kind": "top_p", "top_k": 2, "gates": "straight_through"}, {"kind": "combination"}, {"kind": "hard"},
    ],
    ids=lambda router: "-".join(map(str, router.values())),
)  # fmt: skip
def test_every_other_router(router: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r", **TRUNK, router=router, experts={"groups": [{**POOL, "width": WIDTH}]})
    receipt, _ = grown(dense, tmp_path / "out", recipe=path)
    assert receipt.ok and receipt.proofs[0].most == 1e-5
    gradient = [proof.least for proof in receipt.proofs[1:]]
    assert gradient == ([] if router["kind"] == "hard" else [None] if router["kind"] == "top_p" else [1e-5])


@pytest.mark.parametrize("kind", ["expert_choice", "batch_priority"])
def test_capacity_is_measured_and_told(kind: str, dense: Path, tmp_path: Path) -> None:
    groups = [{"kind": "routed", "count": 4, "width": WIDTH}]
    path = recipe(tmp_path / "r", **TRUNK, router={"kind": kind, "capacity": 0.5}, experts={"groups": groups})
    receipt, _ = grown(dense, tmp_path / "out", recipe=path)
    lossy, lifted = receipt.proofs[:2]
    assert receipt.ok and lossy.most is None and lossy.value > 0.01 and "lose their place" in lossy.what
    assert lifted.value <= 1e-5 and lifted.most == 1e-5


def test_zero_experts_are_measured_and_told(dense: Path, tmp_path: Path) -> None:
    groups = [{"kind": "routed", "count": 2, "width": WIDTH}, {"kind": "zero", "count": 2}]
    path = recipe(tmp_path / "r", **TRUNK, experts={"groups": groups})
    receipt, _ = grown(dense, tmp_path / "out", recipe=path)
    assert receipt.ok and receipt.proofs[0].value > 0.01 and receipt.proofs[1].value <= 1e-5


def test_a_router_without_a_gradient_fails_the_proof(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Renormalised gates of equal copies keep the output, and give the router nothing to learn from."""
    from moemm.growth import upcycling
    from moemm.growth.deal import Routes

    monkeypatch.setattr(
        upcycling, "routes_of", lambda router, shards: Routes(shards=1, scale=1.0, gates="renormalised", uses=2)
    )
    groups = [{"kind": "routed", "count": 4, "width": WIDTH}]
    router = {"top_k": 2, "gates": "renormalised"}
    path = recipe(tmp_path / "r", **TRUNK, router=router, experts={"groups": groups})
    receipt, _ = grown(dense, tmp_path / "out", recipe=path)
    assert receipt.proofs[0].ok and receipt.proofs[1].ok is False and not receipt.ok
    assert main(["upcycle", str(dense), "--recipe", str(path), "--output", str(tmp_path / "again")]) == 1


def test_it_can_be_trained_and_grown_again(dense: Path, tmp_path: Path, alone: None) -> None:
    grown(dense, tmp_path / "first", method="noise")
    loaded = load_config(tmp_path / "first" / "config.yaml", ["train.steps=2"])
    assert train(loaded, resume=True)["steps"] == 2
    receipt, _ = grown(tmp_path / "first", tmp_path / "second", method="expand")
    assert receipt.ok and [one["operation"] for one in receipt.history] == ["upcycle noise"]


def test_the_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["upcycle", str(dense), "--method", "modality", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "holds" in text and "upcycle modality" in text and f"moemm train {out}/config.yaml --resume" in text
    assert main(["upcycle", str(dense), "--output", str(tmp_path / "two"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operation"] == "upcycle copy"
    assert main(["upcycle", str(dense), "--output", str(out)]) == ConfigError.exit_code
    assert "already holds a run" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--json"]) == 0


def test_it_is_public(dense: Path, tmp_path: Path) -> None:
    receipt = moemm.upcycle(str(dense), method="modality", output=str(tmp_path / "out"))
    assert receipt.ok and receipt.operation == "upcycle modality" and (tmp_path / "out" / "receipt.json").is_file()
    with pytest.raises(TypeError, match="metod"):
        moemm.upcycle(str(dense), metod="copy")


def test_a_router_of_ones_own(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's plugins come along."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    name = f"mine_{tmp_path.name.lower().replace('-', '_')}"
    plugin = tmp_path / "own.py"
    plugin.write_text(
        f"import moemm\nfrom moemm.moe.routers import softmax\nmoemm.register_router('{name}')(softmax)\n"
    )
    path = recipe(tmp_path / "r", **TRUNK, router={"kind": name}, experts={"groups": [{**POOL, "width": WIDTH}]})
    path.write_text(f"plugins: [../own.py]\n{path.read_text()}")
    receipt, _ = grown(dense, tmp_path / "out", recipe=path)
    config = load_config(tmp_path / "out" / "config.yaml").config
    assert receipt.ok and config.model.router.kind == name and len(config.plugins) == 1


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"method": "modality", "experts": 2}, "--experts has no meaning for --method modality"),
        ({"method": "copy", "drop": 0.5}, "--drop has no meaning"), ({"experts": 0}, "must be at least 1"),
        ({"method": "drop", "drop": 1.5}, "more than 0 and at most 1"),
        ({"method": "noise", "noise": 0.0}, "more than 0"),
        ({"rules": Path("r.yaml")}, "give --recipe"), ({"method": "branch"}, "two runs or more"),
        ({"granularity": 5}, "does not divide the 32 hidden units"),
        ({"method": "expand", "factor": 1}, "must be at least 2"),
        ({"method": "expand"}, "has no routed experts to make more of"),
        ({"samples": 0}, "must be at least 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(wanted: dict[str, Any], problem: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        grown(dense, tmp_path / "out", **wanted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"experts": {"groups": [{"kind": "routed", "count": 4, "width": 16}]}}, "has 32 hidden units, but a token of"),
        ({"dim": 32}, "model.dim: 32 there, 16 in the source"), ({"layers": 1}, "model.layers"),
        ({"latents": 2}, "model.latents"), ({"activation": "relu2"}, "model.activation"),
        ({"moe": "dense"}, "no experts to make"),
        ({"experts": {"groups": [{"kind": "modality", "width": 32, "modalities": ["smell"]}]}}, "smell"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit(model: dict[str, Any], problem: str, dense: Path, tmp_path: Path) -> None:
    values = {**DENSE, **model}
    path = tmp_path / "r"
    path.mkdir()
    with pytest.raises(ConfigError, match=problem):
        grown(dense, tmp_path / "out", recipe=recipe(path, **values))


def test_copies_need_something_to_differ_in(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all experts of the recipe are shared"):
        grown(dense, tmp_path / "out", method="drop", recipe=recipe(tmp_path / "r", **DENSE))
    both = recipe(tmp_path / "r2", **DENSE)
    with pytest.raises(ConfigError, match="--experts and --recipe"):
        grown(dense, tmp_path / "out", recipe=both, experts=2)


def test_a_sparse_run_is_no_dense_one(tmp_path: Path) -> None:
    run = trained(tmp_path, model=sparse({}, {"kind": "routed", "count": 2, "width": 8}))
    with pytest.raises(ConfigError, match="sparse already: layer 0 has routed_0, routed_1"):
        grown(run, tmp_path / "out")


def test_without_data_nothing_is_measured(tmp_path: Path) -> None:
    run = trained(tmp_path, model=DENSE)
    (tmp_path / "tones.h5").unlink()
    with pytest.raises(DataError):
        grown(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, model=DENSE)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert (checkpoint / FILE_NAME).is_file()
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError):
        grown(run, tmp_path / "out")
