"""The report as one HTML file: what the run's directory says and the model shows, set by the templates.

The file needs nothing else: the style sheet and the pictures are in it, and there is no script. Everything that comes
from the run is escaped by the templates (Jinja with autoescape); what is `Markup` was built by `report.charts`. Beyond
that the page forbids the browser to load or to run anything (its Content-Security-Policy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.build import Run
from scoresde.data.summary import state_of
from scoresde.evaluation.records import provenance
from scoresde.report import words
from scoresde.report.commands import adding, reproducing
from scoresde.report.comparisons import comparisons, error_kinds, quality_tables
from scoresde.report.facts import Facts
from scoresde.report.film import check_numbers, run_film
from scoresde.report.likelihoods import cost, likelihoods, signed
from scoresde.report.pictures import file_uri
from scoresde.report.states import Gallery, Picture, film_samples, film_steps, frames, gallery, path_charts
from scoresde.report.training import training
from scoresde.training.checkpoint import replace_atomically

REPORT = "report.html"
BESIDE = 1500  # data shown beside samples, at most


@dataclass
class FilmSettings:
    """Of the film: samples followed and steps of a path, as many as suit the states if None; frames; the first seed."""

    samples: int | None = None
    steps: int | None = None
    frames: int = 9
    seed: int = 0


@dataclass
class Source:
    """All that a report is made of.

    path: the run's directory. config: its configuration, a plain mapping; config_text: as it is shown.
    run: its model, or why there is none. data: a split of its data by name, or why it is not to be had.
    named: the words by which a verb finds it: `run=...`, and what else it needs, as Hydra reads them.
    train: the words of the command that trains it, without these; None where it was not trained here.
    film: None to leave it out. device: that the film is computed on.
    """

    path: Path
    config: Mapping[str, Any]
    config_text: str
    run: Run | str
    named: Sequence[str]
    data: Mapping[str, Dataset | str] = field(default_factory=dict)
    train: Sequence[str] | None = None
    film: FilmSettings | None = field(default_factory=FilmSettings)
    device: str = "cpu"


def write_report(source: Source, path: Path | None = None) -> Path:
    """Write the report, `<run>/report.html` unless told otherwise, in one move.

    Raises:
        ValueError: a file of the run that is not what it should be.
    """
    page = render(source)
    path = path or source.path / REPORT
    replace_atomically(path, lambda file: file.write_text(page, encoding="utf-8"))
    return path


def render(source: Source) -> str:
    """The text of the page."""
    facts = Facts(source.path, dict(source.config))
    line = facts.likelihood
    split = str((line or {}).get("split", "test"))
    data = source.data.get(split, "the configuration names none")
    beside = None if isinstance(data, str) else some(data, BESIDE if facts.kind != "images" else 64)
    parts = {
        "facts": facts,
        "headline": headline(facts),
        "samples": sample_part(facts, beside),
        "film": film_part(source, facts),
        "training": training(facts),
        "likelihood": likelihoods(facts, data if facts.kind == "images" else None),
        "comparison": comparisons(facts),
        "quality": quality_tables(facts),
        "error_kinds": error_kinds(facts),
        "origins": origins(facts),
        "made": provenance(source.path, source.device),
        "commands": reproducing(facts, source.named, source.train),
        "adding": adding(facts, source.named, source.train),
        "config_text": source.config_text,
        "parameters": parameters(source, facts),
    }
    return environment().get_template("page.html").render(parts)


def environment() -> jinja2.Environment:
    """The templates, which escape what they are given."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("scoresde.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "sentence": words.sentence,
        "number": words.number,
        "pm": words.pm,
        "duration": words.duration,
        "signed": signed,
        "cost": cost,
    }
    found.globals |= {"words": words, "css": lambda: Markup(_read("style.css")), "UNITS": words.UNITS}
    return found


def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def parameters(source: Source, facts: Facts) -> int | None:
    """Learned numbers of the model."""
    if isinstance(source.run, str):
        return facts.trained[1]
    return sum(p.numel() for p in source.run.model.parameters())


def headline(facts: Facts) -> dict[str, Any]:
    """The title, and what stands below it."""
    line = facts.likelihood or {}
    last = next((one for one in reversed(facts.metrics) if (one.get("provenance") or {}).get("date")), None)
    origin = (last or {}).get("provenance") or {}
    date = datetime.fromisoformat(origin["date"]) if origin else facts.date
    if not origin.get("commit"):
        origin = {**origin, "commit": None}
    return {
        "name": str(facts.config.get("name") or facts.path.name),
        "likelihood": line or None,
        "date": None if date is None else date.astimezone(UTC),
        "commit": origin["commit"],
    }


def some(data: Dataset, count: int) -> Tensor | None:
    """At most so many states of a dataset, evenly spaced in it."""
    size = len(data)  # type: ignore[arg-type]
    if not size:
        return None
    indices = [i * size // min(count, size) for i in range(min(count, size))]
    return torch.stack([state_of(data[i]).double() for i in indices])


@dataclass
class Samples:
    """What the template shows of samples."""

    gallery: Gallery
    line: dict[str, Any] | None
    preview: Picture | None = None


def sample_part(facts: Facts, beside: Tensor | None) -> Samples | None:
    """The samples, or what the training drew last; None where there is neither."""
    if (drawn := facts.drawn) is not None:
        line, path = drawn
        found = gallery(facts, facts.samples(path), f"by {line['sampler']}", beside)
        return Samples(found, line)
    if facts.previews:
        last = facts.previews[-1]
        step = int("".join(filter(str.isdigit, last.stem)) or 0)
        alt = f"What the training drew at step {step:,}: samples of the model at that time."
        return Samples(
            Gallery(), None, Picture(file_uri(last.read_bytes()), alt, f"Drawn by the training, step {step:,}")
        )
    return None


def film_part(source: Source, facts: Facts) -> dict[str, Any]:
    """The film and the paths; or why there are none."""
    if source.film is None:
        return {"missing": "off"}
    if isinstance(source.run, str):
        return {"missing": source.run}
    run, settings = source.run, source.film
    count = film_samples(facts) if settings.samples is None else settings.samples
    steps = film_steps(facts) if settings.steps is None else settings.steps
    check_numbers(count, steps, settings.frames)
    try:
        film, paths = run_film(
            run.model, run.transform, list(facts.shape), count, steps, settings.frames, settings.seed
        )
    except Exception as error:  # whatever a network raises, one that wants a condition for example
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        return {"missing": f"the model gave none: {kind}{error}"}
    samples = facts.samples(facts.drawn[1]) if facts.drawn is not None else None
    return {
        "missing": "",
        "frames": frames(facts, film),
        "paths": path_charts(facts, paths, samples),
        "count": count,
        "steps": steps,
        "seed": settings.seed,
    }


def origins(facts: Facts) -> list[dict[str, Any]]:
    """Where figures came from: each kind of line with its provenance, the same ones once."""
    found: dict[tuple, dict[str, Any]] = {}
    for line in facts.metrics:
        known = line.get("provenance")
        if not known:
            continue
        versions = ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "numpy") if known.get(name))
        row = {
            "kind": str(line.get("kind")),
            "date": str(known.get("date", words.DASH))[:16].replace("T", " "),
            "version": known.get("version") or words.DASH,
            "commit": (known.get("commit") or words.DASH)[:12]
            + ("-dirty" if str(known.get("commit")).endswith("-dirty") else ""),
            "versions": versions,
            "device": known.get("device") or words.DASH,
            "processes": known.get("processes") or words.DASH,
            "checkpoint": (known.get("checkpoint") or words.DASH)[:12],
            "is_current": facts.is_current(line),
        }
        found[tuple(row[key] for key in ("kind", "date", "commit", "checkpoint"))] = row
    return list(found.values())
