"""`scoresde data`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from scoresde import build
from scoresde.cli.common import SPLITS, check_choice, check_states, fit_transform, result_name
from scoresde.cli.output import Record, print_rows, print_table, shows_progress
from scoresde.data.summary import DatasetSummary, describe, state_of
from scoresde.dataset_plots import save_dataset
from scoresde.evaluation.generation import check_count
from scoresde.prior_mismatch import prior_mismatches, warn_of_mismatch

FIGURES = Path("datasets") / "figures"
IMAGES, POINTS = 64, 2000  # samples in a picture of images, and of other data


def data(config: DictConfig) -> Record:
    """Print the statistics of a dataset, and draw a picture of its samples."""
    if config.get("data") is None:
        raise ValueError("no dataset: set data=... or experiment=...")
    if OmegaConf.is_missing(config.data, "shape"):
        config.data.shape = None  # not needed: the shape of the samples is measured
    splits = [split for split in SPLITS if config.data.get(split) is not None]
    check_states(config)
    drawn = check_choice("split", config.split, splits)
    if config.n is not None:
        check_count("n", config.n)
    datasets = {split: build.instantiate(config.data[split], config.trust) for split in splits}
    summaries: dict[str, DatasetSummary] = {}
    for split in splits:
        summaries[split] = describe(datasets[split], config.limit, summaries, progress=shows_progress())
    shape = list(summaries[drawn].shape)
    samples = sample(datasets[drawn], config.n or (POINTS if len(shape) == 1 else IMAGES))
    mirrored = {split: getattr(dataset, "mirrored", 0) for split, dataset in datasets.items()}
    print_table(table(summaries, mirrored))
    if names := getattr(datasets[drawn], "names", None):
        moments = zip(names, summaries[drawn].mean, summaries[drawn].std, strict=True)
        rows = [[name, f"{mean:.6g}", f"{std:.6g}"] for name, mean, std in moments]
        print_table([[drawn, "mean", "standard deviation"], *rows])
    name = str(config.get("name") or HydraConfig.get().runtime.choices["data"])
    path = (
        Path(config.out)
        if config.out is not None
        else FIGURES / f"{result_name(name, 'data', 'experiment', 'out')}.png"
    )
    picture = save_dataset(samples, path, config.data.get("range"), names)
    states = model_space(config, datasets.get("train"))
    spread = "mean {mean:.4g}, standard deviation {std:.4g} (prediction.sigma_data), largest distance {distance:.4g}"
    measured = {} if states is None else {"model space": spread.format(**states)}
    print_rows({"shape": shape, **measured, "picture": picture})
    statistics = {split: {k: v for k, v in vars(s).items() if k != "fingerprints"} for split, s in summaries.items()}
    record = {"data": name, "shape": shape, "names": names, "model_space": states, "statistics": statistics}
    return {**record, "paths": {"picture": picture}}


def sample(dataset: Dataset, n: int) -> Tensor:
    """Return at most n states of a dataset, the same ones at each call."""
    total = len(dataset)  # type: ignore[arg-type]
    # Sorted, for datasets that read blocks. Evenly spaced indices could give pairs of mirror images.
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n].sort().values
    return torch.stack([state_of(dataset[i]) for i in rows.tolist()])


def model_space(config: DictConfig, train: Dataset | None) -> dict[str, float] | None:
    """Return the scale of the training data in model space, from a random sample; None without data or transform.

    The keys are "mean" and "std", over all values, and "distance", the largest Euclidean distance between two states.
    sigma_max of `VE` should be close to this distance (2006.09011, technique 1).

    Warns:
        UserWarning: at t_max, the noise of the SDE in the configuration does not hide the data.
    """
    if train is None or config.data.get("transform") is None:
        return None
    fit_transform(config, train)
    trained = build.build_data_map(config.data.get("training") or config.data, config.trust)
    values = sample(train, POINTS).double()
    states = trained.transform(values + 0.5 if trained.dequantization is not None else values)  # the mean of x + u
    if config.get("sde") is not None:
        sde = build.instantiate(config.sde, config.trust)
        warn_of_mismatch(sde, prior_mismatches(sde, states))
    flat = states.flatten(1)
    distance = float(torch.cdist(flat, flat).max())
    return {"mean": float(states.mean()), "std": float(states.std()), "distance": distance}


def table(summaries: Mapping[str, DatasetSummary], mirrored: Mapping[str, int]) -> list[list[str]]:
    """Return the cells of a table of statistics, a column for each split; leave out statistics without any value."""
    columns = {split: column(summary, mirrored[split]) for split, summary in summaries.items()}
    labels = dict.fromkeys(label for cells in columns.values() for label in cells)
    lines = [[label, *(cells.get(label, "") for cells in columns.values())] for label in labels]
    return [["", *columns], *(line for line in lines if any(line[1:]))]


def column(s: DatasetSummary, mirrored: int) -> dict[str, str]:
    """Return {label: cell} of the statistics of a split and of the number of mirror images in it."""
    return {
        "items": f"{s.count:,}",
        "mirror images": f"{mirrored:,}" if mirrored else "",
        "examined": f"{s.examined:,}" if s.examined < s.count else "",
        "state": f"{' x '.join(map(str, s.shape)) or '()'} {s.dtype}",
        "min": f"{s.min:.6g}",
        "max": f"{s.max:.6g}",
        "mean": values_or_range(s.mean),
        "standard deviation": values_or_range(s.std),
        "whole numbers": (f"{s.levels} levels" if s.levels else "many levels") if s.integers else "no",
        "labels": class_sizes(s.classes),
        "not finite": f"{s.not_finite:,}" if s.not_finite else "",
        "duplicates": f"{s.duplicates:,}",
        **{f"also in {split}": f"{count:,}" for split, count in s.shared.items()},
    }


def values_or_range(numbers: Sequence[float]) -> str:
    """Format up to three numbers; for more numbers, format their range."""
    if len(numbers) <= 3:
        return ", ".join(f"{number:.4g}" for number in numbers)
    return f"{min(numbers):.4g} .. {max(numbers):.4g}"


def class_sizes(classes: Mapping[int, int]) -> str:
    """Format the number of classes and the sizes of the smallest and the largest class."""
    sizes = classes.values()
    return f"{len(classes)} classes of {min(sizes):,} .. {max(sizes):,}" if classes else ""
