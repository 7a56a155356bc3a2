"""Upcycling: from a dense model to a sparse one that computes the same, or begins near it; from E experts to m E."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from moemm.config import Config, LoadedConfig, from_dict, load_config, to_dict
from moemm.config.overrides import plugin_overrides
from moemm.config.schema import ExpertGroupConfig, RouterConfig
from moemm.data.catalogue import Catalogue
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.growth.deal import ALL, Dealt, Gates, Routes, divisors, routes_of
from moemm.growth.dense import (
    DenseLayer,
    deal_layers,
    dense_layers,
    dropped,
    network_rules,
    noisy,
    other_rules,
    tie_router_rows,
    told,
)
from moemm.growth.grown import Base, Specs, Training, check_target, fresh_model, read_base, size_of, write_grown
from moemm.growth.moments import carry
from moemm.growth.probe import (
    EXACT,
    GRADIENT,
    lifted,
    relative_error,
    router_gradient,
    seen,
)
from moemm.growth.receipt import Proof, Receipt, lineage
from moemm.growth.rules import Rule, apply_rules
from moemm.growth.samples import mixture_batches
from moemm.models import Model
from moemm.plugins import load_plugins

Method = Literal["copy", "noise", "modality", "virtual", "drop", "branch", "multiplet", "expand"]
PRESERVING = ("copy", "modality", "virtual")
"""Methods after which the model computes what it did, as far as its router lets it."""
FRESH = "not kept: training begins at step 0 with a fresh one"
_SHAPING = ("dim", "heads", "layers", "activation", "latents", "ordered", "missing", "extensions")
"""Keys of `model` that a recipe may not change: the weights would mean something else, or some would be missing."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How to upcycle; see docs/growth.md. What is None has a value of its own for each method.

    recipe: configuration whose `model` and `train` sections the new run gets. experts: copies of the dense network;
    top_k: of them a token uses; granularity: shards that each is cut into. noise, drop: shares, see the methods.
    clusters, steps: of each stage of multiplet. factor: m of expand; duplicates: whether each expert gets m copies, or
    as many as its gradient asks for. optimizer: keep its states and the step, so that training goes on, or begin
    afresh. samples: of the probe batch. seed: of what is drawn for the copies. plugins: Python files to run beside the
    copies of the runs, and in place of `plugins` of the recipe.
    """

    method: Method = "copy"
    recipe: Path | None = None
    rules: Path | None = None
    output: Path | None = None
    experts: int | None = None
    top_k: int | None = None
    granularity: int | None = None
    noise: float | None = None
    drop: float | None = None
    clusters: int | None = None
    steps: int | None = None
    factor: int | None = None
    duplicates: Literal["even", "gradient"] | None = None
    optimizer: Literal["keep", "fresh"] = "fresh"
    samples: int = 64
    seed: int = 0
    plugins: tuple[Path, ...] = ()


_OPTIONS: dict[str, tuple[str, ...]] = {
    "experts": ("copy", "noise", "virtual", "drop", "multiplet"),
    "top_k": ("copy", "noise", "virtual", "drop", "branch", "multiplet"),
    "clusters": ("multiplet",),
    "steps": ("multiplet",),
    "granularity": ("copy", "noise", "modality", "virtual", "drop"),
    "noise": ("noise",),
    "drop": ("drop",),
    "factor": ("expand",),
    "duplicates": ("expand",),
    "recipe": ("copy", "noise", "modality", "virtual", "drop"),
    "rules": ("copy", "noise", "modality", "virtual", "drop"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A dense or sparse model that is to grow, and where its run's files lie.

    path: of its configuration; a relative `data.root` starts there. training: reads where its training stood; None
    where nothing is left of that. notes: what was done to make it, for the receipt.
    """

    config: Config
    catalogue: Catalogue
    specs: Specs
    model: Model
    weights: dict[str, torch.Tensor]
    path: Path
    sources: list[dict[str, object]]
    history: list[dict[str, Any]] = field(default_factory=list)
    training: Callable[[], Training | None] = lambda: None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_run(cls, base: Base) -> Start:
        """The newest checkpoint of a run."""
        run = base.run

        def training() -> Training | None:
            moments = base.moments()
            return None if moments is None else Training(run.step, moments)

        return cls(
            config=run.config, catalogue=run.catalogue, specs=run.specs, model=cast(Model, run.model),
            weights=base.weights, path=run.folder / "config.yaml", sources=[base.as_source()],
            history=lineage(run.folder), training=training,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """As errors name it."""
        return str(self.sources[0]["folder"])


@dataclass(slots=True, kw_only=True)
class Made:
    """A model that has grown, before it is written.

    exact: whether it has to compute what its source does. gains_limits: whether its routers may drop tokens or send
    them to zero experts, and its source had none: then it has to without that. rules: by which the weights were made,
    without what makes copies differ on purpose; none where the optimizer's states cannot follow.
    """

    config: Config
    model: Model
    changed: list[str]
    exact: bool
    gains_limits: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    proofs: list[Proof] = field(default_factory=list)
    rules: Sequence[Rule] = ()


def upcycle(
    sources: Path | str | Sequence[Path | str],
    wanted: Wanted | None = None,
    *,
    tell: Tell = lambda line: None,
    **options: Any,
) -> Receipt:
    """Make a run of sparse experts from a dense run (or a sparse one, or a foreign file) and write it with a receipt.

    sources: run folders; several for `branch`; with `rules` a safetensors file or a folder of them. options: fields of
    `wanted`, given one by one. tell: gets a line for each stage. Returns the receipt that stands in the new folder.
    Raises ConfigError: options that do not fit, widths that cannot hold the dense network, an output that holds a run.
    CheckpointError: no complete checkpoint, files that could run code, names that no rule covers. DataError: no data
    to measure on.
    """
    paths = [Path(one) for one in ([sources] if isinstance(sources, str | Path) else sources)]
    wanted = _with_paths(replace(wanted or Wanted(), **options))
    check_options(paths, wanted)
    output = wanted.output or Path(f"{str(paths[0]).rstrip('/')}-{wanted.method}")
    check_target(output)
    start, make = _prepare(paths, wanted, tell)
    training = _kept(start, wanted)
    batches = mixture_batches(start.config, start.catalogue, start.specs, wanted.samples, size=wanted.samples)
    made = make(output, batches)
    made.proofs += proofs_of(start.model, made, batches)
    kept = FRESH
    if training is not None:
        carried = carry(training.moments, made.rules, start.model, made.model, batches)
        training, kept = replace(training, moments=carried.moments), carried.told
        made.changed.append(f"training goes on at step {training.step} of the schedule")
    receipt = Receipt(
        operation=f"upcycle {wanted.method}", sources=start.sources, target=str(output),
        changed=[*start.notes, *made.changed], proofs=made.proofs, before=size_of(start.model),
        after=size_of(made.model), optimizer=kept, history=start.history,
        details={**made.details, "options": _told_options(wanted), "samples": wanted.samples},
    )  # fmt: skip
    loaded = LoadedConfig(config=made.config, path=start.path, source={}, origins={})
    tell(f"writing {output}")
    write_grown(loaded, start.catalogue, start.specs, made.model, receipt, training=training)
    return receipt


def _kept(start: Start, wanted: Wanted) -> Training | None:
    """Where training goes on; None where it begins afresh. Raises ConfigError where nothing is left to keep."""
    if wanted.optimizer == "fresh":
        return None
    training = start.training()
    if training is None:
        raise ConfigError(
            f"--optimizer keep: {start.name} holds weights and no state of an optimizer\n"
            "  allowed: a run that was trained with moemm\n"
            "  to do: leave the option out; training then begins with a fresh optimizer"
        )
    return training


def _with_paths(wanted: Wanted) -> Wanted:
    recipe, rules, output = (
        None if value is None else Path(value) for value in (wanted.recipe, wanted.rules, wanted.output)
    )
    return replace(wanted, recipe=recipe, rules=rules, output=output, plugins=tuple(map(Path, wanted.plugins)))


def _recipe(path: Path, plugins: Sequence[Path]) -> LoadedConfig:
    """The recipe, its plugins (or those given in their place) run."""
    loaded = load_config(path, plugin_overrides(plugins))
    load_plugins(loaded)  # a router of the user's own, say
    return loaded


Make = Callable[[Path, list[PackedBatch]], Made]


def _prepare(paths: Sequence[Path], wanted: Wanted, tell: Tell) -> tuple[Start, Make]:
    """What is to grow, and the function that makes it grow."""
    from moemm.growth.foreign import looks_foreign, read_foreign, refuse_code

    tell(f"reading {', '.join(map(str, paths))}")
    for path in paths:
        refuse_code(path)
        if wanted.rules is None and looks_foreign(path):
            raise ConfigError(
                f"{path} is no run of moemm; to take in foreign weights give --rules RULES.yaml and --recipe CONFIG "
                "(docs/growth.md, configs/rules/)"
            )
    if wanted.method == "branch":
        from moemm.growth.branch import branch, join_runs

        bases = [read_base(path, plugins=wanted.plugins) for path in paths]
        start = join_runs(bases)
        return start, lambda output, batches: branch(bases, start, wanted, output, batches)
    if wanted.method == "multiplet":
        from moemm.growth.multiplet import multiplet

        base = read_base(paths[0], plugins=wanted.plugins)
        start = Start.of_run(base)
        return start, lambda output, batches: multiplet(base, start, wanted, output, batches, tell)
    if wanted.rules is not None:
        assert wanted.recipe is not None
        start = read_foreign(paths[0], wanted.rules, _recipe(wanted.recipe, wanted.plugins))
    else:
        start = Start.of_run(read_base(paths[0], plugins=wanted.plugins))
    if wanted.method == "expand":
        from moemm.growth.expand import expand

        return start, lambda output, batches: expand(start, wanted, output, batches)
    return start, lambda output, batches: from_dense(start, wanted, output)


def check_options(paths: Sequence[Path], wanted: Wanted) -> None:
    """Refuse options that the method does not have, and values out of range. Raises ConfigError."""
    if not paths:
        raise ConfigError("moemm upcycle: no run was given; usage: moemm upcycle RUN --method copy")
    for name, methods in _OPTIONS.items():
        if getattr(wanted, name) is not None and wanted.method not in methods:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no meaning for --method {wanted.method}; it is for {', '.join(methods)}")
    for name in ("experts", "top_k", "granularity", "factor", "samples", "clusters", "steps"):
        value, least = getattr(wanted, name), 2 if name in ("factor", "clusters") else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name, most in (("noise", 10.0), ("drop", 1.0)):
        share = getattr(wanted, name)
        if share is not None and not 0.0 < share <= most:
            raise ConfigError(f"--{name} {share}: must be more than 0 and at most {most:g}")
    for name in ("experts", "top_k"):
        if wanted.recipe is not None and getattr(wanted, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} and --recipe both say which experts there are; give one")
    if wanted.optimizer == "keep" and wanted.method in ("branch", "multiplet"):
        raise ConfigError(f"--optimizer keep has no meaning for --method {wanted.method}: several runs are its source")
    if wanted.rules is not None and wanted.recipe is None:
        raise ConfigError("--rules reads a foreign model, which has no data; give --recipe CONFIG that names some")
    if (len(paths) > 1) != (wanted.method == "branch"):
        number = "two runs or more" if wanted.method == "branch" else "one run"
        raise ConfigError(f"--method {wanted.method} takes {number}, and {len(paths)} were given")


def target_config(start: Config, wanted: Wanted, output: Path, groups: Sequence[ExpertGroupConfig]) -> Config:
    """The configuration of the new run: that of the old one, with the recipe's `model` and `train`, or with `groups`.

    Raises ConfigError where the recipe's model differs in more than experts, router and what each modality has of its
    own, and where model and data contradict each other.
    """
    if wanted.recipe is not None:
        loaded = _recipe(wanted.recipe, wanted.plugins)
        recipe = loaded.config
        _check_shape(start, recipe, wanted.recipe)
        own = [os.path.abspath(file) for file in loaded.plugin_files]
        plugins = start.plugins + [file for file in own if file not in start.plugins]
        config = replace(start, name=recipe.name, model=recipe.model, train=recipe.train, plugins=plugins)
    else:
        top_k = (wanted.top_k or 1) * (wanted.granularity or 1) if any(g.kind == "routed" for g in groups) else None
        gates: Gates = "raw" if top_k is None else "straight_through"
        router = RouterConfig(top_k=top_k, gates=gates)
        experts = replace(start.model.experts, groups=list(groups))
        model = replace(start.model, moe="sparse", experts=experts, router=router)
        config = replace(start, name=f"{start.name}-{wanted.method}", model=model)
    return settled(replace(config, train=replace(config.train, output=str(output), init=None)))


def settled(config: Config) -> Config:
    """The configuration once more, checked as one from a file is. Raises ConfigError."""
    return from_dict(to_dict(config), origin="the upcycled model")


def _check_shape(start: Config, recipe: Config, path: Path) -> None:
    if recipe.model.moe == "dense":
        raise ConfigError(f"--recipe {path}: model.moe is dense, so that there are no experts to make")
    keys = (*_SHAPING, "share") if recipe.model.latents else _SHAPING
    differ = [(key, getattr(start.model, key), getattr(recipe.model, key)) for key in keys]
    lines = [f"\n  model.{key}: {new} there, {old} in the source" for key, old, new in differ if old != new]
    if lines:
        raise ConfigError(
            f"--recipe {path} describes another trunk than that of the source:{''.join(lines)}\n"
            "  allowed: other experts, another router, other parts untied\n"
            "  to do: give a recipe with the source's values (a copy with `base:` and these keys)"
        )


def own_groups(layers: Sequence[DenseLayer], wanted: Wanted) -> list[ExpertGroupConfig]:
    """The groups of a method without a recipe. Raises ConfigError where layers differ in width."""
    widths = {layer.units for layer in layers}
    if len(widths) > 1:
        raise ConfigError(
            f"the dense networks of the layers have {', '.join(map(str, sorted(widths)))} hidden units; give --recipe "
            "with groups for each layer"
        )
    width = widths.pop()
    if wanted.method == "modality":
        return [ExpertGroupConfig(kind="modality", width=width)]
    shards = wanted.granularity or 1
    if width % shards:
        raise ConfigError(
            f"--granularity {shards} does not divide the {width} hidden units of the dense network; allowed: "
            f"{', '.join(str(n) for n in divisors(width)[:12])}"
        )
    return [ExpertGroupConfig(kind="routed", count=(wanted.experts or 4) * shards, width=width // shards)]


def from_dense(start: Start, wanted: Wanted, output: Path) -> Made:
    """copy, noise, modality, virtual, drop: every expert is made from the one dense network of its layer."""
    if wanted.method == "virtual" and wanted.recipe is None:
        wanted = replace(wanted, granularity=wanted.granularity or 2)
    layers = dense_layers(start.config, start.model.map, start.weights, where=start.name)
    groups = own_groups(layers, wanted) if wanted.recipe is None else []
    config = target_config(start.config, wanted, output, groups)
    model = fresh_model(config, start.catalogue, start.specs)
    routes, dealt = _dealt(model, layers, config, wanted)
    before = config.model.router.gates
    if model.trunk.routed_layers and routes.gates != before:
        router = replace(config.model.router, gates=routes.gates)
        config = settled(replace(config, model=replace(config.model, router=router)))
        model = fresh_model(config, start.catalogue, start.specs)
    alter = _alter(wanted, dealt, model)
    others = list(other_rules(start.weights, model.state_dict()))
    rules = [*network_rules(layers, dealt, model, alter), *others]
    weights, taken = apply_rules(rules, start.weights, model.state_dict())
    tied = tie_router_rows(weights, dealt)
    model.load_state_dict(weights)
    changed = told(layers, dealt, model.map)
    changed += [*_told_router(model, config, routes, before, tied), *taken.lines()]
    details = {"granularity": routes.shards, "gates": config.model.router.gates}
    plain = [*network_rules(layers, dealt, model, None), *others]
    exact = wanted.method in PRESERVING
    return Made(
        config=config, model=model.eval(), changed=changed, exact=exact, gains_limits=True, details=details, rules=plain
    )


def _dealt(model: Model, layers: Sequence[DenseLayer], config: Config, wanted: Wanted) -> tuple[Routes, list[Dealt]]:
    """With --granularity as it says, for `virtual` as many shards as slots; else with as few as hold all units."""
    router = config.model.router
    if not any(expert.role == "routed" for expert in model.map.experts):
        routes = Routes(shards=1, scale=1.0, gates=router.gates)
        return routes, deal_layers(model.map, layers, routes)
    slots = (router.top_k or 1) if router.kind != ALL else 1
    if wanted.method == "virtual" and slots == 1:
        raise ConfigError(
            "--method virtual cuts the dense network into shards, of which a token uses several, but "
            f"model.router.top_k is {slots}; give a recipe with a larger one, or --method copy"
        )
    if wanted.granularity is not None:
        choices = [wanted.granularity]
    else:
        choices = [slots] if wanted.method == "virtual" else divisors(slots)
    for shards in choices:
        try:
            routes = routes_of(router, shards)
            return routes, deal_layers(model.map, layers, routes)
        except ConfigError:
            if shards == choices[-1]:
                raise
    raise AssertionError("there is always a choice")


def _alter(wanted: Wanted, dealt: Sequence[Dealt], model: Model) -> Any:
    """What makes the copies differ; None where they do not. Raises ConfigError where there are no copies."""
    if wanted.method not in ("noise", "drop"):
        return None
    if all(expert.role == "shared" for expert in model.map.experts):
        raise ConfigError(
            f"--method {wanted.method} changes copies of the dense network, but all experts of the recipe are shared"
        )
    if wanted.method == "noise":
        return noisy(0.05 if wanted.noise is None else wanted.noise, wanted.seed)
    return dropped(0.5 if wanted.drop is None else wanted.drop, wanted.seed)


def _told_router(model: Model, config: Config, routes: Routes, before: str, tied: int) -> Iterator[str]:
    router = config.model.router
    if not model.trunk.routed_layers:
        return
    if routes.gates != before:
        yield (
            f"model.router.gates is {routes.gates} in place of {before}: with equal copies the others either change "
            "the output or give the router no gradient"
        )
    if tied:
        yield f"{tied} groups of {routes.shards} routed experts hold one network; the router rows of a group are equal"
    if router.kind == "top_p":
        yield "the router has no gradient at the first step: kept probabilities are renormalised, and copies are equal"


def proofs_of(before: Model, made: Made, batches: Sequence[PackedBatch]) -> list[Proof]:
    """What is measured on every model that has grown."""
    model, old = made.model, seen(before, batches)
    number = sum(batch.num_samples for batch in batches)
    what, most = f"relative error of outputs and stream, {number} samples", EXACT if made.exact else None
    error = relative_error(old, seen(model, batches))
    with lifted(model) as differs:
        if differs and made.gains_limits:
            what = f"{what}, with all that lose their place to a capacity or go to a zero expert"
            without = relative_error(old, seen(model, batches))
            proofs = [Proof(what=what, value=error), Proof(what="the same without those", value=without, most=most)]
        else:
            proofs = [Proof(what=what, value=error, most=most)]
    gradient = router_gradient(model, batches)
    if gradient is not None:
        least = None if model.config.router.kind == "top_p" else GRADIENT
        what = "gradient of the router over that of its experts, in the layer where it is least"
        proofs.append(Proof(what=what, value=gradient, least=least))
    return proofs


def _told_options(wanted: Wanted) -> dict[str, Any]:
    values = {name: getattr(wanted, name) for name in Wanted.__dataclass_fields__}
    values["plugins"] = [str(file) for file in wanted.plugins] or None
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in values.items() if value is not None
    }
