"""UniPC (2302.04867): a multistep predictor, and a corrector that reuses its evaluations."""

import math
from collections.abc import Sequence

import numpy as np

from scoresde.arguments import checked
from scoresde.samplers.multistep import Multistep
from scoresde.sdes.transitions import Point


@checked
class UniPC(Multistep):
    """UniPC (2302.04867, algorithms 5 to 8): a multistep predictor and a corrector without evaluations of its own.

    It combines values of E[x_0 | x] (data prediction). The function B(h) of the paper is -h ("bh1") or e^-h - 1
    ("bh2"), where h is the step in lambda = log(alpha/sigma).

    Args:
        order: order p = 1, 2 or 3 of the predictor. The corrected method has order p + 1, but at most 2 if `final` = 1.
        form: "bh1" or "bh2".
        final: the highest order allowed in the last transition; the transition before it may have order `final` + 1,
            the one before that `final` + 2, and so on; 0 for no limit. The authors use 1, with a last step to sigma 0.
            If `denoise_final` makes that step, use 2 for the same orders.

    Raises:
        ValueError: order or form is none of these, or final is negative.
    """

    def __init__(self, order: int = 2, form: str = "bh2", final: int = 1):
        super().__init__(order, order, final, highest=3)
        if form not in ("bh1", "bh2"):
            raise ValueError(f"form must be 'bh1' or 'bh2'; got {form!r}")
        self.form = form

    def weights(self, nodes: Sequence[Point], here: Point, target: Point) -> tuple[float, ...]:
        h, corrects = target.lam - here.lam, nodes[0] is target
        phi1, first = math.expm1(-h), int(corrects)  # nodes[first] is `here`
        ratios = [(node.lam - here.lam) / h for node in nodes[first + 1 :]] + [1.0] * first
        b = np.zeros(len(nodes))
        b[first] = -phi1
        if ratios:
            base = -h if self.form == "bh1" else phi1
            shares = base * self._shares(ratios, h, base) / ratios
            b[first] += shares.sum()
            b[first + 1 :] -= shares[: len(ratios) - first]
            if corrects:
                b[0] = -shares[-1]
        return tuple((target.alpha * b).tolist())

    @staticmethod
    def _shares(ratios: Sequence[float], h: float, base: float) -> np.ndarray:
        """Return the coefficients a_m of 2302.04867, eq. 9, one for each ratio r_m; 1/2 if there is only one ratio."""
        count = len(ratios)
        if count == 1:
            return np.array([0.5])
        conditions, phi = [], math.expm1(-h) / -h - 1
        for i in range(1, count + 1):
            conditions.append(phi * math.factorial(i) / base)
            phi = phi / -h - 1 / math.factorial(i + 1)
        matrix = np.array([[r ** (i - 1) for r in ratios] for i in range(1, count + 1)])
        return np.linalg.solve(matrix, conditions)
