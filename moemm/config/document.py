"""docs/config.md, made from the schema: `python -m moemm.config.document > docs/config.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from moemm.config import fields, schema
from moemm.config.deepspeed import USED_AS
from moemm.config.explain import default_text
from moemm.config.fields import FieldInfo

_HEAD = """\
# Configuration

<!-- Made by `python -m moemm.config.document > docs/config.md` from moemm/config/schema.py; do not edit. -->

A run is described by one YAML file. The least that it needs:

```yaml
data:
  tasks:
    - name: adult
      file: adult.h5
train:
  epochs: 4
```

- **Strict.** An unknown key, a wrong type, a value out of range or a contradiction ends with exit code 2 before
  anything is loaded. All problems are reported at once, each with its key, value, file and line, and the nearest
  name. `1.5` and `true` are no whole numbers, `yes` is text; `3e-4` is a number.
- **Overrides.** Every key can be set on the command line, values in YAML: `--model.dim 128`, `--model.dim=128`,
  `--modalities.image.patch "[4, 4]"`, `--data.tasks.0.weight 2`, or by the task's name:
  `--data.tasks.adult.weight 2`. Dashes may stand for underscores.
- **Base.** `base: ../base/small.yaml` (or a list of files) at the top builds on other files: mappings are merged, all
  else is replaced. A relative `data.root` starts at the file that it stands in.
- **Length.** `train.steps` and `train.epochs` exclude each other; of a base file, a file and the command line, the one
  given last wins.

`moemm config show FILE` prints the complete configuration and where each value came from; `moemm config explain KEY`
prints what is below for one key.
"""


def document() -> str:
    """The page as Markdown: the head, then one table a section."""
    parts = [_HEAD]
    for heading, owner, prefix in _sections():
        parts += [f"## {heading}\n", f"{owner.__doc__}\n", *_table(owner, prefix), ""]
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, type, str]]:
    """Heading, dataclass and path prefix of each section, in the order of the schema."""
    yield "The top level", schema.Config, ""
    for info in fields.all_fields():
        if info.section:
            owner, suffix = fields.section(info.annotation)
            assert owner is not None
            yield f"`{info.path}{suffix}`", owner, f"{info.path}{suffix}."


def _table(owner: type, prefix: str) -> Iterator[str]:
    yield "| key | allowed | default | what it is |"
    yield "| --- | --- | --- | --- |"
    for info in fields.all_fields(owner, prefix):
        if info.path.removeprefix(prefix).isidentifier():
            yield _row(info, info.path.removeprefix(prefix))


def _row(info: FieldInfo, name: str) -> str:
    allowed = fields.type_text(info.annotation) if info.section else info.allowed
    used = f" In DeepSpeed: {USED_AS[info.path]}." if info.path in USED_AS else ""
    cells = (f"`{name}`", allowed, f"`{default_text(info)}`", f"{info.help}{used}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(document())
