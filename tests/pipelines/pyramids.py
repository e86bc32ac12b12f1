"""Gaussian pyramids: joint normal laws of a low resolution and a fine part, and the exact models of their stages."""

import torch
from torch.distributions import MultivariateNormal

import scoresde as ss
from scoresde.pipelines import CascadeStage
from tests.conftest import normal

LARGEST = 0.9  # level of the augmentation that the stages "were trained with"


def covariance(size, seed, scale=0.5):
    """A random covariance whose correlations are large."""
    factor = normal(size, size, seed=seed)
    return scale**2 * (factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64))


class Conditional(torch.nn.Module):
    """E[eps | x_t, image] of the fine part of a joint normal law of (mean, fine part), given the image of any level.

    With no image it is that of the mean alone, for a first stage.
    """

    def __init__(self, sde, law, size, resolutions=None, upsampling=None):
        super().__init__()
        self.path, self.law, self.size, self.resolutions = (sde,), law, size, resolutions
        self.downsampling = None if upsampling is None else torch.linalg.pinv(upsampling)
        self.conditions = [] if resolutions is None else ["image"]

    def given(self, z, level):
        """Mean (B, d) and covariance (d, d) of the fine part given z at one level, and the map from z to the mean."""
        mean, cov, k = self.law.mean, self.law.covariance_matrix, self.size
        keep = (1 - level**2) ** 0.5
        total = keep**2 * cov[:k, :k] + level**2 * torch.eye(k, dtype=torch.float64)
        gain = keep * torch.linalg.solve(total, cov[:k, k:]).T
        return mean[k:] + (z - keep * mean[:k]) @ gain.T, cov[k:, k:] - keep * gain @ cov[:k, k:], gain

    def forward(self, x, label, cond=None):
        sde, t = self.path[0], label.double()
        if self.resolutions is None:
            mean, cov = self.law.mean, self.law.covariance_matrix
        else:
            image, level = cond["image"][:, :-1].double(), float(cond["image"].flatten(1)[0, -1])
            z = image.flatten(1) if self.downsampling is None else image.flatten(1) @ self.downsampling.T
            mean, cov, _ = self.given(z, level)
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        values, vectors = torch.linalg.eigh(cov)
        residual = (x.double().flatten(1) - alpha * mean) @ vectors
        noise = sigma * residual / (alpha.square() * values + sigma.square())
        return (noise @ vectors.T).reshape(x.shape).to(x)


def law_of(size, seed, **options):
    return MultivariateNormal(0.3 * normal(size, seed=seed + 100), covariance(size, seed, **options))


def parts_law(law, resolutions, shape):
    """The law of (mean, fine part) of an image with a normal law: a linear map of it."""
    size = law.mean.numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    matrix = torch.cat([resolutions.mean(basis).flatten(1), resolutions.fine(basis).flatten(1)], dim=1).T
    return MultivariateNormal(matrix @ law.mean, matrix @ law.covariance_matrix @ matrix.T)


def stage(law, shape, resolutions=None, transform=None, dequantization=None, upsampling=None):
    """The exact stage whose states in model space have the given law (of mean and fine part after the first)."""
    sde, size = (
        ss.VP(beta_max=30.0, t_min=1e-7),
        0 if resolutions is None else torch.Size(resolutions.mean_shape(shape)).numel(),
    )
    model = ss.ScoreModel(Conditional(sde, law, size, resolutions, upsampling), sde, "noise")
    transform = transform or ss.data.Affine()
    return CascadeStage(model, transform, shape, dequantization, resolutions, LARGEST if resolutions else 0.0)
