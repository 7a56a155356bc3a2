"""Diversified multiplet upcycling (CLIP-MoE, arXiv:2409.19291): dense networks that each learn what others missed.

Stage s clusters the training samples by the features of the model of the stage before, crosses the clusters with the
labels so far, and fine-tunes the dense networks alone of the source, with batches inside one label: what told samples
apart until then tells nothing there. The source and its stages become the experts; then the routers alone are trained.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch.nn import functional as F

from moemm.config import Config, LoadedConfig, load_config
from moemm.data import eval_loader
from moemm.data.loader import learning_groups
from moemm.data.sample import PackedBatch
from moemm.data.within import write_within
from moemm.errors import ConfigError
from moemm.growth.branch import expert_rules, routed_config
from moemm.growth.dense import NETWORK, dense_layers
from moemm.growth.grown import Base, fresh_model, read_base, size_of, write_grown
from moemm.growth.probe import relative_error, task_loss
from moemm.growth.receipt import Proof, Receipt
from moemm.growth.rules import Rule, To, apply_rules
from moemm.growth.upcycling import FRESH, Made, Start, Tell, Wanted, settled
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.train import train
from moemm.train.init import OF_THE_RUN

STAGES = "stages"
"""Folder of the new run in which the runs of the stages are."""
STEPS, CLUSTERS, EXPERTS = 200, 4, 4
ROUTER = "trunk.blocks.*.ffn.router.*"
_BATCH = 256
Labels = Mapping[str, np.ndarray]


def multiplet(base: Base, start: Start, wanted: Wanted, output: Path, batches: list[PackedBatch], tell: Tell) -> Made:
    """All stages one after the other; their runs stay in OUTPUT/stages. Raises ConfigError for a run that is sparse."""
    count, steps = wanted.experts or EXPERTS, wanted.steps or STEPS
    if count < 2:
        raise ConfigError(f"--experts {count}: a multiplet has at least 2, the source's network and one of a stage")
    layers = dense_layers(start.config, start.model.map, start.weights, where=start.name)
    if len({layer.units for layer in layers}) > 1:
        raise ConfigError("the dense networks of the layers differ in width; the experts of a multiplet have one")
    bases, changed, model = [base], [f"routed_0 holds the dense network of {base.run.folder}"], start.model
    labels: Labels = {name: np.zeros(n, np.int64) for name, n in _sizes(start).items()}
    for stage in range(1, count):
        tell(f"stage {stage} of {count - 1}: features, clusters, and {steps} steps of the dense networks alone")
        labels = crossed(labels, features(model, start), wanted.clusters or CLUSTERS, seed=wanted.seed + stage)
        folder = output / STAGES / str(stage)
        file = folder.with_suffix(".safetensors")
        write_within(file, labels)
        bases.append(_fine_tuned(start, base.run.folder, file, folder, steps))
        model = cast(Model, bases[-1].run.model)
        number = len(set(np.concatenate(list(labels.values())).tolist()))
        changed.append(f"routed_{stage} learned {steps} steps in batches inside one of {number} labels: {folder}")
    config, assembled = _assembled(start, bases, wanted.top_k, output)
    tell(f"routers: {steps} steps of them alone")
    weights, loss = _with_routers(start, config, assembled, output / STAGES / "router", steps, batches)
    assembled.load_state_dict(weights)
    changed.append(f"the routers alone learned {steps} steps, with {config.model.router.losses.balance:g} x balance")
    proofs = [*_apart(bases), *loss]
    return Made(config=config, model=assembled.eval(), changed=changed, exact=False, proofs=proofs)


@torch.no_grad()
def features(model: Model, start: Start) -> dict[str, torch.Tensor]:
    """Task -> (n, D) the mean token behind the trunk of each of its training samples, at unit length."""
    found = {}
    for name in _sizes(start):
        prepare = prepare_functions(start.specs)
        parts = [
            _pooled(model, batch)
            for batch in eval_loader(start.catalogue, task=name, split="train", batch_size=_BATCH, prepare=prepare)
        ]
        found[name] = torch.cat(parts)
    return found


def _pooled(model: Model, batch: PackedBatch) -> torch.Tensor:
    stream = model.tokenize(batch)
    x_TD = model.trunk(stream)[0][-1].float()
    sums_BD = x_TD.new_zeros(batch.num_samples, x_TD.shape[1]).index_add(0, stream.sample_T, x_TD)
    return F.normalize(sums_BD, dim=1)


def crossed(labels: Labels, found: Mapping[str, torch.Tensor], clusters: int, *, seed: int) -> dict[str, np.ndarray]:
    """The labels, cut further by k-means of the features; samples of one label and cluster, of any task, are one."""
    names = list(labels)
    features_ND = torch.cat([found[name] for name in names]).numpy()
    number = min(clusters, len(np.unique(features_ND, axis=0)))
    cluster = KMeans(number, n_init=4, random_state=seed % 2**32).fit_predict(features_ND)
    pairs = np.stack([np.concatenate([labels[name] for name in names]), cluster], axis=1)
    _, label = np.unique(pairs, axis=0, return_inverse=True)
    cuts = np.cumsum([len(labels[name]) for name in names])[:-1]
    return dict(zip(names, np.split(label.reshape(-1).astype(np.int64), cuts), strict=True))


def _sizes(start: Start) -> dict[str, int]:
    """Task that draws -> its training samples."""
    tasks = [start.catalogue.tasks[first] for first, *_ in learning_groups(start.config, start.catalogue)]
    return {task.name: task.sizes["train"] for task in tasks}


def _fine_tuned(start: Start, source: Path, labels: Path, folder: Path, steps: int) -> Base:
    """The source after some steps in which its dense networks alone were trained."""
    config = _short(start.config, folder, steps)
    only = [f"{NETWORK.format('*')}.*"]
    section = replace(config.train, init=str(source.resolve()), only=only)
    config = replace(config, train=section, data=replace(config.data, within=str(labels.resolve())))
    with _own_screen():
        train(LoadedConfig(config=settled(config), path=start.path, source={}, origins={}))
    return read_base(folder)


def _short(config: Config, folder: Path, steps: int) -> Config:
    """The run's own training, for so many steps."""
    checkpoint = replace(config.train.checkpoint, every=0, keep=1)
    section = replace(
        config.train, output=str(folder), init=None, only=None, steps=steps, epochs=None, eval_every=0,
        baselines=False, checkpoint=checkpoint,
    )  # fmt: skip
    return replace(config, name=f"{config.name}-{folder.name}", train=section)


def _assembled(start: Start, bases: Sequence[Base], top_k: int | None, output: Path) -> tuple[Config, Model]:
    """The sparse model: one routed expert a run, all else of the first."""
    layers = [
        dense_layers(b.run.config, cast(Model, b.run.model).map, b.weights, where=str(b.run.folder)) for b in bases
    ]
    config = routed_config(start.config, len(bases), layers[0][0].units, top_k, output)
    model = fresh_model(config, start.catalogue, start.specs)
    rules = [
        *expert_rules(layers, model),
        Rule(("run0.{rest*}",), (To("{rest*}"),)),
        Rule(("run{n}.{rest*}",), (), "stages changed only dense networks"),
        Rule((), (To("trunk.blocks.{i}.ffn.router.{rest*}"),), "the source has no router"),
    ]
    source = {f"run{n}.{name}": value for n, base in enumerate(bases) for name, value in base.weights.items()}
    weights, _ = apply_rules(rules, source, model.state_dict())
    model.load_state_dict(weights)
    return config, model.eval()


def _with_routers(
    start: Start, config: Config, model: Model, folder: Path, steps: int, batches: Sequence[PackedBatch]
) -> tuple[dict[str, torch.Tensor], list[Proof]]:
    """The weights after the routers alone were trained, and the tasks' loss before and after."""
    short = _short(config, folder, steps)
    short = settled(replace(short, train=replace(short.train, only=[ROUTER])))
    loaded = LoadedConfig(config=short, path=start.path, source={}, origins={})
    size = size_of(model)
    receipt = Receipt(
        operation="upcycle multiplet, before its routers were trained", sources=start.sources, target=str(folder),
        changed=[], proofs=[], before=size_of(start.model), after=size, optimizer=FRESH,
    )  # fmt: skip
    write_grown(loaded, start.catalogue, start.specs, model, receipt)
    samples = sum(batch.num_samples for batch in batches)
    with torch.no_grad():
        before = float(task_loss(model, batches)) / samples
    old = {name: value.clone() for name, value in model.state_dict().items()}
    with _own_screen():
        train(load_config(folder / "config.yaml"), resume=True)
    trained = read_base(folder)
    moved = [name for name, value in trained.weights.items() if not torch.equal(value, old[name])]
    others = [name for name in moved if ".ffn.router." not in name]
    with torch.no_grad():
        after = float(task_loss(cast(Model, trained.run.model), batches)) / samples
    proofs = [
        Proof(what="tensors other than the routers' that the last stage changed", value=float(len(others)), most=0.0),
        Proof(what="tensors of routers that the last stage changed", value=float(len(moved)), least=1.0),
        Proof(what="loss of the tasks a sample of the probe batch, before the routers were trained", value=before),
        Proof(what="and after", value=after),
    ]
    return trained.weights, proofs


def _apart(bases: Sequence[Base]) -> Iterator[Proof]:
    """How far the stages' networks are from the source's, and that nothing else moved."""
    first = bases[0].weights
    networks = {name for name in first if ".ffn." in name and name.startswith("trunk.blocks.")}
    for number, base in enumerate(bases[1:], 1):
        own, before = ({name: w[name] for name in networks} for w in (base.weights, first))
        yield Proof(
            what=f"relative change of stage {number}'s dense networks", value=relative_error(before, own), least=1e-9
        )
    moved = sum(
        not torch.equal(value, first[name])
        for base in bases[1:]
        for name, value in base.weights.items()
        if name not in networks and name in first and not name.startswith(OF_THE_RUN)
    )
    yield Proof(what="other tensors that the stages changed", value=float(moved), most=0.0)


@contextlib.contextmanager
def _own_screen() -> Iterator[None]:
    """What training prints goes where messages go, not into the receipt on stdout; determinism is put back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
