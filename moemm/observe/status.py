"""What a run is doing, read from the files of its folder. Imports neither torch nor numpy."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moemm.errors import CheckpointError
from moemm.observe.heartbeat import ENDED, LONG_S, is_alive, read_heartbeat
from moemm.observe.span import duration

GOOD = ("running", "finished", "stopped")
"""States that need nobody: exit code 0."""
_NOTED = ('"event": "train"', '"event": "message"', '"event": "left_out"')
_SHOWN = 200


def run_status(folder: Path | str, *, now: float | None = None) -> dict[str, Any]:
    """The state of a run, as JSON types; see docs/status.md for the keys.

    now: seconds since 1970, this moment by default. Raises CheckpointError: the folder holds no run.
    """
    folder, now = Path(folder), time.time() if now is None else now
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no config.yaml. Give train.output of a run.")
    beat, course = read_heartbeat(folder), _course(folder / "metrics.jsonl")
    summary = _json(folder / "summary.json")
    state, reason = _state(folder, beat, summary, now)
    step, total = _place(beat, course["last"], summary)
    step_s = (beat or {}).get("seconds_per_step")
    return {
        "run": str(folder),
        "state": state,
        "reason": reason,
        "phase": (beat or {}).get("phase"),
        "last_sign_s": None if (sign := _last_sign(folder, beat)) is None else max(0.0, now - sign),
        "host": (beat or {}).get("host"),
        "pid": (beat or {}).get("pid"),
        "ranks": (beat or {}).get("ranks"),
        "step": step,
        "total_steps": total,
        "steps_per_second": 1 / step_s if step_s else None,
        "tokens_per_second": course["last"].get("tokens_per_second"),
        "seconds_left": _left(step, total, step_s, course["last"]) if state == "running" else None,
        "loss": course["last"].get("loss"),
        "checkpoint": _checkpoint(folder / "checkpoints", now),
        "quarantine": _quarantine(folder / "quarantine.jsonl"),
        "alarms": {"count": len(course["alarms"]), "newest": course["alarms"][-1] if course["alarms"] else None},
        "skipped_steps": course["skipped"],
        "mended_steps": course["mended"],
    }


def _state(folder: Path, beat: Mapping[str, Any] | None, summary: Mapping[str, Any], now: float) -> tuple[str, str]:
    """The state, and why in words."""
    if beat is None:
        if summary:
            return "finished", f"{summary.get('steps', '?')} steps"
        sign = _last_sign(folder, None)
        if sign is not None and now - sign <= LONG_S:
            return "running", "no heartbeat; its files are being written"
        return "looks dead", "no heartbeat, and nothing was written for long"
    if beat["phase"] in ENDED:
        return str(beat["phase"]), str(beat.get("reason") or "")
    if (alive := is_alive(beat)) is False:
        return "looks dead", f"its process {beat['pid']} on {beat['host']} is gone, and said nothing before"
    silent, quiet_s = now - beat["time"], float(beat.get("quiet_s", LONG_S))
    if silent <= quiet_s:
        return "running", str(beat["phase"])
    what = f"no sign of life for {duration(silent)}, in {beat['phase']}; {duration(quiet_s)} would be nothing unusual"
    return "looks dead", what + ("; its process still exists and may hang" if alive else "")


def _last_sign(folder: Path, beat: Mapping[str, Any] | None) -> float | None:
    """When the run last gave a sign of life, in seconds since 1970."""
    if beat is not None:
        return float(beat["time"])
    found = [path.stat().st_mtime for name in ("metrics.jsonl", "config.yaml") if (path := folder / name).exists()]
    return max(found, default=None)


def _place(
    beat: Mapping[str, Any] | None, last: Mapping[str, Any], summary: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    for source in (beat or {}, last):
        if source.get("step") is not None:
            return source["step"], source.get("total_steps")
    return summary.get("steps"), summary.get("steps")


def _left(step: int | None, total: int | None, step_s: float | None, last: Mapping[str, Any]) -> float | None:
    if step_s and step is not None and total is not None:
        return float((total - step) * step_s)
    seconds: float | None = last.get("seconds_left")
    return seconds


def _course(path: Path) -> dict[str, Any]:
    """The last report of metrics.jsonl, the warnings, and how many steps were left out or done in part."""
    last: dict[str, Any] = {}
    alarms: list[str] = []
    skipped = mended = 0
    for values in _lines(path, _NOTED):
        if values.get("event") == "train":
            last = values
        elif values.get("event") == "left_out":
            skipped, mended = skipped + (values.get("left_out") is None), mended + (values.get("left_out") is not None)
        elif values.get("event") == "message" and "warning: " in str(values.get("text")):
            alarms.append(_short(str(values["text"])))
    return {"last": last, "alarms": alarms, "skipped": skipped, "mended": mended}


def _quarantine(path: Path) -> dict[str, Any]:
    """Samples that were put aside: how many, and the last."""
    lines = list(_lines(path))
    keys = ("file", "key", "index", "reason")
    newest = {key: lines[-1].get(key) for key in keys} if lines else None
    return {"count": len(lines), "newest": newest}


def _lines(path: Path, marks: tuple[str, ...] = ("",)) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file's lines that hold one of `marks`; a line that is being written is passed over."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if any(mark in line for mark in marks):
                    try:
                        values = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(values, dict):
                        yield values
    except FileNotFoundError:
        return


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """The newest folder that has its manifest, which is written last. Whether its hashes hold is not looked at."""
    found = []
    for path in folder.glob("step_*/manifest.json"):
        number = path.parent.name.removeprefix("step_")
        if number.isdigit():
            found.append((int(number), path))
    if not found:
        return None
    step, path = max(found)
    return {"step": step, "folder": str(path.parent), "age_s": max(0.0, now - path.stat().st_mtime)}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _short(text: str) -> str:
    first = text.split("\n", 1)[0]
    return first if len(first) <= _SHOWN else f"{first[: _SHOWN - 4]} ..."


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """For people: one fact a line."""
    facts = {
        "run": status["run"],
        "state": f"{status['state']}: {status['reason']}" if status["reason"] else status["state"],
        "last sign": _sign_text(status),
        "step": _step_text(status),
        "speed": _speed_text(status),
        "checkpoint": "none yet",
        "quarantine": _counted(status["quarantine"]["count"], "sample", _sample(status["quarantine"]["newest"])),
        "alarms": _counted(status["alarms"]["count"], "warning", status["alarms"]["newest"]),
        "left out": f"{status['skipped_steps']} whole steps, a part of {status['mended_steps']} more",
    }
    if (last := status["checkpoint"]) is not None:
        facts["checkpoint"] = f"step {last['step']}, {duration(last['age_s'])} ago"
    return [f"{name:<11} {fact}" for name, fact in facts.items() if fact]


def _sign_text(status: Mapping[str, Any]) -> str:
    if status["last_sign_s"] is None:
        return ""
    where = f", {status['host']}, process {status['pid']}, {status['ranks']} rank(s)" if status["host"] else ""
    return f"{duration(status['last_sign_s'])} ago{where}"


def _step_text(status: Mapping[str, Any]) -> str:
    step, total = status["step"], status["total_steps"]
    if step is None:
        return "none yet"
    return f"{step}" if not total else f"{step} of {total} ({step / total:.0%})"


def _speed_text(status: Mapping[str, Any]) -> str:
    parts = []
    if status["steps_per_second"]:
        parts.append(f"{status['steps_per_second']:.3g} steps/s")
    if status["tokens_per_second"]:
        parts.append(f"{status['tokens_per_second']:,.0f} tokens/s")
    if status["seconds_left"] is not None:
        parts.append(f"{duration(status['seconds_left'])} left")
    return ", ".join(parts)


def _counted(count: int, name: str, newest: str | None) -> str:
    if not count:
        return "none"
    return f"{count} {name}{'s' if count > 1 else ''}; newest: {newest}"


def _sample(newest: Mapping[str, Any] | None) -> str | None:
    return None if newest is None else f"{newest['file']} {newest['key']} {newest['index']}: {newest['reason']}"
