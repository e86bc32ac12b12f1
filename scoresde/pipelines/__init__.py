"""Systems of several models: cascades of resolutions."""

from scoresde.pipelines.cascade import Cascade
from scoresde.pipelines.cascade_stage import CascadeBits, CascadeLogProb, CascadeSamples, CascadeStage

__all__ = ["Cascade", "CascadeBits", "CascadeLogProb", "CascadeSamples", "CascadeStage"]
