"""The guard against mixed-up gradients: ranks must produce the same gradients, in the same order.

ZeRO-1 and ZeRO-2 join gradients in the order in which backward delivers them and add those joined buffers up over
ranks. Where ranks differ in which parameters get a gradient, or only in the order, one parameter's gradient is added
to another's, in silence when the sizes happen to agree; where they do not, gloo aborts and NCCL hangs.

So *before* each backward pass, when nothing has been sent yet, every rank works out from the autograd graph in which
order its parameters will get their gradients, and one message of a few bytes compares the hashes. A second message, at
the end of the pass and before DeepSpeed sends what it has gathered by then, compares the order in which the gradients
did come: re-entrant checkpointing and functions with a backward pass of their own hide parameters from the graph.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any

import torch
from torch import nn

from moemm.distributed import ExpertGroups, gather_objects, max_over_ranks
from moemm.errors import HealthError
from moemm.train.spread import spread_parameters

Node = Any
_LARGEST = 2**63 - 1
_ADVICE = (
    "Nothing was applied. Every rank must call every tokenizer, expert and head in one fixed order, with zero rows "
    "where its batch has none, add those results times 0 to the loss, and return zeros, not None, as their gradients."
)


def backward_order(root: Node, positions: dict[nn.Parameter, int]) -> list[int]:
    """Positions of the parameters in the order in which a backward pass from `root` gives them their gradients.

    root: `loss.grad_fn`. Follows the rule of autograd's engine: of the nodes that are ready, the one created last runs
    first. Some 0.6 microseconds a node.
    """
    waiting = _count_inputs(root)
    ready: list[tuple[int, int, Node]] = [(-root._sequence_nr(), 0, root)]
    pushed, order = 1, []
    while ready:
        node = heappop(ready)[2]
        parameter = getattr(node, "variable", None)
        if parameter is not None and parameter in positions:
            order.append(positions[parameter])
        for successor, _ in node.next_functions:
            if successor is None:
                continue
            waiting[successor] -= 1
            if waiting[successor] == 0:
                heappush(ready, (-successor._sequence_nr(), pushed, successor))
                pushed += 1
    return order


def _count_inputs(root: Node) -> dict[Node, int]:
    waiting, stack = {root: 0}, [root]
    while stack:
        for successor, _ in stack.pop().next_functions:
            if successor is None:
                continue
            if successor in waiting:
                waiting[successor] += 1
            else:
                waiting[successor] = 1
                stack.append(successor)
    return waiting


def fingerprint(order: Sequence[int]) -> int:
    """63 bits of the SHA-256 of a list of positions."""
    return int.from_bytes(hashlib.sha256(array("q", order).tobytes()).digest()[:8], "little") >> 1


class GradientGuard:
    """Compares over ranks which parameters get gradients and in which order. Does nothing with one rank.

    Make it before the engine, so that it sees each gradient before DeepSpeed takes it away. A gradient that the graph
    promised and a kernel left out (None) becomes zeros: DeepSpeed would put the next one in its place.
    Under ZeRO-3 the order in which modules fetch their weights in forward is part of the comparison (`watch_forward`).
    groups: where experts are spread. Their gradients are compared among the ranks that hold the same ones; among all
    ranks, where in the order the experts of each layer come, for there the others' gradients are sent before.
    """

    def __init__(
        self, model: nn.Module, groups: ExpertGroups | None = None, *, world_size: int, watch_forward: bool = False
    ) -> None:
        self._groups = groups or ExpertGroups()
        spread = {id(parameter): name for name, parameter in spread_parameters(model)}
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.enabled = world_size > 1
        self._positions = {parameter: position for position, parameter in enumerate(parameters)}
        labels = [spread.get(id(one), name) for name, one in zip(self.names, parameters, strict=True)]
        self.labels = list(dict.fromkeys(labels))
        """Names that all ranks have: of parameters, and of the experts of a layer as one."""
        numbers = {name: number for number, name in enumerate(self.labels)}
        self._label_of = [numbers[name] for name in labels]
        self._is_spread = [id(one) in spread for one in parameters]
        self._happened: list[int] = []
        self._forward: list[str] = []
        if self.enabled:
            self._watch(model, parameters, watch_forward)

    def _watch(self, model: nn.Module, parameters: list[nn.Parameter], watch_forward: bool) -> None:
        for position, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._record, position))
        if watch_forward:
            for name, module in model.named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_pre_hook(partial(self._record_call, name))

    def _record(self, position: int, parameter: torch.Tensor) -> None:
        self._happened.append(position)
        if parameter.grad is None:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # at rest ZeRO-3's parameters have no elements
            parameter.grad = parameter.new_zeros(shape)

    def _record_call(self, name: str, module: nn.Module, _: Any) -> None:
        if module.training:
            self._forward.append(name)

    def before_backward(self, loss: torch.Tensor, *, flags: Sequence[int] = ()) -> list[int]:
        """Compare the coming backward pass over ranks; the same message carries `flags`, whose largest values return.

        Raises HealthError on all ranks, with the first parameters that differ, before a gradient is computed or sent.
        Where the first flag is raised nothing is compared: the caller is about to stop.
        """
        if not self.enabled:
            return list(flags)
        planned = backward_order(loss.grad_fn, self._positions)
        self._happened.clear()
        calls, self._forward = self._forward, []
        marks = [*self._marks(planned), fingerprint([hash_text(name) for name in calls])]
        agreed = max_over_ranks([*_both_ends(marks), *flags])
        differ, agreed = _differ(agreed[: 2 * len(marks)]), agreed[2 * len(marks) :]
        if not any(agreed[:1]):
            self._check(differ[:-1], planned)
            if differ[-1]:
                self._refuse("calls of modules", calls)
            loss.register_hook(self._at_start)
        return agreed

    def _at_start(self, _: torch.Tensor) -> None:
        # Runs behind the last gradient, but before DeepSpeed sends what it has gathered by then.
        torch.autograd.Variable._execution_engine.queue_callback(self._at_end)

    def _at_end(self) -> None:
        self._check(_differ(max_over_ranks(_both_ends(self._marks(self._happened)))), self._happened)

    def _marks(self, order: Sequence[int]) -> list[int | None]:
        """Of what all ranks have in common; then, where experts are spread, of the whole order at each position."""
        own: list[int | None] = [fingerprint(self._common(order))]
        if self._groups.size > 1:
            own += [None] * self._groups.size
            own[1 + self._groups.position] = fingerprint(order)
        return own

    def _common(self, order: Sequence[int]) -> list[int]:
        """The numbers of the labels in that order; parameters of a layer's experts that follow each other as one."""
        found: list[int] = []
        for position in order:
            label = self._label_of[position]
            if not (self._is_spread[position] and found and found[-1] == label):
                found.append(label)
        return found

    def _check(self, differ: Sequence[bool], order: Sequence[int]) -> None:
        """differ: of each of `_marks`."""
        if differ[0]:
            self._refuse("gradients", [self.labels[number] for number in self._common(order)])
        for position, differs in enumerate(differ[1:]):
            if differs:
                self._refuse("gradients", [self.names[number] for number in order], position=position)

    def _refuse(self, what: str, mine: list[str], *, position: int | None = None) -> None:
        """position: compare the ranks at that position of their groups, which hold the same experts; None: all."""
        lists = gather_objects(mine)
        ranks = list(range(len(lists)))
        if position is not None:
            ranks = [rank for rank, own in enumerate(gather_objects(self._groups.position)) if own == position]
        first = ranks[0]
        other = next(rank for rank in ranks if lists[rank] != lists[first])
        difference = first_difference(lists[first], lists[other], f"rank {first}", f"rank {other}")
        raise HealthError(
            f"Ranks differ in their {what}; DeepSpeed would mix up gradients of different parameters.\n"
            f"{difference}\n{_ADVICE}"
        )


def _both_ends(marks: Sequence[int | None]) -> list[int]:
    """What to take the largest of over ranks, to see where their marks differ; None: this rank has no such mark."""
    high = [-1 if mark is None else mark for mark in marks]
    low = [-_LARGEST if mark is None else -mark for mark in marks]
    return [*high, *low]


def _differ(largest: Sequence[int]) -> list[bool]:
    """Of each mark, whether ranks have different ones."""
    half = len(largest) // 2
    return [high != -low for high, low in zip(largest[:half], largest[half:], strict=True)]


def hash_text(text: str) -> int:
    """63 bits of the SHA-256 of a text: the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def first_difference(left: list[str], right: list[str], left_name: str, right_name: str) -> str:
    """Say in which names two lists differ, or where their order parts."""
    lines = [
        f"only {name}: {_some(extra)}"
        for name, extra in ((left_name, _without(left, right)), (right_name, _without(right, left)))
        if extra
    ]
    if not lines:
        pairs = zip(left, right, strict=False)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
        here = [names[position] if position < len(names) else "nothing" for names in (left, right)]
        lines = [f"the same names in another order, from number {position} on: "
                 f"{left_name} has {here[0]}, {right_name} has {here[1]}"]  # fmt: skip
    return "; ".join(lines)


def _without(names: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
