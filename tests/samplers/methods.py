"""Every method that scoresde.samplers exports, with the steps it is given on a smooth law of a few modes."""

import torch

import scoresde as ss
from scoresde import samplers
from tests.conftest import seeded

METHODS = {
    "euler-maruyama": (samplers.EulerMaruyama(), 150),
    "euler-maruyama-0": (samplers.EulerMaruyama(l=0.0), 500),
    "stochastic-heun": (samplers.StochasticHeun(), 60),
    "reverse-diffusion": (samplers.ReverseDiffusion(), 150),
    "ancestral": (samplers.Ancestral(), 150),
    "ancestral-forward": (samplers.Ancestral("forward"), 150),
    "ancestral-learned": (samplers.Ancestral("learned"), 150),
    "ancestral-optimal": (samplers.OptimalVariance, 60),
    "ddim-0": (samplers.DDIM(0.0), 120),
    "ddim-1": (samplers.DDIM(1.0), 150),
    **{f"dpm-solver++-{p}": (samplers.DPMSolverPP(p), steps) for p, steps in ((1, 120), (2, 30), (3, 25))},
    **{f"dpm-solver++-{p}-published": (samplers.DPMSolverPP(p, form="published"), 30) for p in (2, 3)},
    **{f"sde-dpm-solver++-{p}": (samplers.DPMSolverPP(p, l=1.0), steps) for p, steps in ((1, 200), (2, 50), (3, 50))},
    **{
        f"unipc-{p}-{form}": (samplers.UniPC(p, form), 60 if p == 1 else 25)
        for p in (1, 2, 3)
        for form in ("bh1", "bh2")
    },
    "sa-solver": (samplers.SASolver(), 50),
    "sa-solver-0": (samplers.SASolver(l=0.0), 25),
    "sa-predictor": (samplers.SASolver(2, 0), 60),
    **{f"deis-{p}-{u}": (samplers.DEIS(p, u), 120 if p == 1 else 30) for p in (1, 2, 3, 4) for u in ("ratio", "time")},
    **{f"ipndm-{p}": (samplers.IPNDM(p), 120 if p == 1 else 30) for p in (1, 2, 3, 4)},
    **{
        f"dpm-solver-{p}-{v}": (samplers.DPMSolver(p, v), 120 // p**2) for p in (1, 2, 3) for v in ("denoised", "noise")
    },
    "angular-adams": (samplers.AngularAdams(), 25),
    "angular-bashforth": (samplers.AngularAdams(2, corrector=0), 40),
    "heun": (samplers.Heun(), 30),
    "edm": (samplers.EDM(churn=20.0), 60),
}
# Those that bear alpha = 0 at the start, by how their names begin.
FROM_NOISE = ("ancestral", "reverse-diffusion", "ddim", "dpm-solver++", "sde-dpm-solver++", "unipc", "sa-", "angular")


class WithVariance(torch.nn.Module):
    """The exact network of a mixture, and beside its output a learned variance that depends on the state."""

    def __init__(self, mixture, sde):
        super().__init__()
        self.exact = mixture.score_model(sde).network

    def forward(self, x, label, cond=None):
        return torch.cat([self.exact(x, label), torch.sin(3 * x)], dim=1)


def setup(name, mixture, sde):
    """The method of that name, and the exact model of the mixture that it runs on."""
    model = mixture.score_model(sde)
    if name == "ancestral-optimal":
        data = mixture.sample(400, generator=seeded(1))
        return samplers.Ancestral(samplers.OptimalVariance(model, data, 32, generator=seeded(2))), model
    if name == "ancestral-learned":
        model = ss.ScoreModel(WithVariance(mixture, sde), sde, "v", learned_variance=True)
    return METHODS[name][0], model
