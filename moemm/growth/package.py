"""An extension as a file: `moemm extend export` writes it, `moemm extend load` puts it into a run with the same base.

It holds what the extension brought and nothing of the base: tokenizer, experts, router rows, norms, heads, by name; the
parts of the configuration and the catalogue that go with them; and the sha256 of the base's weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError

from moemm.checkpoint.manifest import versions
from moemm.checkpoint.resume import changed_keys
from moemm.config import Config, LoadedConfig, from_dict, to_dict
from moemm.config.schema import ExpertGroupConfig, ExtensionConfig, ModalityConfig, TaskConfig
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.errors import CheckpointError, ConfigError, DataError
from moemm.growth.extension import closed
from moemm.growth.grown import Base, check_target, read_base, size_of, write_grown
from moemm.growth.package_file import read_package, write_package
from moemm.growth.parts import (
    Shape,
    Weights,
    base_tensors,
    differing_bits,
    extension_tensors,
    find_extension,
    groups_of,
    learned,
    outputs,
    plain_name,
    relative_change,
    shown,
    touched,
    without,
)
from moemm.growth.receipt import Proof, Receipt, lineage, weights_hash
from moemm.modalities import ModalitySpec, specs_from_dict, specs_to_dict
from moemm.models import Model
from moemm.train.init import OF_THE_RUN
from moemm.train.setup import CONFIG

_OPTIMIZER = "not kept: the run begins anew with these weights"
ROUNDING = 1e-4
"""How much other numbers of experts may change what an extension says, relative to the largest output of its task."""
_RUNNING = ("dropout", "attention", "extensions")
"""Keys of `model` that change no meaning of a tensor of the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOf:
    """The base that a package fits. model: its section `model`, as far as it gives tensors their meaning."""

    sha256: str
    model: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a package says besides its tensors.

    groups: with `added: 0`; the number is that which the extension has in the run that it is loaded into. infos: its
    tasks as the catalogue has them, files without folders. modalities, specs: of its modalities. tensors: their names.
    """

    extension: ExtensionConfig
    groups: list[ExpertGroupConfig]
    tasks: list[TaskConfig]
    infos: list[TaskInfo]
    modalities: dict[str, ModalityConfig]
    specs: dict[str, dict[str, Any]]
    tensors: list[str]
    base: BaseOf
    versions: dict[str, str]


def export_extension(run: Path | str, name: str, file: Path | str, *, plugins: Sequence[Path | str] = ()) -> Content:
    """Write the extension of a run that is named `name`, or that brought this modality, into `file`.

    Raises ConfigError: no such extension, one that needs another, a file that is there already or cannot be written.
    CheckpointError and DataError as `load_run`.
    """
    file = Path(file)
    if file.exists():
        raise ConfigError(f"{file} is there already; give another name, or delete it")
    base = read_base(run, plugins=plugins)
    place = find_extension(base.run.config, name)
    _check_frozen(base, base.run.config.model.extensions[place].name)
    content, tensors = describe(base, place)
    try:
        write_package(file, json.loads(json.dumps(asdict(content))), tensors)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error
    return content


def _check_frozen(base: Base, name: str) -> None:
    """Refuse an extension that the receipts tell was trained together with the base: it fits no other run."""
    for receipt in lineage(base.run.folder):
        if receipt["details"].get("name") == name and receipt["details"].get("unfrozen"):
            raise ConfigError(
                f"extension {name} of {base.run.folder} was trained with the base unfrozen: it fits no other run\n"
                "  to do: extend the base anew without `unfreeze`, and export that"
            )


def describe(base: Base, place: int) -> tuple[Content, dict[str, torch.Tensor]]:
    """What a package of the extension at this place of `model.extensions` holds. Raises ConfigError."""
    config, shape = base.run.config, Shape.of(base)
    extension = config.model.extensions[place]
    tensors = extension_tensors(base, place)
    specs = {name: base.run.specs[name] for name in extension.modalities}
    tasks = [task for task in config.data.tasks if task.name in extension.tasks]
    content = Content(
        extension=extension,
        groups=[replace(group, added=0) for group in groups_of(shape, extension)],
        tasks=[replace(one, file=plain_name(one.file)) for one in learned(tasks)],
        infos=[replace(one, file=plain_name(one.file)) for one in shape.catalogue.tasks if one.name in extension.tasks],
        modalities={name: one for name, one in config.modalities.items() if name in extension.modalities},
        specs=specs_to_dict(specs),
        tensors=sorted(tensors),
        base=BaseOf(sha256=weights_hash(base_tensors(base)), model=meaning(shape)),
        versions=versions(),
    )
    return content, tensors


def meaning(shape: Shape) -> dict[str, Any]:
    """The section `model` of the base of a shape, as far as it gives the base's tensors their meaning."""
    base = without(shape, range(len(shape.config.model.extensions)))
    model = to_dict(base.config)["model"]
    groups = [asdict(group) for group in closed(base.config.model.experts.groups, list(base.specs))]
    kept = {key: value for key, value in model.items() if key not in (*_RUNNING, "experts", "router")}
    router = {key: value for key, value in model["router"].items() if key != "losses"}
    return {**kept, "router": router, "groups": groups}


def load_extension(
    run: Path | str, file: Path | str, *, output: Path | str, data: Sequence[Path | str] = (),
    plugins: Sequence[Path | str] = (),
) -> Receipt:  # fmt: skip
    """Put the extension of a package into a run with the same base: the run folder `output`, with a receipt.

    data: files of the extension's tasks, by the names that the package knows them by; a single one may have any name.
    When not given they are looked for under the run's `data.root`.
    Raises CheckpointError: a broken package, another base, tensors that do not fit. ConfigError: names that are taken,
    no such data, and as `check_target`. DataError: data that is not what the extension was made for.
    """
    file, target = Path(file), Path(output)
    content, tensors = read_content(file)
    check_target(target)
    base = read_base(run, plugins=plugins)
    check_base(base, content, file=file)
    shape = joined(base, content, file=file, data=[Path(one) for one in data])
    model = shape.model()
    own = model.state_dict()
    _check_tensors(base, own, tensors, file=file)
    weights = {**base.weights, **tensors}
    model.load_state_dict({name: weights[name] for name in own if _fits(own[name], weights.get(name))}, strict=False)
    lines = [f"added {content.extension.name} from {file}: {len(tensors)} tensors, all others as they were"]
    return _write(base, shape, model, f"extend load {content.extension.name}", lines, target, tensors)


def remove_extension(run: Path | str, name: str, *, output: Path | str, plugins: Sequence[Path | str] = ()) -> Receipt:
    """Take the extension of this name, or that brought this modality, out of a run: the run folder `output`.

    Raises ConfigError: no such extension, one that another needs, and as `check_target`.
    """
    target = Path(output)
    check_target(target)
    base = read_base(run, plugins=plugins)
    place = find_extension(base.run.config, name)
    shape = without(Shape.of(base), [place])
    from_dict(to_dict(shape.config), origin=f"{base.run.folder} without {name}")
    model = shape.model()
    own = model.state_dict()
    fitting = {key: value for key, value in base.weights.items() if key in own and _fits(own[key], value)}
    model.load_state_dict(fitting, strict=False)
    extension = base.run.config.model.extensions[place].name
    gone = Shape.of(base).names() - own.keys()
    lines = [f"removed {extension}: {len(gone)} tensors, all others as they were"]
    return _write(base, shape, model, f"extend remove {extension}", lines, target, {})


def read_content(file: Path) -> tuple[Content, dict[str, torch.Tensor]]:
    """A package whose bytes were checked, and whose parts are of the right types. Raises CheckpointError."""
    values, tensors = read_package(file)
    try:
        content = TypeAdapter(Content).validate_json(json.dumps(values))
        specs_from_dict(content.specs)
    except (ValidationError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: its JSON does not describe an extension: {error}") from error
    given = sorted(content.specs), sorted(info.name for info in content.infos), content.tensors
    wanted = sorted(content.extension.modalities), sorted(content.extension.tasks), sorted(tensors)
    if given != wanted or sorted(task.name for task in content.tasks) != wanted[1]:
        raise CheckpointError(f"{file}: its modalities, tasks or tensors are not those that it says it has")
    infinite = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if infinite:
        raise CheckpointError(f"{file}: not all numbers are finite in {shown(infinite)}")
    return content, tensors


def check_base(base: Base, content: Content, *, file: Path) -> None:
    """Refuse a package that was made on another base. Raises CheckpointError with both hashes, or the keys."""
    own = weights_hash(base_tensors(base))
    if own != content.base.sha256:
        raise CheckpointError(
            f"{file} was made on another base\n  base of the package: {content.base.sha256}\n"
            f"  base of {base.run.folder}: {own}\n"
            "  allowed: runs whose tensors that no extension brought have the same names and bits\n"
            "  to do: load it into the run that it was extended from, or another extension of that run"
        )
    changed = list(changed_keys(content.base.model, meaning(Shape.of(base))).values())
    if changed:
        raise CheckpointError(
            f"{file} was made on a base whose `model` differs:" + "".join(f"\n  {c}" for c in changed)
        )


def joined(base: Base, content: Content, *, file: Path, data: Sequence[Path]) -> Shape:
    """The run's shape with that of the package. Raises ConfigError and DataError, see load_extension."""
    _check_names(base, content, file=file)
    config = base.run.config
    number = len(config.model.extensions) + 1
    tasks = [replace(task, file=_data(base, task, data, len(content.tasks))) for task in content.tasks]
    groups = closed(config.model.experts.groups, list(base.run.specs))
    model = replace(
        config.model, extensions=[*config.model.extensions, content.extension],
        experts=replace(
            config.model.experts,
            groups=[*groups, *(replace(group, added=number) for group in content.groups)],
        ),
    )  # fmt: skip
    changed = replace(
        config, model=model, data=replace(config.data, tasks=learned([*config.data.tasks, *tasks])),
        modalities={**config.modalities, **content.modalities}, train=replace(config.train, only=None),
    )  # fmt: skip
    changed = from_dict(to_dict(changed), origin=f"{base.run.folder} with {file}")
    catalogue = build_catalogue(changed.data, base=base.run.folder)
    _check_data(catalogue, content)
    specs = {**base.run.specs, **specs_from_dict(content.specs)}
    return Shape(changed, catalogue, {info.name: _seen(specs[info.name], catalogue) for info in catalogue.modalities})


def _seen(spec: ModalitySpec, catalogue: Catalogue) -> ModalitySpec:
    """The spec with what the files here say of its modality, such as a unit that only they know."""
    return replace(spec, info=next(info for info in catalogue.modalities if info.name == spec.info.name))


def _check_names(base: Base, content: Content, *, file: Path) -> None:
    config, new = base.run.config, content.extension
    have = {
        "extension": [one.name for one in config.model.extensions],
        "modality": list(base.run.specs), "task": [task.name for task in config.data.tasks],
    }  # fmt: skip
    for what, names in (("extension", [new.name]), ("modality", new.modalities), ("task", new.tasks)):
        for name in names:
            if name in have[what]:
                raise ConfigError(
                    f"{file}: {base.run.folder} has the {what} {name} already; it has {', '.join(have[what])}\n"
                    f"  to do: load the package into a run without it (`moemm extend remove RUN {new.name}`)"
                )


def _data(base: Base, task: TaskConfig, given: Sequence[Path], num_tasks: int) -> str:
    """Where the file of a task is, as `data.tasks[].file` has it."""
    root = base.run.folder / base.run.config.data.root
    named = [file for file in given if file.name == task.file] or (list(given) if len(given) == num_tasks == 1 else [])
    path = named[0] if named else root / task.file
    if not path.is_file():
        raise ConfigError(
            f"task {task.name}: no file {path}\n  allowed: a data file with what the extension reads\n"
            "  to do: give it with --data FILE"
        )
    return os.path.abspath(path) if named else task.file


def _check_data(catalogue: Catalogue, content: Content) -> None:
    """Refuse data of other modalities or classes than the extension was made for. Raises DataError."""
    specs = specs_from_dict(content.specs)
    for info in catalogue.modalities:
        if info.name in specs:
            _alike(f"modality {info.name}", specs[info.name].info, info, _OF_MODALITY)
    for task in catalogue.tasks:
        for known in content.infos:
            if known.name == task.name:
                _alike(f"task {task.name}", known, task, _OF_TASK)


_OF_MODALITY = ("kind", "ragged", "shape", "dtype", "num_names", "cat_names", "cat_sizes")
_OF_TASK = ("target", "outputs", "modalities", "class_names")


def _alike(what: str, known: object, found: object, keys: Sequence[str]) -> None:
    for key in keys:
        if getattr(known, key) != getattr(found, key):
            raise DataError(
                f"{what} has {key} {getattr(found, key)!r} in the data, and {getattr(known, key)!r} in the package\n"
                "  to do: give data of the same form with --data FILE"
            )


def _check_tensors(base: Base, own: Mapping[str, torch.Tensor], tensors: Weights, *, file: Path) -> None:
    """What the model has and the run lacks is what the package has, in its shape, and nothing else."""
    new = {name for name in own if name not in base.weights and not name.startswith(OF_THE_RUN)}
    lacks, extra = new - tensors.keys(), tensors.keys() - new
    if lacks or extra:
        parts = [f"\n  not in the package: {shown(lacks)}"] if lacks else []
        parts += [f"\n  no place in the model: {shown(extra)}"] if extra else []
        raise CheckpointError(f"{file} does not match its own configuration:{''.join(parts)}\n  export it anew")
    wrong = [name for name, value in tensors.items() if not _fits(own[name], value)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{file}: {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, and {tuple(own[name].shape)} "
            f"{own[name].dtype} in the model; export it anew"
        )


def _fits(own: torch.Tensor, value: torch.Tensor | None) -> bool:
    return value is not None and own.shape == value.shape and own.dtype == value.dtype


def _write(
    base: Base, shape: Shape, model: Model, operation: str, lines: list[str], target: Path,
    tensors: Weights,
) -> Receipt:  # fmt: skip
    """Write the run folder, with what was measured on it."""
    receipt = Receipt(
        operation=operation, sources=[base.as_source()], target=str(target), changed=lines,
        proofs=_proofs(base, shape, model, tensors), before=size_of(cast(Model, base.run.model)),
        after=size_of(model), optimizer=_OPTIMIZER,
        details={
            "extensions": [asdict(one) for one in shape.config.model.extensions], "tensors": sorted(tensors),
            "base": weights_hash(base_tensors(base)),
        },
        history=lineage(base.run.folder),
    )  # fmt: skip
    config = replace(shape.config, train=replace(shape.config.train, output=str(target)))
    loaded = LoadedConfig(config=config, path=base.run.folder / CONFIG, source={}, origins={})
    write_grown(loaded, shape.catalogue, shape.specs, model, receipt)
    return receipt


def _proofs(base: Base, shape: Shape, model: Model, tensors: Weights) -> list[Proof]:
    now, old = model.state_dict(), cast(Model, base.run.model)
    kept = {name: value for name, value in base.weights.items() if name in now and not name.startswith(OF_THE_RUN)}
    known = {task.name for task in base.run.catalogue.tasks}
    tasks = [task.name for task in shape.catalogue.tasks if task.name in known]
    before, after = outputs(Shape.of(base), old, tasks), outputs(shape, model, tasks)
    later, free = _later(base.run.config, shape.config), _touched(base, shape)
    same = {task: value for task, value in before.items() if task not in later | free}
    proofs = [
        Proof(what="numbers of the run that changed", value=differing_bits(kept, now), most=0),
        Proof(what="outputs of the run's tasks that changed, by bits", value=differing_bits(same, after), most=0),
    ]
    loose = (later - free, "later extensions", ROUNDING), (free, "tasks that may use its experts", None)
    for names, what, most in loose:
        if names:
            change = max(relative_change(before[task], after[task]) for task in names)
            proofs.append(Proof(what=f"relative change of outputs of {what}", value=change, most=most))
    if tensors:
        proofs.append(Proof(what="numbers of the package that changed", value=differing_bits(tensors, now), most=0))
        new = [task.name for task in shape.catalogue.tasks if task.name not in known]
        finite = all(bool(one.isfinite().all()) for one in outputs(shape, model, new).values())
        proofs.append(Proof(what="outputs of the new tasks are finite", value=float(finite), least=1))
    return proofs


def _touched(base: Base, shape: Shape) -> set[str]:
    """Tasks that the run and the new one have whose samples may use experts that one of them has not."""
    one, two = Shape.of(base), shape
    names = [{extension.name for extension in each.config.model.extensions} for each in (one, two)]
    found: set[str] = set()
    for each in (one, two):
        for extension in each.config.model.extensions:
            if extension.name in names[0] ^ names[1]:
                found |= touched(each, groups_of(each, extension))
    return found & {task.name for task in one.catalogue.tasks} & {task.name for task in two.catalogue.tasks}


def _later(before: Config, after: Config) -> set[str]:
    """Tasks of extensions that have another number now: their sums over experts round otherwise."""
    number = {one.name: place for place, one in enumerate(before.model.extensions)}
    return {
        task for place, one in enumerate(after.model.extensions) if number.get(one.name, place) != place
        for task in one.tasks
    }  # fmt: skip
