"""Where a plan learns of the data: the files that a configuration names, a run folder, or a description."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemm.config.joint import joint_groups
from moemm.config.schema import Config, ModalityConfig
from moemm.config.suggest import did_you_mean, listed
from moemm.errors import CheckpointError, ConfigError
from moemm.plan import kinds
from moemm.plan.kinds import Signal
from moemm.plan.shape import DataShape, TaskShape

if TYPE_CHECKING:
    from moemm.config import LoadedConfig
    from moemm.data.catalogue import Catalogue, ModalityInfo, TaskInfo

TEMPLATE = """\
modalities:
  image: {kind: image, shape: [3, 224, 224]}
  text: {kind: text, length: 64, vocabulary: 8192}     # length: ids of a text, on average
  accel: {kind: sensor, shape: [3], length: 200}       # shape of one frame, frames of a sample
  record: {kind: tabular, numeric: 12, categories: [4, 7]}
tasks:
  NAME: {outputs: 10, samples: 100000, modalities: [image, text], present: {text: 0.8}}"""
SAMPLED = 512
"""Texts of a file that are cut into tokens to find their mean number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModality:
    """`kind` and what it needs; see TEMPLATE. parameters, tokens: of a kind that a plugin brings."""

    kind: str
    shape: tuple[int, ...] = ()
    length: float | None = None
    rate_hz: float | None = None
    numeric: int = 0
    categories: tuple[int, ...] = ()
    vocabulary: int | None = None
    parameters: int | None = None
    tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedTask:
    """A task: outputs of its head, training samples, modalities, and the share of samples that have each."""

    outputs: int
    samples: int
    modalities: tuple[str, ...]
    present: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A file for `--data`."""

    modalities: dict[str, DescribedModality]
    tasks: dict[str, DescribedTask]


def from_description(config: Config, path: Path) -> DataShape:
    """The data that a YAML file describes. Raises ConfigError for another file, and for tasks that it lacks."""
    import yaml
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        adapter = TypeAdapter(with_config(ConfigDict(extra="forbid"))(Description))
        found = adapter.validate_python(values)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--data {path}: cannot be read: {error}") from error
    except ValidationError as error:
        lines = "".join(f"\n  {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:8])
        raise ConfigError(
            f"--data {path}: is no description of data:{lines}\n  such a file looks like\n{TEMPLATE}"
        ) from error
    return described(config, found, source=str(path))


def described(config: Config, found: Description, *, source: str) -> DataShape:
    """As from_description, from values."""
    names: dict[str, None] = {}
    tasks = []
    groups = _groups(config)
    for entry in config.data.tasks:
        if entry.name not in found.tasks:
            have = list(found.tasks)
            raise ConfigError(
                f"{source}: no task {entry.name!r}; it has {listed(have)}{did_you_mean(entry.name, have)}"
            )
        one = found.tasks[entry.name]
        for name in one.modalities:
            if name not in found.modalities:
                raise ConfigError(f"{source}: task {entry.name} names {name}; it has {listed(list(found.modalities))}")
            names.setdefault(name)
        tasks.append((entry, one))
    signals = {name: _described_signal(config, name, found.modalities[name], source) for name in names}
    lengths = {name: found.modalities[name].length or 1.0 for name in names}
    counts = {name: _described_tokens(signals[name], found.modalities[name], source) for name in names}
    shapes = tuple(
        TaskShape(
            name=entry.name, outputs=one.outputs, modalities=one.modalities, samples=one.samples,
            group=groups[entry.name], tokens={name: (counts[name], 0.0) for name in one.modalities},
            present={name: one.present.get(name, 1.0) for name in one.modalities}, learn=entry.learn,
        )
        for entry, one in tasks
    )  # fmt: skip
    return DataShape(signals=tuple(signals.values()), tasks=shapes, lengths=lengths, source=source)


def _described_signal(config: Config, name: str, one: DescribedModality, source: str) -> Signal:
    chosen = config.modalities.get(name, ModalityConfig())
    kind = chosen.kind or one.kind
    if kind not in kinds.OPTIONS and (one.parameters is None or one.tokens is None):
        raise ConfigError(
            f"{source}: modality {name}: the kind {kind} has no formula here\n"
            f"  allowed: {', '.join(kinds.OPTIONS)}\n"
            "  to do: give `parameters` of its tokenizer and `tokens` of a sample for a kind of your own"
        )
    served, options = kinds.resolve(kind, asdict(chosen))
    ragged = one.length is not None
    signal = Signal(
        name=name, kind=served, shape=one.shape, ragged=ragged, rate_hz=one.rate_hz, numeric=one.numeric,
        categories=tuple(size + 1 for size in one.categories), options=options, weights=one.parameters,
        vocabulary=_vocabulary(one, options) if served == "text" else None,
    )  # fmt: skip
    _check_axes(signal, source)
    return signal


def _vocabulary(one: DescribedModality, options: Mapping[str, Any]) -> int:
    """Entries of a text's vocabulary: as described, else as many as there may be."""
    if options["vocabulary"] == "bytes":
        return kinds.NUM_BYTES
    return one.vocabulary or int(options["vocab_size"])


def _check_axes(signal: Signal, source: str) -> None:
    wanted = {"image": 3, "video": 4}.get(signal.kind)
    if wanted and len(signal.shape) != wanted:
        axes = "[channels, height, width]" if wanted == 3 else "[frames, channels, height, width]"
        raise ConfigError(f"{source}: modality {signal.name}: a {signal.kind} needs `shape: {axes}`")
    if signal.kind in ("timeseries", "sensor", "features") and not signal.shape and signal.weights is None:
        raise ConfigError(f"{source}: modality {signal.name}: a {signal.kind} needs `shape`, [features] of one frame")


def _described_tokens(signal: Signal, one: DescribedModality, source: str) -> float:
    if one.tokens is not None:
        return one.tokens
    if signal.kind == "text" and one.length is None:
        raise ConfigError(f"{source}: modality {signal.name}: a text needs `length`, its mean number of ids")
    return float(kinds.tokens(signal, round(one.length or 0)))


def _groups(config: Config) -> dict[str, str]:
    """Task -> the task that draws its samples."""
    return {task.name: group[0].name for group in joint_groups(config.data) for task in group}


def from_data(loaded: LoadedConfig) -> DataShape:
    """The data files that a configuration names. Raises ConfigError and DataError as a run would.

    Token counts are those of the train split; a text's are counted on some hundred of them.
    """
    from moemm.data.build import build_catalogue

    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    signals, entries = {}, {}
    for info in catalogue.modalities:
        chosen = loaded.config.modalities.get(info.name, ModalityConfig())
        kind, options = kinds.resolve(chosen.kind or info.kind, asdict(chosen))
        signals[info.name] = _as_signal(info, kind, options)
        if kind == "text":
            entries[info.name] = _fitted_entries(catalogue, info.name, options)
            signals[info.name] = replace(signals[info.name], vocabulary=kinds.NUM_BYTES + len(entries[info.name]))
    return _measured(loaded.config, catalogue, signals, entries, source="the data files")


def from_run(loaded: LoadedConfig, folder: Path) -> DataShape:
    """A run folder: its modalities and tasks as they were stored; token counts from its data, or from its record.

    Raises CheckpointError for a folder with broken files, ConfigError where neither says how many tokens there are.
    """
    from pydantic import TypeAdapter, ValidationError

    from moemm.data.catalogue import Catalogue

    try:
        stored = TypeAdapter(Catalogue).validate_json((folder / "catalogue.json").read_bytes())
        specs = json.loads((folder / "modalities.json").read_text(encoding="utf-8"))
        signals = {info.name: _stored_signal(info, specs[info.name]) for info in stored.modalities}
        entries = {name: spec["fitted"].get("entries", []) for name, spec in specs.items()}
    except (OSError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its catalogue.json or modalities.json cannot be read ({error})") from error
    here = {Path(task.file).name: loaded.data_root / task.file for task in loaded.config.data.tasks}
    if all(path.exists() for path in here.values()):
        tasks = tuple(replace(task, file=str(here[Path(task.file).name])) for task in stored.tasks)
        return _measured(
            loaded.config, replace(stored, tasks=tasks), signals, entries, source=f"{folder} and its data files"
        )
    return _recorded(loaded.config, stored, signals, folder)


def _stored_signal(info: ModalityInfo, spec: Mapping[str, Any]) -> Signal:
    if spec["kind"] not in kinds.OPTIONS:
        raise ConfigError(
            f"modality {info.name} is of the kind {spec['kind']}, which a plugin brings: its weights are not known "
            "here\n  to do: plan the configuration with --data FILE, which says how many it has"
        )
    found = _as_signal(info, spec["kind"], spec["options"])
    entries = spec["fitted"].get("entries")
    return replace(found, vocabulary=kinds.NUM_BYTES + len(entries or ())) if found.kind == "text" else found


def _as_signal(info: ModalityInfo, kind: str, options: Mapping[str, Any]) -> Signal:
    return Signal(
        name=info.name, kind=kind, shape=info.shape, ragged=info.ragged, rate_hz=info.rate_hz,
        numeric=len(info.num_names), categories=info.cat_sizes, options=options,
    )  # fmt: skip


def _texts(catalogue: Catalogue, modality: str, *, most: int | None) -> list[str]:
    """Texts of the train splits, each file once."""
    from moemm.data.catalogue import SPLITS
    from moemm.data.shared import open_shared

    found: dict[tuple[str, str], list[str]] = {}
    for task in catalogue.tasks:
        if modality not in task.modalities:
            continue
        stored = _stored_name(task, modality)
        file = open_shared(task.file)
        train = (file.split == SPLITS["train"]).nonzero()[0].tolist()
        values = (file.read(stored, index) for index in train[:most])
        found.setdefault((task.file, stored), [str(value) for value in values if value is not None])
    return [text for texts in found.values() for text in texts]


def _fitted_entries(catalogue: Catalogue, modality: str, options: Mapping[str, Any]) -> Any:
    """What the vocabulary holds besides bytes, as training would fit it."""
    from moemm.data.vocabulary import fit_subwords, fit_words

    if options["vocabulary"] == "bytes":
        return []
    fit: Any = fit_words if options["vocabulary"] == "word" else fit_subwords
    return fit(_texts(catalogue, modality, most=None), size=int(options["vocab_size"]))


def _measured(
    config: Config,
    catalogue: Catalogue,
    signals: Mapping[str, Signal],
    entries: Mapping[str, Any],
    *,
    source: str,
) -> DataShape:
    """Token counts of the train splits, from the lengths that the files hold. entries: of the vocabularies of texts."""
    learn = {task.name: task.learn for task in config.data.tasks}
    totals: dict[str, list[float]] = {name: [0.0, 0.0] for name in signals}
    texts = {name: _text_tokens(catalogue, one, entries[name]) for name, one in signals.items() if one.kind == "text"}
    tasks = []
    for task in catalogue.tasks:
        counts, present = {}, {}
        for name in task.modalities:
            lengths, number = _lengths(task, name)
            counts[name] = kinds.mean_and_deviation(texts.get(name) or _token_counts(signals[name], lengths))
            present[name] = len(lengths) / max(number, 1)
            totals[name][0] += sum(lengths)
            totals[name][1] += len(lengths)
        tasks.append(_task(task, counts, present, learn=learn.get(task.name, True)))
    means = {name: total / count if count else 1.0 for name, (total, count) in totals.items()}
    return DataShape(signals=tuple(signals.values()), tasks=tuple(tasks), lengths=means, source=source)


def _task(
    task: TaskInfo, tokens: Mapping[str, tuple[float, float]], present: Mapping[str, float], *, learn: bool
) -> TaskShape:
    return TaskShape(
        name=task.name, outputs=task.outputs, modalities=task.modalities, samples=task.sizes["train"],
        group=task.drawn_with or task.name, tokens=tokens, present=present, learn=learn,
    )  # fmt: skip


def _lengths(task: TaskInfo, modality: str) -> tuple[list[int], int]:
    """Lengths of the training samples that have the modality, and the number of all training samples."""
    from moemm.data.catalogue import SPLITS
    from moemm.data.shared import open_shared

    file = open_shared(task.file)
    stored, train = _stored_name(task, modality), file.split == SPLITS["train"]
    here = train & file.present(stored)
    lengths: list[int] = file.lengths(stored)[here].tolist()
    return lengths, int(train.sum())


def _token_counts(signal: Signal, lengths: Sequence[int]) -> list[int]:
    known = {length: kinds.tokens(signal, length) for length in set(lengths)}
    return [known[length] for length in lengths]


def _text_tokens(catalogue: Catalogue, signal: Signal, entries: Any) -> list[int]:
    from moemm.data.vocabulary import Vocabulary

    cut = Vocabulary(signal.options["vocabulary"], entries, max_tokens=int(signal.options["max_tokens"]))
    return [len(cut(text)) for text in _texts(catalogue, signal.name, most=SAMPLED)]


def _stored_name(task: TaskInfo, modality: str) -> str:
    return dict(zip(task.modalities, task.stored or task.modalities, strict=True))[modality]


def _recorded(config: Config, catalogue: Catalogue, signals: Mapping[str, Signal], folder: Path) -> DataShape:
    """Token counts from the routing figures that the run recorded; its data are not there."""
    from moemm.plan.trace import read_trace

    trace = read_trace(folder)
    known = trace.tokens_a_sample(config.train.batch_size)
    learn = {task.name: task.learn for task in config.data.tasks}
    samples = {task.name: task.sizes["train"] for task in catalogue.tasks if task.drawn_with is None}
    total = sum(samples.values())
    tasks = []
    for task in catalogue.tasks:
        having = {
            name: sum(samples.get(t.name, 0) for t in catalogue.tasks if name in t.modalities) for name in signals
        }
        counts = {name: (known.get(name, 0.0) * total / max(having[name], 1), 0.0) for name in task.modalities}
        tasks.append(_task(task, counts, dict.fromkeys(task.modalities, 1.0), learn=learn.get(task.name, True)))
    lengths = dict.fromkeys(signals, 1.0)
    return DataShape(
        signals=tuple(signals.values()), tasks=tuple(tasks), lengths=lengths, source=f"the record of {folder}"
    )


def with_tokens(data: DataShape, given: Mapping[str, float]) -> DataShape:
    """The data with other numbers of tokens a sample (of samples that have the modality). ConfigError: no such one."""
    for name in given:
        if name not in data.names:
            raise ConfigError(
                f"--tokens {name}: no such modality; there are {listed(data.names)}{did_you_mean(name, data.names)}"
            )
    tasks = tuple(
        replace(task, tokens={n: (given[n], 0.0) if n in given else one for n, one in task.tokens.items()})
        for task in data.tasks
    )
    return replace(data, tasks=tasks)
