"""The fork: where several losses read one stream, their gradients meet again, and are weighed before they are added.

Forward hands the stream to each loss as an alias. Autograd then calls one backward function with the gradients of all
losses with respect to the stream; there the Gram matrices are taken, and the weighted sum goes on into the trunk. So
there is one backward pass, and no hook into the engine. What lies behind the fork (heads) gets its own loss's gradient.

T tokens, D width, B branches, L losses, X groups (tokens, samples, modalities, experts, or all together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from moemm.harmonize.registry import find
from moemm.harmonize.settler import Settler

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over ranks."""


class Readers(NamedTuple):
    """Who reads the stream.

    loss_BT: (B, T) int64: of which loss is the gradient that branch b brings to token t; -1 for none.
    sample_T, modality_T: (T,) int64 under num_samples and num_modalities.
    expert_T: (T,) int64 under num_experts, the expert that the last block sent each token to; only for `expert`.
    """

    loss_BT: torch.Tensor
    sample_T: torch.Tensor
    modality_T: torch.Tensor
    num_samples: int
    num_modalities: int
    expert_T: torch.Tensor | None = None
    num_experts: int = 0

    def groups(self, per: str) -> tuple[torch.Tensor, int]:
        """(T,) int64 which group each token is judged with, and the number of groups."""
        if per == "token":
            return torch.arange(self.sample_T.shape[0], device=self.sample_T.device), self.sample_T.shape[0]
        if per == "sample":
            return self.sample_T, self.num_samples
        if per == "modality":
            return self.modality_T, self.num_modalities
        if per == "expert":
            assert self.expert_T is not None, "the trunk was not asked for experts"
            return self.expert_T, self.num_experts
        assert per == "batch"
        return torch.zeros_like(self.sample_T), 1


class Fork(Settler):
    """Hands a stream to branches, and settles their gradients' conflicts on the way back.

    method: as for `weights`. per: which tokens are judged together; tokens and samples lie on one rank, of modalities,
    experts and the batch the Gram matrices are summed by `reduce`. losses: their names.
    """

    def __init__(
        self,
        method: str,
        losses: Sequence[str],
        *,
        per: str = "sample",
        reduce: Reduce,
        gamma: float = 0.0,
        strength: float = 0.5,
    ):
        super().__init__(method, losses, per=per, gamma=gamma, strength=strength)
        self.reduce = reduce
        self.watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        """Gets the gradients of the branches and of which loss each is, as `gram_matrices` does, before they are
        settled."""
        self.judged = torch.zeros(2)
        """Samples that were judged before the heads since the last report, and those of them that were left out."""

    @property
    def drops(self) -> bool:
        """Whether samples are left out before the heads, which `judge` decides."""
        return self.per == "sample" and bool(find(self.method).drops)

    def judge(
        self, x_TD: torch.Tensor, readers: Readers, loss: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        """(num_samples,) 1 for the samples whose losses agree, 0 for those to be left out; nothing reaches the trunk.

        loss: from the aliases, one a branch, to the sum of the losses whose gradients are to be compared. Its heads get
        no gradient. What then comes back through `forward` is settled without dropping anything.
        """
        with torch.enable_grad():
            leaves = [x_TD.detach().requires_grad_() for _ in readers.loss_BT]
            gradients = torch.autograd.grad(loss(leaves), leaves, allow_unused=True)
        group_T, num_groups = readers.groups(self.per)
        z_TBD, loss_TB, _ = _stack(gradients, readers)
        gram_XLL = gram_matrices(z_TBD, loss_TB, group_T, (num_groups, len(self.losses)))
        found = self.weigh(gram_XLL, find(self.method).drops)
        keep_X = (found.w > 0.0).all(1)
        meets_X = (gram_XLL.diagonal(dim1=1, dim2=2) > 0.0).sum(1) > 1
        counts = torch.stack([meets_X.sum(), (meets_X & ~keep_X).sum()])
        self.judged = self.judged.to(counts.device) + counts  # on the device: nothing waits for it
        self.context.gamma, self.told = -1.0, True
        return keep_X.float()

    def take_judged(self) -> torch.Tensor:
        """(2,) samples that were judged since the last call, and those of them that were left out."""
        judged, self.judged = self.judged, torch.zeros(2)
        return judged

    def forward(self, x_TD: torch.Tensor, readers: Readers) -> tuple[torch.Tensor, ...]:
        """One alias of the stream a branch; a stream without gradient is handed out as it is."""
        branches = readers.loss_BT.shape[0]
        if not (torch.is_grad_enabled() and x_TD.requires_grad):
            return (x_TD,) * branches
        return _Join.apply(x_TD, self, readers)

    def settle(self, gradients: Sequence[torch.Tensor | None], readers: Readers) -> torch.Tensor | None:
        """(T, D) the weighted sum of the branches' gradients, in their dtype; None where there is none.

        Every rank takes part in the sum of shared Gram matrices, also one without any gradient.
        """
        group_T, num_groups = readers.groups(self.per)
        z_TBD, loss_TB, dtype = _stack(gradients, readers)
        if self.watch is not None and z_TBD is not None:
            self.watch(z_TBD, loss_TB)
        gram_XLL = gram_matrices(z_TBD, loss_TB, group_T, (num_groups, len(self.losses)))
        if self.shared:
            gram_XLL = self.reduce(gram_XLL)
        found = self.weigh(gram_XLL)
        if z_TBD is None:
            return None
        w_TB = found.w.to(z_TBD)[group_T].gather(1, loss_TB.clamp_min(0)) * (loss_TB >= 0)
        if found.broken:
            z_TBD = z_TBD.nan_to_num(0.0, 0.0, 0.0)  # their weight is 0, which alone would leave them not a number
        settled_TD = w_TB[:, :1] * z_TBD[:, 0]
        for branch in range(1, z_TBD.shape[1]):  # faster than a product of small matrices for each token
            settled_TD.addcmul_(w_TB[:, branch, None], z_TBD[:, branch])
        return settled_TD.to(dtype)


def _stack(
    gradients: Sequence[torch.Tensor | None], readers: Readers
) -> tuple[torch.Tensor | None, torch.Tensor, torch.dtype]:
    """Those gradients that are there, fp32, of which loss each is, and their type."""
    there = [(number, one) for number, one in enumerate(gradients) if one is not None]
    loss_TB = readers.loss_BT[[number for number, _ in there]].T
    if not there:
        return None, loss_TB, torch.float32
    return torch.stack([one.float() for _, one in there], dim=1), loss_TB, there[0][1].dtype


def gram_matrices(
    z_TBD: torch.Tensor | None, loss_TB: torch.Tensor, group_T: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """(X, L, L) float64: of each group, the products of the losses' gradients over all its tokens.

    z: gradient of each branch, fp32, 0 where it has none; loss: which loss it is of, -1 for none; shape: (X, L).
    Products of one token are fp32. The row and column of a loss with a gradient that is not finite are not numbers.
    """
    num_groups, num_losses = shape
    if z_TBD is None:
        return torch.zeros(num_groups, num_losses, num_losses, dtype=torch.float64, device=group_T.device)
    # Branches that bring the same losses to the tokens of a group add up before they are spread over the losses.
    kinds_KB, kind_T = loss_TB[:1], torch.zeros_like(group_T)
    if not torch.equal(loss_TB, kinds_KB.expand_as(loss_TB)):
        kinds_KB, kind_T = torch.unique(loss_TB, dim=0, return_inverse=True)
    num_branches, cell_T = loss_TB.shape[1], group_T * len(kinds_KB) + kind_T
    gram_CBB = z_TBD.new_zeros(num_groups * len(kinds_KB), num_branches, num_branches, dtype=torch.float64)
    gram_CBB.index_add_(0, cell_T, (z_TBD @ z_TBD.mT).double())
    at_KBL = (kinds_KB[:, :, None] == torch.arange(num_losses, device=group_T.device)).double()
    gram_XKBB = gram_CBB.view(num_groups, len(kinds_KB), num_branches, num_branches)
    broken_XKB = ~torch.isfinite(gram_XKBB.diagonal(dim1=2, dim2=3))
    gram_XLL = torch.einsum("xkbc,kbl,kcm->xlm", gram_XKBB.nan_to_num(0.0, 0.0, 0.0), at_KBL, at_KBL)
    broken_XL = torch.einsum("xkb,kbl->xl", broken_XKB.double(), at_KBL) > 0.0
    return gram_XLL.masked_fill(broken_XL[:, :, None] | broken_XL[:, None, :], torch.nan)


class _Join(torch.autograd.Function):
    """Aliases forward; the settled sum backward."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, fork: Fork, readers: Readers) -> tuple[torch.Tensor, ...]:
        ctx.fork, ctx.readers, ctx.like = fork, readers, x_TD.new_empty(0)
        ctx.shape = x_TD.shape
        ctx.set_materialize_grads(False)
        return tuple(x_TD.view_as(x_TD) for _ in range(readers.loss_BT.shape[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        settled_TD = ctx.fork.settle(gradients, ctx.readers)
        # Zeros, not None: what lies before the fork gets its gradient in the same order on every rank.
        return ctx.like.new_zeros(ctx.shape) if settled_TD is None else settled_TD, None, None
