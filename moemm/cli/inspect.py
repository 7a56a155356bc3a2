"""`moemm inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import Plugins


@dataclass(kw_only=True)
class Inspect:
    """Print the expert map: who may use which expert, layer by layer, with parameters by modality. Trains nothing.

    For a configuration its data is read, because vocabularies and columns decide how large tokenizers are.
    """

    subject: Annotated[Positional[Path], arg(name="subject", metavar="RUN|CONFIG")]
    """Folder of a run, or YAML file; values of a file's keys may follow: --model.dim 128."""
    plugin: Plugins = ()
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0."""
        from moemm.cli.subject import build, saved_as_is

        found = build(self.subject, overrides, self.plugin)
        from moemm.observe.expert_table import describe_model, render_experts

        step = found.manifest.step if found.manifest else None
        same = saved_as_is(found)
        values: dict[str, Any] = {"subject": str(self.subject), "step": step, "as_saved": same}
        values |= describe_model(found.model)
        if self.json:
            show_json(values)
            return 0
        title = str(self.subject)
        if step is not None:
            title += (
                f"\ncheckpoint  step {step}{'' if same else ', saved with another expert map than config.yaml has'}"
            )
        show(render_experts(values, title=title))
        return 0
