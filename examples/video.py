r"""Video diffusion of moving digits: joint training on videos and images, prediction, filling in, bits (2204.03458).

Two of scikit-learn's digits, 8 x 8 pixels in five grey levels, move two pixels a frame on each axis, bounce off the
walls of a frame of 16 x 16, and hide each other. A video is a state (1, T, 16, 16). The network is a U-Net on patches
of 2 x 2 pixels (2207.04316), with a convolution (2209.14792) and attention over frames after each block
(`ss.networks.VideoNetwork`). It is trained once on videos of 6 frames, pairs of videos of 3 frames, and 6 independent
images (the condition "clips" keeps frames of different clips apart), with all frames, the later ones or those in
between hidden, the others being a condition. The one network then gives samples of any length, p(future | past), and
later frames and frames in between given the others: by its condition, or by `ss.inverse` from the unconditional model.

Bits per dimension are evidence bounds (2107.00630), with standard errors over test videos of digits not trained on. The
digits of a predicted frame, located by the best match among all 81 x 81 places, have a distance to their true places,
which is compared with that of digits that stop moving.

    python examples/video.py            # train, predict, print the table, save examples/figures/video.png
    python examples/video.py --small    # seconds: a short training, few videos
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import scoresde as ss

HERE = Path(__file__).parent
SIDE, DIGIT, FRAMES, PAST = 16, 8, 6, 3  # pixels of a frame and of a digit; frames of a video, and of its past
SPEED, SPAN, LEVELS, TRANSFORM = 2, SIDE - DIGIT, 5, ss.data.Levels(5)  # speed: pixels a frame on each axis
BEFORE, AROUND = (0, 1, 2), (0, 1, 4, 5)  # frames that are known in prediction and in filling in
SAMPLER = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(), steps=20)


def videos(split, n, seed):
    """Return n videos (n, 1, T, 16, 16) in grey levels, their digits (n, 2, 8, 8), the nearer last, and their places.

    The places (n, T, 2, 2) are row and column of the upper left corner.
    """
    generator = torch.Generator().manual_seed(seed)
    images = (ss.data.Digits(split).images[:, 0] / 16 * (LEVELS - 1)).round()
    digits = images[torch.randint(len(images), (n, 2), generator=generator)]
    phase = torch.randint(2 * SPAN, (n, 1, 2, 2), generator=generator)
    places = SPAN - ((phase + SPEED * torch.arange(FRAMES)[:, None, None]) % (2 * SPAN) - SPAN).abs()
    return drawn(digits[:, None], places)[:, None], digits, places


def drawn(digits, places):
    """Draw digits (n, 1, 2, 8, 8) at places (n, T, 2, 2): frames (n, T, 16, 16)."""
    n, frames = places.shape[:2]
    canvas, at = torch.zeros(n, frames, SIDE, SIDE), places[..., None] + torch.arange(DIGIT)
    first, second = torch.arange(n)[:, None, None, None], torch.arange(frames)[:, None, None]
    for k in range(2):
        index = first, second, at[:, :, k, 0, :, None], at[:, :, k, 1, None, :]
        canvas[index] = torch.where(digits[:, :, k] > 0, digits[:, :, k], canvas[index])
    return canvas


def mixture(n):
    """Return n states of the training with their clips: 5/8 videos, 1/4 two short videos each, 1/8 images."""
    x, clips = videos("train", n, seed=0)[0], torch.full((n, FRAMES), -1)  # -1: all frames are one video
    pairs, images = slice(0, n // 4), slice(n // 4, 3 * n // 8)
    x[pairs, :, PAST:] = x[pairs, :, PAST:].roll(1, 0)
    clips[pairs] = torch.arange(FRAMES) // PAST
    order = torch.randperm(n // 8 * FRAMES, generator=torch.Generator().manual_seed(1))
    x[images] = x[images].flatten(0, 2)[order].reshape(-1, 1, FRAMES, SIDE, SIDE)
    clips[images] = torch.arange(FRAMES)
    return x.byte(), {"clips": clips}


def train(width, steps, n, run):
    """Train the network on the mixture, with random frames hidden, and return the model."""
    torch.manual_seed(0)
    parts = {"label": ss.networks.PositionalEmbedding(width, 100.0), "block": ss.networks.BlockStyle(dropout=0.0)}
    parts["conditions"] = ss.networks.Conditions(cond_channels=2)
    parts["ends"] = ss.networks.Ends(patch=2)
    image = ss.networks.UNet(SIDE, 1, width, multipliers=(1,), blocks=1, out_channels=LEVELS, **parts)
    network = ss.networks.VideoNetwork(image, heads=2, clips=True, kernel=7)
    network = ss.networks.LevelHead(network, levels=LEVELS, sigma_data=0.85)
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.Denoiser())
    masks = ss.losses.RandomMasks(box=0, half=0, strokes=0, hidden=1, frames=5)
    score_matching = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting(sigma_data=0.5, mean=1.2, std=1.4))
    settings = {"batch_size": 8, "optimizer": partial(torch.optim.Adam, lr=7e-3, fused=True), "ema": 0.98}
    loss = ss.losses.InpaintingObjective(score_matching, masks)
    warmup = min(100, steps // 4)
    return ss.fit(model, mixture(n), run, steps=steps, warmup=warmup, loss=loss, transform=TRANSFORM, **settings).model


def known(frames):
    """Return a mask (1, T, 16, 16) that is true in the known frames."""
    return torch.isin(torch.arange(FRAMES), torch.tensor(frames))[:, None, None].expand(1, -1, SIDE, SIDE)


def bits(model, test, draws):
    """Return the bounds in bits/dim of videos, of images, of the future alone and of the future given the past."""
    mask = known(BEFORE)
    operator = ss.inverse.Inpainting(mask)
    given = ss.inverse.TrainedInpainting(model, operator, operator(TRANSFORM(test + 0.5)))
    images = model.given({"clips": torch.arange(FRAMES).expand(len(test), -1)})
    cases = {
        "video": (model, test),
        "video as independent images": (images, test),
        "future": (model, test[:, :, PAST:]),
        "future given past": (ss.inverse.HiddenEntries(given), test[:, ~mask]),
    }
    return {name: ss.bounds.continuous(m, x.long(), TRANSFORM, draws=draws) for name, (m, x) in cases.items()}


def restored(model, test, frames, method, **options):
    """Draw the hidden frames of videos given the known ones; return all frames, (n, 1, T, 16, 16) in grey levels."""
    mask, settings = known(frames), {"sampler": SAMPLER, "seeds": range(len(test)), **options}
    operator = ss.inverse.Inpainting(mask)
    y = operator(TRANSFORM(test + 0.5))
    x = ss.inverse.sample_posterior(model, operator, y, len(test), method, shape=mask.shape, **settings).x
    return torch.where(mask, test, TRANSFORM.quantise(x))


def distances(predictions, digits, places):
    """Return the mean distance of the digits of frames (n, 1, T, 16, 16) to their true places, (n, T), in pixels."""
    axis, located = torch.arange(SPAN + 1), []
    candidates = torch.cartesian_prod(axis, axis, axis, axis).reshape(-1, 1, 2, 2)
    for x, pair in zip(predictions[:, 0], digits, strict=False):  # the best match, in squared error
        drawings = drawn(pair[None, None].expand(len(candidates), -1, -1, -1, -1), candidates).flatten(1)
        error = drawings.square().sum(1) - 2 * x.flatten(1) @ drawings.T
        located.append(candidates[error.argmin(1), 0])
    return (torch.stack(located) - places[: len(located)]).float().norm(dim=3).mean(dim=2)


def picture(rows):
    """Return a picture of videos (1, T, 16, 16), one in each row; known frames have blue borders."""
    side = SIDE + 3
    canvas = torch.ones(len(rows) * side, max(len(x[0]) for x, _ in rows) * side, 3)
    for i, (x, given) in enumerate(rows):
        for j, frame in enumerate(x[0]):
            cell = canvas[i * side : (i + 1) * side - 1, j * side : (j + 1) * side - 1]
            cell[:] = torch.tensor([0.0, 0.45, 0.7] if j in given else [0.85, 0.85, 0.85])
            cell[1:-1, 1:-1] = 1 - frame[..., None] / (LEVELS - 1)
    return canvas


def draw(test, shown, samples, distance, values):
    """Draw the truth and the restored frames of three videos, samples, distances by frame, and bits."""
    names, figure = {"truth": (test, ()), **shown}, plt.figure(figsize=(7.4, 4.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.2])
    videos, charts = top.subplots(1, 3), bottom.subplots(1, 3, width_ratios=[1.5, 1, 1])
    for i, axes in enumerate(videos):
        axes.imshow(picture([(x[i], given) for x, given in names.values()]))
        axes.set_yticks([(SIDE + 3) * (k + 0.5) for k in range(len(names))], names if i == 0 else [""] * len(names))
    charts[0].imshow(picture([(x, ()) for x in samples]))
    charts[0].set(title="samples (trained on 6 frames)", yticks=[])
    for axes in (*videos, charts[0]):
        axes.tick_params(length=0, labelbottom=False)
        axes.spines[:].set_visible(False)
    ahead = range(1, FRAMES - PAST + 1)
    for name, (mean, error) in distance.items():
        charts[1].errorbar(ahead, mean, error, marker="o", label=name)
    charts[1].set(title="predicted places (pixels)", xlabel="frames ahead", xticks=ahead, ylim=(0, SPAN))
    charts[1].legend(loc="upper left")
    mean, error = ([getattr(b, key) for b in values.values()] for key in ("mean", "stderr"))
    charts[2].barh(range(len(values)), mean, xerr=error, color="C0", alpha=0.4)
    charts[2].set(title="test videos", xlabel="bits/dim", yticks=[], ylim=(3.5, -0.5))
    for i, name in enumerate(values):
        charts[2].text(0.02, i, name.replace(" as", "\nas"), va="center")
    return figure


def main(small: bool = False, run: str | None = None) -> dict[str, float]:
    width, steps, n, tests, draws = (8, 20, 256, 3, 4) if small else (32, 4000, 16384, 48, 16)
    model = train(width, steps, n, run)
    test, digits, places = videos("test", tests, seed=1)
    values = bits(model, test, draws)
    saved = values["future"].per_image - values["future given past"].per_image
    table = {name: (b.mean, b.stderr) for name, b in values.items()}
    table["saved by the past"] = float(saved.mean()), float(saved.std() / tests**0.5)
    predicted = {"trained": restored(model, test, BEFORE, "trained")}
    predicted["MMPS"] = restored(model, test[: tests // 3 + 2], BEFORE, "mmps", iterations=2)
    by_frame = {name: distances(x[:, :, PAST:], digits, places[:, PAST:]) for name, x in predicted.items()}
    by_frame["no motion"] = (places[:, [PAST - 1]] - places[:, PAST:]).float().norm(dim=3).mean(dim=2)
    distance = {name: (d.mean(0), d.std(0) / len(d) ** 0.5) for name, d in by_frame.items()}
    for name, (mean, error) in distance.items():
        table |= {f"{name}: pixels {j + 1} ahead": (float(mean[j]), float(error[j])) for j in range(len(mean))}
    print(*(f"{name:<40}{value:9.4f} +- {error:.4f}" for name, (value, error) in table.items()), sep="\n")
    print(f"{time.process_time():.0f} s of CPU time")
    if not small:
        shown = {name: (x, BEFORE) for name, x in predicted.items()}
        shown["filled in"] = restored(model, test[:3], AROUND, "trained"), AROUND
        samples = [SAMPLER(model, (1, 1, t, SIDE, SIDE), seeds=[i]).x[0] for i, t in enumerate((6, 6, 8, 10))]
        with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
            figure = draw(test, shown, [TRANSFORM.quantise(x) for x in samples], distance, values)
            figure.savefig(HERE / "figures" / "video.png", dpi=150)
    return {name: value for name, (value, _) in table.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--run", help="directory of the training; default: a temporary one")
    arguments = parser.parse_args()
    main(arguments.small, arguments.run)
