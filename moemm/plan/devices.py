"""What machines offer: peak rates, memory, links, power. Figures of the makers, each with its source.

flops: dense (no sparsity) operations a second by precision; fp32 on tensor cores is TF32, which moemm does not turn on,
so fp32 is the rate of the ordinary cores. memory: bytes that a process can have. link: bytes a second that one device
sends inside a node, in one direction; network: to other nodes, where each GPU has a 400 Gb/s card (A100: 200 Gb/s), as
in the makers' reference systems. watts: of the board at its limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moemm.config.suggest import did_you_mean
from moemm.errors import ConfigError

GIB = 2**30
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process on a CPU. efficiency: share of `flops` that training reaches when not told.

    base: bytes that a process holds before it has a model: context, libraries, code. node: devices of a node. latency:
    seconds of one message. launch: seconds to start one kernel. `source`: whence the figures; efficiency, base, latency
    and launch of GPUs are assumed.
    """

    name: str
    fp32: float
    bf16: float
    memory: float
    link: float
    network: float
    watts: float
    node: int
    efficiency: float
    base: float
    latency: float
    launch: float
    source: str

    def flops(self, precision: str) -> float:
        """Peak operations a second."""
        return self.bf16 if precision == "bf16" else self.fp32


DEVICES = {
    "A100": Device(
        name="A100", fp32=19.5e12, bf16=312e12, memory=79.1 * GIB, link=300e9, network=25e9, watts=400, node=8,
        efficiency=0.30, base=1.5 * GIB, latency=20e-6, launch=5e-6,
        source="NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOP/s bf16, 600 GB/s NVLink both ways; DGX A100: 8 x HDR",
    ),
    "H100": Device(
        name="H100", fp32=67e12, bf16=989e12, memory=79.1 * GIB, link=450e9, network=50e9, watts=700, node=8,
        efficiency=0.30, base=1.5 * GIB, latency=20e-6, launch=5e-6,
        source="NVIDIA H100 SXM data sheet (2023): 989 TFLOP/s bf16, 900 GB/s NVLink both ways; DGX H100: 8 x NDR",
    ),
    "H200": Device(
        name="H200", fp32=67e12, bf16=989e12, memory=140.0 * GIB, link=450e9, network=50e9, watts=700, node=8,
        efficiency=0.30, base=1.5 * GIB, latency=20e-6, launch=5e-6,
        source="NVIDIA H200 SXM data sheet (2024): 141 GB, rates and links of the H100; DGX H200: 8 x NDR",
    ),
    "B200": Device(
        name="B200", fp32=75e12, bf16=2250e12, memory=178.0 * GIB, link=900e9, network=50e9, watts=1000, node=8,
        efficiency=0.30, base=1.5 * GIB, latency=20e-6, launch=5e-6,
        source="NVIDIA DGX B200 data sheet (2024): 18 PFLOP/s bf16 dense and 1,440 GB for 8, 1.8 TB/s NVLink both ways",
    ),
    "cpu": Device(
        name="cpu", fp32=1e11, bf16=2e11, memory=16.0 * GIB, link=1e9, network=1e9, watts=100, node=2,
        efficiency=0.30, base=0.318e9, latency=200e-6, launch=10e-6,
        source="one core of a server; base is measured (benchmarks/planner.py), the rest is a guess: give your own",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many devices of a kind."""

    count: int
    device: Device

    @property
    def text(self) -> str:
        """As it is given: 64xH100."""
        return f"{self.count}x{self.device.name}"


def parse_cluster(text: str) -> Cluster:
    """`64xH100`, or `H100` for one. Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z]\w*)", text.strip())
    if match is None or match[1] == "0":
        raise ConfigError(
            f"--gpus {text}: is not a number of GPUs and their kind\n  allowed: 64xH100, 8xA100, H100 (one), 2xcpu\n"
            f"  kinds: {', '.join(DEVICES)}"
        )
    names = {name.lower(): name for name in DEVICES}
    name = names.get(match[2].lower())
    if name is None:
        raise ConfigError(
            f"--gpus {text}: the GPU {match[2]} is not known{did_you_mean(match[2], DEVICES)}\n"
            f"  known: {', '.join(DEVICES)}\n"
            "  to do: take the nearest, and say what differs with --memory, --peak, --link, --network and --watts"
        )
    return Cluster(int(match[1] or 1), DEVICES[name])
