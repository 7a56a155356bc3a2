"""An extension trained by two processes: old parts keep their bits in each ZeRO stage, a resume changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.growth import extend
from moemm.testing.distributed import run_distributed
from moemm.testing.tiny import tiny_config
from moemm.train import train

HERE = Path(__file__).parent
CASES = {0: "fp32", 1: "fp32", 2: "bf16", 3: "fp32"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    folder = tmp_path_factory.mktemp("extending")
    run = {"output": str(folder / "run"), "steps": 2, "batch_size": 8, "baselines": False}
    model = {"dim": 16, "heads": 2, "layers": 2, "router": {"bias_rate": 0.05}}
    train(tiny_config(folder, train=run, model=model))
    random = np.random.default_rng(0)
    label, split = np.arange(40) % 2, np.array([0, 0, 1, 2] * 10, np.uint8)
    values = {"spectrum": ModalityData(kind="timeseries", values=random.normal(size=(40, 6, 5)).astype(np.float32))}
    labels = {"label": LabelData(values=label)}
    write_file(folder / "spectra.h5", task="spectrum", labels=labels, split=split, modalities=values)
    plan = extend.plan(
        folder / "run", data=folder / "spectra.h5", experts={"kind": "routed", "layers": "all"}, init="random",
        training={"steps": 4, "lr": 1e-2, "weight_decay": 0.1},
    )  # fmt: skip
    plan.config["train"]["checkpoint"] = {"every": 2, "keep": 3}
    extend.apply(plan, output=folder / "grown", training=False)
    torch.use_deterministic_algorithms(deterministic)
    arguments = {"run": str(folder / "grown"), "stages": list(CASES), "precisions": list(CASES.values())}
    results = run_distributed("extending:through", ranks=2, arguments=arguments, path=[HERE], timeout_s=280)
    return {"folder": folder, "found": results[0].value}


@pytest.mark.parametrize("stage", CASES)
def test_old_parts_keep_their_bits_and_a_resume_changes_nothing(trained: dict[str, Any], stage: int) -> None:
    found = trained["found"][str(stage)]
    assert found["moved"] == []
    assert found["differ"] == [], "stopped in the middle and gone on from there"
    # A new expert that no token was sent to, or a bias that went up and down, may be as it was.
    assert all(".experts." in name or ".bias_" in name for name in found["stayed"])


def test_the_receipt_of_what_two_ranks_trained(trained: dict[str, Any]) -> None:
    receipt = extend.check(trained["folder"] / "grown_3_whole")
    assert (
        receipt.ok and {proof.what: proof.value for proof in receipt.proofs}["outputs of tones that changed a bit"] == 0
    )
