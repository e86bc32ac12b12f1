"""`scoresde data`, which prints the statistics of a dataset and draws a picture of its samples."""

import warnings
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
from scoresde.data.items import LABEL
from scoresde.data.summary import DatasetSummary, describe, state_of
from scoresde.dataset_plots import save_dataset
from scoresde.evaluation.generation import check_count
from scoresde.prior_mismatch import prior_mismatches, warn_of_mismatch
from scoresde.protocols import NULL, by_name

FIGURES = Path("datasets") / "figures"
IMAGES, POINTS = 64, 2000  # samples in a picture of images, and of other data
CLASSES = 40  # largest number of classes in a table
ROWS, COLUMNS = 16, 8  # largest number of classes in a picture, and images of each
FEW = 20  # a class with fewer training samples is warned of


def data(config: DictConfig) -> Record:
    """Print the statistics of a dataset, and draw a picture of its samples."""
    if config.get("data") is None:
        raise ValueError("no dataset: set data=... or experiment=...")
    if OmegaConf.is_missing(config.data, "shape"):
        config.data.shape = None  # not needed: the shape of the samples is measured
    if config.data.get("text") is not None:
        config.data.text = None  # the captions are not counted
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
    rows, samples = class_rows(datasets[drawn], shape, config.n) or (
        None,
        sample(datasets[drawn], config.n or (POINTS if len(shape) == 1 else IMAGES)),
    )
    mirrored = {split: getattr(dataset, "mirrored", 0) for split, dataset in datasets.items()}
    print_table(table(summaries, mirrored))
    classes = count_classes(
        summaries, {k: v for d in datasets.values() for k, v in getattr(d, "class_names", {}).items()}
    )
    for condition, counts in classes.items():
        print_table(class_table(condition, counts, splits))
        if all(summary.examined == summary.count for summary in summaries.values()):
            warn_of_classes(condition, counts, splits)
    if names := getattr(datasets[drawn], "names", None):
        moments = zip(names, summaries[drawn].mean, summaries[drawn].std, strict=True)
        lines = [[name, f"{mean:.6g}", f"{std:.6g}"] for name, mean, std in moments]
        print_table([[drawn, "mean", "standard deviation"], *lines])
    name = str(config.get("name") or HydraConfig.get().runtime.choices["data"])
    path = (
        Path(config.out)
        if config.out is not None
        else FIGURES / f"{result_name(name, 'data', 'experiment', 'out')}.png"
    )
    credit = getattr(datasets[drawn], "credit", None)
    picture = save_dataset(samples, path, config.data.get("range"), names, rows, credit)
    states = model_space(config, datasets.get("train"))
    spread = "mean {mean:.4g}, standard deviation {std:.4g} (prediction.sigma_data), largest distance {distance:.4g}"
    measured = {} if states is None else {"model space": spread.format(**states)}
    print_rows({"shape": shape, **measured, **({"credit": credit} if credit else {}), "picture": picture})
    statistics = {split: {k: v for k, v in vars(s).items() if k != "fingerprints"} for split, s in summaries.items()}
    record = {"data": name, "shape": shape, "names": names, "model_space": states, "statistics": statistics}
    return {**record, "classes": classes, "credit": credit, "paths": {"picture": picture}}


def sample(dataset: Dataset, n: int) -> Tensor:
    """Return at most n states of a dataset, the same ones at each call."""
    total = len(dataset)  # type: ignore[arg-type]
    # Sorted, for datasets that read blocks. Evenly spaced indices could give pairs of mirror images.
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n].sort().values
    return torch.stack([state_of(dataset[i]) for i in rows.tolist()])


def class_rows(dataset: Dataset, shape: Sequence[int], n: int | None) -> tuple[list[str], Tensor] | None:
    """Return names of classes, and equally many images of each; None if the dataset has no images of named classes.

    The condition is the first one whose classes have names; its first 16 classes that occur are shown. Each class has 8
    images if n is None, otherwise n divided by the number of these classes, rounded up. A class with fewer images is
    filled up with images of NaN.
    """
    labels = by_name(getattr(dataset, "labels", None))
    name = next((name for name in getattr(dataset, "class_names", {}) if name in labels), None)
    if name is None or len(shape) != 3 or shape[0] not in (1, 3):
        return None
    occurring = [i for i in labels[name].unique().tolist() if i >= 0][:ROWS]
    if not occurring:
        return None
    columns = COLUMNS if n is None else -(-n // len(occurring))
    images = torch.full((len(occurring), columns, *shape), float("nan"))
    for row, number in enumerate(occurring):
        items = (labels[name] == number).nonzero().flatten()
        items = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:columns].sort().values]
        for column, item in enumerate(items.tolist()):
            images[row, column] = state_of(dataset[item])
    return [dataset.class_names[name][i] for i in occurring], images.flatten(0, 1)  # type: ignore[attr-defined]


def count_classes(
    summaries: Mapping[str, DatasetSummary], names: Mapping[str, Sequence[str]]
) -> dict[str, list[Record]]:
    """Return for each condition a record of each class: its number, its name, and its count and share in each split."""
    result: dict[str, list[Record]] = {}
    for condition in dict.fromkeys(name for summary in summaries.values() for name in summary.classes):
        counts = {split: summary.classes.get(condition, {}) for split, summary in summaries.items()}
        known = dict(enumerate(names.get(condition, ())))
        result[condition] = [
            {
                "class": number,
                "name": "(no label)" if number == NULL else known.get(number, str(number)),
                "count": {split: of.get(number, 0) for split, of in counts.items()},
                "share": {split: of.get(number, 0) / max(1, sum(of.values())) for split, of in counts.items()},
            }
            for number in sorted({number for of in counts.values() for number in of})
        ]
    return result


def class_table(condition: str, classes: Sequence[Record], splits: Sequence[str]) -> list[list[str]]:
    """Return the cells of a table of the counts and shares of at most 40 classes, a column for each split."""
    lines = [[c["name"], *(f"{c['count'][s]:,} ({c['share'][s]:.1%})" for s in splits)] for c in classes[:CLASSES]]
    more = [[f"and {len(classes) - CLASSES:,} other classes", *[""] * len(splits)]] if len(classes) > CLASSES else []
    return [[condition, *splits], *lines, *more]


def warn_of_classes(condition: str, classes: Sequence[Record], splits: Sequence[str]) -> None:
    """Warn of classes with few training samples, and of classes without samples in a split."""
    known = [c for c in classes if c["class"] != NULL]
    rare = [f"{c['name']}: {c['count'][splits[0]]}" for c in known if 0 < c["count"][splits[0]] < FEW]
    found = [(rare, f"have fewer than {FEW} samples in {splits[0]}", "collect more, or join them")]
    for split in splits:
        missing = [c["name"] for c in known if not c["count"][split]]
        found.append((missing, f"do not occur in {split}", "change the splits, or leave these classes out"))
    for names, problem, advice in found:
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} others" if len(names) > 5 else "")
            of = f"{len(names):,} of the {len(known):,} classes of {condition!r}"
            warnings.warn(f"{of} {problem} ({shown}): {advice}", stacklevel=3)


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
        **{
            "labels" if name == LABEL else f"labels {name}": class_sizes(classes) for name, classes in s.classes.items()
        },
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
    sizes = [count for number, count in classes.items() if number != NULL]
    return f"{len(sizes)} classes of {min(sizes):,} .. {max(sizes):,}" if sizes else ""
