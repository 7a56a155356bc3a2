"""What a rank holds of a model and its optimizer under each ZeRO stage: the only place that knows.

Everything is said in global names: a fragment is a run of elements of one flattened parameter, so that what one world
wrote can be cut anew for another. Private attributes of DeepSpeed 0.19.8 are read here; tests/distributed compare each
stage with the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moemm.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""States of AdamW that have the shape of their parameter."""
_STEP = "step"


@dataclass(frozen=True, slots=True)
class Fragment:
    """`length` elements of a tensor from `offset` on, as the engine holds them; views, so that both ways are copies.

    weight: flat; the fp32 master where the optimizer has one. moments: AdamW's, of the same length; none where nothing
    is trained. replicated: other ranks may hold the same. step: AdamW's count of steps.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    weight: torch.Tensor
    replicated: bool
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Elements of it."""
        return self.weight.numel()

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.length == math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the optimizer keeps a parameter: `length` elements of `master` from `start` on are those from `offset`."""

    master: torch.Tensor
    start: int
    length: int
    offset: int


def held(engine: Any, kept: Mapping[str, torch.Tensor] | None = None) -> Iterator[Fragment]:
    """The fragments that this rank of a DeepSpeed engine holds, in the order of the model; no rank waits for another.

    kept: what stands in for weights that the engine rounded and does not train; a rank may have none of them.
    Raises CheckpointError for weights that are quantized.
    """
    model, stage = engine.module, engine.zero_optimization_stage()
    states, places = _adam(engine).state, dict(_places(engine))
    for master in masters(engine):
        _begin(states, master, fused=_fused(engine))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if 0 in _shape(parameter):
            yield Fragment(name, _shape(parameter), 0, torch.empty(0), True)
        elif parameter.requires_grad:
            if parameter in places:
                yield _trained(name, parameter, places[parameter], states, replicated=stage == 0)
        elif kept is None:
            yield from _frozen(name, parameter)
        elif name in kept:
            yield Fragment(name, _shape(parameter), 0, kept[name].view(-1), True)
    for name, value in model.state_dict().items():
        if name not in parameters:
            yield Fragment(name, tuple(value.shape), 0, value.detach().reshape(-1), True)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # at rest ZeRO-3's parameters have no elements


def _trained(name: str, parameter: Any, place: _Place, states: Any, *, replicated: bool) -> Fragment:
    state = states[place.master]
    return Fragment(
        name,
        _shape(parameter),
        place.offset,
        _cut(place.master.detach(), place),
        replicated,
        {key: _cut(state[key], place) for key in MOMENTS},
        state[_STEP],
    )


def _cut(tensor: torch.Tensor, place: _Place) -> torch.Tensor:
    return tensor.view(-1).narrow(0, place.start, place.length)


def _frozen(name: str, parameter: Any) -> Iterator[Fragment]:
    """A parameter that is not trained: whole, or this rank's part of it under ZeRO-3."""
    if not hasattr(parameter, "ds_tensor"):
        yield Fragment(name, _shape(parameter), 0, parameter.detach().view(-1), True)
        return
    part = parameter.ds_tensor.detach()
    if not part.is_floating_point():
        raise CheckpointError(
            f"{name} is quantized by DeepSpeed (zero_quantized_nontrainable_weights), which loses its values. Leave "
            "that key out of deepspeed.extra to save checkpoints."
        )
    offset, length = _own_part(parameter)
    if length:
        yield Fragment(name, _shape(parameter), offset, part.view(-1)[:length], False)


def _own_part(parameter: Any) -> tuple[int, int]:
    """Offset and length of this rank's part under ZeRO-3, without the padding that makes parts equal."""
    size = parameter.ds_tensor.numel()
    offset = size * dist.get_rank(group=getattr(parameter, "ds_process_group", None))
    return offset, max(0, min(size, int(parameter.ds_numel) - offset))


def _places(engine: Any) -> Iterator[tuple[Any, _Place]]:
    """Where the optimizer keeps its part of each trained parameter; only of those of which this rank has one."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        yield from _places_of_stage_3(engine)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _places_of_stage_1_and_2(optimizer)
    elif stage:  # BF16_Optimizer, where gradients are accumulated in fp32
        for group, master in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    own, full = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield parameter, _Place(master, own.start, own.numel, full.start)
    else:
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                yield parameter, _Place(parameter, 0, parameter.numel(), 0)


def _places_of_stage_1_and_2(optimizer: Any) -> Iterator[tuple[Any, _Place]]:
    # Not parameter._hp_mapping: with round_robin_gradients it counts in the order before the parameters were reordered.
    for number, master in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = master.numel() * dist.get_rank(group=optimizer.real_dp_process_group[number])
        end = begin + master.numel()
        offsets = optimizer.round_robin_bit16_offsets[number]
        for parameter, first in zip(optimizer.round_robin_bit16_groups[number], offsets, strict=True):
            low, high = max(begin, first), min(end, first + parameter.numel())
            if low < high:
                yield parameter, _Place(master, low - begin, high - low, low - first)


def _places_of_stage_3(engine: Any) -> Iterator[tuple[Any, _Place]]:
    optimizer = engine.optimizer
    if optimizer.swap_optimizer:
        raise CheckpointError(
            "States that DeepSpeed keeps on NVMe cannot be saved; give offload_optimizer device: cpu."
        )
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            number, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset, length = _own_part(parameter)
            if length:
                yield parameter, _Place(optimizer.fp32_partitioned_groups_flat[number], start, length, offset)


def masters(engine: Any) -> Sequence[torch.Tensor]:
    """The tensors that AdamW steps on this rank."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            found: list[torch.Tensor] = list(getattr(optimizer, name))
            return found
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def set_steps(engine: Any, step: float) -> None:
    """Give all of AdamW's states on this rank one count of steps: those that are sharded share it over parameters."""
    for master in masters(engine):
        _adam(engine).state[master][_STEP].fill_(step)


def _adam(engine: Any) -> Any:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _fused(engine: Any) -> bool:
    return bool(_adam(engine).param_groups[0].get("fused"))


def _begin(states: Any, master: torch.Tensor, *, fused: bool) -> None:
    """The states that AdamW makes at its first step; none of it changes what that step does."""
    if not states[master]:
        device = master.device if fused else torch.device("cpu")
        states[master] = {
            _STEP: torch.zeros((), dtype=torch.float32, device=device),
            **{key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS},
        }


@torch.no_grad()
def spread(engine: Any) -> None:
    """After masters and frozen weights were set: make the weights that the model computes with from them.

    Collective under ZeRO-1 to 3.
    """
    if engine.zero_optimization_stage() == 3:
        for parameter, place in _places_of_stage_3(engine):
            parameter.ds_tensor.data.view(-1)[: place.length].copy_(_cut(place.master.detach(), place))
        engine.optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage():
        engine.optimizer.update_lp_params()


def release(engine: Any) -> None:
    """Before frozen weights are set: let go of the whole weights that ZeRO-3 keeps beside its parts. Collective."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
