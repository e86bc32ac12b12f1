"""Inverse problems: samples of p(x | y) for a measurement y = A x + noise, with a model that was not trained for it."""

from scoresde.inverse.particles import Particles, TwistedParticles, pooled

__all__ = ["Particles", "TwistedParticles", "pooled"]
