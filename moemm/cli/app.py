"""`moemm`: finds the verb, imports only that one, and turns errors into one clean message and an exit code."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Protocol

from moemm.cli.verbs import VERBS, Verb
from moemm.errors import ConfigError, MoemmError

INTERRUPTED = 130
BROKEN_PIPE = 141
_LOCAL_RANK = ("--local_rank", "--local-rank")


class Command(Protocol):
    """What a verb's dataclass offers once its fields are parsed."""

    def run(self, overrides: Sequence[str]) -> int:
        """Do it; returns the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moemm` with these arguments (those of the process by default); returns the exit code.

    0 done; 2 to 7 the kinds of MoemmError (see errors.py); 130 interrupted. MOEMM_TRACEBACK=1 adds the traceback.
    """
    try:
        return _dispatch(_without_local_rank(sys.argv[1:] if argv is None else argv))
    except MoemmError as error:
        if os.environ.get("MOEMM_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"{_rank_prefix()}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def help_text() -> str:
    """What `moemm --help` prints."""
    width = max(len(f"{name} {verb.usage}") for name, verb in VERBS.items())
    lines = [f"  moemm {f'{name} {verb.usage}':<{width}}   {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "moemm trains one sparse mixture-of-experts model over any number of modalities.",
            "",
            *lines,
            "",
            "`moemm VERB --help` says more; `moemm --version`.",
            "Every key of the configuration can be set on the command line: --model.dim 128.",
            "Exit codes: 0 done, 1 problems found, 2 configuration, 3 data, 4 checkpoint, 5 kernel, 6 launch,",
            "7 stopped by a health check, 130 interrupted. MOEMM_TRACEBACK=1 adds the traceback to an error.",
        ]
    )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        print(f"moemm {importlib.import_module('moemm').__version__}")
        return 0
    name, rest = _find(arguments)
    return _call(name, VERBS[name], rest) if name else 0


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """Name of the verb (one word or two) and what follows it; an empty name where only a group's help was asked for."""
    first, rest = arguments[0], arguments[1:]
    if rest and f"{first} {rest[0]}" in VERBS:  # before the verb of one word, where there are both
        return f"{first} {rest[0]}", rest[1:]
    if first in VERBS:
        return first, rest
    group = {name.partition(" ")[2]: name for name in VERBS if name.startswith(f"{first} ")}
    if not group:
        raise _no_verb(first, sorted({name.split()[0] for name in VERBS}), prog="moemm")
    if not rest or rest[0] in ("-h", "--help"):
        print("\n".join(f"moemm {name} {VERBS[name].usage}\n    {VERBS[name].help}" for name in group.values()))
        return "", []
    raise _no_verb(rest[0], sorted(group), prog=f"moemm {first}")


def _call(name: str, verb: Verb, arguments: list[str]) -> int:
    import tyro

    from moemm.config.overrides import split_overrides

    module, _, attribute = verb.target.partition(":")
    owner = getattr(importlib.import_module(module), attribute)
    options, overrides = split_overrides(arguments, _options(owner)) if verb.overrides else (arguments, [])
    if not {"-h", "--help"}.isdisjoint(options):
        options = ["--help"]
    _check_options(name, owner, options)
    command: Command = tyro.cli(owner, args=options, prog=f"moemm {name}", config=(tyro.conf.FlagCreatePairsOff,))
    return command.run(overrides)


def _options(owner: type) -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(owner)]


def _check_options(name: str, owner: type, options: Sequence[str]) -> None:
    """An option that the verb has not: the nearest one, or the key of the configuration that it may stand for."""
    from moemm.config.overrides import unknown_key
    from moemm.config.suggest import nearest

    known = ["--help", *_options(owner)]
    for option in (text.partition("=")[0] for text in options if text.startswith("--")):
        if option.replace("_", "-") in known:
            continue
        match = nearest(option, known)
        hint = f"; did you mean {match}?" if match else ""
        if VERBS[name].overrides and not match:
            hint = unknown_key(option[2:], ()).removeprefix("unknown key").replace("did you mean ", "did you mean --")
        raise ConfigError(f"moemm {name} has no option {option}{hint}\n  `moemm {name} --help` lists its options.")


def _no_verb(name: str, known: list[str], *, prog: str) -> ConfigError:
    from moemm.config.suggest import did_you_mean

    hint = did_you_mean(name, known)
    return ConfigError(f"{prog} has no verb {name!r}{hint}\n  verbs: {', '.join(known)}\n  `moemm --help` says more.")


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without --local_rank, which launchers put in front; its value is also in the environment."""
    kept: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, value = argument.partition("=")
        if name not in _LOCAL_RANK:
            kept.append(argument)
            continue
        os.environ.setdefault("LOCAL_RANK", value if equals or not remaining else remaining.pop(0))
    return kept


def _rank_prefix() -> str:
    return f"[rank {os.environ['RANK']}] " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
