"""DDIM against its published formula, and the methods that it is a special case of."""

import math

import numpy as np
import pytest

from scoresde.samplers import DDIM, DEIS, IPNDM, Ancestral, DPMSolver, DPMSolverPP, SASolver
from tests.conftest import close, make_transition, normal, oracle
from tests.samplers.methods import EVERY_PATH, nodes, planned


@EVERY_PATH
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_as_published(eta, sde):
    """2010.02502, eq. 12 and 16, on any path: its alpha_t is alpha^2/(alpha^2 + sigma^2) here."""
    here, target = nodes(sde, (-0.5, 0.2))
    ((stage, _),) = planned(DDIM(eta), sde, (-0.5, 0.2))
    bar_t, bar_s = (here.alpha / here.size) ** 2, (target.alpha / target.size) ** 2
    c = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    x, denoised = 0.7, -0.3
    eps = (x - math.sqrt(bar_t) * denoised) / math.sqrt(1 - bar_t)
    mean = math.sqrt(bar_s) * denoised + math.sqrt(1 - bar_s - c * c) * eps
    assert stage.a * here.size * x + stage.b[0] * denoised == pytest.approx(target.size * mean)
    assert stage.c == pytest.approx(target.size * c, rel=1e-13, abs=1e-15)


@EVERY_PATH
def test_first_orders_of_other_methods_are_ddim_or_an_ancestral_step(sde):
    def coefficients(step):
        return [(stage.a, *stage.b, stage.c) for stage, _ in planned(step, sde)]

    plain, noisy = coefficients(DDIM()), coefficients(DDIM(1.0))
    for step in (DPMSolverPP(1), SASolver(1, 0, 0.0), DPMSolverPP(1, form="published"), DPMSolver(1)):
        np.testing.assert_allclose(coefficients(step), plain, rtol=1e-9, atol=1e-12)
    for step in (DPMSolverPP(1, 1.0), SASolver(1, 0, 1.0), Ancestral()):
        np.testing.assert_allclose(coefficients(step), noisy, rtol=1e-9, atol=1e-12)
    model, x = oracle((2,)).score_model(sde), normal(3, 2)
    t, s = (point.t for point in nodes(sde, (-0.5, 0.2)))
    expected = make_transition(DDIM(), model, x, t, s)
    for step in (DEIS(1, "ratio"), DEIS(1, "time"), IPNDM(1), DPMSolver(1, "noise")):
        close(make_transition(step, model, x, t, s), expected, 1e-9, 1e-12)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_bad_arguments(eta):
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
        DDIM(eta)
