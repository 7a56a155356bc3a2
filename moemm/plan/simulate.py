"""What a step takes on many ranks, drawn from the routing that a run recorded. N ranks, T tasks, M rows, L layers.

Each rank draws its samples from the mixture, so ranks differ in tokens; each token goes to the experts of its row as a
window of the record says, so ranks of an expert-parallel group differ in rows. In a group the fullest rank of each
layer is waited for, at the end of a step the slowest rank of all; ranks differ in speed by `jitter`. Work is in
operations at the plan's rate; the network is that of plan/network.py. Batches grow with ranks: each rank keeps its
micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moemm.plan import flops
from moemm.plan.devices import Cluster
from moemm.plan.layout import Layout, make_layout
from moemm.plan.network import collectives
from moemm.plan.parameters import ModelShape
from moemm.plan.placement import Units, units_of
from moemm.plan.trace import Trace
from moemm.plan.workload import mixture, workload

DRAWS = 16
"""Steps that are drawn for each number of ranks."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated. positions: layer -> rank of each unit in its group; None: dealt out in turn.

    micro_batch: samples of a rank. jitter: deviation of a rank's speed from step to step, as a share.
    """

    stage: int
    ep: int
    micro_batch: int
    jitter: float = 0.0
    seed: int = 0
    positions: Mapping[int, np.ndarray] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One number of ranks: seconds of a step, the mean of the draws, and where they go.

    even: were all ranks alike. tokens: more, because ranks have different samples. experts: more, because experts of a
    group have different loads. jitter: more, because ranks differ in speed. fullest: load of the fullest rank of a
    group over the mean, the mean over layers, groups and draws.
    """

    ranks: int
    ep: int
    even: float
    tokens: float
    experts: float
    jitter: float
    network: float
    fullest: float
    deviation: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.even + self.tokens + self.experts + self.jitter + self.network

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; efficiency: of a rank, against computing alone with even work."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "seconds": self.seconds, "efficiency": self.even / self.seconds}


class Simulation:
    """A model with the routing of a run."""

    def __init__(self, shape: ModelShape, trace: Trace, cluster: Cluster):
        self.shape, self.trace, self.device = shape, trace, cluster.device
        self.work = workload(shape)
        self._units = [
            units_of(shape, number, trace) if layer.dense is None else Units((), (), np.zeros((len(trace), 0)))
            for number, layer in enumerate(shape.layers)
        ]
        self._rate = self.device.flops(shape.config.train.precision) * self.device.efficiency
        self._tasks, self._mean_TM, self._variance_TM = _task_tokens(shape)
        self._row_WLUM = [self._row_shares(number) for number in range(len(shape.layers))]

    def point(self, ranks: int, setting: Setting) -> Point:
        """The mean of DRAWS steps on so many ranks."""
        ep = min(setting.ep, ranks)
        random = np.random.default_rng([setting.seed, ranks, ep])
        drawn = np.array([self._step(random, ranks, ep, setting) for _ in range(DRAWS)])
        even, tokens, experts, jitter, fullest, sent = drawn.mean(0).tolist()
        network = self._network(ranks, ep, setting) * max(sent, 1.0) if ranks > 1 else 0.0
        totals = drawn[:, :4].sum(1)
        return Point(
            ranks=ranks, ep=ep, even=even, tokens=tokens, experts=experts, jitter=jitter, network=network,
            fullest=fullest, deviation=float(totals.std()),
        )  # fmt: skip

    def _step(
        self, random: np.random.Generator, ranks: int, ep: int, setting: Setting
    ) -> tuple[float, float, float, float, float, float]:
        """Seconds (even; what tokens, experts and speed add), the fullest rank of a group, tokens of the fullest."""
        window = int(random.integers(len(self.trace)))
        tokens_NM = self._tokens(random, ranks, setting.micro_batch)
        dense, work_NL = self._dense(tokens_NM), []
        fullest = []
        for layer in range(len(self.shape.layers)):
            load_NU = self._loads(random, tokens_NM, layer, window)
            spread_N = _to_ranks(load_NU, self._positions(layer, ep, setting), ep)
            work_NL.append((load_NU.sum(1), spread_N))
            if spread_N.sum():
                groups_GR = spread_N.reshape(-1, ep)
                fullest.append(float((groups_GR.max(1) / np.maximum(groups_GR.mean(1), 1e-9)).mean()))
        own_N = dense + sum(own for own, _ in work_NL)
        even = float(own_N.mean())
        straggling = float(own_N.max())
        waited_N = dense + sum(np.repeat(s.reshape(-1, ep).max(1), ep) for _, s in work_NL)
        slowest = float(max(waited_N.max(), straggling)) if ep > 1 else straggling
        speed_N = 1.0 + np.abs(random.normal(0.0, setting.jitter, ranks)) if setting.jitter else np.ones(ranks)
        late = float((waited_N * speed_N).max()) if ep > 1 else float((own_N * speed_N).max())
        late = max(late, slowest)
        factor = 1.0 / self._rate
        return (
            even * factor, (straggling - even) * factor, (slowest - straggling) * factor, (late - slowest) * factor,
            float(np.mean(fullest)) if fullest else 1.0, float(tokens_NM.sum(1).max() / tokens_NM.sum(1).mean()),
        )  # fmt: skip

    def _tokens(self, random: np.random.Generator, ranks: int, samples: int) -> np.ndarray:
        """(N, M) tokens of each row in the micro-batches of all ranks."""
        count_NT = random.multinomial(samples, self._tasks, size=ranks)
        mean_NM, variance_NM = count_NT @ self._mean_TM, count_NT @ self._variance_TM
        return np.maximum(mean_NM + random.normal(size=mean_NM.shape) * np.sqrt(variance_NM), 0.0)

    def _dense(self, tokens_NM: np.ndarray) -> np.ndarray:
        """(N,) operations outside dispatched experts, forward and backward, in proportion to tokens."""
        parts = flops.forward(self.shape, self.work)
        dispatched = sum(float(units.load_WU.sum()) for units in self._units) / max(self.trace.tokens_WM.sum(), 1.0)
        whole = flops.training(self.shape, self.work) / max(self.work.total, 1e-9)
        share = max(whole - self._passes * 2.0 * dispatched, 0.05 * whole) if parts["experts"] else whole
        return tokens_NM.sum(1) * share

    @property
    def _passes(self) -> float:
        """Forward passes that a step is worth."""
        return 4.0 if self.shape.config.train.activation_checkpointing else 3.0

    def _row_shares(self, layer: int) -> np.ndarray:
        """(W, U, M) operations of a unit for each token of a row."""
        units, trace = self._units[layer], self.trace
        found = np.zeros((len(trace), len(units.ids), len(self.shape.rows)))
        for row in range(len(self.shape.rows)):
            load_WLME, tokens_WM = np.zeros_like(trace.load_WLME), np.zeros_like(trace.tokens_WM)
            load_WLME[:, :, row], tokens_WM[:, row] = trace.load_WLME[:, :, row], trace.tokens_WM[:, row]
            own = units_of(self.shape, layer, replace(trace, load_WLME=load_WLME, tokens_WM=tokens_WM))
            found[:, :, row] = own.load_WU / np.maximum(trace.tokens_WM[:, [row]], 1.0)
        return found

    def _loads(self, random: np.random.Generator, tokens_NM: np.ndarray, layer: int, window: int) -> np.ndarray:
        """(N, U) operations that the tokens of each rank bring to each unit, with the chance of so many draws."""
        each_UM = self._row_WLUM[layer][window]
        if not each_UM.size:
            return np.zeros((len(tokens_NM), 0))
        mean_NU = tokens_NM @ each_UM.T
        heavy_U = np.maximum(each_UM.max(1), 1e-9)  # at least the operations of one row
        noise_NU = random.normal(size=mean_NU.shape) * np.sqrt(mean_NU * heavy_U)
        return np.maximum(mean_NU + noise_NU, 0.0) * 2.0 * self._passes

    def _positions(self, layer: int, ep: int, setting: Setting) -> np.ndarray:
        count = len(self._units[layer].ids)
        if setting.positions is not None and layer in setting.positions and ep == setting.ep:
            return setting.positions[layer]
        return (np.arange(count) + layer) % ep

    def _network(self, ranks: int, ep: int, setting: Setting) -> float:
        layout = self.layout(ranks, ep, setting)
        return sum(one.seconds for one in collectives(self.shape, self.work, layout, self.device))

    def layout(self, ranks: int, ep: int, setting: Setting) -> Layout:
        """Of so many ranks."""
        return make_layout(self.shape, ranks=ranks, stage=setting.stage, ep=ep, micro_batch=setting.micro_batch)


def _to_ranks(load_NU: np.ndarray, rank_U: np.ndarray, ep: int) -> np.ndarray:
    """(N,) operations of each rank, when the units of a group's ranks are where rank_U says."""
    ranks = len(load_NU)
    load_GU = load_NU.reshape(ranks // ep, ep, -1).sum(1)
    result: np.ndarray = (load_GU @ np.eye(ep)[rank_U]).reshape(ranks) if load_NU.shape[1] else np.zeros(ranks)
    return result


def _task_tokens(shape: ModelShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) probabilities of drawing tasks; (T, M) mean and variance of the tokens of a sample, by row."""
    shares = mixture(shape)
    place = {row: number for number, row in enumerate(shape.rows)}
    mean_TM, variance_TM = np.zeros((2, len(shape.data.drawing), len(place)))
    for number, task in enumerate(shape.data.drawing):
        drop = shape.config.data.modality_dropout if len(task.modalities) > 1 else 0.0
        for name in task.modalities:
            column = place[name, task.name if shape.tasks else None]
            mean, deviation = task.tokens[name]
            present = task.present.get(name, 1.0) * (1 - drop)
            mean_TM[number, column] = present * mean
            variance_TM[number, column] = present * (deviation**2 + mean**2) - (present * mean) ** 2
    return np.array([shares[task.name] for task in shape.data.drawing]), mean_TM, np.maximum(variance_TM, 0.0)


def rank_counts(most: int) -> list[int]:
    """1, 2, 4 ... to `most`."""
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return counts if counts[-1] == most else [*counts, most]


def sweep(simulation: Simulation, most: int, setting: Setting) -> list[Point]:
    """A point for each number of ranks up to `most` that the group divides."""
    counts = [ranks for ranks in rank_counts(most) if ranks < setting.ep or ranks % setting.ep == 0]
    return [simulation.point(ranks, setting) for ranks in counts]
