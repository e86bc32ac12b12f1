"""Evaluation of a run."""
