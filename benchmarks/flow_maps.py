"""Flow maps: their likelihood and samples in a few jumps, against the exact density or the model's own flow.

    python benchmarks/flow_maps.py mixture --steps 2500 --rate 3e-3 --solutions 32768 --pairs 1 --batch 1024
    python benchmarks/flow_maps.py digits --steps 2800 --solutions 8192 --pairs 1 --batch 128 --teacher digits_vp.pth
    python benchmarks/flow_maps.py mixture --method mean_flow                # the same with another objective

mixture: 8 rotated Gaussians in 16 (or --size) dimensions under VP. The teacher is the exact score. log p(x) of 2,000
exact draws is compared with the exact density, in nats per dimension; samples (2,000) with exact draws by the energy
distance, beside that of other exact draws.

digits: the teacher is a trained model of score_sde's format. Bits per dimension of 96 test images after k jumps less
those of the teacher's converged flow, with the same dequantisation; Frechet distances of 2,000 samples to the training
and to the test digits in the features of the digits' classifier, beside those of the teacher's samplers; and the cost
of a multilevel estimate of the teacher's bits, with the flow map as level 0 and without.

With `--solutions`, the flow is solved before the training, and each pair of a batch comes from another stored solution.
With `--guidance`, both tables of samples have rows for self-guidance by likelihood; `--others` adds rows of other flow
maps of this script, and `--generators` of denoising generators (`scoresde train experiment=gan_digits`).

A training is one of `Trainer.fit` in `--out`, and resumes there. Intervals are 95%: bootstrap over images and points,
and over eight sets of samples for the energy distance.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf, open_dict
from posterior_methods import mixture
from samplers import interval, rms
from torch import Tensor
from torch.utils.data import Dataset

import scoresde as ss
from scoresde import build
from scoresde.cli import config_directory
from scoresde.data.items import Items
from scoresde.dequantization import DataMap, Uniform
from scoresde.flowmaps import (
    AdversarialDistillation,
    Consistency,
    FeatureDiscriminator,
    FlowMapObjective,
    Jumps,
    MeanFlow,
    ProgressiveDistillation,
    StoredTrajectories,
    TrajectoryDistillation,
)
from scoresde.flowmaps.stored_trajectories import stored_solutions
from scoresde.losses import Objective
from scoresde.metrics import energy_distance
from scoresde.metrics.features import extract
from scoresde.metrics.image_quality import frechet
from scoresde.networks import MLP
from scoresde.samplers import DDIM, DPMSolverPP, PredictorCorrector
from scoresde.samplers.sampler import Step
from scoresde.training import Trainer, checkpoint
from scoresde.training.trainer import CHECKPOINT

POINTS, DRAWS, SETS, IMAGES, SAMPLES = 2000, 2000, 8, 96, 2000


METHODS: dict[str, Callable[..., FlowMapObjective]] = {
    "trajectories": TrajectoryDistillation,
    "adversarial": TrajectoryDistillation,  # with a discriminator, for the digits
    "mean_flow": MeanFlow,
    "consistency": partial(Consistency, steps=100),
    "progressive": ProgressiveDistillation,
}
BATCHES = {"trajectories": 64, "adversarial": 64, "mean_flow": 2048, "consistency": 2048, "progressive": 2048}


class Identity:
    """The transform of data that are states."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, y: Tensor) -> Tensor:
        return y

    def log_det(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64)


def train(
    model: ss.FlowMap,
    loss: Objective,
    data: Dataset,
    data_map: DataMap,
    options: argparse.Namespace,
    **settings: Any,
) -> ss.FlowMap:
    """Train a flow map in `options.out`, and return it with averaged weights."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=options.rate, betas=(0.9, 0.99))

    settings |= {"decay": options.decay, "warmup": min(100, options.steps // 10), "loss_rate": options.loss_rate}
    trainer = Trainer(adam, options.steps, **settings)
    started = time.perf_counter(), time.process_time()
    trainer.fit(model, loss, data, options.out, data_map, progress=False)
    wall, busy = time.perf_counter() - started[0], time.process_time() - started[1]
    print(
        f"{options.steps} steps of {settings['batch_size']} states: {wall:.0f} s, {busy:.0f} s of one core\n",
        flush=True,
    )
    return load_average(model, options.out).eval()


def trained_on(
    model: ss.FlowMap, data: Dataset, data_map: DataMap, options: argparse.Namespace, teacher: ss.ScoreModel
) -> tuple[Dataset, DataMap]:
    """Return the data to train on: with `--solutions`, solutions of the teacher's flow, from a file if there is one.

    Adversarial distillation gets those from data only, whose clean states are the real ones of its discriminator.
    """
    if not options.solutions:
        return data, data_map
    file, busy = (options.start or options.out) / "solutions.safetensors", time.process_time()
    solving = TrajectoryDistillation(teacher, options.nodes)
    items = stored_solutions(file, solving, model, data, data_map, options.solutions, 0)
    print(f"{len(items)} solutions: {time.process_time() - busy:.0f} s of one core\n", flush=True)
    from_data = items.entries[:, 0, 0] < items.entries[:, -1, 0]
    chosen = items.entries[from_data] if options.method == "adversarial" else items.entries
    return Items(chosen), DataMap(Identity())


def load_average(model: ss.FlowMap, path: Path) -> ss.FlowMap:
    """Load the averaged weights of a run into a flow map; return it."""
    model.load_state_dict(checkpoint.load(path / CHECKPOINT, {"ema"})[0]["ema"], strict=False)
    return model


def objective(options: argparse.Namespace, teacher: ss.ScoreModel, shape: Sequence[int]) -> Objective:
    """Return the objective of a method for states of a shape, with its settings here."""
    is_solved = METHODS[options.method] is TrajectoryDistillation
    own = {"steps": options.nodes, "pairs": options.pairs} if is_solved else {}
    distillation = METHODS[options.method](teacher, divergence_weight=options.divergence_weight, **own)
    if options.solutions:
        distillation = StoredTrajectories(distillation, shape)
    if options.method != "adversarial":
        return distillation
    return AdversarialDistillation(
        distillation, FeatureDiscriminator(teacher, shape), weight=options.adversarial_weight
    )


# --- the mixture


def on_mixture(options: argparse.Namespace) -> None:
    """Train on the mixture, and print the two tables."""
    sde, exact = ss.VP(), mixture((options.size,))
    scale = float(exact.covariance().diagonal().mean().sqrt())
    torch.manual_seed(0)
    network = MLP(options.size, width=options.width, depth=3, time_scale=16.0, out_channels=options.size + 1)
    model = ss.FlowMap(network, sde, data_scale=scale)
    data = exact.sample(200_000, generator=torch.Generator().manual_seed(1)).float()
    settings = {
        "batch_size": options.batch or BATCHES[options.method],
        "ema": 0.99,
        "log_every": 20,
        "checkpoint_every": 100,
    }
    teacher = exact.score_model(sde)
    items = trained_on(model, Items(data), DataMap(Identity()), options, teacher)
    model = train(model, objective(options, teacher, [options.size]), *items, options, **settings)

    x = exact.sample(POINTS, generator=torch.Generator().manual_seed(99))
    truth = exact.log_prob(x)
    latent = ss.encode(exact.score_model(sde), x, solver=ss.solvers.Adams(96))
    print("| jumps | rms error of log p, nats/dim [95%] | of the latents | of the divergence | mean error | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for jumps in options.jumps:
        found = model.log_prob(x, steps=jumps)
        errors = ((found.value - truth) / options.size).numpy()
        parts = (sde.prior_log_prob(found.latent.double()) - sde.prior_log_prob(latent)).numpy() / options.size
        low, high = interval(rms, errors)
        cells = f"{rms(errors):.4f} [{low:.4f}, {high:.4f}] | {rms(parts):.4f} | {rms(errors - parts):.4f}"
        print(f"| {jumps} | {cells} | {errors.mean():+.4f} | {np.abs(errors).max():.3f} |", flush=True)

    def draws(k: int) -> Tensor:
        return exact.sample(DRAWS, generator=torch.Generator().manual_seed(1000 + k))

    references = [draws(k) for k in range(SETS)]
    print("\n| samples | energy distance to exact draws, mean of 8 [95%] | rms |\n| --- | --- | --- |")
    sets: dict[str, Callable[[int], Tensor]] = {"exact draws": lambda k: draws(100 + k)}

    def sample(k: int, jumps: int, guidance: float = 0.0) -> Tensor:
        seeds = range(k * DRAWS, (k + 1) * DRAWS)
        return model.sample((DRAWS, options.size), steps=jumps, seeds=seeds, guidance=guidance).double()

    sets |= {f"{jumps} jumps": partial(sample, jumps=jumps) for jumps in options.jumps}
    for name, of in sets.items():
        values, half = distances(of, references)
        print(f"| {name} | {values.mean():.2e} +- {half:.1e} | {rms(values):.2e} |", flush=True)

    print("\n| samples in 2 jumps | exact log p, nats/dim | log p of the map | energy distance |")
    print("| --- | --- | --- | --- |")
    guided = {f"guidance {w:g}": partial(sample, jumps=2, guidance=w) for w in options.guidance}
    for name, of in {"exact draws": sets["exact draws"], **guided}.items():
        x, (values, half) = of(0), distances(of, references)
        cells = [mean_of(log_p / options.size) for log_p in (exact.log_prob(x), model.log_prob(x).value)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {values.mean():.2e} +- {half:.1e} |", flush=True)


def distances(of: Callable[[int], Tensor], references: list[Tensor]) -> tuple[np.ndarray, float]:
    """Return the energy distances of the sets of(0), of(1), ... to the references, and half of the interval of 95%."""
    values = np.array([float(energy_distance(of(k), reference)) for k, reference in enumerate(references)])
    return values, 2.36 * values.std(ddof=1) / math.sqrt(len(values))


def mean_of(values: Tensor) -> str:
    """Return a mean with its standard error as text."""
    return f"{float(values.mean()):.4f} +- {float(values.std()) / math.sqrt(len(values)):.4f}"


# --- the digits


def on_digits(options: argparse.Namespace) -> None:
    """Train on the digits, and print the two tables."""
    run = ss.convert.score_sde(options.teacher)
    teacher, config = run.model, run.config.copy()
    with open_dict(config):
        config.network.out_channels = 3  # of the prediction, the correction and the divergence
        config.flow_map = {"data_scale": 0.8, "correction": True}
        config.network.block.dropout = 0.0
    torch.manual_seed(0)
    model: Any = build.build_model(config)
    model.start_from(teacher)
    if options.start is not None:
        load_average(model, options.start)
    data_map, digits = DataMap(run.transform, Uniform()), ss.data.Digits("fit")
    settings = {"batch_size": options.batch or 8, "ema": 0.99, "log_every": 20, "checkpoint_every": 100}
    loss = objective(options, teacher, run.config.data.shape)
    items = trained_on(model, digits, data_map, options, teacher)
    model = train(model, loss, *items, options, **settings)

    if not options.samples_only:
        likelihoods(model, teacher, data_map, options)
    space = build.instantiate(OmegaConf.load(config_directory() / "features" / "digits.yaml"))

    def features(x: Tensor) -> Any:
        return extract(space, x, (0, 16), device="cpu")

    splits = [digits, ss.data.Digits("test")]
    references = [features(torch.stack([part[i] for i in range(len(part))]).float()).values for part in splits]
    print("| samples | Frechet distance to the training digits | to the test digits |\n| --- | --- | --- |")
    shape, seeds = (SAMPLES, *run.config.data.shape), range(SAMPLES)

    def of_teacher(step: Step, steps: int) -> Tensor:
        return PredictorCorrector(step, steps=steps)(teacher, shape, seeds=seeds).x

    samples: dict[str, Callable[[], Tensor]] = {}
    for name, step in (("DDIM", DDIM()), ("DPM-Solver++(2)", DPMSolverPP(2))):
        samples |= {f"{steps} steps of {name}": partial(of_teacher, step, steps) for steps in options.teacher_steps}
    for jumps, w in ((jumps, w) for w in options.guidance for jumps in options.jumps):
        name = f"{jumps} jumps" + (f", guidance {w:g}" if w else "")
        samples[name] = partial(model.sample, shape, steps=jumps, seeds=seeds, guidance=w)
    for path in options.others:
        other = load_average(copy.deepcopy(model), path).eval()
        for jumps in options.jumps:
            samples[f"{jumps} jumps of {path.name}"] = partial(other.sample, shape, steps=jumps, seeds=seeds)
    for path in options.generators:
        generator: Any = ss.load(path).model
        samples[f"{generator.steps} steps of the generator {path.name}"] = partial(generator.sample, shape, seeds=seeds)
    for name, draw in samples.items():
        levels = (run.transform.inverse(draw()) - 0.5).round().clamp(0, 16)
        values = [frechet(features(levels).values, reference) for reference in references]
        print(f"| {name} | {' | '.join(f'{v.value:.3f} +- {v.error:.3f}' for v in values)} |", flush=True)


def likelihoods(model: ss.FlowMap, teacher: ss.ScoreModel, data_map: DataMap, options: argparse.Namespace) -> None:
    """Print bits per dimension in k jumps less those of the teacher's flow, and the cost as a surrogate."""
    images = torch.stack([ss.data.Digits("test")[i] for i in range(IMAGES)])
    exact = ss.bits_per_dim(teacher, images, data_map, trace=ss.Hutchinson(4), solver=ss.solvers.Adams(32)).per_image
    print("| jumps | bits/dim less the flow's, mean [95%] | sd of images | ms an image |\n| --- | --- | --- | --- |")
    for jumps in options.jumps:
        started = time.perf_counter()
        bits = ss.bits_per_dim(model, images, data_map, solver=Jumps(jumps)).per_image
        spent = 1000 * (time.perf_counter() - started) / IMAGES
        errors = (bits - exact).numpy()
        low, high = interval(lambda values: values.mean(axis=-1), errors)
        print(f"| {jumps} | {errors.mean():+.4f} [{low:+.4f}, {high:+.4f}] | {errors.std(ddof=1):.4f} | {spent:.1f} |")
    print(f"\nthe flow: {float(exact.mean()):.4f} bits/dim\n", flush=True)

    as_level(model, teacher, data_map)


def as_level(model: ss.FlowMap, teacher: ss.ScoreModel, data_map: DataMap, tolerance: float = 0.01) -> None:
    """Print the cost of a multilevel estimate of the test set, with few steps and with the flow map as level 0."""
    digits = ss.data.Digits("test")
    images = torch.stack([digits[i] for i in range(len(digits))])
    print(f"| level 0, tolerance {tolerance:g} | bits/dim | passes an image | s |\n| --- | --- | --- | --- |")
    for name, options in {"few steps": {}, "flow map": {"surrogate": model}}.items():
        started = time.perf_counter()
        bits = ss.bits_per_dim(teacher, images, data_map, tolerance=tolerance, **options)
        passes = float((bits.nfe + bits.backward).double().mean())
        print(f"| {name} | {bits.mean:.4f} | {passes:.0f} | {time.perf_counter() - started:.0f} |", flush=True)
    print()


def main() -> None:
    """Train and print the tables of one problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", choices=("mixture", "digits"))
    parser.add_argument("--method", choices=METHODS, default="trajectories")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", default="cosine", help="of the learning rate, see Trainer")
    parser.add_argument("--width", type=int, default=128, help="of the network for the mixture")
    parser.add_argument("--size", type=int, default=16, help="dimensions of the mixture")
    parser.add_argument("--batch", type=int, help="states of a batch")
    parser.add_argument("--pairs", type=int, default=32, help="jumps learned for each state (method trajectories)")
    parser.add_argument("--nodes", type=int, default=24, help="steps of a solution (method trajectories)")
    parser.add_argument("--solutions", type=int, default=0, help="solve so many before the training, and train on them")
    parser.add_argument("--divergence-weight", type=float, default=5.0)
    parser.add_argument("--loss-rate", type=float, default=1.0, help="rate of the discriminator over that of the map")
    parser.add_argument("--adversarial-weight", type=float, default=0.1, help="of the generator's loss")
    parser.add_argument("--jumps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--samples-only", action="store_true", help="without the tables of the likelihood (digits)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0], help="strengths of the self-guidance")
    parser.add_argument("--generators", type=Path, nargs="*", default=[], help="runs of denoising generators of digits")
    parser.add_argument("--teacher", type=Path, help="checkpoint of the digits in score_sde's format")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[20], help="numbers of steps of its samplers")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="further runs of this script (digits)")
    parser.add_argument("--start", type=Path, help="directory of another run of this script to start from (digits)")
    parser.add_argument("--out", type=Path, help="directory of the run; default runs/flow_maps/PROBLEM_METHOD")
    options = parser.parse_args()
    options.out = options.out or Path("runs/flow_maps") / f"{options.problem}_{options.method}"
    if options.problem == "digits" and options.teacher is None:
        parser.error("digits need --teacher")
    (on_mixture if options.problem == "mixture" else on_digits)(options)


if __name__ == "__main__":
    main()
