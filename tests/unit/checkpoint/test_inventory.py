"""`moemm checkpoint list|verify|prune` on checkpoints of a few bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moemm.checkpoint import Keep, Manifest, commit
from moemm.checkpoint.inventory import inventory, superfluous
from moemm.cli.app import main
from moemm.distributed import World
from moemm.errors import CheckpointError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 to 5 of which 4 is torn and 3 has another byte; left-overs of 2 and 6."""
    root = tmp_path / "run" / "checkpoints"
    for step in range(1, 6):
        save(root, step)
    (root / "step_000004" / "file").write_bytes(b"cont")
    (root / "step_000003" / "file").write_bytes(b"contenT")
    for name in ("step_000002.old", "step_000006.tmp", "other", "step_x"):
        (root / name).mkdir()
    return tmp_path / "run"


def save(root: Path, step: int) -> None:
    def write(folder: Path) -> list[Path]:
        (folder / "file").write_bytes(b"content")
        return [folder / "file"]

    def describe(files: dict[str, dict[str, Any]]) -> Manifest:
        return Manifest(
            step=step, world_size=4, zero_stage=2, config={}, config_hash="", versions={"moemm": "7"}, sampler={},
            expert_map=None, files=files,
        )  # fmt: skip

    commit(root, step=step, write=write, describe=describe, world=World(), keep=Keep(9))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_0*"))


def test_list_says_what_is_there_without_reading_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == names(run)
    assert [name for name, entry in found.items() if not entry["complete"]] == [
        "step_000002.old",
        "step_000004",
        "step_000006.tmp",
    ]
    assert "has 4 bytes, not 7" in found["step_000004"]["problem"]
    first = found["step_000001"]
    assert (first["step"], first["world_size"], first["zero_stage"], first["weights_only"]) == (1, 4, 2, True)
    manifest = run / "checkpoints" / "step_000001" / "manifest.json"
    assert first["size"] == 7 + manifest.stat().st_size
    assert main(["checkpoint", "list", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines may be broken
    assert "complete, weights alone" in printed and "never completed, or is being written" in printed


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "step_000003/file has the wrong sha256" in " ".join(capsys.readouterr().out.split())
    for name in ("step_000002.old", "step_000006.tmp"):
        (run / "checkpoints" / name).rmdir()
    save(run / "checkpoints", 3)
    save(run / "checkpoints", 4)
    assert main(["checkpoint", "verify", str(run)]) == 0


def test_prune_keeps_the_newest_that_are_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    assert main(["checkpoint", "prune", str(run), "--keep", "2", "--dry-run"]) == 0
    assert names(run) == before and "would remove 4 of 7" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep", "2"]) == 0
    assert names(run) == ["step_000002", "step_000005", "step_000006.tmp"], "a newer one may be under way"
    assert (run / "checkpoints" / "other").exists() and (run / "checkpoints" / "step_x").exists()


def test_prune_keeps_every_nth(run: Path) -> None:
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--keep-every", "2"]) == 0
    assert names(run) == ["step_000002", "step_000005", "step_000006.tmp"]


def test_prune_takes_nothing_where_nothing_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 5):
        (run / "checkpoints" / f"step_{step:06d}" / "file").unlink()
    before = names(run)
    assert main(["checkpoint", "prune", str(run)]) == 4
    assert names(run) == before and "None of these checkpoints is complete" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        superfluous(inventory(run / "checkpoints", hashes=True), Keep(1))


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_no_run_and_no_checkpoint(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", verb, str(tmp_path / "none")]) == 4
    assert main(["checkpoint", verb, str(tmp_path)]) == 4
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--keep", "0"], ["--keep-every", "-1"], ["--keep", "many"]])
def test_numbers_that_mean_nothing(run: Path, options: list[str]) -> None:
    before = names(run)
    assert main(["checkpoint", "prune", str(run), *options]) == 2
    assert names(run) == before
