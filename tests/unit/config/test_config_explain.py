"""Help on keys, and the page made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moemm.config.document import document
from moemm.config.explain import explain, explain_all
from moemm.config.fields import all_fields
from moemm.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("model.router.top_k", ["type:      int", "allowed:   a whole number >= 1 or null", "default:   null"]),
        ("model.router.top-k", ["Routed experts a token uses: 1 when not given"]),
        ("--train.clip", ["DeepSpeed: gradient_clipping", "a number >= 0"]),
        ("train.precision", ["one of fp32, bf16", "bf16.enabled"]),
        ("data.tasks.0.weight", ["data.tasks[].weight"]),
        ("data.tasks.adult.weight", ["data.tasks[].weight"]),
        ("data.tasks.weight", ["data.tasks[].weight"]),
        ("data.tasks", ["data.tasks[].name", "required"]),
        ("modalities.image.patch", ["modalities.<name>.patch", "null"]),
        ("modalities.image", ["modalities.<name>.kind"]),
        ("modalities", ["modalities.<name>.kind"]),
        ("deepspeed.extra.zero_optimization", ["deepspeed.extra"]),
        ("model", ["Keys:", "model.dim", "model.experts"]),
    ],
)
def test_explain(key: str, parts: list[str]) -> None:
    text = explain(key)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("key", "hint"),
    [("top_k", "model.router.top_k"), ("model.top_k", "model.router.top_k"), ("modle.dim", "model.dim"),
     ("train.batchsize", "train.batch_size"), ("tem", ""), ("precison", "train.precision")],
)  # fmt: skip
def test_unknown_keys_have_a_nearest_one(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: no such key.*{hint}"):
        explain(key)


def test_every_key_explains_itself_and_is_listed() -> None:
    everything = explain_all()
    for info in all_fields():
        assert info.help in explain(info.path)
        assert info.section or info.path in everything


def test_the_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == document(), "run: python -m moemm.config.document > docs/config.md"
