"""Splits of images into means and fine parts: what the parts are, their inverse, and their log-determinant."""

import math

import pytest
import torch
from torch.nn import functional as F

from scoresde.data import AveragePooling, Haar
from tests.conftest import close, normal

SHAPES = [(2, 4), (1, 4, 6), (3, 2, 2), (1, 2, 4, 2)]
POOL = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


@pytest.mark.parametrize("split", [AveragePooling(), Haar()], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_is_that_of_blocks_and_the_parts_give_the_image(split, shape):
    x = normal(3, *shape)
    mean, fine = split.mean(x), split.fine(x)
    close(mean, POOL[x.ndim](x, 2))
    close(split.join(mean, fine), x)
    assert tuple(mean.shape[1:]) == split.mean_shape(shape)
    assert tuple(fine.shape[1:]) == split.fine_shape(shape)
    assert split.upsampled(mean).shape[2:] == fine.shape[2:]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_of_haar_is_orthonormal_and_orthogonal_to_the_mean(shape):
    x, split = normal(3, *shape), Haar()
    mean, fine = split.mean(x), split.fine(x)
    blocks = 2 ** (len(shape) - 1)
    close(fine.square().flatten(1).sum(1) + blocks * mean.square().flatten(1).sum(1), x.square().flatten(1).sum(1))
    close(split.fine(split.join(mean, torch.zeros_like(fine))), torch.zeros_like(fine), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_determinant_of_haar_is_that_of_its_jacobian(shape):
    split = Haar()

    def parts(x):
        return torch.cat([split.mean(x[None]).flatten(), split.fine(x[None]).flatten()])

    jacobian = torch.autograd.functional.jacobian(parts, normal(*shape)).reshape(math.prod(shape), -1)
    assert split.log_det(shape) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-10)


def test_a_pooled_image_has_any_factor_and_its_upsampling_keeps_constants():
    split, x = AveragePooling(factor=3), normal(2, 1, 6, 9)
    close(split.mean(x), F.avg_pool2d(x, 3))
    assert split.fine(x) is x
    close(split.upsampled(torch.full((1, 2, 2, 3), 0.7)), torch.full((1, 2, 6, 9), 0.7), rtol=1e-6)
    close(split.upsampled(split.mean(x)), F.interpolate(F.avg_pool2d(x, 3), scale_factor=3, mode="bilinear"))


def test_errors():
    with pytest.raises(ValueError, match=r"sides that are multiples of 2; got \(1, 3, 4\)"):
        Haar().fine(normal(2, 1, 3, 4))
    with pytest.raises(ValueError, match=r"multiples of 4; got \(2, 6\)"):
        AveragePooling(4).fine_shape((2, 6))
    with pytest.raises(ValueError, match="one to three sides"):
        Haar().mean_shape((4,))
    with pytest.raises(ValueError, match=r"one to three sides .*; got \(\)"):
        Haar().mean_shape(())
