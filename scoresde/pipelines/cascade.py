r"""Cascades: a model of small images, and models that double their resolution again and again (2106.15282).

x_0 has the law of the base model. Stage k makes x_k from x_(k-1), the mean of x_k over blocks of pixels. T_k is its map
to model space, in which images are split into their mean and a fine part (`data.resolutions`):

    m = T_k(x_(k-1)),    z = sqrt(1 - s^2) m + s n,    fine part ~ p_k( . | z, s),    x_k = T_k^-1(join(m, fine part)).

s is the level of the noise-conditioning augmentation; each stage was trained at all levels up to a largest one, see
`losses.SuperResolution`. The likelihood of an image x_K is a sum over the stages, each given the one below:

    log p(x_K) = log p_0(x_0) + sum_k log p_k(x_k | x_(k-1)),
    log p_k(x_k | x_(k-1)) = log p_k(fine part | z, s) + log|det T_k|(x_k) + [log|det S| - log|det T_k|(x_(k-1))].

With `Haar`, the split S is a change of variables: the bracket is its log-determinant, and the sum is exact.

With `AveragePooling`, the fine part is x_k itself, the bracket is left out, and the sum is the log-probability of all
resolutions (x_0, ..., x_K). For grey levels, x_(k-1) is the mean rounded to a grey level, a function of x_k, so that

    P(x_K) >= P(x_0, ..., x_K):

the sum bounds the bits of x_K from above, and equals them if the stages give no probability to another mean. Continuous
images have no such bound: there the sum is a density of all resolutions, not of x_K.

With s > 0, p_k is a mean over n. The logarithm of each draw is averaged in place of p_k, which gives a lower bound
(Jensen).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.bits import describe_failures
from scoresde.configured import Configured
from scoresde.dequantization import DataMap, Incomplete, count_levels, warn_if_above_uniform
from scoresde.divergence import Trace
from scoresde.likelihood import LogProb, conventions, log_prob, trace_for
from scoresde.pipelines.cascade_stage import (
    CascadeBits,
    CascadeLogProb,
    CascadeSamples,
    CascadeStage,
    check_conditions,
    check_stages,
)
from scoresde.prior_mismatch import prior_mismatches
from scoresde.probability_flow import DEFAULT_SOLVER
from scoresde.protocols import Condition, as_condition, by_name, select
from scoresde.random_stream import RandomStream
from scoresde.samplers import DPMSolverPP, PredictorCorrector, Sampler
from scoresde.score import device_of
from scoresde.solvers import Solver
from scoresde.tensors import (
    check_instance,
    check_integer,
    check_number,
    check_real,
    dimensions,
    double,
    mean_and_error,
    send,
)
from scoresde.wrappers import as_model, with_density


class Cascade(Configured):
    """A base model, and super-resolution models given the image below (2106.15282); log p is the sum over all stages.

    Args:
        stages: from the smallest images to the largest: `CascadeStage`, or objects with an attribute `stage`, such as
            the runs that `ss.load` returns.

    Raises:
        TypeError: a stage is of another kind.
        ValueError: there are no stages; the first stage is a super-resolution model, or a later one is not; a stage
            needs means of another shape than the images of the stage below; a stage of `AveragePooling` is below one of
            `Haar`, whose means are not grey levels, or above one without dequantisation.
    """

    def __init__(self, stages: Sequence[Any]):
        if not isinstance(stages, Sequence):
            raise TypeError(
                f"stages must be a list of runs or of CascadeStage; got {type(stages).__name__}: pass a list"
            )
        self.stages = [getattr(stage, "stage", stage) for stage in stages]
        check_stages(self.stages)
        self.is_exact = all(stage.resolutions.is_exact for stage in self.stages[1:])

    # --- samples

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Any = None,
        seeds: Sequence[int] | None = None,
        samplers: Sampler | Sequence[Sampler] | None = None,
        augmentation: float | Sequence[float] = 0.0,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> CascadeSamples:
        """Draw n samples. Sample i depends on its seed alone; its first stage is the first model's sample of this seed.

        Args:
            n: number of samples.
            cond: the condition, with leading dimension n or one for all; a stage gets those that its network accepts.
            seeds: one integer for each sample; default: drawn from `generator`.
            samplers: one for all stages, or one for each; default: 20 steps of DPM-Solver++(2M).
            augmentation: the level s of the noise in the low resolution: one number, or one for each stage after the
                first.
            generator: generator of the seeds; default: PyTorch's global one.
            batch_size: number of samples in a batch.
            progress: show the progress of each sampler.

        Raises:
            ValueError: wrong numbers of seeds, samplers or levels, a level that a stage was not trained with, or a
                condition that no stage takes; see also `samplers.Sampler`.
        """
        check_integer("n", n, 1)
        check_integer("batch_size", batch_size, 1)
        seeds = RandomStream(generator).seeds(n) if seeds is None else seeds
        chosen, levels = self._samplers(samplers), self._levels(augmentation)
        RandomStream(seeds=seeds, count=n)
        cond, parts = as_condition(cond), []
        check_conditions(self.stages, cond)
        for first in range(0, n, batch_size):
            rows = slice(first, first + batch_size)
            parts.append(self._draw(select(cond, rows, n), seeds[rows], chosen, levels, progress))
        images = tuple(torch.cat(x) for x in zip(*(part.stages for part in parts), strict=True))
        return CascadeSamples(images[-1], images, max(p.nfe for p in parts), max(p.backward for p in parts))

    def _draw(
        self,
        cond: Condition,
        seeds: Sequence[int],
        samplers: Sequence[Sampler],
        levels: Sequence[float],
        progress: bool,
    ) -> CascadeSamples:
        """Draw a batch; the arguments are those of `sample`, one sampler and one level for each stage."""
        images: list[Tensor] = []
        nfe, backward, stream = 0, 0, RandomStream(seeds=seeds)
        for stage, sampler, level in zip(self.stages, samplers, levels, strict=True):
            parts, mean = by_name(cond), None
            if stage.resolutions is not None:
                mean, own = self._mean_of(stage, images[-1]), RandomStream(seeds=stream.seeds(len(seeds)))
                parts = {**parts, "image": stage.image(mean, level, own)}
                seeds = own.seeds(len(seeds))  # a seed's first draw made the first stage: later stages have their own
            result = sampler(stage.given(parts), shape=(len(seeds), *stage.state_shape), seeds=seeds, progress=progress)
            nfe, backward = nfe + result.nfe, backward + result.backward
            state = result.x if mean is None else stage.resolutions.join(mean.to(result.x), result.x)
            images.append(stage.transform.inverse(state))
        return CascadeSamples(images[-1], tuple(images), nfe, backward)

    def _mean_of(self, stage: CascadeStage, image: Tensor) -> Tensor:
        """Return the mean in model space that a stage is given for a sample (in data units) of the stage below.

        Without `Haar`, a sample of grey levels is rounded to a level first, and the mean is the centre of the level.
        """
        if stage.dequantization is not None and not (stage.resolutions and stage.resolutions.is_exact):
            most = getattr(stage.transform, "levels", None)
            image = image.floor().clamp(0, None if most is None else most - 1) + 0.5
        return stage.transform(image)

    # --- likelihoods

    def log_prob(
        self,
        x: Tensor,
        cond: Any = None,
        trace: Trace | None = None,
        solver: Solver | None = None,
        seeds: Sequence[int] | None = None,
        augmentation: float | Sequence[float] = 0.0,
        batch_size: int = 256,
    ) -> CascadeLogProb:
        """Return log p of images in nats, the sum over the stages; see the module docstring.

        Args:
            x: images (N, *) of the last stage in data units: grey levels if that stage has a dequantisation.
            cond: the condition, with leading dimension N or one for all; a stage gets those that its network accepts.
            trace, solver: see `log_prob`.
            seeds: one integer for each image; default 0, 1, 2, ...
            augmentation: the level s of each stage after the first; with s > 0 the result is a lower bound, with noise.
            batch_size: number of images in a batch.

        Raises:
            ValueError: images of another shape, a level that a stage was not trained with, a dequantisation that sets
                the start time, or arguments that `log_prob` refuses.
        """
        check_integer("batch_size", batch_size, 1)
        check_real("images", x)
        seeds, levels = range(len(x)) if seeds is None else seeds, self._levels(augmentation)
        RandomStream(seeds=seeds, count=len(x))
        if tuple(x.shape[1:]) != tuple(self.stages[-1].shape) or not len(x):
            raise ValueError(f"images must have the shape (N, {self.stages[-1].shape}); got {tuple(x.shape)}")
        trace, solver, cond = trace_for(solver, trace), solver or DEFAULT_SOLVER, as_condition(cond)
        check_conditions(self.stages, cond)
        columns, noisy, mismatch = [], False, 0.0
        for first in range(0, len(x), batch_size):
            rows = slice(first, first + batch_size)
            part = send(x[rows], device_of(as_model(self.stages[-1].model)) or x.device)
            solved, nats, apart = self._solve(part, select(cond, rows, len(x)), trace, solver, seeds[rows], levels)
            value = torch.stack([(s.value + n).cpu() for s, n in zip(solved, nats, strict=True)])
            errors = [torch.full((len(part),), math.nan) if s.stderr is None else s.stderr.cpu() for s in solved]
            noisy, mismatch = noisy or any(s.stderr is None for s in solved), max(mismatch, apart)
            counts = [
                torch.stack([getattr(s, key).cpu().double() for s in solved]) for key in ("nfe", "backward", "status")
            ]
            columns.append(torch.stack([value, torch.stack(errors), *counts]))
        stages, stderr, nfe, backward, status = torch.cat(columns, dim=2)  # each (K + 1, N)
        declared = self._conventions(trace, solver, levels, mismatch)
        return CascadeLogProb(
            stages.sum(dim=0),
            None if noisy else stderr.square().sum(dim=0).sqrt(),
            stages.T,
            declared,
            nfe.sum(dim=0).long(),
            backward.sum(dim=0).long(),
            status.max(dim=0).values.long(),
        )

    def bits_per_dim(self, images: Tensor, cond: Any = None, **options: Any) -> CascadeBits:
        """Return the bits per dimension of grey levels (N, *): those of all stages, over the dimensions of the last.

        The arguments are those of `log_prob`.

        Warns:
            AboveUniform: the mean is above log2(levels).

        Raises:
            ValueError: the last stage has no dequantisation, and see `log_prob`.
            Incomplete: the solver failed for some images, which the message lists.
        """
        if self.stages[-1].dequantization is None:
            raise ValueError(
                "bits need a dequantisation of grey levels; the last stage has none: use log_prob, in nats"
            )
        found = self.log_prob(images, cond, **options)
        unit = dimensions(images) * math.log(2)
        per_image = -found.value / unit
        stderr = None if found.stderr is None else found.stderr / unit
        costs, stages = (found.nfe, found.backward, found.status), -found.stages / unit
        result = CascadeBits(*mean_and_error(per_image), per_image, found.conventions, stderr, *costs, stages=stages)
        if not bool(torch.isfinite(per_image).all()):
            raise Incomplete(describe_failures(per_image, found.status), result)
        warn_if_above_uniform(result.mean, count_levels(images, getattr(self.stages[-1].transform, "levels", None)))
        return result

    def _solve(
        self,
        data: Tensor,
        cond: Condition,
        trace: Trace,
        solver: Solver,
        seeds: Sequence[int],
        levels: Sequence[float],
    ) -> tuple[list[LogProb], list[Tensor], float]:
        """Return for each stage, from the first, the likelihood of its state and the nats of its maps; and a mismatch.

        The mismatch is the largest of `prior_mismatches`, in nats per dimension.
        """
        solved, nats, mismatch, stream = [], [], 0.0, RandomStream(seeds=seeds)
        is_levels = self.stages[-1].dequantization is not None
        for i, stage in reversed(list(enumerate(self.stages))):
            parts, own = by_name(cond), stream.seeds(len(data))
            data_map = DataMap(stage.transform, stage.dequantization if is_levels else None)
            model = as_model(stage.model)
            if data_map.start(model.sde) is not None:
                raise ValueError(
                    f"the dequantisation of stages[{i}] must not set the start time; got {data_map.dequantization}: "
                    "use Uniform or Variational"
                )
            with torch.no_grad():
                state, change = data_map.draw(data.to(double(data)), stream, model.sde)
                if (split := stage.resolutions) is not None:
                    mean = split.mean(state)
                    if split.is_exact:
                        lower = stage.transform.inverse(mean)
                        change = change + split.log_det(stage.shape) - stage.transform.log_det(lower)
                        is_levels = False
                    elif is_levels:
                        lower = split.mean(data.to(double(data))).round()
                        mean = stage.transform(lower + 0.5)
                    else:
                        lower = stage.transform.inverse(mean)
                    image = stage.image(mean, levels[i], stream)
                    parts, state, data = {**parts, "image": image}, split.fine(state), lower
            given = with_density(stage.given(parts))
            solved.append(log_prob(given, state, trace=trace, solver=solver, seeds=own))
            nats.append(change)
            mismatch = max(mismatch, float(prior_mismatches(model.sde, state).max()))
        return solved[::-1], nats[::-1], mismatch

    # --- settings

    def _samplers(self, samplers: Sampler | Sequence[Sampler] | None) -> list[Sampler]:
        """Return one sampler for each stage."""
        chosen = PredictorCorrector(DPMSolverPP(order=2), steps=20) if samplers is None else samplers
        listed = list(chosen) if isinstance(chosen, Sequence) else [chosen] * len(self.stages)
        if len(listed) != len(self.stages):
            raise ValueError(f"samplers must be one, or one for each of {len(self.stages)} stages; got {len(listed)}")
        for i, sampler in enumerate(listed):
            check_instance(f"samplers[{i}]", sampler, "__call__")
        return listed

    def _levels(self, augmentation: float | Sequence[float]) -> list[float]:
        """Return the level of the augmentation of each stage, 0 for the first."""
        above: list[CascadeStage] = self.stages[1:]
        listed = list(augmentation) if isinstance(augmentation, Sequence) else [augmentation] * len(above)
        if len(listed) != len(above):
            raise ValueError(
                f"augmentation must be one number, or one for each of {len(above)} stages after the first; got "
                f"{len(listed)}"
            )
        for i, (level, stage) in enumerate(zip(listed, above, strict=True), start=1):
            check_number("augmentation", level)
            if not 0 <= level <= stage.augmentation:
                raise ValueError(
                    f"augmentation must be from 0 to {stage.augmentation:g}, the largest level that stages[{i}] was "
                    f"trained with; got {level}"
                )
        return [0.0, *map(float, listed)]

    def _conventions(self, trace: Trace, solver: Solver, levels: Sequence[float], mismatch: float) -> dict[str, str]:
        """Return a description of every choice that changes the likelihood; see `likelihood.conventions`."""
        top, shapes = self.stages[-1], [" x ".join(map(str, stage.shape)) for stage in self.stages]
        names = [
            shapes[0],
            *(f"{stage.resolutions} {shape}" for stage, shape in zip(self.stages[1:], shapes[1:], strict=True)),
        ]
        model = as_model(top.model)
        whole = conventions(model, DataMap(top.transform), trace, solver, f"data, t_min={model.sde.t_min:g}", mismatch)
        is_levels = top.dequantization is not None
        quantity = "log-probability of grey levels (lower bound, by dequantisation" if is_levels else "log-density ("
        quantity += "" if self.is_exact else ("; " if is_levels else "") + "of the images of all stages"
        quantity += ", which bounds that of the last)" if is_levels and not self.is_exact else ")"
        densities = ", ".join(str(as_model(stage.model).density) for stage in self.stages)
        return {
            "quantity": quantity.replace(" ()", ""),
            "stages": ", then ".join(names),
            "augmentation": ", ".join(f"{level:g}" for level in levels[1:])
            + (", averaged in log p" if any(levels) else ""),
            "dequantization": str(top.dequantization or "none"),
            **whole,
            "density": f"probability flows of {densities}",
        }
