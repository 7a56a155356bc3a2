"""What runs inside the ranks of test_experts.py: experts over ranks, compared with one rank that has them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import PRETEXT, SMALL, Apart, Poisoned, Recorder, deal, done
from resharding import content
from safetensors.torch import save_file
from torch import nn

from moemm.checkpoint.store import full_weights
from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig
from moemm.distributed import World, broadcast_object, connect, expert_groups
from moemm.errors import ConfigError, HealthError
from moemm.moe import ExpertMap, ExpertShape, MoELayer
from moemm.moe.placement import place_experts
from moemm.testing.tiny import tiny_config
from moemm.testing.traffic import count_traffic
from moemm.train import guard as guard_module
from moemm.train.callbacks import CheckpointingCallback
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.spread import spread_parameters
from moemm.train.trainer import Trainer

SHARED, MODALITY = {"kind": "shared", "width": 16}, {"kind": "modality", "width": 8}


def experts(routed: int, *more: dict[str, Any], modality: dict[str, Any] = MODALITY) -> dict[str, Any]:
    groups = [SHARED, modality, {"kind": "routed", "count": routed, "width": 8}, *more]
    return {"experts": {"groups": groups}, "router": {"top_k": 2}}


LORA = [
    {"kind": "routed", "id": "basis", "width": 8},
    {"kind": "lora", "base": "basis", "rank": 2, "count": 2},
    {"kind": "lora", "base": "shared", "rank": 2, "modalities": ["image"]},
    {"kind": "zero"},
]
TWICE = {"accumulation": 2, "activation_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    # 3 modality and 3 routed experts: 6 are divided by 2; with 5 routed ones 8 by 4.
    "even": {"model": experts(3)},
    "apart": {"model": experts(3), "train": TWICE},
    "quarters": {"model": experts(5)},
    "quarters apart": {"model": experts(5), "train": TWICE},
    "uneven": {"model": experts(2), "train": {"clip": 0.1}},
    "wide": {"model": experts(3, modality={"kind": "modality", "width": 12})},
    "first layer": {"model": experts(3, modality={**MODALITY, "layers": "0"})},
    "lora": {"model": experts(3, *LORA)},
    "only": {"model": experts(3), "train": {"only": ["*.experts.routed_*", "heads.*"]}},
    "settled": {
        "model": experts(3),
        "objectives": {**PRETEXT, "similarity": {"weight": 2.0}},
        "harmonize": {"method": "upgrad", "per": "expert", "scale": "uncertainty"},
    },
    "placed": {
        "model": experts(3),
        "deepspeed": {
            "placement": {
                "modality_image": [0], "modality_record": [0, 1], "modality_series": [0],
                "routed_0": [0], "routed_1": [0], "routed_2": [1, 0],
            }
        },
    },
    "bf16": {"model": experts(3), "train": {"precision": "bf16"}},
}  # fmt: skip
"""Those named apart deal out modalities and tasks to ranks."""
Case = tuple[str, int, int]
"""Name, ZeRO stage, ep_size."""


def trainer_of(folder: str, world: World, case: Case, **sections: dict[str, Any]) -> tuple[Trainer, Recorder]:
    name, stage, ep_size = case
    given = {key: dict(value) for key, value in {**CASES[name], **sections}.items()}
    mine = Path(folder) if world.is_main else Path(folder) / f"rank_{world.rank}"
    mine.mkdir(exist_ok=True)
    output = f"{name.replace(' ', '_')}_{stage}_{ep_size}_{world.size}"
    train = {"output": str(Path(folder) / output), "steps": 4, "batch_size": 8, "lr": 5e-4, **given.pop("train", {})}
    extra = SMALL if stage == 3 else {"zero_optimization": {"reduce_bucket_size": 2000}} if stage else {}
    deepspeed = {"zero_stage": stage, "ep_size": ep_size, "extra": extra, **given.pop("deepspeed", {})}
    if ep_size == 1:
        deepspeed.pop("placement", None)
    recorder = Recorder()
    setup, _ = prepare(tiny_config(mine, train=train, deepspeed=deepspeed, **given), resume=False)
    return Trainer(setup, world, [recorder], StopRequest()), recorder


def trained(folder: str, cases: list[Case]) -> dict[str, Any]:
    """Of each case losses, scores, the last norm and what this rank holds; the weights go into a file of the folder."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for case in cases:
        trainer, recorder = trainer_of(folder, world, case)
        master = case[0] == "bf16"
        before = full_weights(trainer.engine.model, world, master=master)
        with pytest.MonkeyPatch.context() as patch:
            if "apart" in case[0]:
                deal(patch, Apart)
            trainer.run()
        scores = trainer.evaluate("val")
        name = " ".join(map(str, case))
        weights = full_weights(trainer.engine.model, world, master=master)
        steps = {key: apart(before[key], value) for key, value in weights.items() if value.is_floating_point()}
        if world.is_main:
            save_file(weights, Path(folder) / f"{name}.{world.size}")
        own = [key for key, _ in trainer.engine.model.named_parameters() if ".experts." in key]
        found[name] = {
            "losses": recorder.losses,
            "scores": [score["value"] for score in scores.values()],
            "norm": trainer.engine.grad_norm,
            "own": own,
            "moved": [max(steps[key] for key in steps if (".experts." in key) == inside) for inside in (True, False)]
            if steps
            else [],
        }
        done(trainer)
    return found


def checkpoint(folder: str, source: str) -> Path:
    return Path(folder) / "saved" / source / "checkpoints" / "step_000002"


def saved(folder: str, cases: list[Case]) -> dict[str, Any]:
    """Losses of uninterrupted runs, and what a checkpoint in their middle holds."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for case in cases:
        name = "_".join(map(str, (*case, world.size)))
        output = str(checkpoint(folder, name).parents[1])
        trainer, recorder = trainer_of(folder, world, case, train={"output": output, "checkpoint": {"every": 2}})
        trainer._callbacks.append(CheckpointingCallback(every=2))
        trainer.run()
        held = broadcast_object(content(checkpoint(folder, name)) if world.is_main else "")
        found[name] = [recorder.losses, held]
        done(trainer)
    return found


def went_on(folder: str, pairs: list[tuple[str, Case]]) -> dict[str, Any]:
    """From such a checkpoint on as another case: what it holds when it is saved again at once, and losses."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for source, case in pairs:
        name = "_".join(map(str, (source, "to", *case, world.size)))
        output = str(checkpoint(folder, name).parents[1])
        trainer, recorder = trainer_of(folder, world, case, train={"output": output})
        trainer.restore(checkpoint(folder, source), 2)
        trainer.save()
        held = broadcast_object(content(checkpoint(folder, name)) if world.is_main else "")
        trainer.run()
        found[name] = [recorder.losses, held]
        done(trainer)
    return found


def poisoned(folder: str, cases: list[Case]) -> dict[str, Any]:
    """A sample of rank 1 whose tokens become infinite on the way to another rank's experts: steps done, all finite."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for case in cases:
        trainer, recorder = trainer_of(folder, world, case, train={"steps": 4, "output": f"{folder}/nan_{case[1]}"})
        with pytest.MonkeyPatch.context() as patch:
            deal(patch, Poisoned)
            trainer.run()
        weights = full_weights(trainer.engine.model, world, master=False)
        finite = all(bool(torch.isfinite(value).all()) for value in weights.values() if value.is_floating_point())
        found[str(case[1])] = [trainer.step, finite, recorder.losses[-1], recorder.messages]
        done(trainer)
    return found


def guarded(folder: str) -> dict[str, str]:
    """What the guard says, in groups of 2 of 4 ranks, where one rank's order of gradients is another."""
    world = connect(timeout_s=60)
    found = {}
    for mode, guilty in (("experts", 2), ("dense", 1), ("place", 3)):
        trainer, _ = trainer_of(folder, world, ("even", 2, 2), train={"steps": 1, "output": f"{folder}/guard_{mode}"})
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == guilty:
                patch.setattr(guard_module, "backward_order", disorder(trainer.engine.model, mode))
            try:
                trainer.run()
                found[mode] = "no error"
            except HealthError as error:
                found[mode] = str(error)
        done(trainer)
    return found


def disorder(model: nn.Module, mode: str) -> Callable[..., list[int]]:
    """The order of gradients with two parameters exchanged: two experts, two others, or one of each."""
    own, positions = guard_module.backward_order, [p for p in model.parameters() if p.requires_grad]
    spread = {id(parameter) for _, parameter in spread_parameters(model)}
    inside = [number for number, one in enumerate(positions) if id(one) in spread]
    outside = [number for number, one in enumerate(positions) if id(one) not in spread]
    a, b = {"experts": inside[:2], "dense": outside[:2], "place": [inside[0], outside[0]]}[mode]

    def order(root: Any, known: dict[nn.Parameter, int]) -> list[int]:
        return [b if one == a else a if one == b else one for one in own(root, known)]

    return order


ROWS = {"mixed": (7, 5, 9, 3), "idle ranks": (6, 0, 4, 0), "none at all": (0, 0, 0, 0)}
"""Tokens of each of 4 ranks."""


def dispatched() -> dict[str, Any]:
    """How far a layer over 4 ranks is from one with all experts, in float64: outputs, and gradients of everything."""
    world = connect(timeout_s=60)
    groups = expert_groups(4, timeout_s=60)
    found: dict[str, Any] = {}
    for name, rows in ROWS.items():
        for modality in (None, 0):  # tokens of all modalities, or of one: then some experts have none on any rank
            whole, spread = make_layer(), make_layer()
            spread.spread(place_experts(whole.map, ep_size=4, given={})[0], group=groups.exchange, position=world.rank)
            generator = torch.Generator().manual_seed(world.rank)
            x_TD = torch.randn(rows[world.rank], 12, generator=generator, dtype=torch.float64)
            row_T = torch.randint(3, (len(x_TD),), generator=generator)
            row_T = row_T if modality is None else torch.full_like(row_T, modality)
            weight_TD = torch.randn(x_TD.shape, generator=generator, dtype=torch.float64)
            results = [run(layer, x_TD, row_T, weight_TD) for layer in (whole, spread)]
            with count_traffic() as traffic, torch.no_grad():
                spread(x_TD, row_T)
            found[f"{name} {modality}"] = [
                differences(whole, spread, *results),
                sent(traffic),
                expected(whole, spread, x_TD, row_T),
            ]
    return found


def make_layer() -> MoELayer:
    torch.manual_seed(0)
    groups = [Group(kind="shared", width=8), Group(kind="modality", width=6), Group(kind="routed", count=4, width=5)]
    expert_map = ExpertMap.from_config(groups, ("image", "audio", "text"))
    shape = ExpertShape(dim=12, activation="gelu", num_layers=2)
    return MoELayer(expert_map, shape, RouterConfig(top_k=2)).double()


def run(layer: MoELayer, x_TD: torch.Tensor, row_T: torch.Tensor, weight_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x_TD.clone().requires_grad_()
    out_TD, _ = layer(leaf, row_T)
    (out_TD * weight_TD).sum().backward()
    assert leaf.grad is not None
    return out_TD.detach(), leaf.grad


def differences(whole: MoELayer, spread: MoELayer, one: tuple[torch.Tensor, ...], other: Any) -> dict[str, float]:
    """Largest differences; the gradients of what all have are this rank's, those of experts are of all ranks."""
    names = dict(spread.named_parameters())
    found = {"out": apart(one[0], other[0]), "x": apart(one[1], other[1]), "dense": 0.0, "experts": 0.0}
    for name, parameter in whole.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        kind = "experts" if name.startswith("experts.") else "dense"
        if kind == "experts":
            dist.all_reduce(gradient)
        if name in names:
            mine = names[name].grad
            assert mine is not None, f"{name} has no gradient: other ranks would wait for it"
            found[kind] = max(found[kind], apart(gradient, mine))
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def sent(traffic: Any) -> list[int]:
    return [traffic.bytes["all_to_all"], traffic.calls["all_to_all"]]


def expected(whole: MoELayer, spread: MoELayer, x_TD: torch.Tensor, row_T: torch.Tensor) -> list[int]:
    """Bytes that this rank hands in: the counts, a row with 2 K numbers for each rank that a token needs, and back."""
    slots, _ = whole._slots(x_TD, row_T, None)
    owner_TK = spread.dispatcher.owner_E[torch.cat([experts_TK for _, experts_TK in slots], dim=1)]  # type: ignore[union-attr]
    there_TG = torch.stack([(owner_TK == rank).any(1) for rank in range(4)], dim=1)
    leave = there_TG.sum(0)
    come = torch.empty_like(leave)
    dist.all_to_all_single(come, leave)
    num_slots = owner_TK.shape[1]
    rows, back = int(leave.sum()), int(come.sum())
    return [8 * (4 + rows * (12 + 2 * num_slots) + back * 12), 4]


def refused(folder: str) -> dict[str, str]:
    """Errors of placements that DeepSpeed cannot train, on every rank."""
    world = connect(timeout_s=60)
    found = {}
    everything = {name: [0] for name in ("modality_image", "modality_record", "modality_series")}
    trials: dict[str, tuple[Case, dict[str, Any]]] = {
        "uneven": (("uneven", 3, 2), {}),
        "frozen": (("even", 1, 2), {
            "train": {"only": ["*.experts.modality_*"], "steps": 1, "output": f"{folder}/refused"},
            "deepspeed": {"placement": {**everything, "routed_0": [1], "routed_1": [1], "routed_2": [1]}},
        }),
        "too many": (("even", 1, 2), {"model": {"experts": {"groups": [SHARED, {"kind": "routed", "width": 8}]}}}),
        "prefetch": (("wide", 3, 2), {
            "deepspeed": {"extra": {"zero_optimization": {"stage3_prefetch_bucket_size": 5}}},
        }),
        "does not divide": (("even", 1, 3), {}),
    }  # fmt: skip
    for name, (case, sections) in trials.items():
        try:
            trainer_of(folder, world, case, **sections)
            found[name] = "no error"
        except ConfigError as error:
            found[name] = str(error)
    return found


def several(folder: str, calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Several of the above in one job."""
    return [globals()[name](**arguments) for name, arguments in calls]
