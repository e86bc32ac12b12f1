"""The sections on how samples emerge from noise: the film, and the paths."""

from typing import Any

from torch import Tensor

from scoresde.build import Run
from scoresde.report.film import Film, FilmSettings, check_numbers, run_film
from scoresde.report.pictures import Picture, grid_uri
from scoresde.report.run_files import RunFiles
from scoresde.report.state_charts import film_panels, path_charts
from scoresde.report.wording import MINUS

MOST_IMAGES = 4  # images shown at each time


def film_section(
    files: RunFiles, run: Run | str, settings: FilmSettings | None, samples: Tensor | None
) -> dict[str, Any]:
    """Compute the film, and return the variables for the templates of its sections.

    If there is no film, the variable `missing` says why; otherwise it is empty.

    Args:
        files: the files of the run.
        run: the loaded run, or the reason why it could not be loaded.
        settings: settings of the film; None to leave it out.
        samples: stored samples (N, *) of the run; None if there are none.

    Raises:
        ValueError: a number in the settings is out of range.
    """
    if settings is None or isinstance(run, str):
        return {"missing": "off" if settings is None else run}
    is_costly = files.kind in ("images", "series")
    count = settings.samples if settings.samples is not None else 6 if is_costly else 300
    steps = settings.steps if settings.steps is not None else 40 if is_costly else 120
    check_numbers(count, steps, settings.frames)
    try:
        film = run_film(run.model, run.transform, list(run.state_shape), count, steps, settings.frames, settings.seed)
    except Exception as error:  # a user's network may raise anything, for example if it needs a condition
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        return {"missing": f"the model failed: {kind}{error}"}
    labels = [f"{float(film.log_snr[i]):+.1f}".replace("-", MINUS).replace("+0.0", "0.0") for i in film.frames]
    draw = image_frames if files.kind == "images" else film_panels
    frames = [
        {"label": label, "state": state, "denoised": denoised}
        for label, (state, denoised) in zip(labels, draw(files, film, labels), strict=True)
    ]
    paths = path_charts(files, film, samples)
    return {"missing": "", "frames": frames, "paths": paths, "steps": steps, "seed": settings.seed}


def image_frames(files: RunFiles, film: Film, labels: list[str]) -> list[tuple[Picture, Picture]]:
    """Return the pictures of the states x_t and of the denoised views E[x_0 | x_t] at each time shown."""

    def picture(x: Tensor, name: str, label: str) -> Picture:
        x = x[:MOST_IMAGES]
        spread = f"standard deviation of the values {float(x.double().std()):.3g}"
        return Picture(grid_uri(x, files.bounds, columns=1), f"{len(x)} {name} at log-SNR {label}; {spread}.")

    return [
        (picture(state, "states", label), picture(denoised, "denoised views", label))
        for state, denoised, label in zip(film.flow[film.frames], film.denoised, labels, strict=True)
    ]
