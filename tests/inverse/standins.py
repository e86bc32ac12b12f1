"""A linear operator from a matrix, with the interface of `inverse.operators`, for the tests of samplers and constraints."""

import torch

from tests.conftest import f64, normal


class Matrix:
    """y = A x for states (B, *) of D numbers in all and a matrix (m, D), with the spectrum from its SVD."""

    is_linear = True

    def __init__(self, matrix, noise_std=0.0, has_spectrum=True):
        self.matrix, self.has_spectrum = matrix, has_spectrum
        self.noise_std = torch.as_tensor(noise_std, dtype=torch.float64)
        _, s, self.axes = torch.linalg.svd(matrix, full_matrices=True)
        self.s = torch.cat([s, s.new_zeros(matrix.shape[1] - len(s))])

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.mT.to(x)

    def adjoint(self, y):
        return (y @ self.matrix.to(y)).reshape(-1, *self.shape)

    def pseudo_inverse(self, y):
        return (y @ torch.linalg.pinv(self.matrix).mT.to(y)).reshape(-1, *self.shape)

    def to_spectrum(self, x):
        return (x.flatten(1) @ self.axes.mT.to(x)).reshape(x.shape)

    def from_spectrum(self, c):
        return (c.flatten(1) @ self.axes.to(c)).reshape(c.shape)

    def singular_values(self, shape):
        return self.s.reshape(tuple(shape))

    @property
    def shape(self):
        return (self.matrix.shape[1],)

    def measure(self, x, seed=0):
        y = self(x)
        return y + self.noise_std * normal(*y.shape, seed=seed)


class Images(Matrix):
    """The same for states of another shape."""

    def __init__(self, matrix, shape, noise_std=0.0, has_spectrum=True):
        super().__init__(matrix, noise_std, has_spectrum)
        self.event = tuple(shape)

    @property
    def shape(self):
        return self.event


class Function:
    """y = f(x), not linear."""

    is_linear, has_spectrum = False, False

    def __init__(self, function, noise_std):
        self.function, self.noise_std = function, f64(noise_std)

    def __call__(self, x):
        return self.function(x)


def exact_posterior(mixture, matrix, noise_std, y):
    """Log p(y), and the weights (K,), means (K, D) and covariances (K, D, D) of p(x | y), for a mixture of R = I."""
    means, variances = mixture.means, mixture.stds.square()
    noise = torch.eye(len(matrix), dtype=torch.float64) * noise_std**2
    joint, centres, spreads = [], [], []
    for k in range(len(means)):
        cov = variances[k].diag()
        total = matrix @ cov @ matrix.mT + noise
        gain = cov @ matrix.mT @ torch.linalg.inv(total)
        law = torch.distributions.MultivariateNormal(matrix @ means[k], total)
        joint.append(mixture.log_weights[k] + law.log_prob(y))
        centres.append(means[k] + gain @ (y - matrix @ means[k]))
        spreads.append(cov - gain @ matrix @ cov)
    joint = torch.stack(joint)
    return joint.logsumexp(0), joint.softmax(0), torch.stack(centres), torch.stack(spreads)
