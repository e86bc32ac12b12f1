"""The table of the methods that scoresde.samplers exports: a new step is one line in METHODS."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde.samplers import (
    DDIM,
    DEIS,
    EDM,
    IPNDM,
    Ancestral,
    AngularAdams,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    Linear,
    OptimalVariance,
    ReverseDiffusion,
    SASolver,
    StochasticHeun,
    UniPC,
)
from scoresde.sdes.transitions import points
from tests.conftest import f64, seeded

PATHS = {"sub-vp": ss.SubVP(), "vp": ss.VP(), "ve": ss.VE(), "rectified": ss.Rectified()}
EVERY_PATH = pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)


@dataclass(frozen=True)
class Method:
    """A step and its properties, each of which is tested.

    step: the step, or a function (model, data) -> step.
    order: order of convergence with equal steps in lambda: strong if it draws no noise, weak if it does. None if it is
        not measured here.
    steps: number of steps with which its samples have the law of the oracle; None if its order is enough.
    level: noise level of the reverse process whose transitions it approximates, 0 for the probability flow.
    evaluations: of the network, in a step.
    from_noise: whether it can start where alpha = 0. to_data: whether it can end where sigma = 0.
    many: whether its order shows with many steps only.
    few: the largest relative error of the variance at 10 and at 20 evaluations, on its own grid and on every path.
    """

    step: Linear | Callable
    order: int | None
    steps: int | None = None
    level: float = 0.0
    evaluations: int = 1
    from_noise: bool = True
    to_data: bool = True
    many: bool = False
    few: tuple[float, float] = (0.6, 0.45)


def optimal(model, data):
    return Ancestral(OptimalVariance(model, data, 32, generator=seeded(2)))


NEEDS_SIGNAL, REVERSE = {"from_noise": False}, {"level": 1.0}
UNSTABLE = (math.inf, 6.0)  # explicit in t: five steps are too few on any grid
VIEWS, VARIABLES, FORMS = ("denoised", "noise"), ("ratio", "time"), ("bh1", "bh2")
METHODS = {
    "euler-maruyama": Method(EulerMaruyama(), 1, 150, 1.0, from_noise=False, few=(1.0, 0.2)),
    "euler-maruyama-half": Method(EulerMaruyama(0.5), 1, level=0.5, from_noise=False, few=(0.7, 0.45)),
    "euler-maruyama-0": Method(EulerMaruyama(0.0), 1, **NEEDS_SIGNAL, few=(1.2, 1.0)),
    "stochastic-heun": Method(StochasticHeun(), 2, 60, 1.0, 2, from_noise=False, to_data=False, few=UNSTABLE),
    "stochastic-heun-half": Method(StochasticHeun(0.5), 2, None, 0.5, 2, from_noise=False, to_data=False, few=UNSTABLE),
    "stochastic-heun-0": Method(StochasticHeun(0.0), 2, evaluations=2, **NEEDS_SIGNAL, to_data=False, few=UNSTABLE),
    "reverse-diffusion": Method(ReverseDiffusion(), 1, 150, **REVERSE, few=(4.0, 0.7)),
    "ancestral": Method(Ancestral(), 1, 150, **REVERSE),
    "ancestral-forward": Method(Ancestral("forward"), 1, 150, **REVERSE, few=(4.0, 0.7)),
    "ancestral-learned": Method(Ancestral("learned"), None, 150, **REVERSE),
    "ancestral-optimal": Method(optimal, None, 60, **REVERSE),
    "ddim": Method(DDIM(), 1, 120),
    "ddim-half": Method(DDIM(0.5), 1, 150, 0.5),
    "ddim-1": Method(DDIM(1.0), 1, 150, **REVERSE),
    **{f"dpm-solver++-{p}": Method(DPMSolverPP(p), p, 30 if p == 2 else None) for p in (1, 2, 3)},
    "dpm-solver++-2-published": Method(DPMSolverPP(2, form="published"), 2),
    "dpm-solver++-3-published": Method(DPMSolverPP(3, form="published"), 2, 30, many=True),
    "dpm-solver++-3-final": Method(DPMSolverPP(3, final=1), 2, many=True),
    "sde-dpm-solver++-1": Method(DPMSolverPP(1, 1.0), 1, 200, **REVERSE, few=(0.7, 0.45)),
    "sde-dpm-solver++-2": Method(DPMSolverPP(2, 1.0), 2, 50, **REVERSE, few=(0.85, 0.45)),
    "sde-dpm-solver++-2-half": Method(DPMSolverPP(2, 0.5), 2, level=0.5, few=(1.0, 0.2)),
    "sde-dpm-solver++-2-published": Method(DPMSolverPP(2, 1.0, "published"), 2, **REVERSE),
    "sde-dpm-solver++-3": Method(DPMSolverPP(3, 1.0), 2, 50, many=True, **REVERSE, few=(0.8, 0.1)),
    "sde-dpm-solver++-3-published": Method(DPMSolverPP(3, 1.0, "published"), 2, many=True, **REVERSE, few=(0.7, 0.2)),
    **{f"unipc-{p}-{form}": Method(UniPC(p, form, 0), p + 1, few=(0.85, 0.25)) for p in (1, 2, 3) for form in FORMS},
    "unipc": Method(UniPC(), None, few=(0.3, 0.05)),
    "unipc-3": Method(UniPC(3), 2, 25, many=True, few=(0.4, 0.05)),
    **{f"sa-{s}-0": Method(SASolver(s, 0, 0.0), s, few=(0.45, 0.3)) for s in (1, 2, 4)},
    **{f"sa-{s}-{c}": Method(SASolver(s, c, 0.0), 1 + min(s, c)) for s, c in ((1, 3), (2, 2), (3, 1), (3, 3))},
    "sa-3-2": Method(SASolver(3, 2, 0.0), 3, many=True, few=(0.3, 0.05)),
    "sa-4-4": Method(SASolver(4, 4, 0.0), 5, many=True, few=(0.25, 0.05)),
    "sa-solver": Method(SASolver(), 2, 50, many=True, **REVERSE, few=(0.5, 0.05)),
    "sde-sa-1-0": Method(SASolver(1, 0), 1, **REVERSE, few=(0.7, 0.45)),
    "sde-sa-1-1": Method(SASolver(1, 1), 2, **REVERSE),
    **{f"sde-sa-2-{c}": Method(SASolver(2, c), 2, **REVERSE, few=(0.85, 0.45)) for c in (0, 1)},
    "sde-sa-2-2": Method(SASolver(2, 2), 2, many=True, **REVERSE, few=(0.85, 0.4)),
    **{f"deis-{p}-{v}": Method(DEIS(p, v), p, **NEEDS_SIGNAL) for p in (1, 2, 4) for v in VARIABLES},
    **{f"deis-3-{v}": Method(DEIS(3, v), 3, 30, **NEEDS_SIGNAL) for v in VARIABLES},
    **{f"ipndm-{p}": Method(IPNDM(p), min(p, 2), 30 if p == 4 else None, **NEEDS_SIGNAL) for p in (1, 2, 3, 4)},
    **{f"dpm-solver-1-{v}": Method(DPMSolver(1, v), 1, **NEEDS_SIGNAL, to_data=False) for v in VIEWS},
    **{
        f"dpm-solver-2-{v}": Method(DPMSolver(2, v), 2, 30, 0.0, 2, from_noise=False, few=(1.0, 0.25), to_data=False)
        for v in VIEWS
    },
    **{f"dpm-solver-3-{v}": Method(DPMSolver(3, v), 3, evaluations=3, **NEEDS_SIGNAL, to_data=False) for v in VIEWS},
    **{f"angular-{p}-0": Method(AngularAdams(p, 0, 0), p) for p in (1, 2, 3, 4)},
    **{f"angular-{p}-{c}": Method(AngularAdams(p, c, 0), 1 + min(p, c)) for p, c in ((1, 1), (2, 2), (3, 3))},
    "angular-3-2": Method(AngularAdams(3, 2, 0), 3, many=True),
    "angular-adams": Method(AngularAdams(), 2, 25, many=True, few=(0.02, 0.005)),
    "heun": Method(Heun(), 2, 30, evaluations=2, **NEEDS_SIGNAL, few=(40.0, 0.65)),
    "edm-40": Method(EDM(), None, None, 1.0, 2, from_noise=False, few=(30.0, 0.8)),
    "edm": Method(EDM(20.0), None, 60, 1.0, 2, from_noise=False, few=(30.0, 0.8)),
}
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
STOCHASTIC = [name for name, method in METHODS.items() if method.level]


def representatives(names):
    """The last method of each class, with and without noise."""
    return list({(type(METHODS[name].step), METHODS[name].level > 0): name for name in names}.values())


class WithVariance(torch.nn.Module):
    """The exact network of a mixture, with a learned variance that depends on the state."""

    def __init__(self, mixture, sde):
        super().__init__()
        self.exact = mixture.score_model(sde).network

    def forward(self, x, label, cond=None):
        return torch.cat([self.exact(x, label), torch.sin(3 * x)], dim=1)


def setup(name, mixture, sde):
    """(step, model): the method of this name, and the exact model of the mixture that it runs on."""
    step, model = METHODS[name].step, mixture.score_model(sde)
    if not isinstance(step, Linear):
        step = step(model, mixture.sample(400, generator=seeded(1)))
    if getattr(step, "variance", None) == "learned":
        model = ss.ScoreModel(WithVariance(mixture, sde), sde, "v", learned_variance=True)
    return step, model


# Coefficients of multistep methods

LAMBDAS = (-1.3, -0.9, -0.2, 0.1, 0.8)  # unequal steps


def pairs(*times):
    return [(f64(a), f64(b)) for a, b in pairwise(times)]


def nodes(sde, lams=LAMBDAS):
    """The points of a path at these lambda."""
    return points(sde, [sde.time(f64(2 * lam)) for lam in lams])


def planned(step, sde, lams=LAMBDAS):
    """The stage of every transition between these lambda, and its correction."""
    plan = step.plan(sde, list(pairwise(point.t for point in nodes(sde, lams))))
    return [(row.stages[0], row.correct) for row in plan]


def polynomial(nodes, j, at):
    """The Lagrange polynomial of node j."""
    return math.prod((at - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)
