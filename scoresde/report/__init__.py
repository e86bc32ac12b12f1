"""A run as one HTML page: what was trained, its samples, its quality, and the commands that reproduce it."""

from scoresde.report.film import FilmSettings
from scoresde.report.page import REPORT, Source, render, write_report
from scoresde.report.run_files import RunFiles
from scoresde.report.runs_page import Reported, measured, render_runs, write_runs_report

__all__ = [
    "REPORT",
    "FilmSettings",
    "Reported",
    "RunFiles",
    "Source",
    "measured",
    "render",
    "render_runs",
    "write_report",
    "write_runs_report",
]
