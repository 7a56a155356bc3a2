"""The doctor: what it says of a healthy machine, and of each thing that can be wrong with one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from moemm.cli import app
from moemm.observe import checkup, doctor, selftest
from moemm.observe.finding import Finding


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return doctor.diagnose()


def test_every_check_reports(findings: list[Finding]) -> None:
    assert {name for name, _ in doctor.CHECKS} == {finding.name for finding in findings}
    assert all(finding.advice for finding in findings if finding.status == "problem")


def test_this_machine_can_train(findings: list[Finding]) -> None:
    status = {finding.name: (finding.status, finding.text) for finding in findings}
    for name in ("versions", "deepspeed", "self test: ops", "self test: training"):
        assert status[name][0] == "ok", status[name]


def test_json(findings: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    code = app.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] == doctor.healthy(findings) == (code == 0)
    assert [entry["name"] for entry in report["findings"]] == [finding.name for finding in findings]


def test_table_and_exit_code_of_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Finding(name="lock", status="problem", text="[old] lock", advice="rm it")
    monkeypatch.setattr(doctor, "diagnose", lambda: [problem])
    assert app.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "[old] lock" in text and "-> rm it" in text and "1 problem" in text


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("no such luck")

    monkeypatch.setattr(doctor, "CHECKS", (("thing", broken),))
    (finding,) = doctor.diagnose()
    assert (finding.name, finding.status, finding.text) == ("thing", "problem", "OSError: no such luck")


def test_old_and_new_build_locks(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    old = tmp_path / "py311_cpu" / "old" / "lock"
    os.utime(old, (time.time() - 1800, time.time() - 1800))
    new_finding, old_finding = checkup.build_locks(tmp_path)
    assert new_finding.status == "note"
    assert old_finding.status == "problem" and "30 minutes" in old_finding.text
    assert old_finding.advice == f"rm {old}" and old_finding.data["path"] == str(old)


def test_no_locks(tmp_path: Path) -> None:
    assert checkup.build_locks(tmp_path / "nowhere")[0].status == "ok"


def test_locks_are_sought_where_torch_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert str(tmp_path) in checkup.build_locks()[0].text


@pytest.mark.parametrize(
    ("modules", "status", "part"),
    [
        ((), "note", "not installed"),
        (("megablocks",), "note", "without its ops"),
        (("megablocks", "megablocks_ops"), "note", "without its ops"),
        (("megablocks", "megablocks_ops", "grouped_gemm"), "ok", "with its ops"),
    ],
)
def test_megablocks(modules: tuple[str, ...], status: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if name in modules else None)
    (finding,) = checkup.megablocks()
    assert finding.status == status and part in finding.text


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "_version", lambda name: None if name in ("h5py", "deepspeed") else "1.0")
    (finding,) = checkup.versions()
    assert finding.status == "problem" and finding.text == "missing: deepspeed, h5py"
    assert finding.advice is not None and finding.advice.endswith("pip install deepspeed h5py")


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda folder: types.SimpleNamespace(total=2**26, free=2**20))
    (finding,) = checkup.shared_memory(tmp_path)
    assert finding.status == "problem" and "1 MiB free of 64 MiB" in finding.text
    assert checkup.shared_memory(tmp_path / "nowhere")[0].status == "note"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup.shutil, "which", lambda name: None)
    (finding,) = checkup.compilers()
    assert finding.status == "note" and finding.data == {"c++": None, "nvcc": None, "ninja": None}


def test_deepspeed_that_hangs_or_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", 90)

    monkeypatch.setattr(checkup.subprocess, "run", hang)
    assert "takes more than" in checkup.deepspeed_engine()[0].text
    broken = types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: no\n")
    monkeypatch.setattr(checkup.subprocess, "run", lambda *arguments, **options: broken)
    (finding,) = checkup.deepspeed_engine()
    assert finding.status == "problem" and finding.text == "cannot be imported: ImportError: no"


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checkup, "_first_line", lambda command: "GPU 0: Thing (UUID: x)")
    (finding,) = checkup.gpus()
    assert finding.status == "problem" and "GPU 0: Thing, but torch" in finding.text


@pytest.mark.parametrize("op", ["route_topk", "plan", "permute", "grouped_mlp", "combine", "moe_ffn"])
def test_an_op_that_disagrees_is_noticed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("moemm.ops")
    assert selftest.ops_agree()[0].status == "ok"
    right = getattr(ops.reference, op)

    def wrong(*arguments: Any, **options: Any) -> Any:
        out = right(*arguments, **options)
        return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out * 1.01

    monkeypatch.setattr(ops, op, wrong)
    (finding,) = selftest.ops_agree()
    assert finding.status == "problem" and "differ" in finding.text


@pytest.mark.parametrize("op", ["route_topk", "permute", "grouped_mlp", "combine", "moe_ffn"])
def test_a_gradient_that_disagrees_is_noticed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("moemm.ops")
    right = getattr(ops.reference, op)

    def scaled(out: Any) -> Any:
        """The same value, 1.01 times the gradient."""
        return out.detach() + 1.01 * (out - out.detach()) if out.requires_grad else out

    def wrong(*arguments: Any, **options: Any) -> Any:
        out = right(*arguments, **options)
        return tuple(map(scaled, out)) if isinstance(out, tuple) else scaled(out)

    monkeypatch.setattr(ops, op, wrong)
    assert selftest.ops_agree()[0].status == "problem"


def test_ops_in_plain_pytorch_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("moemm.ops")
    info = {"live": "reference", "why": "not built", "cuda": False, "why_no_cuda": "not built"}
    monkeypatch.setattr(ops, "backend_info", lambda: info)
    (finding,) = checkup.ops()
    assert finding.status == "note" and finding.advice is not None


def test_training_that_does_not_learn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_train_tiny", lambda num_steps: [0.7, float("nan"), float("nan")])
    assert selftest.three_steps()[0].status == "problem"
