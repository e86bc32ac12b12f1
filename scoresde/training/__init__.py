"""Training: the loop, moving averages of the weights, checkpoints and logs."""

from scoresde.training.ema import EMA
from scoresde.training.trainer import Interrupted, NonFiniteLoss, Trainer

__all__ = ["EMA", "Interrupted", "NonFiniteLoss", "Trainer"]
