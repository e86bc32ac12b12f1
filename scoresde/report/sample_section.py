"""The section on samples: pictures or charts of samples and data, or the last picture that was drawn in training."""

from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.report.pictures import Picture, grid_uri, png_uri
from scoresde.report.run_files import Line, RunFiles
from scoresde.report.state_charts import sample_charts, small_charts
from scoresde.report.wording import number, states
from scoresde.state_plots import RealData

MOST_IMAGES = 64
MOST_PIXELS = 2**20  # of a grid of images


def sample_section(files: RunFiles, drawn: tuple[Line, Tensor] | None, real: RealData | None) -> dict[str, Any]:
    """Return the variables for the section's template.

    Args:
        files: the files of the run.
        drawn: the line of metrics.jsonl about the samples, and the samples (N, *); None if there are none.
        real: real data to show beside the samples; None if they are not available.
    """
    if drawn is None:
        previews = sorted((files.path / "figures").glob("step*.png"))
        return {"line": None, "pictures": [preview(path) for path in previews[-1:]], "charts": [], "small": []}
    line, samples = drawn
    if files.kind != "images":
        charts, small = sample_charts(files, samples, real), small_charts(files, samples, real)
        return {"line": line, "pictures": [], "charts": charts, "small": small}
    pictures = [image_picture(files, samples, f"Samples by {line['sampler']}")]
    if real is not None:
        pictures.append(image_picture(files, real.states, "Real data for comparison"))
    return {"line": line, "pictures": pictures, "charts": [], "small": []}


def preview(path: Path) -> Picture:
    """Return a picture that was drawn during training."""
    caption = f"Drawn during training, step {int(''.join(filter(str.isdigit, path.stem)) or 0):,}"
    return Picture(png_uri(path.read_bytes()), f"{caption}: samples of the model at that time.", caption)


def image_picture(files: RunFiles, images: Tensor, caption: str) -> Picture:
    """Return a picture with as many of the images (N, C, H, W) as fit into a square grid."""
    count = max(1, min(MOST_IMAGES, len(images), MOST_PIXELS // images[0, 0].numel()))
    images = images[:count]
    values = f"values from {number(float(images.min()), 3)} to {number(float(images.max()), 3)}"
    uri = grid_uri(images.floor() if files.levels else images, files.bounds)
    return Picture(uri, f"{caption}: {count} {states(files)} in a grid, {values}.", caption)
