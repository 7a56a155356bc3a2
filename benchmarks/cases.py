"""The shapes that `moemm bench moe` measures, and routing for them.

T tokens, E experts, K slots a token, M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moemm import ops

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape. dim: the model's width; width: an expert's; dense: the target of moe_ffn / dense."""

    tokens: int
    experts: int
    dtype: torch.dtype
    top_k: int = 2
    dim: int = 512
    width: int = 512
    modalities: int = 0  # of sizes that halve, each with experts of its own; 0: every token may use every expert
    favour: float = 0.0  # added to the logit of expert 0
    dense: float | None = None

    @property
    def name(self) -> str:
        """Tokens x experts, slots where they are not 2, type, and what is not usual about the routing."""
        tokens = f"{self.tokens // 1024}k" if self.tokens >= 1024 else str(self.tokens)
        notes = [f"{self.modalities} modalities"] * (self.modalities > 0) + ["skewed"] * (self.favour > 0)
        slots = [f"k {self.top_k}"] * (self.top_k != 2)
        return ", ".join([f"{tokens} × {self.experts}", *slots, SHORT[self.dtype], *notes])

    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gates_TK and experts_TK, drawn anew."""
        logits_TE = torch.randn(self.tokens, self.experts)
        logits_TE[:, 0] += self.favour
        number = max(1, self.modalities)
        share_M = 0.5 ** torch.arange(number)
        modality_T = torch.multinomial(share_M, self.tokens, replacement=True)
        owner_E = torch.arange(self.experts) * number // self.experts
        allowed_ME = owner_E == torch.arange(number)[:, None]
        routed = ops.route_topk(logits_TE, modality_T, allowed_ME, top_k=self.top_k)
        return routed.gates_TK, routed.experts_TK

    def smaller(self, tokens: int) -> Case:
        """The same with fewer tokens and narrow experts, for tests."""
        return replace(self, tokens=tokens, dim=32, width=16)


FP32, BF16 = torch.float32, torch.bfloat16
# Skewed: the favour puts nine in ten tokens on expert 0, which is near half of the slots where k is 2.
CASES = (
    Case(tokens=1024, experts=8, dtype=FP32),
    Case(tokens=1024, experts=64, dtype=BF16, width=256),
    Case(tokens=4096, experts=16, dtype=FP32, width=1024, dense=1.0),
    Case(tokens=4096, experts=16, dtype=BF16, width=1024, dense=1.05),
    Case(tokens=4096, experts=16, dtype=FP32, width=1024, favour=2.7),
    Case(tokens=4096, experts=64, dtype=BF16, top_k=4, width=256, dense=1.6),
    Case(tokens=4096, experts=28, dtype=FP32, modalities=7, dense=1.1),
    Case(tokens=4096, experts=28, dtype=BF16, modalities=7, dense=1.3),
    Case(tokens=16384, experts=16, dtype=BF16),
    Case(tokens=16384, experts=32, dtype=FP32, dim=256, width=256, favour=3.1),
    Case(tokens=65536, experts=8, dtype=FP32, dim=256, width=256),
    Case(tokens=65536, experts=64, dtype=BF16, dim=256, width=256),
    Case(tokens=65536, experts=64, dtype=BF16, dim=256, width=256, favour=3.4),
)
# Of these the extra memory is measured: fp32 and bf16, even and skewed, few tokens and many.
MEMORY = tuple(CASES[number] for number in (2, 4, 5, 7, 8, 11))
# Of this one the CPU time with busy cores: many small products, where threads meet most often.
SHARED = CASES[7]
