"""The doctor's self test: the live ops against the reference, and three steps of training on made-up samples.

T tokens, D width, K slots a token, R rows, B samples.
"""

from __future__ import annotations

import time

from moemm.observe.finding import Finding

TOLERANCE = 1e-5


def ops_agree() -> list[Finding]:
    """permute and combine on a few rows: values and gradients of the live ops equal those of the reference."""
    import torch

    from moemm import ops
    from moemm.ops import reference

    generator = torch.Generator().manual_seed(0)
    num_tokens, num_slots, width = 7, 2, 5
    order_R = torch.randperm(num_tokens * num_slots, generator=generator)
    inverse_TK = torch.argsort(order_R).view(num_tokens, num_slots)
    gates_TK = torch.rand(num_tokens, num_slots, generator=generator)
    x_TD = torch.randn(num_tokens, width, generator=generator)

    def run(permute: object, combine: object) -> tuple[torch.Tensor, ...]:
        leaf_TD, leaf_TK = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
        out_TD = combine(permute(leaf_TD, order_R, inverse_TK).tanh(), inverse_TK, leaf_TK)  # type: ignore[operator]
        out_TD.square().sum().backward()
        assert leaf_TD.grad is not None and leaf_TK.grad is not None
        return out_TD.detach(), leaf_TD.grad, leaf_TK.grad

    pairs = zip(run(ops.permute, ops.combine), run(reference.permute, reference.combine), strict=True)
    worst = max(float((live - expected).abs().max()) for live, expected in pairs)
    if worst <= TOLERANCE:
        text = f"live and reference agree, values and gradients (largest difference {worst:.1e})"
        return [Finding(name="self test: ops", status="ok", text=text, data={"difference": worst})]
    text = f"live and reference differ by {worst:.1e}; allowed: {TOLERANCE:.0e}"
    advice = "build moemm._C again; if it stays, report it with the output of `moemm doctor --json`"
    return [Finding(name="self test: ops", status="problem", text=text, advice=advice, data={"difference": worst})]


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
        config = ModelConfig(dim=16, layers=1, heads=2, experts=ExpertsConfig(shared_width=16, modality_width=16))
        model = build_model(config, specs=specs, tasks=[task])
        batch = PackedBatch(
            modalities={"signal": PackedModality({"data": x_BF}, None, torch.arange(16))},
            presence=torch.ones(16, 1, dtype=torch.bool),
            task=torch.zeros(16, dtype=torch.int64),
            index=torch.arange(16),
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
