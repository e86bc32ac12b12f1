"""Images of a run: samples as the levels they would be stored as, and the features of its data, kept in files."""

from pathlib import Path

import torch
from torch import Tensor

from scoresde.build import Run, instantiate
from scoresde.evaluation.references import FEWEST, data_items, spaced
from scoresde.evaluation.resumable import store
from scoresde.evaluation.trained_classifier import shared_extract
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import FeatureSpace, Span
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically

STATISTICS = "statistics"


def is_of_images(run: Run) -> bool:
    """Whether the run's states are images (C, H, W)."""
    return len(run.config.data.shape) == 3


def span_of(run: Run) -> Span:
    """The values of black and white in a run's data: of grey levels [low, high), the first and the last level.

    Raises:
        ValueError: a run whose configuration does not name the range.
    """
    if (bounds := run.config.data.get("range")) is None:
        raise ValueError(
            f"a range of the images' values expected: set data.range=[low, high] in {run.path}/config.yaml"
        )
    low, high = map(float, bounds)
    return (low, high) if run.dequantization is None else (low, high - 1)


def to_levels(run: Run, samples: Tensor) -> Tensor:
    """Samples in data units (N, C, H, W) as the levels that they would be stored as, float32, clipped to the data's.

    A dequantised level k is the interval [k, k + 1): its samples are rounded down. A network that was trained on the
    levels themselves, with a scaling of its own, gives the levels: its samples are rounded to the nearest one. Whole
    numbers of an integer dtype are levels already, and continuous data stays as it is.
    """
    if run.dequantization is None:
        return samples.float()
    black, white = span_of(run)
    if samples.is_floating_point():
        if run.trained_on_levels:
            scaling = instantiate(run.config.data.training.transform)
            samples = scaling.inverse(run.transform(samples.double())).round()
        else:
            samples = samples.floor()
    return samples.clamp(black, white).float()


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
    """The statistics of a split of a run's images with their features, from a file if they were needed before.

    The file is named by the split, and by a hash of its configuration and of the feature space: where the images behind
    a configuration change, take it away.

    Args:
        run, split, trust: whose data.
        space: what it is measured in.
        directory: of the file, `<run>/statistics` unless given.
        most: so many at most, evenly spaced in the split; all of it unless given.
        without: another split whose images are left out.
        batch_size, device: of the extraction, which processes share.
        progress: show a progress bar.

    Raises:
        ValueError: no such split, or fewer than four images.
    """
    names = [split] if without is None else [split, without]
    described = [*(str(run.config.data.get(name)) for name in names), space.name, space.digest, most]
    path = store((directory or run.path / STATISTICS) / split, described).with_suffix(".npz")
    if distributed.gather(path.is_file())[0]:  # one answer for all: the work after it is shared
        return FeatureStatistics.load(path)
    images = _images(run, split, most, without, trust)
    found = FeatureStatistics.of(shared_extract(space, images, span_of(run), batch_size, device, progress), space.name)
    if distributed.rank() == 0:
        replace_atomically(path, found.save)
    return found


def _images(run: Run, split: str, most: int | None, without: str | None, trust: tuple[str, ...]) -> Tensor:
    """The images of a split, at most so many, none of them in the other split."""
    images = data_items(run, split, None if without is not None else most, trust)
    if without is not None:
        others = {image.numpy().tobytes() for image in data_items(run, without, None, trust)}
        images = images[torch.tensor([image.numpy().tobytes() not in others for image in images], dtype=torch.bool)]
        if len(images) < FEWEST:
            raise ValueError(
                f"{split} data beside the {without} data expected; all but {len(images)} of its images are in that too "
                "(floors=[halves] does without)"
            )
    return images if most is None else images[spaced(len(images), most)]
