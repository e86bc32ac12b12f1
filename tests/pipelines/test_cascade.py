"""Cascades against Gaussian pyramids in closed form: likelihoods, bits, samples, and their independence of batches."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import scoresde as ss
from scoresde.data import Affine, AveragePooling, Haar, Levels
from scoresde.networks import MLP
from scoresde.pipelines import Cascade, CascadeStage
from tests.conftest import close, normal, within
from tests.networks.test_layers import randomised
from tests.pipelines.pyramids import law_of, parts_law, stage

SHAPES = [(1, 2, 2), (1, 4, 4)]
TOP, BOTTOM = Affine(0.5, 0.1), Affine(2.0, -0.3)
EXACT = {"trace": ss.ExactTrace(), "solver": ss.solvers.RungeKutta(steps=32)}
COARSE = {"trace": ss.ExactTrace(), "solver": ss.solvers.RungeKutta(steps=12)}
SAMPLER = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(order=2), steps=30)


def mapped(law, transform):
    """The law of transform(x) for a normal x."""
    return MultivariateNormal(transform(law.mean), transform.scale**2 * law.covariance_matrix)


def marginal(law, resolutions, shape):
    """The law of the mean over blocks of an image."""
    size = math.prod(resolutions.mean_shape(shape))
    parts = parts_law(law, resolutions, shape)
    return MultivariateNormal(parts.mean[:size], parts.covariance_matrix[:size, :size])


def haar_pyramid(law, transforms=(BOTTOM, TOP), dequantization=None):
    """Cascade of the exact stages of images (1, 4, 4) with this law in data units, each with its own transform."""
    low = marginal(law, Haar(), SHAPES[1])
    upper = stage(
        parts_law(mapped(law, transforms[1]), Haar(), SHAPES[1]), SHAPES[1], Haar(), transforms[1], dequantization
    )
    return Cascade([stage(mapped(low, transforms[0]), SHAPES[0], None, transforms[0], dequantization), upper])


def pooled_pyramid(transform, dequantization=None, seed=5, scale=0.5):
    """Cascade of a joint law of (low resolution, image) in model space, which is not that of an image and its mean."""
    split, joint = AveragePooling(), law_of(20, seed, scale=scale)
    low = MultivariateNormal(joint.mean[:4], joint.covariance_matrix[:4, :4])
    upsampling = split.upsampled(torch.eye(4, dtype=torch.float64).reshape(4, *SHAPES[0])).flatten(1).T
    upper = stage(joint, SHAPES[1], split, transform, dequantization, upsampling)
    return Cascade([stage(low, SHAPES[0], None, transform, dequantization), upper]), joint


def test_the_sum_of_the_stages_is_the_joint_of_a_gaussian_pyramid():
    """With Haar it is log p of the image; each stage has the closed form of its conditional."""
    law, x = law_of(16, 1), 0.5 * normal(2, *SHAPES[1])
    found = haar_pyramid(law).log_prob(x, **EXACT)
    close(found.value / 16, law.log_prob(x.flatten(1)) / 16, atol=5e-4, rtol=0.0)
    low = marginal(law, Haar(), SHAPES[1]).log_prob(Haar().mean(x).flatten(1))
    close(found.stages[:, 0], low, atol=2e-3, rtol=0.0)
    close(found.stages.sum(dim=1), found.value)
    assert "all stages" not in found.conventions["quantity"]


def test_three_stages_of_haar():
    law, split = law_of(16, 2), Haar()
    low = marginal(law, split, SHAPES[1])
    lowest = marginal(low, split, SHAPES[0])
    stages = [
        stage(lowest, (1, 1, 1)),
        stage(parts_law(low, split, SHAPES[0]), SHAPES[0], split),
        stage(parts_law(mapped(law, TOP), split, SHAPES[1]), SHAPES[1], split, TOP),
    ]
    x = 0.5 * normal(2, *SHAPES[1], seed=4)
    close(Cascade(stages).log_prob(x, **EXACT).value / 16, law.log_prob(x.flatten(1)) / 16, atol=5e-4, rtol=0.0)


def test_the_sum_of_pooled_stages_is_the_joint_law_of_both_resolutions():
    cascade, joint = pooled_pyramid(Affine())
    x = 0.5 * normal(2, *SHAPES[1], seed=3)
    both = torch.cat([AveragePooling().mean(x).flatten(1), x.flatten(1)], dim=1)
    found = cascade.log_prob(x, **EXACT)
    close(found.value / 16, joint.log_prob(both) / 16, atol=5e-4, rtol=0.0)
    assert found.conventions["quantity"] == "log-density (of the images of all stages)"


def test_bits_of_grey_levels():
    """Levels are much narrower than the law: the density in a cell is nearly that at its centre."""
    levels, transform = torch.randint(80, 176, (2, *SHAPES[1]), generator=torch.Generator().manual_seed(1)), Levels()
    unit, centres = 16 * math.log(2), transform(levels + 0.5).double()
    scales = {"log_det": transform.log_det(levels.double())}
    law = law_of(16, 1)
    low = marginal(law, Haar(), SHAPES[1])
    upper = stage(parts_law(law, Haar(), SHAPES[1]), SHAPES[1], Haar(), transform, ss.Uniform())
    cascade = Cascade([stage(low, SHAPES[0], None, transform, ss.Uniform()), upper])
    bits = cascade.bits_per_dim(levels, **COARSE)
    expected = -(law.log_prob(centres.flatten(1)) + scales["log_det"]) / unit
    close(bits.per_image, expected, atol=0.05, rtol=0.0)
    close(bits.stages.sum(dim=1), bits.per_image)
    assert bits.conventions["quantity"] == "log-probability of grey levels (lower bound, by dequantisation)"
    cascade, joint = pooled_pyramid(transform, ss.Uniform())
    bits = cascade.bits_per_dim(levels, **COARSE)
    mean = AveragePooling().mean(levels.double()).round()
    both = torch.cat([transform(mean + 0.5).flatten(1), centres.flatten(1)], dim=1)
    log_det = scales["log_det"] + transform.log_det(mean)
    close(bits.per_image, -(joint.log_prob(both) + log_det) / unit, atol=0.05, rtol=0.0)
    assert "which bounds that of the last" in bits.conventions["quantity"]


def test_the_levels_of_a_mean_and_an_image_are_a_probability():
    """P(low, image) of a pooled pyramid, summed over all pairs of grey levels, is at most 1, and nearly so."""
    transform = Levels(levels=2)
    split, shape = AveragePooling(), (1, 2)
    joint = law_of(3, 7, scale=1.0)
    low = stage(
        MultivariateNormal(joint.mean[:1], joint.covariance_matrix[:1, :1]), (1, 1), None, transform, ss.Uniform()
    )
    upsampling = torch.ones(2, 1, dtype=torch.float64)
    cascade = Cascade([low, stage(joint, shape, split, transform, ss.Uniform(), upsampling)])
    images = torch.cartesian_prod(torch.arange(2), torch.arange(2)).reshape(4, *shape)
    value = cascade.log_prob(images.repeat(50, 1, 1), **COARSE).value.reshape(50, 4).mean(dim=0)
    assert float(value.exp().sum()) < 1


def test_the_bound_with_augmentation():
    """The mean over the noise of log p(fine | z) is that of the normal laws of fine and z."""
    law, level, count = law_of(4, 1), 0.5, 200
    split, shape = Haar(), SHAPES[0]
    parts = parts_law(law, split, shape)
    upper = stage(parts, shape, split)
    low = MultivariateNormal(parts.mean[:1], parts.covariance_matrix[:1, :1])
    x = 0.5 * normal(1, *shape, seed=2)
    found = Cascade([stage(low, (1, 1, 1)), upper]).log_prob(x.expand(count, *shape), augmentation=level, **COARSE)
    mean, fine = split.mean(x).flatten(1), split.fine(x).flatten(1)
    centre, cov, gain = upper.model.network.given((1 - level**2) ** 0.5 * mean, level)
    spread = level**2 * torch.linalg.solve(cov, gain @ gain.T).diagonal().sum()
    expected = MultivariateNormal(centre, cov).log_prob(fine) - spread / 2 + split.log_det(shape)
    within(found.stages[:, 1], float(expected))
    assert found.stages[:, 1].std() > 0.01
    assert found.conventions["augmentation"] == "0.5, averaged in log p"


@pytest.mark.parametrize("level", [0.0, 0.6])
def test_the_law_of_samples(level):
    """Means and second moments of (mean, fine part), with the noise of the augmentation in between."""
    law, split, shape = law_of(4, 3), Haar(), SHAPES[0]
    parts = parts_law(law, split, shape)
    upper = stage(parts, shape, split)
    low = MultivariateNormal(parts.mean[:1], parts.covariance_matrix[:1, :1])
    cascade = Cascade([stage(low, (1, 1, 1), None, BOTTOM), upper])
    low_law = mapped(low, BOTTOM)
    cascade.stages[0].model.network.law = low_law
    drawn = cascade.sample(2000, seeds=range(2000), samplers=SAMPLER, augmentation=level)
    x = drawn.x.double()
    close(split.mean(x), drawn.stages[0].double(), rtol=1e-4, atol=1e-5)
    both = torch.cat([split.mean(x).flatten(1), split.fine(x).flatten(1)], dim=1)
    _, cov, gain = upper.model.network.given(torch.zeros(1, 1, dtype=torch.float64), level)
    keep, variance = (1 - level**2) ** 0.5, parts.covariance_matrix[0, 0]
    cross = keep * gain[:, 0] * variance
    fine = cov + gain @ gain.T * (keep**2 * variance + level**2)
    second = torch.cat([torch.cat([variance[None], cross])[None], torch.cat([cross[:, None], fine], dim=1)])
    within(both, parts.mean, errors=5)
    centred = both - parts.mean
    within(centred[:, :, None] * centred[:, None], second, errors=5)
    assert drawn.nfe == 2 * 30


def networks(classes=3):
    """A cascade of small random networks with labels; the base takes labels, the upper stage labels and images."""
    base = randomised(MLP((1, 2, 2), width=8, depth=1, classes=classes))
    upper = randomised(MLP((3, 2, 2), width=8, depth=1, classes=classes, cond_channels=2))
    stages = [
        CascadeStage(ss.ScoreModel(base, ss.VP(), "karras"), TOP, (1, 2, 2)),
        CascadeStage(ss.ScoreModel(upper, ss.VP(), "karras"), BOTTOM, (1, 4, 4), None, Haar(), 0.5),
    ]
    return Cascade(stages)


FEW = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=3)


def test_a_sample_and_a_likelihood_do_not_depend_on_the_batch():
    cascade, label = networks(), torch.tensor([0, 2, 1, 1, 0])
    options = {"samplers": FEW, "augmentation": 0.3}
    whole = cascade.sample(5, label, seeds=range(5), **options)
    alone = cascade.sample(1, label[3:4], seeds=[3], **options)
    split = cascade.sample(5, label, seeds=range(5), batch_size=2, **options)
    for one, other in zip(alone.stages, whole.stages, strict=True):
        close(one, other[3:4], rtol=1e-4, atol=1e-5)
    close(split.x, whole.x, rtol=1e-4, atol=1e-5)
    solver = ss.solvers.Adams(steps=8)
    found = cascade.log_prob(whole.x, label, augmentation=0.3, seeds=range(5), solver=solver)
    again = cascade.log_prob(whole.x[3:4], label[3:4], augmentation=0.3, seeds=[3], solver=solver)
    close(again.stages, found.stages[3:4], rtol=1e-4, atol=1e-4)


def test_the_first_stage_is_the_first_model_and_stages_get_their_conditions():
    cascade, label = networks(), torch.tensor([0, 2])
    drawn = cascade.sample(2, {"label": label}, seeds=[5, 6], samplers=[FEW, FEW])
    base = FEW(cascade.stages[0].model, shape=(2, 1, 2, 2), cond=label, seeds=[5, 6]).x
    close(drawn.stages[0], TOP.inverse(base))
    other = cascade.sample(2, {"label": torch.tensor([0, 1])}, seeds=[5, 6], samplers=FEW)
    close(other.x[0], drawn.x[0])
    assert not torch.equal(other.x[1], drawn.x[1])
    assert torch.equal(cascade.sample(1, seeds=[1], samplers=FEW).x, cascade.sample(1, seeds=[1], samplers=FEW).x)
    noisy = cascade.sample(2, {"label": label}, seeds=[5, 6], samplers=FEW, augmentation=0.4)
    assert torch.equal(noisy.stages[0], drawn.stages[0])
    assert not torch.equal(noisy.x, drawn.x)


def test_errors():
    cascade = networks()
    base, upper = cascade.stages
    for stages, kind, text in (
        ([], ValueError, "at least one stage"),
        (["runs/a"], TypeError, r"stages\[0\] must be a run or a CascadeStage; got str: load a run by ss.load"),
        ([upper], ValueError, r"stages\[0\] must be a model of whole images"),
        ([base, base], ValueError, r"stages\[1\] must be a super-resolution model"),
        ([CascadeStage(base.model, TOP, (1, 3, 3)), upper], ValueError, r"means of shape \(1, 2, 2\); got images of"),
    ):
        with pytest.raises(kind, match=text):
            Cascade(stages)
    pooled = CascadeStage(upper.model, TOP, (1, 4, 4), ss.Uniform(), AveragePooling())
    with pytest.raises(ValueError, match=r"stages\[0\] must have a dequantisation"):
        Cascade([base, pooled])
    with pytest.raises(ValueError, match="below one of Haar"):
        Cascade(
            [
                base,
                CascadeStage(upper.model, TOP, (1, 4, 4), None, AveragePooling()),
                CascadeStage(upper.model, TOP, (1, 8, 8), None, Haar()),
            ]
        )
    for options, text in (
        ({"augmentation": 0.6}, r"from 0 to 0.5, the largest level that stages\[1\] was trained with; got 0.6"),
        ({"augmentation": [0.1, 0.1]}, "one for each of 1 stages after the first; got 2"),
        ({"samplers": [FEW]}, "one for each of 2 stages; got 1"),
        ({"cond": {"tone": torch.tensor(1)}}, "no stage takes the condition 'tone'; the stages take label"),
        ({"seeds": [1]}, "one seed per sample, 2 in all; got 1"),
    ):
        with pytest.raises(ValueError, match=text):
            cascade.sample(2, **options)
    with pytest.raises(ValueError, match="cond must have no image, which a cascade makes of the stage below"):
        cascade.sample(2, cond={"image": torch.zeros(2, 2, 4, 4)})
    with pytest.raises(TypeError, match=r"augmentation must be a .*number; got None"):
        cascade.sample(2, augmentation=None)
    with pytest.raises(TypeError, match="images must be a tensor; got list"):
        cascade.log_prob([0.5])
    with pytest.raises(TypeError, match="stages must be a list of runs or of CascadeStage; got CascadeStage: pass a"):
        Cascade(base)
    with pytest.raises(ValueError, match="bits need a dequantisation"):
        cascade.bits_per_dim(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"images must have the shape \(N, \(1, 4, 4\)\)"):
        cascade.log_prob(torch.zeros(1, 1, 2, 2))
