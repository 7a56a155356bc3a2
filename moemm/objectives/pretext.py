"""All objectives without labels that a configuration wants, on as few views of a batch as they need.

| view | what it is | read by |
| --- | --- | --- |
| clean | the samples as they are | the tasks' heads, similarity |
| masked | some tokens hidden | masked, similarity |
| replaced | some tokens exchanged | replaced |
| empty | the samples without their tokens | the tasks' heads, where no label counts and nothing else is whole |
| alone | each modality of a sample as a sample of its own; only samples of several modalities | contrastive |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moemm.config.check_objectives import is_on, label_free, objective_sections
from moemm.config.schema import ObjectivesConfig
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.modalities import TargetShape, Tokenizer, Tokens
from moemm.models import Pretext, Sums, Views
from moemm.models.stream import Stream
from moemm.models.views import select
from moemm.objectives.content import Content
from moemm.objectives.contrastive import Contrastive, pair_numbers, pairs_of
from moemm.objectives.masking import Mask, wanted
from moemm.objectives.noise import PairNoise
from moemm.objectives.registry import OBJECTIVES, Scene, load_objective
from moemm.objectives.replaced import exchange

Shapes = Mapping[str, TargetShape | None]
ORDER = ("clean", "masked", "replaced", "empty", "alone")
"""Of the views; the heads read the first, so `alone`, whose samples are others, comes last."""


class LabelFree(Pretext):
    """See build_pretext. shapes: modality -> what its tokens can tell."""

    def __init__(self, config: ObjectivesConfig, shapes: Shapes, dim: int, *, tasks: Sequence[TaskInfo], seed: int):
        super().__init__()
        self.config, self.seed, self.modalities = config, seed, list(shapes)
        names = label_free(config)
        sections = objective_sections(config)
        self.objectives = nn.ModuleDict({name: OBJECTIVES[name](sections[name], shapes, dim) for name in names})
        read = {view for name in names for view in OBJECTIVES[name].views}
        if is_on(config.supervised):
            read.add("clean")
        elif read == {"alone"}:
            read.add("empty")
        self.order = tuple(view for view in ORDER if view in read)
        self.mask = Mask(shapes, config.masked, dim) if "masked" in read else None
        self._name_losses([task.modalities for task in tasks])
        self.pair_names: tuple[str, ...] = ()
        self._track(tasks)

    def _name_losses(self, tasks: Sequence[Sequence[str]]) -> None:
        """Losses, and where those of each objective begin; a pair of modalities is one where a task has both."""
        self._pairs: list[tuple[int, int]] = []
        self._most_pairs = 0
        names: list[str] = []
        self._first: dict[str, int] = {}
        for name in self.objectives:
            self._first[name] = len(names)
            if name != "contrastive":
                names.append(name)
                continue
            pairs = pairs_of(self.config.contrastive, self.modalities)
            named = [({self.modalities[a], self.modalities[b]}, (a, b)) for a, b in pairs]
            self._pairs = [pair for both, pair in named if any(both <= set(task) for task in tasks)]
            self._most_pairs = max(sum(both <= set(task) for both, _ in named) for task in tasks)
            names += [f"contrastive {self.modalities[a]}+{self.modalities[b]}" for a, b in self._pairs]
        self.losses = tuple(names)
        self.pairs_meet = self._most_pairs > 1
        self.meet = self.pairs_meet or (
            "similarity" in self.objectives and ("masked" in self.objectives or is_on(self.config.supervised))
        )

    @property
    def noise(self) -> PairNoise | None:
        """Which pairs of the training samples look wrong, as far as that is asked for."""
        for objective in self.objectives.values():
            if isinstance(objective, Contrastive):
                return objective.noise
        return None

    def _track(self, tasks: Sequence[TaskInfo]) -> None:
        wanted = self.config.contrastive
        if "contrastive" not in self.objectives or wanted.noisy_pairs == "ignore":
            return
        contrastive = self.objectives["contrastive"]
        assert isinstance(contrastive, Contrastive)
        pairs = [{self.modalities[a], self.modalities[b]} for a, b in contrastive.pairs]
        self.pair_names = tuple(f"{self.modalities[a]}+{self.modalities[b]}" for a, b in contrastive.pairs)
        has = [task.drawn_with is None and any(both <= set(task.modalities) for both in pairs) for task in tasks]
        sizes = [sum(task.sizes.values()) if own else 0 for task, own in zip(tasks, has, strict=True)]
        contrastive.noise = PairNoise(
            sizes, len(pairs), start=wanted.noisy_from if wanted.noisy_pairs == "weigh" else 1.0
        )

    def views(
        self, tokens: Sequence[Tokens], content: Stream, batch: PackedBatch, tokenizers: Mapping[str, Tokenizer]
    ) -> Views:
        """The views that some objective reads, in the order of ORDER."""
        known = Content.make(tokens, content, batch, tokenizers, seed=self.seed, step=self.step)
        made, hidden_T, exchanged_T = {"clean": content}, None, None
        if self.mask is not None:
            hidden_T = self.mask.hidden(known)
            made["masked"] = known.with_values(self.mask(known, hidden_T))
        if "replaced" in self.order:
            values_TD, exchanged_T = exchange(known, self.config.replaced.ratio)
            made["replaced"] = known.with_values(values_TD)
        if "empty" in self.order:
            nothing = torch.empty(0, dtype=torch.int64, device=content.sample_T.device)
            made["empty"] = select(content, nothing, [0] * len(self.modalities))
        if "alone" in self.order:
            made["alone"] = alone(known)
        return Views.stack({view: made[view] for view in self.order}, (known, hidden_T, exchanged_T))

    def readers(self, views: Views) -> torch.Tensor:
        """See Pretext: one branch an objective, and of contrastive ones one for each pair that a sample can have."""
        content, _, _ = views.known
        rows = []
        for name in self.objectives:
            if name == "contrastive":
                rows += self._pair_rows(views, pair_numbers(content.present_BM, self._pairs))
                continue
            own = {
                view: torch.full_like(views.parts[view].sample_T, self._first[name]) for view in OBJECTIVES[name].views
            }
            rows.append(views.spread(own, other=-1))
        return torch.stack(rows)

    def _pair_rows(self, views: Views, number_BP: torch.Tensor) -> list[torch.Tensor]:
        """Of contrastive branches: branch q brings the gradient of each sample's q-th pair."""
        sample_T = views.parts["alone"].sample_T // len(self.modalities)
        rows = []
        for number in range(self._most_pairs):
            has_BP = number_BP == number
            loss_B = torch.where(has_BP.any(1), has_BP.int().argmax(1) + self._first["contrastive"], -1)
            rows.append(views.spread({"alone": loss_B[sample_T]}, other=-1))
        return rows

    def owners(self, views: Views) -> torch.Tensor:
        """See Pretext."""
        num = len(self.modalities)
        parts = {name: part.sample_T // num if name == "alone" else part.sample_T for name, part in views.parts.items()}
        return views.spread(parts, other=0)

    def forward(self, branches: Sequence[torch.Tensor], views: Views, *, keep_B: torch.Tensor | None = None) -> Sums:
        """Every objective, in the order of the schema."""
        content, hidden_T, exchanged_T = views.known
        found = {}
        for name, objective in self.objectives.items():
            own = self._aliases(name, branches, views)
            found[name] = objective(Scene(content, views, own, hidden_T, exchanged_T, keep_B=keep_B))
        return found

    def pairs_loss(self, branches: Sequence[torch.Tensor], views: Views) -> torch.Tensor:
        """See Pretext."""
        content, own = views.known[0], self._aliases("contrastive", branches, views)
        loss: torch.Tensor = self.objectives["contrastive"](Scene(content, views, own, None, None, judging=True))[0]
        return loss

    def _aliases(self, name: str, branches: Sequence[torch.Tensor], views: Views) -> list[dict[str, torch.Tensor]]:
        """The views of an objective's own branches, or of the only one."""
        counts = [self._most_pairs if one == "contrastive" else 1 for one in self.objectives]
        number = list(self.objectives).index(name)
        first = sum(counts[:number])
        own = branches if len(branches) == 1 else branches[first : first + counts[number]]
        return [views.split(x_TD) for x_TD in own]


def alone(content: Content) -> Stream:
    """Tokens of samples of several modalities, each modality a sample of its own: sample b, modality m -> b M + m.

    So attention shows no modality another one.
    """
    stream, (_, num_modalities) = content.stream, content.present_BM.shape
    index_T = (content.present_BM.sum(1) > 1)[stream.sample_T].nonzero().flatten()
    lengths = torch.bincount(stream.modality_T[index_T], minlength=num_modalities).tolist()
    chosen = select(stream, index_T, lengths)
    chosen.sample_T = chosen.sample_T * num_modalities + chosen.modality_T
    chosen.task_B = stream.task_B.repeat_interleave(num_modalities)
    return chosen


def build_pretext(
    config: ObjectivesConfig, tokenizers: Mapping[str, Tokenizer], tasks: Sequence[TaskInfo], dim: int, *, seed: int
) -> LabelFree | None:
    """The objectives without labels that are on, with fresh weights; None where none is.

    Raises ConfigError where the data cannot serve them: a modality that cannot be told, a pair that no task has.
    """
    if not label_free(config):
        return None
    for name in config.own:
        load_objective(name)
    shapes = {name: tokenizer.target_shape for name, tokenizer in tokenizers.items()}
    _check_masked(config, shapes)
    _check_pairs(config, list(shapes), tasks)
    return LabelFree(config, shapes, dim, tasks=tasks, seed=seed)


def _check_masked(config: ObjectivesConfig, shapes: Shapes) -> None:
    if not {"masked", "similarity"} & set(label_free(config)):
        return
    able = ", ".join(name for name, shape in shapes.items() if shape is not None)
    for name in config.masked.modalities or ():
        if name not in shapes or shapes[name] is None:
            what = "this run has no such modality" if name not in shapes else "its tokenizer has no `targets`"
            raise ConfigError(f"objectives.masked.modalities: {name} cannot be hidden: {what}; allowed: {able}")
    if not wanted(config.masked, shapes):
        raise ConfigError("objectives.masked: no modality of this run has a tokenizer with `targets`; leave it out")


def _check_pairs(config: ObjectivesConfig, names: list[str], tasks: Sequence[TaskInfo]) -> None:
    if "contrastive" not in label_free(config):
        return
    for name in {name for pair in config.contrastive.pairs or () for name in pair} - set(names):
        raise ConfigError(f"objectives.contrastive.pairs: no modality {name}; this run has {', '.join(names)}")
    pairs = [(names[a], names[b]) for a, b in pairs_of(config.contrastive, names)]
    idle = [pair for pair in pairs if not any(set(pair) <= set(task.modalities) for task in tasks)]
    if len(idle) == len(pairs) or (idle and config.contrastive.pairs is not None):
        shown = f"{idle[0][0]} and {idle[0][1]}" if config.contrastive.pairs else "two modalities"
        raise ConfigError(
            f"objectives.contrastive: no task has samples with {shown}, so there is nothing to align.\n"
            "  allowed: pairs of modalities that a task has together\n"
            "  to do: name other pairs, or set objectives.contrastive.weight to 0"
        )
