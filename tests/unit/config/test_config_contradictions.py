"""Values that are right one by one and wrong together."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from moemm.config import check_ranks, deepspeed_section, from_dict, require_ranks, to_dict
from moemm.config.check import KIND_OPTIONS
from moemm.errors import ConfigError

TASK = {"name": "digits", "file": "digits.h5", "modalities": ["image", "sound"]}

SHARED, ROUTED = {"kind": "shared", "width": 8}, {"kind": "routed", "width": 8, "count": 2}
MODALITY = {"kind": "modality", "width": 8}


def groups(*given: dict[str, Any]) -> dict[str, Any]:
    return {"groups": list(given)}


PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "a name that node_exporter passes over": (
        {"observe": {"prometheus": "run.txt"}},
        r"observe\.prometheus: has a name that node_exporter passes over",
    ),
    "heads and dim": ({"model": {"dim": 64, "heads": 5}}, r"model\.heads: does not divide model\.dim, which is 64"),
    "top_k and routed": (
        {"model": {"router": {"top_k": 3}, "experts": groups(ROUTED)}},
        r"router\.top_k: is more than the routed experts of model\.experts\.groups, which are 2",
    ),
    "top_k and nothing routed": (
        {"model": {"router": {"top_k": 1}, "experts": groups(SHARED)}},
        r"router\.top_k: has no meaning: no group",
    ),
    "renormalised gates of one": (
        {"model": {"router": {"gates": "renormalised"}}},
        r"router\.gates: needs top_k of 2 or more: with 1 the gate is always 1",
    ),
    "an option of another router": ({"model": {"router": {"p": 0.5}}}, r"router\.p: has no meaning for kind softmax"),
    "capacity of a router without": (
        {"model": {"router": {"kind": "top_p", "capacity": 2.0}}},
        r"router\.capacity: has no meaning for kind top_p",
    ),
    "top_k of hard": (
        {"model": {"router": {"kind": "hard", "top_k": 2}}},
        r"router\.top_k: has no meaning for kind hard",
    ),
    "bias of top_p": (
        {"model": {"router": {"kind": "top_p", "bias_rate": 0.001}}},
        r"router\.bias_rate: has no meaning for kind top_p",
    ),
    "a router that is misspelt": (
        {"model": {"router": {"kind": "sofmax"}}},
        r"router\.kind: .*; did you mean softmax\?",
    ),
    "smooth load without noise": (
        {"model": {"router": {"losses": {"load": 0.1}}}},
        r"losses\.load: needs model\.router\.kind noisy",
    ),
    "binding without combination": (
        {"model": {"router": {"losses": {"combination": 0.1}}}},
        r"losses\.combination: needs model\.router\.kind combination",
    ),
    "a threshold without its loss": (
        {"model": {"router": {"losses": {"min_experts": 3.0}}}},
        r"losses\.min_experts: has no meaning without `global_entropy`",
    ),
    "a regression's weight without a regression": (
        {"model": {"missing": {"kind": "bank", "weight": 0.5}}},
        r"model\.missing\.weight: is no option of `model\.missing\.kind: bank`",
    ),
    "a network's width without a network": (
        {"model": {"missing": {"width": 32}}},
        r"model\.missing\.width: is no option of `model\.missing\.kind: none`",
    ),
    "the length of a schedule without its start": (
        {"data": {"tasks": [{"name": "a", "file": "a.h5"}], "modality_dropout": 0.3, "modality_dropout_over": 0.5}},
        r"data\.modality_dropout_over: has no meaning without data\.modality_dropout_start",
    ),
    "nothing to learn": (
        {"objectives": {"supervised": {"weight": 0.0}}},
        r"objectives\.supervised\.weight: is 0, and so is every other",
    ),
    "a way from nowhere": (
        {"objectives": {"masked": {"weight": 1.0, "over": 0.5}}},
        r"objectives\.masked\.over: has no meaning without `start`",
    ),
    "masked modelling that hides nothing": (
        {"objectives": {"masked": {"weight": 1.0, "ratio": 0.0}}},
        r"masked\.ratio: is 0, and cross_modal too: nothing is hidden for objectives\.masked",
    ),
    "similarity of what is equal": (
        {"objectives": {"similarity": {"weight": 1.0}, "masked": {"ratio": 0.0}}},
        r"masked\.ratio: is 0, and cross_modal too: nothing is hidden for objectives\.similarity",
    ),
    "hidden modality that no task has": (
        {"objectives": {"masked": {"weight": 1.0, "modalities": ["imagee"]}}},
        r"masked\.modalities: names imagee, which no task has; did you mean image\?",
    ),
    "a pair of three": (
        {"objectives": {"contrastive": {"weight": 1.0, "pairs": [["image", "sound", "image"]]}}},
        r"contrastive\.pairs\.0: is no pair",
    ),
    "a modality with itself": (
        {"objectives": {"contrastive": {"weight": 1.0, "pairs": [["image", "image"]]}}},
        r"contrastive\.pairs\.0: is no pair",
    ),
    "a pair twice": (
        {"objectives": {"contrastive": {"weight": 1.0, "pairs": [["image", "sound"], ["sound", "image"]]}}},
        r"contrastive\.pairs\.1: stands here twice",
    ),
    "a pair with a modality that no task has": (
        {"objectives": {"contrastive": {"weight": 1.0, "pairs": [["image", "smell"]]}}},
        r"contrastive\.pairs\.0: names smell, which no task has",
    ),
    "hidden tokens and latents": (
        {"objectives": {"masked": {"weight": 1.0}}, "model": {"latents": 4}},
        r"model\.latents: leaves no token to objectives\.masked",
    ),
    "replacing everything": (
        {"objectives": {"replaced": {"weight": 1.0, "ratio": 1.0}}},
        r"replaced\.ratio: leaves nothing to tell apart",
    ),
    "a share of labels that nobody reads": (
        {"data": {"label_share": 0.1}, "objectives": {"supervised": {"weight": 0.0}, "masked": {"weight": 1.0}}},
        r"data\.label_share: has no meaning with `objectives\.supervised\.weight: 0`",
    ),
    "init from itself": (
        {"train": {"init": "runs/default/"}},
        r"train\.init: is train\.output; --resume goes on",
    ),
    "no experts": ({"model": {"experts": {"groups": []}}}, r"model\.experts\.groups: holds too few values"),
    "a shared expert without width": (
        {"model": {"experts": groups({"kind": "shared"})}},
        r"groups\.0\.width: is missing; kind shared needs it",
    ),
    "a zero expert with width": (
        {"model": {"experts": groups(SHARED, {"kind": "zero", "width": 4})}},
        r"groups\.1\.width: has no meaning for kind zero",
    ),
    "a lora expert without base": (
        {"model": {"experts": groups(SHARED, {"kind": "lora", "rank": 4})}},
        r"groups\.1\.base: is missing",
    ),
    "a rank of a routed expert": (
        {"model": {"experts": groups(ROUTED | {"rank": 4})}},
        r"groups\.0\.rank: has no meaning",
    ),
    "modalities of a shared expert": (
        {"model": {"experts": groups(SHARED | {"modalities": ["image"]})}},
        r"groups\.0\.modalities: has no meaning for kind shared",
    ),
    "layers that are not there": (
        {"model": {"layers": 2, "experts": groups(SHARED, ROUTED | {"layers": "every-3"})}},
        r"groups\.1\.layers: names no layer; the model has 0 to 1",
    ),
    "one id for two groups": (
        {"model": {"experts": groups(SHARED | {"id": "a"}, ROUTED | {"id": "a"})}},
        r"groups\.1\.id: is the id of two groups",
    ),
    "a task that nobody has": (
        {"model": {"experts": groups(SHARED, MODALITY | {"tasks": ["digit"]})}},
        r"groups\.1\.tasks: names digit, which is no task; did you mean digits\?",
    ),
    "megablocks in fp32": (
        {"model": {"experts": {"backend": "megablocks"}}},
        r"experts\.backend: multiplies bfloat16 only, but train\.precision is fp32",
    ),
    "megablocks and two widths": (
        {
            "model": {"experts": {"backend": "megablocks", **groups(MODALITY, ROUTED | {"width": 16})}},
            "train": {"precision": "bf16"},
            "deepspeed": {"zero_stage": 1},
        },
        r"experts\.backend: multiplies experts of one width, but the groups have 8, 16",
    ),
    "a backend for a dense model": (
        {"model": {"moe": "dense", "experts": {"backend": "torch"}}},
        r"experts\.backend: has nothing to run",
    ),
    "a backend for a shared expert alone": (
        {"model": {"experts": {"backend": "torch", **groups(SHARED)}}},
        r"experts\.backend: has nothing to run",
    ),
    "steps and epochs": ({"train": {"epochs": 2, "steps": 5}}, r"train\.steps: given together with train\.epochs"),
    "neither steps nor epochs": ({"train": {"epochs": None}}, r"train\.epochs: is missing, and train\.steps too"),
    "batch and accumulation": ({"train": {"batch_size": 10, "accumulation": 4}}, r"batch_size: is not divisible"),
    "bf16 and stage 0": ({"train": {"precision": "bf16"}}, r"train\.precision: needs deepspeed\.zero_stage >= 1"),
    "two tasks of one name": (
        {"data": {"tasks": [TASK, TASK | {"file": "other.h5"}]}},
        r"data\.tasks\.1\.name: is the name of two tasks",
    ),
    "one task under two names": (
        {"data": {"tasks": [TASK, TASK | {"name": "again"}]}},
        r"data\.tasks\.1: is the same file, label and modalities as task digits",
    ),
    "nothing to learn from": (
        {"data": {"tasks": [TASK | {"learn": False}]}},
        r"data\.tasks\.0\.learn: is false for each task",
    ),
    "a group of an extension that there is not": (
        {"model": {"experts": groups(SHARED, ROUTED | {"added": 1})}},
        r"groups\.1\.added: is more than the extensions in model\.extensions, which are 0",
    ),
    "groups that do not stand as they came": (
        {
            "data": {"tasks": [TASK]},
            "model": {"extensions": [{"name": "x"}], "experts": groups(SHARED, ROUTED | {"added": 1}, ROUTED)},
        },
        r"groups\.2\.added: stands behind a group of extension 1",
    ),
    "an extension of a modality that nobody has": (
        {"data": {"tasks": [TASK]}, "model": {"extensions": [{"name": "x", "modalities": ["sounds"]}]}},
        r"model\.extensions: name sounds in `modalities`, which this run does not have; did you mean sound\?",
    ),
    "an extension of a task that is not there": (
        {"data": {"tasks": [TASK]}, "model": {"extensions": [{"name": "x", "tasks": ["digit"]}]}},
        r"model\.extensions: name digit in `tasks`, which this run does not have",
    ),
    "a modality that came twice": (
        {
            "data": {"tasks": [TASK]},
            "model": {"extensions": [{"name": "x", "modalities": ["image"]}, {"name": "y", "modalities": ["image"]}]},
        },
        r"model\.extensions: have image 2 times in `modalities`",
    ),
    "norms of an extension beside untied ones": (
        {"data": {"tasks": [TASK]}, "model": {"untie": ["norms"], "extensions": [{"name": "x", "norms": True}]}},
        r"model\.extensions: `norms` has no meaning with `model\.untie: \[norms\]`",
    ),
    "a task that is a path": ({"data": {"tasks": [TASK | {"name": "a/b"}]}}, r"tasks\.0\.name: .* no / and no dot"),
    "joint labels of one task": (
        {"data": {"tasks": [TASK], "joint_labels": True}},
        r"data\.joint_labels: joins nothing: no two tasks have the same file, rename, modalities and bags\n",
    ),
    "joint labels of different modalities": (
        {"data": {"tasks": [TASK, TASK | {"name": "seen", "modalities": ["image"]}], "joint_labels": True}},
        r"joins nothing: .* \(digits and seen share digits\.h5, but differ in rename, modalities or bags\)",
    ),
    "joint labels and skills": (
        {
            "data": {"tasks": [TASK, TASK | {"name": "hand", "label": "label_hand"}], "joint_labels": True},
            "model": {"experts": groups(SHARED, MODALITY | {"tasks": ["digits"]})},
        },
        r"groups\.1\.tasks: asks for the one task of a sample; with data\.joint_labels a sample is of digits and hand",
    ),
    "renames that collide": (
        {"data": {"tasks": [TASK | {"rename": {"left": "image", "right": "image"}}]}},
        r"data\.tasks\.0\.rename: gives 2 modalities of one file the name image",
    ),
    "the old name of a rename": (
        {"data": {"tasks": [TASK | {"rename": {"image": "photo"}, "modalities": ["image", "photo"]}]}},
        r"data\.tasks\.0\.modalities: names image, which `rename` turns into photo",
    ),
    "a rename that is left out": (
        {"data": {"tasks": [TASK | {"rename": {"img": "photo"}}]}},
        r"data\.tasks\.0\.rename: renames img to photo, which `modalities` leaves out",
    ),
    "a modality twice": (
        {"data": {"tasks": [TASK | {"modalities": ["image", "sound", "image"]}]}},
        r"data\.tasks\.0\.modalities: names image 2 times",
    ),
    "options of a modality that nobody has": ({"modalities": {"imag": {}}}, r"imag: .*; did you mean image\?"),
    "a group with a modality that nobody has": (
        {"model": {"experts": groups(SHARED, MODALITY | {"modalities": ["image", "sounds"]})}},
        r"groups\.1\.modalities: names sounds, which no task has; did you mean sound\?",
    ),
    "a modality twice in a group": (
        {"model": {"experts": groups(MODALITY | {"modalities": ["image", "image"]})}},
        r"groups\.0\.modalities: names image 2 times",
    ),
    "a vocabulary of an image": (
        {"modalities": {"image": {"kind": "image", "vocabulary": "word"}}},
        r"modalities\.image\.vocabulary: is no option of kind image",
    ),
    "a patch of text": ({"modalities": {"sound": {"kind": "text", "patch": [4]}}}, r"is no option of kind text"),
    "mel bands of a sensor": (
        {"modalities": {"sound": {"kind": "sensor", "num_mels": 8}}},
        r"no option of kind sensor",
    ),
    "noise on a table": ({"modalities": {"sound": {"kind": "tabular", "noise": 0.1}}}, r"is no option of kind tabular"),
    "a patch of one number for an image": (
        {"modalities": {"image": {"kind": "image", "patch": [4]}}},
        r"modalities\.image\.patch: has 1 numbers; kind image takes 2",
    ),
    "a patch of two numbers for a video": (
        {"modalities": {"image": {"kind": "video", "patch": [4, 4]}}},
        r"kind video takes 3",
    ),
    "a kind with a typo": ({"modalities": {"image": {"kind": "imgae"}}}, r"image\.kind: .*did you mean image\?"),
    "bytes and vocab_size": (
        {"modalities": {"sound": {"vocabulary": "bytes", "vocab_size": 99}}},
        r"modalities\.sound\.vocab_size: has no meaning",
    ),
    "a hop longer than the window": (
        {"modalities": {"sound": {"window_ms": 10, "hop_ms": 20}}},
        r"modalities\.sound\.hop_ms: is longer than the window of 10 ms",
    ),
    "two stages": (
        {"deepspeed": {"extra": {"zero_optimization": {"stage": 2}}}},
        r"zero_optimization\.stage: is set by moemm; use deepspeed\.zero_stage",
    ),
    "two batch sizes": ({"deepspeed": {"extra": {"train_batch_size": 8}}}, r"is set by moemm; use train\.batch_size"),
    "two accumulations": ({"deepspeed": {"extra": {"gradient_accumulation_steps": 2}}}, r"use train\.accumulation"),
    "two clippings": ({"deepspeed": {"extra": {"gradient_clipping": 0.5}}}, r"use train\.clip"),
    "two optimizers": ({"deepspeed": {"extra": {"optimizer": {"type": "Adam"}}}}, r"use train\.lr, train\.betas"),
    "two schedules": ({"deepspeed": {"extra": {"scheduler": {}}}}, r"use train\.warmup"),
    "two precisions": ({"deepspeed": {"extra": {"bf16": {"enabled": True}}}}, r"bf16\.enabled: .*use train\.precision"),
    "fp16": ({"deepspeed": {"extra": {"fp16": {"enabled": True}}}}, r"use train\.precision \(fp32 or bf16\)"),
    "DeepSpeed's own activation checkpointing, which nothing here would call": (
        {"deepspeed": {"extra": {"activation_checkpointing": {"partition_activations": True}}}},
        r"extra\.activation_checkpointing: is set by moemm; use train\.activation_checkpointing",
    ),
    "a pipeline": ({"deepspeed": {"extra": {"pipeline": {}}}}, r"is not for moemm: the model is no pipeline module"),
    "a removed key": ({"deepspeed": {"extra": {"elasticity": {}}}}, r"elasticity: was removed from DeepSpeed"),
    "a typo for DeepSpeed": ({"deepspeed": {"extra": {"zero_optimisation": {}}}}, r"did you mean zero_optimization\?"),
    "a typo inside ZeRO": (
        {"deepspeed": {"extra": {"zero_optimization": {"overlap_com": True}}}},
        r"overlap_com: DeepSpeed has no such key; did you mean overlap_comm\?",
    ),
    "a deprecated key of ZeRO": (
        {"deepspeed": {"extra": {"zero_optimization": {"cpu_offload": True}}}},
        r"zero_optimization\.cpu_offload: is deprecated",
    ),
    "a placement and no ranks": (
        {"deepspeed": {"placement": {"routed_0": [0]}}},
        r"placement: has no meaning with `deepspeed\.ep_size: 1`",
    ),
    "ranks and no experts": (
        {"model": {"moe": "dense"}, "deepspeed": {"ep_size": 2}},
        r"ep_size: has nothing to spread: there are no modality or routed experts",
    ),
    "shared experts over ranks": (
        {"model": {"experts": groups(SHARED)}, "deepspeed": {"ep_size": 2}},
        r"ep_size: has nothing to spread",
    ),
    "positions of other layers": (
        {"deepspeed": {"ep_size": 2, "placement": {"routed_0": [0, 1, 0]}}},
        r"placement\.routed_0: has 3 positions for 2 layers",
    ),
    "a position behind the last": (
        {"deepspeed": {"ep_size": 2, "placement": {"routed_0": [2]}}},
        r"placement\.routed_0: names position 2 of 2 ranks",
    ),
    "the trunk's gradients over ranks": (
        {"harmonize": {"method": "upgrad", "at": "trunk"}, "deepspeed": {"ep_size": 2}},
        r"harmonize\.at: compares whole gradients, and with deepspeed\.ep_size of more than 1 no rank has those",
    ),
    "offload and experts over ranks": (
        {"deepspeed": {"zero_stage": 2, "ep_size": 2, "extra": {"zero_optimization": {"offload_optimizer": {}}}}},
        r"offload_optimizer: is not for experts that are spread",
    ),
    "no reduce_scatter and experts over ranks": (
        {"deepspeed": {"zero_stage": 2, "ep_size": 2, "extra": {"zero_optimization": {"reduce_scatter": False}}}},
        r"reduce_scatter: DeepSpeed reduces gradients of experts that are spread with reduce_scatter alone",
    ),
    "ZeRO that is no mapping": ({"deepspeed": {"extra": {"zero_optimization": True}}}, r"must be a mapping"),
    "weights off the GPU at stage 2": (
        {"deepspeed": {"zero_stage": 2, "extra": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}},
        r"offload_param: needs deepspeed\.zero_stage 3, which is 2",
    ),
    "stage 3's options at stage 1": (
        {"deepspeed": {"zero_stage": 1, "extra": {"zero_optimization": {"stage3_max_live_parameters": 5}}}},
        r"needs deepspeed\.zero_stage 3, which is 1",
    ),
    "optimizer off the GPU at stage 0": (
        {"deepspeed": {"extra": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}},
        r"needs deepspeed\.zero_stage >= 1",
    ),
    "states that no checkpoint can hold": (
        {"deepspeed": {"zero_stage": 3, "extra": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}},
        r"offload_optimizer: puts states on NVMe, which moemm's checkpoints cannot hold",
    ),
    "reordered gradients asked for at the trunk": (
        {
            "harmonize": {"method": "upgrad", "at": "trunk"},
            "deepspeed": {"zero_stage": 1, "extra": {"zero_optimization": {"round_robin_gradients": True}}},
        },
        r"round_robin_gradients: keeps gradients where `harmonize.at: trunk` cannot read and write them",
    ),
    "clipping without a norm": (
        {"deepspeed": {"zero_stage": 1, "extra": {"zero_optimization": {"compute_grad_norm": False}}}},
        r"compute_grad_norm: is what clipping needs",
    ),
}


def merged(values: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {"data": {"tasks": [TASK]}, "train": {"epochs": 2}}
    for section, keys in copy.deepcopy(values).items():
        whole[section] = whole.get(section, {}) | keys
    return whole


@pytest.mark.parametrize("name", PAIRS)
def test_contradictions_are_refused(name: str) -> None:
    values, message = PAIRS[name]
    with pytest.raises(ConfigError) as caught:
        from_dict(merged(values), origin="a test")
    assert str(caught.value).startswith("a test: 1 problem"), str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_there_are_enough_pairs() -> None:
    assert len(PAIRS) >= 40


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"dim": 30, "heads": 5}},
        {"model": {"router": {"kind": "top_p", "top_k": 3, "p": 0.9, "gates": "renormalised"}}},
        {"model": {"experts": groups(MODALITY | {"modalities": ["image", "sound"]}, MODALITY)}},
        {"model": {"router": {"top_k": 3}, "experts": groups(ROUTED | {"per_modality": True})}},
        {"train": {"epochs": None, "steps": 5}},
        {"train": {"precision": "bf16"}, "deepspeed": {"zero_stage": 1}},
        {"modalities": {"image": {"kind": "radar", "patch": [1, 2, 3, 4]}}},
        {"modalities": {"image": {"patch": [4, 4]}}},
        {"deepspeed": {"zero_stage": 3, "extra": {"zero_optimization": {"stage3_max_live_parameters": 5}}}},
        {"data": {"tasks": [TASK, TASK | {"name": "one", "modalities": ["image"]}]}},
        {"data": {"tasks": [TASK | {"modalities": None}]}, "modalities": {"whatever": {}}},
        {"data": {"tasks": [TASK, TASK | {"name": "hand", "label": "label_hand"}], "joint_labels": True}},
    ],
)
def test_what_only_looks_like_a_contradiction_is_accepted(values: dict[str, Any]) -> None:
    config = from_dict(merged(values), origin="a test")
    assert from_dict(to_dict(config), origin="itself") == config, "accepted whole, and again"


def test_groups_of_ranks_must_divide_the_ranks() -> None:
    config = from_dict(merged({"train": {"epochs": 1, "batch_size": 12}, "deepspeed": {"ep_size": 4}}), origin="a test")
    assert not list(check_ranks(config, world_size=4))
    with pytest.raises(
        ConfigError, match=r"ep_size: does not divide the 6 ranks .*\n.*given: +4\n.*allowed: +1, 2, 3, 6"
    ):
        require_ranks(config, world_size=6)


def test_a_batch_must_divide_over_the_ranks() -> None:
    config = from_dict(merged({"train": {"epochs": 1, "batch_size": 8, "accumulation": 2}}), origin="a test")
    assert not list(check_ranks(config, world_size=4))
    with pytest.raises(ConfigError, match=r"cannot be dealt out to 3 ranks x 2 .*\n.*given:   8\n.*a multiple of 6"):
        deepspeed_section(config, world_size=3)
    with pytest.raises(ConfigError, match="at least 1 rank"):
        deepspeed_section(config, world_size=0)


def test_the_options_of_each_kind_are_those_of_its_tokenizer() -> None:
    modalities = pytest.importorskip("moemm.modalities")
    shipped = {kind: set(tokenizer.defaults) for kind, tokenizer in modalities.KINDS.items()}
    assert shipped == KIND_OPTIONS
