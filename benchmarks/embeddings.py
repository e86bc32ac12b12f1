"""Contrastive embeddings, and pictures from captions by two stages over them (unCLIP), on held-out combinations.

    scoresde train experiment=openmoji_contrastive
    scoresde train experiment=openmoji_prior
    scoresde train experiment=openmoji_unclip
    python benchmarks/embeddings.py runs/openmoji_contrastive runs/openmoji_prior runs/openmoji_unclip \
        --plot docs/openmoji_unclip.png

The test split has N pictures whose combinations of skin tone and subject are not in the training split.

- retrieval: the share of captions whose own picture is among the k most similar of the N, and of pictures whose own
  caption is, with Wilson's 95% intervals; by chance k/N;
- prior: one embedding drawn for each caption, by scale of the guidance: its root mean square, 1 for data; then,
  projected, its cosine with the embedding of the caption's own picture, and the share for which this picture is among
  the k nearest. The first row has the embeddings of the captions themselves;
- nearer: for a sample drawn for each caption, the share of the other N - 1 pictures that are less similar to the sample
  than the caption's own picture, averaged over the captions; by chance 1/2. The similarity is the cosine of the
  embeddings, or minus the distance of the pixels. Intervals are 95% bootstrap intervals over captions;
- tone: the share of samples that a classifier of the skin tone, trained on real pictures, puts into the tone of the
  caption, with Wilson's 95% intervals; by chance 1/5.

The rows: the real pictures themselves, pictures decoded from their embeddings, without the prior, and samples of the
captions without and with guidance.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from samplers import interval, machine
from torch import Tensor

import scoresde as ss
from scoresde.build import instantiate
from scoresde.cli import config_directory
from scoresde.data.emoji_names import TONE, TONES
from scoresde.evaluation.embedded_data import split_of
from scoresde.metrics import retrieval, wilson
from scoresde.metrics.features import extract
from scoresde.plots import save_samples

COLUMNS = 8  # of the plot


def stated(values: np.ndarray) -> str:
    """Format the mean of values (N,) with its interval."""
    low, high = interval(lambda rows: rows.mean(axis=-1), values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def share(count: int, total: int) -> str:
    """Format a fraction with Wilson's 95% interval."""
    found = wilson(count, total, z=1.96)
    return f"{100 * found.value:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def print_retrieval(embedder: Any, pictures: Tensor, captions: Sequence[str]) -> None:
    """Print the shares of captions and pictures whose partner is among the most similar."""
    similarities = embedder.conditions(captions) @ embedder.states(pictures).T
    print("| of N = | k | picture of a caption | caption of a picture | chance |\n| --- | --- | --- | --- | --- |")
    for k in (1, 5):
        parts = [retrieval(part.contiguous(), k) for part in (similarities, similarities.T)]
        cells = " | ".join(f"{100 * p.value:.1f}% [{100 * p.low:.1f}, {100 * p.high:.1f}]" for p in parts)
        print(f"| {len(captions)} | {k} | {cells} | {100 * k / len(captions):.1f}% |", flush=True)


def print_prior(pipeline: Any, pictures: Tensor, captions: Sequence[str]) -> None:
    """Print how near embeddings drawn from the prior are to those of the pictures."""
    print("| embedding | root mean square | cosine | own picture nearest | among 5 |\n" + "| --- " * 5 + "|")
    states = pipeline.embedder.states(pictures)
    rows = {"of the caption": pipeline.embedder.conditions(captions)}
    for scale in (0.0, 1.0, 2.0):
        drawn, nfe = pipeline.sample_prior(captions, range(len(captions)), scale)
        rows[f"drawn, scale {scale:g} ({nfe} evaluations)"] = drawn
    for name, vectors in rows.items():
        cosines = torch.cosine_similarity(vectors, states).double().numpy()
        found = [retrieval(pipeline.embedder.project(vectors) @ states.T, k) for k in (1, 5)]
        cells = " | ".join(f"{100 * p.value:.1f}% [{100 * p.low:.1f}, {100 * p.high:.1f}]" for p in found)
        size = float(vectors.square().mean(dim=1).sqrt().mean())
        print(f"| {name} | {size:.2f} | {stated(cosines)} | {cells} |", flush=True)


def nearer(similarities: Tensor) -> np.ndarray:
    """Return for each sample the share of the other pictures that are less similar than the own one, (N,)."""
    own = similarities.diagonal()[:, None]
    below = (similarities < own).double() + 0.5 * (similarities == own).double()
    return ((below.sum(dim=1) - 0.5) / (len(similarities) - 1)).numpy()


def print_row(name: str, samples: Tensor, pictures: Tensor, embedder: Any, tone: Any, labels: Tensor) -> None:
    """Print the measurements of one sample for each caption."""
    samples = samples.clamp(0, 255.99).floor().float()
    by_embedding = nearer(embedder.states(samples) @ embedder.states(pictures).T)
    by_pixels = nearer(-torch.cdist(samples.flatten(1), pictures.flatten(1)))
    known = labels >= 0
    predicted = extract(tone, samples[known], (0, 255)).logits.argmax(dim=1)
    right = int((predicted == labels[known]).sum())
    print(f"| {name} | {stated(by_embedding)} | {stated(by_pixels)} | {share(right, len(predicted))} |", flush=True)


def print_samples(pipeline: Any, data: Any, pictures: Tensor, tone: Any, options: argparse.Namespace) -> None:
    """Print the table of samples."""
    tones = [TONE.findall(caption) for caption in data.captions]
    labels = torch.tensor([TONES.index(found[0]) if len(found) == 1 else -1 for found in tones])
    seeds = range(len(pictures))
    print(f"| pictures | nearer, embeddings | nearer, pixels | tone ({int((labels >= 0).sum())} captions) |")
    print("| --- | --- | --- | --- |")
    measure = (pictures, pipeline.embedder, tone, labels)
    print_row("real", pictures, *measure)
    print_row("decoded embeddings of the real", pipeline.variations(pictures, seeds).x, *measure)
    for scale, prior_scale in options.scales:
        samples = pipeline(data.captions, seeds, scale, prior_scale)
        print_row(f"samples, scale {scale:g}, prior's {prior_scale:g} ({samples.nfe} evaluations)", samples.x, *measure)


def plot(pipeline: Any, data: Any, pictures: Tensor, options: argparse.Namespace) -> None:
    """Save a picture: samples of captions, variations of a picture, and samples between two pictures."""
    (scale, prior_scale), numbers = (1.0, 1.0), options.shown
    rows, names = [], []
    for i in numbers:
        rows.append(pipeline([data.captions[i]], range(COLUMNS), scale, prior_scale).x)
        names.append(data.captions[i])
    for i in numbers[:2]:
        drawn = pipeline.variations(pictures[i : i + 1], range(COLUMNS - 1), scale).x
        rows.append(torch.cat([pictures[i : i + 1], drawn]))
        names.append("variations of the first")
    for i, j in zip(numbers[::2], numbers[1::2], strict=False):
        weights = torch.linspace(0, 1, COLUMNS).tolist()
        rows.append(pipeline.interpolate(pictures[i : i + 1], pictures[j : j + 1], weights, [0], scale).x[:, 0])
        names.append("between two")
    save_samples(torch.cat(rows), options.plot, 0, 256, names, data.credit)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("contrastive", "prior", "decoder"):
        parser.add_argument(name, help=f"the run of the {name} model")
    parser.add_argument("--split", default="test")
    parser.add_argument("--plot", type=Path, help="PNG file of samples, variations and interpolations")
    parser.add_argument("--shown", type=int, nargs="*", default=[0, 1, 2, 3], help="test pictures in the plot")
    options = parser.parse_args()
    options.scales = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (2.0, 1.0)]
    return options


def main() -> None:
    """Print the tables."""
    options = arguments()
    torch.set_num_threads(1)
    embedder, data = ss.load_embedder(options.contrastive), split_of(options.contrastive, options.split)
    pictures = torch.stack([data[i][0] for i in range(len(data))])
    print(machine("cpu"))
    print_retrieval(embedder, pictures, data.captions)
    pipeline = ss.pipelines.UnCLIP(embedder, ss.load(options.prior), ss.load(options.decoder))
    print_prior(pipeline, pictures, data.captions)
    tone = instantiate(OmegaConf.load(config_directory() / "features" / "openmoji_tone.yaml"))
    print_samples(pipeline, data, pictures, tone, options)
    if options.plot:
        plot(pipeline, data, pictures, options)


if __name__ == "__main__":
    main()
