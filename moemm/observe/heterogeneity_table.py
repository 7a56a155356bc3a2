"""The answer of `moemm analyze heterogeneity` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moemm.observe.expert_table import modality_codes

_TITLES = {
    "pvi": "bits that a target (column) gains through a trunk trained on a source (row); more is better",
    "zero-shot": "bits that a target (column) loses through the experts of a source (row); less is better",
}


def render_heterogeneity(values: Mapping[str, Any]) -> Group:
    """The matrices, the merges in order with the cut between them, and the groups."""
    parts: list[Any] = [_matrix_table(values["matrix"], _TITLES[values["measure"]])]
    if values["pairs"]:
        parts.append(_matrix_table(values["pairs"], f"\npairs: {_TITLES['pvi']}"))
    parts.append("\nmerges, nearest first: mean distance in bits, and who is joined")
    parts += _merge_lines(values["merges"], cut=len(values["matrix"]["names"]) - len(values["groups"]))
    parts.append(f"\n{len(values['groups'])} groups")
    parts += [f"  {number}  {', '.join(group)}" for number, group in enumerate(values["groups"])]
    before, after = (f"{values['parameters'][key]:,}" for key in ("before", "after"))
    parts.append(f"\nparameters  {before} before, {after} grouped")
    return Group(*parts)


def _matrix_table(matrix: Mapping[str, Any], title: str) -> Table:
    codes = modality_codes(matrix["names"])
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("")
    table.add_column("source", overflow="fold")
    for code in codes.values():
        table.add_column(code.strip(), justify="right", no_wrap=True)
    for (name, code), row in zip(codes.items(), matrix["bits"], strict=True):
        table.add_row(code.strip(), name, *(f"{value:.2f}" for value in row))
    return table


def _merge_lines(merges: list[Mapping[str, Any]], *, cut: int) -> Iterator[str]:
    for number, merge in enumerate(merges):
        if number == cut:
            yield "  ------  the groups are taken here"
        yield f"  {merge['height']:6.3f}  {', '.join(merge['left'])}  +  {', '.join(merge['right'])}"
