"""DeepSpeed's section, and our list of its keys against the installed DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from moemm.config import deepspeed_keys as keys
from moemm.config import deepspeed_section, from_dict
from moemm.config.deepspeed import USED_AS
from moemm.config.fields import all_fields

PROBE = """
import json
from deepspeed.runtime import config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

seen = set()

class Recorder(dict):  # notes every key that DeepSpeed asks for
    def __contains__(self, key):
        seen.add(key)
        return dict.__contains__(self, key)
    def __getitem__(self, key):
        seen.add(key)
        return dict.__getitem__(self, key)
    def get(self, key, default=None):
        seen.add(key)
        return dict.get(self, key, default)
    def keys(self):
        return KeyRecorder(dict.keys(self))
    def __copy__(self):
        return Recorder(self)

class KeyRecorder:
    def __init__(self, keys):
        self.known = keys
    def __contains__(self, key):
        seen.add(key)
        return key in self.known
    def __iter__(self):
        return iter(self.known)

batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4}
config.DeepSpeedConfig(Recorder(batch))
config.DeepSpeedConfig(Recorder(batch | {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
zero = sorted(field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items())
removed = sorted(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
accepted = config.DeepSpeedConfig(json.loads(%r))
print("\\n" + json.dumps({"top": sorted(seen - set(removed)), "zero": zero, "removed": removed,
    "clip": accepted.gradient_clipping, "stage": accepted.zero_optimization_stage}))
"""


def config_with(**sections: Any) -> Any:
    values = {"data": {"tasks": [{"name": "a", "file": "a.h5"}]}, "train": {"epochs": 1}}
    for name, keys_of in sections.items():
        values[name] = values.get(name, {}) | keys_of
    return from_dict(values, origin="a test")


def test_section() -> None:
    config = config_with(
        train={"batch_size": 48, "accumulation": 3, "clip": 0.5, "precision": "bf16"},
        deepspeed={"zero_stage": 2, "extra": {"zero_optimization": {"overlap_comm": True}, "dump_state": True}},
    )
    section = deepspeed_section(config, world_size=4)
    assert section["train_batch_size"] == 48
    assert section["train_micro_batch_size_per_gpu"] * section["gradient_accumulation_steps"] * 4 == 48
    assert section["gradient_clipping"] == 0.5 and section["bf16"] == {"enabled": True}
    assert section["zero_optimization"]["stage"] == 2 and section["zero_optimization"]["overlap_comm"] is True
    assert section["dump_state"] is True
    assert "optimizer" not in section and "scheduler" not in section
    assert config.deepspeed.extra == {"zero_optimization": {"overlap_comm": True}, "dump_state": True}


def test_clipping_is_always_written() -> None:
    assert deepspeed_section(config_with(train={"clip": 0}), world_size=1)["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sections_hold_known_keys_only(stage: int) -> None:
    section = deepspeed_section(config_with(deepspeed={"zero_stage": stage}), world_size=1)
    assert set(section) <= keys.PASSED | set(keys.OWNED)
    assert set(section["zero_optimization"]) <= keys.ZERO_PASSED | set(keys.ZERO_OWNED)


def test_explanations_name_keys_that_exist() -> None:
    assert set(USED_AS) <= {info.path for info in all_fields()}


def test_lists_do_not_overlap() -> None:
    groups = [keys.PASSED, set(keys.OWNED), set(keys.UNUSED), keys.REMOVED]
    assert sum(map(len, groups)) == len(set().union(*groups))
    zero = [keys.ZERO_PASSED, set(keys.ZERO_OWNED), keys.ZERO_REFUSED]
    assert sum(map(len, zero)) == len(set().union(*zero))


def test_our_lists_are_those_of_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    section = deepspeed_section(config_with(deepspeed={"zero_stage": 3}, train={"clip": 0.25}), world_size=1)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE % json.dumps(section)], capture_output=True, text=True, env=environment, check=True
    )
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(theirs["top"]) == keys.PASSED | set(keys.OWNED) | set(keys.UNUSED)
    assert set(theirs["removed"]) == keys.REMOVED
    assert set(theirs["zero"]) == keys.ZERO_PASSED | set(keys.ZERO_OWNED) | keys.ZERO_REFUSED
    assert (theirs["clip"], theirs["stage"]) == (0.25, 3)
