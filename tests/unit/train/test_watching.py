"""Who is told how a run goes: heartbeat, Prometheus, Weights & Biases, MLflow; and that none of them can end it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moemm.cli.app import main
from moemm.config import LoadedConfig
from moemm.errors import ConfigError, HealthError
from moemm.observe.prometheus import HELP, PrometheusFile
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.status import run_status
from moemm.testing.tiny import tiny_config
from moemm.train import train
from moemm.train.callbacks import Callback, SinkCallback

pytestmark = pytest.mark.usefixtures("alone")
LINE = re.compile(r'moemm_(\w+)\{(\w+="(?:[^"\\\n]|\\.)*"(?:,\w+="(?:[^"\\\n]|\\.)*")*)\} (\S+)')


class Recorder(ModuleType):
    """A module whose every function takes down how it was called. Objects that it returns do the same."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        super().__init__(name)
        self.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        self.calls, self.summary = calls, {}
        self.id, self.info = "n7", SimpleNamespace(run_id="n7")

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            return self

        return call


class Fail(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, *, stopping: bool) -> None:
        if trainer.step == self.step:
            raise HealthError("broken\nby a test")


def run(data: Path, folder: Path, observe: dict[str, Any], **train_keys: Any) -> LoadedConfig:
    keys = {"output": str(folder), "steps": 4, "log_every": 1, "eval_every": 2, "checkpoint": {"every": 2}}
    return tiny_config(data, observe=observe, train={**keys, **train_keys})


def metrics_of(text: str) -> dict[tuple[str, str], float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            found[match[1], match[2]] = float(match[3])
    return found


def test_a_run_is_watched_from_its_start_to_its_end(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, Recorder(name, calls))
    file = tmp_path / "node" / "moemm.prom"
    observe = {"prometheus": str(file), "wandb": "project", "mlflow": "experiment", "heartbeat_s": 0.001}
    folder, states = tmp_path / "run", []

    class See(Callback):
        def on_phase(self, phase: str, step: int) -> None:
            states.append((run_status(folder)["state"], run_status(folder)["phase"], run_status(folder)["step"]))

    loaded = run(tiny_data, folder, observe)
    train(loaded, extra_callbacks=[See()])
    label = f'run="{loaded.config.name}"'
    capsys.readouterr()
    expected = [("evaluate", 2), ("save", 2), ("save", 4), ("evaluate", 4), ("evaluate", 4)]
    assert states == [("running", *one) for one in expected]
    assert main(["status", str(folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 4, 4)
    values = metrics_of(file.read_text())
    assert values["running", label] == 0 and values["step", label] == 4
    assert ("task_loss", f'{label},task="shapes"') in values
    assert ("score", f'{label},task="tones",split="test",metric="accuracy"') in values

    by_name: dict[str, list[tuple[Any, ...]]] = {}
    for name, *rest in calls:
        by_name.setdefault(name, []).append(tuple(rest))
    (init,) = by_name["init"]
    assert init[1] == init[1] | {
        "project": "project",
        "name": loaded.config.name,
        "dir": str(folder),
        "id": None,
        "resume": "allow",
    }
    assert init[1]["config"]["model"]["dim"] == 16
    assert by_name["define_metric"] == [(("*",), {"step_metric": "step"})]
    assert [one[0][0]["step"] for one in by_name["log"]] == [1, 2, 2, 3, 4, 4, 4]
    assert {"train/loss", "loss/shapes", "speed/tokens_per_second"} <= set(by_name["log"][0][0][0])
    assert by_name["finish"] == [((), {})]
    assert by_name["set_experiment"] == [(("experiment",), {})]
    assert by_name["start_run"] == [((), {"run_id": None, "run_name": loaded.config.name})]
    assert all(len(one[0][0]) <= 100 for one in by_name["log_params"])
    assert {key: one[0][0][key] for one in by_name["log_params"] for key in one[0][0]}["model.dim"] == 16
    assert [one[1]["step"] for one in by_name["log_metrics"]] == [1, 2, 2, 3, 4, 4, 4]
    assert by_name["end_run"] == [(("FINISHED",), {})]


def test_a_run_that_fails_says_so_and_a_resume_goes_on_with_the_same_tracks(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, Recorder(name, calls))
    folder = tmp_path / "run"
    loaded = run(tiny_data, folder, {"wandb": "p", "mlflow": "e"})
    with pytest.raises(HealthError):
        train(loaded, extra_callbacks=[Fail(3)])
    found = run_status(folder)
    assert (found["state"], found["reason"], found["step"]) == ("failed", "HealthError: broken", 3)
    assert main(["status", str(folder)]) == 1
    assert [one for one in calls if one[0] == "end_run"] == [("end_run", ("KILLED",), {})]
    calls.clear()
    train(loaded, resume=True)
    assert run_status(folder)["state"] == "finished"
    first = {name: named for name, _, named in reversed(calls)}
    assert first["init"]["id"] == "n7" and first["start_run"] == {"run_id": "n7", "run_name": None}
    assert "log_params" not in first


def test_a_tracker_that_breaks_ends_nothing(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def metrics(self, metrics: Metrics) -> None:
            raise ConnectionError("no\nnetwork")

        def close(self) -> None:
            raise AssertionError("it is told no more")

    callback = SinkCallback("observe.test", lambda info: Broken())  # type: ignore[arg-type,return-value]
    summary = train(run(tiny_data, tmp_path / "run", {}), extra_callbacks=[callback])
    assert summary["steps"] == 4
    told = "warning: observe.test is told no more, training goes on: ConnectionError: no network"
    assert capsys.readouterr().out.count(told) == 1
    assert run_status(tmp_path / "run")["alarms"] == {"count": 1, "newest": told}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_is_an_error_before_anything_else(
    name: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    with pytest.raises(ConfigError, match=rf"observe\.{name} is set[\s\S]*pip install {name}"):
        train(run(tiny_data, tmp_path / "run", {name: "p"}))
    assert not (tmp_path / "run").exists()


def test_prometheus_lines_are_what_the_format_asks_for(tmp_path: Path) -> None:
    info = RunInfo(name='a "b"\\\n', folder=".", tasks=(), modalities=(), start_step=3, total_steps=9)
    file = PrometheusFile(tmp_path / "x.prom", info, clock=lambda: 5.0)
    file.message("step 3  warning: something")
    file.message("nothing")
    file.metrics(
        Metrics(
            step=4, total_steps=9, loss=float("inf"), router_loss=0.0, losses={"t": 0.5}, accuracy={}, lr=0.1,
            grad_norm=None, tokens_per_second=1.0, seconds=1.0, seconds_left=2.0,
        )
    )  # fmt: skip
    text = (tmp_path / "x.prom").read_text()
    run_label = r'run="a \"b\"\\\n"'
    values = metrics_of(text)
    assert values["step", run_label] == 4 and values["loss", run_label] == float("inf")
    assert values["warnings_total", run_label] == 1 and values["last_report_timestamp_seconds", run_label] == 5.0
    assert f"moemm_gradient_norm{{{run_label}}} NaN" in text
    assert text.endswith("\n") and "# TYPE moemm_warnings_total counter" in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and {name.removeprefix("moemm_") for name in names} <= set(HELP)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.prom"]
