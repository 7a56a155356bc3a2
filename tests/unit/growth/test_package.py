"""Extensions as files: exported, loaded into runs with the same base, removed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extended import base_config, grown_config, shaken, write_new

from moemm import plugins
from moemm.cli.app import main
from moemm.config import LoadedConfig, load_config
from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import ModalityConfig
from moemm.data import DataFile, ModalityData, write_file
from moemm.errors import CheckpointError, ConfigError, DataError, MoemmError
from moemm.growth import Receipt, Size, export_extension, extend, load_extension, read_base, write_grown
from moemm.growth.extension import closed
from moemm.growth.grown import Specs, fresh_model
from moemm.growth.package import read_content, remove_extension
from moemm.growth.package_file import read_package, write_package
from moemm.growth.parts import Shape, differing_bits, outputs
from moemm.growth.receipt import read_receipt, weights_hash
from moemm.modalities import KINDS
from moemm.models import Model
from moemm.testing.tiny import tiny_config, write_tiny_data
from moemm.train import load_run, train
from moemm.train.setup import learn_modalities

SIZE = Size(total=1, active=1)
NEAR = {"rtol": 1e-4, "atol": 1e-5}
"""Of outputs of an extension where other experts stand before it: its sums over them round otherwise."""


def write_run(
    loaded: LoadedConfig, folder: Path, weights: dict[str, torch.Tensor], *, seed: int, specs: Specs | None = None
) -> Path:
    """A run folder of this configuration; what `weights` and `specs` lack is drawn by `seed`, and learned anew."""
    config = replace(loaded.config, train=replace(loaded.config.train, output=str(folder), seed=seed))
    loaded = replace(loaded, config=config)
    catalogue, learned = learn_modalities(loaded)
    specs = {**learned, **(specs or {})}
    model = shaken(fresh_model(config, catalogue, specs))
    model.load_state_dict(weights, strict=False)
    receipt = Receipt(
        operation="test", sources=[], target="", changed=[], proofs=[], before=SIZE, after=SIZE, optimizer=""
    )  # fmt: skip
    return write_grown(loaded, catalogue, specs, model, receipt)


def write_pair(path: Path) -> None:
    """A file of both modalities that extensions bring."""
    with DataFile(path.with_name("spectrum.h5")) as one, DataFile(path.with_name("radar.h5")) as two:
        modalities = {
            name: ModalityData(kind="timeseries", values=[file.read(name, i) for i in range(len(file))], ragged=True)  # type: ignore[misc]
            for name, file in (("spectrum", one), ("radar", two))
        }
        write_file(path, task="pair", labels=one.targets(), split=one.split, modalities=modalities)


def made(run: Path, name: str, folder: Path, *, seed: int, **given: Any) -> Path:
    """The run with an extension of this name, whose weights are drawn by `seed`."""
    loaded = grown_config(load_config(run / "config.yaml"), name, **given)
    base = read_base(run)
    return write_run(loaded, folder, base.weights, seed=seed, specs=base.run.specs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; spectrum and radar, extended from it apart; both, extended one after the other; and their packages."""
    place = tmp_path_factory.mktemp("packages")
    write_tiny_data(place)
    loaded = base_config(place)
    base = write_run(loaded, place / "base", {}, seed=0)
    made(base, "spectrum", place / "spectrum", seed=1)
    made(base, "radar", place / "radar", seed=2, norms=False)
    made(place / "spectrum", "radar", place / "both", seed=3)
    for name in ("spectrum", "radar"):
        export_extension(place / name, name, place / f"{name}.moemm")
    return place


def told(run: Path) -> dict[str, torch.Tensor]:
    """What a run says of the val split of each of its tasks."""
    loaded = load_run(run)
    shape = Shape(loaded.config, loaded.catalogue, loaded.specs)
    return outputs(shape, loaded.model, [task.name for task in loaded.catalogue.tasks])  # type: ignore[arg-type]


def check(receipt: Receipt) -> None:
    assert receipt.ok and len(receipt.proofs) >= 2, [(proof.what, proof.value) for proof in receipt.proofs]


# What a package holds


def test_it_holds_what_the_extension_brought_and_nothing_else(place: Path) -> None:
    content, tensors = read_package(place / "spectrum.moemm")
    base, grown = read_base(place / "base"), read_base(place / "spectrum")
    assert set(tensors) == set(grown.weights) - set(base.weights) == set(content["tensors"])
    assert differing_bits(tensors, grown.weights) == 0
    for part in ("tokenizers.spectrum.", "modality_D.spectrum", "experts.spectrum", "router.", "own_norms.spectrum",
                 "heads.linear.task_spectrum", "heads.pool.query.task_spectrum"):  # fmt: skip
        assert any(part in name for name in tensors), part
    assert content["base"]["sha256"] == weights_hash(base.weights)
    assert content["specs"]["spectrum"]["fitted"]["mean"], "statistics of the train split"
    assert str(place) not in json.dumps(content), "no folder of this machine"


def test_packages_made_apart_have_one_base(place: Path) -> None:
    hashes = {read_package(place / f"{name}.moemm")[0]["base"]["sha256"] for name in ("spectrum", "radar")}
    assert len(hashes) == 1


# Loading


def test_a_package_gives_back_the_run(place: Path, tmp_path: Path) -> None:
    receipt = load_extension(place / "base", place / "spectrum.moemm", output=tmp_path / "out")
    check(receipt)
    assert differing_bits(told(place / "spectrum"), told(tmp_path / "out")) == 0
    assert differing_bits(read_base(place / "spectrum").weights, read_base(tmp_path / "out").weights) == 0
    stored = read_receipt(tmp_path / "out")
    assert stored is not None and stored["details"]["extensions"][0]["name"] == "spectrum"
    assert stored["details"]["tensors"] == sorted(read_package(place / "spectrum.moemm")[1])


@pytest.mark.parametrize("order", [("spectrum", "radar"), ("radar", "spectrum")])
def test_two_made_apart_live_in_one_model(place: Path, tmp_path: Path, order: tuple[str, str]) -> None:
    check(load_extension(place / "base", place / f"{order[0]}.moemm", output=tmp_path / "one"))
    check(load_extension(tmp_path / "one", place / f"{order[1]}.moemm", output=tmp_path / "two"))
    together = told(tmp_path / "two")
    assert [one.name for one in load_run(tmp_path / "two").config.model.extensions] == list(order)
    alone = {**told(place / "spectrum"), **told(place / "radar")}
    assert set(together) == set(alone) == {"shapes", "tones", "task_spectrum", "task_radar"}
    first = {task: alone[task] for task in ("shapes", "tones", f"task_{order[0]}")}
    assert differing_bits(first, together) == 0, "what was there keeps its bits"
    torch.testing.assert_close(together, {task: alone[task] for task in together}, **NEAR)


def test_one_of_two_is_removed(place: Path, tmp_path: Path) -> None:
    for number, (gone, left) in enumerate((("spectrum", "radar"), ("radar", "spectrum"))):
        check(load_extension(place / "base", place / "spectrum.moemm", output=tmp_path / f"a{number}"))
        check(load_extension(tmp_path / f"a{number}", place / "radar.moemm", output=tmp_path / f"b{number}"))
        check(remove_extension(tmp_path / f"b{number}", gone, output=tmp_path / f"c{number}"))
        torch.testing.assert_close(told(tmp_path / f"c{number}"), told(place / left), **NEAR)
        weights = read_base(place / left).weights
        found = read_base(tmp_path / f"c{number}").weights
        assert set(found) == set(weights) and differing_bits(weights, found) == 0
        check(remove_extension(tmp_path / f"c{number}", left, output=tmp_path / f"d{number}"))
        assert differing_bits(read_base(place / "base").weights, read_base(tmp_path / f"d{number}").weights) == 0
        assert not load_run(tmp_path / f"d{number}").config.model.extensions


def test_export_from_a_run_with_several(place: Path, tmp_path: Path) -> None:
    """Each of two extensions, the second of which was made on top of the first, is one of the base."""
    for name in ("spectrum", "radar"):
        export_extension(place / "both", name, tmp_path / f"{name}.moemm")
        check(load_extension(place / "base", tmp_path / f"{name}.moemm", output=tmp_path / name))
        was, now = told(place / "both"), told(tmp_path / name)
        torch.testing.assert_close(now, {task: was[task] for task in now}, **NEAR)
    assert (tmp_path / "spectrum.moemm").read_bytes() == (place / "spectrum.moemm").read_bytes()


def test_a_loaded_run_is_trained_on(place: Path, tmp_path: Path, alone: None) -> None:
    load_extension(place / "base", place / "spectrum.moemm", output=tmp_path / "out")
    loaded = load_config(tmp_path / "out" / "config.yaml", ["train.steps=2", "train.baselines=false"])
    assert train(loaded, resume=True)["steps"] == 2
    with pytest.raises(CheckpointError, match=r"was made on another base\n  base of the package: [0-9a-f]{64}"):
        load_extension(tmp_path / "out", place / "radar.moemm", output=tmp_path / "more")


def test_data_may_lie_elsewhere(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(place / "spectrum.h5", tmp_path / "mine.h5"))
    check(load_extension(place / "base", place / "spectrum.moemm", output=tmp_path / "out", data=[other]))
    assert load_run(tmp_path / "out").config.data.tasks[-1].file == str(other)


@pytest.mark.parametrize("per_modality", [False, True])
def test_a_base_that_would_give_each_new_modality_an_expert(tmp_path: Path, per_modality: bool) -> None:
    """Its groups are closed when it is extended, and when a package is loaded into it."""
    write_tiny_data(tmp_path)
    last = Group(kind="routed", count=2, width=8, per_modality=per_modality)
    loaded = base_config(tmp_path, groups=[Group(kind="shared", width=16), Group(kind="modality", width=8), last])
    base = write_run(loaded, tmp_path / "base", {}, seed=0)
    model = loaded.config.model
    groups = closed(model.experts.groups, ["image", "record", "series"])
    experts = replace(model.experts, groups=groups)
    grown = grown_config(
        replace(loaded, config=replace(loaded.config, model=replace(model, experts=experts))), "spectrum"
    )
    old = read_base(base)
    write_run(grown, tmp_path / "grown", old.weights, seed=1, specs=old.run.specs)
    export_extension(tmp_path / "grown", "spectrum", tmp_path / "a.moemm")
    check(load_extension(base, tmp_path / "a.moemm", output=tmp_path / "out"))
    assert differing_bits(told(tmp_path / "grown"), told(tmp_path / "out")) == 0
    check(remove_extension(tmp_path / "out", "spectrum", output=tmp_path / "less"))
    assert weights_hash(read_base(tmp_path / "less").weights) == weights_hash(old.weights)
    check(load_extension(tmp_path / "less", tmp_path / "a.moemm", output=tmp_path / "more"))


# What is refused


def changed(place: Path, path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A package that is whole, and says something else than that of spectrum."""
    content, tensors = read_package(place / "spectrum.moemm")
    edit(content, tensors)
    write_package(path, content, tensors)
    return path


def test_a_wrong_base_is_refused_with_both_hashes(place: Path, tmp_path: Path) -> None:
    other = write_run(base_config(place), tmp_path / "other", {}, seed=5)
    hashes = [weights_hash(read_base(run).weights) for run in (place / "base", other)]
    with pytest.raises(CheckpointError, match=rf"base of the package: {hashes[0]}\n  base of .*other: {hashes[1]}"):
        load_extension(other, place / "spectrum.moemm", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_differs_by_one_bit(place: Path, tmp_path: Path) -> None:
    weights = dict(read_base(place / "base").weights)
    weights["trunk.norm.weight"] = weights["trunk.norm.weight"].nextafter(torch.tensor(9.0))
    other = write_run(load_config(place / "base" / "config.yaml"), tmp_path / "other", weights, seed=0)
    with pytest.raises(CheckpointError, match="was made on another base"):
        load_extension(other, place / "spectrum.moemm", output=tmp_path / "out")


def test_a_base_that_computes_something_else_with_the_same_weights(place: Path, tmp_path: Path) -> None:
    loaded = load_config(place / "base" / "config.yaml", ["model.router.top_k=2", "model.dropout=0.1"])
    other = write_run(loaded, tmp_path / "other", read_base(place / "base").weights, seed=0)
    with pytest.raises(CheckpointError, match=r"`model` differs:\n  router.top_k: was None, is 2$"):
        load_extension(other, place / "spectrum.moemm", output=tmp_path / "out")


def test_names_that_are_there_already(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the extension spectrum already"):
        load_extension(place / "spectrum", place / "spectrum.moemm", output=tmp_path / "out")

    def rename(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        content["extension"]["name"] = "other"

    path = changed(place, tmp_path / "a.moemm", rename)
    with pytest.raises(ConfigError, match="has the modality spectrum already; it has image, record, series, spectrum"):
        load_extension(place / "spectrum", path, output=tmp_path / "out")


@pytest.mark.parametrize("name", ["spectrm", "image", "shapes", ""])
def test_no_such_extension(place: Path, tmp_path: Path, name: str) -> None:
    hint = "did you mean spectrum" if name == "spectrm" else "allowed: spectrum"
    with pytest.raises(ConfigError, match=hint):
        export_extension(place / "spectrum", name, tmp_path / "out.moemm")
    with pytest.raises(ConfigError, match=hint):
        remove_extension(place / "spectrum", name, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="the run was never extended"):
        export_extension(place / "base", name, tmp_path / "out.moemm")
    assert not list(tmp_path.iterdir())


def test_files_and_folders_that_are_there(place: Path, tmp_path: Path) -> None:
    before = (place / "radar.moemm").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        export_extension(place / "spectrum", "spectrum", place / "radar.moemm")
    assert (place / "radar.moemm").read_bytes() == before
    with pytest.raises(ConfigError, match="already holds a run"):
        load_extension(place / "base", place / "radar.moemm", output=place / "spectrum")
    with pytest.raises(ConfigError, match="cannot write"):
        export_extension(place / "spectrum", "spectrum", tmp_path / "no" / "folder.moemm")


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def edits() -> dict[str, tuple[Edit, type[MoemmError], str]]:
    """Name -> what is done to a package before it is sealed again, the error, and what it says."""
    head = "heads.linear.task_spectrum.weight"

    def tensor(action: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
        def edit(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            action(tensors)
            content["tensors"] = sorted(tensors)

        return edit

    def value(*path: str | int, to: Any) -> Edit:
        def edit(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            holder: Any = content
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = to

        return edit

    wrong = CheckpointError
    return {
        "a tensor lacks": (tensor(lambda t: [t.pop(head)]), wrong, f"not in the package: {head}"),
        "a tensor too many": (tensor(lambda t: t.update(x=torch.ones(1))), wrong, "no place in the model: x"),
        "a tensor of the base": (
            tensor(lambda t: t.update({"trunk.norm.weight": torch.ones(16)})), wrong, "no place in the model: trunk",
        ),
        "another shape": (tensor(lambda t: t.update({head: torch.ones(2, 3)})), wrong, r"\(2, 3\) torch.float32, and"),
        "another type": (tensor(lambda t: t.update({head: t[head].double()})), wrong, "torch.float64"),
        "not finite": (tensor(lambda t: [t[head].fill_(float("nan"))]), wrong, "not all numbers are finite"),
        "names that differ": (value("tensors", to=["x"]), wrong, "are not those that it says"),
        "tasks that differ": (value("infos", to=[]), wrong, "are not those that it says"),
        "no extension": (value("extension", to=None), wrong, "does not describe an extension"),
        "a number for a name": (value("extension", "name", to=3), wrong, "does not describe an extension"),
        "a spec without info": (value("specs", "spectrum", to={"kind": "x"}), wrong, "does not describe an extension"),
        "an unknown kind": (value("specs", "spectrum", "kind", to="os.system"), ConfigError, "which nothing registers"),
        "more experts than tensors": (value("groups", 1, "count", to=9), wrong, "not in the package: .*spectrum"),
        "a group of the base": (value("groups", 0, "modalities", to=["nope"]), ConfigError, "nope"),
        "an id that is taken": (value("groups", 1, "id", to="spectrum_own"), ConfigError, "spectrum_own"),
        "a task that exists": (value("extension", "tasks", to=["shapes"]), wrong, "are not those that it says"),
        "an unknown option": (value("modalities", to={"spectrum": {"patch": "x"}}), wrong, "does not describe"),
        "a file elsewhere": (value("tasks", 0, "file", to="gone.h5"), ConfigError, "no file .*gone.h5"),
        "other data": (value("tasks", 0, "file", to="radar.h5"), MoemmError, "spectrum"),
    }  # fmt: skip


@pytest.mark.parametrize("case", edits())
def test_packages_that_are_whole_but_wrong(place: Path, tmp_path: Path, case: str) -> None:
    edit, error, message = edits()[case]
    path = changed(place, tmp_path / "out.moemm", edit)
    with pytest.raises(error, match=message):
        load_extension(place / "base", path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_data_of_another_form(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MoemmError, match="spectrum"):
        load_extension(place / "base", place / "spectrum.moemm", output=tmp_path / "out", data=[place / "tones.h5"])

    def fewer(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        content["infos"][0]["class_names"] = ["x", "y", "z"]

    path = changed(place, tmp_path / "a.moemm", fewer)
    with pytest.raises(DataError, match=r"task task_spectrum has class_names \(\) in the data, and \('x', 'y', 'z'\)"):
        load_extension(place / "base", path, output=tmp_path / "out")


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.5, 0.999])
def test_a_package_that_was_cut_short(place: Path, tmp_path: Path, cut: float) -> None:
    data = (place / "spectrum.moemm").read_bytes()
    path = tmp_path / "out.moemm"
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(CheckpointError, match="was cut short or changed"):
        load_extension(place / "base", path, output=tmp_path / "out")


def test_an_extension_that_another_needs(place: Path, tmp_path: Path) -> None:
    """A task of radar that also reads spectrum."""
    loaded = grown_config(load_config(place / "spectrum" / "config.yaml"), "radar")
    *tasks, last = loaded.config.data.tasks
    write_pair(place / "pair.h5")
    reads = replace(last, file="pair.h5")
    config = replace(loaded.config, data=replace(loaded.config.data, tasks=[*tasks, reads]))
    run = write_run(replace(loaded, config=config), tmp_path / "run", read_base(place / "spectrum").weights, seed=4)
    with pytest.raises(ConfigError, match="radar cannot be without extension spectrum: its tasks read"):
        remove_extension(run, "spectrum", output=tmp_path / "out")
    with pytest.raises(ConfigError, match="by itself it can be neither kept nor exported"):
        export_extension(run, "radar", tmp_path / "out.moemm")
    check(remove_extension(run, "radar", output=tmp_path / "left"))
    export_extension(run, "spectrum", tmp_path / "spectrum.moemm")


def test_experts_that_serve_what_another_brought(place: Path, tmp_path: Path) -> None:
    loaded = grown_config(load_config(place / "spectrum" / "config.yaml"), "lidar")
    groups = loaded.config.model.experts.groups
    groups[-1].modalities = ["lidar", "spectrum"]
    base = read_base(place / "spectrum")
    run = write_run(loaded, tmp_path / "run", base.weights, seed=4, specs=base.run.specs)
    with pytest.raises(ConfigError, match="lidar cannot be without extension spectrum: its experts serve spectrum"):
        export_extension(run, "lidar", tmp_path / "out.moemm")
    check(remove_extension(run, "lidar", output=tmp_path / "out"))


def test_experts_that_old_modalities_use(place: Path, tmp_path: Path) -> None:
    """Outputs of those may change, and the receipt tells by how much; all others keep their bits."""
    loaded = grown_config(load_config(place / "base" / "config.yaml"), "lidar")
    loaded.config.model.experts.groups[-1].modalities = ["lidar", "series"]
    base = read_base(place / "base")
    run = write_run(loaded, tmp_path / "run", base.weights, seed=4, specs=base.run.specs)
    export_extension(run, "lidar", tmp_path / "lidar.moemm")
    receipt = load_extension(place / "base", tmp_path / "lidar.moemm", output=tmp_path / "out")
    check(receipt)
    found = {proof.what: proof for proof in receipt.proofs}[
        "relative change of outputs of tasks that may use its experts"
    ]
    assert found.value > 0 and found.ok is None
    was, now = told(place / "base"), told(tmp_path / "out")
    assert torch.equal(was["shapes"], now["shapes"]) and not torch.equal(was["tones"], now["tones"])


def test_an_extension_that_used_the_experts_of_another(place: Path, tmp_path: Path) -> None:
    """Those of lidar serve the old modality series, which a task of spectrum reads beside its own."""
    loaded = grown_config(load_config(place / "base" / "config.yaml"), "lidar")
    loaded.config.model.experts.groups[-1].modalities = ["lidar", "series"]
    base = read_base(place / "base")
    run = write_run(loaded, tmp_path / "run", base.weights, seed=4, specs=base.run.specs)
    both = made(run, "radar", tmp_path / "both", seed=5)
    with pytest.raises(ConfigError, match="its task task_radar may use the experts of that"):
        remove_extension(both, "lidar", output=tmp_path / "out")
    with pytest.raises(ConfigError, match="by itself it can be neither kept nor exported"):
        export_extension(both, "radar", tmp_path / "out.moemm")
    export_extension(both, "lidar", tmp_path / "lidar.moemm")


def test_an_extension_that_moved_the_base(place: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place / "spectrum", tmp_path / "run"))
    receipt = json.loads((run / "receipt.json").read_text())
    receipt["details"] = {"name": "spectrum", "unfrozen": True}
    (run / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(ConfigError, match="was trained with the base unfrozen"):
        export_extension(run, "spectrum", tmp_path / "out.moemm")


def test_a_kind_of_ones_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package holds no code: the file that registers the kind has to be given where it is loaded."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    code = tmp_path / "own.py"
    code.write_text(
        "import moemm\nfrom moemm.modalities.timeseries import TimeSeries\n\n"
        "@moemm.register_modality('own')\nclass Own(TimeSeries):\n    pass\n"
    )
    loaded = grown_config(load_config(place / "base" / "config.yaml"), "spectrum")
    modalities = {"spectrum": ModalityConfig(kind="own", patch=[2])}
    loaded = replace(loaded, config=replace(loaded.config, modalities=modalities, plugins=[str(code)]), origins={})
    base = read_base(place / "base")
    own = replace(loaded, path=tmp_path / "recipe.yaml", config=replace(
        loaded.config, data=replace(loaded.config.data, root=str(place))
    ))  # fmt: skip
    try:
        run = write_run(own, tmp_path / "run", base.weights, seed=4, specs=base.run.specs)
        export_extension(run, "spectrum", tmp_path / "a.moemm")
        assert b"TimeSeries" not in (tmp_path / "a.moemm").read_bytes()
        KINDS.pop("own")
        plugins._LOADED.clear()
        with pytest.raises(ConfigError, match=r"is of kind 'own', which nothing registers here(.|\n)*--plugin FILE"):
            load_extension(place / "base", tmp_path / "a.moemm", output=tmp_path / "out")
        check(load_extension(place / "base", tmp_path / "a.moemm", output=tmp_path / "out", plugins=[code]))
        assert differing_bits(told(run), told(tmp_path / "out")) == 0
        assert len(list((tmp_path / "out" / "plugins").iterdir())) == 1
    finally:
        KINDS.pop("own", None)
        plugins._LOADED.clear()


# What `moemm extend` makes


@pytest.mark.usefixtures("alone")
def test_extensions_that_were_trained_apart(tmp_path: Path) -> None:
    """With the default groups, which are closed when the run is extended; one of routed experts."""
    groups = [
        {"kind": "shared", "width": 16},
        {"kind": "modality", "width": 8},
        {"kind": "routed", "count": 3, "width": 8},
    ]
    short: dict[str, Any] = {"steps": 2, "batch_size": 8, "baselines": False}
    own = {"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": groups}}
    train(tiny_config(tmp_path, model=own, train={"output": str(tmp_path / "run"), **short}))
    quick = extend.Trying(samples=16, steps=2)
    for number, name in enumerate(("spectrum", "radar")):
        file = write_new(tmp_path / f"{name}_task.h5", name, seed=number)
        experts = {"kind": "routed" if number else "modality", "layers": "all"}
        plan = extend.plan(tmp_path / "run", data=file, experts=experts, trying=quick, training={"steps": 2})
        assert extend.apply(plan, output=tmp_path / name).ok
        export_extension(tmp_path / name, name, tmp_path / f"{name}.moemm")
    check(load_extension(tmp_path / "run", tmp_path / "radar.moemm", output=tmp_path / "one"))
    check(load_extension(tmp_path / "one", tmp_path / "spectrum.moemm", output=tmp_path / "two"))
    config = load_run(tmp_path / "two").config
    assert config.train.only is None and all(task.learn for task in config.data.tasks)
    alone = {**told(tmp_path / "spectrum"), **told(tmp_path / "radar")}
    torch.testing.assert_close(told(tmp_path / "two"), alone, **NEAR)
    left = extend.remove(tmp_path / "two", "radar", output=tmp_path / "left")
    assert left.ok and differing_bits(read_base(tmp_path / "spectrum").weights, read_base(left.target).weights) == 0
    assert extend.remove(tmp_path / "left", "spectrum", output=tmp_path / "none").ok
    assert weights_hash(read_base(tmp_path / "none").weights) == weights_hash(read_base(tmp_path / "run").weights)
    again = extend.plan(
        tmp_path / "two", data=write_new(tmp_path / "echo_task.h5", "echo"), trying=quick, init="random"
    )
    assert extend.apply(again, output=tmp_path / "three", training=False).ok, "a loaded run can be extended"
    export_extension(tmp_path / "three", "spectrum", tmp_path / "again.moemm")
    one, two = (read_package(tmp_path / f"{name}.moemm") for name in ("spectrum", "again"))
    assert one[0] == two[0] and differing_bits(one[1], two[1]) == 0


# The command line


def test_the_verbs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, out = str(tmp_path / "out.moemm"), str(tmp_path / "out")
    assert main(["extend", "export", str(place / "spectrum"), "spectrum", package]) == 0
    assert "spectrum" in capsys.readouterr().out
    assert main(["extend", "load", str(place / "base"), package, "--output", out]) == 0
    assert "numbers of the run that changed" in capsys.readouterr().out
    assert main(["evaluate", out]) == 0
    assert "task_spectrum" in capsys.readouterr().out
    assert main(["extend", "remove", out, "--name", "spectrum", "--output", f"{out}-less", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["extend", "load", str(place / "radar"), str(place / "nope.moemm"), "--output", f"{out}-x"]) == 4
    assert "no such expert package" in capsys.readouterr().err
    assert isinstance(load_run(f"{out}-less").model, Model)
    assert read_content(Path(package))[0].extension.name == "spectrum"
