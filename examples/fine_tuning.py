r"""Fine-tuning on few images: all weights, or low-rank adapters (LoRA, 2106.09685).

A model of the handwritten digits 0 to 4 learns the digits 5 to 9 from 100 images. Each weight matrix W (m, n) becomes

    W + (4 / r) U D,        U (m, r) zero at first,        D (r, n) random,

and only U and D are trained: r (m + n) numbers in place of m n. The ranks 1 and 4 are compared with the training of
all weights, from the model and from random weights, by the bits per dimension of 144 test images of the new digits,

    bits/dim  =  (E_u[-log p(T(x + u))] - log|det T'|) / (d log 2),        u uniform on [0, 1)^d,

with log p from the probability-flow ODE. The evidence bound (2107.00630) is computed during training: the step with the
lowest bound on the validation images gives the weights that are compared, and the bound on the test images shows where
each choice begins to overfit. The learning rate is 1e-3 for all weights and 3e-3 for adapters; neither was tuned. The
digits are scikit-learn's: 8 x 8 pixels, 17 grey levels.

    python examples/fine_tuning.py            # about 4 minutes
    python examples/fine_tuning.py --small    # ten seconds
"""

import argparse
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import scoresde as ss

HERE = Path(__file__).parent
TRANSFORM = ss.data.Levels(17)
MAP = ss.DataMap(TRANSFORM, ss.Uniform())


def digits(split, classes, n=None):
    """Return the first n images of a split with labels in `classes`."""
    data = ss.data.Digits(split, labels=True)
    return torch.stack([data[i][0] for i in range(len(data)) if int(data[i][1]) in classes][:n])


def new_model(seed, width, depth):
    """Return a diffusion transformer on 4 x 4 patches of 2 x 2 pixels, with random weights."""
    torch.manual_seed(seed)
    network = ss.networks.DiT(8, channels=1, patch=2, width=width, depth=depth, heads=4)
    return ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(sigma_data=0.5))


def train(model, images, steps, **settings):
    """Train all parameters that require a gradient."""
    settings = {"decay": "none", "ema": 0.99, "transform": TRANSFORM, **settings}
    return ss.fit(model, images, steps=steps, batch_size=64, **settings).model


def bound(model, images, draws):
    """Return the bound on -log p of each image in bits/dim, (N,), with the same draws for every model."""
    with torch.no_grad():
        nats = ss.bounds.continuous_nats(model, images, draws=draws, seeds=range(len(images)), data_map=MAP).value
    return nats / (images[0].numel() * torch.tensor(2.0).log())


def tune(model, images, held_out, steps, every, draws, **settings):
    """Train a model, and return what was seen.

    Returns:
        curve: the step, the validation bound and the test bound in bits/dim, a row for each evaluation.
        best: the weights with the lowest validation bound.
    """
    curve, best = [], None

    def evaluate(now, step):
        nonlocal best
        validation, test = (float(bound(now, part, draws).mean()) for part in held_out)
        if not curve or validation < min(row[1] for row in curve):
            best = deepcopy(now.state_dict())
        curve.append((step, validation, test))

    evaluate(model.eval(), 0)
    train(model.train(), images, steps, preview=evaluate, preview_every=every, warmup=0, **settings)
    return torch.tensor(curve, dtype=torch.float64), best


def draw(curves, rows, images, samples):
    """Draw the bound against steps, bits/dim against trained parameters, and samples before and after."""
    figure = plt.figure(figsize=(8.6, 2.9))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1.25, 0.85])
    for name, curve in curves.items():
        left.plot(curve[:, 0].clamp(min=6), curve[:, 2], ".-", label=name)
    left.set(xscale="log", xlabel="steps", ylabel="bound (bits/dim)", title="test images of 5 to 9, during training")
    left.set_ylim(top=float(curves["all weights"][0, 2]) + 0.3)
    left.legend()
    for i, (name, (count, b)) in enumerate(rows.items()):
        middle.errorbar(count, b.mean, 1.96 * b.stderr, marker="o", linestyle="", color=f"C{i}")
        middle.annotate(name, (count, b.mean), (4, 4), textcoords="offset points", fontsize=6.5)
    middle.set(xscale="log", xlabel="trained parameters", ylabel="bits/dim", title="log-likelihood, best step")
    middle.margins(x=0.25)
    parts = {"0 to 4": samples["before"], "100 images": images, "after": samples["after"]}
    strips = [torch.cat([*part[:12].reshape(2, 6, 8, 8).flatten(0, 1)], 1).reshape(8, 2, 48) for part in parts.values()]
    right.imshow(torch.cat([strip.transpose(0, 1).reshape(16, 48) for strip in strips]), cmap="gray_r", vmin=0, vmax=16)
    right.set(xticks=[], yticks=[7.5, 23.5, 39.5], title="samples before, data, samples after")
    right.set_yticklabels(parts, rotation=90, va="center")
    for y in (15.5, 31.5):
        right.axhline(y, color="C1", linewidth=0.8)
    return figure


def main(small: bool = False) -> dict[str, float]:
    before, steps, every, draws = (80, 20, 10, 4) if small else (1000, 300, 25, 8)
    ranks, size = ((1,), (32, 2)) if small else ((1, 4), (32, 3))
    old, new = range(5), range(5, 10)
    images, validation = digits("train", new, 100), digits("validation", new)
    test = digits("test", new, 12 if small else None)
    base = train(new_model(0, *size), digits("train", old), before, decay="cosine")
    start, curves, rows, figures, tuned = deepcopy(base.state_dict()), {}, {}, {}, {}

    def measure(name, model, count):
        value = ss.bits_per_dim(model, test, TRANSFORM, dequantization=ss.Uniform(), seeds=range(len(test)))
        rows[name], tuned[name] = (count, value), model
        figures.update({f"{name}: bits/dim": value.mean, f"{name}: error": value.stderr, f"{name}: trained": count})

    for name in ("all weights", *(f"LoRA, rank {rank}" for rank in ranks), "from random weights"):
        model = new_model(1, *size)
        if name != "from random weights":
            model.load_state_dict(start)
        rate = 1e-3
        if name.startswith("LoRA"):
            torch.manual_seed(2)
            ss.networks.add_lora(model.network, rank=int(name.split()[-1]), scale=4.0)
            rate = 3e-3
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        curves[name], best = tune(model, images, (validation, test), steps, every, draws, learning_rate=rate)
        model.load_state_dict(best)
        figures[f"{name}: best step"] = float(curves[name][curves[name][:, 1].argmin(), 0])
        figures[f"{name}: bound, first step"] = float(curves[name][0, 2])
        figures[f"{name}: bound, last step"] = float(curves[name][-1, 2])
        measure(name, model, count)
    measure("not fine-tuned", base, 0)
    reference = rows["all weights"][1].per_image
    for name, (_, b) in rows.items():
        difference = b.per_image - reference
        figures[f"{name} - all weights"] = float(difference.mean())
        figures[f"{name} - all weights: error"] = float(difference.std() / len(test) ** 0.5)
    print(*(f"{name:<45}{value:12.4f}" for name, value in figures.items()), sep="\n")
    sampler = partial(ss.samplers.DDIM(), shape=(12, 1, 8, 8), seeds=range(12), steps=10 if small else 100)
    shown = {"before": base, "after": tuned[f"LoRA, rank {ranks[-1]}"]}
    samples = {name: TRANSFORM.inverse(sampler(m).x) for name, m in shown.items()}
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        figure = draw(curves, {k: v for k, v in rows.items() if v[0]}, images, samples)
        if not small:
            figure.savefig(HERE / "figures" / "fine_tuning.png", dpi=130)
        plt.close(figure)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
