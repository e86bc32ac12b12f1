"""The training loop, to be read in one sitting.

Each step: a batch, dequantised and transformed to model space; the loss; clipped gradients; an optimiser step at the
scheduled learning rate; the moving average. Everything random in step n is drawn from (seed, n). What a run has
learned is in `<run>/checkpoint.safetensors`, replaced atomically; how it went in `<run>/log.jsonl` and TensorBoard.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scoresde.dequantization import Dequantization
from scoresde.losses import LossTerms, Objective
from scoresde.protocols import Transform
from scoresde.score import ScoreModel
from scoresde.tensors import Noise, available
from scoresde.training import checkpoint
from scoresde.training.batches import batches, split_condition, step_seed
from scoresde.training.ema import EMA

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
Pending = dict[str, list[float]]  # losses and norms of the gradient since the last line of the log


class NonFiniteLoss(RuntimeError):
    """The loss turned NaN or infinite; the message has the step and the noise levels."""


class Interrupted(RuntimeError):
    """Ctrl-C or a termination signal stopped the run after a whole step; the checkpoint is written."""


class Trainer:
    """How a model is trained.

    Args:
        optimizer: a function of the parameters that makes the optimiser (a Hydra partial).
        steps: number of optimiser steps.
        batch_size: samples a step.
        warmup: steps over which the learning rate rises linearly from 0.
        decay: "none", or "cosine" to 0 at the last step.
        clip: largest norm of the gradient.
        ema: decay of the moving average, see `EMA`.
        seed: of everything random.
        log_every, checkpoint_every, preview_every: in steps; 0 for never.
        workers: processes that load data; what a dataset draws at random in them is not repeated on resuming.
        device: where to train.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer],
        steps: int,
        batch_size: int = 128,
        warmup: int = 0,
        decay: str = "none",
        clip: float = 1.0,
        ema: float = 0.999,
        seed: int = 0,
        log_every: int = 50,
        checkpoint_every: int = 500,
        preview_every: int = 0,
        workers: int = 0,
        device: str = "cpu",
    ):
        if not isinstance(steps, int) or steps < 1 or warmup < 0 or not clip > 0:
            raise ValueError(f"steps >= 1, warmup >= 0, clip > 0 expected; got {steps}, {warmup}, {clip}")
        if decay not in ("none", "cosine"):
            raise ValueError(f"decay 'none' or 'cosine' expected; got {decay!r}")
        self.optimizer, self.steps, self.batch_size, self.warmup, self.decay = (
            optimizer,
            steps,
            batch_size,
            warmup,
            decay,
        )
        self.clip, self.ema, self.seed = clip, ema, seed
        self.log_every, self.checkpoint_every, self.preview_every = log_every, checkpoint_every, preview_every
        self.workers, self.device = workers, available(device)

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a fraction of the optimiser's own."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rising * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay == "cosine" else 1.0)

    def fit(
        self,
        model: ScoreModel,
        loss: Objective,
        dataset: Dataset,
        run: Path,
        transform: Transform,
        dequantization: Dequantization | None = None,
        preview: Callable[[ScoreModel, int], None] | None = None,
        progress: bool = True,
    ) -> None:
        """Train the model from the run's last checkpoint, or from the start, to `steps`.

        Args:
            model: trained in place; it has the raw weights afterwards, the checkpoint has the averaged ones too.
            loss: gives the terms of a batch in model space.
            dataset: items are states `*` in data units, or (state, condition).
            run: the run's directory.
            transform: from data units to model space.
            dequantization: of integer levels, which gives the values to train on; None for continuous data.
            preview: called with the model, at its averaged weights and in eval mode, every `preview_every` steps.
            progress: show a progress bar.

        Raises:
            NonFiniteLoss: the loss was not finite; the last checkpoint stays as it was.
            Interrupted: SIGINT or SIGTERM; the checkpoint holds the last whole step.
        """
        model.to(self.device).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, ema = self.optimizer(parameters), EMA(model, self.ema)
        base_rates = [group["lr"] for group in optimizer.param_groups]
        first, pending = self._resume(model, optimizer, ema, run / CHECKPOINT)
        loader = batches(dataset, self.batch_size, self.seed, first, self.steps, self.workers)
        log = _Log(run, first, pending)
        bar = tqdm(total=self.steps, initial=first, desc="training", unit="step", disable=not progress)
        with _interruptions() as interrupted, log, bar:
            items = iter(loader)
            for step in range(first, self.steps):
                torch.manual_seed(step_seed(self.seed, step, "global"))  # a random dataset and dropout draw from it
                batch = next(items)
                for group, base in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = base * self.rate(step)
                terms, norm = self._step(model, loss, optimizer, parameters, batch, transform, dequantization, step)
                ema.update(step + 1)
                done = step + 1
                log.record(terms, norm, optimizer.param_groups[0]["lr"])
                bar.update()
                if self._due(done, self.log_every):
                    bar.set_postfix(log.flush(done))
                stop = interrupted()
                if stop or self._due(done, self.checkpoint_every):
                    self._save(model, optimizer, ema, run / CHECKPOINT, done, log.pending())
                if stop:
                    raise Interrupted(f"stopped after step {done} of {self.steps}; the same command goes on from there")
                if preview is not None and self.preview_every and done % self.preview_every == 0:
                    self._preview(preview, model, ema, done)
                log.start_clock()

    def _step(
        self, model, loss, optimizer, parameters, batch, transform, dequantization, step: int
    ) -> tuple[LossTerms, Tensor]:
        """One optimiser step; the loss terms and the norm of the gradient."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        x, cond = split_condition(batch, self.device)
        if dequantization is not None:
            x = dequantization.training_values(x, Noise(x.shape, generator, device=x.device))
        terms = loss(model, transform(x.float()), cond, generator=generator)
        if not bool(torch.isfinite(terms.value).all()):
            raise NonFiniteLoss(_diagnosis(model, terms, step))
        optimizer.zero_grad()
        terms.value.mean().backward()
        norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteLoss(f"the gradient is not finite at step {step}; nothing of it was applied")
        optimizer.step()
        return terms, norm

    def _due(self, done: int, every: int) -> bool:
        return done == self.steps or bool(every and done % every == 0)

    def _save(self, model: ScoreModel, optimizer: Optimizer, ema: EMA, path: Path, step: int, pending: Pending) -> None:
        moments, settings = checkpoint.pack_optimizer(optimizer)
        groups = {"model": model.state_dict(), "ema": ema.shadow, "optimizer": moments}
        checkpoint.save(path, groups, {"step": step, "optimizer": settings, "log": pending})

    def _resume(self, model: ScoreModel, optimizer: Optimizer, ema: EMA, path: Path) -> tuple[int, Pending]:
        """Restore the checkpoint if there is one; the step to go on with, and what the next line of the log has."""
        if not path.exists():
            return 0, {}
        groups, info = checkpoint.load(path)
        model.load_state_dict(groups["model"])
        ema.load(groups["ema"])
        checkpoint.unpack_optimizer(optimizer, groups.get("optimizer", {}), info["optimizer"])
        return int(info["step"]), info.get("log", {})

    @staticmethod
    def _preview(preview, model: ScoreModel, ema: EMA, step: int) -> None:
        model.eval()
        with ema.applied():
            preview(model, step)
        model.train()


def _diagnosis(model: ScoreModel, terms: LossTerms, step: int) -> str:
    """What is known about a loss that is not finite."""
    bad = ~torch.isfinite(terms.value.cpu())
    times = terms.t.cpu()[bad]
    levels = ", ".join(f"t={float(t):.4g} (sigma={float(model.sde.sigma(t)):.4g})" for t in times[:4])
    return (
        f"the loss is not finite at step {step}, for {int(bad.sum())} of {len(bad)} samples: {levels}"
        f"{', ...' if len(times) > 4 else ''}. The last checkpoint is intact; lower the learning rate or the clip"
    )


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


class _Log:
    """Means since the last line, to `log.jsonl` and TensorBoard."""

    def __init__(self, run: Path, first: int, pending: Pending):
        run.mkdir(parents=True, exist_ok=True)
        self._forget_after(run / LOG, first)
        self.file = open(run / LOG, "a")  # noqa: SIM115 - closed in __exit__
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)
        self._reset()
        self.losses += [torch.tensor(value) for value in pending.get("losses", [])]
        self.norms += [torch.tensor(value) for value in pending.get("norms", [])]

    def pending(self) -> Pending:
        """What the next line will be the mean of, as far as it is known."""
        return {"losses": [float(loss) for loss in self.losses], "norms": [float(norm) for norm in self.norms]}

    @staticmethod
    def _forget_after(path: Path, step: int) -> None:
        """Leave out the lines of steps that will be made again."""
        if path.exists():
            whole = path.read_text().splitlines(keepends=True)
            # A line without an end was cut short by a crash.
            kept = [line for line in whole if line.endswith("\n") and json.loads(line)["step"] <= step]
            checkpoint.replace_atomically(path, lambda file: file.write_text("".join(kept)))

    def _reset(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.samples, self.seconds = 0, 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """What came before (checkpoints, previews) is not training time."""
        self.since = time.perf_counter()

    def record(self, terms: LossTerms, norm: Tensor, rate: float) -> None:
        self.losses.append(terms.value.detach().mean())
        self.norms.append(norm.detach())
        self.samples += len(terms.value)
        self.seconds += time.perf_counter() - self.since
        self.rate = rate

    def flush(self, step: int) -> dict[str, str]:
        """Write the line of a step; what of it belongs beside a progress bar."""
        row = {
            "step": step,
            "loss": float(torch.stack(self.losses).mean()),
            "gradient_norm": float(torch.stack(self.norms).mean()),
            "learning_rate": self.rate,
            "images_per_second": self.samples / self.seconds,
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, step)
        self._reset()
        return {"loss": f"{row['loss']:.4g}", "images/s": f"{row['images_per_second']:.0f}"}

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
        self.board.close()
