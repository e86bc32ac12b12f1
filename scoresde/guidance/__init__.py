r"""Guidance: models that combine other models to steer samples towards a condition, a class or a small loss.

The strength of the guidance is its scale s. The blends are weighted sums of the views (`scoresde.views`) of several
models, such as the score or E[x_0 | x_t], with weights that add up to 1:

    ClassifierFree   (1 + s) conditional - s unconditional                        2207.12598, eq. 6
    Autoguidance     (1 + s) model - s weak                                       2406.02507, eq. 3 with w = 1 + s
    Composition      base + sum_k w_k (model_k - base)                            2206.01714

The gradient methods add a gradient to the score:

    Classifier       score + s grad log p(y | x_t)                                2105.05233, algorithm 1
    Loss             score - s grad L(E[x_0 | x_t])                               2302.07121

At s = 0 the guided model is the first model of its formula; a composition with all w_k = 0 is its base.

The guided score at time t is that of p(x_t) p(y | x_t)^r, with r = s for `Classifier` and r = 1 + s for
`ClassifierFree`. For r = 1 the samples follow p(x | y), if p(y | x_t) or the conditional model is exact. For any other
r, these densities at different t are not the noisy marginals of one data distribution. The guided probability flow then
has a law of its own, which is *not* p(x) p(y | x)^r. The likelihood of a guided model is the density of that law, as
the `conventions` of a likelihood result state.

`interval` limits guidance to noise levels sigma/alpha in [low, high] (2404.07724); outside of it, only the first model
is evaluated. A scale is one number, or one number for each sample.
"""

from scoresde.guidance.blends import Autoguidance, ClassifierFree, Composition
from scoresde.guidance.gradients import Classifier, Loss
from scoresde.guidance.guided import Guided

__all__ = ["Autoguidance", "Classifier", "ClassifierFree", "Composition", "Guided", "Loss"]
