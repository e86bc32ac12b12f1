"""Denoising diffusion GANs on points in the plane, against Gaussian steps with the exact score.

    python benchmarks/adversarial.py --steps 1 2 4 --updates 1200
    python benchmarks/adversarial.py --steps 2 4 --decay cosine --penalty 0.5

The data are a mixture of three Gaussians under VP. A generator with K steps is trained on exact draws (`DenoisingGAN`);
networks are MLPs of width 32 and depth 2. Samples (2,000) are compared with exact draws by the energy distance, the
mean and its 95% interval over eight sets, beside other exact draws and beside K ancestral and K DDIM steps with the
exact score, on the same grid. A training is one of `Trainer.fit` in `--out`, and resumes there.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import scoresde as ss
from scoresde.data.items import Items
from scoresde.dequantization import DataMap
from scoresde.flowmaps import DenoisingGAN, DenoisingGenerator, GeneratorStep, PairDiscriminator
from scoresde.metrics import energy_distance
from scoresde.networks import MLP
from scoresde.samplers import DDIM, Ancestral, PredictorCorrector
from scoresde.samplers.sampler import Step
from scoresde.training import Trainer, checkpoint
from scoresde.training.trainer import CHECKPOINT

DRAWS, SETS = 2000, 8
EXACT = ss.GaussianMixture(
    1.2 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]]), torch.full((3,), 0.25), torch.tensor([0.5, 0.3, 0.2])
)


def exact(seed: int, n: int = DRAWS) -> Tensor:
    """Return n exact draws."""
    return EXACT.sample(n, generator=torch.Generator().manual_seed(seed)).float()


def train(steps: int, options: argparse.Namespace) -> DenoisingGenerator:
    """Return a generator with averaged weights, trained in a folder of `options.out`."""
    torch.manual_seed(0)
    parts = {"width": 32, "depth": 2, "time_scale": 10.0}
    model = DenoisingGenerator(MLP(2, **parts), ss.VP(), steps=steps, latent=4)
    loss = DenoisingGAN(PairDiscriminator(MLP(4, out_channels=1, **parts)), options.penalty)
    adam = partial(torch.optim.Adam, lr=options.rate, betas=(0.5, 0.9))
    settings = {"clip": math.inf, "ema": 0.99, "log_every": 100, "checkpoint_every": 200}
    trainer = Trainer(adam, options.updates, 128, decay=options.decay, **settings)
    run = options.out / f"{steps}_steps"
    trainer.fit(model, loss, Items(exact(1, 20_000)), run, DataMap(ss.data.Affine()), progress=False)
    model.load_state_dict(checkpoint.load(run / CHECKPOINT, {"ema"})[0]["ema"], strict=False)
    return model.eval()


def drawn(step: Step, steps: int, model: ss.ScoreModel, k: int) -> Tensor:
    """Return set k of the samples after `steps` steps."""
    sampler = PredictorCorrector(step, steps=steps, grid="uniform_angle")
    return sampler(model, (DRAWS, 2), seeds=range(k * DRAWS, (k + 1) * DRAWS)).x


def row(name: str, draw: Callable[[int], Tensor]) -> None:
    """Print a row of the table: the energy distance of the sets draw(0), draw(1), ... to exact draws."""
    values = np.array([float(energy_distance(draw(k).detach(), exact(1000 + k))) for k in range(SETS)])
    half = 2.36 * values.std(ddof=1) / math.sqrt(SETS)
    print(f"| {name} | {values.mean():.2e} +- {half:.1e} |", flush=True)


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", default="none", help="of the learning rate, see Trainer")
    parser.add_argument("--penalty", type=float, default=0.05, help="gamma of the gradient penalty")
    parser.add_argument("--out", type=Path, default=Path("runs/adversarial"))
    options = parser.parse_args()
    print("| samples | energy distance to exact draws, mean of 8 [95%] |\n| --- | --- |", flush=True)
    row("exact draws", lambda k: exact(2000 + k))
    score = EXACT.score_model(ss.VP())
    for steps in options.steps:
        busy = time.process_time()
        model = train(steps, options)
        busy = time.process_time() - busy

        row(f"generator, {steps} steps ({busy:.0f} s of one core)", partial(drawn, GeneratorStep(), steps, model))
        for name, step in (("ancestral", Ancestral()), ("DDIM", DDIM())):
            row(f"{name}, {steps} steps, exact score", partial(drawn, step, steps, score))


if __name__ == "__main__":
    main()
