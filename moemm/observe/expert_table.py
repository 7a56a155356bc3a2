"""The expert map as a table: who may use which expert, in which layers, and how many parameters that is."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from moemm.models import Model
from moemm.moe import Expert, ExpertMap, active_experts
from moemm.observe.expert_layers import ExpertLayers, expert_layers, layers_title, num_parameters

_LETTERS = string.ascii_lowercase + string.ascii_uppercase
Json = dict[str, Any]


def describe_model(model: Model) -> Json:
    """The expert map with parameters, as JSON types.

    {"parameters": {"total", "active"}, "router": {"kind", "scope", "top_k", "gates", "losses"} or None where no layer
    has a router, "tasks": skills, "modalities": [{"name", "kind", "tokenizer", "active", "active_by_task"}], "layers":
    [{"layers", "experts": [{"id", "kind", "width", "parameters", "modalities", "tasks", "base", "rank"}], "router",
    "dense"}]}; layers with the same experts stand together. `active` is the most that a token passes through.
    """
    total, active = model.num_parameters()
    return {
        "parameters": {"total": total, "active": active},
        "router": _router(model) if model.trunk.routed_layers else None,
        "own": {"untie": model.config.untie, "latents": model.config.latents, "share": model.config.share},
        "tasks": list(model.map.tasks),
        "modalities": [_modality(model, name) for name in model.map.modalities],
        "layers": [_layers(layers) for layers in expert_layers(model)],
    }


def render_experts(found: Mapping[str, Any], *, title: str) -> Group:
    """What describe_model gives, as tables for the terminal: modalities with their letters, then experts by layer."""
    total, active = (f"{found['parameters'][key]:,}" for key in ("total", "active"))
    lines = [title, f"parameters  {total} in all, {active} active a token at most", _router_line(found["router"])]
    own = found["own"]
    if own["untie"] or own["latents"]:
        shared = "; ".join(", ".join(group) for group in own["share"]) or "none"
        parts = [*own["untie"], *([f"{own['latents']} latents"] if own["latents"] else [])]
        lines.append(f"own         {', '.join(parts)} of each modality; shared by: {shared}")
    codes = modality_codes([entry["name"] for entry in found["modalities"]])
    return Group(*lines, _modality_table(found, codes), *(_layer_table(layer, codes) for layer in found["layers"]))


def _modality(model: Model, name: str) -> Json:
    by_task = {task: model.active_parameters(name, task) for task in model.map.tasks}
    tokenizer = num_parameters(model.tokenizers[name]) + model.modality_D[name].numel()
    return {
        "name": name,
        "kind": model.tokenizers[name].spec.kind,  # type: ignore[union-attr]
        "tokenizer": tokenizer,
        "active": max(by_task.values(), default=0) or model.active_parameters(name),
        "active_by_task": by_task,
    }


def _router(model: Model) -> Json:
    config = model.config.router
    weights = {name: value for name, value in vars(config.losses).items() if value and name != "min_experts"}
    return {
        "kind": config.kind,
        "scope": config.scope,
        "top_k": active_experts(config),
        "gates": config.gates,
        "losses": weights,
    }


def _layers(layers: ExpertLayers) -> Json:
    here = layers.map
    return {
        "layers": list(layers.numbers),
        "experts": [_expert(here, expert, layers.experts[expert.id]) for expert in here.experts] if here else [],
        "router": layers.router,
        "dense": None if here else layers.dense,
    }


def _expert(here: ExpertMap, expert: Expert, parameters: int) -> Json:
    return {
        "id": expert.id,
        "kind": expert.kind,
        "width": expert.width,
        "parameters": parameters,
        "modalities": [name for name in here.modalities if expert.serves(name)],
        "tasks": None if expert.tasks is None else list(expert.tasks),
        "base": expert.base,
        "rank": expert.rank,
    }


def _router_line(router: Mapping[str, Any] | None) -> str:
    if router is None:
        return "router      none"
    top_k = "every allowed expert" if router["top_k"] is None else f"top {router['top_k']}"
    losses = ", ".join(f"{name} {weight:g}" for name, weight in router["losses"].items()) or "none"
    return f"router      {router['kind']}, {top_k}, scope {router['scope']}, gates {router['gates']}; losses: {losses}"


def modality_codes(names: Sequence[str]) -> dict[str, str]:
    """A letter for each modality; numbers of equal length where there are more than 52."""
    if len(names) <= len(_LETTERS):
        return dict(zip(names, _LETTERS, strict=False))
    digits = len(str(len(names) - 1))
    return {name: f"{number:0{digits}d} " for number, name in enumerate(names)}


def _modality_table(found: Mapping[str, Any], codes: Mapping[str, str]) -> Table:
    skills = bool(found["tasks"])
    table = Table(title="\nmodalities", title_justify="left")
    table.add_column("")
    table.add_column("modality", overflow="fold")
    table.add_column("kind")
    for column in ("tokenizer", "active parameters", *(["least, by task"] if skills else [])):
        table.add_column(column, justify="right")
    for entry in found["modalities"]:
        least = [f"{min(entry['active_by_task'].values()):,}"] if skills else []
        numbers = [f"{entry['tokenizer']:,}", f"{entry['active']:,}", *least]
        table.add_row(codes[entry["name"]].strip(), entry["name"], entry["kind"], *numbers)
    return table


def _layer_table(layer: Mapping[str, Any], codes: Mapping[str, str]) -> Table | str:
    title = layers_title(layer["layers"])
    if layer["dense"] is not None:
        return f"{title}: one dense network of {layer['dense']:,} parameters, for all"
    skills = any(expert["tasks"] for expert in layer["experts"])
    if layer["router"]:
        title += f", {layer['router']:,} parameters of the router{' in each' if len(layer['layers']) > 1 else ''}"
    table = Table(title=f"\n{title}", title_justify="left")
    table.add_column("expert", overflow="fold")
    table.add_column("kind")
    for column in ("width", "parameters"):
        table.add_column(column, justify="right")
    table.add_column("who may use it", no_wrap=len(codes) <= len(_LETTERS))
    if skills:
        table.add_column("tasks", overflow="fold")
    for expert in layer["experts"]:
        width = f"{expert['base']} + {expert['rank']}" if expert["base"] else str(expert["width"])
        who = "".join(code if name in expert["modalities"] else "·" * len(code) for name, code in codes.items())
        tasks = [", ".join(expert["tasks"] or ["all"])] if skills else []
        table.add_row(expert["id"], expert["kind"], width, f"{expert['parameters']:,}", who, *tasks)
    return table
