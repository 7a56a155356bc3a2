"""Tables of benchmarks/results: on the terminal, and inside the docs between their markers.

    python -m benchmarks.tables                # all results, misses first
    python -m benchmarks.tables --docs         # write the tables of README.md and docs/*.md anew

A marker line `<!-- results: NAME -->` is followed by the table and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"<!-- results: (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)
HEADER = ("case", "metric", "value", "target", "")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a result as text."""
    value = "not measured" if row["value"] is None else number(row["value"])
    if row["value"] is None:
        return [row["case"], row["metric"], value, _target(row), row.get("note", "")]
    if row["deviation"] is not None:
        value += f" ± {number(row['deviation'])}"
    verdict = {True: "met", False: "missed", None: ""}[row["ok"]]
    return [row["case"], row["metric"], f"{value} {row['unit']}".strip(), _target(row), verdict]


def _target(row: dict[str, Any]) -> str:
    sign = "≥ " if row["better"] == "higher" else "≤ "
    return "" if row["target"] is None else sign + number(row["target"])


def number(value: float) -> str:
    """Three decimals for scores and ratios, thousands separated for large figures."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def listed(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that no matrix of a result shows."""
    shown = {metric for matrix in result.get("matrices", []) for metric in matrix["columns"].values()}
    return [row for row in result["rows"] if row["metric"] not in shown]


def lines_of(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Each case that has one of a matrix's metrics, with its row of each column: None where there is none."""
    found = {(row["case"], row["metric"]): row for row in rows}
    metrics = list(matrix["columns"].values())
    names = dict.fromkeys(case for case, metric in found if metric in metrics)
    return [(case, [found.get((case, metric)) for metric in metrics]) for case in names]


def cell(row: dict[str, Any] | None, digits: int = 2) -> str:
    """A row's value in a matrix, as short as can be; "-" where nothing was measured."""
    if row is None or row["value"] is None:
        return "-"
    return f"{row['value']:,.0f}" if abs(row["value"]) >= 20 else f"{row['value']:.{digits}f}"


def summary(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """How many of a matrix's figures meet their targets, by column; empty where none has a target."""
    columns = zip(*(line for _, line in lines_of(matrix, rows)), strict=True)
    parts = []
    for head, column in zip(matrix["columns"], columns, strict=True):
        verdicts = [row["ok"] for row in column if row is not None and row["ok"] is not None]
        if verdicts:
            parts.append(f"{head} {sum(verdicts)} of {len(verdicts)}")
    return f"Targets met: {', '.join(parts)}." if parts else ""


def matrix_markdown(matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A matrix as lines of Markdown; figures that miss their targets are bold."""
    lines = [f"**{matrix['title']}**", "", "| case | " + " | ".join(matrix["columns"]) + " |"]
    lines.append("| --- |" + " --: |" * len(matrix["columns"]))
    for case, found in lines_of(matrix, rows):
        texts = [cell(row, matrix.get("digits", 2)) for row in found]
        texts = [f"**{text}**" if row and row["ok"] is False else text for text, row in zip(texts, found, strict=True)]
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    told = summary(matrix, rows)
    return [*lines, "", *([f"{told} Missed ones are bold.", ""] if told else [])]


def markdown(result: dict[str, Any]) -> str:
    """A result as Markdown tables, its matrices first, with the command that made it."""
    lines = [line for matrix in result.get("matrices", []) for line in matrix_markdown(matrix, result["rows"])]
    rows = listed(result)
    if rows:
        lines += ["| " + " | ".join(HEADER) + " |", "| --- | --- | --: | --: | --- |"]
        lines += ["| " + " | ".join(text.replace("|", "\\|") for text in cells(row)) + " |" for row in rows]
    runs = [source(run, peers="matrices" in result) for run in [*result.get("earlier", []), result]]
    return "\n".join([*lines, "", "\n\n".join(runs)])


def source(run: dict[str, Any], *, peers: bool) -> str:
    """With which command, where and with what rows were measured; of which part of a result, where it has parts."""
    place, versions = run["machine"], run["versions"]
    told = [f"`{run['command']}`", f"{place['cores']} cores of {place['cpu']}"]
    told += [place["gpu"]] if place["gpu"] else []
    packages = ("torch", "transformers", "tutel") if peers else ("torch",)
    told += [f"{name} {versions[name]}" for name in packages if name in versions]
    told += [f"seeds {', '.join(map(str, run['seeds']))}"] if run["seeds"] else []
    return f"{', '.join(run['of'])}: {', '.join(told)}." if "of" in run else f"{', '.join(told)}."


def with_tables(text: str) -> str:
    """A document with the tables of its markers made anew."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match['name']}.json").read_text(encoding="utf-8"))
        return f"<!-- results: {match['name']} -->\n{markdown(result)}\n<!-- end -->"

    return MARKER.sub(table, text)


def documents() -> list[Path]:
    """The documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def show(paths: Sequence[Path], width: int | None = None) -> None:
    """Print results: lists as one table, missed targets first, then matrices, where a miss is red and has a !."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=width)
    table = Table("result", *HEADER)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = [(result["name"], row) for result in results for row in listed(result)]
    for name, row in sorted(rows, key=lambda item: {False: 0, None: 2, True: 1}[item[1]["ok"]]):
        table.add_row(name, *cells(row), style="red" if row["ok"] is False else None)
    if rows:
        console.print(table)
    for result in results:
        for matrix in result.get("matrices", []):
            _show_matrix(console, matrix, result["rows"])


def _show_matrix(console: Any, matrix: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), title=matrix["title"], title_justify="left")
    table.add_column("case", no_wrap=True)
    for head in matrix["columns"]:
        table.add_column(head, justify="right", min_width=max(map(len, head.split())))
    for case, found in lines_of(matrix, rows):
        texts = [f"[red]{cell(row)}![/red]" if row and row["ok"] is False else cell(row) for row in found]
        table.add_row(case, *texts)
    console.print()
    console.print(table)
    told = summary(matrix, rows)
    if told:
        console.print(told)


def main() -> None:
    """Print the results, or write the tables of the documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the tables of README.md and docs/*.md anew")
    if parser.parse_args().docs:
        for path in documents():
            path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        show(sorted(RESULTS.glob("*.json")))


if __name__ == "__main__":
    main()
