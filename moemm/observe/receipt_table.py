"""A receipt of moemm.growth as tables for the terminal: from where to where, what changed, and what was proved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

_VERDICTS = {True: "[green]holds[/]", False: "[red]FAILS[/]", None: ""}


def render_receipt(values: Mapping[str, Any]) -> Group:
    """values: a receipt as JSON types, as receipt.json has it; its `history` is left out."""
    parts: list[Any] = [f"operation   {values['operation']}"]
    parts += [f"from        {_source(one)}" for one in values["sources"]]
    parts.append(f"to          {values['target']}")
    parts.append("")
    parts += [f"- {line}" for line in values["changed"]]
    parts.append(_sizes(values["before"], values["after"]))
    if values["proofs"]:
        parts.append(_proofs(values["proofs"]))
    parts.append(f"optimizer   {values['optimizer']}")
    if not values["ok"]:
        parts.append("[red]not every proof holds[/]: the run was written, but it is not what it should be")
    return Group(*parts)


def _source(source: Mapping[str, Any]) -> str:
    step = f", step {source['step']}" if source.get("step") is not None else ""
    return f"{source['folder']}{step}, sha256 {str(source['sha256'])[:12]}"


def _sizes(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    table = Table(title="\nparameters", title_justify="left")
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="left" if not column else "right")
    for key in ("total", "active"):
        ratio = f"{after[key] / before[key]:.2f}" if before[key] else "-"
        table.add_row(key, f"{before[key]:,}", f"{after[key]:,}", ratio)
    return table


def _proofs(proofs: list[Mapping[str, Any]]) -> Table:
    table = Table(title="\nmeasured on the new model", title_justify="left")
    table.add_column("what", overflow="fold")
    for column in ("value", "has to be", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for proof in proofs:
        value = "not finite" if proof["value"] is None else number(proof["value"])
        table.add_row(proof["what"], value, ", ".join(_bounds(proof)), _VERDICTS[proof["ok"]])
    return table


def _bounds(proof: Mapping[str, Any]) -> Iterator[str]:
    if proof["least"] is not None:
        yield f"at least {number(proof['least'])}"
    if proof["most"] is not None:
        yield f"at most {number(proof['most'])}"


def number(value: float) -> str:
    """Whole numbers as they are, others with three digits that count: 0, 12, 0.0314, 3.14e-07."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.3g}"
