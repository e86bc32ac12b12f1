"""A model around a model is a model everywhere: the same table of what a model is asked for, for each kind of wrapper.

Every row computes with the model alone and with a wrapper that changes nothing: the results have the same digits.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import scoresde as ss
from scoresde import bounds, losses, samplers
from scoresde.editing import interpolate, perturb_and_denoise
from scoresde.evaluation.generation import describe
from scoresde.thresholding import Clipped, DynamicThresholding
from scoresde.training.trainer import Trainer
from scoresde.views import Pair
from scoresde.wrappers import as_model
from tests.conftest import f64, normal, oracle, seeded

CLASSES, SEEDS = 4, [3, 1, 4]


class Plain:
    """What a user may write: `sde` and `predict`, of no base class."""

    def __init__(self, model):
        self.model, self.sde = model, model.sde

    def predict(self, x, t):
        return self.model.predict(x, t)


class Dense(Plain):
    """A user's class that says that its flow has a density, too."""

    density = "Dense"


WRAPPERS = {
    "wrapper": ss.ModelWrapper,
    "nested": lambda model: ss.ModelWrapper(ss.ModelWrapper(model)),
    "plain": Plain,
    "wrapper of plain": lambda model: ss.ModelWrapper(Plain(model)),
}
NEEDS = {"density": ("log_prob", "bits", "encode", "interpolate"), "rows": ("adaptive", "error_controlled", "batches")}


class Labelled(nn.Module):
    """A small network that reads a label, with a learned variance beside its output if it is to have one."""

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


PC, STEPS = samplers.PredictorCorrector, {"steps": 5, "grid": "uniform_log_snr"}
TRANSFORM = ss.data.Levels(16)
TABLE = {
    "loss-denoising": loss(losses.DenoisingScoreMatching()),
    "loss-implicit": loss(losses.ImplicitScoreMatching()),
    "loss-sliced": loss(losses.SlicedScoreMatching()),
    "loss-bound": loss(losses.VariationalBound()),
    "ddim": draw(PC(samplers.DDIM(), **STEPS)),
    "ancestral+langevin": draw(PC(samplers.Ancestral(), samplers.Langevin(), **STEPS, denoise_final=True)),
    "dpm-solver++": draw(PC(samplers.DPMSolverPP(3), **STEPS)),
    "unipc": draw(PC(samplers.UniPC(3), **STEPS)),
    "heun": draw(PC(samplers.Heun(), **STEPS)),
    "function": draw(PC(lambda m, x, t, s, noise: m.predict(x, t).denoised + noise.normal(x), **STEPS)),
    "flow": draw(samplers.ProbabilityFlow(ss.solvers.Adams(steps=8))),
    "error_controlled": draw(samplers.ErrorControlled(rtol=0.5)),
    "torchsde": draw(samplers.TorchSDE("euler", steps=5)),
    "optimal variance": lambda m: samplers.OptimalVariance(m, states(16), 4, seeded(3)).log_unexplained,
    "log_prob": log_prob(solver=ss.solvers.Adams(steps=8)),
    "log_prob-exact": log_prob(solver=ss.solvers.Adams(steps=8), trace=ss.ExactTrace()),
    "log_prob-adaptive": log_prob(solver=ss.solvers.AdaptiveAdams()),
    "bits": lambda m: ss.bits_per_dim(m, levels(), TRANSFORM, solver=ss.solvers.Adams(steps=8)).per_image,
    "bits-perturb": lambda m: ss.bits_per_dim(m, levels(), TRANSFORM, start="perturb").per_image,
    "bits-batches": lambda m: ss.bits_per_dim(m, levels(), TRANSFORM, batch_size=2).per_image,
    "bound-nats": lambda m: bounds.continuous_nats(m, states(), draws=4, seeds=SEEDS).value,
    "bound-continuous": lambda m: bounds.continuous(m, levels(), TRANSFORM, draws=4).per_image,
    "bound-discrete": lambda m: bounds.discrete(m, levels(), TRANSFORM, times=losses.Nodes(8)).per_image,
    "encode": lambda m: ss.encode(m, states()),
    "interpolate": lambda m: interpolate(m, states()[:1], states()[1:2], [0.5]),
    "sdedit": lambda m: perturb_and_denoise(m, states(), 0.5, PC(samplers.DDIM(), steps=4), seeds=SEEDS).x,
    "clipped": lambda m: draw(PC(samplers.DDIM(), **STEPS))(Clipped(m)),
    "dynamic": lambda m: draw(PC(samplers.DDIM(), **STEPS))(DynamicThresholding(m)),
    "reverse": lambda m: ss.ReverseSDE(m).drift(states(), f64(0.5)),
}


def lacking(wrapper, row):
    """What the error says is missing where a user's class is asked for more than it has; None if it has everything."""
    if "plain" not in wrapper:
        return None
    if row.startswith(NEEDS["density"]):
        return "density"
    return "rows" if row.startswith(NEEDS["rows"]) or "adaptive" in row else None


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_that_changes_nothing_changes_nothing(wrapper, row):
    call, inner = TABLE[row], model()
    wrapped = WRAPPERS[wrapper](inner)
    if missing := lacking(wrapper, row):
        with pytest.raises(TypeError, match=f"Plain has no '{missing}'"):
            call(wrapped)
        return
    assert torch.equal(call(wrapped), call(inner))


@pytest.mark.parametrize("row", [row for row in TABLE if row.startswith(NEEDS["density"]) and "adaptive" not in row])
def test_a_users_class_with_a_density_has_likelihoods(row):
    if "batches" in row:
        with pytest.raises(TypeError, match="Dense has no 'rows'"):
            TABLE[row](Dense(model()))
        return
    assert torch.equal(TABLE[row](Dense(model())), TABLE[row](model()))


@pytest.mark.parametrize("wrapper", ["wrapper", "nested"])
def test_a_condition_reaches_the_network_through_wrappers(wrapper):
    """Everything that takes one, with labels of each sample; the short form is `given`."""
    inner, labels, x = model(), torch.tensor([2, 0, 3]), states()
    wrapped = WRAPPERS[wrapper](inner)
    coarse = ss.solvers.Adams(steps=16)
    calls = {
        "log_prob": lambda m, **c: ss.log_prob(m, x, seeds=SEEDS, solver=coarse, **c).value,
        "adaptive": lambda m, **c: ss.log_prob(m, x, seeds=SEEDS, solver=ss.solvers.AdaptiveAdams(rtol=0.1), **c).value,
        "sampler": lambda m, **c: PC(samplers.Ancestral(), **STEPS)(m, x_T=x, seeds=SEEDS, **c).x,
        "error_controlled": lambda m, **c: samplers.ErrorControlled(rtol=0.5)(m, x_T=x, seeds=SEEDS, **c).x,
        "bits": lambda m, **c: ss.bits_per_dim(m, levels(), TRANSFORM, solver=coarse, batch_size=2, **c).per_image,
        "bound": lambda m, **c: bounds.continuous(m, levels(), TRANSFORM, draws=4, batch_size=2, **c).per_image,
        "discrete": lambda m, **c: (
            bounds.discrete(m, levels(), TRANSFORM, times=losses.Nodes(8), batch_size=2, **c).per_image
        ),
        "loss": lambda m, **c: losses.DenoisingScoreMatching()(m, x, generator=seeded(), **c).value,
        "encode": lambda m, **c: ss.encode(m, x, solver=coarse, **c),
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
    inner, labels, x = ss.ModelWrapper(model()), torch.tensor([2, 0, 3]), states()
    solver = ss.solvers.AdaptiveAdams()
    together = ss.log_prob(inner, x, labels, solver=solver, seeds=SEEDS)
    for i in range(3):
        alone = ss.log_prob(inner, x[i : i + 1], labels[i : i + 1], solver=solver, seeds=SEEDS[i : i + 1])
        torch.testing.assert_close(alone.value, together.value[i : i + 1], rtol=1e-12, atol=1e-12)
        assert torch.equal(alone.nfe, together.nfe[i : i + 1])


@pytest.mark.parametrize("wrapper", ["wrapper", "nested"])
def test_the_bound_of_a_learned_variance_passes_through_a_wrapper(wrapper):
    inner = model(outputs=2)
    chain = losses.Hybrid(times=losses.Nodes(8))
    for call in (
        lambda m: chain(m, states(8), generator=seeded(2)).value,
        lambda m: bounds.discrete(m, levels(), TRANSFORM, variance="learned", times=losses.Nodes(8)).per_image,
        draw(PC(samplers.Ancestral("learned"), **STEPS)),
    ):
        assert torch.equal(call(WRAPPERS[wrapper](inner)), call(inner))


def test_a_learned_path_trains_through_a_wrapper_as_without():
    gradients = []
    for wrap in (lambda m: m, ss.ModelWrapper, WRAPPERS["nested"], Plain):
        path = ss.LearnedVP(units=4)
        losses.VariationalBound()(wrap(model(path)), states(8), generator=seeded(2)).value.mean().backward()
        gradients.append(torch.cat([path.shape.grad.flatten(), path.ends.grad]))
    assert gradients[0].abs().min() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


@pytest.mark.parametrize("wrapper", ["wrapper", "nested"])
def test_training_through_a_wrapper_gives_the_weights_of_training_without(wrapper, tmp_path: Path):
    data = TensorDataset(states(64).float(), torch.arange(64) % CLASSES)
    trained = []
    for name, wrap in (("alone", lambda m: m), ("wrapped", WRAPPERS[wrapper])):
        inner = model().float()
        trainer = Trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2), steps=6, batch_size=16)
        trainer.fit(
            wrap(inner),
            losses.DenoisingScoreMatching(),
            data,
            tmp_path / name,
            ss.DataMap(ss.data.Affine()),
            progress=False,
        )
        trained.append(inner.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
    assert not torch.equal(trained[0]["network.mix"], model().float().network.mix)


def test_a_users_class_that_is_no_module_is_not_trained_by_the_trainer(tmp_path: Path):
    trainer = Trainer(torch.optim.Adam, steps=1)
    with pytest.raises(TypeError, match=r"must be a module, .* got Plain"):
        trainer.fit(Plain(model()), losses.DenoisingScoreMatching(), None, tmp_path, ss.DataMap(ss.data.Affine()))


def test_active_dropout_inside_a_users_class_is_seen():
    inner = ss.ScoreModel(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), ss.VP())
    for call in (
        lambda m: ss.log_prob(m, normal(2, 3)),
        lambda m: bounds.continuous(m, torch.ones(2, 3), TRANSFORM, draws=2),
    ):
        with pytest.raises(ValueError, match="active dropout"):
            call(Dense(inner))


class Twice(ss.ModelWrapper):
    """Evaluates the model inside twice, and returns their mean."""

    def predict(self, x, t):
        return ss.BlendedViews([self.model.predict(x, t) for _ in range(2)], [f64(0.5), f64(0.5)])


def test_a_wrapper_that_evaluates_twice_counts_twice():
    mixture = oracle((1, 2, 3)).score_model(ss.VP(t_min=1e-3))
    for wrapped, factor in ((mixture, 1), (Twice(mixture), 2), (Plain(Twice(mixture)), 2), (Twice(Twice(mixture)), 4)):
        assert PC(samplers.DDIM(), steps=5)(wrapped, x_T=states()).nfe == 5 * factor
        flow = samplers.ProbabilityFlow(ss.solvers.Adams(steps=16))
        assert flow(wrapped, x_T=states()).nfe == 17 * factor
        if not isinstance(wrapped, Plain):
            assert ss.log_prob(wrapped, states(), solver=ss.solvers.Adams(steps=16)).nfe.tolist() == [17 * factor] * 3
            bits = ss.bits_per_dim(wrapped, levels(), TRANSFORM, solver=ss.solvers.Adams(steps=16), start="perturb")
            assert bits.nfe.tolist() == [18 * factor] * 3


class Own:
    """A user's model with a network of its own, of no base class and without a `ScoreModel` inside."""

    density = "Own"

    def __init__(self, network):
        self.sde, self.networks = ss.VP(t_min=1e-3), {"first": network}

    def predict(self, x, t):
        noise = self.networks["first"](x)
        alpha, sigma = (float(c) for c in (self.sde.alpha(f64(float(t))), self.sde.sigma(f64(float(t)))))
        return Pair(self.sde, torch.as_tensor(t).double(), (x - sigma * noise) / alpha, noise)


@pytest.mark.parametrize("wrap", [lambda m: m, ss.ModelWrapper, WRAPPERS["nested"], Clipped, Twice])
def test_a_users_own_network_is_counted_and_its_dropout_seen(wrap):
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double().eval()
    factor = 2 if wrap is Twice else 1
    assert PC(samplers.DDIM(), steps=5)(wrap(Own(network)), x_T=normal(2, 3)).nfe == 5 * factor
    wrapped = as_model(wrap(Own(network)))
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in network.parameters()}
    network.train()
    with pytest.raises(ValueError, match="active dropout"):
        bounds.continuous(wrapped, torch.ones(2, 3), TRANSFORM, draws=2)


class Autoguided(ss.ModelWrapper):
    """A second model beside the first, each with conditions of its own."""

    def __init__(self, model, weak):
        super().__init__(model)
        self.weak = weak

    def predict(self, x, t):
        return ss.BlendedViews([self.model.predict(x, t), self.weak.predict(x, t)], [2.0, -1.0])


def test_parts_of_a_batch_are_asked_of_every_model_of_a_wrapper():
    labels = torch.tensor([2, 0, 3])
    guided = Autoguided(model().given(labels), model().given(labels.flip(0)))
    whole = ss.bits_per_dim(guided, levels(), TRANSFORM).per_image
    assert torch.equal(ss.bits_per_dim(guided, levels(), TRANSFORM, batch_size=2).per_image[:2], whole[:2])
    swapped = Autoguided(model().given(labels), model().given(labels))
    assert not torch.equal(ss.bits_per_dim(swapped, levels(), TRANSFORM).per_image, whole)


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


def test_the_model_without_density_is_named():
    with pytest.raises(ValueError, match="that of Clipped has none"):
        ss.encode(ss.ModelWrapper(ss.ModelWrapper(Clipped(model()))), states())


def test_an_error_in_a_property_of_a_wrapper_is_not_hidden():
    class Wrong(ss.ModelWrapper):
        @property
        def density(self):
            return self.model.densty

    with pytest.raises(AttributeError):
        _ = Wrong(model()).density


@pytest.mark.parametrize("wrap", [ss.ModelWrapper, WRAPPERS["nested"]])
def test_a_wrapper_of_a_model_without_density_has_none(wrap):
    clipped = wrap(Clipped(model()))
    for call in (lambda: ss.log_prob(clipped, states()), lambda: ss.encode(clipped, states())):
        with pytest.raises(ValueError, match="a model whose probability flow has a density expected"):
            call()


def test_the_conventions_say_whose_density_it_is():
    assert ss.bits_per_dim(model(), levels(), TRANSFORM).conventions["density"].endswith("flow of ScoreModel")
    assert ss.bits_per_dim(Twice(model()), levels(), TRANSFORM).conventions["density"].endswith("Twice(ScoreModel)")
