"""Broadcasting, float64 sums, and states of integers wherever a state is taken."""

import pytest
import torch

import scoresde as ss
from scoresde.data import Affine, Levels, Logit, Standardize
from scoresde.dequantization import DataMap
from scoresde.editing import slerp
from scoresde.losses import DenoisingScoreMatching
from scoresde.random_stream import RandomStream
from scoresde.tensors import broadcast, floating, listed, sum_dims
from tests.conftest import f64, normal, oracle


@pytest.mark.parametrize("shape", [(2, 2), (4, 3), (2, 1, 4, 4)])
def test_broadcast_scales_samples_not_columns(shape):
    x = torch.ones(shape)
    values = torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    scaled = broadcast(values, x) * x
    assert scaled.dtype == x.dtype
    for i in range(shape[0]):
        assert (scaled[i] == i + 1).all()
    assert (broadcast(torch.tensor(3.0), x) * x == 3).all()


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(2, 1)])
def test_broadcast_refuses_other_shapes(values):
    with pytest.raises(ValueError, match="expected one value per sample"):
        broadcast(values, torch.ones(2, 3))


def test_sums_are_in_float64():
    x = torch.full((1, 1000), 0.1)
    assert sum_dims(x).dtype == torch.float64
    assert float(sum_dims(x)) == pytest.approx(1000 * float(torch.tensor(0.1)), rel=1e-12)


def test_a_long_list_is_shortened_in_messages():
    assert listed([1.0, 0.25]) == "[1, 0.25]"
    assert listed(torch.arange(8)) == "[0, 1, 2, 3, 4, 5, 6, 7]"
    assert listed(torch.arange(1000) / 999) == "[0, 0.001001, 0.002002, ..., 0.997998, 0.998999, 1] (1000 numbers)"


# --- states of integers

VP, MIXTURE = ss.VP(), oracle((2, 2))
MODEL, NOISE, TIMES = MIXTURE.score_model(VP), normal(6, 2, 2).float(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


class Foreign:
    """A model that is no class of the library."""

    sde = VP
    density = "foreign"

    def predict(self, x, t):
        return ss.ScoreModel(lambda x, label, cond: x / 2, VP).predict(x, t)


FEW_STEPS = ss.solvers.RungeKutta(steps=2)
TAKES_A_STATE = {
    "perturb": lambda x: VP.perturb(x, TIMES, NOISE),
    "prior_log_prob": VP.prior_log_prob,
    "prior_divergence": VP.prior_divergence,
    "predict": lambda x: MODEL.predict(x, TIMES).score,
    "denoise": lambda x: MODEL.denoise(x, TIMES),
    "network without parameters": lambda x: ss.ScoreModel(lambda x, label, cond: x / 2, VP).noise(x, TIMES),
    "foreign model": lambda x: ss.ModelWrapper(Foreign()).noise(x, TIMES),
    "oracle density": MIXTURE.log_prob,
    "oracle score": lambda x: MIXTURE.score(x, VP, 0.3),
    "oracle denoise": lambda x: MIXTURE.denoise(x, VP, 0.3),
    "standardize": Standardize(3.74, 1.99),
    "standardize inverse": Standardize(3.74, 1.99).inverse,
    "affine": Affine(0.3, 0.2),
    "affine inverse": Affine(0.3, 0.2).inverse,
    "levels": Levels(17),
    "logit": Logit(-1.0, 6.0),
    "logit inverse": Logit(-1.0, 6.0).inverse,
    "training states": lambda x: DataMap(Standardize(3.74, 1.99)).training_states(x, RandomStream()),
    "loss": lambda x: DenoisingScoreMatching()(MODEL, x, t=TIMES, noise=NOISE).value,
    "log_prob": lambda x: ss.log_prob(MODEL, x, solver=FEW_STEPS, seeds=range(6)).value,
    "encode": lambda x: ss.encode(MODEL, x, solver=FEW_STEPS),
    "decode": lambda x: ss.decode(MODEL, x, solver=FEW_STEPS),
    "slerp": lambda x: slerp(x, x.flip(0), 0.3),
}


@pytest.mark.parametrize("take", TAKES_A_STATE.values(), ids=TAKES_A_STATE)
def test_a_state_of_integers_gives_what_its_numbers_give(take):
    numbers = torch.randint(1, 6, (6, 2, 2), generator=torch.Generator().manual_seed(0))
    for x, dtypes in ((numbers, [torch.uint8, torch.int64]), (numbers > 3, [torch.bool])):
        expected = take(x.double()).double()
        for dtype in dtypes:
            result = take(x.to(dtype))
            assert result.is_floating_point(), dtype
            torch.testing.assert_close(result.double(), expected, rtol=3e-6, atol=3e-6)


def test_a_constraint_may_return_integers():
    sampler = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion(), steps=4)
    rounded, integers = (
        sampler(MODEL, shape=(3, 2, 2), seeds=range(3), constraint=lambda m, x, t, s, d=dtype: x.round().to(d)).x
        for dtype in (torch.float32, torch.int64)
    )
    assert torch.equal(rounded, integers)


def test_integers_are_converted_without_loss():
    for dtype, expected in ((torch.uint8, torch.float32), (torch.int16, torch.float32), (torch.int64, torch.float64)):
        assert floating(torch.ones(2, dtype=dtype)).dtype == expected
        assert broadcast(f64(0.5), torch.ones(2, 3, dtype=dtype)).dtype == expected
    seconds = torch.tensor([[1_700_000_001]])
    assert int(floating(seconds)) == 1_700_000_001
    half = torch.ones(2, dtype=torch.bfloat16)
    assert floating(half) is half
