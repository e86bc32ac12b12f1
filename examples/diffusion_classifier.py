"""A diffusion model as a classifier, beside a discriminative network of equal size, on corrupted digits.

A conditional diffusion model p(x | y) classifies by Bayes' rule, without having been trained to:

    p(y | x) = p(x | y) p(y) / sum_k p(x | k) p(k).

`ss.classify` has two estimates of log p(x | y):

    bound   minus the evidence bound, a mean of denoising errors over noise levels (Diffusion Classifier, 2303.16203)
    flow    the exact log-density of the probability flow (2011.13456, section 4.3), the exact generative classifier

The discriminative network has the same layers and is trained by cross-entropy: once on clean digits, and once on digits
at the noise levels that the diffusion model is trained on. All see clean or noisy digits alone, and are tested
on digits with noise, blur and occlusion. Accuracy says how often the best class is right; the log score, the mean of
-log p(y | x), and the calibration error say how far the probabilities can be trusted.

    python examples/diffusion_classifier.py            # about 2 minutes
    python examples/diffusion_classifier.py --small    # seconds, and no figure
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F
from tqdm import tqdm

import scoresde as ss
from scoresde.metrics import accuracy, calibration, log_score

HERE = Path(__file__).parent
LEVELS = ss.data.Levels(17)  # grey levels 0 .. 16 to [-1, 1]
SEVERITIES = {"noise": (0, 3, 5, 8), "blur": (0, 0.6, 0.9, 1.2), "occlusion": (0, 3, 4, 5)}
UNITS = {"noise": "standard deviation (grey levels)", "blur": "width (pixels)", "occlusion": "side of square (pixels)"}
METHODS = ("flow", "bound", "discriminative", "discriminative, noisy")


def corrupted(x, kind, severity, seed=0):
    """Digits (N, 1, 8, 8), again with whole grey levels 0 .. 16: Gaussian noise, Gaussian blur, or a grey square."""
    rng = np.random.default_rng(seed)
    if severity == 0:
        return x
    if kind == "noise":
        x = x + severity * torch.from_numpy(rng.normal(size=x.shape)).float()
    elif kind == "blur":
        x = torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, severity, severity)))
    else:
        x = x.clone()
        for picture, (i, j) in zip(x, rng.integers(0, 9 - severity, (len(x), 2)), strict=True):
            picture[:, i : i + severity, j : j + severity] = 8
    return x.round().clamp(0, 16)


def train_generative(width, steps):
    """A model of p(x | y): digits of a given class, with uniform dequantisation."""
    torch.manual_seed(0)
    network = ss.networks.MLP((1, 8, 8), width=width, depth=3, dropout=0.1, classes=10)
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(0.7))
    data = ss.data.Digits("fit", labels=True)
    settings = {"warmup": min(100, steps // 10), "ema": 1 - 15 / steps, "preview": lambda *_: None}
    return ss.fit(model, data, steps=steps, learning_rate=2e-3, transform=LEVELS, **settings).model


def train_discriminative(x, y, sde, width, steps, noisy):
    """The same layers with ten logits at the end; `noisy`: at noise levels sigma/alpha with log ~ N(-1, 1.4^2)."""
    torch.manual_seed(0)
    network = ss.networks.MLP(64, width=width, depth=3, dropout=0.1, out_channels=10)
    classifier = ss.NoisyClassifier(network, sde, ss.predictions.KarrasPreconditioning(0.7), classes=10)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times, start = ss.losses.LogNormal(-1.0, 1.4), torch.tensor(sde.t_min, dtype=torch.float64)
    for _ in tqdm(range(steps), "cross-entropy" + noisy * ", noisy", disable=None):
        rows = torch.randint(len(x), (128,))
        t = times.quantile(sde, torch.rand(128, dtype=torch.float64)) if noisy else start
        state = LEVELS(x[rows] + torch.rand(128, 1, 8, 8) - 0.5).flatten(1)  # uniform dequantisation, for both
        loss = F.cross_entropy(classifier(sde.perturb(state, t, torch.randn_like(state)), t), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def posteriors(model, classifiers, x, estimates):
    """log p(y | x) (N, 10) by method."""
    digits, seeds = torch.arange(10), range(len(x))
    found = {}
    for method, options in estimates.items():
        found[method] = ss.classify(model, x, digits, method, transform=LEVELS, seeds=seeds, **options).log_posterior
    with torch.no_grad():
        for method, classifier in zip(METHODS[2:], classifiers, strict=True):
            found[method] = classifier(LEVELS(x).flatten(1), model.sde.t_min).double().log_softmax(dim=1)
    return found


def draw(results, x, labels):
    """A digit at all severities; accuracy and log score against severity; calibration of all corrupted digits."""
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        figure, axes = plt.subplots(2, 4, figsize=(9.6, 4.6))
        shown = [torch.cat([corrupted(x, kind, s)[2, 0] for s in SEVERITIES[kind]], dim=1) for kind in SEVERITIES]
        axes[0, 0].imshow(torch.cat(shown), cmap="gray_r", vmin=0, vmax=16)
        axes[0, 0].set(title="a test digit at the severities", xticks=[], yticks=[3.5, 11.5, 19.5])
        axes[0, 0].set_yticklabels(SEVERITIES)
        axes[0, 0].tick_params(length=0)
        for i, method in enumerate(METHODS):
            colour, offset = f"C{i}", 0.04 * (i - 1.5)
            for column, (kind, severities) in enumerate(SEVERITIES.items(), start=1):
                at, logs = np.arange(len(severities)) + offset, [results[kind, s][method] for s in severities]
                shares = [accuracy(log, labels) for log in logs]
                low, high = zip(*((s.value - s.low, s.high - s.value) for s in shares), strict=True)
                axes[0, column].errorbar(
                    at, [s.value for s in shares], (low, high), color=colour, label=method, fmt=".-"
                )
                scores = [log_score(log, labels) for log in logs]
                axes[1, column].errorbar(at, *zip(*scores, strict=True), color=colour, fmt=".-")
                axes[0, column].set(title=kind, ylim=(0, 1.02), xticks=range(len(severities)), xticklabels=severities)
                axes[1, column].set(yscale="log", ylim=(0.02, 20), xticks=range(len(severities)))
                axes[1, column].set(xticklabels=severities, xlabel=UNITS[kind])
            pooled, repeated = pool(results, method, labels)
            bins = calibration(pooled, repeated).bins
            axes[1, 0].plot([b.confidence for b in bins], [b.accuracy.value for b in bins], ".-", color=colour)
        axes[1, 0].plot([0, 1], [0, 1], color="grey", linewidth=0.7)
        axes[1, 0].set(title="calibration, all corruptions", xlabel="confidence", ylabel="accuracy")
        axes[0, 1].set_ylabel("accuracy")
        axes[1, 1].set_ylabel("log score (nats)")
        axes[0, 1].legend(loc="lower left")
        figure.savefig(HERE / "figures" / "diffusion_classifier.png", dpi=110)
        plt.close(figure)


def pool(results, method, labels):
    """Log-posteriors of all corrupted digits together, and their labels."""
    logs = [found[method] for (_, severity), found in results.items() if severity]
    return torch.cat(logs), labels.repeat(len(logs))


def main(small: bool = False) -> dict[str, float]:
    """Train, classify clean and corrupted digits, print accuracies and log scores, and return the figures by name."""
    width, steps, count, kinds = (64, 120, 16, ("blur",)) if small else (192, 1500, 100, tuple(SEVERITIES))
    estimates = {"flow": {"trace": ss.Hutchinson(probes=1)}, "bound": {"draws": 64}}
    if small:
        estimates["flow"]["solver"] = ss.solvers.Adams(10, data_scale=0.7)
        estimates["bound"] = {"draws": 16, "rounds": 1}
    model = train_generative(width, steps)
    x, y = (torch.stack(part) for part in zip(*ss.data.Digits("fit", labels=True), strict=True))
    classifiers = [train_discriminative(x, y, model.sde, width, steps, noisy) for noisy in (False, True)]
    test, labels = (torch.stack(part)[:count] for part in zip(*ss.data.Digits("test", labels=True), strict=True))
    clean = posteriors(model, classifiers, test, estimates)
    cases = [(kind, s) for kind in kinds for s in (SEVERITIES[kind][:2] if small else SEVERITIES[kind])]
    results = {
        (kind, s): posteriors(model, classifiers, corrupted(test, kind, s), estimates) if s else clean
        for kind, s in tqdm(cases, "classifying", disable=None)
    }
    figures = {"parameters": float(sum(p.numel() for p in model.network.parameters()))}
    figures["parameters, discriminative"] = float(sum(p.numel() for p in classifiers[0].parameters()))
    for method in METHODS:
        (pooled, repeated), right = pool(results, method, labels), accuracy(clean[method], labels)
        share, (score, error) = accuracy(pooled, repeated), log_score(pooled, repeated)
        ece = calibration(pooled, repeated).ece
        print(
            f"{method}: clean {right.value:.1%} ({right.low:.1%} to {right.high:.1%}); corrupted {share.value:.1%} "
            f"({share.low:.1%} to {share.high:.1%}), log score {score:.2f} +- {error:.2f} nats, ECE {ece:.3f}"
        )
        figures |= {f"{method}: clean": right.value, f"{method}: corrupted": share.value}
        figures |= {f"{method}: log score": score, f"{method}: calibration error": ece}
        for kind in kinds:
            logs = [results[kind, s][method] for s in SEVERITIES[kind] if (kind, s) in results and s]
            figures[f"{method}: {kind}"] = accuracy(torch.cat(logs), labels.repeat(len(logs))).value
    if not small:
        draw(results, test, labels)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
