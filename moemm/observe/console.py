"""What stands on the terminal while a run goes on: a live panel, or plain lines where it is no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from moemm.observe.records import Metrics, RunInfo
from moemm.observe.span import duration
from moemm.observe.table import number, results_table

PLAIN_WIDTH = 120


class ConsoleWriter:
    """Prints the course of one run. On a terminal: a bar, and a table with loss and accuracy of each task."""

    def __init__(self, info: RunInfo, console: Console | None = None) -> None:
        self._info = info
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal and console is None:
            self._console = Console(highlight=False, width=PLAIN_WIDTH, soft_wrap=True)
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total} steps"), BarColumn(40), TextColumn("{task.fields[note]}")
        )
        self._bar = self._progress.add_task("", total=info.total_steps, completed=info.start_step, note="")
        self._losses: dict[str, float] = {}
        self._objectives: dict[str, float] = {}
        self._accuracy: dict[str, float] = {}
        self._scores: dict[str, Mapping[str, Any]] = {}

    def start(self) -> None:
        """Say what is about to happen, then open the panel."""
        info = self._info
        for name, fact in info.facts.items():
            self._console.print(f"{name:<11} {fact}", markup=False)
        if self._console.is_terminal:
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def advance(self, step: int) -> None:
        """Move the bar; nothing where there is none."""
        if self._live is not None:
            self._progress.update(self._bar, completed=step)

    def metrics(self, metrics: Metrics) -> None:
        """One report."""
        self._losses |= metrics.losses
        self._objectives |= metrics.objectives
        self._accuracy |= metrics.accuracy
        speed = f"{metrics.tokens_per_second:,.0f} tokens/s  {duration(metrics.seconds_left)} left"
        if self._live is None:
            tasks = "  ".join(f"{name} {value:.3f}" for name, value in {**metrics.objectives, **metrics.losses}.items())
            place = f"step {metrics.step}/{metrics.total_steps}"
            self._console.print(f"{place}  loss {metrics.loss:.4f}  {tasks}  {speed}", markup=False)
            return
        self._progress.update(self._bar, completed=metrics.step, note=f"loss {metrics.loss:.4f}  {speed}")
        self._live.update(self._panel())

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Scores of a split while training."""
        if self._live is None:
            parts = "  ".join(f"{task} {score['metric']} {number(score['value'])}" for task, score in scores.items())
            self._console.print(f"step {step}  {split}  {parts}", markup=False)
            return
        if split == "val":
            self._scores = dict(scores)
        self._live.update(self._panel())

    def message(self, text: str) -> None:
        """A line of its own, above the panel."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the panel away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def results(self, summary: Mapping[str, Any]) -> None:
        """The table at the end."""
        self.close()
        self._console.print(results_table(summary))

    def _panel(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        table.add_column("task")
        for column in ("loss", "train accuracy", "val"):
            table.add_column(column, justify="right")
        for task in self._info.tasks:
            score = self._scores.get(task, {}).get("value")
            table.add_row(Text(task), number(self._losses.get(task)), number(self._accuracy.get(task)), number(score))
        for name, value in self._objectives.items():
            table.add_row(Text(f"({name})"), number(value), "", "")
        return Group(self._progress, table)
