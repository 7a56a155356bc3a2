"""Pairs of modalities that look wrong, from the summary of a run that aligned them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moemm.observe.page import Cell, Section, heading, table

SHOWN = 20
"""Samples of each pair of modalities that get a line; the summary has more."""
_LEAD = (
    "Contrastive alignment keeps a running loss of every training sample's pairs, less the mean of their batch. Where "
    "the losses fall into two groups that lie apart (2 and more, in Ashman's D), the samples of the upper one probably "
    "do not belong together. index is the row of the task's file."
)


def noise_section(pairs: Sequence[Mapping[str, Any]]) -> Section:
    """A line for each pair of modalities; below, the samples of the highest losses of each."""
    rows = [
        (
            one["pair"],
            [
                Cell(text=f"{one['seen']:,}"),
                Cell(text=f"{one['apart']:.1f}"),
                Cell(text=f"{one['share']:.0%}", bar=one["share"]),
            ],
        )
        for one in pairs
    ]
    whole = table(["pair", "samples", "groups apart by", "probably wrong"], rows, label="Pairs of modalities")
    lists = [heading(f"{one['pair']}: the highest losses") + _samples(one) for one in pairs if one["samples"]]
    return Section(key="noise", title="Pairs that look wrong", lead=_LEAD, body=whole + "".join(lists))


def _samples(pair: Mapping[str, Any]) -> str:
    rows = [
        (
            one["task"],
            [Cell(text=str(one["index"])), Cell(text=f"{one['loss']:+.2f}"), Cell(text=f"{one['wrong']:.0%}")],
        )
        for one in pair["samples"][:SHOWN]
    ]
    return table(["task", "index", "running loss", "probability wrong"], rows, label=f"Samples of {pair['pair']}")
