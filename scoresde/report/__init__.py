"""A run as one HTML page: what was trained, its samples, its quality, and the commands that reproduce it."""

from scoresde.report.film import FilmSettings
from scoresde.report.page import REPORT, Source, render, write_report

__all__ = ["REPORT", "FilmSettings", "Source", "render", "write_report"]
