"""`moemm merge`: several runs of one model into one, or the routed experts of one run into fewer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from moemm.config import Config, LoadedConfig
from moemm.config.check_objectives import is_on
from moemm.config.suggest import did_you_mean
from moemm.errors import ConfigError
from moemm.growth.alike import check_alike, own_weights
from moemm.growth.fewer import (
    Cluster,
    Pool,
    find_clusters,
    look,
    merged_weights,
    permuted_weights,
    plan_fewer,
    relative_change,
)
from moemm.growth.fisher import diagonal_fisher
from moemm.growth.grown import Base, check_target, fresh_model, read_base, size_of, write_grown
from moemm.growth.judge import SPLIT, Judge, Score
from moemm.growth.receipt import Proof, Receipt, lineage
from moemm.growth.samples import training_batches
from moemm.growth.soup import changed_bits, fisher_soup, task_vector, uniform_soup
from moemm.models import Model
from moemm.train.setup import CONFIG

Method = Literal["uniform", "greedy", "fisher", "task-vector"]
Tell = Callable[[str], None]
Weights = dict[str, torch.Tensor]
METHODS: tuple[str, ...] = get_args(Method)
SAMPLES = 256
"""Training samples that Fisher values and usage are measured on when not given."""
ALPHAS = tuple(number / 10 for number in range(11))
KEPT = 1e-6
"""How much exchanging hidden units may change an expert's outputs, relative to them."""
_NO_OPTIMIZER = (
    "not kept: moments belong to the way by which each run came to its weights, and merged ones came by none"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of scores. kept: whether the result holds it; None: it is only told."""

    what: str
    score: Score
    kept: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"what": self.what, **self.score.to_dict(), "kept": self.kept}


@dataclass(frozen=True, slots=True)
class Made:
    """What a method made. rows: what it scored on the way. proofs, details: of its own."""

    weights: Weights
    rows: list[Row]
    changed: list[str]
    proofs: list[Proof]
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kitchen:
    """Runs that are alike, their weights and scores on val, and what else a soup needs."""

    bases: list[Base]
    weights: list[Weights]
    scores: list[Score]
    judge: Callable[[Weights], Score]
    alphas: Sequence[float]
    samples: int
    tell: Tell

    @property
    def names(self) -> list[str]:
        """The runs' folders."""
        return [str(base.run.folder) for base in self.bases]


def merge(
    runs: Sequence[Path | str],
    *,
    output: Path | str,
    method: str | None = None,
    experts: int | None = None,
    base: Path | str | None = None,
    alphas: Sequence[float] | None = None,
    samples: int | None = None,
    plugins: Sequence[Path | str] = (),
    tell: Tell = lambda line: None,
) -> Receipt:
    """Merge runs into the run folder `output`, or with `experts` the routed experts of one run into fewer.

    method: `uniform` (when not given), `greedy`, `fisher` or `task-vector`. base: where task vectors begin, the first
    of `runs` when not given; alphas: the coefficients tried. samples: of the training mixture, for `fisher` and
    `experts`. plugins: as `read_base` takes them, for each run. tell: gets a line for each thing that takes time. Reads
    the splits train and val alone.
    Raises ConfigError: runs that differ, options that do not fit. CheckpointError and DataError as `load_run`.
    """
    _check(runs, method, experts, base=base, alphas=alphas, samples=samples)
    check_target(Path(output))
    if experts is not None:
        return _merge_experts(read_base(runs[0], plugins=plugins), experts, Path(output), samples or SAMPLES, tell)
    named = [*([base] if base is not None else []), *runs]
    bases = [read_base(path, plugins=plugins) for path in named]
    check_alike(bases)
    chosen = cast(Method, method or "uniform")
    _check_labels(bases[0], chosen)
    return _merge_runs(bases, chosen, Path(output), list(alphas or ALPHAS), samples or SAMPLES, tell)


def _check(
    runs: Sequence[Path | str], method: str | None, experts: int | None, *, base: Path | str | None,
    alphas: Sequence[float] | None, samples: int | None,
) -> None:  # fmt: skip
    """Refuse options that do not fit each other, before anything is read. Raises ConfigError."""
    if experts is not None:
        _check_experts(runs, method, base=base, alphas=alphas)
    elif method is not None and method not in METHODS:
        raise ConfigError(
            f"--method {method}: unknown{did_you_mean(method, METHODS)}\n  allowed: {', '.join(METHODS)}\n"
            "  BTX, several dense runs as the experts of one, is `moemm upcycle --method branch`"
        )
    elif len(runs) + (base is not None) < 2:
        raise ConfigError(
            f"one run alone cannot be averaged: {', '.join(map(str, runs)) or 'none was given'}\n"
            "  allowed: two and more runs of the same model and tasks\n"
            "  to do: name another run; or give --experts N to merge the routed experts of one"
        )
    if experts is None and method != "task-vector":
        for name, value in (("base", base), ("alphas", alphas)):
            if value is not None:
                raise ConfigError(f"--{name} is for --method task-vector; this is --method {method or 'uniform'}")
    if alphas is not None and (not alphas or not all(map(math.isfinite, alphas))):
        raise ConfigError(f"--alphas {list(alphas)}: must be numbers, such as 0,0.25,0.5,0.75,1")
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples}: must be at least 1; {SAMPLES} when not given")
    if samples is not None and experts is None and method != "fisher":
        raise ConfigError(f"--samples is for --method fisher and --experts; this is --method {method or 'uniform'}")


def _check_experts(
    runs: Sequence[Path | str], method: str | None, *, base: Path | str | None, alphas: Sequence[float] | None
) -> None:
    if len(runs) != 1:
        raise ConfigError(
            f"--experts merges the experts of one run, {len(runs)} were given: {', '.join(map(str, runs))}\n"
            "  to do: average the runs first, then merge the experts of what comes out"
        )
    for name, value in (("method", method), ("base", base), ("alphas", alphas)):
        if value is not None:
            raise ConfigError(
                f"--{name} says how several runs are averaged, --experts merges those of one; leave it out"
            )


def _check_labels(base: Base, method: Method) -> None:
    if method != "uniform" and not is_on(base.run.config.objectives.supervised):
        raise ConfigError(
            f"--method {method} goes by the tasks' labels, and {base.run.folder} learned from none "
            "(objectives.supervised.weight is 0)\n  allowed: uniform\n  to do: leave --method out"
        )


def _merge_runs(
    bases: list[Base], method: Method, output: Path, alphas: list[float], samples: int, tell: Tell
) -> Receipt:
    config = _config(bases[0], output)
    run = bases[0].run
    model = fresh_model(config, run.catalogue, run.specs)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    judge = Judge(model, run)

    def score(weights: Weights) -> Score:
        return judge(fresh | weights)

    weights = [own_weights(base) for base in bases]
    kitchen = Kitchen(bases, weights, _scores(bases, weights, score, tell), score, alphas, samples, tell)
    made = _COOKS[method](kitchen)
    result = score(made.weights)
    anew = [name for name in fresh if name not in made.weights]
    lines = [*made.changed]
    lines += [f"began anew: {len(anew)} tensors of how each run's own losses went"] if anew else []
    before = [Row(name, one) for name, one in zip(kitchen.names, kitchen.scores, strict=True)]
    proofs = [*_told(bases[0], before), *_told(bases[0], [Row("result", result)])]
    proofs += [_gain(result, kitchen.scores, asked=method == "greedy"), *made.proofs]
    rows = [*before, *made.rows, Row("result", result)]
    size = size_of(model)
    receipt = Receipt(
        operation=f"merge {method}", sources=[base.as_source() for base in bases], target=str(output), changed=lines,
        proofs=proofs, before=size, after=size, optimizer=_NO_OPTIMIZER,
        details={**_scored(bases[0], rows), **made.details}, history=_history(bases),
    )  # fmt: skip
    write_grown(_loaded(bases[0], config), run.catalogue, run.specs, model, receipt)
    return receipt


def _scores(bases: list[Base], weights: list[Weights], score: Callable[[Weights], Score], tell: Tell) -> list[Score]:
    found = []
    for number, (base, own) in enumerate(zip(bases, weights, strict=True), start=1):
        found.append(score(own))
        tell(f"{number} of {len(bases)}: {base.run.folder}, mean on {SPLIT} {found[-1].mean:.4f}")
    return found


def _uniform(kitchen: Kitchen) -> Made:
    made = uniform_soup(kitchen.weights)
    again = uniform_soup([kitchen.weights[0]] * 2)
    return Made(made, [], [f"mean of {len(kitchen.bases)} runs, each counts the same"], [_itself(kitchen, again)], {})


def _greedy(kitchen: Kitchen) -> Made:
    """Runs in the order of their scores; each stays where the mean on val does not fall by it."""
    order = sorted(range(len(kitchen.bases)), key=lambda number: -kitchen.scores[number].mean)
    inside, best = [order[0]], kitchen.scores[order[0]]
    rows = [Row(f"begin with {kitchen.names[order[0]]}", best, True)]
    for number in order[1:]:
        score = kitchen.judge(uniform_soup([kitchen.weights[one] for one in [*inside, number]]))
        kept = score.mean >= best.mean
        rows.append(Row(f"and {kitchen.names[number]}", score, kept))
        kitchen.tell(
            f"with {kitchen.names[number]}: mean on {SPLIT} {score.mean:.4f}, {'kept' if kept else 'left out'}"
        )
        if kept:
            inside, best = [*inside, number], score
    names = [kitchen.names[number] for number in inside]
    lines = [f"mean of {len(names)} of {len(kitchen.names)} runs, the best on {SPLIT} first: {', '.join(names)}"]
    out = [name for number, name in enumerate(kitchen.names) if number not in inside]
    lines += [f"left out, because the mean on {SPLIT} falls by it: {', '.join(out)}"] if out else []
    again = uniform_soup([kitchen.weights[0]] * 2)
    made = uniform_soup([kitchen.weights[number] for number in inside])
    return Made(made, rows, lines, [_itself(kitchen, again)], {"kept": names})


def _fisher(kitchen: Kitchen) -> Made:
    """Each parameter's runs weighted by their Fisher values."""
    run = kitchen.bases[0].run
    batches = training_batches(run, kitchen.samples, size=1)
    fishers = []
    for base in kitchen.bases:
        fishers.append(diagonal_fisher(cast(Model, base.run.model), batches, seed=run.config.train.seed))
        kitchen.tell(f"Fisher values of {base.run.folder} on {len(batches)} training samples")
    means = [sum(float(own.sum()) for own in fisher.values()) for fisher in fishers]
    lines = [
        f"mean of {len(kitchen.bases)} runs, each parameter weighted by its Fisher value on {len(batches)} training "
        "samples, with labels drawn from the model"
    ]
    again = fisher_soup([kitchen.weights[0]] * 2, [fishers[0]] * 2)
    made = fisher_soup(kitchen.weights, fishers)
    return Made(made, [], lines, [_itself(kitchen, again)], {"samples": len(batches), "fisher": means})


def _task_vector(kitchen: Kitchen) -> Made:
    """The base, and alpha times what the others learned on top of it; the alpha with the best mean on val."""
    base, *tuned = kitchen.weights
    curve = []
    for alpha in kitchen.alphas:
        curve.append(kitchen.judge(task_vector(base, tuned, alpha)))
        kitchen.tell(f"alpha {alpha:g}: mean on {SPLIT} {curve[-1].mean:.4f}")
    # Of equally good ones that which goes the least far.
    best = max(range(len(curve)), key=lambda number: (curve[number].mean, -abs(kitchen.alphas[number])))
    alpha = kitchen.alphas[best]
    rows = [Row(f"alpha {one:g}", score, number == best) for number, (one, score) in
            enumerate(zip(kitchen.alphas, curve, strict=True))]  # fmt: skip
    lines = [f"{kitchen.names[0]} and {alpha:g} times what {', '.join(kitchen.names[1:])} learned on top of it"]
    points = [{"alpha": one, **score.to_dict()} for one, score in zip(kitchen.alphas, curve, strict=True)]
    details = {"base": kitchen.names[0], "alpha": alpha, "curve": points}
    return Made(
        task_vector(base, tuned, alpha), rows, lines, [_itself(kitchen, task_vector(base, [base], 0.3))], details
    )


_COOKS: dict[Method, Callable[[Kitchen], Made]] = {
    "uniform": _uniform,
    "greedy": _greedy,
    "fisher": _fisher,
    "task-vector": _task_vector,
}


def _itself(kitchen: Kitchen, again: Weights) -> Proof:
    what = f"tensors of {kitchen.names[0]} that merging it with itself changes, bit by bit"
    return Proof(what=what, value=float(changed_bits(kitchen.weights[0], again)), most=0.0)


def _gain(result: Score, scores: Sequence[Score], *, asked: bool) -> Proof:
    best = max(score.mean for score in scores)
    what = f"mean on {SPLIT}: the result less the best run"
    return Proof(what=what, value=result.mean - best, least=0.0 if asked else None)


def _told(base: Base, rows: Sequence[Row]) -> list[Proof]:
    """The scores of each task on val."""
    metrics = {task.name: task.metric for task in base.run.catalogue.tasks}
    return [
        Proof(what=f"{SPLIT} {metrics[task]} of {task}: {row.what}", value=math.nan if value is None else value)
        for row in rows
        for task, value in row.score.tasks.items()
    ]


def _scored(base: Base, rows: Sequence[Row]) -> dict[str, Any]:
    metrics = {task.name: task.metric for task in base.run.catalogue.tasks}
    return {"split": SPLIT, "metrics": metrics, "scores": [row.to_dict() for row in rows]}


def _config(base: Base, output: Path) -> Config:
    """Of the run that is made. train.init: it has its weights."""
    config = base.run.config
    return replace(config, train=replace(config.train, output=str(output), init=None))


def _loaded(base: Base, config: Config) -> LoadedConfig:
    return LoadedConfig(config=config, path=base.run.folder / CONFIG, source={}, origins={})


def _history(bases: Sequence[Base]) -> list[dict[str, Any]]:
    """The receipts of all runs, each once."""
    found: list[dict[str, Any]] = []
    for base in bases:
        found += [one for one in lineage(base.run.folder) if one not in found]
    return found


def _merge_experts(base: Base, number: int, output: Path, samples: int, tell: Tell) -> Receipt:
    run, model = base.run, cast(Model, base.run.model)
    config, pools = plan_fewer(run.config, model, number)
    config = _config(replace(base, run=replace(run, config=config)), output)
    fewer = fresh_model(config, run.catalogue, run.specs)
    judge = Judge(model, run)
    before = judge(base.weights)
    batches = training_batches(run, samples, size=min(32, samples))
    tell(f"comparing experts on {sum(batch.num_samples for batch in batches)} training samples")
    clusters = find_clusters(model, pools, look(model, batches))
    moved = _moved(judge, base, clusters, batches)
    fewer.load_state_dict(merged_weights(base.weights, pools, clusters))
    after = Judge(fewer, run, reference=judge.reference)(fewer.state_dict())
    rows = [Row(str(run.folder), before), Row("result", after)]
    proofs = [
        *_told(base, rows),
        Proof(what="largest change of an expert's outputs by exchanging hidden units alone, relative",
              value=max(cluster.error for cluster in clusters), most=KEPT),
        Proof(what="the same of the whole model's outputs", value=moved),
    ]  # fmt: skip
    clustered = [cluster.to_dict() for cluster in clusters]
    details = {**_scored(base, rows), "experts": number, "clusters": clustered}
    receipt = Receipt(
        operation="merge experts", sources=[base.as_source()], target=str(output), changed=_told_pools(pools, clusters),
        proofs=proofs, before=size_of(model), after=size_of(fewer), optimizer=_NO_OPTIMIZER, details=details,
        history=lineage(run.folder),
    )  # fmt: skip
    write_grown(_loaded(base, config), run.catalogue, run.specs, fewer, receipt)
    return receipt


def _moved(judge: Judge, base: Base, clusters: Sequence[Cluster], batches: Sequence[Any]) -> float:
    """The largest relative change of a task's outputs when hidden units are exchanged and nothing is merged."""
    model = judge.model.eval()
    changes = []
    with torch.no_grad():
        before = [model(batch).outputs for batch in batches]
        model.load_state_dict(permuted_weights(base.weights, clusters))
        for batch, outputs in zip(batches, before, strict=True):
            changes += [relative_change(outputs[name], own) for name, own in model(batch).outputs.items()]
        model.load_state_dict(base.weights)
    return max(changes)


def _told_pools(pools: Sequence[Pool], clusters: Sequence[Cluster]) -> list[str]:
    lines = []
    for pool in (pool for pool in pools if pool.merges):
        lines.append(f"{len(pool.old)} experts became {len(pool.new)}: {', '.join(e.id for e in pool.old)}")
    for one in clusters:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(one.members, one.shares, strict=True))
        alike = f", outputs alike by {one.likeness:.2f} at least" if len(one.members) > 1 else ""
        lines.append(f"layer {one.layer}: {one.new} is {shares}{alike}")
    renamed = [
        (old.id, new.id) for pool in pools if not pool.merges for old, new in zip(pool.old, pool.new, strict=True)
    ]
    lines += [f"renamed: {old} is {new} now" for old, new in renamed if old != new]
    return lines
