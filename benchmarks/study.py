"""Alternatives for the solver and the probes of a likelihood; `likelihood.py --study` prints their errors."""

import math

import torch
from torch import Tensor

import scoresde as ss
from scoresde.divergence import Estimator, Evaluation, Field
from scoresde.probability_flow import integrate
from scoresde.random_stream import RandomStream
from scoresde.tensors import dimensions

CENTRES, NEIGHBOURS = (16, 24, 32, 40, 64), (-2, -1, 0, 1, 2)
SMOOTHINGS = (0, 1, 2)


def smoothing(model: ss.ScoreModel, x: Tensor, truth: Tensor) -> None:
    """Print the error of Adams for several values of `smoothing`, at equal cost.

    The velocity of a network is rough in time, so the error at a single number of steps depends on chance. Each value
    is therefore a root mean square over images and over neighbouring numbers of steps.

    Args:
        model, x: the model and its points.
        truth: the converged log p of the points with the fixed probes of seeds 0, 1, 2, ..., in nats (B,).
    """
    print("\n| steps | " + " | ".join(f"rms error, smoothing={s}" for s in SMOOTHINGS) + " | first / second |")
    print("| --- " * (len(SMOOTHINGS) + 2) + "|")
    for centre in CENTRES:
        found = []
        for amount in SMOOTHINGS:
            squares = []
            for steps in (centre + offset for offset in NEIGHBOURS):
                solver = ss.solvers.Adams(steps, smoothing=amount)
                trace = ss.Hutchinson(resample=False)
                value = ss.log_prob(model, x, trace=trace, solver=solver, seeds=range(len(x))).value
                squares.append((value.cpu() - truth).square().mean())
            found.append(float(torch.stack(squares).mean().sqrt()) / (dimensions(x) * math.log(2)))
        cells = " | ".join(f"{value:.1e}" for value in found)
        print(
            f"| {centre + NEIGHBOURS[0]} to {centre + NEIGHBOURS[-1]} | {cells} | {found[0] / found[1]:.2f} |",
            flush=True,
        )


class Jacobians:
    """A trace that stores the symmetric part of the Jacobian at every evaluation in `found`, each (B, d, d).

    It integrates `count` indicator functions. The i-th is 1 at evaluation i and 0 at all others, so that its integral
    is the weight of the solver for evaluation i.
    """

    def __init__(self, count: int):
        self.count, self.found = count, []

    def bind(self, stream: RandomStream, x: Tensor, differentiable: bool = False) -> Estimator:
        """Return the estimator; nothing is drawn."""

        def evaluate(field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation:
            full = torch.func.vmap(torch.func.jacrev(lambda one: field(one[None])[0]))(x)
            size, index = dimensions(x), len(self.found)
            jacobian = full.detach().reshape(len(x), size, size).double().cpu()
            self.found.append((jacobian + jacobian.mT) / 2)
            unit = torch.nn.functional.one_hot(torch.tensor(index), self.count).to(x)
            return Evaluation(field(x), unit.expand(len(x), -1), torch.zeros_like(x.flatten(1)[:, 0]))

        return evaluate

    def quadratic_form(self, field: Field, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and z^T J z; nothing is stored."""
        return ss.Hutchinson().quadratic_form(field, x, z)


def along_the_path(model: ss.ScoreModel, x: Tensor, steps: int = 32) -> Tensor:
    """Return the weighted off-diagonal part of the symmetric Jacobian at every evaluation of Adams.

    The result is in bits/dim, (steps + 1, B, d, d).
    """
    trace = Jacobians(steps + 2)  # the last function is zero everywhere: its integral is the offset common to all
    carried = integrate(model, x, model.sde.t_min, model.sde.t_max, ss.solvers.Adams(steps), trace)
    weights = (carried.divergence[:, :-1] - carried.divergence[:, -1:]).T.double().cpu()
    terms = weights[..., None, None] * torch.stack(trace.found)
    return (terms - terms.diagonal(dim1=2, dim2=3).diag_embed()) / (dimensions(x) * math.log(2))


def linear_model(model: ss.ScoreModel) -> ss.ScoreModel:
    """Return the score of a Gaussian with the mean and covariance of the dequantised digits, scaled to [-1, 1]."""
    levels = ss.data.Digits("fit").images.double()
    data = ss.data.Levels(17)(levels + torch.rand(levels.shape, generator=torch.Generator().manual_seed(0)))
    variances, axes = torch.linalg.eigh(torch.cov(data.flatten(1).T))
    shape = (1, *levels.shape[1:])
    return ss.GaussianMixture(data.mean(0, keepdim=True), variances.sqrt().reshape(shape), rotation=axes).score_model(
        model.sde
    )


def spread(terms: Tensor) -> float:
    """Return the standard deviation of sum_i z_i^T S_i z_i over independent Rademacher z_i.

    S_i are the terms (n, B, d, d); variances are averaged over the B points.
    """
    return float(2 * terms.square().sum(dim=(0, 2, 3)).mean()) ** 0.5


def orthogonal_spread(terms: Tensor, draws: int = 500) -> float:
    """Return an estimate of the same for z_i that are different rows of a Hadamard matrix.

    Each draw multiplies its columns by random signs and permutes its rows.
    """
    size, generator = terms.shape[-1], torch.Generator().manual_seed(0)
    rows = torch.ones(1, 1, dtype=terms.dtype)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], dim=1), torch.cat([rows, -rows], dim=1)])
    values = []
    for _ in range(draws):
        signs = torch.randint(2, (size,), generator=generator) * 2 - 1
        z = (rows * signs)[torch.randperm(size, generator=generator)[: len(terms)]]
        values.append(torch.einsum("ni,nbij,nj->b", z, terms, z))
    return float(torch.stack(values).var(dim=0).mean()) ** 0.5


def probes(model: ss.ScoreModel, x: Tensor) -> None:
    """Print the standard deviation per image for each way to draw the probes, from exact Jacobians on the digits."""
    if x.shape[1:] != (1, 8, 8):
        print(f"\nthe study of probes is skipped: it needs images of shape (1, 8, 8); got {tuple(x.shape[1:])}")
        return
    terms, known = along_the_path(model, x), along_the_path(linear_model(model), x)
    overlap = (terms * known).sum(dim=(1, 2, 3), keepdim=True) / known.square().sum(dim=(1, 2, 3), keepdim=True)
    rows = {
        "one kept": spread(terms.sum(dim=0, keepdim=True)),
        "fresh at every evaluation (default)": spread(terms),
        "fresh, less the forms of a linear denoiser, whose trace is known": spread(terms - known),
        "the same, with the best coefficient at every time": spread(terms - overlap * known),
        "rows of a Hadamard matrix, another at every evaluation": orthogonal_spread(terms),
    }
    print(f"\n{len(x)} images, {len(terms)} evaluations\n\n| one probe per evaluation | standard deviation, bits/dim |")
    print("| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value:.4f} |")
