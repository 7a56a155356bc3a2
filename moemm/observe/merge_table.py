"""The receipt of `moemm merge` as tables for the terminal: what every receipt shows, and the scores on val."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moemm.observe.receipt_table import render_receipt
from moemm.observe.table import number

_KEPT = {True: "yes", False: "no", None: ""}


def render_merge(values: Mapping[str, Any]) -> Group:
    """values: a receipt of merge as JSON types. Scores stand in a table of their own, not among the proofs."""
    split = values["details"]["split"]
    proofs = [proof for proof in values["proofs"] if not proof["what"].startswith(f"{split} ")]
    return Group(render_receipt({**values, "proofs": proofs}), _scores(values["details"]))


def _scores(details: Mapping[str, Any]) -> Table:
    table = Table(title=f"\nscores on {details['split']}", title_justify="left")
    table.add_column("weights", overflow="fold")
    for task, metric in details["metrics"].items():
        table.add_column(f"{task} {metric}", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("kept")
    for row in details["scores"]:
        cells = [number(row["tasks"][task]) for task in details["metrics"]]
        table.add_row(row["what"], *cells, number(row["mean"]), _KEPT[row["kept"]])
    return table
