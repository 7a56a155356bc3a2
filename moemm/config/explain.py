"""`moemm config explain`: what a key takes, its default, what it does, and what DeepSpeed makes of it."""

from __future__ import annotations

import re
from typing import Any

from moemm.config import fields
from moemm.config.deepspeed import USED_AS
from moemm.config.fields import FieldInfo
from moemm.config.problem import dotted, short
from moemm.config.suggest import did_you_mean, listed, nearest
from moemm.errors import ConfigError

_HELP_WIDTH = 72


def explain(key: str) -> str:
    """Help on one key (`model.router.top_k`, `data.tasks.0.weight`, `modalities.image.patch`) or section.

    Raises ConfigError with the nearest key for one that does not exist.
    """
    info = find_field(key)
    lines = [info.path, f"  {info.help}", "", f"  type:      {fields.type_text(info.annotation)}"]
    if not info.section:
        lines.append(f"  allowed:   {info.allowed}")
    lines.append(f"  default:   {default_text(info)}")
    if info.path in USED_AS:
        lines.append(f"  DeepSpeed: {USED_AS[info.path]}")
    inside = [other for other in fields.all_fields() if _parent(other.path) == info.path] if info.section else []
    if inside:
        lines += ["", "  Keys:", *(f"    {line}" for line in table(inside))]
    return "\n".join(lines)


def explain_all() -> str:
    """All keys, one line each."""
    heading = "Every key, with its default (`moemm config explain KEY` for one of them):"
    return "\n".join([heading, "", *table([info for info in fields.all_fields() if not info.section])])


def table(infos: list[FieldInfo]) -> list[str]:
    """Aligned lines: path, default, first sentence of the help."""
    width = max(len(info.path) for info in infos)
    defaults = [short(default_text(info), limit=16).strip('"') for info in infos]
    pairs = zip(infos, defaults, strict=True)
    return [f"{info.path:<{width}}  {default:<16}  {_first_sentence(info.help)}" for info, default in pairs]


def default_text(info: FieldInfo) -> str:
    """The default as one writes it in YAML; `required` where there is none."""
    if info.default is fields.REQUIRED:
        return "required"
    if info.section and not isinstance(info.default, list | dict):
        return "see its keys"
    return _yaml(info.default)


def find_field(key: str) -> FieldInfo:
    """The key as the schema knows it: indexes and names of tasks and modalities stand for any of them."""
    infos = {info.path: info for info in fields.all_fields()}
    plain = _general(key.removeprefix("--").replace("-", "_"))
    if plain in infos:
        return infos[plain]
    match = nearest(_leaf(plain), [_leaf(path) for path in infos], cutoff=0.75)
    leaves = [path for path in infos if _leaf(path) == match]
    hint = f"; did you mean {listed(leaves)}?" if leaves else did_you_mean(plain, infos)
    raise ConfigError(f"{key}: no such key{hint}\n  `moemm config explain` lists all keys.")


def _general(key: str) -> str:
    """`data.tasks.0.weight`, `data.tasks.adult.weight` -> `data.tasks[].weight`; `modalities.image` -> `modalities`."""
    key = re.sub(r"^data\.tasks(\.(\d+|\*)|\[\d*\])", "data.tasks[]", key)
    key = key.removesuffix("[]")
    parts = tuple(key.split("."))
    if parts[0] == "modalities" and len(parts) > 1:
        return dotted(("modalities", "<name>", *parts[2:])) if len(parts) > 2 else "modalities"
    names = fields.keys_of(fields.annotation_at(("data", "tasks", 0)))
    if parts[:2] == ("data", "tasks") and len(parts) == 4 and parts[3] in names:
        return dotted(("data", "tasks[]", parts[3]))
    if parts[:2] == ("data", "tasks") and len(parts) == 3 and parts[2] in names:
        return dotted(("data", "tasks[]", parts[2]))
    return "deepspeed.extra" if parts[:2] == ("deepspeed", "extra") else key


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0].removesuffix("[]").removesuffix(".<name>")


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;")
    return sentence if len(sentence) <= _HELP_WIDTH else f"{sentence[: _HELP_WIDTH - 3]}..."


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return short(list(value)) if isinstance(value, tuple) else short(value).strip('"')
