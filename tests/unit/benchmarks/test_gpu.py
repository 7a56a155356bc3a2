"""The GPU benchmarks on tiny shapes on the CPU: that they run, what they write, what they say without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record, tables
from benchmarks.gpu import few_cases, kernels, moe_layer, peers, timing
from benchmarks.record import Row
from moemm.errors import KernelError
from moemm.ops.backend import COMPILED

ROOT = Path(__file__).parents[3]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
needs_library = pytest.mark.skipif(not COMPILED, reason="moemm._C is not built")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


@needs_library
def test_kernels_measure_what_unmeasured_lists(results: Path) -> None:
    rows = kernels.measure(kernels.TINY, "cpu", rounds=2)
    assert all(row.value is not None and row.value > 0 for row in rows)
    wanted = kernels.unmeasured(kernels.TINY)
    assert [(row.metric, row.target) for row in rows] == [(row.metric, row.target) for row in wanted]


@pytest.mark.parametrize("case", moe_layer.TINY, ids=lambda case: case.name)
def test_the_layer_beside_peers(case: moe_layer.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "megablocks", "scattermoe"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = {row.metric: row for row in moe_layer.measure(case, "cpu", rounds=1)}
    assert list(rows) == [row.metric for row in moe_layer.unmeasured(case)]
    for name in ("moe_ffn", "loop over experts", "torch grouped_mm"):
        assert rows[f"dense / {name}"].value is not None
    for name in ("Hugging Face", "MegaBlocks", "ScatterMoE"):
        row = rows[f"dense / {name}"]
        assert row.value is None and row.note.startswith("ModuleNotFoundError")


def test_half_of_all_slots_go_to_one_expert_in_the_skewed_case() -> None:
    torch.manual_seed(0)
    for case in moe_layer.CASES:
        _, experts_TK = moe_layer.Case(
            tokens=4096, dim=8, width=8, experts=case.experts, top_k=case.top_k, skewed=case.skewed
        ).routing("cpu")
        share = (experts_TK == 0).float().mean().item()
        assert share == pytest.approx(0.5 if case.skewed else 1 / case.experts, abs=0.02)


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weights: peers.Weights) -> peers.Way:
        way = peers.loop(weights)
        return peers.Way(lambda *given: way.forward(*given) * 1.1, way.parameters)

    monkeypatch.setitem(peers.WAYS, "wrong", wrong)
    rows = moe_layer.measure(moe_layer.TINY[0], "cpu", rounds=1)
    assert rows[-1].value is None and "differs from the loop's by 0.1" in rows[-1].note
    monkeypatch.setitem(peers.WAYS, moe_layer.OURS, wrong)
    with pytest.raises(KernelError, match="differs from the loop's"):
        moe_layer.measure(moe_layer.TINY[0], "cpu", rounds=1)


def test_only_what_keeps_a_peer_from_running_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> peers.Way:
        raise error

    monkeypatch.setitem(peers.WAYS, "fails", lambda weights: fails(torch.OutOfMemoryError("no room")))
    assert moe_layer.measure(moe_layer.TINY[0], "cpu", rounds=1)[-1].note == "OutOfMemoryError: no room"
    monkeypatch.setitem(peers.WAYS, "fails", lambda weights: fails(KeyError("a mistake")))
    with pytest.raises(KeyError, match="a mistake"):
        moe_layer.measure(moe_layer.TINY[0], "cpu", rounds=1)


@without_cuda
@pytest.mark.parametrize("module", [kernels, moe_layer], ids=lambda module: module.__name__)
def test_without_a_device_nothing_is_measured_or_written(module: object, results: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no CUDA device.*--device cpu, which writes nothing"):
        module.main([])  # type: ignore[attr-defined]
    assert not list(results.iterdir())


def test_rows_without_values_are_written_and_shown(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "out").mkdir()
    monkeypatch.setenv("OUT", str(results / "out"))
    kernels.main(["--unmeasured"])
    assert "not measured" in capsys.readouterr().out
    written = json.loads((results / "out" / "gpu_kernels.json").read_text())
    assert all(row["value"] is None and row["ok"] is None for row in written["rows"])
    assert "| not measured | ≥ 0.800 |" in tables.markdown(written)


def test_the_cpu_writes_nothing(results: Path) -> None:
    chosen = timing.options(None, ["--device", "cpu"])
    timing.finish("gpu_kernels", [Row(case="c", metric="m", value=1.0)], chosen, seconds=1.0)
    assert not list(results.iterdir())


def test_a_note_stands_where_the_verdict_would() -> None:
    row = record.as_dict(Row(case="c", metric="m", value=None, target=0.85, note="no such package"))
    assert tables.cells(row) == ["c", "m", "not measured", "≥ 0.850", "no such package"]
    assert "note" not in record.as_dict(Row(case="c", metric="m", value=1.0))


def test_few_cases_agree_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    few_cases.main(["--device", "cpu"])
    assert "cases agree with the oracle on cpu" in capsys.readouterr().out


@without_cuda
def test_run_sh_says_that_nothing_can_be_checked_here() -> None:
    script = ROOT / "benchmarks" / "gpu" / "run.sh"
    assert os.access(script, os.X_OK)
    done = subprocess.run(
        [str(script)], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "nothing can be checked here" in done.stderr
