"""A run as one page: what was trained, what it draws, how good it is, and how to have it again."""

from scoresde.report.page import REPORT, FilmSettings, Source, render, write_report

__all__ = ["REPORT", "FilmSettings", "Source", "render", "write_report"]
