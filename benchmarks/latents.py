"""The bound on the likelihood of a latent diffusion, in bits per dimension of the pixels, with each of its terms.

    python benchmarks/latents.py                                                       # the oracle, in seconds
    python benchmarks/latents.py --run runs/openmoji_latent --images 64
    python benchmarks/latents.py --run runs/openmoji_latent --pixels runs/openmoji --pictures latents.png

The oracle is a linear autoencoder of a Gaussian x = W z + noise, with orthonormal columns of W. Its rows are

- exact: 4 of 4 dimensions, narrow q(z | x) and p(x | z). The bound, with p(z) by the probability flow, is the exact
  log-likelihood of x.
- lossy: 2 of 3 dimensions, with a q(z | x) that is not the posterior. The bound lies below log p(x) by the divergence
  of q from the posterior, which is a closed form.

For a run, the rows are the terms of the bound with their standard errors over images; the bound with the prior N(0, I)
in place of the diffusion, which is that of the autoencoder alone; and the error of the reconstructions. With --pixels,
the bits per dimension of a run on the pixels of the same images are added.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde import plots
from scoresde.dequantization import DataMap
from scoresde.evaluation.references import data_items
from scoresde.pipelines import Autoencoder, Latents, Normal
from scoresde.random_stream import RandomStream
from scoresde.solvers import Adams
from scoresde.tensors import mean_and_error

VP = ss.VP(beta_max=40.0)
DRAWS = 2_000_000


class Linear(nn.Module):
    """q(z | x) = N(W^T x, spread^2) and p(x | z) = N(W z, width^2), with orthonormal columns of W (size, latent)."""

    scales = True

    def __init__(self, size: int, latent: int, spread: float, width: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shape, self.latent_shape, self.logs = (size,), (latent,), (math.log(spread), math.log(width))
        self.matrix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q[:, :latent]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x @ self.matrix
        return mean, torch.full_like(mean, self.logs[0])

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = z @ self.matrix.mT
        return mean, torch.full_like(mean, self.logs[1])


def exact() -> list[list[str]]:
    """Return the rows of the exact autoencoder, in nats."""
    network = Linear(4, 4, 1e-6, 1e-6)
    latents = Latents(Autoencoder(network, Normal()), ss.data.Affine(), 0.3, 1.7)
    prior = ss.GaussianMixture(torch.full((1, 4), 0.2, dtype=torch.float64), torch.full((1,), 0.5))
    of_x = ss.GaussianMixture((prior.means * 1.7 + 0.3) @ network.matrix.mT, torch.full((1,), 0.85))
    x = of_x.sample(64, generator=torch.Generator().manual_seed(1))
    state, nats = DataMap(latents).draw(x, RandomStream(seeds=range(64)), VP)
    options = {"trace": ss.ExactTrace(), "solver": Adams(100)}
    bound = ss.log_prob(prior.score_model(VP), state, **options).value + nats
    error = (bound - of_x.log_prob(x)).abs()
    return [["exact: largest difference of bound and log p(x), of 64 points", f"{float(error.max()):.1e} nats"]]


def lossy() -> list[list[str]]:
    """Return the rows of the lossy autoencoder, in nats."""
    spread, width, std = 0.5, 0.3, 0.8
    network = Linear(3, 2, spread, width)
    latents, w = Latents(Autoencoder(network, Normal()), ss.data.Affine(), 0.0, 1.0), network.matrix
    covariance = std**2 * w @ w.mT + width**2 * torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    precision = 1 / std**2 + 1 / width**2
    shift = x @ w * (1 - 1 / (precision * width**2))
    gap = spread**2 * precision - 1 - math.log(spread**2 * precision) + 0.5 * precision * float(shift.square().sum())
    stream = RandomStream(generator=torch.Generator().manual_seed(0))
    state, nats = DataMap(latents).draw(x.expand(DRAWS, 3), stream, VP)
    prior = ss.GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), torch.full((1,), std))
    mean, error = mean_and_error(nats + prior.log_prob(state))
    log_p = float(density.log_prob(x))
    return [
        ["lossy: log p(x) - KL(q, posterior), closed form", f"{log_p:.4f} - {gap:.4f} = {log_p - gap:.4f} nats"],
        ["lossy: the bound", f"{mean:.4f} +- {error:.4f} nats"],
    ]


def plus_minus(values: Tensor) -> str:
    """Return the mean of values (N,) with its standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.4f} +- {error:.4f}"


def of_run(path: str, images: Tensor, steps: int) -> list[list[str]]:
    """Return the rows of a run of latents, in bits per dimension of the pixels."""
    run, count = ss.load(path), len(images)
    started = time.perf_counter()
    bits = ss.bits_per_dim(run.model, images, run.transform, solver=Adams(steps), seeds=range(count))
    seconds = time.perf_counter() - started
    unit = images[0].numel() * math.log(2)
    moments = run.transform.moments(images)
    mean, log_std = moments.chunk(2, dim=1)
    divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).double().sum(dim=1) / unit
    terms, kl = bits.terms, bits.terms["prior"] + bits.terms["entropy"]
    decoded = run.transform.inverse(run.transform(images)).clamp(0, 256)
    error = (decoded - (images + 0.5)).double().square().flatten(1).mean(dim=1)
    alone = terms["reconstruction"] + divergence
    return [
        ["**bound, bits/dim of the pixels**", f"**{plus_minus(bits.per_image)}**"],
        ["-log p(x given z)", plus_minus(terms["reconstruction"])],
        ["-log p(z), by the flow", plus_minus(terms["prior"])],
        ["log q(z given x)", plus_minus(terms["entropy"])],
        ["KL(q, p) with the flow", plus_minus(kl)],
        ["KL(q, p) with p = N(0, I)", plus_minus(divergence)],
        ["bound with p = N(0, I)", plus_minus(alone)],
        ["reconstruction, root mean square error of grey levels", f"{float(error.mean().sqrt()):.2f}"],
        ["reconstruction, PSNR", f"{float((10 * torch.log10(255**2 / error)).mean()):.1f} dB"],
        ["flow: evaluations of each image; seconds of all", f"{float(bits.nfe.double().mean()):.0f}; {seconds:.0f}"],
    ]


def of_pixels(path: str, images: Tensor, steps: int) -> list[list[str]]:
    """Return the row of a run on pixels."""
    run = ss.load(path)
    bits = ss.bits_per_dim(run.model, images, run.transform, solver=Adams(steps), seeds=range(len(images)))
    return [[f"pixels, {path}", plus_minus(bits.per_image)]]


def save_pictures(path: str, images: Tensor, file: str) -> None:
    """Save images, their reconstructions, and samples, in three blocks of rows."""
    run, shown = ss.load(path), images[:16]
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(3), steps=30)
    states = sampler(run.model, shape=(32, *run.state_shape), seeds=range(32)).x
    rows = torch.cat([shown.float(), run.transform.inverse(run.transform(shown)), run.transform.inverse(states)])
    plots.save_samples(rows, Path(file), 0.0, 256.0, (), run.config.data.get("credit"))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of latents")
    parser.add_argument("--pixels", help="a run on the pixels of the same data")
    parser.add_argument("--images", type=int, default=64, help="test images, evenly spaced")
    parser.add_argument("--steps", type=int, default=50, help="steps of the flow's solver, of Adams")
    parser.add_argument("--pictures", help="a file for images, reconstructions and samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*exact(), *lossy()]
    if arguments.run:
        images = data_items(ss.load(arguments.run), "test", arguments.images)
        rows += of_run(arguments.run, images, arguments.steps)
        if arguments.pixels:
            rows += of_pixels(arguments.pixels, images, arguments.steps)
        if arguments.pictures:
            save_pictures(arguments.run, images, arguments.pictures)
    print("\n".join(f"| {name} | {value} |" for name, value in [["", ""], ["---", "---"], *rows]))


if __name__ == "__main__":
    main()
