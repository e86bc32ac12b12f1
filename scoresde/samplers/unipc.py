"""UniPC (2302.04867): a multistep predictor, and a corrector that reuses its evaluations."""

import math
from collections.abc import Sequence

import numpy as np

from scoresde.samplers.exponential import check_order, limited, transport
from scoresde.samplers.linear import Linear, Row, Stage
from scoresde.sdes import SDE
from scoresde.sdes.points import Point


class UniPC(Linear):
    """UniPC (2302.04867, algorithms 5 to 8): a multistep predictor and a corrector without evaluations of its own.

    With data prediction, hh = -h, and B(h) = hh ("bh1") or e^hh - 1 ("bh2").

    Args:
        order: p = 1, 2 or 3 of the predictor; the corrected method has order p + 1, and 2 with `final` = 1.
        form: "bh1" or "bh2".
        final: order of the last transition at most, one more for each before it; 0 for no such limit. Its authors have
            1, counting a last step to sigma = 0: 2 where that is `denoise_final`.

    Raises:
        ValueError: another order or form.
    """

    view = "denoised"

    def __init__(self, order: int = 2, form: str = "bh2", final: int = 1):
        if form not in ("bh1", "bh2") or final < 0:
            raise ValueError(f"form 'bh1' or 'bh2' and final >= 0 expected; got {form!r}, {final}")
        self.past = self.order = check_order(order, 3)
        self.form, self.final = form, final

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        nodes = limited(nodes, target, left, self.final)
        a, _ = transport(nodes[0], target, 0.0)
        return Row((Stage(nodes[0].t, a, tuple(self._weights(nodes, target, ahead=False))),))

    def correction(self, nodes: Sequence[Point], target: Point, left: int) -> tuple[float, ...]:
        nodes = limited(nodes, target, left, self.final)
        return tuple(self._weights(nodes, target, ahead=True)) if math.isfinite(nodes[0].lam) else ()

    def _weights(self, nodes: Sequence[Point], target: Point, ahead: bool) -> list[float]:
        """Weights of the views at `nodes`, with that at `target` before them if it is known already."""
        h, first = target.lam - nodes[0].lam, int(ahead)
        phi1 = math.expm1(-h)
        ratios = [(node.lam - nodes[0].lam) / h for node in nodes[1:]] + [1.0] * first
        found = np.zeros(len(nodes) + first)
        found[first] = -phi1
        if ratios:
            base = -h if self.form == "bh1" else phi1
            shares = base * self._shares(ratios, h, base) / ratios
            found[first] += shares.sum()
            found[1 + first :] -= shares[: len(nodes) - 1]
            if ahead:
                found[0] = -shares[-1]
        return (target.alpha * found).tolist()

    @staticmethod
    def _shares(ratios: Sequence[float], h: float, base: float) -> np.ndarray:
        """The coefficients that satisfy the order conditions (eq. 9 there); of a single difference, 1/2."""
        count = len(ratios)
        if count == 1:
            return np.array([0.5])
        conditions, phi = [], math.expm1(-h) / -h - 1
        for i in range(1, count + 1):
            conditions.append(phi * math.factorial(i) / base)
            phi = phi / -h - 1 / math.factorial(i + 1)
        matrix = np.array([[r ** (i - 1) for r in ratios] for i in range(1, count + 1)])
        return np.linalg.solve(matrix, conditions)
