"""Row 16: golden curves. Each recipe's first 20 steps, on 1 and 2 ranks with ZeRO 0 to 3, must be what they were.

    python -m benchmarks.faults.golden               # make tests/golden/RECIPE.json anew; print what changed
    python -m benchmarks.faults.golden dense moma    # of these recipes alone

A run is the recipe with a small model and small batches of the quickstart's data. Its losses, gradient norms and the
hash of its last weights stand in a file. On the kind of machine that the file names all must be equal to the last bit;
on others the losses within 1e-4. To change the numerics is to change these files in the same commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.outcome import Outcome, spread
from moemm.checkpoint.store import full_weights
from moemm.config import LoadedConfig, load_config, to_dict
from moemm.data.catalogue import Catalogue
from moemm.distributed import World, connect
from moemm.modalities import ModalitySpec
from moemm.observe.records import Metrics
from moemm.testing.forked import Nursery
from moemm.testing.kind import differing, machine_kind
from moemm.train.callbacks import Callback, CheckpointingCallback
from moemm.train.setup import Setup, learn_modalities, store_run, total_steps
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml"))}
FILES = ROOT / "tests" / "golden"
GOLDEN = "golden curves of each recipe, 1 and 2 ranks, ZeRO 0-3"
STEPS, NEAR = 20, 1e-4
SMALL = (
    "model.dim=16", "model.heads=2", "data.num_workers=0", f"train.steps={STEPS}", "train.batch_size=24",
    "train.log_every=1", "train.eval_every=0", "train.checkpoint.every=0", "train.baselines=false",
)  # fmt: skip
"""Overrides of every recipe."""
BEFORE = {"finetune": "pretrain"}
"""Recipes whose train.init is the run of another one: of so many steps, with the same ranks."""
BEFORE_STEPS = 4
WITH_DROPOUT, ONE = "1 rank with dropout", "1 rank"
CASES = {WITH_DROPOUT: 1, ONE: 1, **{f"2 ranks, ZeRO {stage}": 2 for stage in range(4)}}
"""Case of each recipe -> its ranks. All but the first are without dropout and noise, which ranks draw by themselves: so
that they must come to the same but for rounding."""
ALL = [(recipe, case) for recipe in RECIPES for case in CASES]


def overrides(recipe: str, case: str) -> list[str]:
    """Of a recipe in a case: what is not as its file says."""
    found = [*SMALL]
    if case != WITH_DROPOUT:
        modalities = load_config(RECIPES[recipe]).config.modalities
        drawn = [f"modalities.{name}.{key}" for name, one in modalities.items() for key in ("dropout", "noise")
                 if getattr(one, key)]  # fmt: skip
        found += [f"{key}=0.0" for key in ("model.dropout", *drawn)]
    stage = case.partition("ZeRO ")[2]
    if stage:
        found.append(f"deepspeed.zero_stage={stage}")
    if stage == "3":  # else such small weights would stay whole
        found.append("deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}")
    return found


class Curve(Callback):
    """Loss and gradient norm of each step."""

    def __init__(self) -> None:
        self.steps: list[list[float | None]] = []

    def on_metrics(self, metrics: Metrics) -> None:
        """Keep them."""
        self.steps.append([metrics.loss, metrics.grad_norm])


def job(folder: str, cases: Sequence[Sequence[str]], changed: Sequence[str] = ()) -> dict[str, Any]:
    """In each rank: the curves of (recipe, case) pairs, one after the other, and the kind of this machine.

    changed: overrides that no file has.
    """
    torch.set_num_threads(1)  # with two, sums would be taken in another order
    world = connect(timeout_s=60)
    made = []
    for number, (recipe, case) in enumerate(cases):
        mine, given = Path(folder) / str(number), overrides(recipe, case)
        if recipe in BEFORE:
            first = [*overrides(BEFORE[recipe], case), f"train.output={mine / 'before'}", f"train.steps={BEFORE_STEPS}"]
            _train(load_config(RECIPES[BEFORE[recipe]], first), world, save=True)
            given.append(f"train.init={mine / 'before'}")
        made.append(_train(load_config(RECIPES[recipe], [*given, f"train.output={mine / 'run'}", *changed]), world))
    return {"kind": machine_kind(), "curves": made}


WHAT_IS_DRAWN = ("modality_dropout", "label_share")
"""Keys of `data` that do not change what is learned of it before the first step."""
_learned: dict[str, tuple[Catalogue, dict[str, ModalitySpec]]] = {}


def _setup(loaded: LoadedConfig, world: World, *, save: bool) -> Setup:
    """As `prepare` makes it, but the data is read once for all recipes that have the same."""
    config, values = loaded.config, to_dict(loaded.config)
    data = {name: value for name, value in values["data"].items() if name not in WHAT_IS_DRAWN}
    key = json.dumps([data, values["modalities"], config.train.init])
    if key not in _learned:
        _learned[key] = learn_modalities(loaded)
    folder = Path(config.train.output)
    if save and world.is_main:
        store_run(loaded, folder, *_learned[key])
    return Setup(config, *_learned[key], folder, total_steps(config, _learned[key][0]))


def _train(loaded: LoadedConfig, world: World, *, save: bool = False) -> dict[str, Any]:
    curve = Curve()
    callbacks = [curve, *([CheckpointingCallback(every=0)] if save else [])]
    trainer = Trainer(_setup(loaded, world, save=save), world, callbacks, StopRequest())
    trainer.run()
    weights = full_weights(trainer.engine.model, world, master=False)
    trainer.close()
    return {"weights": digest(weights), "steps": curve.steps}


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def curves(
    nursery: Nursery, folder: Path, cases: Sequence[tuple[str, str]], *, changed: Sequence[str] = ()
) -> tuple[dict[str, str], dict[tuple[str, str], dict[str, Any]]]:
    """The kind of this machine, and the curve of each case; one set of processes for each number of ranks.

    Raises AssertionError with the output of the ranks where one fails.
    """
    kind, found = dict[str, str](), {}
    for ranks in sorted({CASES[case] for _, case in cases}):
        mine = [pair for pair in cases if CASES[pair[1]] == ranks]
        arguments = {"folder": str(folder / f"{ranks}_ranks"), "cases": mine, "changed": [*changed]}
        (first, *_) = nursery.run(
            "benchmarks.faults.golden:job", ranks=ranks, arguments=arguments, timeout_s=60 + 20 * len(mine), check=True
        )
        kind = first.value["kind"]
        found |= dict(zip(mine, first.value["curves"], strict=True))
    return kind, found


def own_overrides(recipe: str, case: str) -> list[str]:
    """What a case has beside SMALL."""
    return overrides(recipe, case)[len(SMALL) :]


def as_file(recipe: str, kind: Mapping[str, str], found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What stands in the file of a recipe; found: case -> its curve. Floats as Python prints them are exact."""
    cases = {case: {"overrides": own_overrides(recipe, case), **curve} for case, curve in found.items()}
    return {"recipe": recipe, "overrides": [*SMALL], "threads": 1, "machine": dict(kind), "cases": cases}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """As JSON with a line for each step, so that a diff shows which."""
    cases = []
    for case, entry in content["cases"].items():
        head = ",\n   ".join(f"{json.dumps(key)}: {json.dumps(entry[key])}" for key in ("overrides", "weights"))
        steps = ",\n    ".join(json.dumps(step) for step in entry["steps"])
        cases.append(f'  {json.dumps(case)}: {{\n   {head},\n   "steps": [\n    {steps}\n   ]\n  }}')
    head = json.dumps({key: value for key, value in content.items() if key != "cases"}, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "cases": {{\n' + ",\n".join(cases) + "\n }\n}\n", encoding="utf-8")


def read(recipe: str) -> dict[str, Any]:
    """The file of a recipe. Raises FileNotFoundError with the command that makes it."""
    path = FILES / f"{recipe}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: make it with python -m benchmarks.faults.golden {recipe}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that is not as it was: a loss or gradient norm of a step (1-based), or the last weights (0)."""

    what: str
    step: int
    old: Any
    new: Any

    @property
    def relative(self) -> float:
        """By which part of the old number the new one is off; infinite where one of them is none."""
        return distance(self.old, self.new)

    def __str__(self) -> str:
        if not self.step:
            return f"{self.what}: was {self.old}, is {self.new}"
        return f"{self.what} of step {self.step}: was {self.old!r}, is {self.new!r} (relative {self.relative:.1e})"


def distance(old: Any, new: Any) -> float:
    """Relative to `old`; 0 where they are equal, infinite where one of them is no finite number."""
    if old == new:
        return 0.0
    if not all(isinstance(one, float) and math.isfinite(one) for one in (old, new)):
        return math.inf
    return abs(new - old) / max(abs(old), 1e-30)


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], *, exact: bool) -> Difference | None:
    """Between two curves; None if they are equal: to the last bit with `exact`, else each loss within NEAR."""
    if len(old["steps"]) != len(new["steps"]):
        return Difference("number of steps", 0, len(old["steps"]), len(new["steps"]))
    for step, (before, after) in enumerate(zip(old["steps"], new["steps"], strict=True), 1):
        for what, was, value in zip(("loss", "gradient norm"), before, after, strict=True):
            far = distance(was, value)
            if (exact and far > 0) or (what == "loss" and not far <= NEAR):
                return Difference(what, step, was, value)
    if exact and old["weights"] != new["weights"]:
        return Difference("sha256 of the weights", 0, old["weights"], new["weights"])
    return None


def judge(recipe: str, case: str, curve: Mapping[str, Any], kind: Mapping[str, str]) -> str:
    """What is wrong with a case; empty where it is as its file says."""
    stored = read(recipe)
    entry = stored["cases"].get(case)
    if entry is None or [*stored["overrides"], *entry["overrides"]] != overrides(recipe, case):
        again = f"python -m benchmarks.faults.golden {recipe}"
        return f"{recipe}, {case}: tests/golden/{recipe}.json has not this case with these overrides: {again}"
    found = first_difference(entry, curve, exact=stored["machine"] == kind)
    return "" if found is None else f"{recipe}, {case}: {found}"


def between_worlds(stored: Mapping[str, Any]) -> list[str]:
    """Where a file's cases without dropout differ by more than NEAR: they are one computation, cut in several ways.

    Under a capacity only those of 2 ranks are: tokens of one rank compete for it.
    """
    recipe = stored["recipe"]
    competing = load_config(RECIPES[recipe]).config.model.router.kind in ("expert_choice", "batch_priority")
    first = "2 ranks, ZeRO 0" if competing else ONE
    cases = {case: entry for case, entry in stored["cases"].items() if case not in (WITH_DROPOUT, ONE)}
    found = {case: first_difference(stored["cases"][first], entry, exact=False) for case, entry in cases.items()}
    return [f"{recipe}, {case}, not as {first}: {one}" for case, one in found.items() if one is not None]


def run(nursery: Nursery, folder: Path, count: int) -> Outcome:
    """`count` cases, spread over all."""
    wrong, cases = [], spread(ALL, count)
    for recipe in dict.fromkeys(recipe for recipe, _ in cases):
        mine = [pair for pair in cases if pair[0] == recipe]
        try:
            kind, found = curves(nursery, folder / recipe, mine)
        except AssertionError as error:
            wrong += [f"{recipe}, {case}: {str(error)[-600:]}" for _, case in mine]
        else:
            wrong += filter(None, (judge(*pair, curve, kind) for pair, curve in found.items()))
    return Outcome(GOLDEN, len(cases), wrong)


def changes(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """What a new file of a recipe has that the old one had not, in words; none where nothing changed."""
    if old is None:
        return [f"new, {len(new['cases'])} cases"]
    found = [text for text in [differing(new["machine"], old["machine"])] if text]
    for case in dict.fromkeys([*old["cases"], *new["cases"]]):
        before, after = old["cases"].get(case), new["cases"].get(case)
        if before is None or after is None:
            found.append(f"{case}: {'new' if before is None else 'gone'}")
            continue
        first = first_difference(before, after, exact=True)
        if first is not None:
            pairs = zip(before["steps"], after["steps"], strict=False)
            far = max(distance(was[0], value[0]) for was, value in pairs)
            found.append(f"{case}: {first}; losses differ by up to {far:.1e}")
        elif [*old["overrides"], *before["overrides"]] != [*new["overrides"], *after["overrides"]]:
            found.append(f"{case}: other overrides, the same curve")
    return found


def main() -> None:
    """Make the files anew and print what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="all when not given")
    recipes = parser.parse_args().recipes or list(RECIPES)
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown:
        parser.error(f"no recipe {unknown[0]}; there are {', '.join(RECIPES)}")
    FILES.mkdir(exist_ok=True)
    with Nursery() as nursery, tempfile.TemporaryDirectory() as folder:
        for recipe in recipes:
            path = FILES / f"{recipe}.json"
            old = read(recipe) if path.exists() else None
            kind, found = curves(nursery, Path(folder) / recipe, [(recipe, case) for case in CASES])
            new = as_file(recipe, kind, {case: found[recipe, case] for case in CASES})
            write(path, new)
            told = [*changes(old, new), *between_worlds(new)]
            print(f"{recipe}: {'nothing changed' if not told else ''}".rstrip(), *told, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
