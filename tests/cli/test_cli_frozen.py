"""The verbs, their options and the configuration's keys are a promise: a change shows in options.txt.

After a wanted change: python tests/cli/test_cli_frozen.py > tests/cli/options.txt
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import moemm.config.fields as schema_fields
from moemm.cli.verbs import VERBS

FROZEN = Path(__file__).with_name("options.txt")


def lines() -> Iterator[str]:
    for name, verb in VERBS.items():
        yield f"moemm {name} {verb.usage}".rstrip()
        module, _, attribute = verb.target.partition(":")
        for field in dataclasses.fields(getattr(importlib.import_module(module), attribute)):
            positional = field.default is dataclasses.MISSING or "Positional" in str(field.type)
            if not positional:
                yield f"  --{field.name.replace('_', '-')} (default: {field.default!r})"
    for info in schema_fields.all_fields():
        if not info.section:
            default = "required" if info.default is schema_fields.REQUIRED else repr(info.default)
            yield f"{info.path}: {info.allowed} (default: {default})"


def test_options_are_frozen() -> None:
    assert list(lines()) == FROZEN.read_text().splitlines(), __doc__


if __name__ == "__main__":
    print("\n".join(lines()))
