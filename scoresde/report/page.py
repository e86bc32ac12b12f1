"""The report as one HTML file, rendered from templates with the variables of all sections.

The file loads nothing: the style sheet and the pictures are in it, and there is no script. Jinja escapes everything
that comes from the run; only `Markup`, which `report.charts` builds, is inserted as it is. In addition, the page's
Content-Security-Policy forbids the browser to load or run anything.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from torch.utils.data import Dataset

from scoresde.atomic_files import replace_atomically
from scoresde.build import Run
from scoresde.evaluation.records import provenance
from scoresde.plots import metric_name
from scoresde.report import wording
from scoresde.report.classification_section import classification_section
from scoresde.report.commands import adding, reproducing
from scoresde.report.film import FilmSettings
from scoresde.report.film_section import film_section
from scoresde.report.likelihood_section import likelihood_section
from scoresde.report.quality_section import quality_section
from scoresde.report.restoration_section import restoration_section
from scoresde.report.run_files import Line, RunFiles
from scoresde.report.sample_section import MOST_IMAGES, sample_section
from scoresde.report.sampler_section import sampler_section
from scoresde.report.training_section import training_section
from scoresde.state_plots import real_data

REPORT = "report.html"
MOST_DATA = 1500  # states of real data shown beside samples that are not images


@dataclass
class Source:
    """The inputs of a report.

    path: the run's directory. config: the run's configuration, a plain mapping; config_text: the same as text to show.
    run: the loaded run, or the reason why it could not be loaded. data: returns the data of a split by name, or the
    reason why they are not available. overrides: the overrides that select the run in a command, `run=...`, and
    `trust=[...]` if the run needs it. train: words of the command that trained the run; None if it was not recorded.
    film: settings of the film; None to leave it out. device: the device that computes the film.
    """

    path: Path
    config: Mapping[str, Any]
    config_text: str
    run: Run | str
    data: Callable[[str], Dataset | str]
    overrides: Sequence[str]
    train: Sequence[str] | None = None
    film: FilmSettings | None = field(default_factory=FilmSettings)
    device: str = "cpu"


def write_report(source: Source, path: Path | None = None) -> Path:
    """Write the report atomically, to `<run>/report.html` by default, and return its path.

    Raises:
        ValueError: a file of the run does not have its format.
    """
    page, path = render(source), path or source.path / REPORT
    replace_atomically(path, lambda file: file.write_text(page, encoding="utf-8"))
    return path


def render(source: Source) -> str:
    """Return the HTML text of the page."""
    files = RunFiles(source.path, source.config)
    line, drawn = files.likelihood(), files.samples()
    data = source.data(line["split"] if line else "test")
    real = real_data(source.data, files.shape, MOST_IMAGES if files.kind == "images" else MOST_DATA)
    singular, plural = wording.nouns(files)
    return (
        environment()
        .get_template("page.html")
        .render(
            files=files,
            name=str(files.config.get("name") or files.path.name),
            line=line,
            noun=singular,
            nouns=plural,
            states=wording.states(files),
            samples=sample_section(files, drawn, real),
            restorations=restoration_section(files),
            film=film_section(files, source.run, source.film, None if drawn is None else drawn[1]),
            training=training_section(files),
            likelihood=likelihood_section(files, data),
            classification=classification_section(files),
            comparison=sampler_section(files),
            quality=quality_section(files),
            origins=origins(files),
            made=provenance(source.path, source.device),
            commands=reproducing(files, source.overrides, source.train),
            adding=adding(files, source.overrides, source.train),
            config_text=source.config_text,
        )
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates' environment, which escapes everything but Markup."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("scoresde.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (
        wording.sentence,
        wording.number,
        wording.with_error,
        wording.duration,
        wording.class_name,
        wording.setting,
    )
    templates.filters |= {function.__name__: function for function in functions}
    css = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    templates.globals |= {"css": Markup(css), "UNITS": wording.UNITS, "DASH": wording.DASH}
    templates.globals |= {"metric_name": metric_name, "log2": math.log2, "prod": math.prod}
    return templates


def origins(files: RunFiles) -> list[Line]:
    """Return one line of `metrics.jsonl` for each combination of kind of result, date, commit and checkpoint."""
    lines = [line for line in files.metrics if line.get("provenance")]
    keys = [(line.get("kind"), *map(line["provenance"].get, ("date", "commit", "checkpoint"))) for line in lines]
    return list(dict(zip(keys, lines, strict=True)).values())
