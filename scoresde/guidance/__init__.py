r"""Guidance: models made of models, which sampling steers towards a condition, a classifier or a loss.

Linear blends of the views of several models, sum_k w_k views_k with weights that add up to 1:

    ClassifierFree   (1 + s) conditional - s unconditional                        2207.12598, eq. 6
    Autoguidance     (1 + s) model - s weak                                       2406.02507, eq. 3 with w = 1 + s
    Composition      base + sum_k w_k (model_k - base)                            2206.01714

and gradients added to the score:

    Classifier       score + s grad log p(y | x_t)                                2105.05233, algorithm 1
    Loss             score - s grad L(E[x_0 | x_t])                               2302.07121

At s = 0 (for a composition, at w_k = 0) each is its first model. Write r for the exponent of p(x_t) p(y | x_t)^r: r = s
for `Classifier`, and r = 1 + s for `ClassifierFree`. The samples are those of p(x | y) only for r = 1, with the exact
p(y | x_t) or the exact conditional model. For any other r, the scores of p(x_t) p(y | x_t)^r at the times t do not
belong to one diffusion: the flow has a law of its own, which is *not* p(x) p(y | x)^r. A likelihood of the guided model
is the density of this flow, and its `conventions` say so.

`interval` limits guidance to noise levels sigma/alpha in [low, high] (2404.07724); outside of it a guided model is its
first model, and costs what that costs. Scales are numbers, or one number for each sample.
"""

from scoresde.guidance.blends import Autoguidance, ClassifierFree, Composition
from scoresde.guidance.gradients import Classifier, Loss
from scoresde.guidance.guided import Guided

__all__ = ["Autoguidance", "Classifier", "ClassifierFree", "Composition", "Guided", "Loss"]
