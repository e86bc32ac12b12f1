"""Wrappers of models: every function of the library gives the same digits for a model and for a wrapper around it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import scoresde as ss
from scoresde import bounds, losses, samplers
from scoresde.editing import interpolate, perturb_and_denoise
from scoresde.evaluation.resumable import describe
from scoresde.thresholding import Clipped, DynamicThresholding
from scoresde.training.trainer import Trainer
from scoresde.views import Pair
from scoresde.wrappers import as_model
from tests.conftest import f64, normal, oracle, seeded

CLASSES, SEEDS = 4, [3, 1, 4]


class Plain:
    """A user's class with `sde` and `predict` only."""

    def __init__(self, model):
        self.model, self.sde = model, model.sde

    def predict(self, x, t):
        return self.model.predict(x, t)


class Dense(Plain):
    """A user's class that also has a density."""

    density = "Dense"


def nested(model):
    return ss.ModelWrapper(ss.ModelWrapper(model))


class Labelled(nn.Module):
    """A small network with a label; with `outputs=2` also a learned variance."""

    def __init__(self, size=6, outputs=1):
        super().__init__()
        generator = seeded(1)
        self.table = nn.Parameter(torch.randn(CLASSES, size, generator=generator, dtype=torch.float64))
        self.mix = nn.Parameter(torch.randn(size, outputs * size, generator=generator, dtype=torch.float64) / size)

    def forward(self, x, c_noise, cond=None):
        shift = 0.0 if cond is None else self.table[cond]
        out = torch.tanh(x.flatten(1) + shift + c_noise[:, None]) @ self.mix
        return out.reshape(len(x), -1, *x.shape[2:])


def model(sde=None, prediction="v", outputs=1):
    return ss.ScoreModel(Labelled(outputs=outputs), sde or ss.VP(t_min=1e-3), prediction, outputs == 2)


def states(n=3):
    return 0.5 * normal(n, 1, 2, 3)


def levels(n=3):
    return torch.randint(0, 16, (n, 1, 2, 3), generator=seeded(5))


def loss(objective, **options):
    return lambda m: objective(m, states(8), generator=seeded(2), **options).value


def draw(sampler):
    return lambda m: (result := sampler(m, shape=(3, 1, 2, 3), seeds=SEEDS, dtype=torch.float64)).x + result.nfe


def log_prob(**options):
    def value(m):
        result = ss.log_prob(m, states(), seeds=SEEDS, **options)
        return torch.stack([result.value, result.nfe, result.backward])

    return value


def bits(**options):
    return lambda m: ss.bits_per_dim(m, levels(), TRANSFORM, solver=COARSE, **options).per_image


PC, STEPS = samplers.PredictorCorrector, {"steps": 5, "grid": "uniform_log_snr"}
TRANSFORM, COARSE = ss.data.Levels(16), ss.solvers.Adams(steps=8)
TABLE = {
    "loss-denoising": loss(losses.DenoisingScoreMatching()),
    "loss-implicit": loss(losses.ImplicitScoreMatching()),
    "loss-sliced": loss(losses.SlicedScoreMatching()),
    "loss-bound": loss(losses.VariationalBound()),
    "ddim": draw(PC(samplers.DDIM(), **STEPS)),
    "ancestral+langevin": draw(PC(samplers.Ancestral(), samplers.Langevin(), **STEPS, denoise_final=True)),
    "dpm-solver++": draw(PC(samplers.DPMSolverPP(3), **STEPS)),
    "heun": draw(PC(samplers.Heun(), **STEPS)),
    "function": draw(PC(lambda m, x, t, s, noise: m.predict(x, t).denoised + noise.normal(x), **STEPS)),
    "flow": draw(samplers.ProbabilityFlow(COARSE)),
    "error_controlled": draw(samplers.ErrorControlled(rtol=0.5)),
    "torchsde": draw(samplers.TorchSDE("euler", steps=5)),
    "optimal variance": lambda m: samplers.OptimalVariance(m, states(16), 4, seeded(3)).log_unexplained,
    "log_prob": log_prob(solver=COARSE),
    "log_prob-exact": log_prob(solver=COARSE, trace=ss.ExactTrace()),
    "log_prob-adaptive": log_prob(solver=ss.solvers.AdaptiveAdams(0.1)),
    "bits": bits(),
    "bits-perturb": bits(start="perturb"),
    "bits-batches": bits(batch_size=2),
    "bound-nats": lambda m: bounds.continuous_nats(m, states(), draws=4, seeds=SEEDS).value,
    "bound-continuous": lambda m: bounds.continuous(m, levels(), TRANSFORM, draws=4).per_image,
    "bound-discrete": lambda m: bounds.discrete(m, levels(), TRANSFORM, times=losses.Nodes(8)).per_image,
    "encode": lambda m: ss.encode(m, states(), solver=COARSE),
    "interpolate": lambda m: interpolate(m, states()[:1], states()[1:2], [0.5], solver=COARSE),
    "sdedit": lambda m: perturb_and_denoise(m, states(), 0.5, PC(samplers.DDIM(), steps=4), seeds=SEEDS).x,
    "clipped": lambda m: draw(PC(samplers.DDIM(), **STEPS))(Clipped(m)),
    "dynamic": lambda m: draw(PC(samplers.DDIM(), **STEPS))(DynamicThresholding(m)),
    "reverse": lambda m: ss.ReverseSDE(m).drift(states(), f64(0.5)),
}
NEED_DENSITY = [row for row in TABLE if row.startswith(("log_prob", "bits", "encode", "interpolate"))]
NEED_ROWS = ["error_controlled", "log_prob-adaptive", "bits-batches"]


@pytest.mark.parametrize("row", TABLE)
def test_a_wrapper_that_changes_nothing_changes_nothing(row):
    assert torch.equal(TABLE[row](nested(model())), TABLE[row](model()))


@pytest.mark.parametrize("row", TABLE)
def test_a_users_class_is_a_model_everywhere(row):
    """Without a density it has no likelihood, and without `rows` no part of a batch; the errors say so."""
    if row in NEED_DENSITY:
        with pytest.raises(TypeError, match="Plain has no 'density'"):
            TABLE[row](ss.ModelWrapper(Plain(model())))
    if row in NEED_ROWS:
        with pytest.raises(TypeError, match="Dense has no 'rows'"):
            TABLE[row](ss.ModelWrapper(Dense(model())))
    else:
        assert torch.equal(TABLE[row](Dense(model())), TABLE[row](model()))


def test_a_condition_reaches_the_network_through_wrappers():
    """In every function with `cond`, one label per sample; the same as `given`."""
    inner, labels, x = model(), torch.tensor([2, 0, 3]), states()
    wrapped = nested(inner)
    calls = {
        "log_prob": lambda m, **c: ss.log_prob(m, x, seeds=SEEDS, solver=COARSE, **c).value,
        "adaptive": lambda m, **c: ss.log_prob(m, x, seeds=SEEDS, solver=ss.solvers.AdaptiveAdams(rtol=0.1), **c).value,
        "sampler": lambda m, **c: PC(samplers.Ancestral(), **STEPS)(m, x_T=x, seeds=SEEDS, **c).x,
        "error_controlled": lambda m, **c: samplers.ErrorControlled(rtol=0.5)(m, x_T=x, seeds=SEEDS, **c).x,
        "bits": lambda m, **c: ss.bits_per_dim(m, levels(), TRANSFORM, solver=COARSE, batch_size=2, **c).per_image,
        "bound": lambda m, **c: bounds.continuous(m, levels(), TRANSFORM, draws=2, batch_size=2, **c).per_image,
        "discrete": lambda m, **c: (
            bounds.discrete(m, levels(), TRANSFORM, times=losses.Nodes(8), batch_size=2, **c).per_image
        ),
        "loss": lambda m, **c: losses.DenoisingScoreMatching()(m, x, generator=seeded(), **c).value,
        "encode": lambda m, **c: ss.encode(m, x, solver=COARSE, **c),
    }
    for name, call in calls.items():
        expected = call(inner, cond=labels)
        assert torch.equal(call(wrapped, cond=labels), expected), name
        assert torch.equal(call(wrapped.given(labels)), expected), name
        assert torch.equal(call(inner.given(labels.tolist())), expected), name
        assert not torch.equal(call(inner), expected), name
        of_one = call(inner, cond=2)
        assert torch.equal(of_one[0], expected[0]) or "bound" in name or name in ("loss", "discrete"), name
        assert torch.equal(call(wrapped, cond=torch.tensor([2, 2, 2])), of_one), name


def test_a_sample_of_a_conditional_model_does_not_depend_on_its_batch():
    inner, labels, x = ss.ModelWrapper(model()), torch.tensor([2, 0, 3]), states() * f64(1, 4, 16)[:, None, None, None]
    solver = ss.solvers.AdaptiveAdams(1e-3, max_step=0.5)
    together = ss.log_prob(inner, x, labels, solver=solver, seeds=SEEDS)
    assert len(together.nfe.unique()) > 1  # the solver continues with parts of the batch
    for i in range(3):
        alone = ss.log_prob(inner, x[i : i + 1], labels[i : i + 1], solver=solver, seeds=SEEDS[i : i + 1])
        torch.testing.assert_close(alone.value, together.value[i : i + 1], rtol=1e-12, atol=1e-12)
        assert torch.equal(alone.nfe, together.nfe[i : i + 1])


def test_a_learned_variance_passes_through_wrappers():
    inner = model(outputs=2)
    chain = losses.Hybrid(times=losses.Nodes(8))
    for call in (
        lambda m: chain(m, states(8), generator=seeded(2)).value,
        lambda m: bounds.discrete(m, levels(), TRANSFORM, variance="learned", times=losses.Nodes(8)).per_image,
        draw(PC(samplers.Ancestral("learned"), **STEPS)),
    ):
        assert torch.equal(call(nested(inner)), call(inner))


def test_a_learned_path_trains_through_a_wrapper_as_without():
    gradients = []
    for wrap in (lambda m: m, nested, Plain):
        path = ss.LearnedVP(units=4)
        losses.VariationalBound()(wrap(model(path)), states(8), generator=seeded(2)).value.mean().backward()
        gradients.append(torch.cat([path.shape.grad.flatten(), path.ends.grad]))
    assert gradients[0].abs().min() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


def test_training_through_a_wrapper_gives_the_weights_of_training_without(tmp_path: Path):
    data, objective = TensorDataset(states(64).float(), torch.arange(64) % CLASSES), losses.DenoisingScoreMatching()
    trained = []
    for name, wrap in (("alone", lambda m: m), ("wrapped", nested)):
        inner = model().float()
        trainer = Trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2), steps=6, batch_size=16)
        data_map = ss.DataMap(ss.data.Affine())
        trainer.fit(wrap(inner), objective, data, tmp_path / name, data_map, progress=False)
        trained.append(inner.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
    assert not torch.equal(trained[0]["network.mix"], model().float().network.mix)


def test_the_trainer_refuses_a_model_that_is_no_module(tmp_path: Path):
    trainer = Trainer(torch.optim.Adam, steps=1)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, .* got Plain"):
        trainer.fit(
            Plain(model()), losses.DenoisingScoreMatching(), states(200), tmp_path, ss.DataMap(ss.data.Affine())
        )


class Twice(ss.ModelWrapper):
    """Evaluates the inner model twice and returns the mean."""

    def predict(self, x, t):
        return ss.BlendedViews([self.model.predict(x, t) for _ in range(2)], [f64(0.5), f64(0.5)])


def test_a_wrapper_that_evaluates_twice_counts_twice():
    """Three evaluations, or five from a latent, measure the scale of the data; two check the derivative."""
    mixture = oracle((1, 2, 3)).score_model(ss.VP(t_min=1e-3))
    for wrapped, factor in ((mixture, 1), (Twice(mixture), 2), (Plain(Twice(mixture)), 2), (Twice(Twice(mixture)), 4)):
        assert PC(samplers.DDIM(), steps=5)(wrapped, x_T=states()).nfe == 5 * factor
        assert samplers.ProbabilityFlow(COARSE)(wrapped, x_T=states()).nfe == (5 + 9) * factor
        if not isinstance(wrapped, Plain):
            assert ss.log_prob(wrapped, states(), solver=COARSE).nfe.tolist() == [(3 + 2 + 9) * factor] * 3
            perturbed = ss.bits_per_dim(wrapped, levels(), TRANSFORM, solver=COARSE, start="perturb")
            assert perturbed.nfe.tolist() == [(3 + 2 + 10) * factor] * 3


class Own:
    """A user's model with its own network, without a base class or a `ScoreModel` inside."""

    density = "Own"

    def __init__(self, network):
        self.sde, self.networks = ss.VP(t_min=1e-3), {"first": network}

    def predict(self, x, t):
        noise = self.networks["first"](x)
        alpha, sigma = (float(c) for c in (self.sde.alpha(f64(float(t))), self.sde.sigma(f64(float(t)))))
        return Pair(self.sde, torch.as_tensor(t).double(), (x - sigma * noise) / alpha, noise)


@pytest.mark.parametrize("wrap", [lambda m: m, nested, Clipped, Twice])
def test_a_users_own_network_is_counted_and_its_dropout_refused(wrap):
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double().eval()
    factor = 2 if wrap is Twice else 1
    assert PC(samplers.DDIM(), steps=5)(wrap(Own(network)), x_T=normal(2, 3)).nfe == 5 * factor
    wrapped = as_model(wrap(Own(network)))
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in network.parameters()}
    network.train()
    with pytest.raises(ValueError, match="active dropout"):
        bounds.continuous(wrapped, torch.ones(2, 3), TRANSFORM, draws=2)


class Autoguided(ss.ModelWrapper):
    """Guides a model with a second one, each with its own condition."""

    def __init__(self, model, weak):
        super().__init__(model)
        self.weak = weak

    def predict(self, x, t):
        return ss.BlendedViews([self.model.predict(x, t), self.weak.predict(x, t)], [2.0, -1.0])


def test_parts_of_a_batch_are_selected_in_every_model_of_a_wrapper():
    labels = torch.tensor([2, 0, 3])
    guided = Autoguided(model().given(labels), model().given(labels.flip(0)))
    whole = bits()(guided)
    assert torch.equal(bits(batch_size=2)(guided)[:2], whole[:2])
    assert not torch.equal(bits()(Autoguided(model().given(labels), model().given(labels))), whole)


def test_replacing_a_part_of_a_conditional_model_leaves_the_original_alone():
    inner = model()
    conditional, wrapped = inner.given(1), ss.ModelWrapper(inner)
    conditional.sde = ss.VE()
    assert type(inner.sde) is ss.VP
    wrapped.given(1).model = model(ss.VE())
    assert wrapped.model is inner
    prompt = nn.Parameter(torch.tensor([0.5]))
    learned = inner.given(prompt)
    assert "cond" not in learned.state_dict()
    assert learned.given(3).cond == 3
    wrapped.given(1).eval()
    assert not inner.network.training
    assert describe(wrapped.given(1)) != describe(wrapped.given(2))


def test_a_wrapper_of_a_model_without_density_has_none_and_the_model_is_named():
    for call in (lambda m: ss.log_prob(m, states()), lambda m: ss.encode(m, states())):
        with pytest.raises(ValueError, match=r"Clipped is for sampling only.* its \.model"):
            call(nested(Clipped(model())))


def test_an_error_in_a_property_of_a_wrapper_is_not_hidden():
    class Wrong(ss.ModelWrapper):
        @property
        def density(self):
            return self.model.densty

    with pytest.raises(AttributeError):
        _ = Wrong(model()).density


def test_the_conventions_name_the_density():
    for wrapped, name in ((model(), "ScoreModel"), (Twice(model()), "Twice(ScoreModel)")):
        conventions = ss.bits_per_dim(wrapped, levels(), TRANSFORM, solver=COARSE).conventions
        assert conventions["density"] == f"probability flow of {name}"


# --- the classes themselves


def test_a_wrapper_forwards_what_it_does_not_change():
    inner = ss.ScoreModel(nn.Linear(3, 3), ss.VP(), "v", learned_variance=True)
    wrapper = nested(inner)
    for name in ("sde", "prediction", "network", "learned_variance"):
        assert getattr(wrapper, name) is getattr(inner, name)
    assert [*wrapper.parameters()] == [*inner.parameters()]
    assert (wrapper.density, Twice(inner).density) == ("ScoreModel", "Twice(ScoreModel)")
    assert ss.ModelWrapper(Clipped(inner)).density is None
    with pytest.raises(AttributeError, match="has no attribute 'networks'"):
        _ = wrapper.networks


def test_a_wrapper_given_a_condition_is_around_the_conditional_model():
    wrapper = Twice(nested(model()))
    conditional = wrapper.given(torch.tensor([3, 2]))
    assert type(conditional) is Twice
    assert conditional.cond.tolist() == [3, 2]
    assert conditional.rows(torch.tensor([1, 0]), 2).cond.tolist() == [2, 3]
    assert wrapper.cond is None
    assert conditional.state_dict().keys() == wrapper.state_dict().keys()
    assert wrapper.given(None) is wrapper


def test_an_error_names_what_a_users_class_lacks():
    class NoPath:
        def predict(self, x, t):
            return x

    for call, missing in ((lambda: as_model(NoPath()), "NoPath"), (lambda: ss.ModelWrapper(print), "builtin_function")):
        with pytest.raises(TypeError, match=f"{missing}.* has no 'sde'"):
            call()
    plain = as_model(Plain(model()))
    for call, name in (
        (lambda: plain.density, "density"),
        (lambda: plain.given(3), "given"),
        (lambda: plain.rows(torch.tensor([0]), 2), "rows"),
    ):
        with pytest.raises(TypeError, match=f"Plain has no '{name}'.* derive it from scoresde.ModelWrapper"):
            call()
    assert plain.rows(slice(0, 8), 2) is plain  # the whole batch
