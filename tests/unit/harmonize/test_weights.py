"""Weights from Gram matrices: against TorchJD, against optimality conditions, and what every method promises.

X Gram matrices, T losses, N values of a gradient.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, minimize
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

from moemm.errors import ConfigError
from moemm.harmonize import HARMONIZERS, Context, register_harmonizer, weights

COUNT = 250
DRAWING = ("pcgrad", "gradvac", "random")
KINDS = pytest.mark.parametrize("kind", ["full", "deficient", "stretched"])
SIZES = pytest.mark.parametrize("num", [2, 3, 4, 8, 16])
EVERY = pytest.mark.parametrize("method", sorted(HARMONIZERS))


def gradients(num: int, kind: str = "full", count: int = COUNT) -> torch.Tensor:
    """(X, T, N): of full rank, of half of it, or with lengths from 1e-3 to 1e3."""
    random = torch.Generator().manual_seed(num)
    width = max(1, num // 2) if kind == "deficient" else num + 3
    rows_XTN = torch.randn(count, num, width, generator=random, dtype=torch.float64)
    if kind == "stretched":
        rows_XTN = rows_XTN * 10 ** (6 * torch.rand(count, num, 1, generator=random, dtype=torch.float64) - 3)
    return rows_XTN


def context(**options: float) -> Context:
    return Context(generator=torch.Generator().manual_seed(0), **options)


def gram(rows_XTN: torch.Tensor) -> torch.Tensor:
    return rows_XTN @ rows_XTN.mT


def update(rows_XTN: torch.Tensor, w_XT: torch.Tensor) -> torch.Tensor:
    return (w_XT[..., None] * rows_XTN).sum(-2)


def same_update(rows_XTN: torch.Tensor, w_XT: torch.Tensor, expected_XN: torch.Tensor, tolerance: float) -> None:
    """Updates, not weights: of rank-deficient gradients many weights give one update."""
    error_X = (update(rows_XTN, w_XT) - expected_XN).norm(dim=1) / rows_XTN.norm(dim=2).amax(1)
    assert error_X.max() < tolerance, f"{error_X.max():.2e} in {int(error_X.argmax())}"


def conflicting(rows_XTN: torch.Tensor, w_XT: torch.Tensor) -> None:
    """The case is one in which harmonizing does something."""
    plain_XN = rows_XTN.sum(1)
    change_X = (update(rows_XTN, w_XT) - plain_XN).norm(dim=1) / plain_XN.norm(dim=1)
    assert change_X.max() > 1e-2


@KINDS
@SIZES
@pytest.mark.parametrize("method", ["upgrad", "dual_cone"])
def test_projections_onto_the_dual_cone(method: str, num: int, kind: str) -> None:
    """Least squares with bounds, by an active set method, is the oracle, also where the cone is thin."""
    rows_XTN = gradients(num, kind, 40)
    expected = []
    for rows_TN in rows_XTN.numpy():
        sides_NT = (rows_TN / np.linalg.norm(rows_TN, axis=1, keepdims=True)).T
        projected = [rows_TN.sum(0)] if method == "dual_cone" else list(rows_TN)
        found = [lsq_linear(sides_NT, -one, (0, np.inf), method="bvls", tol=1e-15, max_iter=1000) for one in projected]
        expected.append(sum(one + sides_NT @ fit.x for one, fit in zip(projected, found, strict=True)))
    w_XT = weights(gram(rows_XTN), method).w
    same_update(rows_XTN, w_XT, torch.from_numpy(np.stack(expected)), 1e-7)
    conflicting(rows_XTN, w_XT)


@SIZES
@pytest.mark.parametrize("kind", ["full", "stretched"])
@pytest.mark.parametrize("method", ["upgrad", "dual_cone", "imtl_g", "aligned_mtl"])
def test_torchjd(method: str, num: int, kind: str) -> None:
    rows_XTN = gradients(num, kind)
    exact = QuadprogProjector(reg_eps=0.0, norm_eps=0.0)
    weigh = {
        "upgrad": aggregation.UPGradWeighting(projector=exact),
        "dual_cone": aggregation.DualProjWeighting(projector=exact),
        "imtl_g": aggregation.IMTLGWeighting(),
        "aligned_mtl": aggregation.AlignedMTLWeighting(),
    }[method]
    peer_XT = num * torch.stack([weigh(gram_TT) for gram_TT in gram(rows_XTN)])
    found_XT = weights(gram(rows_XTN), method).w
    size_X1 = peer_XT.abs().amax(1, keepdim=True).clamp_min(1.0)  # IMTL-G's weights can be large and cancel
    tolerance = 1e-3 if kind == "stretched" and method in ("aligned_mtl", "imtl_g") else 1e-8  # theirs are not scaled
    same_update(rows_XTN, found_XT / size_X1, update(rows_XTN, peer_XT / size_X1), tolerance)
    conflicting(rows_XTN, found_XT)


@SIZES
@KINDS
def test_pcgrad_takes_the_steps_of_torchjd(num: int, kind: str) -> None:
    for seed, rows_TN in enumerate(gradients(num, kind, 20)):
        torch.manual_seed(seed)
        expected_T = aggregation.PCGradWeighting()(gram(rows_TN))
        drawn = Context(generator=torch.Generator().manual_seed(seed))
        found_T = weights(gram(rows_TN), "pcgrad", drawn).w
        assert torch.allclose(found_T, expected_T, rtol=1e-9, atol=1e-9)


def test_gradvac_keeps_averages() -> None:
    peer, ours = aggregation.GradVacWeighting(beta=0.3, eps=0.0), Context(strength=0.3)
    alike = torch.tensor([[1.0, 0.4], [0.4, 1.0]], dtype=torch.float64)
    moved = 0
    for step, rows_TN in enumerate(gradients(2, count=40)):
        gram_TT = gram(rows_TN) + 2 * alike
        found_T = weights(gram_TT, "gradvac", ours).w
        assert torch.allclose(found_T, peer(gram_TT), atol=1e-9), step
        moved += int(found_T.max() > 1.001 and gram_TT[0, 1] > 0)
    assert moved > 3, "nothing was turned that does not conflict"
    three = torch.zeros(3, 3, dtype=torch.float64)
    three[1:, 1:] = gram_TT
    kept = Context(strength=0.3)
    weights(three, "gradvac", kept)
    assert kept.state["cosine"][1, 2] != 0.0, "of losses that were there"
    assert not kept.state["cosine"][0].any() and not kept.state["cosine"][:, 0].any()


@SIZES
@KINDS
def test_mgda_is_the_shortest_mean(num: int, kind: str) -> None:
    gram_XTT = gram(gradients(num, kind))
    w_XT = weights(gram_XTT, "mgda").w / num
    assert torch.allclose(w_XT.sum(1), torch.ones(COUNT, dtype=torch.float64))
    assert w_XT.min() > -1e-9
    size_X = gram_XTT.diagonal(dim1=1, dim2=2).mean(1)
    along_XT = (gram_XTT @ w_XT[..., None])[..., 0] / size_X[:, None]
    square_X = (along_XT * w_XT).sum(1)
    assert (along_XT - square_X[:, None]).min() > -1e-7, "some gradient would shorten it"
    frank_wolfe = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=200)
    for gram_TT, length in zip(gram_XTT[:50], square_X, strict=False):
        peer_T = frank_wolfe(gram_TT)
        assert length <= peer_T @ gram_TT @ peer_T / gram_TT.diagonal().mean() + 1e-10


@pytest.mark.parametrize("num", [2, 4, 8])
@pytest.mark.parametrize(("c", "kind"), [(0.2, "full"), (0.5, "full"), (0.9, "full"), (0.5, "deficient")])
def test_cagrad_is_the_worst_losses_best(num: int, c: float, kind: str) -> None:
    rows_XTN = gradients(num, kind, count=25)
    found_XT = weights(gram(rows_XTN), "cagrad", context(strength=c)).w
    conflicting(rows_XTN, found_XT)
    for rows_TN, w_T in zip(rows_XTN.numpy(), found_XT.numpy(), strict=True):
        mean_N, update_N = rows_TN.mean(0), (1 + c) * (w_T @ rows_TN) / num
        radius = c * np.linalg.norm(mean_N)
        assert np.linalg.norm(update_N - mean_N) <= radius * (1 + 1e-6)

        def worst(one_N: np.ndarray, rows_TN: np.ndarray = rows_TN) -> float:
            return float((rows_TN @ one_N).min())

        def at(x_T: np.ndarray, rows_TN: np.ndarray = rows_TN, mean_N: np.ndarray = mean_N, r: float = radius) -> float:
            mixed_N = (x_T**2 / (x_T**2).sum()) @ rows_TN
            return float(mixed_N @ mean_N + r * np.linalg.norm(mixed_N))

        dual = min(minimize(at, start, method="BFGS").fun for start in (np.ones(num), np.linspace(0.5, 1.5, num)))
        assert abs(worst(update_N) - dual) < 1e-4 * np.abs(rows_TN @ mean_N).max()  # no duality gap: both are optimal


@SIZES
@pytest.mark.parametrize("kind", ["full", "stretched"])
def test_nash_bargain(num: int, kind: str) -> None:
    gram_XTT = gram(gradients(num, kind))
    w_XT = weights(gram_XTT, "nash_mtl").w
    even_XT = w_XT * (gram_XTT @ w_XT[..., None])[..., 0]
    assert (even_XT / even_XT.mean(1, keepdim=True) - 1).abs().max() < 1e-7
    assert w_XT.min() > 0


def test_published_formulas_for_two_losses() -> None:
    """g1 less its part along g2, and g2 less its part along g1; what agrees stays as it is."""
    rows_XTN = gradients(2)
    for method in ("realign", "pcgrad", "upgrad"):
        w_XT = weights(gram(rows_XTN), method, context()).w
        for (a_N, b_N), w_T in zip(rows_XTN, w_XT, strict=True):
            dot = min(float(a_N @ b_N), 0.0)
            expected_N = a_N - dot / (b_N @ b_N) * b_N + b_N - dot / (a_N @ a_N) * a_N
            assert torch.allclose(update(torch.stack([a_N, b_N]), w_T), expected_N, atol=1e-9)


def test_curriculum_keeps_or_leaves_out() -> None:
    gram_XTT = gram(gradients(3))
    length_XT = gram_XTT.diagonal(dim1=1, dim2=2).sqrt()
    lowest_X = (gram_XTT / (length_XT[:, :, None] * length_XT[:, None, :])).flatten(1).amin(1)
    for gamma in (-0.5, 0.0, 0.2):
        w_XT = weights(gram_XTT, "curriculum", context(gamma=gamma)).w
        assert torch.equal(w_XT, (lowest_X >= gamma).double()[:, None].expand(-1, 3))
        both_XT = weights(gram_XTT, "realign_curriculum", context(gamma=gamma)).w
        assert torch.equal(both_XT == 0.0, (lowest_X < gamma)[:, None].expand(-1, 3))
        kept_X = lowest_X >= gamma
        assert torch.equal(both_XT[kept_X], weights(gram_XTT[kept_X], "realign").w)


@EVERY
@SIZES
def test_scale_order_and_leading_axes(method: str, num: int) -> None:
    gram_XTT = gram(gradients(num, count=12))
    w_XT = weights(gram_XTT, method, context()).w
    for factor in (1e-12, 1e9):
        assert torch.allclose(weights(factor * gram_XTT, method, context()).w, w_XT, rtol=1e-6, atol=1e-8)
    assert torch.equal(weights(gram_XTT.view(3, 4, num, num), method, context()).w, w_XT.view(3, 4, num))
    if method in DRAWING:
        other = Context(generator=torch.Generator().manual_seed(1))
        assert num == 2 or not torch.equal(weights(gram_XTT, method, other).w, w_XT)
        return
    one_by_one = [weights(gram_TT, method).w for gram_TT in gram_XTT]
    assert torch.allclose(torch.stack(one_by_one), w_XT, rtol=1e-6, atol=1e-8)
    flipped_XT = weights(gram_XTT.flip(1, 2), method).w.flip(1)
    assert torch.allclose(flipped_XT, w_XT, rtol=1e-5, atol=1e-7)


@EVERY
def test_no_conflict_is_the_sum(method: str) -> None:
    found_T = weights(torch.eye(4), method, context()).w
    if method == "cagrad":
        assert torch.allclose(found_T, torch.ones(4, dtype=torch.float64) * found_T[0])
    elif method == "random":
        assert math.isclose(found_T.sum().item(), 4.0)
    else:
        assert torch.allclose(found_T, torch.ones(4, dtype=torch.float64), atol=1e-9)


@EVERY
def test_an_absent_loss_has_no_say(method: str) -> None:
    gram_XTT = gram(gradients(4, count=30))
    gram_XTT[:, 2, :] = gram_XTT[:, :, 2] = 0.0
    there = [0, 1, 3]
    found = weights(gram_XTT, method, context(strength=0.5))
    alone_XT = weights(gram_XTT[:, there][:, :, there], method, context(strength=0.5)).w
    assert torch.allclose(found.w[:, there], alone_XT)
    assert torch.equal(found.w[:, 2], torch.ones(30, dtype=torch.float64))
    assert (found.broken, found.refused) == (0, 0)


@pytest.mark.parametrize("method", sorted(set(HARMONIZERS) - {"gradvac"}))
def test_a_samples_weights_do_not_depend_on_the_others(method: str) -> None:
    """So that they are the same on whichever rank it lies; gradvac averages over samples, and is refused for them."""
    gram_XTT = gram(gradients(5, count=30))
    gram_XTT[:15, 2, :] = gram_XTT[:15, :, 2] = 0.0
    gram_XTT[5:10, 4, :] = gram_XTT[5:10, :, 4] = 0.0
    w_XT = weights(gram_XTT, method, context()).w
    for rows in (slice(0, 5), slice(3, 12), slice(15, 30), slice(29, 30)):
        assert torch.allclose(weights(gram_XTT[rows], method, context()).w, w_XT[rows], rtol=1e-6, atol=1e-8)


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_is_left_out_and_counted(method: str, value: float) -> None:
    gram_XTT = gram(gradients(3, count=5))
    alone_XT = weights(gram_XTT[3:4, :2, :2], method, context()).w
    gram_XTT[3, 2, :] = gram_XTT[3, :, 2] = value
    found = weights(gram_XTT[3:4], method, context())
    assert (found.broken, found.refused) == (1, 0)
    assert torch.allclose(found.w[0, :2], alone_XT[0])
    assert found.w[0, 2] == 0.0


@EVERY
def test_nothing_to_settle(method: str) -> None:
    assert torch.equal(weights(torch.tensor([[3.0]]), method).w, torch.ones(1, dtype=torch.float64))
    assert torch.equal(weights(torch.zeros(2, 3, 3), method).w, torch.ones(2, 3, dtype=torch.float64))
    assert weights(torch.zeros(0, 3, 3), method).w.shape == (0, 3)


def test_weights_that_are_not_finite_are_refused() -> None:
    @register_harmonizer("test_broken")
    def broken(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
        w_XT = gram_XTT.new_full(gram_XTT.shape[:2], 2.0)
        w_XT[0, 1] = math.nan
        return w_XT

    try:
        found = weights(gram(gradients(2, count=3)), "test_broken")
        assert torch.equal(found.w, torch.tensor([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]], dtype=torch.float64))
        assert found.refused == 1
        with pytest.raises(ConfigError, match="registered by both"):
            register_harmonizer("test_broken")(lambda gram_XTT, context: gram_XTT[0])
    finally:
        del HARMONIZERS["test_broken"]


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"no harmonizer 'pcgrd'\n  allowed: aligned_mtl, cagrad, .*\n  to do"):
        weights(torch.eye(2), "pcgrd")
