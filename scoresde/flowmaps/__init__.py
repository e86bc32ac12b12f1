"""Flow maps: models that jump along the probability flow in both directions, their likelihood, and their objectives.

`FlowMap` is the model (`flowmaps.flow_map`), `Jump` its step in a sampler, and `Jumps` takes the place of a solver in
likelihoods. The objectives are listed in `flowmaps.flow_map_objective`.
"""

from scoresde.flowmaps.angle import AnglePath, UniformClock
from scoresde.flowmaps.consistency import Consistency
from scoresde.flowmaps.flow_map import FlowMap
from scoresde.flowmaps.flow_map_objective import FlowMapObjective
from scoresde.flowmaps.jumps import Jump, Jumps
from scoresde.flowmaps.mean_flow import MeanFlow
from scoresde.flowmaps.progressive_distillation import ProgressiveDistillation
from scoresde.flowmaps.trajectory_distillation import TrajectoryDistillation

__all__ = [
    "AnglePath",
    "Consistency",
    "FlowMap",
    "FlowMapObjective",
    "Jump",
    "Jumps",
    "MeanFlow",
    "ProgressiveDistillation",
    "TrajectoryDistillation",
    "UniformClock",
]
