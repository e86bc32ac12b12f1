"""Features of a diffusion model: correspondence between pictures, and segmentation without labels.

The layers of a trained denoiser know parts of pictures. The features of a picture x_0 at noise level t are

    f = output of a layer of the network at x_t = alpha(t) x_0 + sigma(t) eps,          model.features(x_t, t, at=layer)

The pictures are drawn people (OpenMoji) whose parts (clothes, hair, skin, background) are known from the shapes of the
SVG files. The model is trained on other people, without parts. Accuracy is the mean of that of the four parts.

    correspondence   each pixel of a mirrored and shifted picture takes the part of the pixel of another picture with
                     the most similar features (DIFT, 2306.03881)
    segmentation     k-means of the features of all pictures; each cluster is named after the part that it covers most
    modulation       masks of 8 x 8 pixels, the clusters of a coarse layer, become masks of 16 x 16 pixels: a pixel goes
                     to the cluster k with the largest |D(f + c M_k) - D(f - c M_k)|, with M_k the mask of the cluster
                     and D the denoised picture (EmerDiff, 2401.11739, section 3.3), here relative to its mean in M_k

    python examples/features.py            # 7 minutes; --run runs/openmoji_cond: a model trained for 19 minutes
    python examples/features.py --small    # seconds, and no figure
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.cluster import KMeans
from torch.nn import functional as F
from tqdm import tqdm

import scoresde as ss
from scoresde.data.openmoji import CREDIT, SHAPES

HERE = Path(__file__).parent
PEOPLE = {"tone": ["light", "medium-light", "medium", "medium-dark", "dark"]}
LAYERS = ("down.8x8.block0", "up.8x8.block1", "up.16x16.block0")
COARSE, FINE, CLUSTERS, OTHERS = "up.8x8.block1", "up.16x16.block0", 16, 8  # OTHERS: number of sources of a target
COLOURS = np.array([[255, 255, 255], [86, 180, 233], [230, 159, 0], [213, 94, 0]]) / 255  # of SHAPES
LEVELS = ss.data.Levels(256)


def train(root, width, steps, batch):
    """A small unconditional model of people at 16 x 16."""
    torch.manual_seed(0)
    style, label = ss.networks.BlockStyle(dropout=0.0), ss.networks.PositionalEmbedding(width, 100.0)
    network = ss.networks.UNet(
        16, width=width, multipliers=(1, 2, 2), blocks=1, attention=[8], block=style, label=label
    )
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(0.53))
    data = ss.data.OpenMoji(16, "train", only=PEOPLE, flip=True, root=root)
    settings = {"warmup": min(100, steps // 6), "decay": "none", "ema": min(0.997, 1 - 3 / steps)}
    settings |= {"loss": ss.losses.DenoisingScoreMatching("karras"), "transform": LEVELS, "preview": lambda *_: None}
    return ss.fit(model, data, steps=steps, batch_size=batch, learning_rate=2e-3, **settings).model


def with_random_weights(model):
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in (parameter for parameter in model.network.parameters() if parameter.ndim > 1):
        torch.nn.init.kaiming_normal_(weight, a=1, generator=generator)
    return model


def held_out_people(root):
    """Pictures (N, 3, 16, 16) in [-1, 1] and parts (N, 16, 16), each part at least 3%."""
    splits = [ss.data.OpenMoji(16, split, only=PEOPLE, root=root) for split in ("validation", "test")]
    pictures, parts = torch.cat([torch.stack(list(d)) for d in splits]), torch.cat([d.parts() for d in splits])
    shares = torch.stack([(parts == k).float().mean(dim=(1, 2)) for k in range(len(SHAPES))])
    return LEVELS(pictures[shares.amin(dim=0) > 0.03]), parts[shares.amin(dim=0) > 0.03]


def moved(pictures, parts, generator):
    """Mirror images, shifted by up to three pixels in both directions."""
    both = torch.cat([pictures, parts[:, None].float()], dim=1).flip(-1) - torch.tensor([1.0, 1, 1, 0])[:, None, None]
    shifts = torch.randint(0, 7, (len(both), 2), generator=generator)
    both = torch.stack([F.pad(p, (3,) * 4)[:, i : i + 16, j : j + 16] for p, (i, j) in zip(both, shifts, strict=True)])
    return both[:, :3] + 1, both[:, 3].long()


def perturbed(model, x, t, seed=0):
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
    return model.sde.perturb(x, t, noise.expand(x.shape))


def features(model, x, t, layers, draws=4):
    """The outputs of the layers at noise level t by name, averaged over draws of the noise."""
    with torch.no_grad():
        found = [model.features(perturbed(model, x, t, draw), t, at=layers) for draw in range(draws)]
    return {name: sum(outputs[name] for outputs in found) / draws for name in layers}


def per_pixel(f, size=16):
    """Features (N, size^2, C) of unit length at every pixel, after subtraction of their mean."""
    f = F.interpolate(f, size=size, mode="bilinear").flatten(2).mT
    return F.normalize(f - f.mean(dim=(0, 1)), dim=2)


def balanced(predicted, true):
    """Accuracy, the mean over parts, of pictures (N, ...), and its standard error by 200 bootstraps of the pictures."""
    is_part, rng, n = F.one_hot(true, len(SHAPES)), np.random.default_rng(0), len(true)
    total, right = (c.flatten(1, -2).sum(1) for c in (is_part, is_part * (predicted == true)[..., None]))
    draws = (slice(None), *(rng.integers(0, n, n) for _ in range(200)))
    shares = [float((right[rows].sum(0) / total[rows].sum(0)).mean()) for rows in draws]
    return shares[0], np.std(shares[1:])


def matched_parts(f, parts):
    """The parts that N targets, the second half of f, take from others among the N sources, (N, OTHERS, 256)."""
    n = len(parts)
    rows = [(i + 1 + 5 * torch.arange(OTHERS)) % n for i in range(n)]
    nearest = [torch.einsum("tc,jsc->jts", f[n + i], f[j]).argmax(dim=2) for i, j in enumerate(rows)]
    return torch.stack([parts[j].flatten(1).gather(1, near) for j, near in zip(rows, nearest, strict=True)])


def clusters(f):
    """The cluster of every row of f (N, P, C), int64 (N, P)."""
    means = KMeans(CLUSTERS, n_init=1, max_iter=40, random_state=0).fit(f.flatten(0, 1).numpy())
    return torch.from_numpy(means.labels_).long().reshape(f.shape[:2])


def named(cluster, parts):
    """Clusters (N, P) as parts: the part of whose pixels the cluster has the largest share."""
    overlap = torch.stack([F.one_hot(cluster[parts.flatten(1) == k], CLUSTERS).float().mean(0) for k in range(4)])
    return overlap.argmax(dim=0)[cluster]


def modulated(model, x, t, coarse, strength=10.0):
    """The cluster (N, 256) on whose features each pixel of the denoised picture depends most; coarse: (N, 8, 8)."""
    state, changes = perturbed(model, x, t), []
    for k in range(CLUSTERS):
        mask = strength * (coarse == k).float()[:, None]
        with torch.no_grad():
            up, down = (ss.Modulated(model, COARSE, lambda y, m=m: y + m).denoise(state, t) for m in (mask, -mask))
        change, inside = (up - down).square().sum(dim=1), F.interpolate(mask, size=16)[:, 0]
        changes.append(change / ((change * inside).sum() / inside.sum()))
    return torch.stack(changes, dim=1).argmax(dim=1).flatten(1)


def draw(curves, baselines, ratios, pictures):
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        left, right = (figure := plt.figure(figsize=(9.6, 3.4))).subfigures(1, 2, width_ratios=(1.05, 1))
        for axis, kind in zip(left.subplots(1, 2, sharey=True), curves, strict=True):
            for layer, values in curves[kind].items():
                axis.errorbar(ratios, *np.array(values).T, fmt=".-", label=layer)
            for style, (label, value) in zip(("--", ":"), baselines[kind].items(), strict=True):
                axis.axhline(value[0], color="black", linestyle=style, linewidth=0.8, label=label)
            axis.set(title=f"accuracy of {kind}", xscale="log", xlabel=r"noise level $\sigma/\alpha$")
        left.axes[0].legend(fontsize=6, loc="upper left")
        for axis, (title, images) in zip(right.subplots(len(pictures), 1), pictures.items(), strict=True):
            some = images[::6][:9]
            some = some.permute(0, 2, 3, 1).numpy() / 2 + 0.5 if some.ndim == 4 else COLOURS[some.reshape(-1, 16, 16)]
            axis.imshow(np.concatenate([np.pad(p, ((1, 1), (1, 1), (0, 0)), constant_values=1) for p in some], axis=1))
            axis.text(-0.01, 0.5, title, ha="right", va="center", transform=axis.transAxes)
            axis.axis("off")
        figure.text(0.995, 0.002, CREDIT, ha="right", fontsize=5)
        figure.savefig(HERE / "figures" / "features.png", dpi=120)
        plt.close(figure)


def main(small: bool = False, run: str | None = None, root: str = "datasets/openmoji") -> dict[str, float]:
    model = ss.load(run).model if run else train(root, *((8, 24, 16) if small else (32, 2400, 16)))
    x, parts = (part[: 16 if small else None] for part in held_out_people(root))
    y, targets = moved(x, parts, torch.Generator().manual_seed(0))
    both, n, true = torch.cat([x, y]), len(x), targets.flatten(1)[:, None].expand(-1, OTHERS, -1)
    ratios = (0.1, 0.8) if small else (0.03, 0.1, 0.2, 0.4, 1.0)
    times = [float(model.sde.time(torch.tensor(-2 * np.log(ratio)))) for ratio in ratios]
    kinds = {
        "correspondence": lambda f: balanced(matched_parts(f, parts), true),
        "segmentation": lambda f: balanced(named(clusters(f[:n]), parts), parts.flatten(1)),
    }
    rgb, random = per_pixel(both), per_pixel(features(with_random_weights(model), both, times[0], [FINE])[FINE])
    baselines = {kind: {"pixels": measure(rgb), "random weights": measure(random)} for kind, measure in kinds.items()}
    curves = {kind: {layer: [] for layer in (*LAYERS, "both up")} for kind in kinds}
    for t in tqdm(times, "noise levels", disable=None):
        f = {layer: per_pixel(output) for layer, output in features(model, both, t, LAYERS).items()}
        f["both up"] = torch.cat([f[COARSE], f[FINE]], dim=2)
        for kind, measure in kinds.items():
            curves[kind] = {layer: [*values, measure(f[layer])] for layer, values in curves[kind].items()}
    f = features(model, both, times[-2], (COARSE, FINE))
    fine = torch.cat([*map(per_pixel, f.values())], dim=2)
    coarse = clusters(per_pixel(f[COARSE], 8)[:n]).reshape(n, 8, 8)
    repeated = named(coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1), parts)
    sharp = named(modulated(model, x, times[-2], coarse), parts)
    figures = {"8 x 8": balanced(repeated, parts.flatten(1)), "modulated": balanced(sharp, parts.flatten(1))}
    for kind in kinds:
        figures[kind] = max(max(values) for values in curves[kind].values())  # of the best layer and noise level
        figures |= {f"{kind}: {label}": value for label, value in baselines[kind].items()}
    print(*(f"{name}: {value:.3f} +- {error:.3f}" for name, (value, error) in figures.items()), sep="\n")
    if not small:
        rows = {"picture": x, "parts": parts, "k-means": named(clusters(fine[:n]), parts), "8 x 8": repeated}
        rows |= {"modulated": sharp, "moved": y, "matched": matched_parts(fine, parts)[:, 0]}
        draw(curves, baselines, ratios, rows)
    return {name: float(value) for name, (value, _) in figures.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--run", help="a run on the same pictures, to use in place of training")
    main(**vars(parser.parse_args()))
