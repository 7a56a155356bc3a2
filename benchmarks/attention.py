"""Attention over packed samples on the CPU: buckets of similar length, one padded block, nested tensors.

    python -m benchmarks.attention             # under a minute

Forward and backward of one layer on the token counts of real batches of the quickstart, the ways interleaved; CPU time
of the process (the machine may be shared), relative to the buckets that the model uses.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.record import Row
from moemm.config import load_config
from moemm.data import build_catalogue, train_loader
from moemm.data.catalogue import Catalogue
from moemm.modalities import fit_modalities, prepare_functions
from moemm.models import build_model
from moemm.models.attention import Attention, AttentionPlan, Backend
from moemm.train.setup import train_values

RECIPE = Path("configs/recipes/quickstart.yaml")
WAYS: dict[str, tuple[Backend, float]] = {
    "buckets, 1.25": ("padded", 1.25),
    "buckets, 1.0": ("padded", 1.0),
    "buckets, 2.0": ("padded", 2.0),
    "one padded block": ("padded", 1e9),
    "nested tensors": ("nested", 1.0),
}
BATCHES, REPEATS, DIM, HEADS = 4, 8, 64, 4


def sample_ids() -> list[torch.Tensor]:
    """sample_T of some real batches."""
    loaded = load_config(RECIPE, ["data.num_workers=0"])
    catalogue: Catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    specs = fit_modalities(catalogue.modalities, loaded.config.modalities, lambda name: train_values(catalogue, name))
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks)
    loader = train_loader(
        catalogue, loaded.config, rank=0, world_size=1, start_step=0, prepare=prepare_functions(specs)
    )
    batches = iter(loader)
    found = [model.tokenize(next(batches)).sample_T for _ in range(BATCHES)]
    loader.close()
    return found


def seconds(attention: Attention, sample_T: torch.Tensor, backend: Backend, ratio: float) -> float:
    """CPU seconds of one plan, forward and backward."""
    x_TD = torch.randn(sample_T.shape[0], DIM, requires_grad=True)
    began = time.process_time()
    plan = AttentionPlan.make(sample_T, num_samples=64, backend=backend, ratio=ratio)
    attention(x_TD, plan).sum().backward()
    return time.process_time() - began


def main() -> None:
    """Measure, write results/attention.json, and print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began = time.perf_counter()
    batches, attention = sample_ids(), Attention(DIM, HEADS, num_layers=1)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(REPEATS + 1):
        for sample_T in batches:
            for name, (backend, ratio) in WAYS.items():
                took = seconds(attention, sample_T, backend, ratio)
                if repeat:  # the first round warms up
                    times[name].append(took)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["buckets, 1.25"]
    rows = [
        Row(case=name, metric="time / buckets of 1.25", value=m / base, better="lower") for name, m in medians.items()
    ]
    rows.append(Row(case="buckets, 1.25", metric="CPU time", value=base * 1000, unit="ms", better="lower"))
    path = record.write("attention", rows, seeds=[0], seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
