"""UniPC against its published algorithms."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from scoresde.samplers import UniPC
from tests.samplers.methods import EVERY_PATH, nodes, planned


def published(known, target, views, form, last=None):
    """2302.04867, algorithms 5 to 8, with data prediction: the part of x_s after x.

    With the view `last`, at the end of the step, it is that of the corrector.

    x_s = sigma_s/sigma_t x - alpha_s (e^-h - 1) m_0 - alpha_s B sum_m a_m D_m / r_m, where R a = b / B (eq. 9),
    b_n = n! h' phi_(n+1)(h') with h' = -h, phi_(n+1)(z) = int_0^1 e^((1-u) z) u^n / n! du.
    """
    h = target.lam - known[0].lam
    ratios = [(node.lam - known[0].lam) / h for node in known[1:]]
    differences = [view - views[0] for view in views[1:]]
    if last is not None:
        ratios, differences = [*ratios, 1.0], [*differences, last - views[0]]
    scale = {"bh1": -h, "bh2": math.expm1(-h)}[form]
    count = len(ratios)
    right = [-h * quad(lambda u, n=n: math.exp((u - 1) * h) * u**n, 0, 1)[0] for n in range(1, count + 1)]
    matrix = np.vander(ratios, count, increasing=True).T
    shares = np.linalg.solve(matrix, np.array(right) / scale) if count > 1 else np.full(count, 0.5)
    residual = sum(a * d / r for a, d, r in zip(shares, differences, ratios, strict=True))
    return -target.alpha * (math.expm1(-h) * views[0] + scale * residual)


@EVERY_PATH
@pytest.mark.parametrize("form", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_as_published(p, form, sde):
    points, plan, views, last = nodes(sde), planned(UniPC(p, form, final=0), sde), (0.9, -0.4, 1.3), 0.2
    past, target = [points[2], points[1], points[0]][:p], points[3]
    stage, correct = plan[2][0], plan[3][1]
    assert np.dot(stage.b, views[:p]) == pytest.approx(published(past, target, views[:p], form))
    assert stage.a == pytest.approx(target.sigma / points[2].sigma)
    assert np.dot(correct, (last, *views[:p])) == pytest.approx(published(past, target, views[:p], form, last))


def test_bad_arguments():
    with pytest.raises(ValueError, match="form must be 'bh1' or 'bh2'; got 'bh3'"):
        UniPC(2, "bh3")
