"""Rules across keys: each finds one kind of contradiction and says how to get out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations

from moemm.config.check_experts import EXPERT_RULES
from moemm.config.check_harmonize import HARMONIZE_RULES
from moemm.config.check_objectives import OBJECTIVE_RULES
from moemm.config.check_spread import SPREAD_RULES
from moemm.config.deepspeed import check_extra
from moemm.config.entry import entry_names
from moemm.config.joint import check_joint, samples_of
from moemm.config.names import modality_names, unknown_modalities
from moemm.config.problem import Problem
from moemm.config.schema import Config, ModalityConfig, TaskConfig
from moemm.config.suggest import did_you_mean, nearest

_GRID = {"patch", "normalize", "dropout"}
_SIGNAL = _GRID | {"noise"}
KIND_OPTIONS: dict[str, set[str]] = {
    "image": _GRID,
    "video": _GRID,
    "audio": _SIGNAL | {"num_mels", "window_ms", "hop_ms"},
    "audio_mfcc": _SIGNAL,
    "audio_logmel": _SIGNAL,
    "timeseries": _SIGNAL,
    "sensor": _SIGNAL,
    "trajectory": _SIGNAL,
    "tabular": {"dropout"},
    "text": {"vocabulary", "vocab_size", "max_tokens", "dropout"},
    "features": _SIGNAL,
}
"""Kind that ships with moemm -> options that it takes, besides `kind`."""

PATCH_SIZES = {kind: 1 for kind, options in KIND_OPTIONS.items() if "patch" in options} | {"image": 2, "video": 3}
"""Kind -> numbers in its `patch`."""

Rule = Callable[[Config], Iterator[Problem]]


def check(config: Config) -> list[Problem]:
    """Every contradiction in a configuration whose single values are all right."""
    return [problem for rule in RULES for problem in rule(config)]


def known_kinds() -> set[str]:
    """Kinds that ship with moemm, and those that installed packages add (entry point `moemm.modalities`)."""
    return set(KIND_OPTIONS) | entry_names("modality")


def _width(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.dim % model.heads:
        divisors = [str(heads) for heads in range(1, min(model.dim, 33)) if model.dim % heads == 0]
        message = f"does not divide model.dim, which is {model.dim}"
        yield Problem(path=("model", "heads"), message=message, given=model.heads, allowed=", ".join(divisors))


def _duration(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.steps is not None and train.epochs is not None:
        message = f"given together with train.epochs, which is {train.epochs:g}; give one of the two"
        yield Problem(path=("train", "steps"), message=message, given=train.steps)
    if train.steps is None and train.epochs is None:
        yield Problem(path=("train", "epochs"), message="is missing, and train.steps too; give one of the two")


def _batch(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.batch_size % train.accumulation:
        message = f"is not divisible by train.accumulation, which is {train.accumulation}"
        allowed = f"a multiple of {train.accumulation} (and of accumulation x ranks at the launch)"
        yield Problem(path=("train", "batch_size"), message=message, given=train.batch_size, allowed=allowed)


def _precision(config: Config) -> Iterator[Problem]:
    if config.train.precision == "bf16" and config.deepspeed.zero_stage == 0:
        message = "needs deepspeed.zero_stage >= 1: with 0, DeepSpeed takes a wrong first step"
        yield Problem(path=("train", "precision"), message=message, given="bf16", allowed="fp32, or a stage of 1 to 3")


def _observe(config: Config) -> Iterator[Problem]:
    path = config.observe.prometheus
    if path is not None and not path.endswith(".prom"):
        message = "has a name that node_exporter passes over; it reads files that end in .prom"
        yield Problem(path=("observe", "prometheus"), message=message, given=path, allowed="moemm.prom, for example")


def _missing(config: Config) -> Iterator[Problem]:
    data, missing = config.data, config.model.missing
    if data.modality_dropout_over is not None and data.modality_dropout_start is None:
        message = "has no meaning without data.modality_dropout_start"
        yield Problem(path=("data", "modality_dropout_over"), message=message, given=data.modality_dropout_over)
    for option in ("weight", "width"):
        value = getattr(missing, option)
        if value is not None and missing.kind != "predict":
            message = f"is no option of `model.missing.kind: {missing.kind}`"
            yield Problem(path=("model", "missing", option), message=message, given=value, allowed="kind predict")


def _task_names(config: Config) -> Iterator[Problem]:
    tasks = config.data.tasks
    for (_, first), (index, second) in combinations(enumerate(tasks), 2):
        if first.name == second.name:
            message = "is the name of two tasks; name them apart"
            yield Problem(path=("data", "tasks", index, "name"), message=message, given=second.name)
        elif _content(first) == _content(second):
            message = f"is the same file, label and modalities as task {first.name}; raise its `weight` instead"
            yield Problem(path=("data", "tasks", index), message=message, given=second.name)
    for index, task in enumerate(tasks):
        if "/" in task.name or "." in task.name:
            message = "names a head and a tag, so that it must hold no / and no dot"
            yield Problem(path=("data", "tasks", index, "name"), message=message, given=task.name)


def _learning(config: Config) -> Iterator[Problem]:
    if not any(task.learn for task in config.data.tasks):
        message = "is false for each task; there is nothing to learn from"
        yield Problem(path=("data", "tasks", 0, "learn"), message=message, given=False, allowed="one true")


def _renames(config: Config) -> Iterator[Problem]:
    for index, task in enumerate(config.data.tasks):
        path = ("data", "tasks", index)
        for name, count in Counter(task.rename.values()).items():
            if count > 1:
                message = f"gives {count} modalities of one file the name {name}"
                yield Problem(path=(*path, "rename"), message=message, given=task.rename)
        for name, count in Counter(task.modalities or []).items():
            if count > 1:
                yield Problem(path=(*path, "modalities"), message=f"names {name} {count} times", given=task.modalities)
            if name in task.rename and name not in task.rename.values():
                message = f"names {name}, which `rename` turns into {task.rename[name]}"
                allowed = "names after renaming"
                yield Problem(path=(*path, "modalities"), message=message, given=task.modalities, allowed=allowed)
        for old, new in task.rename.items():
            if task.modalities is not None and new not in task.modalities:
                message = f"renames {old} to {new}, which `modalities` leaves out"
                yield Problem(path=(*path, "rename"), message=message, given=task.rename)


def _modality_sections(config: Config) -> Iterator[Problem]:
    for name in sorted(unknown_modalities(config, set(config.modalities))):
        message = f"is a modality that no task has{did_you_mean(name, modality_names(config))}"
        yield Problem(path=("modalities", name), message=message, allowed=", ".join(sorted(modality_names(config))))
    for name, modality in config.modalities.items():
        yield from _modality(name, modality, own=bool(config.plugins))


def _modality(name: str, modality: ModalityConfig, *, own: bool) -> Iterator[Problem]:
    path = ("modalities", name)
    kind = modality.kind
    if kind is not None and not own and kind not in known_kinds() and nearest(kind, known_kinds()):
        message = f"no such kind{did_you_mean(kind, known_kinds())}"
        yield Problem(path=(*path, "kind"), message=message, given=kind, allowed=", ".join(sorted(known_kinds())))
    if kind in KIND_OPTIONS:
        yield from _kind_options(name, kind, modality)
    if modality.vocabulary == "bytes" and modality.vocab_size is not None:
        message = "has no meaning with `vocabulary: bytes`, which has 256 entries"
        yield Problem(path=(*path, "vocab_size"), message=message, given=modality.vocab_size)
    if modality.window_ms is not None and modality.hop_ms is not None and modality.hop_ms > modality.window_ms:
        message = f"is longer than the window of {modality.window_ms:g} ms, so that samples are skipped"
        yield Problem(path=(*path, "hop_ms"), message=message, given=modality.hop_ms)


def _kind_options(name: str, kind: str, modality: ModalityConfig) -> Iterator[Problem]:
    path = ("modalities", name)
    for option, value in vars(modality).items():
        if option != "kind" and value not in (None, {}) and option not in KIND_OPTIONS[kind]:
            allowed = ", ".join(sorted(KIND_OPTIONS[kind]))
            yield Problem(path=(*path, option), message=f"is no option of kind {kind}", given=value, allowed=allowed)
    size = PATCH_SIZES.get(kind)
    if modality.patch is not None and size is not None and len(modality.patch) != size:
        message = f"has {len(modality.patch)} numbers; kind {kind} takes {size}"
        yield Problem(path=(*path, "patch"), message=message, given=modality.patch)


def _content(task: TaskConfig) -> tuple[object, ...]:
    return task.label, samples_of(task)


RULES: tuple[Rule, ...] = (
    _task_names,
    _learning,
    _renames,
    check_joint,
    _modality_sections,
    _width,
    *EXPERT_RULES,
    _missing,
    *OBJECTIVE_RULES,
    *HARMONIZE_RULES,
    _duration,
    _batch,
    _observe,
    _precision,
    check_extra,
    *SPREAD_RULES,
)
