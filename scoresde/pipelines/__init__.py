"""Systems of several trained models, each of them a run."""

from scoresde.pipelines.cascade import Cascade
from scoresde.pipelines.cascade_stage import CascadeBits, CascadeLogProb, CascadeSamples, CascadeStage
from scoresde.pipelines.unclip import Embedder, EmbeddingSamples, UnCLIP

__all__ = [
    "Cascade",
    "CascadeBits",
    "CascadeLogProb",
    "CascadeSamples",
    "CascadeStage",
    "Embedder",
    "EmbeddingSamples",
    "UnCLIP",
]
