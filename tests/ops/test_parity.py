"""Every op against plain PyTorch in float64, over shapes, types, layouts and plans."""

from __future__ import annotations

import pytest
import torch

from moemm import ops
from moemm.ops import backend_info
from moemm.testing.op_cases import MAKERS, SHAPES, OpCase, op_cases

CASES = list(op_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: OpCase) -> None:
    case.check()


@pytest.mark.gpu
@pytest.mark.skipif(not (backend_info()["cuda"] and torch.cuda.is_available()), reason="no CUDA device or no CUDA ops")
@pytest.mark.parametrize("op", MAKERS)
def test_output_and_gradients_on_cuda(op: str) -> None:
    for case in op_cases(op):
        case.check("cuda")


def test_every_public_op_has_cases() -> None:
    assert set(MAKERS) == set(ops.__all__) - {"backend_info"}
    assert len(CASES) >= 500 * len(MAKERS)


@pytest.mark.parametrize("op", MAKERS)
def test_same_bits_twice_and_on_any_number_of_threads(op: str) -> None:
    case = OpCase(op, (700, 96, 4, 16), torch.float32, torch.int64, "dense", "full")
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            arguments = case.arguments()
            out = getattr(ops, op)(*arguments)
            out.sin().sum().backward()
            results.append([out, *(one.grad for one in arguments if one.requires_grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropped_slots_ignore_their_gate() -> None:
    y_RD, inverse_TK = torch.ones(1, 3), torch.tensor([[0, -1]])
    gates_TK = torch.tensor([[0.5, float("nan")]], requires_grad=True)
    out_TD = ops.combine(y_RD, inverse_TK, gates_TK)
    out_TD.sum().backward()
    assert out_TD.tolist() == [[0.5, 0.5, 0.5]]
    assert gates_TK.grad is not None and gates_TK.grad.tolist() == [[3.0, 0.0]]


def test_combine_undoes_permute() -> None:
    for shape in SHAPES:
        case = OpCase("permute", shape, torch.float64, torch.int64, "dense", "padded")
        x_TD, order_R, inverse_TK = case.arguments()
        gates_TK = torch.full(inverse_TK.shape, 1 / inverse_TK.shape[1], dtype=torch.float64)
        torch.testing.assert_close(ops.combine(ops.permute(x_TD, order_R, inverse_TK), inverse_TK, gates_TK), x_TD)
