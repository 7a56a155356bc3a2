"""The training loop."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moemm.checkpoint import Found, Keep, Manifest, Save, random_state
from moemm.checkpoint.manifest import versions
from moemm.checkpoint.state import HostMemory
from moemm.checkpoint.store import load_weights
from moemm.config import config_hash, require_ranks, to_dict
from moemm.data.loader import drawn_sizes, learning_groups, train_loader
from moemm.data.quarantine import Bad
from moemm.data.sample import PackedBatch
from moemm.distributed import World, expert_groups, gather_objects, sum_over_ranks
from moemm.errors import CheckpointError, HealthError, MoemmError
from moemm.evaluate import EvaluationPlan, evaluate_model, scores_to_dict
from moemm.harmonize import Settler
from moemm.modalities import prepare_functions
from moemm.models import ModelOutput
from moemm.objectives import LabelFree
from moemm.observe.alarm import RoutingAlarm
from moemm.observe.records import Metrics, RunInfo
from moemm.points import point
from moemm.train.balance import RouterBalance
from moemm.train.callbacks import Callback
from moemm.train.engine import Engine
from moemm.train.faulty import Batches, FaultyStepError, Mender, Outcome
from moemm.train.guard import GradientGuard
from moemm.train.harmonizing import ConflictReport, draw_number, gamma, report
from moemm.train.health import find
from moemm.train.init import initialise
from moemm.train.lengths import measured_deal
from moemm.train.noisy import noisy_shares
from moemm.train.only import FrozenState, count_trained, freeze
from moemm.train.quarantine import Quarantine
from moemm.train.routing import balance_advice, few_are_wanted, routing_names
from moemm.train.schedule import learning_rate
from moemm.train.setup import Setup, seeded_model
from moemm.train.signals import StopRequest
from moemm.train.spikes import Spikes
from moemm.train.spread import spread_experts
from moemm.train.step import MicroLoss, Objective, Window
from moemm.train.trunk import TrunkGradients

Scores = Mapping[str, Mapping[str, Any]]


class Trainer:
    """One run on this rank: model, engine, data, and the loop over them.

    `step` is the number of optimizer steps done; the position in the data, the schedule and the checkpoints' names
    follow from it.
    """

    def __init__(
        self,
        setup: Setup,
        world: World,
        callbacks: list[Callback],
        stop: StopRequest,
        *,
        start: Found | None = None,
    ) -> None:
        """start: the checkpoint that is gone on from; its weights, if it has no more, are taken here."""
        self.setup, self.config, self.world = setup, setup.config, world
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.stopped_by = 0
        self._stop, self._started = stop, False
        self._untold: list[str] = []
        self._callbacks = [callback for callback in callbacks if world.is_main or callback.every_rank]
        seed_everything(self.config.train.seed, deterministic=self.config.train.deterministic)
        require_ranks(self.config, world_size=world.size)
        given = self.config.deepspeed
        groups = expert_groups(given.ep_size, timeout_s=given.timeout_s)
        model = seeded_model(setup, torch.device("cpu"))
        if start is None and self.config.train.init is not None:
            self.tell(initialise(model, self.config.train.init))
        elif start is not None and start.manifest.weights_only:
            load_weights(model, start.folder)
        freeze(model, self.config.train.only)
        self._prepare = prepare_functions(setup.specs)
        self._dealt = measured_deal(model, setup, self._prepare, world)  # ZeRO-3 takes the tokenizers' weights away
        self.tasks = tuple(task.name for task in setup.catalogue.tasks)
        self.num_parameters, self._num_trained = model.num_parameters(), count_trained(model)
        spread_experts(model, self.config, groups)
        self._expert_map = model.map if self.config.model.moe == "sparse" else None
        self._guard = GradientGuard(model, groups, world_size=world.size, watch_forward=given.zero_stage == 3)
        self.engine = Engine(model, self.config, world, groups=groups)
        self._balance = RouterBalance(model.trunk)
        allowed_LME = model.trunk.allowed()
        self._noise = model.pretext.noise if isinstance(model.pretext, LabelFree) else None
        self.pretext, self._fork, self._settler, self._scale = model.pretext, model.fork, model.settler, model.scale
        # Whether there is more to learn from than the losses that have a name.
        self._rest = allowed_LME is not None or model.missing is not None or self._scale is not None
        self._accumulation, self._asked = self.config.train.accumulation, 0
        self._objective = Objective(
            setup.catalogue, self.config, world, total_steps=setup.total_steps, allowed_LME=allowed_LME,
            scale=self._scale,
        )  # fmt: skip
        self._window = Window(setup.catalogue.tasks, self.config, world)
        self._pending: list[Callable[[], None]] = []
        self._micro_losses: list[torch.Tensor] = []
        spike = self.config.train.health.spike
        self._spikes = Spikes(spike) if spike else None
        self._bad: list[Bad] = []
        self._bad_anywhere = 0
        samples = sum(drawn_sizes(self.config, setup.catalogue))
        self._quarantine = Quarantine(setup.folder, world, samples=samples)
        self._mender = Mender(setup.catalogue, most=self.config.train.health.max_faulty, device=world.device)
        self._routing = routing_names(model.trunk)
        self._alarm = RoutingAlarm(
            self._routing,
            advice=balance_advice(self.config.model.router),
            collapse=not few_are_wanted(self.config.model.router),
        )
        self._frozen = FrozenState(model, None)  # nothing, until `run` begins: weights may still be read
        self._host = HostMemory()
        self._save: Save | None = None  # that is under way
        self._writing = 0  # whether a rank had something of it to do, when last asked
        self._seed_rank(0)  # weights are equal on all ranks

    def restore(self, folder: Path, step: int) -> None:
        """Go on from a verified checkpoint. Raises CheckpointError."""
        same_draws = self.engine.restore(folder)
        self.step = step
        if not same_draws:  # draws of another number of ranks are other draws; those of the start would come again
            self._seed_rank(step)
            why = "is of another number of ranks, or of a model that has grown"
            self.tell(f"the checkpoint {why}: dropout goes on with other random numbers")

    def _seed_rank(self, step: int) -> None:
        """Let this rank draw its own dropout from here on."""
        seed = self.config.train.seed + 7919 * (self.world.rank + 1) + 104_729 * step
        seed_everything(seed, deterministic=self.config.train.deterministic)

    def save(self, *, background: bool = False) -> bool:
        """Begin the checkpoint of this step, or make it if not in the `background`; all ranks together.

        One that is under way is waited for. True if it is complete. Raises CheckpointError on all ranks.
        """
        for callback in self._callbacks:
            callback.on_phase("save", self.step)
        self.continue_save(wait=True)
        state = self.engine.state()
        state = self._host.copy(state) if background else state
        self._save = Save(
            self.setup.checkpoints,
            step=self.step,
            write=state.write,
            describe=self._manifest(),
            world=self.world,
            keep=Keep(self.config.train.checkpoint.keep, self.config.train.checkpoint.keep_every),
            background=background,
        )
        self._writing = 1
        return self.continue_save(wait=not background)

    def continue_save(self, *, wait: bool) -> bool:
        """Go on with the checkpoint that is under way where all ranks can, or `wait` for it; all ranks together.

        True if it is complete now. Raises CheckpointError on all ranks; that save is over then.
        """
        if self._save is None:
            return False
        save, self._save = self._save, None
        if wait:
            save.finish()
        elif self._writing or not save.advance():
            self._save = save
        self._writing = int(self._save is not None)
        return not self._writing

    def _manifest(self) -> Callable[[dict[str, dict[str, Any]]], Manifest]:
        """The manifest of this step for the files that it will have."""
        described = Manifest(
            step=self.step,
            world_size=self.world.size,
            zero_stage=self.config.deepspeed.zero_stage,
            config=to_dict(self.config),
            config_hash=config_hash(self.config),
            versions=versions(),
            sampler={"step": self.step},
            expert_map=None if self._expert_map is None else self._expert_map.to_dict(),
            files={},
        )
        return lambda files: replace(described, files=files)

    def run(self) -> bool:
        """Train to the last step. False if a signal ended it before; then `stopped_by` names the signal.

        Raises HealthError (all ranks), CheckpointError (saves that failed), DataError.
        """
        self._start_callbacks()
        total = self.setup.total_steps
        with random_state.preserved():
            loader = train_loader(
                self.setup.catalogue,
                self.config,
                rank=self.world.rank,
                world_size=self.world.size,
                start_step=self.step,
                total_steps=self.setup.total_steps,
                prepare=self._prepare,
                dealt=self._dealt,
            )
            batches = iter(loader)
        self._bad = getattr(loader, "bad", self._bad)
        self.engine.model.train()
        self._frozen = FrozenState(self.engine.model, self.config.train.only)
        try:
            self._began = self._reported = time.perf_counter()
            self._reported_step = self.step
            while self.step < total and not self.stopped_by:
                self._one_step(batches)
                self._after_step(total)
        except MoemmError as error:
            self._save_before(error)
            raise
        finally:
            loader.close()
        return self.step >= total

    def _save_before(self, error: MoemmError) -> None:
        """Wait for a checkpoint that is under way, where all ranks are about to end with the same error."""
        if self.world.size == 1 or isinstance(error, HealthError | CheckpointError):
            try:
                self.continue_save(wait=True)
            except CheckpointError as problem:
                self.tell(f"warning: {problem}")

    def _start_callbacks(self) -> None:
        catalogue, (total, active) = self.setup.catalogue, self.num_parameters
        groups = learning_groups(self.config, catalogue)
        info = RunInfo(
            name=self.config.name,
            folder=str(self.setup.folder),
            tasks=self.tasks,
            modalities=tuple(modality.name for modality in catalogue.modalities),
            start_step=self.step,
            total_steps=self.setup.total_steps,
            facts={
                "run": f"{self.config.name} -> {self.setup.folder}",
                "data": f"{len(self.tasks)} tasks, {len(catalogue.modalities)} modalities, "
                f"{sum(catalogue.tasks[first].sizes['train'] for first, *_ in groups):,} training samples",
                "model": f"{total:,} parameters, {active:,} active a token{self._trained()}",
                "engine": f"{self.world.size} rank(s) on {self.world.device.type}, ZeRO {self.engine.zero_stage}, "
                f"{self.config.train.precision}{self._spread()}",
            },
            routing=self._routing,
        )
        for callback in self._callbacks:
            callback.on_start(info)
        self._started = True
        self._tell_all()

    def _spread(self) -> str:
        size = self.config.deepspeed.ep_size
        return "" if size == 1 else f", experts over {size} ranks"

    def _trained(self) -> str:
        if self.config.train.only is None:
            return ""
        return f"; {self._num_trained:,} trained, as train.only says"

    def _one_step(self, batches: Any) -> None:
        self._objective.begin(self.step)
        if self.pretext is not None:
            self.pretext.step = self.step
        if self._noise is not None:
            self._noise.progress = self.step / self.setup.total_steps
        outcome = self._mender.step(self.step + 1, lambda: self._next(batches), self._attempt, self._undo)
        for count in self._pending:
            count()
        self._pending.clear()
        self._micro_losses.clear()
        self._balance.step()
        self.stopped_by = self._asked
        if self._scale is not None:
            self._scale.step()
        self.step += 1
        if self._noise is not None:
            self._noise.advance(self.step, self.setup.total_steps)
        self._frozen.restore()
        if outcome is not None:
            self._tell_outcome(outcome)
        if self._bad_anywhere:
            self._put_aside()

    def _next(self, batches: Any) -> PackedBatch:
        point("data", step=self.step + 1)
        batch: PackedBatch = next(batches)
        return batch

    def _put_aside(self) -> None:
        bad = list(self._bad)
        self._bad.clear()
        text = self._quarantine.add(bad, step=self.step)
        if text:
            self.tell(text)

    def _attempt(self, batches: Batches) -> None:
        """Everything up to the optimizer's step; raises FaultyStepError on all ranks where it must not be applied."""
        lr, last = self._learning_rate(), self._accumulation - 1
        if self._settler is not None:
            self._settle(self._settler, [batches[micro].to(self.world.device) for micro in range(last + 1)])
            self._refuse_spike()
            point("step")
            self.engine.step(lr=lr)
        else:
            for micro in range(last + 1):
                batch = batches[micro].to(self.world.device)
                if self._fork is not None:
                    self._fork.begin(draw_number(self.config.train.seed, self.step, micro), self._gamma())
                output, loss = self._forward(batch, again=False)
                self._agree(loss.backward, loss, output, batch)
                self.engine.accumulate(loss.backward, last=micro == last)
                if micro == last:
                    self._refuse_spike()
                point("step")
                self.engine.step(lr=lr)
        self._norm = self.engine.grad_norm
        if self._norm is not None and not math.isfinite(self._norm):
            self._refuse_gradient(self._norm)

    def _undo(self) -> None:
        """Forget a failed attempt at a step."""
        self._pending.clear()
        self._micro_losses.clear()
        self.engine.discard()
        if self._scale is not None:
            self._scale.forget()

    def _refuse_gradient(self, norm: float) -> None:
        raise FaultyStepError("gradient", f"The gradient of step {self.step + 1} has the norm {norm}")

    def _refuse_spike(self) -> None:
        if self._spikes is None:
            return
        spikes, total = self._spikes, torch.stack(self._micro_losses).double().sum().reshape(1)
        loss = float(sum_over_ranks(total)) / (len(self._micro_losses) * self.world.size)
        excess = spikes.excess(loss)
        if excess is not None:
            text = f"The loss of step {self.step + 1} is {loss:.4g}, {excess:.1f} deviations above the median"
            raise FaultyStepError("spike", f"{text} (train.health.spike)")
        self._pending.append(lambda: spikes.add(loss))

    def _tell_outcome(self, outcome: Outcome) -> None:
        self.tell(outcome.message)
        for callback in self._callbacks:
            callback.on_event(outcome.to_dict())

    def _forward(self, batch: PackedBatch, *, again: bool) -> tuple[ModelOutput, MicroLoss]:
        """A pass over a micro-batch, which counts unless it passes `again` in the same step."""
        point("forward")
        output = self.engine(batch)
        loss = self._objective(output, batch)
        if not again:
            self._count_later(loss, output)
        return output, loss

    def _count_later(self, loss: MicroLoss, output: ModelOutput) -> None:
        """Count a micro-batch once its step is done: a failed attempt must leave nothing behind."""
        noise, seen = self._noise, None if self._noise is None else self._noise.take()

        def count() -> None:
            self._window.add(loss, output)
            if noise is not None:
                noise.keep(seen)
            self._balance.add(output.router)

        self._pending.append(count)
        self._micro_losses.append(loss.backward.detach())

    def _agree(self, chosen: torch.Tensor, loss: MicroLoss, output: ModelOutput, batch: PackedBatch) -> None:
        """The ranks agree that they are about to pass backward from the same `chosen`, and that all is finite."""
        broken = loss.broken(self.tasks)
        point("backward")
        writing = self._save is not None and self._save.busy
        flags = [int(bool(broken)), self._stop.number, len(self._bad), int(writing)]
        alarm, self._asked, self._bad_anywhere, self._writing = self._guard.before_backward(chosen, flags=flags)
        if alarm:
            findings = gather_objects(find(broken, self.setup.catalogue.tasks, output, batch))
            raise FaultyStepError("loss", f"The loss of step {self.step + 1} is not finite", findings)

    def _parts(self, batch: PackedBatch, again: bool) -> Callable[[int], torch.Tensor]:
        """See trunk.Forward."""
        output, loss = self._forward(batch, again=again)
        chosen_LL = torch.eye(len(loss.parts_L), device=loss.parts_L.device)

        def part(number: int) -> torch.Tensor:
            # Times 0, not left out: so every part's backward pass reaches every parameter, in the same order.
            chosen = (loss.parts_L * chosen_LL[number]).sum()
            self._agree(chosen, loss, output, batch)
            return chosen

        return part

    def _settle(self, settler: Settler, batches: Sequence[PackedBatch]) -> None:
        """Give the engine the gradient of a step whose conflicts are settled at the trunk."""
        settler.begin(draw_number(self.config.train.seed, self.step, 0), self._gamma())
        num_losses = len(settler.losses)
        gradients = TrunkGradients.of_step(self.engine, batches, self._parts, num_losses=num_losses, rest=self._rest)
        settled, finite = gradients.settled(settler)
        if not finite:
            self._refuse_gradient(math.nan)
        self.engine.put_gradient(settled)

    def _gamma(self) -> float:
        return gamma(self.step, total=self.setup.total_steps, config=self.config.harmonize)

    def _learning_rate(self) -> float:
        train = self.config.train
        return learning_rate(
            self.step, total=self.setup.total_steps, peak=train.lr, warmup=train.warmup, floor=train.min_lr
        )

    def _after_step(self, total: int) -> None:
        last = self.step >= total
        due = self.step % self.config.train.log_every == 0 or last or bool(self.stopped_by)
        if due and self._window.filled:  # no step of it may have been applied
            self._report(total)
        every = self.config.train.eval_every
        if every and self.step % every == 0 and not last:
            self.evaluate("val")
        for callback in self._callbacks:
            callback.on_step(self, stopping=last or bool(self.stopped_by))

    def _report(self, total: int) -> None:
        point("log")
        means = self._window.take()
        settler = self._settler or self._fork
        conflict = None if settler is None else report(settler, self.world.size)
        now = time.perf_counter()
        window_s, self._reported = now - self._reported, now
        self.tokens, self.seconds = self.tokens + means.tokens, self.seconds + window_s
        steps, self._reported_step = self.step - self._reported_step, self.step
        metrics = Metrics(
            step=self.step,
            total_steps=total,
            loss=means.loss,
            router_loss=means.router_loss,
            missing_loss=means.missing_loss,
            objectives=means.objectives,
            losses=means.losses,
            accuracy=means.accuracy,
            lr=self._learning_rate(),
            grad_norm=self._norm,
            tokens_per_second=means.tokens / window_s,
            seconds=now - self._began,
            seconds_left=(total - self.step) * window_s / steps,
            routing=means.routing,
            conflict={} if conflict is None else conflict.pairs,
            dropped=None if conflict is None else conflict.dropped,
            noisy_pairs=noisy_shares(self.pretext),
            loss_weights={} if self._scale is None else self._scale.take(),
        )
        if conflict is not None:
            self._tell_refused(conflict)
        for callback in self._callbacks:
            callback.on_metrics(metrics)
        for text in self._alarm.check(means.routing):
            self.tell(f"step {self.step}  {text}")

    def _tell_refused(self, conflict: ConflictReport) -> None:
        method = self.config.harmonize.method
        if conflict.refused:
            self.tell(
                f"step {self.step}  harmonize.method {method} gave weights that are not finite "
                f"{conflict.refused} times; the plain sum stood in"
            )
        if conflict.broken:
            self.tell(
                f"step {self.step}  a gradient at the fork was not finite {conflict.broken} times; it was left out"
            )

    def evaluate(self, split: str) -> Scores:
        """Scores of the model as it is on a split; all ranks together. The training's random sequence goes on as if it
        had not been.
        """  # fmt: skip
        began = time.perf_counter()
        point("evaluate")
        for callback in self._callbacks:
            callback.on_phase("evaluate", self.step)
        plan = EvaluationPlan(
            split=split,
            prepare=self._prepare,
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
            gather=gather_objects,
        )
        with random_state.preserved():
            scores = scores_to_dict(evaluate_model(self.engine.deepspeed, self.setup.catalogue, plan))
        for callback in self._callbacks:
            callback.on_scores(self.step, split, scores)
        self._reported = getattr(self, "_reported", began) + time.perf_counter() - began
        return scores

    def tell(self, text: str) -> None:
        """Give a message to whoever shows messages (rank 0); before the start it waits for them."""
        self._untold.append(text)
        if self._started:
            self._tell_all()

    def _tell_all(self) -> None:
        for text in self._untold:
            for callback in self._callbacks:
                callback.on_message(text)
        self._untold.clear()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Give the summary of the finished run to the callbacks."""
        for callback in self._callbacks:
            callback.on_finish(summary)

    def close(self) -> None:
        """End the callbacks and let go of the engine."""
        for callback in self._callbacks:
            callback.on_close()
        if sys.exc_info()[0] is None:
            self.engine.close()


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed torch, numpy and random; with `deterministic` refuse operations whose result depends on timing."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # As use_deterministic_algorithms, which also imports torch's compiler in order to tell it.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Finds bugs, but writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
