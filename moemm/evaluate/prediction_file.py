"""Predictions as a file: a row a sample as CSV or JSON lines for people, arrays as HDF5."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moemm.data.hdf5 import Attribute, Node, write_tree
from moemm.errors import ConfigError
from moemm.evaluate.answers import class_of, named, shortest
from moemm.evaluate.given import FilePredictions

FORMAT = "moemm-predictions-1"
SUFFIXES = (".csv", ".jsonl", ".h5")
_CHUNK_BYTES = 2**18


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that cannot be written, before anything is computed. Raises ConfigError."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"--output {path}: is of no known format\n  allowed: names that end in {', '.join(SUFFIXES)}\n"
            "  to do: .csv or .jsonl has a row a sample, .h5 arrays with all probabilities"
        )
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; give the name of a file in it")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path}: is there already; give another name, or --overwrite")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}; make it first")


def write_predictions(found: FilePredictions, path: Path, *, overwrite: bool = False) -> None:
    """Write them in the format of the suffix; the file appears when it is complete. Raises ConfigError."""
    check_output(path, overwrite=overwrite)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".h5":
            write_tree(aside, _nodes(found), chunk_bytes=_CHUNK_BYTES)
        else:
            text = to_csv(found) if path.suffix == ".csv" else to_jsonl(found)
            aside.write_text(text, encoding="utf-8", newline="")
        os.replace(aside, path)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def to_csv(found: FilePredictions) -> str:
    """index, predicted, probability; of labels a probability each, of several columns a value each; label if known.

    Labels of a sample are joined by |. A number has as few digits as tell it from others of its type.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [{key: value for name, one in row.items() for key, value in _flat(name, one)} for row in rows_of(found)]
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def to_jsonl(found: FilePredictions) -> str:
    """An object a line: as CSV has it, but with lists and objects, and null where a number is not finite."""
    lines = (json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) for row in
             rows_of(found))  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def rows_of(found: FilePredictions) -> Iterator[dict[str, Any]]:
    """Of each sample: index, predicted, probability (one for each of several labels), and label if the file has it."""
    task, scores, chosen = found.task, found.scores, found.chosen
    predicted = named(task, chosen)
    targets = None if found.targets is None else named(task, found.targets)
    for row, index in enumerate(found.index.tolist()):
        values: dict[str, Any] = {"index": index, "predicted": predicted[row]}
        if task.target == "classification":
            values["probability"] = shortest(scores[row, chosen[row]])
        elif task.target == "multilabel":
            values["probability"] = {
                str(class_of(task, label)): shortest(value) for label, value in enumerate(scores[row])
            }
        if targets is not None:
            values["label"] = targets[row]
        yield values


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Columns of one entry of a row: labels joined, numbers one by one."""
    if isinstance(value, dict):
        yield from ((f"{name}_{key}", one) for key, one in value.items())
    elif isinstance(value, list) and value and isinstance(value[0], float):
        yield from ((f"{name}_{number}", one) for number, one in enumerate(value))
    else:
        yield name, "|".join(map(str, value)) if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nodes(found: FilePredictions) -> dict[str, Node]:
    """/index, /predicted, /probability, /label, /class_names; docs/train.md tells their shapes."""
    task, scores, chosen = found.task, found.scores, found.chosen
    about: dict[str, Attribute] = {
        "format": FORMAT, "task": task.name, "target": task.target, "data": found.data, "split": found.split,
        "run": str(found.run), "step": found.step,
    }  # fmt: skip
    nodes = {"/": Node(attributes=about), "index": Node(found.index)}
    regression = task.target == "regression"
    kind = np.uint8 if task.target == "multilabel" else np.int64
    nodes["predicted"] = Node(_column(chosen) if regression else chosen.astype(kind))
    if not regression:
        nodes["probability"] = Node(scores)
    if found.targets is not None:
        targets = found.targets
        nodes["label"] = Node(_column(targets) if regression else targets.astype(kind))
    if task.class_names:
        nodes["class_names"] = Node(list(task.class_names))
    return nodes


def _column(values: np.ndarray) -> np.ndarray:
    """(n,) where there is one column, else (n, C)."""
    return values.reshape(len(values)) if values.size == len(values) else values
