"""Named points, and faults at them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moemm import points
from moemm.errors import ConfigError
from moemm.points import POINTS, SAVE, place, point
from moemm.testing.faults import KINDS, FaultError, armed, parse

ROOT = Path(__file__).parents[2]


def test_a_point_notes_the_place_and_does_nothing_else() -> None:
    before = place()
    point("forward", step=7)
    point("dispatch")
    assert (place().name, place().step, place().number) == ("dispatch", 7, before.number + 2)
    assert place().since <= time.monotonic()


def test_a_thread_passes_points_and_the_process_stays_where_it_is() -> None:
    point("forward", step=3)
    with armed("erofs:save.file@step=3") as (fault,):
        with ThreadPoolExecutor(1) as aside, pytest.raises(OSError, match="Read-only"):
            aside.submit(point, "save.file").result()
        assert fault.passes == 1
    assert (place().name, place().step) == ("forward", 3)


def test_every_point_is_passed_somewhere() -> None:
    text = "".join(path.read_text() for path in (ROOT / "moemm").rglob("*.py") if path.name != "points.py")
    passed = set(re.findall(r'point\(\s*"([a-z._]+)"', text))
    assert passed == set(POINTS) - {"start"}
    assert len(SAVE) == 10


def test_a_fault_waits_for_its_step_its_rank_and_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with armed("enospc:save.file@step=4,rank=1,nth=2,times=2") as (fault,):
        point("save.file", step=3)
        point("save.folder", step=4)
        point("save.file")
        assert fault.passes == 1
        for _ in range(2):
            with pytest.raises(OSError, match="No space left") as caught:
                point("save.file")
            assert caught.value.errno == errno.ENOSPC
        point("save.file")
        monkeypatch.setenv("RANK", "0")
        point("save.file")
        assert fault.passes == 4
    monkeypatch.setenv("RANK", "1")
    point("save.file", step=4)
    assert points._listeners == []


def test_several_faults_at_once() -> None:
    with armed("raise:data@step=2; erofs:log"):
        with pytest.raises(FaultError, match="raise:data@step=2"):
            point("data", step=2)
        with pytest.raises(OSError, match="Read-only"):
            point("log")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kill:save.renam", r"no point 'save.renam'; did you mean save.rename\?[\s\S]*points: start, data, forward"),
        ("kil:data", r"no kind 'kil'; did you mean kill\?[\s\S]*kinds: kill, kill_later, stop"),
        ("data", "no kind 'data'"),
        ("kill:", "no point ''"),
        ("kill:data@step=x", "cannot read 'step=x'"),
        ("kill:data@when=3", "cannot read 'when=3'"),
    ],
)
def test_what_cannot_be_armed_lists_what_can(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse(text)
    assert "allowed:" in str(caught.value) and "unset MOEMM_FAULT" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -signal.SIGKILL), ("segfault", -signal.SIGSEGV), ("exit0", 0), ("raise", 1), ("term", -signal.SIGTERM)],
)
def test_kinds_that_end_a_process(kind: str, code: int) -> None:
    assert kind in KINDS
    program = "from moemm.points import *; arm_from_environment(); point('data'); import sys; sys.exit(9)"
    environment = {**os.environ, "MOEMM_FAULT": f"{kind}:data", "PYTHONPATH": str(ROOT), "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert f"MOEMM_FAULT is set, so this run will be broken on purpose: {kind}:data" in done.stderr


def test_without_the_variable_no_test_helper_is_loaded() -> None:
    program = "import sys; from moemm.points import *; arm_from_environment(); point('data'); print(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "MOEMM_FAULT"}
    loaded = subprocess.run(
        [sys.executable, "-c", program], env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    ).stdout.split()
    assert "moemm.points" in loaded and not [name for name in loaded if name.startswith("moemm.testing")]


def test_a_point_costs_next_to_nothing() -> None:
    began = time.perf_counter()
    for _ in range(10_000):
        point("dispatch")
    assert (time.perf_counter() - began) / 10_000 < 2e-5
