"""Evidence bounds: upper bounds on -log p(x) under the generative model that runs the *reverse SDE*.

They need no ODE, no trace and no solver, only the network's predictions on noisy data. The probability-flow ODE of the
same network is a different model with a different likelihood (`likelihood.log_prob`); neither value estimates the
other.

| function          | generative model                        | data, unit        | source                            |
| ----------------- | --------------------------------------- | ----------------- | --------------------------------- |
| `continuous`      | the reverse SDE, then a Gaussian decoder| grey levels, bits | 2101.09258, theorem 1; 2107.00630 |
| `continuous_nats` | as `continuous`, differentiable         | states, nats      | as `continuous`                   |
| `discrete`        | DDPM's chain over N nodes               | grey levels, bits | 2006.11239; 2102.09672            |

Standard errors. The range of times (or the nodes) is divided into strata, and each stratum gets two independent draws
for each image. A quarter of their squared difference estimates the variance of their mean without bias, even if the
strata differ. A single draw in each of twice as many strata would have slightly less variance, but no unbiased estimate
of it.
"""

from scoresde.bounds.bound import Bound, NatsBound
from scoresde.bounds.chain import DiscreteBound, discrete
from scoresde.bounds.evidence import continuous, continuous_nats

__all__ = ["Bound", "DiscreteBound", "NatsBound", "continuous", "continuous_nats", "discrete"]
