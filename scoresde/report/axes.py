"""Axes of a chart: from numbers to places, and the round numbers that are written beside them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)  # what steps between ticks are, times a power of ten
MINUS = "\N{MINUS SIGN}"
WIDE = 20.0  # ratio of positive values from which on an axis is better logarithmic


def text(value: float) -> str:
    """A number as an axis has it: with a minus sign, and powers of ten where it is far from 1."""
    if value and not 1e-4 <= abs(value) < 1e6:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        digits = f"{value / 10.0**power:.3g}"
        exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{exponent}" if digits == "1" else f"{digits.replace('-', MINUS)}·10{exponent}"
    return f"{value:,.6g}".replace("-", MINUS)


@dataclass(frozen=True)
class Axis:
    """From values in [low, high] to places in [start, stop].

    Args:
        low, high: of the values, low < high; positive on a logarithmic axis.
        start, stop: of the places; a vertical axis of SVG starts below, start > stop.
        log: logarithmic.
        count: of ticks, about.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    count: int = 5

    def __call__(self, value: float) -> float:
        """The place of a value, within the ends."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis: in equal steps, or 1, 2 and 5 of each decade, of many decades some 1 alone."""
        if not self.log:
            return steps(self.low, self.high, self.count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for leading in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**power for power in decades for digit in leading]
            inside = [v for v in found if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if len(inside) <= self.count + 2:
                return inside if len(inside) > 1 else [self.low, self.high]
        return inside[:: math.ceil(len(inside) / (self.count + 1))]


def steps(low: float, high: float, count: int) -> list[float]:
    """The multiples of a round number in [low, high], about `count` of them."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min(ROUND, key=lambda r: abs(math.log(r * power / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def span(values: Iterable[float], log: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """The ends of an axis that shows all the finite values, with a margin; only positive ones if logarithmic."""
    kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not kept:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(kept), max(kept)
    if log:
        wider = max((high / low) ** margin, 1.05)
        return low / wider, high * wider
    wider = margin * (high - low) or 0.5 * abs(high) or 1.0
    return low - wider, high + wider


def is_wide(values: Iterable[float]) -> bool:
    """Whether values are all positive, and so far apart that a logarithmic axis shows them better."""
    kept = [v for v in values if math.isfinite(v)]
    return bool(kept) and min(kept) > 0 and max(kept) > WIDE * min(kept)
