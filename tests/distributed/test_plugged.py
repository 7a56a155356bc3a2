"""Plugins on several ranks: each runs the files, and all refuse together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from moemm.testing.distributed import run_distributed
from moemm.testing.tiny import tiny_config

HERE = Path(__file__).parent
CODE = """
import moemm
from moemm.modalities.timeseries import TimeSeries

@moemm.register_modality("own")
class Own(TimeSeries):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loaded = tiny_config(
        tmp_path, modalities={"series": {"kind": "own"}}, deepspeed={"zero_stage": 3},
        train={"steps": 2, "batch_size": 8, "baselines": False, "output": str(tmp_path / "run")},
    )  # fmt: skip
    values = yaml.safe_load(loaded.path.read_text())
    loaded.path.write_text(yaml.safe_dump({**values, "plugins": ["own.py"]}))
    (tmp_path / "own.py").write_text(CODE)
    (tmp_path / "other.py").write_text(CODE + "# changed\n")
    (tmp_path / "broken.py").write_text(CODE + "1 / 0\n")
    return tmp_path


def job(name: str, **arguments: object) -> list[object]:
    home = {"XDG_CONFIG_HOME": os.path.join(str(arguments["folder"]), "home")}
    results = run_distributed(f"plugged:{name}", arguments=arguments, path=[HERE], environ=home)
    return [result.value for result in results]


def test_every_rank_runs_the_file(folder: Path) -> None:
    assert job("trained", folder=str(folder)) == [{"kind": "Own", "steps": 2}, {"kind": "Own", "steps": None}]


def test_ranks_with_other_code_refuse_together(folder: Path) -> None:
    first, second = job("refused", folder=str(folder), names=["own.py", "other.py"])
    assert "rank 1 read other code than rank 0" in str(first) and "rank 1 read other code" in str(second)


def test_one_rank_that_cannot_stops_all(folder: Path) -> None:
    for told in job("refused", folder=str(folder), names=["own.py", "broken.py"]):
        assert "broken.py:8 raised ZeroDivisionError" in str(told)
    assert not (folder / "run").exists()
