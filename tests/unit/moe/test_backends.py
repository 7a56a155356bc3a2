"""model.experts.backend: each value gives the same outputs, or says what it lacks. T tokens, D width, E experts."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moemm.config import from_dict
from moemm.config.schema import ExpertGroupConfig, ExpertsBackend, RouterConfig
from moemm.errors import ConfigError, KernelError
from moemm.moe import ExpertMap, ExpertShape, MoELayer, megablocks
from moemm.moe.backends import expert_runner, run_in_torch
from moemm.ops import moe_ffn

DIM, NAMES = 16, ("image", "audio", "text")
TASK = {"name": "digits", "file": "digits.h5", "modalities": ["image"]}


def groups(*, modality: int = 8, routed: int = 8) -> list[ExpertGroupConfig]:
    """A shared expert of width 8, modality and routed experts of these widths."""
    return [
        ExpertGroupConfig(kind="shared", width=8),
        ExpertGroupConfig(kind="modality", width=modality),
        ExpertGroupConfig(kind="routed", count=3, width=routed),
    ]


def make_layer(backend: ExpertsBackend, dtype: torch.dtype = torch.float64, **widths: int) -> MoELayer:
    torch.manual_seed(0)
    shape = ExpertShape(dim=DIM, activation="swiglu", num_layers=2, backend=backend)
    return MoELayer(ExpertMap.from_config(groups(**widths), NAMES), shape, RouterConfig(top_k=2)).to(dtype)


def outputs(layer: MoELayer, tokens: int = 40) -> list[torch.Tensor]:
    """Output of the layer, then the gradients of its input and its parameters."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(layer.parameters()).dtype
    x_TD = torch.randn(tokens, DIM, generator=generator).to(dtype).requires_grad_()
    modality_T = torch.randint(0, len(NAMES), (tokens,), generator=generator)
    out_TD, _ = layer(x_TD, modality_T)
    out_TD.float().square().sum().backward()
    grads = [parameter.grad for parameter in layer.parameters()]
    assert x_TD.grad is not None and all(grad is not None for grad in grads), "every expert gets a gradient"
    return [out_TD, x_TD.grad, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize(
    ("dtype", "widths", "tolerance"),
    [(torch.float64, (8, 5), 1e-12), (torch.float32, (8, 8), 2e-5), (torch.bfloat16, (8, 8), 4e-2)],
    ids=str,
)
def test_torch_and_auto_agree(dtype: torch.dtype, widths: tuple[int, int], tolerance: float, tokens: int) -> None:
    """bfloat16 experts of one width run by grouped_mm, the others by a loop."""
    options = {"modality": widths[0], "routed": widths[1]}
    ours, plain = (outputs(make_layer(backend, dtype, **options), tokens) for backend in ("auto", "torch"))
    for number, (given, wanted) in enumerate(zip(plain, ours, strict=True)):
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(
            given, wanted, rtol=tolerance, atol=tolerance * max(1.0, scale), msg=lambda text, n=number: f"{n}: {text}"
        )


def test_torch_uses_none_of_our_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of `torch` is that it is independent: the layer runs with moemm's plan, permute and combine gone."""
    layer = make_layer("torch")

    def gone(*_: object, **__: object) -> None:
        raise AssertionError("an op of moemm was called")

    for module in ("moe_ffn", "grouped_mlp", "permute", "plan", "combine"):
        monkeypatch.setattr(f"moemm.ops.{module}", gone)
    assert layer.run_experts is run_in_torch
    assert torch.isfinite(outputs(layer)[0]).all()


def test_auto_is_the_fused_call() -> None:
    assert make_layer("auto").run_experts is moe_ffn


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.backend is 'cutlass'; allowed are auto, torch, megablocks"):
        expert_runner("cutlass", widths=[8])  # type: ignore[arg-type]
    values = {"name": "t", "data": {"tasks": [TASK]}, "model": {"experts": {"backend": "megablock"}}}
    with pytest.raises(ConfigError, match=r"(?s)model\.experts\.backend: .*one of auto, torch, megablocks"):
        from_dict(values, origin="test")


def test_megablocks_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megablocks", None)
    with pytest.raises(KernelError, match=r"cannot be imported.*--no-deps megablocks.*set model\.experts\.backend to"):
        make_layer("megablocks", torch.bfloat16)


def test_megablocks_without_grouped_gemm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, None)
    with pytest.raises(KernelError, match=r"finds no grouped_gemm.*--no-deps megablocks"):
        make_layer("megablocks", torch.bfloat16)


def test_megablocks_wants_experts_of_one_width() -> None:
    with pytest.raises(ConfigError, match="multiplies experts of one width, but these are 5, 8 wide"):
        make_layer("megablocks", torch.bfloat16, routed=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_megablocks_wants_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, SimpleNamespace(gmm=grouped_product))
    with pytest.raises(KernelError, match="needs a CUDA device, and there is none"):
        make_layer("megablocks", torch.bfloat16)


def test_megablocks_wants_bfloat16_on_cuda() -> None:
    with pytest.raises(KernelError, match=r"the tokens are float32 on cpu: set train\.precision to bf16"):
        run_megablocks(torch.zeros(2, 4), 2)


@pytest.mark.parametrize("dropped", [False, True])
def test_what_stands_around_the_products_of_megablocks(dropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its grouped GEMM replaced by a loop of the same signature: order, offsets, dropped slots, gradients."""
    stand_in(monkeypatch, SimpleNamespace(gmm=grouped_product))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x_TD = torch.randn(12, DIM, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    given = run_megablocks(x_TD, 4, dropped=dropped)
    monkeypatch.undo()
    wanted = run_megablocks(x_TD, 4, dropped=dropped, function=run_in_torch)
    torch.testing.assert_close(given, wanted, rtol=2e-2, atol=2e-2)


def run_megablocks(
    x_TD: torch.Tensor, num_experts: int, *, dropped: bool = False, function: Any = megablocks.run_experts
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    width = x_TD.shape[1]

    def draw(*shape: int) -> list[torch.Tensor]:
        return [(torch.randn(shape, generator=generator) / 4).to(x_TD.dtype) for _ in range(num_experts)]

    experts_TK = torch.randint(0, num_experts - 1, (x_TD.shape[0], 2), generator=generator)  # one expert stays idle
    if dropped:
        experts_TK[::3, 1] = -1
    gates_TK = torch.rand(experts_TK.shape, generator=generator)
    return function(x_TD, gates_TK, experts_TK, draw(16, width), draw(width, 8), activation="swiglu")


def grouped_product(
    rows: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor, trans_b: bool = False
) -> torch.Tensor:
    """What grouped_gemm.ops.gmm computes, in plain PyTorch."""
    assert sizes.dtype == torch.int64 and int(sizes.sum()) == rows.shape[0] and rows.is_contiguous() and trans_b
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(rows.split(sizes.tolist()), weights, strict=True)])


def stand_in(monkeypatch: pytest.MonkeyPatch, ops: object) -> None:
    """Modules under megablocks' names, with these ops."""
    package, util = ModuleType("megablocks"), ModuleType("megablocks.grouped_gemm_util")
    util.ops = ops  # type: ignore[attr-defined]
    package.grouped_gemm_util = util  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megablocks", package)
    monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", util)
