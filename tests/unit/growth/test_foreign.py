"""Foreign checkpoints: a Vision Transformer of `transformers` in sharded safetensors, and what is not read at all.

hf_vit.json lists names and shapes of the shards that transformers 5.23 writes of a tiny ViTModel; one test has the
library itself make them.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import TRUNK
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moemm.cli.app import main
from moemm.errors import CheckpointError, ConfigError, DataError
from moemm.growth import Wanted, read_receipt, upcycle
from moemm.growth.foreign import read_tensors
from moemm.growth.samples import training_batches
from moemm.models import Model
from moemm.testing.tiny import tiny_config
from moemm.train import load_run

ROOT = Path(__file__).parents[3]
RULES = ROOT / "configs" / "rules" / "hf_vit.yaml"
LISTING = json.loads(Path(__file__).with_name("hf_vit.json").read_text())
INDEX = "model.safetensors.index.json"


def recipe(folder: Path, **model: Any) -> Path:
    """Experts to make of the ViT, on the tiny data, whose images it has patches of 4 x 4 for."""
    groups = [{"kind": "shared", "width": 16}, {"kind": "routed", "count": 4, "width": 16}]
    section = {**TRUNK, "experts": {"groups": groups}, **model}
    tiny_config(folder, model=section, modalities={"image": {"patch": [4, 4]}})
    return folder / "tiny.yaml"


def from_listing(folder: Path) -> Path:
    """The shards, with random weights."""
    folder.mkdir()
    torch.manual_seed(3)
    for name, shapes in LISTING.items():
        save_file({key: torch.randn(shape) for key, shape in shapes.items()}, folder / name)
    owners = {key: name for name, shapes in LISTING.items() for key in shapes}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    return folder


def from_transformers(folder: Path) -> Path:
    """The same by the library itself."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder, max_shard_size="8KB")
    found = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    shapes = {name: {key: list(value.shape) for key, value in one.items()} for name, one in found.items()}
    assert shapes == LISTING, "hf_vit.json tells of another version"
    return folder


@pytest.mark.parametrize("make", [from_listing, from_transformers])
def test_a_vision_transformer_becomes_experts(make: Any, tmp_path: Path) -> None:
    vit = make(tmp_path / "vit")
    source = read_tensors(vit)
    out = tmp_path / "out"
    receipt = upcycle(vit, Wanted(rules=RULES, recipe=recipe(tmp_path), output=out), tell=lambda line: None)
    assert receipt.ok and receipt.proofs[0].most == 1e-5, receipt.proofs
    run = load_run(out)
    weights = run.model.state_dict()
    layer = "encoder.layer.1"
    parts = [source[f"{layer}.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(weights["trunk.blocks.1.attention.qkv.weight"], torch.cat(parts))
    assert torch.equal(weights["trunk.norm.weight"], source["layernorm.weight"])
    first = source[f"{layer}.intermediate.dense.weight"]
    assert torch.equal(weights["trunk.blocks.1.ffn.shared.shared.w1_FD"], first[:16])
    assert torch.equal(weights["trunk.blocks.1.ffn.experts.routed_3.w1_FD"], first[16:])
    text = "\n".join(receipt.changed)
    assert "the trunk has no biases: encoder.layer.*" in text and "the tasks are others" in text
    stored = read_receipt(out)
    assert (
        stored is not None and stored["sources"][0]["folder"] == str(vit) and len(stored["sources"][0]["sha256"]) == 64
    )


def test_patches_are_embedded_as_there(tmp_path: Path) -> None:
    """The order of pixels in a patch, against the convolution that a ViT embeds with."""
    vit, out = from_listing(tmp_path / "vit"), tmp_path / "out"
    upcycle(vit, Wanted(rules=RULES, recipe=recipe(tmp_path), output=out), tell=lambda line: None)
    source, run = read_tensors(vit), load_run(out)
    assert isinstance(run.model, Model)
    (batch,) = training_batches(run, 8, size=8)
    tokenizer: Any = run.model.tokenizers["image"]
    pixels = (batch.modalities["image"].fields["data"].float() - tokenizer.mean_C) / tokenizer.deviation_C
    embedding = "embeddings.patch_embeddings.projection"
    wanted = F.conv2d(pixels, source[f"{embedding}.weight"], source[f"{embedding}.bias"], stride=4)
    found = tokenizer(batch.modalities["image"]).values_TD
    torch.testing.assert_close(found, wanted.flatten(2).transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_names_of_a_whole_classifier_lose_their_prefix(tmp_path: Path) -> None:
    """ViTForImageClassification puts `vit.` before them, and a head beside them; one file, in half precision."""
    tensors = {f"vit.{key}": value.half() for key, value in read_tensors(from_listing(tmp_path / "vit")).items()}
    tensors = {key: value for key, value in tensors.items() if "pooler" not in key}
    file = tmp_path / "whole.safetensors"
    save_file({**tensors, "classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}, file)
    wanted = Wanted(rules=RULES, recipe=recipe(tmp_path), output=tmp_path / "out")
    assert upcycle(file, wanted, tell=lambda line: None).ok
    assert load_run(tmp_path / "out").model.state_dict()["trunk.norm.weight"].dtype == torch.float32


def refused(path: Path, folder: Path, **wanted: Any) -> str:
    """The message; nothing is written."""
    if "recipe" not in wanted:
        wanted["recipe"] = recipe(folder)
    values = {"rules": RULES, "output": folder / "out", **wanted}
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        upcycle(path, Wanted(**values), tell=lambda line: None)
    assert not (folder / "out").exists()
    return str(caught.value)


def test_unmatched_names_on_either_side_are_errors(tmp_path: Path) -> None:
    vit = from_listing(tmp_path / "vit")
    shard = vit / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "embeddings.new": torch.ones(2)}, shard)
    assert "embeddings.new of the source is covered by no rule" in refused(vit, tmp_path)
    save_file(tensors, shard)
    text = RULES.read_text().replace("  - {from: layernorm.weight, to: trunk.norm.weight}\n", "")
    rules = tmp_path / "less.yaml"
    rules.write_text(text)
    message = refused(vit, tmp_path, rules=rules)
    assert "layernorm.weight of the source" in message and "trunk.norm.weight of the target" in message


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"layers": 1}, "the target has no trunk.blocks.1"), ({"layers": 3}, "trunk.blocks.2.attention"),
        ({"dim": 32}, "is 32 x 32, and what"),
        ({"experts": {"groups": [{"kind": "routed", "count": 2, "width": 16}]}}, "32 hidden units"),
    ],
)  # fmt: skip
def test_another_shape_is_refused(model: dict[str, Any], problem: str, tmp_path: Path) -> None:
    vit = from_listing(tmp_path / "vit")
    assert problem in refused(vit, tmp_path, recipe=recipe(tmp_path, **model))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "hacked")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "x.pkl", "m.safetensors"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_files_that_could_run_code_are_not_read(name: str, as_folder: bool, tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "model"
    folder.mkdir()
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(mark)))
    message = refused(folder if as_folder else folder / name, tmp_path)
    assert "safetensors" in message and name in message and not mark.exists()
    assert "safetensors" in refused(folder / name, tmp_path, rules=None) or name == "m.safetensors"


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{", "no index of shards"), ("[]", "no index of shards"), ('{"weight_map": [1]}', "wanted one index"),
        ('{"weight_map": {"a": 3}}', "wanted one index"), ('{"weight_map": {"a": "../b.safetensors"}}', "beside it"),
        ('{"weight_map": {"a": "/etc/b.safetensors"}}', "beside it"), ('{"weight_map": {"a": "b.bin"}}', "beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
        ('{"weight_map": {"a": "b.safetensors"}}', "says that a is in b.safetensors"),
    ],
)  # fmt: skip
def test_a_broken_index_is_refused(index: str, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.ones(1)}, folder / "b.safetensors")
    (folder / INDEX).write_text(index)
    assert problem in refused(folder, tmp_path)


def test_broken_and_double_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "a.safetensors"
    save_file({"x": torch.ones(4)}, file)
    file.write_bytes(file.read_bytes()[:-3])
    assert "broken one" in refused(folder, tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(4)}, folder / f"{name}.safetensors")
    assert "x stands in a.safetensors and in b.safetensors" in refused(folder, tmp_path)
    assert "no such run folder" in refused(tmp_path / "nothing", tmp_path)


def test_weights_without_rules_are_no_run(tmp_path: Path) -> None:
    vit = from_listing(tmp_path / "vit")
    assert "give --rules" in refused(vit, tmp_path, rules=None, recipe=None)
    assert main(["upcycle", str(vit)]) == ConfigError.exit_code
    rules = tmp_path / "none.yaml"
    rules.write_text("rules: [{drop: '{rest*}', why: all}]")
    assert "no rule makes" in refused(vit, tmp_path, rules=rules)


def test_a_foreign_model_needs_data(tmp_path: Path) -> None:
    vit, path = from_listing(tmp_path / "vit"), recipe(tmp_path)
    (tmp_path / "tones.h5").unlink()
    with pytest.raises(DataError):
        upcycle(vit, Wanted(rules=RULES, recipe=path, output=tmp_path / "out"), tell=lambda line: None)
