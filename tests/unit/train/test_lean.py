"""A run starts without torch's compiler, and computes the same."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from moemm.config import save_config
from moemm.data.shared import held_open, open_shared
from moemm.observe.records import RunInfo
from moemm.testing.tiny import tiny_config
from moemm.train.lean import CollectFromHere, compile_when_called, mark_uncompiled, without_compiler

ROOT = Path(__file__).parents[3]
RUN = """
import gc, sys
from moemm.cli.app import main
code = main(sys.argv[1:])
print("compiler:", *sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules)))
import deepspeed
print("ops that DeepSpeed looked for:", vars(deepspeed.ops).get("__compatible_ops__"))
print("collector:", gc.isenabled(), gc.get_freeze_count() > 0)
sys.exit(code)
"""


def test_a_run_does_without_the_compiler(tiny_data: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "checkpoint": {"every": 1}, "output": "run"}
    save_config(tiny_config(tiny_data, train=train), tmp_path / "tiny.yaml")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, "train", "tiny.yaml"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "compiler:", "ops that DeepSpeed looked for: {'deepspeed_shm_comm': False}", "collector: True True"
    ]  # fmt: skip


def test_steps_hooks_and_states_are_those_of_the_optimizer() -> None:
    def trained(lean: bool) -> tuple[list[torch.Tensor], list[str]]:
        torch.manual_seed(0)
        layer, seen = nn.Linear(4, 3), []
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        if lean:
            mark_uncompiled()
            optimizer = without_compiler(optimizer)
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        for _ in range(3):
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        states = [one for state in optimizer.state_dict()["state"].values() for one in state.values()]
        return [*layer.parameters(), *states], seen

    (plain, plain_seen), (lean, lean_seen) = trained(False), trained(True)
    assert lean_seen == plain_seen == ["before", "after"] * 3
    assert len(lean) == len(plain) and all(map(torch.equal, lean, plain))


def test_a_function_is_compiled_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def compiler(function: object, **options: object) -> object:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiler)

    @compile_when_called(dynamic=True)
    def double(x: float) -> float:
        return 2 * x

    plain = compile_when_called(lambda x: x + 1)
    assert not asked
    assert [double(3.0), double(4.0), plain(1.0)] == [6.0, 8.0, 2.0]
    assert asked == [{"dynamic": True}, {}]


def test_the_collector_is_on_again_before_the_first_step() -> None:
    info = RunInfo(name="r", folder=".", tasks=(), modalities=(), start_step=0, total_steps=1)
    gc.disable()
    try:
        CollectFromHere().on_start(info)
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()


def test_files_that_are_held_open_are_opened_once(tiny_data: Path) -> None:
    path = str(sorted(tiny_data.glob("*.h5"))[0])
    with held_open():
        first = weakref.ref(open_shared(path))
        with held_open():
            pass
        assert first() is not None and open_shared(path) is first()
    assert first() is None
    again = weakref.ref(open_shared(path))
    assert again() is None  # nothing else holds it
