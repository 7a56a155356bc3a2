"""The verbs of `moemm` as data: name, where it is, what it does. Importing this imports none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb. `target` is `module:class` of a dataclass whose fields are the options and whose `run` does the work.

    overrides: it takes keys of the configuration, as in --model.dim 128.
    """

    usage: str
    target: str
    help: str
    overrides: bool = False


VERBS: dict[str, Verb] = {
    "train": Verb(
        usage="CONFIG",
        target="moemm.cli.train:Train",
        help="train; alone or under `deepspeed` or `torchrun`",
        overrides=True,
    ),
    "launch slurm": Verb(
        usage="CONFIG",
        target="moemm.cli.launch:Slurm",
        help="write a SLURM job that trains, and submit it",
        overrides=True,
    ),
    "launch local": Verb(
        usage="CONFIG",
        target="moemm.cli.launch:Local",
        help="train on several ranks of this machine",
        overrides=True,
    ),
    "launch torchrun": Verb(
        usage="CONFIG",
        target="moemm.cli.launch:Torchrun",
        help="the same by torchrun; hosts of a hostfile",
        overrides=True,
    ),
    "launch deepspeed": Verb(
        usage="CONFIG",
        target="moemm.cli.launch:Deepspeed",
        help="the same by DeepSpeed's launcher; hosts of a hostfile",
        overrides=True,
    ),
    "status": Verb(
        usage="RUN",
        target="moemm.cli.status:Status",
        help="whether a run goes on, how far it is, what went wrong",
    ),
    "evaluate": Verb(
        usage="RUN",
        target="moemm.cli.evaluate:Evaluate",
        help="score a run, with modalities taken away if wanted",
    ),
    "predict": Verb(
        usage="RUN --data FILE",
        target="moemm.cli.predict:Predict",
        help="what a model says of each sample of a data file",
    ),
    "inspect": Verb(
        usage="RUN|CONFIG",
        target="moemm.cli.inspect:Inspect",
        help="the expert map: who may use which expert",
        overrides=True,
    ),
    "analyze heterogeneity": Verb(
        usage="RUN|CONFIG",
        target="moemm.cli.analyze:Heterogeneity",
        help="which modalities should share experts",
        overrides=True,
    ),
    "analyze conflict": Verb(
        usage="RUN",
        target="moemm.cli.analyze:Conflict",
        help="where losses pull apart, and what to split there",
    ),
    "merge": Verb(
        usage="RUN...",
        target="moemm.cli.merge:Merge",
        help="average runs into one, or experts into fewer",
    ),
    "upcycle": Verb(
        usage="RUN|FILE...",
        target="moemm.cli.upcycle:Upcycle",
        help="from dense to sparse, or to more experts, with a proof",
    ),
    "extend": Verb(
        usage="RUN",
        target="moemm.cli.extend:Extend",
        help="add a modality, task or experts; the old parts stay",
        overrides=True,
    ),
    "extend check": Verb(
        usage="RUN",
        target="moemm.cli.extend:Check",
        help="compare an extended run with its base again",
    ),
    "extend remove": Verb(
        usage="RUN",
        target="moemm.cli.extend:Remove",
        help="take an extension away",
    ),
    "extend export": Verb(
        usage="RUN NAME FILE",
        target="moemm.cli.package:Export",
        help="write an extension as a file of its own",
    ),
    "extend load": Verb(
        usage="RUN FILE",
        target="moemm.cli.package:Load",
        help="put such a file into a run with the same base",
    ),
    "plan": Verb(
        usage="RUN|CONFIG",
        target="moemm.cli.plan:Plan",
        help="memory, time and GPUs of a run, before it runs",
        overrides=True,
    ),
    "plan placement": Verb(
        usage="RUN",
        target="moemm.cli.plan:Placement",
        help="which rank should hold which expert, by measured loads",
    ),
    "plan simulate": Verb(
        usage="RUN",
        target="moemm.cli.plan:Simulate",
        help="a step on up to 1,024 ranks, with the run's routing",
        overrides=True,
    ),
    "checkpoint list": Verb(
        usage="RUN",
        target="moemm.cli.checkpoint:List",
        help="checkpoints of a run: step, size, complete or not",
    ),
    "checkpoint verify": Verb(
        usage="RUN",
        target="moemm.cli.checkpoint:Verify",
        help="read them all and compare hashes",
    ),
    "checkpoint prune": Verb(
        usage="RUN",
        target="moemm.cli.checkpoint:Prune",
        help="take older ones and left-overs away",
    ),
    "export": Verb(
        usage="RUN OUT",
        target="moemm.cli.export:Export",
        help="a trained model as one folder, for inference",
    ),
    "report": Verb(
        usage="RUN",
        target="moemm.cli.report:Report",
        help="one HTML file: routing, curves, cost, reuse",
    ),
    "config show": Verb(
        usage="CONFIG",
        target="moemm.cli.config:Show",
        help="all values of a configuration, with their origin",
        overrides=True,
    ),
    "config explain": Verb(
        usage="[KEY]",
        target="moemm.cli.config:Explain",
        help="what one key, or each, takes and does",
    ),
    "data inspect": Verb(
        usage="FILE",
        target="moemm.cli.data:Inspect",
        help="modalities, splits, classes, licence of a file",
    ),
    "data validate": Verb(
        usage="FILE...",
        target="moemm.cli.data:Validate",
        help="check data files from end to end",
    ),
    "data repack": Verb(
        usage="OLD NEW",
        target="moemm.cli.data:Repack",
        help="write a data file again: checksums, whole samples",
    ),
    "doctor": Verb(
        usage="",
        target="moemm.cli.doctor:Doctor",
        help="what is installed, live and wrong; a self test",
    ),
    "bench": Verb(
        usage="moe|kernels",
        target="moemm.cli.bench:Bench",
        help="measure the ops on this machine, beside other ways",
    ),
}
