"""Files that are missing, empty, broken or hostile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moemm.config import load_config
from moemm.config.yaml_source import MAX_BYTES, read_value
from moemm.errors import ConfigError

Write = Callable[..., Path]
TASKS = "data: {tasks: [{name: a, file: a.h5}]}\ntrain: {epochs: 1}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)

REFUSED = {
    "empty": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "null": ("null\n", "holds nothing"),
    "a list": ("- a\n- b\n", "holds a list; allowed: a mapping"),
    "text": ("just words\n", "holds text; allowed: a mapping"),
    "a number": ("3\n", "holds one int"),
    "not YAML": ("data: [1, 2\nmodel: }\n", "is not YAML: line 2, column"),
    "a tab": ("data:\n\ttasks: []\n", "is not YAML: line 2, column 1"),
    "binary": ("\x00\x01\x02", "is not YAML"),
    "two documents": (f"{TASKS}---\n{TASKS}", "is not YAML"),
    "duplicate key": (f"{TASKS}train: {{steps: 1}}\n", "train: given twice, in lines 2 and 3"),
    "duplicate key inside": ("train: {lr: 1.0, lr: 2.0}\n", r"train.lr: given twice, in lines 1 and 1"),
    "merge key": (f"{TASKS}model: {{<<: {{dim: 8}}}}\n", "a key must be a plain name"),
    "a list as a key": (f"{TASKS}? [a, b]\n: 1\n", "a key must be a plain name"),
    "an object": (f"{TASKS}name: !!python/object/apply:os.system ['true']\n", "the tag .*os.system is not allowed"),
    "an object without arguments": (f"{TASKS}name: !!python/name:os.system\n", "is not allowed"),
    "a tag of one's own": (f"{TASKS}model: !thing {{dim: 8}}\n", "the tag !thing is not allowed"),
    "a date": (f"{TASKS}name: !!timestamp 2020-01-01\n", "is not allowed"),
    "bytes": (f"{TASKS}name: !!binary aGVsbG8=\n", "is not allowed"),
    "a tag that lies": (f"{TASKS}train: {{steps: !!int many}}\n", "'many' cannot be read as int"),
    "a number of 5,000 digits": (f"{TASKS}model: {{dim: {'9' * 5000}}}\n", "cannot be read as int"),
    "a bomb of anchors": (BOMB, "more than 20000 values once aliases are expanded"),
    "an alias inside itself": (f"{TASKS}model: &m {{experts: *m}}\n", "nested more than 32 deep"),
    "deep nesting": (f"{TASKS}model: {'[' * 60}{']' * 60}\n", "nested more than 32 deep"),
    "very deep nesting": (f"{TASKS}model: {'[' * 20000}\n", ":3: nested more than 32 deep"),
    "too large": ("#" * (MAX_BYTES + 1), "larger than 64 KiB"),
    "many values": ("model: [" + "1," * 30_000 + "1]\n", "more than 20000 values"),
    "an unknown alias": (f"{TASKS}model: *nowhere\n", "is not YAML: line 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, write: Write) -> None:
    content, message = REFUSED[name]
    path = write(content)
    start = time.process_time()
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert time.process_time() - start < 2
    assert str(path) in str(caught.value)


def test_a_missing_file_names_what_is_near(write: Write, tmp_path: Path) -> None:
    write(TASKS, "quickstart.yaml")
    write(TASKS, "other.yaml")
    write("", "notes.txt")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "quikstart.yaml")
    message = str(caught.value)
    assert f"{tmp_path}/quikstart.yaml: no such config file" in message
    assert "holds other.yaml, quickstart.yaml" in message
    assert f"did you mean {tmp_path}/quickstart.yaml?" in message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    with pytest.raises(ConfigError, match=r"the folder .*recipse does not exist\n.*\n  did you mean .*/recipes\?"):
        load_config(tmp_path / "recipse" / "a.yaml")


def test_a_relative_path_names_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"relative to the working directory {tmp_path}"):
        load_config("a.yaml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; a YAML file is wanted"):
        load_config(tmp_path)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_file(path: str) -> None:
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(path)


def test_broken_encoding_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"name: \xff\xfe\xfa\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e6", 1e6), (".5", 0.5), ("-1", -1), ("012", 12), ("0x10", 16), ("0o17", 15),
        ("1_000", "1_000"),
        ("yes", "yes"), ("on", "on"), ("true", True), ("null", None), ("~", None), ("", None), ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"), ("[4, 4]", [4, 4]), ("{a: b}", {"a": "b"}), ("'3'", "3"), (".inf", float("inf")),
        ("-.inf", float("-inf")), ("+3", 3), ("3.", 3.0), ("nan", "nan"), ("{1: a, true: b}", {"1": "a", "true": "b"}),
    ],
)  # fmt: skip
def test_plain_values(text: str, value: object) -> None:
    read = read_value(text, name="a test")
    assert read == value and type(read) is type(value)


def test_anchors_are_fine_where_they_are_small(write: Write) -> None:
    path = write(f"{TASKS}modalities: {{x: &p {{patch: [2]}}, y: *p}}\n")
    assert load_config(path).config.modalities["y"].patch == [2]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:{}[],&*!|>-?#'\"%@` \n\t~<1.e\x00é", max_size=60))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        value = read_value(text, name="a test")
        assert isinstance(value, str | int | float | list | dict | None), "plain data, never another object"


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["data", "tasks", "model", "train", "dim", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_mapping_is_refused_cleanly(values: object) -> None:
    from moemm.config import from_dict

    mapping = values if isinstance(values, dict) else {"model": values}
    with pytest.raises(ConfigError):
        from_dict(mapping, origin="a test")
