"""A few cases of each op against the oracle, for tools that make everything slow.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.few_cases
python -m benchmarks.gpu.few_cases --device cpu
"""

from __future__ import annotations

import argparse
import itertools

import torch

from moemm import ops
from moemm.testing.op_cases import MAKERS, OpCase

SHAPES = ((1, 1, 1, 1), (33, 17, 2, 8), (64, 64, 4, 4))
KINDS = tuple(itertools.product((torch.float32, torch.bfloat16), (("dense", "full"), ("apart", "dropped"))))


def cases() -> list[OpCase]:
    """Odd and even widths, int32 and int64, dropped slots, rows that lie apart; and a plan of several blocks."""
    made = [
        OpCase(op, shape, dtype, torch.int32 if layout == "apart" else torch.int64, layout, plan)
        for op in MAKERS
        for shape in SHAPES
        for dtype, (layout, plan) in KINDS
    ]
    return [*made, OpCase("plan", (3000, 8, 2, 70), torch.float32, torch.int64, "dense", "dropped")]


def main(arguments: list[str] | None = None) -> None:
    """Run them; an AssertionError says which one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not ops.backend_info()["cuda"]:
        raise SystemExit(f"moemm has no CUDA ops here: {ops.backend_info()['why_no_cuda']}")
    for case in cases():
        case.check(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases())} cases agree with the oracle on {device}")


if __name__ == "__main__":
    main()
