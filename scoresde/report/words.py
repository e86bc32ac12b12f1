"""What was trained and what its numbers mean, in plain words: for who has never seen such a model."""

import math
from typing import Any

from scoresde.evaluation.sampler_comparison import plus_minus
from scoresde.report.axes import MINUS
from scoresde.report.facts import Facts, Line

TIMES, DASH, SPACE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{NO-BREAK SPACE}"
PATHS = {
    "VP": "the noise takes the place of the data little by little, at constant total strength (variance preserving)",
    "SubVP": "the noise takes the place of the data little by little, never stronger than the data was (sub-VP)",
    "VE": "ever stronger noise is added to data that stays as it is (variance exploding)",
    "Cosine": "the noise takes the place of the data along a quarter of a circle (cosine schedule)",
    "Karras": "ever stronger noise is added to data that stays as it is (EDM)",
    "Rectified": "data is moved to noise along straight lines (rectified flow)",
    "LearnedVP": "the noise takes the place of the data at a rate that is learned (learned variance preserving)",
    "DDPM": "the noise takes the place of the data in a thousand fixed steps (DDPM)",
    "NCSN": "noise of fixed, ever larger levels is added (NCSN)",
}
METRICS = {
    "frechet_distance": ("Fréchet distance", "between Gaussians fitted to features of samples and of data; 0 is best"),
    "kid": ("KID", "squared distance of feature distributions, without bias; 0 is best"),
    "inception_score": ("Inception score", "how sure and how varied a classifier's answers are; higher is better"),
    "precision": ("precision", "share of the samples that lie among the data; 1 is best"),
    "recall": ("recall", "share of the data that lies among the samples; 1 is best"),
    "sliced_wasserstein": ("sliced Wasserstein distance", "how far samples would have to be moved; 0 is best"),
    "mmd": ("squared MMD", "distance of distributions by a kernel, without bias; 0 is best"),
    "energy_distance": ("energy distance", "distance of distributions by distances of points; 0 is best"),
    "mean_error": ("error of the mean", "in units of the total standard deviation; 0 is best"),
    "covariance_error": ("error of the covariance", "relative; 0 is best"),
}
UNITS = {"bits/dim": "bits per dimension", "nats/dim": "nats per dimension"}


def short(node: Any) -> str:
    """The class that a node of the configuration names, without its modules."""
    return str((node or {}).get("_target_", "unknown")).rsplit(".", 1)[-1]


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many digits, whole ones with their thousands."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", MINUS)
    if abs(value) >= 10**digits:
        return f"{round(value):,}".replace("-", MINUS)
    return f"{value:.{digits}g}".replace("-", MINUS)


def pm(value: float | None, error: float | None = None) -> str:
    """value ± error, to two digits of the error."""
    if value is None:
        return DASH
    return plus_minus(value, error).replace("+-", "±").replace("-", MINUS)


def sentence(text: object) -> str:
    """A text with a capital letter at its beginning."""
    return f"{str(text)[:1].upper()}{str(text)[1:]}"


def duration(seconds: float | None) -> str:
    """Seconds, as one says it."""
    if seconds is None:
        return DASH
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def data_name(facts: Facts) -> str:
    """The dataset, by its class and what tells it from others of it."""
    node = facts.data.get("train") or {}
    told = [str(node[key]) for key in ("name", "root", "path", "folder") if isinstance(node.get(key), str)]
    return f"{short(node)} ({', '.join(told)})" if told else short(node)


def state(facts: Facts) -> str:
    """What one sample is."""
    shape = facts.shape
    size = f"{SPACE}{TIMES}{SPACE}".join(map(str, shape))
    if facts.kind == "images":
        colour = "grey" if shape[0] == 1 else "colour"
        levels = f" with {facts.levels} levels" if facts.levels else ""
        return f"{colour} images of {shape[1]}{SPACE}{TIMES}{SPACE}{shape[2]}{SPACE}pixels{levels}"
    if facts.kind == "plane":
        return "points of the plane"
    if facts.kind == "series":
        return f"series of {shape[1]} values in {shape[0]} channel{'s' if shape[0] > 1 else ''}"
    return f"vectors of {shape[0]} numbers" if len(shape) == 1 else f"arrays of {size} numbers"


def one(facts: Facts) -> str:
    """What one sample is called."""
    return {"images": "image", "plane": "point", "series": "series"}.get(facts.kind, "sample")


def many(facts: Facts) -> str:
    """What several samples are called."""
    name = one(facts)
    return name if name.endswith("s") else f"{name}s"


def dimension(facts: Facts) -> str:
    """What one dimension of a sample is called."""
    return {"images": "pixel value", "plane": "coordinate", "series": "value"}.get(facts.kind, "number")


def path(facts: Facts) -> str:
    """What the noise does."""
    name = short(facts.config.get("sde"))
    return PATHS.get(name, f"the noise follows {name}")


def likelihood_meaning(facts: Facts, line: Line) -> str:
    """What the likelihood is, and what to compare it with."""
    dimensions = math.prod(facts.shape) or 1
    split = str(line.get("split"))
    known = {"test": "that the model has not been trained on", "train": "that the model has been trained on"}
    which = f"{many(facts)} {known.get(split, f'of the {split} data')}"
    if line.get("unit") == "bits/dim":
        meaning = (
            f"how many bits it takes, on average, to store one {dimension(facts)} of {which}, if the model "
            "says what is likely. Fewer is better"
        )
        if facts.levels:
            meaning += f"; knowing nothing, it takes log₂ {facts.levels} = {math.log2(facts.levels):.2f} bits"
        return f"{meaning}."
    return (
        f"minus the logarithm of the density that the model gives to {which}, divided by "
        f"their {dimensions} dimension{'s' if dimensions > 1 else ''}. Lower is better; it may be negative, and "
        "depends on the units of the data."
    )
