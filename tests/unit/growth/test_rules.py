"""Rules from names to names: what they make, and that nothing on either side is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moemm.errors import CheckpointError, ConfigError
from moemm.growth.rule_file import RuleFile, read_rules
from moemm.growth.rules import Rule, To, apply_rules, match, some

SOURCE = {"a.0.w": torch.ones(2, 3), "a.1.w": 2 * torch.ones(2, 3), "b": torch.arange(4.0)}


def like(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("pattern", "name", "values"),
    [
        ("a.{i}.w", "a.3.w", {"i": "3"}), ("a.{i}.w", "a.3.b.w", None), ("a.{rest*}.w", "a.3.b.w", {"rest": "3.b"}),
        ("{i}.{i}", "4.4", {"i": "4"}), ("{i}.{i}", "4.5", None), ("a.w", "a.w", {}), ("a.w", "a_w", None),
        ("a{i}", "a", None),
    ],
)  # fmt: skip
def test_placeholders(pattern: str, name: str, values: dict[str, str] | None) -> None:
    assert match(pattern, name) == values


def test_one_goes_to_many_and_many_to_one() -> None:
    rules = [
        Rule(("a.{i}.w",), (To("x.{i}.{member}.w"),)),
        Rule(("b",), (To("y", lambda parts, fresh: 3 * parts[0]), To("z"))),
    ]
    target = like(x__0__p__w=(2, 3), x__0__q__w=(2, 3), x__1__p__w=(2, 3), y=(4,), z=(4,))
    found, taken = apply_rules(rules, SOURCE, target)
    assert sorted(found) == sorted(target) == sorted(taken.made)
    assert torch.equal(found["x.0.q.w"], SOURCE["a.0.w"]) and torch.equal(found["x.1.p.w"], SOURCE["a.1.w"])
    assert torch.equal(found["y"], 3 * SOURCE["b"]) and torch.equal(found["z"], SOURCE["b"])
    found["z"].zero_()
    assert SOURCE["b"].sum() == 6, "nothing of the source is handed out"


def test_sources_come_in_the_order_of_the_rule() -> None:
    rules = [
        Rule(("a.1.w", "a.0.w"), (To("both", lambda parts, fresh: torch.cat(list(parts))),)),
        Rule(("b",), (), "old"),
        Rule((), (To("new.{rest*}"),), "there was none"),
    ]
    target = like(both=(4, 3), new__x__y=(1,))
    found, taken = apply_rules(rules, SOURCE, target)
    assert torch.equal(found["both"], torch.cat([SOURCE["a.1.w"], SOURCE["a.0.w"]]))
    assert taken.dropped == {"old": ["b"]} and taken.fresh == {"there was none": ["new.x.y"]}
    assert any("old: b" in line for line in taken.lines())


KEEP_B = Rule(("b",), (To("b"),))
KEEP_A = Rule(("a.{i}.w",), (To("a.{i}.w"),))


@pytest.mark.parametrize(
    ("rules", "target", "problem"),
    [
        ([KEEP_B], like(b=(4,)), "a.0.w of the source is covered by no rule"),
        ([KEEP_A, KEEP_B], {**like(b=(4,)), **SOURCE, "c": torch.zeros(1)}, "c of the target is covered by no rule"),
        ([KEEP_A, KEEP_B], like(b=(4,), a__0__w=(2, 3)), "the target has no a.1.w"),
        ([KEEP_A, KEEP_B], {**SOURCE, "b": torch.zeros(5)}, "b is 5, and what b -> b makes is 4"),
        ([KEEP_A, KEEP_B, Rule(("q",), (To("b"),))], SOURCE, "q -> b matches nothing"),
        ([Rule(("a.{i}.w",), (To("a.0.w"),)), KEEP_B], SOURCE, "a.0.w is made twice"),
        ([Rule(("a.0.w", "c"), (To("a.0.w"),)), KEEP_A, KEEP_B], SOURCE, "a.0.w needs c beside it"),
        ([KEEP_A, Rule(("b",), (To("b", lambda p, f: p[0].reshape(3)),))], SOURCE, "b: shape"),
        ([KEEP_A, Rule(("b",), (To("b", lambda p, f: p[0] / 0),))], SOURCE, "not finite"),
        ([KEEP_B, Rule(("a.{i}.w",), (), "why")], {**SOURCE}, "a.0.w of the target is covered by no rule"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(rules: list[Rule], target: dict[str, torch.Tensor], problem: str) -> None:
    with pytest.raises(CheckpointError, match="the rules do not fit") as caught:
        apply_rules(rules, SOURCE, target)
    assert problem in str(caught.value)


def test_many_names_are_told_as_one() -> None:
    assert some(["t.0.w", "t.1.w", "r.routed_3", "r.routed_4", "x"]) == "t.*.w (2), r.routed_* (2), x"
    assert some([f"n{letter}" for letter in "abcdefghij"]).endswith(" and 2 more")


def written(folder: Path, text: str) -> Path:
    path = folder / "rules.yaml"
    path.write_text(text)
    return path


def test_a_rule_file_does_what_it_says(tmp_path: Path) -> None:
    text = """
    strip: [model.]
    rules:
      - {from: ["a.{i}.q", "a.{i}.k"], to: "l.{i}.qk", steps: [concat, {scale: 2}, transpose]}
      - {from: p, to: patch, steps: [{permute: [1, 0, 2]}, reshape]}
      - {from: rows, to: top, steps: [{rows: [0, 2]}]}
      - {drop: "bias.{rest*}", why: none here}
      - {fresh: [head, tail], why: others}
    """
    file = read_rules(written(tmp_path, text))
    source = {
        "model.a.7.q": torch.ones(1, 2), "model.a.7.k": torch.zeros(1, 2), "p": torch.arange(24.0).view(2, 3, 4),
        "rows": torch.arange(3.0), "bias.x": torch.ones(1),
    }  # fmt: skip
    target = like(l__7__qk=(2, 2), patch=(3, 8), top=(2,), head=(1,), tail=(2,))
    found, _ = apply_rules(file.rules, file.named(source), target)
    assert found["l.7.qk"].tolist() == [[2.0, 0.0], [2.0, 0.0]]
    assert torch.equal(found["patch"], source["p"].permute(1, 0, 2).reshape(3, 8))
    assert found["top"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rules: []", "must hold `rules`"), ("x: 1\nrules: [{drop: a, why: b}]", "must hold `rules`"),
        ("rules: [a]", "rules.0"), ("rules: [{from: a}]", "rules.0.to"), ("rules: [{drop: a}]", "needs `why`"),
        ("rules: [{from: a, to: b, why: c}]", "has the keys"), ("rules: [{to: b}]", "has the keys"),
        ("rules: [{from: a, to: b, steps: [transpos]}]", "did you mean transpose"),
        ("rules: [{from: a, to: b, steps: [{scale: x}]}]", "needs a number"),
        ("rules: [{from: a, to: b, steps: [{rows: [1.5, 2]}]}]", "no whole number"),
        ("rules: [{from: a, to: b, steps: [{reshape: [2]}]}]", "takes no value"),
        ("rules: !!python/object/apply:os.system [ls]", "not allowed"),
    ],
)  # fmt: skip
def test_a_wrong_rule_file_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem.replace(".", r"\.")):
        read_rules(written(tmp_path, text))


def test_several_tensors_need_a_concat() -> None:
    file = RuleFile((Rule(("a.0.w", "a.1.w"), (To("x"),)), KEEP_B))
    with pytest.raises(CheckpointError, match=r"a\.0\.w, a\.1\.w -> x"):
        apply_rules(file.rules, SOURCE, like(x=(2, 3), b=(4,)))
