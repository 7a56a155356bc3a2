"""Our configuration -> DeepSpeed's engine. With checkpoint/store.py the only importer of deepspeed."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moemm.checkpoint.state import RankState
from moemm.checkpoint.store import Share, rank_state, read_rank
from moemm.config import deepspeed_section
from moemm.config.schema import Config
from moemm.distributed import ExpertGroups, World, note_collective, prepare_environment
from moemm.train import zero_experts
from moemm.train.lean import compile_when_called, mark_uncompiled, without_compiler

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import_deepspeed() -> Any:
    prepare_environment()
    with _quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Names of collectives that torch is about to rename; every call of DeepSpeed's would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # This op would be compiled at the first collective: a minute or more, for gains that small models do not see. The
    # table is made when it is first asked for, by compiling a program and asking GPUs; only that op looks into it.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # ZeRO brings an optimizer along, Muon, that asks torch for a compiled function when it is imported.
    deepspeed.runtime.compiler.compile = lambda: compile_when_called
    return deepspeed


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, in the model's own order on every rank: matrices with weight decay, the rest without; and the same of
    parameters that only some ranks have, marked as DeepSpeed wants it.

    Matrices are parameters of two and more axes, except biases (of stacked experts, too) and embedding tables.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    lists: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        matrix = parameter.ndim >= 2 and "bias" not in leaf and "embedding" not in leaf and id(parameter) not in tables
        lists.setdefault((matrix, getattr(parameter, "group_name", "")), []).append(parameter)
    groups = []
    for (matrix, name), parameters in sorted(lists.items(), key=lambda item: (item[0][1], not item[0][0])):
        mark = {"name": name, "moe": True} if name else {}
        groups.append({"params": parameters, "weight_decay": weight_decay if matrix else 0.0, **mark})
    return groups


def _wants_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of a ZeRO-3 leaf module, the first of which has a gradient.

    DeepSpeed reduces the gradients of a leaf, and lets go of its weights, when those of its inputs are there. Where all
    before it is frozen no input would have one, and torch calls that hook at once, before the leaf's backward pass.
    """
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return inputs
    return inputs[0].detach().requires_grad_(), *inputs[1:]


def _place(deepspeed: Any, model: nn.Module, section: dict[str, Any], device: torch.device) -> None:
    """Bring the weights to the device as DeepSpeed trains them; it would bring all of them there in fp32 first.

    bf16 is rounded on the host, and ZeRO-3 divides each tensor among the ranks before the next one comes.
    """
    if section.get("bf16", {}).get("enabled"):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    zero = section["zero_optimization"]
    if zero["stage"] == 3:
        quantized = {key: zero.get(key, False) for key in _QUANTIZED}
        deepspeed.zero.Init(module=model, config_dict_or_path=section, **quantized)
    model.to(device)


class Engine:
    """The DeepSpeed engine with the few calls that training needs.

    model: on the host, with the same weights on every rank; from here on DeepSpeed owns its parameters, and they are on
    `world.device`.
    """

    def __init__(self, model: nn.Module, config: Config, world: World, *, groups: ExpertGroups | None = None) -> None:
        """groups: of the ranks that the model's experts are spread over. Raises ConfigError."""
        deepspeed = _import_deepspeed()
        self.world, self.zero_stage = world, config.deepspeed.zero_stage
        self._utils = deepspeed.utils
        self.model = model
        self.grad_norm: float | None = None
        """Norm of the last step's gradient before clipping; NaN if the step was not applied, None where not known."""
        self._groups, self._clip = groups or ExpertGroups(), config.train.clip
        self.share = Share.of(model, world)
        """Which tensors this rank writes of those that others have, too."""
        self.kept = self._frozen_values(model) if config.train.precision == "bf16" else None
        """In bf16, the frozen parameters before they are rounded, on the rank that writes them: the optimizer has no
        fp32 copy of them."""
        if self.zero_stage == 3:
            for module in model.modules():
                if getattr(module, "_z3_leaf", False):
                    module.register_forward_pre_hook(_wants_gradient)
        zero_experts.mark_experts(deepspeed, model, self._groups, zero_stage=self.zero_stage)
        mark_uncompiled()
        section = deepspeed_section(config, world_size=world.size)
        if self._is_spread:
            zero_experts.adapt_section(section, config, model)
        parameters = parameter_groups(model, weight_decay=config.train.weight_decay)
        with _quiet():
            backend = torch.distributed.get_backend()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            _place(deepspeed, model, section, world.device)
            optimizer = without_compiler(
                torch.optim.AdamW(parameters, lr=config.train.lr, betas=config.train.betas, fused=True)
            )
            self.deepspeed = deepspeed.initialize(model=model, optimizer=optimizer, config=section)[0]
        if self._is_spread:
            zero_experts.adapt_optimizer(self.deepspeed.optimizer, zero_stage=self.zero_stage)

    @property
    def _is_spread(self) -> bool:
        return self._groups.size > 1

    def _frozen_values(self, model: nn.Module) -> dict[str, torch.Tensor]:
        frozen = {name: one for name, one in model.named_parameters() if not one.requires_grad}
        return {name: one.detach().cpu().clone() for name, one in frozen.items() if name in self.share.names}

    def state(self) -> RankState:
        """What this rank writes into a checkpoint; mostly views of the engine's memory. Raises CheckpointError."""
        return rank_state(self.deepspeed, self.world, self.share, kept=self.kept)

    def restore(self, folder: Path) -> bool:
        """Load a verified checkpoint, of whichever world size and ZeRO stage; all ranks together.

        Returns whether random states were there for this world. Raises CheckpointError, before a weight is touched.
        """
        self.kept, same_world = read_rank(self.deepspeed, folder, self.world, kept=self.kept)
        return same_world

    def __call__(self, *inputs: Any) -> Any:
        """The model's output, through DeepSpeed's forward hooks (ZeRO-3 fetches weights there)."""
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` / accumulation, averaged over ranks at the last micro-batch of a step."""
        self.deepspeed.backward(loss)

    def accumulate(self, loss: torch.Tensor, *, last: bool, retain_graph: bool = False) -> None:
        """`backward` with the end of an accumulation said by `last`, so that a step may have several of them."""
        note_collective("DeepSpeed's reduction of gradients")
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, retain_graph=retain_graph)

    @property
    def keeps_graph(self) -> bool:
        """Whether backward may be called several times after one forward pass: ZeRO-3 has no weights left then."""
        return self.zero_stage < 3

    @property
    def shares_gradient(self) -> bool:
        """Whether `take_gradient` gives each rank a part of its own; if not, all have the whole."""
        return self.zero_stage > 0

    def take_gradient(self) -> list[torch.Tensor]:
        """This rank's part of each trainable parameter's gradient, averaged over ranks, flat and in fp32; and clear it.

        Empty where it has no part. To be called after the last `accumulate`. The parts of all ranks are disjoint, and
        together the whole gradient, if `shares_gradient`.
        """
        found = [part.detach().to(torch.float32, copy=True).flatten() for part in self._parts()]
        self.deepspeed.optimizer.zero_grad()
        return found

    def discard(self) -> None:
        """Forget the gradients of a step that is not to be applied, at any place between two backward passes."""
        if self.zero_stage == 0:
            self.deepspeed.zero_grad()
            return
        optimizer = self.deepspeed.optimizer
        optimizer.zero_grad()
        if self.zero_stage < 3:  # what the micro-batches before added up
            for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                held.update(dict.fromkeys(held))

    def put_gradient(self, parts: Sequence[torch.Tensor]) -> None:
        """Make `parts`, as `take_gradient` gave them, the gradient that the next `step` applies."""
        for parameter, part in zip(self._trainable(), parts, strict=True):
            if self.zero_stage == 0:
                parameter.grad = part.view_as(parameter).to(parameter.dtype)
            elif self.zero_stage == 3:
                self._utils.safe_set_local_grad(parameter, part)
            elif part.numel():
                held = self._held(parameter)
                held.copy_(part.view_as(held))

    def _trainable(self) -> list[Any]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _parts(self) -> list[torch.Tensor]:
        if self.zero_stage == 0:
            grads = [(parameter, parameter.grad) for parameter in self._trainable()]
            return [torch.zeros_like(parameter) if grad is None else grad for parameter, grad in grads]
        if self.zero_stage == 3:
            return [self._utils.safe_get_local_grad(parameter) for parameter in self._trainable()]
        return [self._held(parameter) for parameter in self._trainable()]

    def _held(self, parameter: Any) -> torch.Tensor:
        """Of ZeRO-1 and 2: what DeepSpeed's safe_get_full_grad gathers from each rank; nothing where it has no part."""
        if parameter._hp_mapping is None:
            return torch.empty(0, device=self.world.device)
        held: torch.Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return held

    def step(self, *, lr: float) -> None:
        """End a micro-batch; after the last one of a step clip, apply AdamW at `lr`, and clear the gradients.

        A gradient that is not finite is not applied; `grad_norm` then says so.
        """
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if boundary and self.zero_stage == 0:
            self.grad_norm = self._norm_of_whole_gradients()
            if not math.isfinite(self.grad_norm):
                return
            if self._is_spread and self._clip:
                self._scale_gradients(min(1.0, self._clip / (self.grad_norm + 1e-6)))
        note_collective("DeepSpeed's step")
        skipped = self.deepspeed.skipped_steps
        self.deepspeed.step()
        if boundary and self.zero_stage > 0:
            norm = self.deepspeed.get_global_grad_norm()
            self.grad_norm = None if norm is None else float(norm)
            if self.deepspeed.skipped_steps > skipped:
                self.grad_norm = math.nan

    def _norm_of_whole_gradients(self) -> float:
        # ZeRO-0 applies what it has, NaN too; the gradients are averaged over ranks already, so all ranks see the same.
        held = [(parameter, parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        if not self._is_spread:
            return float(torch.nn.utils.get_total_norm([gradient for _, gradient in held]))
        squares = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for parameter, gradient in held:
            squares[int(hasattr(parameter, "group_name"))] += torch.linalg.vector_norm(gradient).double() ** 2
        torch.distributed.all_reduce(squares[1], group=self._groups.exchange)
        return math.sqrt(float(squares.sum()))

    def _scale_gradients(self, factor: float) -> None:
        for parameter in self.model.parameters():
            if factor < 1.0 and parameter.grad is not None:
                parameter.grad.mul_(factor)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()
