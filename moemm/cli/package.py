"""`moemm extend export` and `moemm extend load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import MorePlugins

if TYPE_CHECKING:
    from moemm.growth import Receipt

Run = Annotated[Positional[Path], arg(name="run", metavar="RUN")]


@dataclass(kw_only=True)
class Export:
    """Write an extension of a run as a file of its own: tokenizer, experts, router rows, norms, heads.

    The file holds nothing of the base but its sha256, and no code. `moemm extend load` puts it into a run with the same
    base.
    """

    run_folder: Run
    """Folder of a run that was extended."""
    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Name of the extension, or a modality that it brought."""
    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """File to write; out.moemm, say."""
    plugin: MorePlugins = ()

    def run(self, overrides: Sequence[str]) -> int:
        """Write it; 0."""
        del overrides
        from moemm.growth import export_extension

        content = export_extension(self.run_folder, self.name, self.file, plugins=self.plugin)
        show(f"wrote {self.file} ({self.file.stat().st_size / 1024:.0f} KiB)")
        show(f"extension   {content.extension.name}: modalities {', '.join(content.extension.modalities)}")
        show(f"tasks       {', '.join(content.extension.tasks)}")
        show(f"tensors     {len(content.tensors)}")
        show(f"base        sha256 {content.base.sha256}")
        return 0


@dataclass(kw_only=True)
class Load:
    """Put an extension that `moemm extend export` wrote into a run with the same base; writes a run folder of its own.

    Exit code 1 where a proof of the receipt fails.
    """

    run_folder: Run
    """Folder of the base run, or of another extension of it."""
    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """The package."""
    output: Annotated[Path, arg(metavar="FOLDER")]
    """Folder of the new run."""
    data: Annotated[tuple[Path, ...], UseAppendAction, arg(metavar="FILE")] = ()
    """Data file of the extension's task; may be given several times, by the names that the package knows. Looked for in
    the run's data.root when not given."""
    plugin: MorePlugins = ()
    json: bool = False
    """Print the receipt as JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Load it, and print the receipt; 0, or 1 where a proof fails."""
        del overrides
        from moemm.growth import load_extension

        receipt = load_extension(self.run_folder, self.file, output=self.output, data=self.data, plugins=self.plugin)
        return _show(receipt, json=self.json)


def _show(receipt: Receipt, *, json: bool) -> int:
    if json:
        show_json(receipt.to_dict())
    else:
        from moemm.observe.receipt_table import render_receipt

        show(render_receipt(receipt.to_dict()))
        show(f"\nto score    moemm evaluate {receipt.target}")
    return 0 if receipt.ok else 1
