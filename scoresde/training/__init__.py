"""Training: the loop, its moving average and its checkpoints."""

from scoresde.training.ema import EMA
from scoresde.training.trainer import Interrupted, NonFiniteLoss, Trainer

__all__ = ["EMA", "Interrupted", "NonFiniteLoss", "Trainer"]
