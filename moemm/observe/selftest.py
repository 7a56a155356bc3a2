"""The doctor's self test: the live ops against the reference, and three steps of training on made-up samples.

T tokens, D width, E experts, K slots a token, R rows, M modalities, B samples.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from moemm.observe.finding import Finding

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5


def ops_agree() -> list[Finding]:
    """Every op on a few rows: values and gradients of the live ops equal those of the reference."""
    import torch

    from moemm import ops
    from moemm.ops import reference

    pairs = zip(_run_layer(ops), _run_layer(reference), strict=True)
    with torch.no_grad():
        apart = [(live - expected).abs().max() / expected.abs().max().clamp(min=1) for live, expected in pairs]
        worst = float(torch.stack(apart).max())  # NaN stays NaN
    if worst <= TOLERANCE:
        text = f"live and reference agree, values and gradients (largest relative difference {worst:.1e})"
        return [Finding(name="self test: ops", status="ok", text=text, data={"difference": worst})]
    text = f"live and reference differ by {worst:.1e}; allowed: {TOLERANCE:.0e}"
    advice = "build moemm._C again; if it stays, report it with the output of `moemm doctor --json`"
    return [Finding(name="self test: ops", status="problem", text=text, advice=advice, data={"difference": worst})]


def _run_layer(implementation: Any) -> list[torch.Tensor]:
    """A router, then its experts twice: op by op and as one call. Outputs, then gradients."""
    import torch

    generator = torch.Generator().manual_seed(0)
    num_experts, width, hidden, num_modalities = 5, 6, 4, 2
    shapes = [(9, num_experts), (9, width), *[(2 * hidden, width)] * num_experts, *[(width, hidden)] * num_experts]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    logits_TE, x_TD, *weights = leaves
    w1, w2 = weights[:num_experts], weights[num_experts:]
    modality_T = torch.arange(9) % num_modalities
    allowed_ME = torch.tensor([[True] * num_experts, [False, True, True, True, False]])
    gates_TK, experts_TK, *sums = implementation.route_topk(
        logits_TE, modality_T, allowed_ME, top_k=2, kind="softmax", renormalise=True
    )
    counts_E, offsets_E1, order_R, inverse_TK = implementation.plan(experts_TK, num_experts=num_experts, alignment=4)
    rows_RD = implementation.permute(x_TD, order_R, inverse_TK)
    y_RD = implementation.grouped_mlp(rows_RD, offsets_E1, w1, w2, activation="swiglu")
    apart_TD = implementation.combine(y_RD, inverse_TK, gates_TK, x_TD)
    whole_TD = implementation.moe_ffn(x_TD, gates_TK, experts_TK, w1, w2, residual_TD=x_TD, activation="swiglu")
    floats = [gates_TK, *sums, rows_RD, y_RD, apart_TD, whole_TD]
    total = sum(out.sin().sum() for out in floats if out.requires_grad)
    return [experts_TK, counts_E, offsets_E1, order_R, inverse_TK, *floats, *torch.autograd.grad(total, leaves)]


def three_steps() -> list[Finding]:
    """A tiny model learns two classes of made-up vectors for three steps: the loss is finite and falls."""
    start = time.monotonic()
    losses = _train_tiny(num_steps=3)
    seconds = time.monotonic() - start
    data = {"losses": losses, "seconds": round(seconds, 2)}
    falls = all(loss == loss for loss in losses) and losses[-1] < losses[0]
    text = f"three steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}, {seconds:.1f} s"
    if falls:
        return [Finding(name="self test: training", status="ok", text=text, data=data)]
    advice = "report it with the output of `moemm doctor --json`"
    text += ": does not fall"
    return [Finding(name="self test: training", status="problem", text=text, advice=advice, data=data)]


def _train_tiny(*, num_steps: int) -> list[float]:
    """Losses of a model over one modality of (4,) vectors, 16 samples, two classes."""
    import torch

    from moemm.config import ExpertsConfig, ModelConfig
    from moemm.data.catalogue import ModalityInfo, TaskInfo
    from moemm.data.sample import PackedBatch, PackedModality
    from moemm.modalities.fit import fit_modalities
    from moemm.models import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x_BF = torch.randn(16, 4)
        info = ModalityInfo(name="signal", kind="features", ragged=False, shape=(4,))
        task = TaskInfo(
            name="sign", file="", label="label", target="classification", outputs=2, metric="accuracy",
            modalities=("signal",), sizes={"train": 16},
        )  # fmt: skip
        specs = fit_modalities([info], {}, lambda name: x_BF.numpy())
        config = ModelConfig(dim=16, layers=1, heads=2, experts=ExpertsConfig())
        model = build_model(config, specs=specs, tasks=[task])
        batch = PackedBatch(
            modalities={"signal": PackedModality({"data": x_BF}, None, torch.arange(16))},
            presence=torch.ones(16, 1, dtype=torch.bool),
            task=torch.zeros(16, dtype=torch.int64),
            index=torch.arange(16),
            bag=torch.arange(16),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(num_steps):
            logits_BC = model(batch).outputs["sign"]
            loss = torch.nn.functional.cross_entropy(logits_BC, (x_BF[:, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses
