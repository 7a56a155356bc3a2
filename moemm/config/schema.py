"""The whole configuration, as dataclasses. The text under each field is its help; docs/config.md is made from it.

Imports no torch: help, config errors and plans answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, MinLen

Fraction = Annotated[float, Interval(ge=0.0, le=1.0)]
Share = Annotated[float, Interval(ge=0.0, lt=1.0)]
Positive = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Count = Annotated[int, Ge(1)]
ExpertsBackend = Literal["auto", "torch", "megablocks"]


@dataclass(kw_only=True)
class TaskConfig:
    """One thing to learn: a label of a data file."""

    name: Annotated[str, MinLen(1)]
    """Name of the task: in tables, TensorBoard tags, and the name of its head."""
    file: Annotated[str, MinLen(1)]
    """HDF5 file in moemm's format; a relative path starts at `data.root`."""
    label: Annotated[str, MinLen(1)] = "label"
    """Data set of the file that holds the target: `label`, or `label_<aux>` for a second target on the same samples."""
    rename: dict[str, str] = field(default_factory=dict)
    """Modality name in the file -> name in this run. Modalities of one name share tokenizer, embedding and experts."""
    modalities: Annotated[list[str], MinLen(1)] | None = None
    """Modalities (after renaming) to use; all of the file when not given."""
    weight: Positive = 1.0
    """Factor on this task's loss."""
    learn: bool = True
    """Whether its training samples are drawn; with false it has a head and is scored, and that is all."""
    bags: Annotated[str, MinLen(1)] | None = None
    """For `objectives.contrastive.loss: mil_nce`: data set of the file, `group` or an integer label, whose equal values
    mark samples of one thing, such as a clip with several captions. Each sample is its own when not given."""
    together: Count | None = None
    """With `bags`: how many samples of a bag are drawn one after the other, so that they meet in a batch: 5 when not
    given; 1 draws them as if there were no bags."""


@dataclass(kw_only=True)
class DataConfig:
    """What to learn from, and in which mixture."""

    tasks: Annotated[list[TaskConfig], MinLen(1)]
    """The tasks, in the order in which they appear everywhere."""
    root: Annotated[str, MinLen(1)] = "."
    """Folder that relative `file`s start at; itself relative to the config file."""
    temperature: Annotated[float, Ge(1.0)] = 1.0
    """Tasks are drawn with probability n^(1/temperature): 1 is proportional to size, large is uniform."""
    joint_labels: bool = False
    """Tasks over one file with the same modalities share each sample: it is drawn once, passes through the model once,
    and all their labels count."""
    label_share: Annotated[float, Interval(gt=0.0, le=1.0)] = 1.0
    """Share of each task's training samples whose labels are used, the same of each class; drawn by `train.seed`."""
    modality_dropout: Share = 0.0
    """Probability of taking a modality away from a training sample; the last one always stays."""
    modality_dropout_start: Share | None = None
    """The same at the first step, from where it moves in a straight line; it never moves when not given."""
    modality_dropout_over: Annotated[float, Interval(gt=0.0, le=1.0)] | None = None
    """Share of the steps over which it moves: 1 when not given."""
    within: Annotated[str, MinLen(1)] | None = None
    """File with a label for each training sample, as `moemm upcycle --method multiplet` writes it: a batch holds
    samples of one label, but for those in which a label or an epoch ends. Relative to the working directory."""
    deal: Literal["tokens", "samples"] = "tokens"
    """With several ranks: `tokens` gives each about as much to compute, by the lengths of the samples; `samples` the
    same number of samples. The batch is the same either way, and so are the losses (docs/data.md)."""
    num_workers: Annotated[int, Ge(0)] = 1
    """Worker processes that read and pack; 0 reads in the training process."""
    prefetch: Count = 4
    """Batches that each worker keeps ready."""


@dataclass(kw_only=True)
class ModalityConfig:
    """How one modality becomes tokens. What is not given comes from the kind's defaults."""

    kind: Annotated[str, MinLen(1)] | None = None
    """Tokenizer to use in place of the one that the file's `kind` attribute names."""
    patch: Annotated[list[Count], MinLen(1)] | None = None
    """image: [height, width]; video: [frames, height, width]; audio, timeseries, sensor: [frames]."""
    normalize: Literal["train", "sample", "none"] | None = None
    """Signals: subtract mean and divide by deviation of the train split, of each sample, or not at all."""
    vocabulary: Literal["word", "subword", "bytes"] | None = None
    """text: what a token is. Word and subword vocabularies are fitted on the train split and stored with the run."""
    vocab_size: Count | None = None
    """text: largest number of vocabulary entries."""
    max_tokens: Count | None = None
    """text: longer samples are cut here."""
    num_mels: Count | None = None
    """Waveforms: mel bands."""
    window_ms: Positive | None = None
    """Waveforms: analysis window in milliseconds."""
    hop_ms: Positive | None = None
    """Waveforms: step between frames in milliseconds."""
    dropout: Share | None = None
    """Share of this modality's tokens that are left out while training."""
    noise: NonNegative | None = None
    """Signals: deviation of the Gaussian noise added while training, after normalisation."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a kind of your own (`plugins`): those of its `defaults` that have no key here."""


@dataclass(kw_only=True)
class ExpertGroupConfig:
    """Some experts of one kind."""

    kind: Literal["shared", "modality", "routed", "zero", "lora"]
    """`shared`: runs on every token. `modality`: runs on every token of its modalities. `routed`: runs where the router
    sends. `zero`: a routed expert that computes nothing. `lora`: `base`, frozen, plus a low-rank change: routed, or run
    on every token of its modalities and tasks where it names some."""
    count: Count = 1
    """Number of experts; with modality experts, for each modality or group of them."""
    width: Count | None = None
    """Hidden units of each expert; zero and lora experts have none of their own."""
    modalities: Annotated[list[str], MinLen(1)] | None = None
    """Who may use these experts; all when not given. A `modality` group without it makes experts for each modality that
    no other `modality` group names; with it, those modalities share theirs."""
    tasks: Annotated[list[str], MinLen(1)] | None = None
    """Only samples of these tasks may use these experts (their skills); all when not given."""
    per_modality: bool = False
    """`count` experts for each modality alone, in place of `count` for all of them together."""
    layers: str = "all"
    """Where they stand: `all`, `every-2` (the last of each two), `first-1`, `last-1`, or numbers from 0: `0,3`."""
    id: Annotated[str, MinLen(1)] | None = None
    """Name in checkpoints and reports, numbered where the group has several; made from kind and modalities if not
    given."""
    base: str | None = None
    """lora: the id of the expert whose weights are changed."""
    rank: Count | None = None
    """lora: rank of the change."""
    added: Annotated[int, Ge(0)] = 0
    """Number in `model.extensions` of the extension that brought this group; 0: it was there from the beginning."""


def default_groups() -> list[ExpertGroupConfig]:
    """Half shared, a quarter by modality, a quarter routed: moemm's default."""
    return [
        ExpertGroupConfig(kind="shared", width=128),
        ExpertGroupConfig(kind="modality", width=64),
        ExpertGroupConfig(kind="routed", count=4, width=64),
    ]


@dataclass(kw_only=True)
class ExpertsConfig:
    """The experts of the MoE layers."""

    groups: Annotated[list[ExpertGroupConfig], MinLen(1)] = field(default_factory=default_groups)
    """Groups of experts. When not given: a shared expert of width 128, one of 64 for each modality, 4 routed of 64."""
    backend: ExpertsBackend = "auto"
    """What runs modality and routed experts: auto, moemm's ops; torch, plain PyTorch; megablocks, its grouped GEMM."""


@dataclass(kw_only=True)
class RouterLossConfig:
    """Weights of the router's own losses, each taken per layer and modality."""

    balance: NonNegative = 0.01
    """Load balance of the Switch Transformer (arXiv:2101.03961)."""
    z: NonNegative = 0.001
    """Squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906)."""
    importance: NonNegative = 0.0
    """Squared coefficient of variation of the experts' probability mass (arXiv:1701.06538)."""
    load: NonNegative = 0.0
    """The same of the smooth load; only `router.kind: noisy` has one."""
    local_entropy: NonNegative = 0.0
    """Mean entropy of a token's probabilities: each modality decides (LIMoE, arXiv:2206.02770)."""
    global_entropy: NonNegative = 0.0
    """How far the entropy of a modality's mean probabilities is under log of `min_experts` (LIMoE)."""
    min_experts: Annotated[float, Ge(1.0)] = 2.0
    """global_entropy: number of experts that each modality should at least use."""
    mutual_information: NonNegative = 0.0
    """Mean entropy of the modalities' mean probabilities less the entropy of their mean (FuseMoE, arXiv:2402.03226)."""
    combination: NonNegative = 0.0
    """Cross entropy to the expert of the sample's combination of modalities; only `router.kind: combination`."""


@dataclass(kw_only=True)
class RouterConfig:
    """From a token to its routed experts."""

    kind: Annotated[str, MinLen(1)] = "softmax"
    """`softmax`; `sigmoid`; `laplace` (softmax of distances); `noisy` (learned noise); `top_p` (as many experts as hold
    probability `p`); `hard` (all allowed experts, averaged); `expert_choice` (experts take tokens); `batch_priority`
    (softmax under `capacity`, the surest tokens first); `combination` (softmax; bound to the sample's modalities by
    `losses.combination`)."""
    top_k: Count | None = None
    """Routed experts a token uses: 1 when not given; for hard all, for top_p at most all."""
    gates: Literal["raw", "renormalised", "straight_through"] = "raw"
    """What the chosen experts are weighted by: their probabilities; those divided by their sum (a softmax over the
    chosen); or 1, with the probability's gradient."""
    scope: Literal["joint", "modality", "disjoint"] = "joint"
    """`joint`: one router. `modality`: each modality has router weights of its own. `disjoint`: and no routed expert
    serves two modalities."""
    p: Annotated[float, Interval(gt=0.0, le=1.0)] | None = None
    """top_p: probability that the chosen experts hold together; 0.5 when not given."""
    capacity: Positive | None = None
    """expert_choice, batch_priority: tokens an expert takes, as a multiple of its even share of those that may use it;
    1.25 when not given. The tokens of a rank's micro-batch compete, so more ranks or accumulation change results."""
    bias_rate: NonNegative = 0.0
    """After each step an expert's bias for being chosen moves by this much towards even load (arXiv:2408.15664)."""
    losses: RouterLossConfig = field(default_factory=RouterLossConfig)
    """The router's own losses."""


@dataclass(kw_only=True)
class MissingConfig:
    """What stands in the stream for a modality that a sample's task knows and the sample lacks."""

    kind: Literal["none", "bank", "predict"] = "none"
    """`none`: nothing. `bank`: one token, a sum of learned vectors, one for each modality that is there. `predict`: one
    token, the mean of the modality's tokens as a small network regresses it from those of the modalities that are
    there."""
    weight: Positive | None = None
    """predict: factor on the squared error of the regression, learned where the modality is there; 1 when not given."""
    width: Count | None = None
    """predict: hidden units; `dim` when not given."""


@dataclass(kw_only=True)
class ExtensionConfig:
    """What one extension of a trained model brought; `moemm extend` writes it (docs/growth.md)."""

    name: Annotated[str, MinLen(1)]
    """Name of the extension."""
    modalities: list[str] = field(default_factory=list)
    """Modalities that came with it."""
    tasks: list[str] = field(default_factory=list)
    """Tasks that came with it."""
    norms: bool = False
    """Its modalities have norms of their own; those of before share theirs as they did."""


@dataclass(kw_only=True)
class ModelConfig:
    """The packed transformer trunk."""

    dim: Annotated[int, Ge(8)] = 64
    """Width of the token stream."""
    layers: Count = 2
    """Blocks of attention + MoE."""
    heads: Count = 4
    """Attention heads; must divide `dim`."""
    moe: Literal["sparse", "dense"] = "sparse"
    """`sparse`: the experts below. `dense`: one FFN of equal active width, to compare with."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """The experts of each layer."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """From a token to its routed experts."""
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """Activation inside experts and FFNs."""
    dropout: Share = 0.0
    """Dropout on the output of attention and FFN, and before the heads."""
    untie: list[Literal["norms", "qkv"]] = field(default_factory=list)
    """Parts of a block of which each modality has its own: norms, and the projections to queries, keys and values."""
    latents: Annotated[int, Ge(0)] = 0
    """Latents that stand for the tokens of each modality of a sample, through one attention; 0 keeps the tokens."""
    share: list[Annotated[list[str], MinLen(1)]] = field(default_factory=list)
    """Modalities that share what `untie` and `latents` give to each."""
    ordered: bool = False
    """A token sees only modalities up to its own, in the order of the catalogue (MultiModN)."""
    predict_every_block: bool = False
    """The heads predict after every block, and the loss is the mean of them; scores are those of the last."""
    missing: MissingConfig = field(default_factory=MissingConfig)
    """Modalities that a sample lacks."""
    extensions: list[ExtensionConfig] = field(default_factory=list)
    """What came to a trained model, oldest first. Each is computed apart, so that outputs of before keep their bits."""
    attention: Literal["auto", "padded", "nested"] = "auto"
    """How attention over packed samples runs: dense blocks by length, or nested tensors; auto picks by device."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What all objectives have: a factor, and how it comes to be."""

    weight: NonNegative = 0.0
    """Factor on this objective; 0 leaves it out."""
    start: NonNegative | None = None
    """Factor at the first step, from which it goes linearly to `weight`; `weight` from the beginning when not given."""
    over: Annotated[float, Interval(gt=0.0, le=1.0)] = 1.0
    """Share of the steps that the way from `start` to `weight` takes."""


@dataclass(kw_only=True)
class SupervisedConfig(ObjectiveConfig):
    """The labels of the tasks; each task has a `weight` of its own besides."""

    weight: NonNegative = 1.0
    """Factor on this objective; 0 leaves it out."""


@dataclass(kw_only=True)
class MaskedConfig(ObjectiveConfig):
    """Masked modelling: hide tokens, tell what they were from the rest of the sample."""

    ratio: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.3
    """Probability that a token is hidden."""
    cross_modal: Fraction = 0.0
    """Probability that one whole modality of a sample of several is hidden, and nothing else of that sample."""
    modalities: Annotated[list[str], MinLen(1)] | None = None
    """Modalities to hide; all when not given."""


@dataclass(kw_only=True)
class ContrastiveConfig(ObjectiveConfig):
    """Contrastive alignment: each modality of a sample, encoded alone, finds the sample's other modalities."""

    loss: Literal["infonce", "siglip", "mil_nce"] = "infonce"
    """`infonce`: softmax over the samples of all ranks (arXiv:1807.03748). `siglip`: sigmoid on each pair of samples
    (arXiv:2303.15343). `mil_nce`: infonce that finds any sample of the same bag (arXiv:1912.06430), see `bags` of a
    task."""
    temperature: Positive = 0.1
    """Temperature at the start; it is learned."""
    pairs: Annotated[list[list[str]], MinLen(1)] | None = None
    """Pairs of modalities to align, such as [[image, voice]]; every pair that a sample has when not given."""
    noisy_pairs: Literal["ignore", "estimate", "weigh"] = "weigh"
    """Pairs of a sample that may not belong together. `estimate`: keep a running loss of every training sample's pairs,
    and list those that look wrong (`moemm report`). `weigh`: count them less, too, where the losses fall into two
    groups that lie clearly apart; where they do not, nothing changes. docs/harmonize.md."""
    noisy_from: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.3
    """Share of the steps after which `weigh` begins: before, the model cannot tell."""


@dataclass(kw_only=True)
class SimilarityConfig(ObjectiveConfig):
    """Similarity between a sample with hidden tokens (as `masked` hides them) and the whole sample (LANISTR)."""


@dataclass(kw_only=True)
class ReplacedConfig(ObjectiveConfig):
    """Replaced-token detection: tell of every token whether it was exchanged (ELECTRA, arXiv:2003.10555)."""

    ratio: Fraction = 0.15
    """Probability that a token is exchanged with one of another place or sample."""


@dataclass(kw_only=True)
class OwnObjectiveConfig(ObjectiveConfig):
    """An objective of your own, that a file of `plugins` registers."""

    options: dict[str, Any] = field(default_factory=dict)
    """What the objective itself wants to know."""


@dataclass(kw_only=True)
class ObjectivesConfig:
    """What is minimised: the weighted sum of these, and the router's own losses."""

    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    """The labels of the tasks."""
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    """Masked modelling."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Contrastive alignment."""
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """Masked-to-unmasked similarity."""
    replaced: ReplacedConfig = field(default_factory=ReplacedConfig)
    """Replaced-token detection."""
    own: dict[str, OwnObjectiveConfig] = field(default_factory=dict)
    """Objectives of your own, by the names that @register_objective gives them."""


Cosine = Annotated[float, Interval(ge=-1.0, le=1.0)]


@dataclass(kw_only=True)
class HarmonizeConfig:
    """What is done where the gradients of two losses oppose each other, before they are added; and how losses of
    different size are weighed.

    At the fork, which is the end of the trunk, losses meet where they read the same tokens: the labels of one sample
    (`data.joint_labels`), the pairs of `objectives.contrastive`, `objectives.similarity` and what else reads its views.
    At the trunk all losses meet that share a parameter, for the price of a backward pass for each."""

    method: Annotated[str, MinLen(1)] = "sum"
    """`sum`: nothing. `realign`, `curriculum`, `realign_curriculum`, `pcgrad`, `gradvac`, `cagrad`, `mgda`, `imtl_g`,
    `nash_mtl`, `aligned_mtl`, `upgrad`, `dual_cone`, `equal_norm`, `random`: docs/harmonize.md; or what
    @register_harmonizer adds."""
    at: Literal["fork", "trunk"] = "fork"
    """Whose gradients: those of the stream that the trunk returns, or those of the parameters that losses share."""
    per: Literal["sample", "token", "modality", "expert", "batch"] | None = None
    """fork: what is compared and weighed together, each sample (when not given) or token, or, over all ranks, the
    tokens of a modality, those that the last block sent to one expert, or a micro-batch. trunk: `batch`, all samples of
    the step."""
    gamma: Cosine = 0.0
    """realign, curriculum, realign_curriculum: the cosine under which two losses are in conflict."""
    gamma_start: Cosine | None = None
    """The same at the first step, from where it moves in a straight line; it never moves when not given."""
    gamma_over: Annotated[float, Interval(gt=0.0, le=1.0)] | None = None
    """Share of the steps over which it moves: 1 when not given."""
    strength: Annotated[float, Interval(gt=0.0, lt=1.0)] = 0.5
    """cagrad: how far from the mean gradient, as a share of its length. gradvac: rate of its averages."""
    scale: Literal["none", "uncertainty", "dwa", "famo", "gradnorm"] = "none"
    """Weights of the losses by their values over time, before `method` sees their gradients: `uncertainty`, a learned
    variance each; `dwa`, how slowly they fall; `famo`, equal rates of fall; `gradnorm`, equal gradients."""
    scale_rate: Positive = 0.025
    """famo, gradnorm: learning rate of the weights."""
    scale_window: Count = 50
    """dwa: steps over which losses are averaged before they are compared."""
    scale_alpha: NonNegative = 1.5
    """gradnorm: how much more a loss gets that lags behind the others."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: Annotated[int, Ge(0)] = 0
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep: Count = 2
    """Newest checkpoints to keep; older ones go once a newer one is verified."""
    keep_every: Annotated[int, Ge(0)] = 0
    """Checkpoints of steps that are multiples of this stay for ever, beside the newest; 0: none does."""
    background: bool = False
    """Go on training while a checkpoint is written, from a copy in memory (12 bytes a parameter, shared by ranks under
    ZeRO). The last one of a run is waited for."""


@dataclass(kw_only=True)
class HealthConfig:
    """What training does about steps that are broken (docs/faults.md)."""

    max_faulty: Count = 10
    """Steps in a row whose loss or gradient is not finite that end training; up to then the modality or task that
    breaks a step is left out of it. 1 ends it at the first."""
    spike: NonNegative = 0.0
    """Leave a step out whose loss is more than this many deviations above the median of the last 128, by the median of
    their distances to it; 0 leaves none out. It counts as a faulty step. 8 is cautious."""


@dataclass(kw_only=True)
class TrainConfig:
    """The optimisation."""

    output: Annotated[str, MinLen(1)] = "runs/default"
    """Folder of the run: config, vocabularies, metrics, checkpoints. Relative to the working directory."""
    init: Annotated[str, MinLen(1)] | None = None
    """Run folder, or one of its checkpoints, whose weights are the start: those that fit by name and shape."""
    only: Annotated[list[Annotated[str, MinLen(1)]], MinLen(1)] | None = None
    """Names of the tensors to train, as in a checkpoint's model.safetensors, with * for any characters; all others, and
    states that have no gradient, keep their bits. All when not given."""
    epochs: Positive | None = None
    """Passes over the mixture (one epoch: as many samples as the train splits hold together)."""
    steps: Count | None = None
    """Optimizer steps; give this or `epochs`."""
    batch_size: Count = 64
    """Samples an optimizer step, over all ranks: batch_size = micro-batch x accumulation x ranks."""
    accumulation: Count = 1
    """Micro-batches an optimizer step on each rank."""
    lr: Positive = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.05
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """AdamW's betas."""
    warmup: Fraction = 0.05
    """Share of the steps during which the learning rate rises linearly."""
    min_lr: Fraction = 0.0
    """Last learning rate of the cosine, as a share of `lr`."""
    clip: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    label_smoothing: Share = 0.0
    """Label smoothing of classification losses."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block of the trunk, and compute the block again in the backward pass: less memory,
    more time, the same losses."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and activations; bf16 keeps fp32 master weights and needs `deepspeed.zero_stage` >= 1."""
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """Seeds weights, order of the data and dropout."""
    deterministic: bool = True
    """Refuse operations that are not deterministic."""
    log_every: Count = 10
    """Steps between lines of metrics."""
    eval_every: Annotated[int, Ge(0)] = 0
    """Steps between evaluations on the val split; 0 evaluates only at the end."""
    baselines: bool = True
    """Fit scikit-learn models on the same data at the end, to compare with (tasks of up to 20,000 samples)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Steps that are broken."""


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """The engine. Its own configuration is made from the sections above."""

    zero_stage: Annotated[int, Ge(0), Le(3)] = 0
    """ZeRO stage: what is sharded over ranks. 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights."""
    ep_size: Count = 1
    """Ranks over which the modality and routed experts of each layer are spread; must divide the ranks. 1: every rank
    has all of them. docs/parallel.md."""
    placement: dict[str, list[Annotated[int, Ge(0)]]] = field(default_factory=dict)
    """With `ep_size`: expert id -> its position among the ep_size ranks, one number for all layers or one for each.
    Dealt out in turn when not given."""
    timeout_s: Positive = 120.0
    """Seconds after which a collective that lacks a rank ends the run."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Passed on to DeepSpeed as it is; its top-level keys are checked, and it may not contradict what moemm sets."""


@dataclass(kw_only=True)
class ObserveConfig:
    """Who is told how a run goes, besides the files of its folder (docs/status.md)."""

    heartbeat_s: Positive = 5.0
    """Seconds between signs of life in heartbeat.json, which `moemm status` reads."""
    prometheus: Annotated[str, MinLen(1)] | None = None
    """Text file for the textfile collector of Prometheus' node_exporter, rewritten with every report; ends in .prom.
    Relative to the working directory."""
    wandb: Annotated[str, MinLen(1)] | None = None
    """Project of Weights & Biases; needs `pip install wandb`."""
    mlflow: Annotated[str, MinLen(1)] | None = None
    """Experiment of MLflow; needs `pip install mlflow-skinny`, or mlflow."""


@dataclass(kw_only=True)
class Config:
    """A run of moemm."""

    name: Annotated[str, MinLen(1)] = "run"
    """Name of the recipe, for tables and reports."""
    plugins: list[Annotated[str, MinLen(1)]] = field(default_factory=list)
    """Python files that register modalities, routers, harmonizers and objectives of your own; their code runs. Relative
    to the file that this stands in. docs/add_a_modality.md."""
    data: DataConfig
    """What to learn from."""
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    """Options of single modalities, by name after renaming."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """What is minimised."""
    harmonize: HarmonizeConfig = field(default_factory=HarmonizeConfig)
    """Conflicts between losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """The engine."""
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    """Who is told how it goes."""
