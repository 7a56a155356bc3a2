"""Router statistics made by hand, for the tests of what shows them."""

from __future__ import annotations

import numpy as np

from moemm.observe.routing import RouterReport, RoutingNames

NAMES = RoutingNames(
    layers=(1, 3),
    rows=("image", "audio"),
    experts=("routed_0", "routed_1", "routed_2", "routed_3"),
    allowed_LME=np.array([[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 0, 0, 0]]], bool),
)


def report(load: object, *, tokens: object = None, dropped: object = None) -> RouterReport:
    """A report of these choices; tokens: those of the first layer's choices, one each, if not given."""
    load_LME = np.asarray(load, float)
    tokens_M = load_LME[0].sum(-1) if tokens is None else np.asarray(tokens, float)
    return RouterReport(
        load_LME=load_LME,
        prob_LME=load_LME * 0.5,
        dropped_LM=np.zeros(load_LME.shape[:2]) if dropped is None else np.asarray(dropped, float),
        tokens_M=tokens_M,
    )


EVEN = report([[[100] * 4, [100] * 4], [[100] * 4, [400, 0, 0, 0]]])
