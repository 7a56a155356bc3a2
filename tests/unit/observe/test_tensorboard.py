"""What TensorBoard would show: the event files read back."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from routing_cases import EVEN, NAMES, report

from moemm.observe import tensorboard as module
from moemm.observe.heatmap import FORBIDDEN, draw_heatmap
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.tensorboard import TensorBoard

INFO = RunInfo(
    name="r", folder="f", tasks=("digits",), modalities=("image", "audio"), start_step=0, total_steps=9, routing=NAMES
)  # fmt: skip


def metrics(step: int, **changes: Any) -> Metrics:
    values = Metrics(
        step=step, total_steps=9, loss=1.5, router_loss=0.1, losses={"digits": 1.25}, accuracy={"digits": 0.5},
        lr=1e-3, grad_norm=2.0, tokens_per_second=10.0, seconds=3.0, seconds_left=65.0, routing=EVEN,
    )  # fmt: skip
    return replace(values, **changes)


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_scalars_say_names_and_survive_the_file(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, INFO)
    board.metrics(metrics(3))
    board.scores(3, "val", {"digits": {"metric": "auc", "value": 0.75}, "none": {"metric": "auc", "value": None}})
    board.close()
    events = read(tmp_path)
    value = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert value["train/loss"] == 1.5 and value["train/grad_norm"] == 2.0
    assert value["loss/digits"] == 1.25 and value["val_auc/digits"] == 0.75
    assert value["load/layer_1/routed_2"] == 0.25 and value["load/layer_3/routed_0"] == pytest.approx(5 / 8)
    assert value["evenness/layer_1/audio"] == 1.0 and value["dead_experts/layer_3"] == 0.0
    assert "evenness/layer_3/audio" not in value, "one allowed expert: there is nothing to be even"
    assert not [tag for tag in value if tag.startswith("dropped") or "none" in tag]
    assert {events.Scalars(tag)[0].step for tag in value} == {3}


def test_drops_and_dead_experts(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, INFO)
    found = report([[[4, 4, 0, 0], [4, 4, 0, 0]], [[4, 4, 0, 0], [8, 0, 0, 0]]], dropped=[[8, 8], [0, 0]])
    board.metrics(metrics(3, routing=found))
    board.close()
    events = read(tmp_path)
    assert events.Scalars("dropped_slots/layer_1")[0].value == 0.5
    assert events.Scalars("dead_experts/layer_1")[0].value == 2.0


def test_one_picture_a_layer_with_the_right_colours(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, INFO)
    board.metrics(metrics(3))
    board.close()
    events = read(tmp_path)
    assert events.Tags()["images"] == ["routing/layer_1", "routing/layer_3"]
    (event,) = events.Images("routing/layer_3")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert picture.shape == (event.height, event.width, 3)
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert FORBIDDEN in colours, "audio may not use three experts of layer 3"


def test_pictures_wait_until_the_last_ones_are_paid_for_but_the_end_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(np.arange(0.0, 1000.0, 1.0))  # each look at the clock takes a second
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    board = TensorBoard(tmp_path, INFO)
    for step in range(1, 10):
        board.metrics(metrics(step))
    board.close()
    assert [event.step for event in read(tmp_path).Images("routing/layer_1")] == [1, 9]


def test_charts_match_the_tags(tmp_path: Path) -> None:
    import re

    from tensorboard.plugins.custom_scalar import layout_pb2

    board = TensorBoard(tmp_path, INFO)
    board.metrics(metrics(3))
    board.close()
    events = read(tmp_path)
    tensor = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    (pattern,) = charts["load of each expert, layer 1"]
    assert sum(bool(re.search(pattern, tag)) for tag in events.Tags()["scalars"]) == 4


def test_a_model_without_a_router(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, replace(INFO, routing=None))
    board.metrics(metrics(3, routing=None, grad_norm=None))
    board.close()
    tags = read(tmp_path).Tags()
    assert tags["images"] == [] and "train/loss" in tags["scalars"] and "train/grad_norm" not in tags["scalars"]


def test_heat_map_of_long_names_and_none() -> None:
    picture = draw_heatmap(np.array([[0.5, np.nan]]), rows=["x" * 200], columns=["a", "b"], title="t")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[1] < 400
    assert draw_heatmap(np.zeros((0, 0)), rows=[], columns=[], title="").shape[2] == 3
