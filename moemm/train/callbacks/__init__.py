"""What happens around the steps: each callback is one file with named hook points."""

from moemm.train.callbacks.base import Callback
from moemm.train.callbacks.checkpointing import CheckpointingCallback
from moemm.train.callbacks.console import ConsoleCallback
from moemm.train.callbacks.heartbeat import HeartbeatCallback
from moemm.train.callbacks.jsonl import JsonLinesCallback
from moemm.train.callbacks.sink import SinkCallback, check_sinks, sinks
from moemm.train.callbacks.tensorboard import TensorBoardCallback

__all__ = [
    "Callback",
    "CheckpointingCallback",
    "ConsoleCallback",
    "HeartbeatCallback",
    "JsonLinesCallback",
    "SinkCallback",
    "TensorBoardCallback",
    "check_sinks",
    "sinks",
]
