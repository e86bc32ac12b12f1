r"""Fine-tuning on few images: all weights, or low-rank adapters (LoRA, 2106.09685).

A model of the handwritten digits 0 to 4 learns the digits 5 to 9 from 100 images. Each weight matrix W (m, n) becomes

    W + (4 / r) U D,        U (m, r) zero at first,        D (r, n) random,

and only U and D are trained: r (m + n) numbers in place of m n. The ranks 1 and 4 are compared with the training of
all weights, from the model and from random weights, by the bits per dimension of 144 test images of the new digits,

    bits/dim  =  (E_u[-log p(T(x + u))] - log|det T'|) / (d log 2),        u uniform on [0, 1)^d,

with log p from the probability-flow ODE. The evidence bound (2107.00630) is computed during training; the step with the
lowest bound on 94 validation images gives the weights that are compared. The learning rate is 1e-3 for all weights and
3e-3 for adapters; neither was tuned. The digits are scikit-learn's: 8 x 8 pixels, 17 grey levels.

With `--checkpoint`, the model comes from a run or from a checkpoint of score_sde (2011.13456). The one in this
repository, a DDPM++ with 1.03 M parameters, was trained on all ten digits, so the new images are turned by 90 degrees.

    python examples/fine_tuning.py                                                  # 80 seconds of one core
    python examples/fine_tuning.py --checkpoint notebooks/checkpoints/digits_vp.pth
    python examples/fine_tuning.py --small                                          # seconds, and no figure
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import scoresde as ss

HERE = Path(__file__).parent
TRANSFORM = ss.data.Levels(17)
MAP = ss.DataMap(TRANSFORM, ss.Uniform())


def digits(split, classes, n=None, turned=False):
    """Return the first n images (n, 1, 8, 8) of a split with labels in `classes`, upright or turned by 90 degrees."""
    images = torch.stack([image for image, label in ss.data.Digits(split, labels=True) if int(label) in classes][:n])
    return images.rot90(int(turned), dims=(2, 3))


def new_model(seed, width, depth):
    """Return a diffusion transformer on 4 x 4 patches of 2 x 2 pixels, with random weights."""
    torch.manual_seed(seed)
    network = ss.networks.DiT(8, channels=1, patch=2, width=width, depth=depth, heads=4)
    return ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(sigma_data=0.5))


def loaded(path):
    """Return the model of a run, if `path` is a directory, or of a checkpoint of score_sde."""
    run = ss.load(path) if Path(path).is_dir() else ss.convert.score_sde(path)
    if run.transform != TRANSFORM:
        raise ValueError(f"{path} must be a model of images in {TRANSFORM}; got {run.transform}: use one of the digits")
    return run.model


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


def draw(curves, rows):
    """Draw the bound against steps, and the difference in bits/dim against trained parameters."""
    figure = plt.figure(figsize=(6.8, 2.8))
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(curve[:, 0], curve[:, 2], ".-", label=name)
    first, last = curves["all weights"][[0, -1], 2].tolist()
    left.set(xlabel="steps", ylabel="bound (bits/dim)", title="test images, during training")
    left.set_ylim(last - 0.05, first + 0.35)
    left.legend()
    reference = rows["all weights"][1]
    for i, name in enumerate(curves):
        count, value = rows[name]
        change = value.per_image - reference.per_image
        error = 1.96 * change.std() / len(change) ** 0.5
        right.errorbar(count, change.mean(), error, marker="o", linestyle="", color=f"C{i}", label=name)
    right.axhline(rows["not fine-tuned"][1].mean - reference.mean, color="grey", linestyle=":", label="not fine-tuned")
    right.set(xscale="log", xlim=(1e3, 3 * rows["all weights"][0]), xlabel="trained parameters")
    right.set_ylabel("difference in bits/dim")
    right.set_title("test images, against all weights")
    right.legend(loc="upper left")
    return figure


def main(small: bool = False, checkpoint: str | Path | None = None) -> dict[str, float]:
    """Train or load a model, fine-tune it in each way, print and return the figures by name."""
    before, steps, every, draws = (80, 20, 20, 4) if small else (1000, 300, 25, 8)
    ranks, size = ((1,), (32, 2)) if small else ((1, 4), (32, 3))
    old, new = range(5), range(5, 10)
    turned, curves, rows, figures = checkpoint is not None, {}, {}, {}
    images, validation = digits("train", new, 100, turned), digits("validation", new, 24 if small else None, turned)
    test = digits("test", new, 12 if small else None, turned)
    if checkpoint is None:
        base = train(new_model(0, *size), digits("train", old), before, decay="cosine")
    else:
        base = loaded(checkpoint)

    def measure(name, model, count):
        settings = {"solver": ss.solvers.Adams(16 if small else 80), "seeds": range(len(test)), "progress": True}
        value = ss.bits_per_dim(model, test, TRANSFORM, dequantization=ss.Uniform(), **settings)
        rows[name] = count, value
        figures.update({f"{name}: bits/dim": value.mean, f"{name}: error": value.stderr, f"{name}: trained": count})

    names = ["all weights", *(f"LoRA, rank {rank}" for rank in ranks)]
    for name in names if checkpoint else [*names, "from random weights"]:
        model, rate = new_model(1, *size) if name == "from random weights" else deepcopy(base), 1e-3
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
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        figure = draw(curves, rows)
        if not small:
            figure.savefig(HERE / "figures" / f"fine_tuning{'_checkpoint' * turned}.png", dpi=130)
        plt.close(figure)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--checkpoint", help="start from this run or checkpoint of score_sde; new images are turned")
    main(**vars(parser.parse_args()))
