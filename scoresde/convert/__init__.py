"""Convert checkpoints of other projects to runs (model, transform, configuration), as `scoresde.load` returns them."""

from scoresde.convert.from_adm import adm, adm_classifier
from scoresde.convert.from_diffusers import diffusers
from scoresde.convert.from_edm import edm
from scoresde.convert.from_edm2 import edm2
from scoresde.convert.from_score_sde import score_sde
from scoresde.convert.runs import save_run

__all__ = ["adm", "adm_classifier", "diffusers", "edm", "edm2", "save_run", "score_sde"]
