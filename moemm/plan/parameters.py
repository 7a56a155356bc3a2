"""Every parameter of a model by name and size, from the configuration alone. Names are those of torch's parameters.

D width, F hidden units, E experts, R rank; tests/unit/plan compares name by name with the models of all recipes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from moemm.config.check_objectives import is_on, label_free
from moemm.config.experts import Expert, active_experts, experts_of_groups
from moemm.config.schema import Config, ModelConfig
from moemm.plan import kinds
from moemm.plan.shape import DataShape, TaskShape

Sizes = dict[str, int]
PLACE = 2 * (8 + 2 * 4 + 8) + 1
"""Waves of position and time, see models/position.py."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one block. dense: width of its FFN in a dense model, else None."""

    experts: tuple[Expert, ...]
    dense: int | None = None

    def role(self, *roles: str) -> tuple[Expert, ...]:
        """The experts that tokens come to in these ways, in order."""
        return tuple(expert for role in roles for expert in self.experts if expert.role == role)

    @property
    def dispatched(self) -> tuple[Expert, ...]:
        """Experts that have rows of their own: modality and routed ones, without those that compute nothing."""
        return tuple(expert for expert in self.role("hard", "routed") if expert.kind != "zero")

    def hidden(self, expert: Expert) -> int:
        """Hidden units of an expert; of a lora expert those of its base."""
        return next((one.width for one in self.experts if one.id == expert.base), 0) if expert.base else expert.width


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model: its configuration, data and layers. tasks: skills, where some expert names tasks."""

    config: Config
    data: DataShape
    layers: tuple[Layer, ...]
    tasks: tuple[str, ...]

    @property
    def model(self) -> ModelConfig:
        """The section."""
        return self.config.model

    @property
    def rows(self) -> list[tuple[str, str | None]]:
        """Rows of the expert map: modality, or modality in a task."""
        return [(name, task) for name in self.data.names for task in (self.tasks or (None,))]

    @property
    def groups(self) -> dict[str, str]:
        """Modality -> the group with which it shares what `untie` and `latents` give to each."""
        owner = {name: "_".join(group) for group in self.model.share for name in group}
        return {name: owner.get(name, name) for name in self.data.names}


def build_shape(config: Config, data: DataShape) -> ModelShape:
    """The model that a configuration describes for these data."""
    model = config.model
    made = experts_of_groups(model.experts.groups, data.names, model.layers)
    experts = [expert for group in made for expert in group]
    tasks = tuple(task.name for task in data.tasks) if any(expert.tasks is not None for expert in experts) else ()
    layers = [
        Layer(tuple(e for e in experts if e.layers is None or number in e.layers)) for number in range(model.layers)
    ]
    shape = ModelShape(config, data, tuple(layers), tasks)
    if model.moe == "sparse":
        return shape
    width = _active_width(shape)
    return ModelShape(config, data, tuple(Layer((), width) for _ in layers), tasks)


def parameters(shape: ModelShape, *, training: bool = True) -> Sizes:
    """Name -> size. training: with what only training needs: heads of objectives without labels, learned weights."""
    sizes: Sizes = {}
    for prefix, part in _parts(shape, training):
        sizes |= {f"{prefix}{name}": size for name, size in part.items()}
    return sizes


def trained(shape: ModelShape, sizes: Mapping[str, int]) -> Sizes:
    """Those that training moves: without the bases of lora experts, and what `train.only` leaves out."""
    only = shape.config.train.only
    frozen = {
        f"trunk.blocks.{number}.ffn.{'shared' if _is_shared(layer, expert.base) else 'experts'}.{expert.base}."
        for number, layer in enumerate(shape.layers)
        for expert in layer.experts
        if expert.base
    }
    return {
        name: size
        for name, size in sizes.items()
        if (only is None or any(fnmatchcase(name, pattern) for pattern in only))
        and not any(name.startswith(prefix) for prefix in frozen)
    }


def expert_parameters(shape: ModelShape, sizes: Mapping[str, int]) -> Sizes:
    """Those of dispatched experts, which expert parallelism deals out."""
    return {name: size for name, size in sizes.items() if ".ffn.experts." in name}


def active(shape: ModelShape, sizes: Mapping[str, int]) -> int:
    """Parameters that one token, of the modality that meets most, passes through at most, with the largest head."""
    return max(active_of(shape, sizes, *row) for row in shape.rows)


def active_of(shape: ModelShape, sizes: Mapping[str, int], modality: str, task: str | None) -> int:
    """The same of tokens of a row."""
    group = shape.groups[modality]
    own: list[tuple[str, str | None]] = [
        ("tokenizers.", modality), ("modality_D.", modality), ("heads.linear.", None), ("members.", group),
        ("own_norms.", modality), ("pretext.", ""), ("scale.", ""), ("missing.", ""),
        *((f"latents.{part}.", group) for part in ("start", "norm", "attention")),
    ]  # fmt: skip
    met = sum(size for name, size in sizes.items() if not any(_after(name, prefix) for prefix, _ in own))
    for prefix, wanted in own:
        sums = _sums(sizes, prefix)
        met += max(sums.values(), default=0) if wanted is None else sums.get(wanted, 0)
    return met - sum(_idle(shape, sizes, number, (modality, task)) for number in range(len(shape.layers)))


def _idle(shape: ModelShape, sizes: Mapping[str, int], number: int, row: tuple[str, str | None]) -> int:
    """Parameters of a layer's experts, and of routers of other modalities, that a token of `row` does not meet."""
    if shape.layers[number].dense is not None:
        return 0
    prefix = f"trunk.blocks.{number}.ffn."
    here = {name[len(prefix) :]: size for name, size in sizes.items() if name.startswith(prefix)}
    experts = {**_sums(here, "shared."), **_sums(here, "experts.")}
    serving = [expert for expert in shape.layers[number].experts if expert.serves(*row)]
    routed = sorted((experts.get(e.id, 0) for e in serving if e.role == "routed"), reverse=True)
    used = sum(experts.get(e.id, 0) for e in serving if e.role != "routed")
    used += sum(routed[: active_experts(shape.model.router)])
    scopes = _sums(here, "router.rows.")
    return sum(experts.values()) - used + sum(size for name, size in scopes.items() if name not in ("all", row[0]))


def _parts(shape: ModelShape, training: bool) -> Iterator[tuple[str, Sizes]]:
    model, dim = shape.model, shape.model.dim
    for signal in shape.data.signals:
        yield f"tokenizers.{signal.name}.", kinds.weights(signal, dim)
    yield "modality_D.", dict.fromkeys(shape.data.names, dim)
    yield "position.project.", {"weight": PLACE * dim, "bias": dim}
    if model.latents:
        for group in dict.fromkeys(shape.groups.values()):
            yield "latents.start.", {group: model.latents * dim}
            yield f"latents.norm.{group}.", {"weight": dim}
            yield f"latents.attention.{group}.", _attention(model, None)
    for number, layer in enumerate(shape.layers):
        prefix = f"trunk.blocks.{number}."
        for name in ("attention_norm.", "ffn_norm."):
            yield prefix + name, _norm(shape)
        yield f"{prefix}attention.", _attention(model, shape if "qkv" in model.untie else None)
        yield f"{prefix}ffn.", _ffn(shape, layer)
    yield "trunk.norm.", _norm(shape)
    yield "heads.pool.", {"key.weight": dim * dim, "value.weight": dim * dim}
    yield "heads.pool.query.", {task.name: dim for task in shape.data.tasks}
    for task in shape.data.tasks:
        yield f"heads.linear.{task.name}.", {"weight": 2 * dim * task.outputs, "bias": task.outputs}
    yield "missing.", _missing(shape)
    if training:
        yield "pretext.", _pretext(shape)
        yield "scale.", _scale(shape)


def _norm(shape: ModelShape) -> Sizes:
    model = shape.model
    own = [name for extension in model.extensions if extension.norms for name in extension.modalities]
    if own:
        return {"weight": model.dim, **{f"own_norms.{name}.weight": model.dim for name in own}}
    if "norms" in model.untie:
        return {f"members.{group}.weight": model.dim for group in shape.groups.values()}
    return {"weight": model.dim}


def _attention(model: ModelConfig, untied: ModelShape | None) -> Sizes:
    dim, head = model.dim, model.dim // model.heads
    names = ["qkv."] if untied is None else [f"qkv.members.{group}." for group in dict.fromkeys(untied.groups.values())]
    projections = {f"{name}weight": 3 * dim * dim for name in names}
    return {**projections, "out.weight": dim * dim, "query_norm.weight": head, "key_norm.weight": head}


def network(dim: int, width: int, activation: str) -> Sizes:
    """Weights of a feed-forward network."""
    return {"w1_FD": dim * width * (2 if activation == "swiglu" else 1), "w2_DF": dim * width}


def _ffn(shape: ModelShape, layer: Layer) -> Sizes:
    dim, activation = shape.model.dim, shape.model.activation
    if layer.dense is not None:
        return network(dim, layer.dense, activation)
    sizes: Sizes = {}
    for expert in layer.role("shared"):
        sizes |= _named(f"shared.{expert.id}.", network(dim, expert.width, activation))
    for expert in layer.dispatched:
        own = _low_rank(shape, layer, expert) if expert.base else network(dim, expert.width, activation)
        sizes |= _named(f"experts.{expert.id}.", own)
    return sizes | _router(shape, layer)


def _low_rank(shape: ModelShape, layer: Layer, expert: Expert) -> Sizes:
    dim, rank, width = shape.model.dim, expert.rank, layer.hidden(expert)
    hidden = 2 * width if shape.model.activation == "swiglu" else width
    return {"down1_RD": rank * dim, "up1_FR": hidden * rank, "down2_RF": rank * width, "up2_DR": dim * rank}


def _router(shape: ModelShape, layer: Layer) -> Sizes:
    config, dim, routed = shape.model.router, shape.model.dim, layer.role("routed")
    if not routed or config.kind == "hard":
        return {}
    came = {name: place for place, one in enumerate(shape.model.extensions, 1) for name in one.modalities}
    scopes = list(shape.data.names) if config.scope == "modality" else ["all"]
    sizes = {
        f"router.rows.{scope}.{expert.id}": dim
        for scope in scopes
        for expert in routed
        if scope == "all" or not max(came.get(scope, 0), expert.added) or expert.serves(scope)
    }
    if config.kind == "noisy":
        sizes |= {f"router.noise.{expert.id}": dim for expert in routed}
    return sizes


def _missing(shape: ModelShape) -> Sizes:
    config, dim, names = shape.model.missing, shape.model.dim, shape.data.names
    if config.kind == "none":
        return {}
    if config.kind == "bank":
        tasks = shape.data.tasks
        return {f"rows.{m}.{o}": dim for m in names for o in names if o != m and _together(tasks, m, o)}
    width = config.width or dim
    sizes = {"mark_D": dim}
    for name in names:
        sizes |= _named(f"encode.{name}.", _linear(0, dim, width))
        sizes |= _named(f"decode.{name}.", _linear(0, width, width) | _linear(2, width, dim))
    return sizes


def _pretext(shape: ModelShape) -> Sizes:
    objectives, dim, names = shape.config.objectives, shape.model.dim, shape.data.names
    on = set(label_free(objectives))
    targets = {signal.name: kinds.target(signal) for signal in shape.data.signals}
    sizes: Sizes = {}
    if on & {"masked", "similarity"}:
        groups = {name: 1 if target is None else target.groups for name, target in targets.items()}
        sizes |= {f"mask.embedding.{name}.weight": groups[name] * dim for name in names}
    if "masked" in on:
        for name in objectives.masked.modalities or [name for name, target in targets.items() if target]:
            target = targets[name] or kinds.Target()
            sizes |= _named(f"objectives.masked.decoders.{name}.", _two_layers(dim, target.values + target.classes))
    if "contrastive" in on:
        for name in names:
            sizes |= _named(f"objectives.contrastive.project.{name}.", {"weight": dim * dim, "bias": dim})
        sizes["objectives.contrastive.pair_loss.scale"] = 1
        if objectives.contrastive.loss == "siglip":
            sizes["objectives.contrastive.pair_loss.bias"] = 1
    if "similarity" in on:
        for part in ("project", "predict"):
            sizes |= _named(f"objectives.similarity.{part}.", _two_layers(dim, dim))
    if "replaced" in on:
        sizes |= _named("objectives.replaced.detect.", _two_layers(dim, 1))
    return sizes


def _scale(shape: ModelShape) -> Sizes:
    if shape.config.harmonize.scale != "uncertainty":
        return {}
    tasks = len(shape.data.tasks) if is_on(shape.config.objectives.supervised) else 0
    return {"log_variance_L": tasks + len(label_free(shape.config.objectives))}


def _active_width(shape: ModelShape) -> int:
    """Hidden units that one token passes through at most, the mean over layers: see models/trunk.py."""
    top_k = active_experts(shape.model.router)
    widest = []
    for layer in shape.layers:
        served = [[expert for expert in layer.experts if expert.serves(*row)] for row in shape.rows]
        widest.append(
            max(
                sum(e.width for e in row if e.role != "routed")
                + sum(sorted((e.width for e in row if e.role == "routed"), reverse=True)[:top_k])
                for row in served
            )
        )
    return max(1, round(sum(widest) / len(widest)))


def _is_shared(layer: Layer, name: str | None) -> bool:
    return any(expert.id == name for expert in layer.role("shared"))


def _together(tasks: Sequence[TaskShape], first: str, second: str) -> bool:
    return any(first in task.modalities and second in task.modalities for task in tasks)


def _named(prefix: str, sizes: Sizes) -> Sizes:
    return {f"{prefix}{name}": size for name, size in sizes.items()}


def _linear(place: int, rows: int, columns: int) -> Sizes:
    return {f"{place}.weight": rows * columns, f"{place}.bias": columns}


def _two_layers(dim: int, out: int) -> Sizes:
    return _linear(0, dim, dim) | _linear(2, dim, out)


def _after(name: str, prefix: str) -> str | None:
    """The part of a parameter's name that follows `prefix`; None where it does not stand in the name."""
    _, found, rest = f".{name}".partition(f".{prefix}")
    return rest.split(".")[0] if found else None


def _sums(sizes: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Sizes of the names that have `prefix`, by what follows it."""
    sums: dict[str, int] = {}
    for name, size in sizes.items():
        key = _after(name, prefix)
        if key is not None:
            sums[key] = sums.get(key, 0) + size
    return sums
