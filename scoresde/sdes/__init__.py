"""Diffusions: the base class `SDE`, the reverse processes `ReverseSDE`, and the noise schedules of the literature."""

from scoresde.sdes.learned import LearnedVP
from scoresde.sdes.log_snr import LogSNRPath
from scoresde.sdes.noise_schedules import VE, VP, Cosine, Karras, Rectified, SubVP
from scoresde.sdes.sde import SDE, ReverseSDE, checked_times
from scoresde.sdes.tabulated import DDPM, NCSN, CosineDDPM, Tabulated, ZeroTerminalSNR

__all__ = [
    "DDPM",
    "NCSN",
    "SDE",
    "VE",
    "VP",
    "Cosine",
    "CosineDDPM",
    "Karras",
    "LearnedVP",
    "LogSNRPath",
    "Rectified",
    "ReverseSDE",
    "SubVP",
    "Tabulated",
    "ZeroTerminalSNR",
    "checked_times",
]
