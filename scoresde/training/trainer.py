"""The training loop, to be read in one sitting.

Each step: a batch, dequantised and transformed to model space; the loss; clipped gradients; an optimiser step at the
scheduled learning rate; the moving averages. Everything random in step n is drawn from (seed, n), see
`training.batches`. What a run has learned is in `<run>/checkpoint.safetensors`, replaced atomically; how it went in
`<run>/log.jsonl` and TensorBoard. Started by torchrun, the processes share each batch, see `training.distributed`.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from scoresde.dequantization import DataMap
from scoresde.losses import LossTerms, Objective
from scoresde.progress import progress_bar
from scoresde.protocols import Condition, select
from scoresde.score import ScoreModel
from scoresde.tensors import available
from scoresde.training import distributed, posthoc
from scoresde.training.batches import StepNoise, batches, share, split_condition, step_seed
from scoresde.training.distributed import Shared
from scoresde.training.ema import EMA
from scoresde.training.guard import SKIPPED, Guard, NonFiniteLoss, diagnosis
from scoresde.training.log import LOG, Lines, Log, TensorBoard, WeightsAndBiases, Writer, forget_after
from scoresde.training.precision import Precision
from scoresde.training.schedule import DECAYS, rate
from scoresde.training.state import CHECKPOINT, State

__all__ = ["CHECKPOINT", "LOG", "Interrupted", "NonFiniteLoss", "Trainer"]
AVERAGES = "averages"
Report = Callable[[ScoreModel, int], Any]


class Interrupted(RuntimeError):
    """Ctrl-C or a termination signal stopped the run after a whole step; the checkpoint is written."""


@dataclass
class Trainer:
    """How a model is trained.

    Args:
        optimizer: a function of the parameters that makes the optimiser (a Hydra partial).
        steps: number of optimiser steps.
        batch_size: samples a step, of all processes together.
        accumulate: parts that a process computes its share in, one after the other; the gradient is the same.
        warmup, decay, decay_start: of the learning rate, see `training.schedule.rate`.
        clip: largest norm of the gradient.
        ema, ema_warmup: decay of the moving average and its beginning, see `EMA`.
        power: sigma_rel of the averages kept for a profile that is chosen afterwards, see `training.posthoc`; none by
            default. snapshot_every: steps between the snapshots that it is made of.
        precision: "float32", "bf16" or "fp16", see `training.precision`.
        compile: the network, by torch.compile.
        channels_last: the layout of states and weights (B, C, H, W).
        skip_limit: steps in a row with a gradient that is not finite that are left out before the run stops.
        seed: of everything random.
        log_every, checkpoint_every, preview_every, evaluate_every: in steps; 0 for never but at the end.
        workers: processes that load data.
        parallel: "ddp" or "fsdp", what torchrun's processes do; see `training.distributed`.
        wandb: options of wandb.init, to log to Weights & Biases as well; None for not.
        device: where to train; `where` is this process's.

    Raises:
        ValueError: an argument out of its range.
    """

    optimizer: Callable[[Any], Optimizer]
    steps: int
    batch_size: int = 128
    accumulate: int = 1
    warmup: int = 0
    decay: str = "none"
    decay_start: int = 1
    clip: float = 1.0
    ema: float = 0.999
    ema_warmup: str = "tensorflow"
    power: tuple[float, ...] | list[float] = ()
    snapshot_every: int = 0
    precision: str = "float32"
    compile: bool = False
    channels_last: bool = False
    skip_limit: int = 10
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    preview_every: int = 0
    evaluate_every: int = 0
    workers: int = 0
    parallel: str = "ddp"
    wandb: dict[str, Any] | None = None
    device: str = "cpu"
    where: torch.device = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1 or self.warmup < 0 or not self.clip > 0:
            raise ValueError(
                f"steps >= 1, warmup >= 0, clip > 0 expected; got {self.steps}, {self.warmup}, {self.clip}"
            )
        if self.decay not in DECAYS:
            raise ValueError(f"decay among {', '.join(DECAYS)} expected; got {self.decay!r}")
        if self.accumulate < 1 or self.decay_start < 1 or self.skip_limit < 0:
            raise ValueError(
                "accumulate >= 1, decay_start >= 1, skip_limit >= 0 expected; got "
                f"{self.accumulate}, {self.decay_start}, {self.skip_limit}"
            )
        if bool(self.power) != bool(self.snapshot_every):
            raise ValueError(
                "power=[sigma_rel, ...] together with snapshot_every > 0 expected, or neither; got "
                f"{list(self.power)}, {self.snapshot_every}"
            )
        if self.parallel == "fsdp" and (self.power or self.channels_last):
            raise ValueError("parallel=fsdp takes neither power averages nor channels_last: parallel=ddp expected")
        self.where = available(distributed.device(self.device))
        Precision(self.precision, self.where)

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a fraction of the optimiser's own."""
        return rate(step, self.steps, self.warmup, self.decay, self.decay_start)

    def fit(
        self,
        model: ScoreModel,
        loss: Objective,
        dataset: Dataset,
        run: Path,
        data_map: DataMap,
        preview: Report | None = None,
        evaluate: Report | None = None,
        progress: bool = True,
    ) -> None:
        """Train the model from the run's last checkpoint, or from the start, to `steps`.

        Args:
            model: trained in place; it has the raw weights afterwards, the checkpoint has the averaged ones too.
            loss: gives the terms of a batch in model space.
            dataset: items are states `*` in data units, or (state, condition).
            run: the run's directory.
            data_map: from data to the states that the model is trained on.
            preview: called with the model, at its averaged weights and in eval mode, every `preview_every` steps.
            evaluate: the same every `evaluate_every` steps and at the end; returns numbers by their names, for the log.
            progress: show a progress bar.

        Raises:
            TypeError: a model that is not a module.
            NonFiniteLoss: the loss or its gradient was not finite too often; the last checkpoint stays as it was.
            Interrupted: SIGINT or SIGTERM; the checkpoint holds the last whole step.
        """
        first_process = distributed.rank() == 0
        terms = _Terms(self._prepared(model), loss, data_map, self.seed)
        objective = Shared(terms, model, self.parallel)
        state = self._state(model, run / CHECKPOINT, Guard(self.skip_limit, run / SKIPPED if first_process else None))
        base_rates = [group["lr"] for group in state.optimizer.param_groups]
        state.resume()
        if first_process:
            forget_after(run / SKIPPED, state.step - 1)  # of its lines, step n is the one after n steps
            posthoc.forget_after(run / posthoc.AVERAGES, state.step)
        writers = self._writers(run, state.step) if first_process else []
        log = Log(writers, state.pending if first_process else {}, distributed.total, self.where)
        shown = progress and first_process
        bar = progress_bar(total=self.steps, initial=state.step, title="training", unit="step", shown=shown)
        with _interruptions() as interrupted, log, bar:
            if distributed.anyone(first_process and not _is_evaluated(run / LOG, state.step)):
                self._report(state, log, None, evaluate)  # stopped between the checkpoint and this
            for step, batch in enumerate(self._loader(dataset, state.step), start=state.step):
                for group, base in zip(state.optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = base * self.rate(step)
                self._step(objective, state, batch, step, log)
                state.step = step + 1
                bar.update()
                if self._due(state.step, self.log_every):
                    bar.set_postfix(log.flush(state.step, state.guard.total))
                self._keep(state, log, run, stop=distributed.anyone(interrupted()))
                self._report(state, log, preview, evaluate)
                log.start_clock()

    # --- before the loop

    def _prepared(self, model: ScoreModel) -> ScoreModel:
        """The model where it is trained, in its layout, compiled if wanted."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a torch.nn.Module expected to be trained, such as a ScoreModel; got {type(model).__name__}: make "
                "it a subclass of scoresde.ModelWrapper"
            )
        model.to(self.where).train()
        network = getattr(model, "network", None)
        if isinstance(network, nn.Module):
            if self.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.compile:
                network.compile()
        elif self.channels_last or self.compile:
            raise ValueError(
                f"a model with a `network` expected by channels_last and compile; got {type(model).__name__}"
            )
        return model

    def _state(self, model: ScoreModel, path: Path, guard: Guard) -> State:
        """The state at step 0."""
        optimizer = self.optimizer([p for p in model.parameters() if p.requires_grad])
        ema = EMA(model, self.ema, warmup=self.ema_warmup)
        power = posthoc.PowerAverages(model, tuple(self.power)) if self.power else None
        return State(model, optimizer, ema, power, Precision(self.precision, self.where), guard, path)

    def _loader(self, dataset: Dataset, first: int) -> DataLoader:
        """The batches from a step on, this process's share of them."""
        processes, pin = {"rank": distributed.rank(), "size": distributed.size()}, self.where.type == "cuda"
        return batches(dataset, self.batch_size, self.seed, first, self.steps, self.workers, pin=pin, **processes)

    def _writers(self, run: Path, first: int) -> list[Writer]:
        """Where the log goes."""
        found: list[Writer] = [Lines(run / LOG, first), TensorBoard(run / "tensorboard", first)]
        return [*found, WeightsAndBiases(run, self.wandb)] if self.wandb is not None else found

    # --- in the loop

    def _step(self, objective: Shared, state: State, batch: Any, step: int, log: Log) -> None:
        """One optimiser step, left out if its gradient is not finite."""
        _seed_dropout(step_seed(self.seed, step, f"dropout {distributed.rank()}"), self.where)
        x, cond = split_condition(batch, self.where)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        positions = share(self.batch_size, distributed.rank(), distributed.size())
        weight = distributed.size() / self.batch_size  # gradients are averaged over processes
        state.optimizer.zero_grad()
        parts: list[LossTerms] = []
        count = min(self.accumulate, self.batch_size // distributed.size())  # the same in all: they wait for each other
        for i in range(count):
            part = share(len(x), i, count)
            rows = slice(part.start, part.stop)
            with objective.accumulating(last=i == count - 1):
                with state.precision.autocast():
                    found = objective(x[rows], select(cond, rows, len(x)), positions[rows], self.batch_size, step)
                state.precision.backward(weight * found[0].sum())
            parts.append(LossTerms(*(y.detach() for y in found)))
        terms = LossTerms(*(torch.cat(column) for column in zip(*(vars(p).values() for p in parts), strict=True)))
        state.precision.unscale(state.optimizer)
        norm = float(distributed.whole(nn.utils.clip_grad_norm_(_parameters(state.optimizer), self.clip)))
        finite = not distributed.anyone(not norm < float("inf") or not bool(torch.isfinite(terms.value).all()))
        state.precision.step(state.optimizer, finite)
        if not finite:
            values, times = (torch.cat(distributed.gather(y.cpu())) for y in (terms.value, terms.t))
            state.guard.skipped(step, diagnosis(state.model, values, times, step))
        state.ema.update(step + 1)  # of weights that stayed as they were, if the step was left out
        if state.power is not None:
            state.power.update(step + 1)
        log.rate = state.optimizer.param_groups[0]["lr"]
        if finite:
            state.guard.passed()
            log.record(terms, len(x) / self.batch_size, norm, state.model.sde, self.batch_size)

    def _due(self, done: int, every: int) -> bool:
        return done == self.steps or bool(every and done % every == 0)

    def _keep(self, state: State, log: Log, run: Path, stop: bool) -> None:
        """Write what is due, or all if the run is to stop."""
        if state.power is not None and distributed.rank() == 0 and self._due(state.step, self.snapshot_every):
            posthoc.save_snapshot(run / posthoc.AVERAGES, state.step, state.power)
        state.is_due |= self._due(state.step, self.checkpoint_every)
        left_out = state.guard.in_a_row > 0 and state.step < self.steps  # it may have diverged: wait and see
        if stop or (state.is_due and not left_out):
            state.save(log.pending())
            state.is_due = False
        if stop:
            raise Interrupted(f"stopped after step {state.step} of {self.steps}; the same command goes on from there")

    def _report(self, state: State, log: Log, preview: Report | None, evaluate: Report | None) -> None:
        """What is due of the averaged model. All processes are in it: a sharded network needs them all."""
        previewed = preview is not None and self.preview_every and state.step % self.preview_every == 0
        evaluated = evaluate is not None and self.evaluate_every and self._due(state.step, self.evaluate_every)
        if not (previewed or evaluated):
            return
        state.model.eval()
        with state.ema.applied():
            if preview is not None and previewed:
                preview(state.model, state.step)
            if evaluate is not None and evaluated:
                log.write({"step": state.step, **evaluate(state.model, state.step)})
        state.model.train()


class _Terms(nn.Module):
    """The loss terms of data, as a module: what several processes exchange gradients of."""

    def __init__(self, model: ScoreModel, loss: Objective, data_map: DataMap, seed: int):
        super().__init__()
        self.model, self.loss, self.data_map, self.seed = model, loss, data_map, seed

    def forward(
        self, x: Tensor, cond: Condition, positions: range, batch_size: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(value, t, weight) of the data x (n, *) at those positions of the step's batch."""
        stream = StepNoise(positions, self.seed, step)
        x0 = self.data_map.training_states(x.float(), stream)
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, "times"))
        t = self.loss.draw_times(self.model.sde, batch_size, generator)[positions.start : positions.stop]
        terms = self.loss(self.model, x0, cond, t=t, stream=stream)
        return terms.value, terms.t, terms.weight


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_evaluated(path: Path, step: int) -> bool:
    """Whether the log has the numbers of an evaluation after that step."""
    lines = map(json.loads, path.read_text().splitlines()) if step else ()
    return not step or any(line["step"] == step and "loss" not in line for line in lines)


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout draws from; torch.manual_seed asks for every kind of device, a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)  # torch.cuda's is that of the current device
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM are noted instead of acted upon; a second one acts as usual."""
    received = []
    previous: dict[int, Any] = {}

    def note(number, frame) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals go elsewhere
        pass
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
