"""Log-densities along an SDE path, without a divergence, and the superposition of two models by them (2412.17762).

For neighbouring times s < t of a diffusion, Bayes' rule relates the densities at the two ends of a step,

    log p_s(x_s)  =  log p_t(x_t)  +  log p(x_s | x_t)  -  log q(x_t | x_s),

with the forward kernel q and the reverse kernel p, here both Gaussian with the variance of q. So the log-density of a
state follows from a path that ends there, by one network evaluation a step. In the limit of small steps this is the
Ito density estimator (2412.17762, theorem 1), with D dimensions and dx = x_s - x_t,

    d log p = <score, dx> + (f D + f <x, score> - g^2/2 |score|^2) (t - s).

The path is that of a sampler, or of noising given data. Then its mean is the evidence lower bound of the reverse SDE
(2101.09258), not the density of the probability flow, `ss.log_prob`. Densities of two models along one path combine
them (2412.17762, algorithm 1), with m_i the mean of p for model i:

    OR    mean kappa_1 m_1 + kappa_2 m_2 with kappa = softmax(log w_i + log p_i(x_t)): the mixture sum_i w_i p_i
    AND   mean m_2 + kappa (m_1 - m_2) with kappa such that log p_1 = log p_2 after the step

AND takes the noise along m_1 - m_2 out of the path, so that its quadratic variation is no longer g^2 dt, as Ito's
formula assumes: the tracked densities are equal, but the true ones keep a difference, for any number of steps.

    python examples/density_superposition.py            # about a minute
    python examples/density_superposition.py --small    # seconds, and no figure
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

import scoresde as ss

HERE, SDE = Path(__file__).parent, ss.VP()


def log_normal(x, mean, variance):  # log N(x; mean, variance I), float64 (B,)
    return -0.5 * ((x - mean).square() / variance + torch.log(2 * torch.pi * variance)).sum(dim=1)


def increments(views, x_t, x_s, t, s):
    """The increments of log p by Bayes' rule and by the Ito density estimator, (2, B)."""
    (a, b, _), (r, v) = SDE.posterior(t, s), SDE.transition(s, t)  # v: the variance of both kernels
    kernels = log_normal(x_s, a * x_t + b * views.denoised, v) - log_normal(x_t, r * x_s, v)
    f, g2, score = SDE.drift(t), SDE.diffusion(t).square(), views.score
    rate = f * x_t.shape[1] + (f * (x_t * score) - 0.5 * g2 * score.square()).sum(dim=1)
    return torch.stack([kernels, (score * (x_s - x_t)).sum(dim=1) + rate * (t - s)])


def noised(x, steps, generator):
    """The states of a noising path of data x, from t_max to t_min, where it is x."""
    path = [x]
    for s, t in pairwise(ss.samplers.karras(SDE, steps).flip(0)):
        r, w = SDE.transition(s, t)
        path.append(r * path[-1] + w.sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return path[::-1]


@torch.no_grad()
def read(model, path):
    """log p at the end of a path of states, by both increments, (2, B)."""
    log_p, times = SDE.prior_log_prob(path[0]), ss.samplers.karras(SDE, len(path) - 1)
    for (t, s), (x_t, x_s) in zip(pairwise(times), pairwise(path), strict=True):
        log_p = log_p + increments(model.predict(x_t, t), x_t, x_s, t, s)
    return log_p


@torch.no_grad()
def superpose(models, rule, n, steps, generator):
    """Draw n samples by a rule (log_p, means, noise, v) -> mean of the reverse kernel; return them and log p (n, K)."""
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    log_p = SDE.prior_log_prob(x)[:, None].repeat(1, len(models))
    for t, s in pairwise(ss.samplers.karras(SDE, steps)):
        (a, b, _), (r, v) = SDE.posterior(t, s), SDE.transition(s, t)
        means = torch.stack([a * x + b * model.predict(x, t).denoised for model in models], dim=1)
        noise = v.sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        later = rule(log_p, means, noise, v) + noise
        reverse = torch.stack([log_normal(later, mean, v) for mean in means.unbind(1)], dim=1)
        x, log_p = later, log_p + reverse - log_normal(x, r * later, v)[:, None]
    return x, log_p


def equal(log_p, means, noise, v):
    """The mean m with log p_1 + log N(m + noise; m_1, v) = log p_2 + log N(m + noise; m_2, v)."""
    apart = means[:, 0] - means[:, 1]
    wanted = v * (log_p[:, 1] - log_p[:, 0]) - (noise * apart).sum(dim=1)
    return means.mean(dim=1) + (wanted / apart.square().sum(dim=1).clamp(min=1e-30))[:, None] * apart


def shares(log_p):  # the probability of each model under the weights 0.8 and 0.2
    return (log_p + torch.tensor([0.8, 0.2], dtype=log_p.dtype).log()).softmax(dim=1)


def study(steps_list, n):
    """Return estimate - exact log p, (n,), of each estimator and number of steps, and of `ss.log_prob`: exact score."""
    generator = torch.Generator().manual_seed(0)
    oracle = ss.GaussianMixture(torch.randn(6, 2, generator=generator), torch.full((6,), 0.3))
    model, errors = oracle.score_model(SDE), {}
    data = oracle.sample(n, SDE, SDE.t_min, generator=generator)
    exact = oracle.log_prob(data, SDE, SDE.t_min)
    for steps in tqdm(steps_list, "estimators", leave=False):
        sampler = ss.samplers.PredictorCorrector(ss.samplers.EulerMaruyama(), steps=steps, grid="karras")
        drawn = sampler(model, (n, 2), seeds=range(n), trajectory=True, dtype=torch.float64).trajectory
        truth = oracle.log_prob(drawn[-1], SDE, SDE.t_min)
        errors["Ito, sampling path", steps] = read(model, drawn)[1] - truth
        kernels, ito = read(model, noised(data, steps, generator)) - exact
        errors["Ito, given data", steps], errors["kernels, given data", steps] = ito, kernels
    return errors, ss.log_prob(model, data, trace=ss.Hutchinson(probes=1), seeds=range(n)).value - exact


def train(oracles, steps):
    """Return the models of the mixtures: one network, given the label 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    states = torch.cat([oracle.sample(20_000, generator=generator).float() for oracle in oracles])
    torch.manual_seed(0)
    network, identity = ss.networks.MLP(shape=2, classes=2), ss.data.Standardize(mean=0.0, std=1.0)
    data = states, torch.arange(2).repeat_interleave(20_000)
    run = ss.fit(network, data, transform=identity, steps=steps, batch_size=256, ema=0.998)
    return [run.model.given(0), run.model.given(1)]


def compare(model, oracle, n, paths, steps):
    """Return exact log p of n states; and estimate - exact by the flow, by paths of kernels, and by the bound."""
    x = oracle.sample(n, SDE, SDE.t_min, generator=(generator := torch.Generator().manual_seed(2)))
    exact = oracle.log_prob(x, SDE, SDE.t_min)
    single = read(model, noised(x.repeat(paths, 1), steps, generator))[0].reshape(paths, n)
    flow = ss.log_prob(model, x, trace=ss.ExactTrace()).value
    bound = ss.bounds.continuous_nats(model, x, draws=64, seeds=range(n)).value.detach()
    return exact, {"flow": flow - exact, "paths": single.mean(0) - exact, "bound": -bound - exact}


def draw(errors, flow, exact, trained, samples, oracles):
    figure, axes = plt.subplots(2, 3, figsize=(8.6, 5.6))
    for name in dict.fromkeys(name for name, _ in errors):
        steps = [number for other, number in errors if other == name]
        values = torch.stack([errors[name, number] for number in steps])
        spread, bias = values.std(1), values.mean(1).abs()
        axes[0, 0].plot(steps, spread, "o-", label=name)
        axes[0, 1].errorbar(steps, bias, spread / values.shape[1] ** 0.5, marker="o")
    axes[0, 0].axhline(flow.std(), color="grey", linestyle=":", label="probability flow, one probe")
    for axis, title in zip(axes[0], ("standard deviation of log p (nats)", "size of its bias (nats)"), strict=False):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", subs=[])
        axis.set(title=f"exact score: {title}", xlabel="steps", yticks=(0.1, 0.3, 1, 3), yticklabels=(0.1, 0.3, 1, 3))
    axes[0, 2].plot(exact, trained["paths"], ".", exact, trained["flow"], ".", markersize=3, alpha=0.7)
    axes[0, 2].set(title="trained model: log p - exact (nats)", xlabel="exact log p (nats)", ylim=(-1.2, 0.8))
    axes[0, 2].legend(["mean of paths", "probability flow"])
    axes[0, 0].legend(fontsize=6)
    line = torch.linspace(-2.6, 2.6, 150, dtype=torch.float64)
    for axis, (title, x) in zip(axes[1], samples.items(), strict=True):
        for oracle, colour in zip(oracles, ("#0072B2", "#D55E00"), strict=True):
            density = oracle.log_prob(torch.cartesian_prod(line, line)).exp().reshape(150, 150).T
            axis.contour(line, line, density, levels=[0.02, 0.08], colors=colour, linewidths=0.7)
        axis.plot(*x.T, "k.", markersize=1.5, alpha=0.6)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
    return figure


def main(small: bool = False, figure: Path | None = None) -> dict[str, float]:
    steps_list, n, train_steps = ((8, 32), 100, 80) if small else ((16, 32, 64, 128, 256), 1000, 3000)
    (path_steps, paths, count), (errors, flow) = (24, 2, 100) if small else (128, 16, 600), study(steps_list, n)
    last = {name: v for (name, steps), v in errors.items() if steps == steps_list[-1]} | {"flow with one probe": flow}
    figures = {f"exact score, {name}: r.m.s. error": float(v.square().mean().sqrt()) for name, v in last.items()}
    row = torch.stack([torch.linspace(-1.6, 1.6, 5), torch.zeros(5)], dim=1)
    column = row.flip(1) + torch.tensor([0.4, 0.0])
    oracles = [ss.GaussianMixture(row, torch.full((5,), 0.2)), ss.GaussianMixture(column, torch.full((5,), 0.3))]
    models = train(oracles, train_steps)
    exact, trained = compare(models[0], oracles[0], n // 4, paths, path_steps)
    for kind, v in trained.items():
        name, error = f"trained, {kind} - exact", v.std() / len(v) ** 0.5
        figures |= {name: float(v.mean()), f"{name}: error": float(error)}
    samples, generator = {}, torch.Generator().manual_seed(3)
    rules = {
        "mean of the scores": lambda log_p, means, noise, v: means.mean(dim=1),
        "OR, weights 0.8 and 0.2": lambda log_p, means, noise, v: (shares(log_p)[:, :, None] * means).sum(dim=1),
        "AND": equal,
    }
    for name, rule in tqdm(rules.items(), "superposition"):
        samples[name] = superpose(models, rule, count, 2 * path_steps, generator)[0]
        x, tracked = superpose([oracle.score_model(SDE) for oracle in oracles], rule, count, 2 * path_steps, generator)
        true = torch.stack([oracle.log_prob(x, SDE, SDE.t_min) for oracle in oracles], dim=1)
        figures[f"{name}, median |log p_1 - log p_2|"] = float(true.diff(dim=1).abs().median())
        figures[f"{name}, the same as tracked"] = float(tracked.diff(dim=1).abs().median())
        figures[f"{name}, share of p_1"] = float(shares(true)[:, 0].mean())
    print(*(f"{name:<55}{value:9.4f}" for name, value in figures.items()), sep="\n")
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        drawn = draw(errors, flow, exact, trained, samples, oracles)
    if figure or not small:
        drawn.savefig(figure or HERE / "figures" / "density_superposition.png", dpi=100)
    plt.close(drawn)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
