"""The training loop.

Each step loads a batch, dequantises it and transforms it to model space, computes the loss, clips the gradient, makes
an optimiser step at the scheduled learning rate, and updates the moving averages. All random draws of step n are
functions of (seed, n), see `training.batches`. The weights are in `<run>/checkpoint.safetensors`, replaced atomically,
and the log is in `<run>/log.jsonl` and TensorBoard. Processes started by torchrun share each batch, see
`training.distributed`.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from scoresde.arguments import Count, CountOrZero, Distinct, Infinite, Positive, Range, Seed, Share, checked
from scoresde.atomic_files import remove_leftovers
from scoresde.configured import call_text
from scoresde.dequantization import DataMap
from scoresde.losses import LossTerms, Objective
from scoresde.networks import force_normalisation
from scoresde.progress import progress_bar
from scoresde.protocols import select
from scoresde.score import ScoreModel
from scoresde.tensors import available, is_half
from scoresde.training import distributed, posthoc_ema
from scoresde.training.batch_terms import BatchTerms, seed_dropout
from scoresde.training.batches import batches, fitting, share, split_condition, step_seed
from scoresde.training.condition_dropout import Dropout
from scoresde.training.distributed import SharedObjective
from scoresde.training.ema import EMA
from scoresde.training.guard import SKIPPED, Guard, NonFiniteLoss, diagnosis, not_fatal
from scoresde.training.interruption import Interrupted, interruptions
from scoresde.training.json_lines import remove_lines_after
from scoresde.training.locks import locked
from scoresde.training.log import LOG, Log, is_evaluated
from scoresde.training.precision import Precision
from scoresde.training.schedule import DECAYS
from scoresde.training.state import CHECKPOINT, State

__all__ = ["CHECKPOINT", "LOG", "Interrupted", "NonFiniteLoss", "Trainer"]
Report = Callable[[ScoreModel, int], Any]
ADAM = partial(torch.optim.Adam, lr=1e-3)


@checked
@dataclass(repr=False)
class Trainer:
    """The settings of a training run, and the training loop (`fit`).

    `scoresde.fit` chooses the loss, the transform and the other parts that `Trainer.fit` needs.

    Args:
        optimizer: returns the optimiser of the parameters it is called with, such as
            `functools.partial(torch.optim.Adam, lr=1e-3)`, which is the default.
        steps: number of optimiser steps.
        batch_size: samples per step in all processes together; reduced, with a warning, if the dataset is smaller.
        accumulate: number of parts in which a process computes the gradient of its share of a batch, one after the
            other, to save memory; the gradient stays the same.
        warmup: steps in which the learning rate rises linearly.
        decay, decay_start: decay of the learning rate, "none", "linear", "cosine" or "inverse_sqrt", and the step from
            which "inverse_sqrt" decays; see `training.schedule`.
        loss_rate: learning rate of the parameters of the loss, such as a discriminator's, divided by that of the model.
        clip: largest norm of the gradient; a larger gradient is scaled down to it.
        ema, ema_warmup: decay and warm-up of the moving average, see `EMA`.
        power: relative widths of the power-function averages, from which averages of other widths are made after
            training, see `training.posthoc_ema`.
        snapshot_every: steps between the snapshots of the averages `power`.
        precision: "float32", "bf16" or "fp16", see `training.precision`.
        compile: compile the network with torch.compile.
        channels_last: use the channels_last memory layout for states and weights (B, C, H, W).
        skip_limit: number of steps in a row that may be skipped because their loss or gradient is not finite.
        seed: the seed of all random draws.
        log_every, checkpoint_every: steps between two log lines or checkpoints; 0 for one at the end only.
        preview_every, evaluate_every: steps between two previews or evaluations; 0 for none.
        workers: processes that load data.
        parallel: "ddp" or "fsdp", for processes started by torchrun; see `training.distributed`.
        condition_dropout: probability with which a sample loses its conditions, or one for each condition by name, see
            `training.condition_dropout`.
        wandb: options of wandb.init, to log to Weights & Biases too; None to log without it.
        device: where to train; the attribute `where` is the device of this process.

    Raises:
        ValueError: an argument is out of its range.
    """

    optimizer: Callable[[Any], Optimizer] = ADAM
    steps: Count = 1000
    batch_size: Count = 128
    accumulate: Count = 1
    warmup: CountOrZero = 0
    decay: str = "none"
    decay_start: Count = 1
    loss_rate: Positive = 1.0
    clip: Annotated[float, Infinite(0)] = 1.0
    ema: Share = 0.999
    ema_warmup: str = "tensorflow"
    power: Annotated[tuple[float, ...] | list[float], Distinct()] = ()
    snapshot_every: CountOrZero = 0
    precision: str = "float32"
    compile: bool = False
    channels_last: bool = False
    skip_limit: CountOrZero = 10
    seed: Seed = 0
    log_every: CountOrZero = 50
    checkpoint_every: CountOrZero = 500
    preview_every: CountOrZero = 0
    evaluate_every: CountOrZero = 0
    workers: Annotated[int, Range(0, 1024)] = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    condition_dropout: Dropout = 0.0
    wandb: dict[str, Any] | None = None
    device: str = "cpu"
    where: torch.device = field(init=False)

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip must be positive; got {self.clip}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}; got {self.decay!r}")
        if bool(self.power) != bool(self.snapshot_every):
            raise ValueError(
                f"power and snapshot_every must be set together; got power={list(self.power)}, "
                f"snapshot_every={self.snapshot_every}"
            )
        if self.parallel == "fsdp" and (self.power or self.channels_last):
            raise ValueError("parallel=fsdp supports neither power averages nor channels_last; use parallel=ddp")
        self.where = available(distributed.device(self.device))
        Precision(self.precision, self.where)

    def __repr__(self) -> str:
        return call_text(self)

    def rate(self, step: int) -> float:
        """Return the learning rate at a step in 0 .. steps - 1, divided by the optimiser's own rate."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warm * DECAYS[self.decay](step, self.steps, self.decay_start)

    def fit(
        self,
        model: ScoreModel,
        loss: Objective,
        dataset: Dataset,
        run: str | Path,
        data_map: DataMap,
        preview: Report | None = None,
        evaluate: Report | None = None,
        progress: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Train the model up to `steps`, from the run's checkpoint if there is one.

        Args:
            model: trained in place. It ends with the raw weights; the checkpoint has the averaged ones too.
            loss: returns the loss terms of a batch in model space. Parameters of its own, such as a discriminator's,
                are trained with those of the model and stored in the checkpoint; they have no average.
            dataset: items are states `*` in data units, or (state, condition).
            run: the run's directory.
            data_map: maps data to the states that the model is trained on.
            preview: called with the model (averaged weights, eval mode) and the step, every `preview_every` steps.
            evaluate: called in the same way every `evaluate_every` steps and at the end; returns numbers for the log.
            progress: show a progress bar.
            config: the configuration of the run, of values that JSON can represent; stored in the checkpoints.

        Warns:
            UserWarning: a preview or an evaluation failed, or an item of the dataset cannot be read, see
                `training.batches`.

        Raises:
            TypeError: the model is not a module.
            ValueError: another process trains in this directory, the checkpoint is already past `steps`, or a trained
                weight is in half precision.
            NonFiniteLoss: more than `skip_limit` steps in a row were skipped; the last checkpoint is unchanged.
            Interrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1 was received; the checkpoint holds the last complete step.
        """
        if (size := fitting(self.batch_size, dataset)) != self.batch_size:
            fitted = replace(self, batch_size=size)
            fitted.fit(model, loss, dataset, run, data_map, preview, evaluate, progress, config)
            return
        run, is_first = Path(run), distributed.rank() == 0
        objective = SharedObjective(
            BatchTerms(self._prepare(model, loss), loss, data_map, self.seed, self.condition_dropout),
            model,
            self.parallel,
        )
        state = self._state(model, loss, run, is_first, config or {})
        base_rates = [group["lr"] for group in state.optimizer.param_groups]
        with locked(run):
            log = self._resume(state, run, is_first)
            shown = progress and is_first
            bar = progress_bar(total=self.steps, initial=state.step, title="training", unit="step", shown=shown)
            with interruptions() as interrupted, closing(log), bar:
                if distributed.anyone(is_first and not is_evaluated(run / LOG, state.step)):
                    self._report(state, log, None, evaluate)  # the run stopped after the checkpoint, before evaluation
                for step, batch in enumerate(self._loader(dataset, state.step), start=state.step):
                    for group, base in zip(state.optimizer.param_groups, base_rates, strict=True):
                        group["lr"] = base * self.rate(step)
                    self._step(objective, state, batch, step, log)
                    state.step = step + 1
                    bar.update()
                    if self._is_due(state.step, self.log_every):
                        bar.set_postfix(log.flush(state.step, state.guard.total))
                    self._save(state, log, run, stop=distributed.anyone(interrupted()))
                    self._report(state, log, preview, evaluate)
                    log.start_clock()

    # --- before the loop

    def _prepare(self, model: ScoreModel, loss: Objective) -> ScoreModel:
        """Move the model and the loss to their device, and the model to its memory layout; compile the model."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model must be a torch.nn.Module, such as a scoresde.ModelWrapper; got {type(model).__name__}"
            )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and is_half(parameter):
                raise ValueError(
                    f"trained weights must be float32 or float64, as half precision loses small updates; got {name} in "
                    f"{parameter.dtype}: call model.float(), and set precision='bf16' or 'fp16' for the arithmetic"
                )
        if self.parallel == "fsdp" and next(loss.parameters(), None) is not None:
            raise ValueError("parallel=fsdp cannot shard the parameters of a loss: use parallel=ddp")
        loss.to(self.where)
        model.to(self.where).train()
        network: Any = getattr(model, "network", None)
        if (self.channels_last or self.compile) and not isinstance(network, nn.Module):
            raise ValueError(
                "channels_last and compile need a model whose attribute `network` is a torch.nn.Module; got "
                f"{type(model).__name__}"
            )
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.compile:
            network.compile()
        return model

    def _state(self, model: ScoreModel, loss: Objective, run: Path, is_first: bool, config: Mapping[str, Any]) -> State:
        """Return the training state at step 0."""
        own, others = ([p for p in part.parameters() if p.requires_grad] for part in (model, loss))
        if others and self.loss_rate != 1:
            optimizer = self.optimizer([{"params": own}, {"params": others}])
            optimizer.param_groups[1]["lr"] *= self.loss_rate
        else:
            optimizer = self.optimizer([*own, *others])
        ema = EMA(model, self.ema, warmup=self.ema_warmup)
        power = posthoc_ema.PowerAverages(model, tuple(self.power)) if self.power else None
        guard = Guard(self.skip_limit, run / SKIPPED if is_first else None, run / CHECKPOINT)
        precision = Precision(self.precision, self.where)
        return State(model, loss, optimizer, ema, power, precision, guard, run / CHECKPOINT, config)

    def _resume(self, state: State, run: Path, is_first: bool) -> Log:
        """Load the checkpoint if there is one, and return the log that continues from its step."""
        sums = state.resume()
        if state.step > self.steps:
            raise ValueError(
                f"steps must be at least {state.step}, the number of steps that {run} has done; got {self.steps}"
            )
        if is_first:
            remove_leftovers(run)
            remove_lines_after(run / SKIPPED, state.step - 1)  # its lines count steps from 0
            posthoc_ema.delete_snapshots_after(run / posthoc_ema.AVERAGES, state.step)
        return Log(run if is_first else None, state.step, sums, self.where, self.wandb)

    def _loader(self, dataset: Dataset, first: int) -> DataLoader:
        """Return a loader of this process's share of the batches, from step `first` on."""
        pin = self.where.type == "cuda"
        return batches(dataset, self.batch_size, self.seed, first, self.steps, self.workers, pin)

    # --- in the loop

    def _step(self, objective: SharedObjective, state: State, batch: Any, step: int, log: Log) -> None:
        """Make one optimiser step; skip it if the loss or the gradient is not finite."""
        seed_dropout(step_seed(self.seed, step, f"dropout {distributed.rank()}"), self.where)
        x, cond = split_condition(batch, self.where)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        positions = share(self.batch_size, distributed.rank(), distributed.size())
        weight = distributed.size() / self.batch_size  # gradients are averaged over processes
        optimizer, scaler = state.optimizer, state.precision.scaler
        optimizer.zero_grad()
        force_normalisation(state.model)
        parts: list[tuple[Tensor, ...]] = []
        count = min(self.accumulate, self.batch_size // distributed.size())  # the same number in all processes
        for i in range(count):
            part = share(len(x), i, count)
            rows = slice(part.start, part.stop)
            with objective.accumulating(last=i == count - 1):
                with state.precision.autocast():
                    terms = objective(x[rows], select(cond, rows, len(x)), positions[rows], self.batch_size, step)
                scaler.scale(weight * terms[0].sum()).backward()
            parts.append(tuple(column.detach() for column in terms))
        *columns, error = (torch.cat(column) for column in zip(*parts, strict=True))
        loss_terms = LossTerms(*columns, error=error)
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(distributed.whole(nn.utils.clip_grad_norm_(parameters, self.clip)))
        is_finite = norm < float("inf") and bool(torch.isfinite(loss_terms.value).all())
        if is_skipped := distributed.anyone(not is_finite):
            values, times = (torch.cat(distributed.gather(y.cpu())) for y in (loss_terms.value, loss_terms.t))
        else:
            scaler.step(optimizer)
        scaler.update()
        if is_skipped:
            state.guard.skip(step, diagnosis(state.model, values, times, step))
        state.ema.update(step + 1)  # also after a skipped step, with unchanged weights
        if state.power is not None:
            state.power.update(step + 1)
        log.rate = optimizer.param_groups[0]["lr"]
        if not is_skipped:
            state.guard.in_a_row = 0
            log.record(loss_terms, len(x) / self.batch_size, norm, state.model.sde, self.batch_size)

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.steps or bool(every and step % every == 0)

    def _save(self, state: State, log: Log, run: Path, stop: bool) -> None:
        """Write the snapshot and the checkpoint that are due; if `stop`, write the checkpoint and raise Interrupted."""
        if state.power is not None and distributed.rank() == 0 and self._is_due(state.step, self.snapshot_every):
            posthoc_ema.save_snapshot(run / posthoc_ema.AVERAGES, state.step, state.power)
        state.is_due |= self._is_due(state.step, self.checkpoint_every)
        was_skipped = state.guard.in_a_row > 0 and state.step < self.steps  # the run may have diverged: wait
        if stop or (state.is_due and not was_skipped):
            state.save(log.total())
            state.is_due = False
        if stop:
            raise Interrupted(f"stopped after step {state.step} of {self.steps}; run the same command to continue")

    def _report(self, state: State, log: Log, preview: Report | None, evaluate: Report | None) -> None:
        """Make the preview and the evaluation that are due. All processes take part: a sharded network needs them."""
        if not (self.preview_every and state.step % self.preview_every == 0):
            preview = None
        if not (self.evaluate_every and self._is_due(state.step, self.evaluate_every)):
            evaluate = None
        if preview is None and evaluate is None:
            return
        state.model.eval()
        with state.ema.applied():
            if preview is not None:
                with not_fatal("preview", state.step):
                    preview(state.model, state.step)
            if evaluate is not None:
                with not_fatal("evaluation", state.step):
                    log.write({"step": state.step, **evaluate(state.model, state.step)})
        state.model.train()
