"""route_topk: from logits to gates, expert ids and the sums that the router losses need.

T tokens, E experts, K chosen, M modalities.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from moemm.ops import check, reference
from moemm.ops.backend import COMPILED, refuse_second_derivative

Kind = Literal["softmax", "sigmoid"]


class RouteTopk(NamedTuple):
    """gates_TK and the sums in float32 (float64 for float64 logits), experts_TK int64.

    gates_TK, experts_TK: (T, K), the largest first; a slot for which no allowed expert is left has gate 0 and id -1.
    load_ME: (M, E) how many times each expert was chosen (no gradient).
    prob_ME: (M, E) sum of the probabilities; for sigmoid of each score's share of the token's scores.
    z_M: (M,) sum of the squared log-sum-exp of the allowed logits.
    tokens_M: (M,) number of tokens (no gradient).
    """

    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    load_ME: torch.Tensor
    prob_ME: torch.Tensor
    z_M: torch.Tensor
    tokens_M: torch.Tensor


def route_topk(
    logits_TE: torch.Tensor,
    modality_T: torch.Tensor,
    allowed_ME: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    *,
    top_k: int,
    kind: Kind = "softmax",
    renormalise: bool = False,
) -> RouteTopk:
    """Mask, softmax or sigmoid, top-k and loss statistics in one pass; in float32 inside.

    logits_TE: (T, E) float32, float64 or bfloat16; rows may lie apart.
    modality_T: (T,) int64; allowed_ME: (M, E) bool, which modality may use which expert.
    bias_E: (E,) added to the scores for choosing only, never to a gate (arXiv:2408.15664); without gradient.
    renormalise: divide a token's gates by their sum. At top_k = 1 the gates are then constant, and without it every
        gate depends on every allowed logit (softmax) or on its own (sigmoid).

    Equal logits: the lower id comes first. NaN logits: still distinct allowed ids, the gates are NaN.

    Raises KernelError for wrong shapes, types or devices and where a second derivative is asked for, IndexError for a
    modality out of range, ValueError for a token whose modality has no allowed expert (CPU; on CUDA the kernel traps).
    """
    check.route("route_topk", logits_TE, modality_T, allowed_ME, bias_E, top_k, kind)
    function = torch.ops.moemm.route_topk if COMPILED else reference.route_topk
    options: dict[str, Any] = {"top_k": top_k, "kind": kind, "renormalise": renormalise}
    return RouteTopk(*function(logits_TE, modality_T, allowed_ME, bias_E, **options))


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    logits_TE, modality_T, allowed_ME, *_ = inputs
    ctx.save_for_backward(logits_TE, modality_T, allowed_ME, output[1])
    ctx.options = {name: keyword_only_inputs[name] for name in ("kind", "renormalise")}
    ctx.mark_non_differentiable(output[1], output[2], output[5])


def _backward(
    ctx: Any, dgates_TK: Any, _experts: Any, _load: Any, dprob_ME: Any, dz_M: Any, _tokens: Any
) -> tuple[torch.Tensor, None, None, None]:
    saved = ctx.saved_tensors
    return torch.ops.moemm.route_topk_backward(dgates_TK, dprob_ME, dz_M, *saved, **ctx.options), None, None, None


def _fake(
    logits_TE: torch.Tensor, modality_T: torch.Tensor, allowed_ME: torch.Tensor, bias_E: Any = None, **options: Any
) -> tuple[torch.Tensor, ...]:
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    slots = (logits_TE.shape[0], options["top_k"])
    num_modalities = allowed_ME.shape[0]
    return (
        logits_TE.new_empty(slots, dtype=wide),
        logits_TE.new_empty(slots, dtype=torch.int64),
        *(logits_TE.new_empty(allowed_ME.shape, dtype=wide) for _ in range(2)),
        *(logits_TE.new_empty(num_modalities, dtype=wide) for _ in range(2)),
    )


def _fake_backward(
    dgates_TK: torch.Tensor, dprob_ME: torch.Tensor, dz_M: torch.Tensor, logits_TE: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    return logits_TE.new_empty(logits_TE.shape)


if COMPILED:
    torch.library.register_fake("moemm::route_topk", _fake)
    torch.library.register_fake("moemm::route_topk_backward", _fake_backward)
    torch.library.register_autograd("moemm::route_topk", _backward, setup_context=_save)
    refuse_second_derivative("route_topk")
