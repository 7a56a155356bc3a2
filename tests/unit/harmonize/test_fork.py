"""The fork against explicit gradients: each loss's gradient by itself, Gram matrices by loops, the weighted sum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.harmonize import HARMONIZERS, Context, Fork, Readers, weights
from moemm.modalities import fit_modalities, prepare_functions
from moemm.models import Model, build_model
from moemm.objectives import build_pretext
from moemm.testing.tiny import tiny_config
from moemm.train.harmonizing import build_fork, draw_number, gamma, report
from moemm.train.setup import train_values

PER = ("sample", "token", "modality", "expert", "batch")
METHODS = sorted(set(HARMONIZERS) - {"sum"})
OBJECTIVES = {
    "supervised": {"weight": 1.0},
    "masked": {"weight": 1.0, "ratio": 0.5},
    "contrastive": {"weight": 1.0},
    "similarity": {"weight": 3.0},
    "replaced": {"weight": 1.0},
}


class Leaves(nn.Module):
    """In the fork's place: each branch is a leaf of its own, so that its loss's gradient can be read off."""

    drops = False

    def __init__(self, per: str = "sample"):
        super().__init__()
        self.per = per

    def forward(self, x_TD: torch.Tensor, readers: Readers) -> tuple[torch.Tensor, ...]:
        self.x_TD, self.readers = x_TD, readers
        self.leaves = tuple(x_TD.detach().clone().requires_grad_() for _ in readers.loss_BT)
        return self.leaves


def surest(topk: Any) -> list[int]:
    """The routed expert with the highest gate of each token."""
    pairs = zip(topk.gates_TK.tolist(), topk.experts_TK.tolist(), strict=True)
    return [max(zip(gates, experts, strict=True))[1] for gates, experts in pairs]


class Run:
    """A model of the tiny data with every objective, and a batch."""

    def __init__(self, folder: Path, **sections: Any):
        self.config = tiny_config(folder, **{"objectives": OBJECTIVES, **sections}).config
        self.catalogue = build_catalogue(self.config.data, base=folder)
        specs = fit_modalities(self.catalogue.modalities, {}, lambda name: train_values(self.catalogue, name))
        torch.manual_seed(0)
        self.model: Model = build_model(self.config.model, specs=specs, tasks=self.catalogue.tasks).double()
        tokenizers: dict[str, Any] = dict(self.model.tokenizers.items())
        self.model.pretext = build_pretext(self.config.objectives, tokenizers, self.catalogue.tasks, 16, seed=0)
        self.model.double().train()
        sets = [SplitDataset(self.catalogue, task=task.name, split="train") for task in self.catalogue.tasks]
        self.batch: PackedBatch = Packer(self.catalogue, prepare_functions(specs))(
            [one[i] for one in sets for i in range(6)]
        )

    def backward(self, fork: nn.Module | None) -> torch.Tensor:
        """The gradient of every parameter but the heads', one after the other, after one pass through `fork`."""
        self.model.fork = fork  # type: ignore[assignment]
        self.model.zero_grad()
        output = self.model(self.batch)
        losses = [nn.functional.cross_entropy(output.outputs[t], self.batch.targets[t], reduction="sum")
                  for t in output.outputs]  # fmt: skip
        for name, (loss, _) in output.pretext.items():
            losses.append(getattr(self.config.objectives, name).weight * loss.double())
        torch.stack([loss.double() for loss in losses]).sum().backward()
        return self.gradient()

    def gradient(self) -> torch.Tensor:
        trunk = [p for name, p in self.model.named_parameters() if name.startswith(("trunk", "tokenizers"))]
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trunk])

    def explicit(self, method: str, per: str, num_losses: int, context: Context) -> torch.Tensor:
        """By loops over losses and groups."""
        leaves, routes = Leaves(per), []
        hook = self.model.trunk.blocks[-1].ffn.router.register_forward_hook(lambda *given: routes.append(given[2]))
        self.backward(leaves)
        hook.remove()
        readers = leaves.readers
        z_LTD = torch.zeros(num_losses, *leaves.x_TD.shape, dtype=torch.float64)
        for leaf, loss_T in zip(leaves.leaves, readers.loss_BT, strict=True):
            for token, loss in enumerate(loss_T.tolist()):
                if loss >= 0:
                    z_LTD[loss, token] += leaf.grad[token]  # type: ignore[index]
        tokens = range(len(readers.sample_T))
        groups = {"token": list(tokens), "sample": readers.sample_T.tolist(), "modality": readers.modality_T.tolist(),
                  "expert": surest(routes[0].topk), "batch": [0] * len(tokens)}[per]  # fmt: skip
        settled_TD = torch.zeros_like(leaves.x_TD)
        names = sorted(set(groups))
        rows = [[token for token in tokens if groups[token] == name] for name in names]
        parts = [z_LTD[:, own].flatten(1) for own in rows]
        found = weights(torch.stack([part @ part.T for part in parts]), method, context).w
        for own, w_L in zip(rows, found, strict=True):
            settled_TD[own] = (w_L[:, None, None] * z_LTD[:, own]).sum(0)
        self.model.zero_grad()
        leaves.x_TD.backward(settled_TD)
        return self.gradient()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("fork"), harmonize={"method": "upgrad"})


def make(run: Run, method: str, per: str) -> Fork:
    run.config.harmonize.method, run.config.harmonize.per = method, per  # type: ignore[assignment]
    fork = build_fork(run.config, run.model)
    assert fork is not None
    fork.begin(7, gamma=-0.02)
    return fork


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_that_of_explicit_gradients(run: Run, method: str, per: str) -> None:
    fork = make(run, method, per)
    found = run.backward(fork)
    context = Context(gamma=-0.02, generator=torch.Generator().manual_seed(7))
    wanted = run.explicit(method, per, len(fork.losses), context)
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-12)
    assert error < 5e-6, f"{error:.1e}"
    plain = run.backward(None)
    change = (found - plain).norm() / plain.norm()
    # Token by token two losses rarely oppose each other far; what projects the sum may have nothing to do then.
    assert change > 1e-2 or (method == "dual_cone" and change >= 0.0), f"only {change:.1e} from the plain sum"


def test_the_sum_is_the_plain_gradient(run: Run) -> None:
    fork = Fork("sum", make(run, "upgrad", "sample").losses, reduce=lambda tensor: tensor)
    torch.testing.assert_close(run.backward(fork), run.backward(None))


def test_heads_keep_their_own_losses_gradient(run: Run) -> None:
    def heads() -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in run.model.heads.parameters() if p.grad is not None])

    run.backward(None)
    plain = heads()
    run.backward(make(run, "mgda", "batch"))
    torch.testing.assert_close(heads(), plain)


def test_what_is_seen_is_told(run: Run) -> None:
    fork = make(run, "upgrad", "sample")
    run.backward(fork)
    told = report(fork, 1)
    assert told is not None and (told.broken, told.refused) == (0, 0)
    assert "masked | similarity" in told.pairs and "shapes | similarity" in told.pairs
    assert "shapes | tones" not in told.pairs, "their samples are others"
    assert all(-1.0 <= cos <= 1.0 and 0.0 <= share <= 1.0 for cos, share in told.pairs.values())
    assert report(fork, 1) is None, "taken"


def test_without_gradient_the_stream_is_handed_on(run: Run) -> None:
    fork, x_TD = make(run, "upgrad", "sample"), torch.zeros(2, 3)
    index_T = torch.zeros(2, dtype=torch.int64)
    branches = fork(x_TD, Readers(index_T[None].expand(3, -1), index_T, index_T, 1, 1))
    assert [branch is x_TD for branch in branches] == [True] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_costs_only_its_own_share(value: float) -> None:
    fork = Fork("upgrad", ["a", "b", "c"], reduce=lambda tensor: tensor)
    x_TD = torch.zeros(4, 2, requires_grad=True)
    sample_T = torch.tensor([0, 0, 1, 1])
    loss_BT = torch.tensor([[0] * 4, [1] * 4, [2] * 4])
    a, b, c = fork(x_TD, Readers(loss_BT, sample_T, torch.zeros_like(sample_T), 2, 1))
    poison = torch.tensor([[value], [0.0], [1.0], [1.0]])
    (a.sum() + 2 * b.sum() + (c * poison).sum()).backward()
    assert torch.equal(x_TD.grad, torch.tensor([[3.0, 3.0], [3.0, 3.0], [4.0, 4.0], [4.0, 4.0]]))
    told = report(fork, 1)
    assert told is not None and told.broken == 1


def test_two_ranks_sum_the_gram_matrices_of_what_they_share() -> None:
    seen = []

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return 2 * tensor

    index_T = torch.zeros(3, dtype=torch.int64)
    for per in PER:
        fork = Fork("upgrad", ["a", "b"], per=per, reduce=reduce)
        x_TD = torch.zeros(3, 2, requires_grad=True)
        branches = fork(x_TD, Readers(torch.tensor([[0] * 3, [1] * 3]), index_T, index_T, 1, 1, index_T, 1))
        sum(branch.sum() for branch in branches).backward()
    assert [tensor.dtype for tensor in seen] == [torch.float64] * 3


def test_gamma_moves_in_a_line(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, harmonize={"method": "curriculum", "gamma": 0.0, "gamma_start": -0.4, "gamma_over": 0.5}
    ).config.harmonize
    assert [round(gamma(step, total=9, config=config), 3) for step in (0, 2, 4, 8)] == [-0.4, -0.2, 0.0, 0.0]


def test_draws_differ_by_step_and_micro_batch() -> None:
    numbers = {draw_number(seed, step, micro) for seed in range(3) for step in range(5) for micro in range(4)}
    assert len(numbers) == 60 and all(0 <= number < 1 << 63 for number in numbers)
    assert 0 <= draw_number(2**32 - 1, 10**6, 3) < 1 << 63


def test_losses_that_never_meet_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, harmonize={"method": "upgrad"}, objectives={"masked": {"weight": 1.0}})
    with pytest.raises(
        ConfigError, match=r"no two losses of this run read the same tokens.*\n  given: shapes, tones, mask"
    ):
        build_fork(run.config, run.model)


@pytest.mark.parametrize("method", ["upgrad", "mgda"])
def test_without_a_router_experts_are_those_of_the_modalities(tmp_path: Path, method: str) -> None:
    groups = [{"kind": "routed", "count": 2, "width": 8, "layers": "0"}, {"kind": "shared", "width": 16},
              {"kind": "modality", "width": 8}]  # fmt: skip
    run = Run(tmp_path, harmonize={"method": "upgrad"}, model={"dim": 16, "heads": 2, "experts": {"groups": groups}})
    by_modality = run.backward(make(run, method, "modality"))
    assert torch.equal(run.backward(make(run, method, "expert")), by_modality)
    assert not torch.equal(run.backward(make(run, method, "sample")), by_modality)


def test_a_block_that_is_computed_again_has_the_experts_of_the_first_time(run: Run) -> None:
    kept = run.backward(make(run, "upgrad", "expert"))
    run.model.trunk.recompute = True
    again = run.backward(make(run, "upgrad", "expert"))
    run.model.trunk.recompute = False
    torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"moe": "dense"}, "harmonize.per: groups tokens by the expert .* `model.moe: dense` has none"),
        (
            {"experts": {"groups": [{"kind": "shared", "width": 8}, {"kind": "routed", "width": 8, "layers": "0"}]}},
            "harmonize.per is expert, but the last block has no modality or routed expert",
        ),
    ],
)
def test_experts_that_are_not_there_are_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run = Run(
            tmp_path,
            harmonize={"method": "upgrad", "per": "expert"},
            model={"dim": 16, "heads": 2, "layers": 2, **model},
        )
        build_fork(run.config, run.model)


@pytest.mark.parametrize(
    ("harmonize", "message"),
    [
        ({"method": "upgrd"}, r"no harmonizer 'upgrd'\n  allowed: aligned_mtl"),
        ({"method": "upgrad", "gamma": 0.1}, "gamma.* has no meaning with `harmonize.method: upgrad`"),
        ({"method": "realign", "strength": 0.1}, "strength.* has no meaning with"),
        (
            {"method": "gradvac"},
            "harmonize.per: lies on one rank each, and gradvac's averages",
        ),
        ({"per": "batch"}, "per.* has no meaning with `harmonize.method: sum`"),
        ({"method": "realign", "gamma_over": 0.5}, "gamma_over.* has no meaning without `gamma_start`"),
        ({"method": "realign", "per": "samples"}, "harmonize.per"),
    ],
)
def test_refused(tmp_path: Path, harmonize: dict[str, Any], message: str) -> None:
    tiny_config(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run = Run(tmp_path, harmonize=harmonize)
        build_fork(run.config, run.model)


def test_every_method_is_known_to_the_configuration() -> None:
    from moemm.config.check_harmonize import METHODS as KNOWN

    assert set(KNOWN) == set(HARMONIZERS)
