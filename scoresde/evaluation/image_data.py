"""Images of a run: samples as grey levels, feature extraction shared among processes, cached statistics of the data."""

from pathlib import Path

import torch
from torch import Tensor

from scoresde.build import Run
from scoresde.evaluation.references import data_items, evenly_spaced
from scoresde.evaluation.resumable import directory_for
from scoresde.instantiation import instantiate
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, FeatureSpace, Span, check_images, extract_batch
from scoresde.metrics.intervals import FEWEST
from scoresde.progress import progress_bar
from scoresde.training import distributed

STATISTICS = "statistics"


def is_of_images(run: Run) -> bool:
    """Return whether the states of the run are images (C, H, W)."""
    return len(run.data_shape) == 3


def span_of(run: Run) -> Span:
    """Return the values (black, white) in a run's data.

    They are (low, high) for continuous data, and (low, high - 1) for integer grey levels in [low, high).

    Raises:
        ValueError: the configuration does not set the range of the data.
    """
    if (bounds := run.config.data.get("range")) is None:
        raise ValueError(f"the range of the images is unknown: set data.range=[low, high] in {run.path}/config.yaml")
    low, high = map(float, bounds)
    return (low, high) if run.dequantization is None else (low, high - 1)


def to_levels(run: Run, samples: Tensor) -> Tensor:
    """Round samples in data units (N, C, H, W) to the grey levels of an image file, float32, clipped to the range.

    A dequantised grey level k covers [k, k + 1), so samples are rounded down. A network trained on the grey levels
    themselves, scaled by `data.training.transform`, generates grey levels, so samples are rounded to the nearest level.
    Samples of an integer dtype are grey levels already. Continuous data is returned unchanged, as float32.
    """
    if run.dequantization is None:
        return samples.float()
    black, white = span_of(run)
    if run.trained_on_levels and samples.is_floating_point():
        scaling = instantiate(run.config.data.training.transform)
        samples = scaling.inverse(run.transform(samples.double())).round()
    return samples.floor().clamp(black, white).float()


def shared_extract(
    space: FeatureSpace,
    images: Tensor,
    span: Span,
    batch_size: int,
    device: torch.device | str,
    progress: bool = False,
    name: str = "the images",
) -> Features:
    """Extract features (see `metrics.features.extract`); processes share the batches, and each returns all features.

    Raises:
        ValueError: features are not finite; the message names the images as `name`.
    """
    batches, processes = images.split(batch_size), distributed.size()
    own = progress_bar(batches[distributed.rank() :: processes], title="features", unit="batch", shown=progress)
    shares = distributed.gather([extract_batch(space, batch, span, device) for batch in own])
    features = Features.cat([shares[i % processes][i // processes] for i in range(len(batches))])
    features.refuse_nonfinite(f"{name} in the space {space.name}")
    return features


def data_statistics(
    run: Run,
    split: str,
    space: FeatureSpace,
    directory: Path | None = None,
    most: int | None = None,
    without: str | None = None,
    trust: tuple[str, ...] = (),
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> FeatureStatistics:
    """Return the feature statistics of a split of a run's images, and the features; cache both in a file.

    The file name contains the split and a hash of the configuration of the data and of the feature space: delete the
    file if the images change while the configuration stays the same.

    Args:
        run: supplies the configuration of the data.
        split: the split whose images are used.
        space: the feature space.
        directory: the directory of the file; by default `<run>/statistics`.
        most: largest number of images, evenly spaced in the split; by default all.
        without: exclude images that also occur in this split.
        trust: see `build.instantiate`.
        batch_size, device: for the feature extraction, which processes share.
        progress: show a progress bar.

    Raises:
        ValueError: the run has no such split, there are fewer than 4 images, or their values are not in the range of
            the data (see `metrics.features.check_images`).
    """
    names = [split] if without is None else [split, without]
    settings = [*(str(run.config.data.get(name)) for name in names), space.name, space.digest, most]
    path = directory_for((directory or run.path / STATISTICS) / split, settings).with_suffix(".npz")
    if distributed.gather(path.is_file())[0]:  # all processes follow the first: the extraction is shared
        return FeatureStatistics.load(path)
    images = _images(run, split, most, without, trust)
    check_images(images, span_of(run))
    features = shared_extract(space, images, span_of(run), batch_size, device, progress, f"the {split} data")
    statistics = FeatureStatistics.of(features, space.name)
    if distributed.rank() == 0:
        statistics.save(path)
    return statistics


def _images(run: Run, split: str, most: int | None, without: str | None, trust: tuple[str, ...]) -> Tensor:
    """Return at most `most` images of a split that do not occur in the split `without`."""
    if without is None:
        return data_items(run, split, most, trust)
    images = data_items(run, split, None, trust)
    excluded = {image.numpy().tobytes() for image in data_items(run, without, None, trust)}
    images = images[torch.tensor([image.numpy().tobytes() not in excluded for image in images], dtype=torch.bool)]
    if len(images) < FEWEST:
        raise ValueError(
            f"the noise floor needs at least {FEWEST} {split} images that are not also in the {without} data; got "
            f"{len(images)}: set floors=[halves]"
        )
    return images if most is None else images[evenly_spaced(len(images), most)]
