"""The commit protocol in one process, with files of a few bytes in place of a model's."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moemm.checkpoint import (
    Keep,
    Manifest,
    check_compatible,
    commit,
    find_newest,
    newest_complete,
    read_manifest,
    verify,
)
from moemm.checkpoint import commit as commit_function
from moemm.checkpoint.files import write_text_atomic
from moemm.checkpoint.resume import changed_keys
from moemm.config import Config, DataConfig, DeepSpeedConfig, ModelConfig, TaskConfig, TrainConfig, to_dict
from moemm.distributed import World
from moemm.errors import CheckpointError

COMMIT = __import__("moemm.checkpoint.commit", fromlist=["commit"])


def a_config(**options: Any) -> Config:
    return Config(data=DataConfig(tasks=[TaskConfig(name="t", file="t.h5")]), **options)


def save(
    root: Path, step: int, *, keep: int = 2, every: int = 0, content: bytes = b"weights", config: Config | None = None
) -> Path:
    def write(folder: Path) -> list[Path]:
        (folder / "optimizer_00000").mkdir()
        for name in ("model.bin", "optimizer_00000/shard.bin"):
            (folder / name).write_bytes(content + name.encode())
        return [folder / "model.bin", folder / "optimizer_00000/shard.bin"]

    def describe(files: dict[str, dict[str, Any]]) -> Manifest:
        values = to_dict(config or a_config())
        return Manifest(
            step=step, world_size=1, zero_stage=0, config=values, config_hash="0" * 12, versions={},
            sampler={"step": step}, expert_map=None, files=files,
        )  # fmt: skip

    return commit_function(root, step=step, write=write, describe=describe, world=World(), keep=Keep(keep, every))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_holds_what_was_written_and_verifies(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    assert folder == tmp_path / "step_000020"
    assert names(tmp_path) == ["latest", "step_000020"]
    manifest = verify(folder)
    assert manifest.step == 20 and set(manifest.files) == {"model.bin", "optimizer_00000/shard.bin"}
    assert manifest.files["model.bin"]["size"] == len(b"weightsmodel.bin")
    assert newest_complete(tmp_path).skipped == ()


def test_older_ones_and_left_overs_go_once_the_new_one_stands(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_000004.tmp").mkdir()
    (tmp_path / "step_000003.old").mkdir()
    save(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step_000003", "step_000005"]


def test_some_stay_for_ever(tmp_path: Path) -> None:
    for step in range(1, 12):
        save(tmp_path, step, keep=2, every=4)
    assert names(tmp_path) == ["latest", *(f"step_{step:06d}" for step in (4, 8, 10, 11))]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, content=b"other")
    verify(tmp_path / "step_000001")
    assert names(tmp_path) == ["latest", "step_000001"]
    assert (tmp_path / "step_000001" / "model.bin").read_bytes().startswith(b"other")


def test_checkpoints_of_steps_ahead_stay(tmp_path: Path) -> None:
    """After going back, older steps are saved again: what lies ahead is not theirs to remove."""
    save(tmp_path, 9)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["latest", "step_000003", "step_000009"]


class Crash(BaseException):
    """Stands for kill -9: nothing catches it."""


POINTS: list[tuple[Any, str]] = [
    (COMMIT, "_fresh"),
    (COMMIT, "_write_own"),
    (COMMIT, "sync_file"),
    (COMMIT, "sha256_file"),
    (Manifest, "write"),
    (COMMIT.os, "rename"),
    (COMMIT, "verify"),
    (COMMIT, "write_text_atomic"),
    (COMMIT, "superseded"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
def test_a_crash_at_any_point_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
) -> None:
    save(tmp_path, 1, keep=1)
    real: Callable[..., Any] = getattr(owner, name)

    def crash(*arguments: Any, **options: Any) -> Any:
        if after:
            real(*arguments, **options)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(Crash):
            save(tmp_path, 2, keep=1)
    found = newest_complete(tmp_path)
    published = name in ("verify", "write_text_atomic", "superseded") or (name == "rename" and after)
    assert found.manifest.step == (2 if published else 1)
    assert all("was never completed" in reason for _, reason in found.skipped)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["latest", "step_000003"], "the next save leaves nothing over"


@pytest.mark.parametrize(("owner", "name"), POINTS[:6], ids=[name for _, name in POINTS[:6]])
def test_a_failure_is_an_error_and_leaves_the_last_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(CheckpointError, match=r"step_000002 was not written \(rank 0: .*No space left"):
            save(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def link(path: Path) -> None:
    kept = path.with_name("elsewhere")
    path.rename(kept)
    path.symlink_to(kept)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "cut short"),
        (flip, "wrong sha256"),
        (Path.unlink, "is missing"),
        (link, "is missing"),
    ],
)
@pytest.mark.parametrize("name", ["model.bin", "optimizer_00000/shard.bin"])
def test_damage_is_found_named_and_passed_by(
    tmp_path: Path, damage: Callable[[Path], None], said: str, name: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step_000002" / name)
    found = newest_complete(tmp_path)
    assert found.manifest.step == 1
    assert [skipped for skipped, _ in found.skipped] == ["step_000002"]
    assert f"step_000002/{name}" in found.skipped[0][1] and said in found.skipped[0][1]


def test_every_bit_of_a_small_checkpoint_counts(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]:
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(changed))
            with pytest.raises(CheckpointError):
                verify(folder)
        path.write_bytes(content)
    verify(folder)


def test_swapped_files_and_extra_files_are_found(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2, content=b"WEIGHTS")
    shutil.copy(first / "model.bin", second / "model.bin")
    with pytest.raises(CheckpointError, match="wrong sha256"):
        verify(second)
    (first / "optimizer_00000" / "more.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer_00000/more.bin is not in the manifest"):
        verify(first)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.update(format=99), "has format 99"),
        (lambda values: values.pop("world_size"), "lacks or adds keys: world_size"),
        (lambda values: values.update(run="me"), "lacks or adds keys: run"),
        (lambda values: values["files"].update({"../x": {"size": 0}}), "outside its folder"),
        (lambda values: values["files"].update({"/etc/passwd": {"size": 0}}), "outside its folder"),
        (lambda values: values["files"].update({"y": 3}), "y must have size and sha256"),
        (lambda values: values.update(files=[]), "files must be"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"has format 99|does not match its own sha256"):
        read_manifest(path.parent)
    del values["sha256"]
    text = json.dumps(values, sort_keys=True)
    path.write_text(json.dumps({**values, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises(CheckpointError, match=said):
        read_manifest(path.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_manifests_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"step_000001/manifest.json"):
        read_manifest(path.parent)


def test_latest_alone_is_never_trusted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").write_text("step_000007\n")
    assert newest_complete(tmp_path).manifest.step == 1
    (tmp_path / "step_000007").mkdir()
    found = newest_complete(tmp_path)
    assert found.manifest.step == 1 and "never completed" in found.skipped[0][1]


def test_none_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is none at all.*\nTrain anew"):
        newest_complete(tmp_path)


def check(new: Config, *, old: Config, root: Path) -> None:
    save(root, 1, config=old)
    find_newest(root, check=lambda manifest: check_compatible(manifest, new))


def test_what_may_change_between_save_and_resume(tmp_path: Path) -> None:
    train = TrainConfig(steps=9, lr=1.0, output="elsewhere")
    new = a_config(train=train, deepspeed=DeepSpeedConfig(zero_stage=2), name="other")
    check(new, old=a_config(), root=tmp_path)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (a_config(model=ModelConfig(dim=128)), "model.dim: was 64, is 128"),
        (a_config(train=TrainConfig(precision="bf16")), "train.precision: was 'fp32', is 'bf16'"),
    ],
)
def test_what_may_not(tmp_path: Path, new: Config, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        check(new, old=a_config(), root=tmp_path)


def test_another_format_says_who_wrote_it_and_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format": 1, "versions": {"moemm": "0.0.9"}}))
    said = r"has format 1, written by moemm 0.0.9; this version of moemm reads format 2: go on with moemm 0.0.9, or"
    with pytest.raises(CheckpointError, match=said):
        newest_complete(tmp_path)


def test_changed_keys_reach_into_lists_of_sections() -> None:
    old = {"a": {"b": [{"name": "x", "size": 1}]}, "c": [1, 2]}
    new = {"a": {"b": [{"name": "x", "size": 2}, {"name": "y"}]}, "c": [1, 3]}
    assert changed_keys(old, new) == {
        "a.b.0.size": "a.b.0.size: was 1, is 2",
        "c": "c: was [1, 2], is [1, 3]",
        "a.b.1.name": "a.b.1.name: was 'not there', is 'y'",
    }
    assert changed_keys(old, old) == {}


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text_atomic(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError):
            write_text_atomic(path, "new")
    assert path.read_text() == "old"


def test_exports() -> None:
    assert commit is commit_function
