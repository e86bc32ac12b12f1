"""Systems of several trained models, each of them a run."""

from scoresde.pipelines.unclip import Embedder, EmbeddingSamples, UnCLIP

__all__ = ["Embedder", "EmbeddingSamples", "UnCLIP"]
