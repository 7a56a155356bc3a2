"""Every registered router: mask, gradient, ties, no tokens; and what each kind promises.

T tokens, E experts, M rows of the expert map.
"""

from __future__ import annotations

import math

import pytest
import torch

from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig, RouterLossConfig
from moemm.errors import ConfigError
from moemm.moe import ROUTERS, ExpertMap, RouteInput, Router, Routing, bound_expert, register_router
from moemm.moe.routers import Routed, route

DIM, NAMES, NUM_EXPERTS = 12, ("image", "audio", "text"), 5
EXPERT_MAP = ExpertMap.from_config(
    [
        Group(kind="routed", width=4, count=3),
        Group(kind="routed", width=4, modalities=["audio"]),
        Group(kind="routed", width=4, modalities=["text", "image"]),
    ],
    NAMES,
)
ALLOWED_ME = EXPERT_MAP.allowed("routed")
LEARNED = sorted(name for name, kind in ROUTERS.items() if kind.learned)


def make(kind: str, **options: object) -> Router:
    torch.manual_seed(0)
    router = Router(DIM, EXPERT_MAP, RouterConfig(kind=kind, **options)).double()
    for row in router.parameters():
        torch.nn.init.normal_(row)
    return router


def tokens(count: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    row_T = torch.randint(0, 3, (count,), generator=generator)
    return x_TD, row_T, ALLOWED_ME.int().argmax(1)[row_T]


def run(name: str, given: RouteInput) -> Routed:
    return route(ROUTERS[name], given, entropy=True)


@pytest.mark.parametrize("scope", ["joint", "modality"])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_forbidden_experts_are_never_used(name: str, scope: str) -> None:
    router = make(name, scope=scope, top_k=None if name == "hard" else 2)
    x_TD, row_T, target_T = tokens()
    topk = router(x_TD, row_T, target_T).topk
    used = topk.experts_TK >= 0
    assert ALLOWED_ME[row_T].gather(1, topk.experts_TK.clamp_min(0))[used].all()
    assert not topk.gates_TK[~used].any() and used.any()
    assert not topk.prob_ME[~ALLOWED_ME].any() and not topk.load_ME[~ALLOWED_ME].any()
    assert topk.load_ME.sum() == used.sum()
    torch.testing.assert_close(topk.prob_ME.sum(1), topk.tokens_M)


@pytest.mark.parametrize("scope", ["joint", "modality"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("gates", ["raw", "renormalised", "straight_through"])
@pytest.mark.parametrize("name", LEARNED)
def test_the_gates_have_a_gradient_to_the_router(name: str, gates: str, top_k: int, scope: str) -> None:
    router = make(name, gates=gates, top_k=top_k, scope=scope)
    topk = router(*tokens()).topk
    weights = torch.randn(topk.gates_TK.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (topk.gates_TK * weights).sum().backward()
    assert all(row.grad is not None for row in router.rows.parameters())
    total = sum(row.grad.abs().sum() for row in router.rows.parameters())
    # Renormalised gates of one slot are constant: the configuration refuses them.
    constant = gates == "renormalised" and top_k == 1 and name != "expert_choice"
    assert total < 1e-12 if constant else total > 1e-6


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_ties_break_the_same_way_and_no_tokens_are_fine(name: str) -> None:
    zeros, row_T = torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)
    given = RouteInput(
        logits_TE=zeros, row_T=row_T, allowed_ME=torch.ones(1, 4, dtype=torch.bool), top_k=2, target_T=row_T
    )
    first, second = run(name, given).topk, run(name, given).topk
    assert torch.equal(first.experts_TK, second.experts_TK)
    for ids in first.experts_TK.tolist():
        used = [one for one in ids if one >= 0]
        assert len(used) == len(set(used))
    none = RouteInput(logits_TE=zeros[:0], row_T=row_T[:0], allowed_ME=given.allowed_ME, top_k=2, target_T=row_T[:0])
    empty = run(name, none)
    assert empty.topk.gates_TK.shape[0] == 0 and empty.topk.load_ME.sum() == 0 and torch.isfinite(empty.topk.z_M).all()


def test_a_router_of_ones_own_gets_mask_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moemm.moe.routers.ROUTERS", ROUTERS)
    monkeypatch.setitem(ROUTERS, "plain", None)
    del ROUTERS["plain"]

    @register_router("plain")
    def plain(given: RouteInput) -> Routing:
        prob_TE = given.masked.softmax(-1)
        return Routing(*prob_TE.topk(given.top_k), prob_TE)

    own, builtin = make("plain", top_k=2), make("softmax", top_k=2)
    for mine, wanted in zip(own(*tokens()).topk, builtin(*tokens()).topk, strict=True):
        torch.testing.assert_close(mine, wanted)
    with pytest.raises(ConfigError, match="registered twice"):
        register_router("plain")(plain)


def test_straight_through_gates_are_one_and_learn() -> None:
    router = make("softmax", gates="straight_through")
    gates_TK = router(*tokens()).topk.gates_TK
    assert torch.equal(gates_TK, torch.ones_like(gates_TK))


def test_top_k_before_softmax_is_renormalised_softmax() -> None:
    x_TD, row_T, _ = tokens()
    router = make("softmax", gates="renormalised", top_k=2)
    topk = router(x_TD, row_T).topk
    logits_TE = (x_TD @ torch.stack(list(router.rows["all"].values())).T).masked_fill(~ALLOWED_ME[row_T], -torch.inf)
    torch.testing.assert_close(topk.gates_TK, logits_TE.topk(2).values.softmax(-1))


def test_laplace_prefers_the_nearest() -> None:
    x_TD, row_T, _ = tokens()
    router = make("laplace")
    rows = torch.stack(list(router.rows["all"].values()))
    distance_TE = torch.cdist(x_TD, rows).masked_fill(~ALLOWED_ME[row_T], torch.inf)
    topk = router(x_TD, row_T).topk
    assert torch.equal(topk.experts_TK[:, 0], distance_TE.argmin(1))
    torch.testing.assert_close(topk.gates_TK[:, 0], (-distance_TE).softmax(1).amax(1))


def test_hard_averages_all_allowed_experts_and_has_no_weights() -> None:
    router = make("hard")
    x_TD, row_T, _ = tokens()
    topk = router(x_TD, row_T).topk
    assert not list(router.parameters())
    torch.testing.assert_close(topk.gates_TK.sum(1), torch.ones(60, dtype=torch.float64))
    assert torch.equal((topk.experts_TK >= 0).sum(1), ALLOWED_ME[row_T].sum(1))


def test_top_p_takes_the_fewest_that_hold_p() -> None:
    x_TD, row_T, _ = tokens()
    router = make("top_p", p=0.7)
    topk = router(x_TD, row_T).topk
    used, kept = topk.experts_TK >= 0, topk.gates_TK.sum(1)
    assert (kept >= 0.7 - 1e-12).all()
    last = topk.gates_TK.gather(1, used.sum(1, keepdim=True) - 1)[:, 0]
    assert (kept - last < 0.7).all()
    assert (make("top_p", p=0.7, top_k=1)(x_TD, row_T).topk.experts_TK >= 0).sum() == 60


def test_expert_choice_gives_each_expert_its_share() -> None:
    logits_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    row_T = torch.zeros(40, dtype=torch.int64)
    given = RouteInput(
        logits_TE=logits_TE, row_T=row_T, allowed_ME=torch.ones(1, 4, dtype=torch.bool), top_k=1, capacity=1.2
    )
    topk = run("expert_choice", given).topk
    assert topk.load_ME.tolist() == [[12.0] * 4]
    wanted = logits_TE.softmax(1).topk(12, dim=0).indices
    for expert in range(4):
        assert set(wanted[:, expert].tolist()) == set((topk.experts_TK == expert).any(1).nonzero()[:, 0].tolist())


def test_an_even_share_is_of_the_tokens_that_may_use_an_expert() -> None:
    allowed_ME = torch.tensor([[True, True, False], [False, False, True]])
    row_T = torch.tensor([0] * 12 + [1] * 3)
    logits_TE = torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    given = RouteInput(logits_TE=logits_TE, row_T=row_T, allowed_ME=allowed_ME, top_k=1, capacity=1.0)
    assert run("expert_choice", given).topk.load_ME.tolist() == [[6.0, 6.0, 0.0], [0.0, 0.0, 3.0]]


def test_batch_priority_keeps_the_surest_and_counts_the_dropped() -> None:
    logits_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0, 0])
    row_T = torch.arange(40) % 2
    given = RouteInput(
        logits_TE=logits_TE, row_T=row_T, allowed_ME=torch.ones(2, 4, dtype=torch.bool), top_k=1, capacity=1.0
    )
    routed = run("batch_priority", given)
    best = logits_TE.softmax(1).max(1)
    assert routed.topk.load_ME.sum(0).max() == 10 and routed.dropped_M is not None
    kept = routed.topk.experts_TK[:, 0] >= 0
    assert routed.dropped_M.tolist() == [(~kept[0::2]).sum(), (~kept[1::2]).sum()]
    crowd = best.indices == 0
    assert best.values[crowd & kept].min() >= best.values[crowd & ~kept].max()
    none = run(
        "batch_priority",
        RouteInput(**{f: getattr(given, f) for f in ("logits_TE", "row_T", "allowed_ME")}, top_k=1, capacity=8.0),
    )
    assert none.dropped_M is not None and none.dropped_M.sum() == 0


def test_first_choices_come_before_second_choices() -> None:
    logits_TE = torch.tensor([[9.0, 8.0, 0.0], [5.0, 4.0, 0.0], [0.0, 1.0, 0.5]])
    given = RouteInput(
        logits_TE=logits_TE, row_T=torch.zeros(3, dtype=torch.int64), allowed_ME=torch.ones(1, 3, dtype=torch.bool),
        top_k=2, capacity=0.5,
    )  # fmt: skip
    # One place an expert: 0 goes to token 0, 1 to token 2, and of the second choices only 2 finds room.
    assert run("batch_priority", given).topk.experts_TK.tolist() == [[0, -1], [-1, -1], [1, 2]]


def test_noise_is_for_training_only_and_gives_a_smooth_load() -> None:
    router = make("noisy", top_k=2)
    x_TD, row_T, _ = tokens()
    first, second = router(x_TD, row_T), router(x_TD, row_T)
    assert not torch.equal(first.topk.gates_TK, second.topk.gates_TK)
    assert first.smooth_ME is not None
    torch.testing.assert_close(first.smooth_ME.sum(), torch.tensor(120.0, dtype=torch.float64), rtol=0.25, atol=0)
    first.smooth_ME.square().sum().backward()
    assert all(row.grad is not None and row.grad.abs().sum() > 0 for row in router.parameters())
    router.eval()
    assert torch.equal(router(x_TD, row_T).topk.gates_TK, router(x_TD, row_T).topk.gates_TK)


def test_a_bias_moves_load_without_touching_gates() -> None:
    router = make("sigmoid", bias_rate=0.05)
    x_TD, row_T, _ = tokens(300)
    before = router(x_TD, row_T).topk
    for _ in range(60):
        router.update_bias(router(x_TD, row_T).topk.load_ME.sum(0))
    after = router(x_TD, row_T).topk
    assert after.load_ME.sum(0)[:3].std() < 0.6 * before.load_ME.sum(0)[:3].std()
    scores = torch.sigmoid(x_TD @ torch.stack(list(router.rows["all"].values())).T)
    torch.testing.assert_close(after.gates_TK, scores.gather(1, after.experts_TK))
    assert router.bfloat16().bias().dtype == torch.float32, "a step of 1e-3 would be lost in bfloat16"


def test_the_combination_binds_tokens_to_one_expert() -> None:
    present_BM = torch.tensor([[True, True, False], [True, True, False], [True, False, False], [True, True, True]])
    target_BM = bound_expert(present_BM, ALLOWED_ME)
    assert torch.equal(target_BM[0], target_BM[1])
    assert ALLOWED_ME.expand(4, -1, -1).gather(2, target_BM[:, :, None]).all()
    subsets = torch.tensor([[bool(number >> place & 1) for place in range(3)] for number in range(1, 8)])
    assert len(set(bound_expert(subsets, torch.ones(3, 5, dtype=torch.bool))[:, 0].tolist())) >= 4
    router = make("combination")
    x_TD, row_T, target_T = tokens()
    binding_M = router(x_TD, row_T, target_T).binding_M
    logits_TE = (x_TD @ torch.stack(list(router.rows["all"].values())).T).masked_fill(~ALLOWED_ME[row_T], -torch.inf)
    wanted_T = torch.nn.functional.cross_entropy(logits_TE, target_T, reduction="none")
    torch.testing.assert_close(binding_M, torch.stack([wanted_T[row_T == row].sum() for row in range(3)]))


def test_entropy_is_taken_where_a_loss_wants_it() -> None:
    losses = RouterLossConfig(local_entropy=0.1)
    assert make("softmax")(*tokens()).entropy_M is None
    entropy_M = make("softmax", losses=losses)(*tokens()).entropy_M
    assert entropy_M is not None and (entropy_M > 0).all() and entropy_M.sum() < 60 * math.log(NUM_EXPERTS)


def test_rows_keep_the_order_of_the_experts_beyond_ten() -> None:
    """A ParameterDict sorts its keys: routed_10 stood before routed_2, and added experts shifted the others."""
    expert_map = ExpertMap.from_config([Group(kind="routed", width=4, count=12)], NAMES)
    router = Router(DIM, expert_map, RouterConfig())
    with torch.no_grad():
        for number in range(12):
            router.rows["all"][f"routed_{number}"].fill_(float(number == 2))
    topk = router(torch.ones(1, DIM), torch.zeros(1, dtype=torch.int64)).topk
    assert topk.experts_TK.tolist() == [[2]]


def test_routers_of_their_own_differ_between_modalities() -> None:
    router = make("softmax", scope="modality")
    x_TD = torch.randn(1, DIM, dtype=torch.float64).expand(2, -1)
    gates = router(x_TD, torch.tensor([0, 2])).topk.gates_TK  # image and text may use the same experts
    assert not torch.equal(gates[0], gates[1])
