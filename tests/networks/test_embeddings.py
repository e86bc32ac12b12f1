"""Embeddings of the noise label and of conditions against their formulas."""

import copy
import math

import pytest
import torch

from scoresde.networks import MLP, DiT, UNet
from scoresde.networks.condition_embeddings import ConditionEmbedding, ImageCondition, named
from scoresde.networks.embeddings import FourierEmbedding, PositionalEmbedding, TimeEmbedding, accept_target
from scoresde.protocols import NULL, null_condition
from tests.conftest import close, f64, normal
from tests.networks.test_layers import difference, randomised


def silu(x):
    return x / (1 + torch.exp(-x))


def waves(phase):
    """sin and cos of phases (B, n), (B, 2n)."""
    return torch.cat([torch.sin(phase), torch.cos(phase)], dim=1)


def affine(layer, x):
    return x @ layer.weight.T + layer.bias


@pytest.mark.parametrize("endpoint", [True, False])
@pytest.mark.parametrize(("features", "scale"), [(4, 1.0), (16, 1000.0)])
def test_positional_embedding_is_sin_and_cos(features, scale, endpoint):
    embedding, half = PositionalEmbedding(features, scale, endpoint), features // 2
    frequencies = f64(*(scale * 10_000 ** (-k / (half - 1 if endpoint else half)) for k in range(half)))
    assert embedding.frequencies.dtype == torch.float32
    close(embedding.frequencies.double(), frequencies, rtol=2e-6)  # exp of an exponent to 9.2, in float32
    label = torch.tensor([0.0, 0.3, -2.0])
    torch.testing.assert_close(embedding(label), waves(label[:, None] * embedding.frequencies))
    for dtype in (torch.bfloat16, torch.float64):
        assert embedding(label.to(dtype)).dtype == torch.promote_types(dtype, torch.float32)
    assert not embedding.state_dict()
    assert not list(embedding.parameters())


@pytest.mark.parametrize(("kind", "least"), [(PositionalEmbedding, 4), (FourierEmbedding, 2)])
def test_embeddings_need_pairs(kind, least):
    for features in (0, 7, least - 2):
        with pytest.raises(ValueError, match=f"an even number of features, at least {least}; got {features}"):
            kind(features)
    assert kind(least)(torch.zeros(3)).shape == (3, kind(least).features)


@pytest.mark.parametrize("log", [False, True])
def test_fourier_embedding_is_sin_and_cos_of_whole_turns(log):
    embedding, label = FourierEmbedding(10, scale=3.0, log=log).double(), f64(0.1, 1.0, 40.0)
    turns = (torch.log(label) if log else label)[:, None] * embedding.frequencies
    close(embedding(label), waves(2 * math.pi * turns), rtol=1e-9, atol=1e-9)
    for dtype in (torch.bfloat16, torch.float32):
        assert embedding.float()(label.to(dtype)).dtype == torch.float32
    assert embedding.frequencies.shape == (5,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "embedding",
    [
        PositionalEmbedding(8, 1.0),
        PositionalEmbedding(8, endpoint=False),
        FourierEmbedding(8),
        FourierEmbedding(8, log=True),
    ],
    ids=["positional", "adm", "fourier", "log"],
)
def test_a_cast_to_half_precision_changes_no_embedding(embedding, dtype):
    """Neither the frequencies, nor the thousand labels of DDPM, which stay different."""
    label = torch.arange(1.0, 1001.0)
    expected = embedding(label)
    cast = copy.deepcopy(embedding).to(dtype)
    assert torch.equal(cast(label), expected)
    assert torch.equal(cast.float()(label), expected)
    assert len(expected.unique(dim=0)) == 1000
    with torch.autocast("cpu", dtype):
        assert torch.equal(embedding(label), expected)


def test_fourier_frequencies_are_fixed_gaussian_and_saved():
    torch.manual_seed(0)
    embedding = FourierEmbedding(40_000, scale=16.0)
    assert float(embedding.frequencies.std()) == pytest.approx(16, rel=0.02)
    assert abs(float(embedding.frequencies.mean())) < 0.5
    assert list(embedding.state_dict()) == ["frequencies"]
    assert not list(embedding.parameters())


def test_named_parts_of_a_condition():
    vector, label, known = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), ["label", "vector", "context"]
    assert named(None, known) == {}
    assert named({}, known) == {}
    for cond, name in ((vector, "vector"), (vector.half(), "vector"), (label, "label"), (label.int(), "label")):
        (only,) = named(cond, iter(known)).items()
        assert only[0] == name
        assert only[1] is cond
    parts = {"context": vector, "label": label}
    assert named(parts, known) == parts


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        ([0, 1], TypeError, "None, a tensor or a dict of tensors; got list"),
        ({"label": torch.tensor([1]), "vector": None}, TypeError, "condition 'vector' must be a tensor; got NoneType"),
        (torch.zeros(3, 2), ValueError, r"built without a condition 'vector' \(it takes label\)"),
        ({"context": torch.zeros(3, 2, 2)}, ValueError, r"'context' .*: leave 'context' out, or build .* with classes"),
    ],
)
def test_refuses_a_condition_that_the_network_does_not_take(cond, error, message):
    with pytest.raises(error, match=message):
        named(cond, ["label"])
    with pytest.raises(ValueError, match=r"it takes none"):
        named(torch.tensor([1]), [])


def test_condition_embedding_is_the_sum_of_its_parts():
    embedding = randomised(ConditionEmbedding(6, classes=4, cond_features=3))
    label, vector = torch.tensor([3, 0, 1]), normal(3, 3)
    row, line = embedding.label.weight[label], affine(embedding.vector, vector)
    torch.testing.assert_close(embedding({"label": label}, 3), row)
    torch.testing.assert_close(embedding({"vector": vector}, 3), line)
    torch.testing.assert_close(embedding({"label": label, "vector": vector}, 3), row + line)
    assert embedding({}, 3) is None
    assert embedding.parts == ["label", "vector"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_condition_vector_keeps_its_digits_in_half_precision(dtype):
    """2024 w - 2023 w = w, up to the rounding of the output: bfloat16 would read 2024 as 2032 or 2016."""
    embedding = ConditionEmbedding(6, cond_features=1).to(dtype)
    with torch.no_grad():
        embedding.vector.bias.copy_(-2023 * embedding.vector.weight[:, 0].double())
        expected = embedding.vector.weight[:, 0].double() * 2024.0 + embedding.vector.bias.double()
        exact = copy.deepcopy(embedding).float()
        with torch.autocast("cpu", dtype):
            mixed = exact({"vector": torch.tensor([[2024.0]])}, 1)
        half = embedding({"vector": torch.tensor([[2024.0]])}, 1)
    for row in (mixed, half):
        close(row[0].double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-3)


@pytest.mark.parametrize(("classes", "cond_features", "parts"), [(0, 0, []), (4, 0, ["label"]), (0, 3, ["vector"])])
def test_condition_embedding_has_the_parts_it_was_built_with(classes, cond_features, parts):
    embedding = ConditionEmbedding(6, classes, cond_features)
    assert embedding.parts == parts
    assert {name.split(".")[0] for name in embedding.state_dict()} == set(parts)
    cond = {"label": torch.tensor([0]), "vector": torch.zeros(1, 3)}
    assert (embedding(cond, 1) is None) == (not parts)


def test_the_null_class_adds_and_learns_nothing():
    embedding = randomised(ConditionEmbedding(6, classes=3, cond_features=3))
    label, vector = torch.tensor([-1, 2, -1]), normal(3, 3)
    assert embedding({"label": label}, 3).detach().abs().sum(dim=1).gt(0).tolist() == [False, True, False]
    assert torch.equal(embedding({"label": label.to(torch.int8)}, 3), embedding({"label": label}, 3))
    both, alone = embedding({"label": label, "vector": vector}, 3), embedding({"vector": vector}, 3)
    assert torch.equal(both[::2], alone[::2])
    assert difference(both[1:2], alone[1:2]) > 1e-3
    both.square().sum().backward()
    assert embedding.label.weight.grad.abs().sum(dim=1).gt(1e-6).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("label", torch.zeros(3, 1, dtype=torch.int64), ValueError, r"class labels of shape \(3,\); got \(3, 1\)"),
        ("label", torch.tensor([1]), ValueError, r"class labels of shape \(3,\); got \(1,\)"),
        ("label", torch.tensor([0, 4, 0]), ValueError, r"class labels must lie in 0 \.\. 3, or be -1 for no class"),
        ("label", torch.tensor([0, -2, 0]), ValueError, r"class labels must lie in 0 \.\. 3, or be -1 for no class"),
        ("label", torch.zeros(3), TypeError, "class labels must be integers; got torch.float32"),
        ("label", torch.tensor([True, False, True]), TypeError, "class labels must be integers; got torch.bool"),
        ("vector", torch.zeros(3, 4), ValueError, r"condition vectors of shape \(3, 3\); got \(3, 4\)"),
        ("vector", torch.zeros(1, 3), ValueError, r"condition vectors of shape \(3, 3\); got \(1, 3\)"),
        ("vector", torch.ones(3, 3).int(), TypeError, "condition vectors must be floating-point; got torch.int32"),
    ],
)
def test_refuses_parts_of_another_shape_or_type(part, value, error, message):
    with pytest.raises(error, match=message):
        ConditionEmbedding(6, classes=4, cond_features=3)({part: value}, 3)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 2, 4), ValueError, r"condition images of shape \(3, 2, 5\); got \(3, 2, 4\)"),
        (torch.zeros(1, 2, 5), ValueError, r"condition images of shape \(3, 2, 5\); got \(1, 2, 5\)"),
        (
            torch.zeros(3, 2, 5, dtype=torch.int64),
            TypeError,
            "condition images must be floating-point; got torch.int64",
        ),
    ],
)
def test_refuses_images_of_another_shape_or_type(image, error, message):
    condition = ImageCondition(torch.nn.Conv1d(2, 7, 1, bias=False), (2, 5), lambda x: x)
    with pytest.raises(error, match=message):
        condition(torch.zeros(3, 7, 5), {"image": image})


@pytest.mark.parametrize("join", ["input", "output"])
def test_time_embedding_is_two_layers(join):
    position = PositionalEmbedding(8, 2.0).double()
    embedding = randomised(TimeEmbedding(position, 8, 12, classes=4, cond_features=3, join=join))
    label, parts = normal(3), {"label": torch.tensor([1, -1, 3]), "vector": normal(3, 3, seed=1)}
    cond = embedding.cond(parts, 3)
    assert cond.shape == (3, 8 if join == "input" else 12)

    def written_out(before, after):
        hidden = affine(embedding.inner, waves(label[:, None] * position.frequencies) + before)
        return silu(affine(embedding.outer, silu(hidden)) + after)

    torch.testing.assert_close(embedding(label, {}), written_out(0, 0))
    expected = written_out(cond, 0) if join == "input" else written_out(0, cond)
    torch.testing.assert_close(embedding(label, parts), expected)
    assert difference(embedding(label, parts), embedding(label, {})) > 1e-3


def test_time_embedding_joins_at_the_input_or_the_output():
    with pytest.raises(ValueError, match="cond_join must be 'input' or 'output'; got 'middle'"):
        TimeEmbedding(PositionalEmbedding(8), 8, 12, join="middle")


def test_several_labels_have_embeddings_of_their_own():
    embedding = randomised(ConditionEmbedding(6, {"tone": 4, "group": 3}, cond_features=2))
    assert embedding.parts == ["tone", "group", "vector"]
    tone, group, vector = torch.tensor([0, 3, -1]), torch.tensor([2, -1, 1]), normal(3, 2)
    expected = embedding.tone.weight[[0, 3, 0]] * f64([1.0], [1.0], [0.0])
    expected = expected + embedding.group.weight[[2, 0, 1]] * f64([1.0], [0.0], [1.0])
    close(embedding({"tone": tone, "group": group}, 3), expected, atol=1e-6)
    expected = expected + embedding.vector(vector)
    close(embedding({"tone": tone, "group": group, "vector": vector}, 3), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"class labels 'tone' must lie in 0 \.\. 3"):
        embedding({"tone": torch.tensor([4])}, 1)


@pytest.mark.parametrize("name", ["vector", "context", "target", "forward", "skin tone"])
def test_the_name_of_a_label_must_be_free(name):
    with pytest.raises(ValueError, match="must be a Python identifier, and not one of vector, text, context"):
        ConditionEmbedding(6, {name: 4})


def test_a_null_vector_adds_and_learns_nothing():
    embedding = randomised(ConditionEmbedding(6, cond_features=2))
    vector = f64([1.0, 2.0], [math.nan, math.nan])
    features = embedding({"vector": vector}, 2)
    close(features[0], embedding.vector(vector[:1])[0], atol=1e-6)
    assert bool((features[1] == 0).all())
    features[1].sum().backward()
    assert all(bool((p.grad == 0).all()) for p in embedding.parameters())


def test_null_conditions_have_the_shape_and_kind_of_the_condition():
    assert null_condition(torch.tensor([3, 4])).tolist() == [NULL, NULL]
    assert bool(null_condition(torch.ones(2, 3)).isnan().all())


NETWORKS = {
    "mlp": (lambda: MLP((2, 3), width=8, depth=1, out_channels=5), (2, 3)),
    "unet": (lambda: UNet(4, channels=1, width=8, multipliers=(1, 2), blocks=1, out_channels=3), (1, 4, 4)),
    "dit": (lambda: DiT(4, channels=1, width=8, depth=1, heads=2, out_channels=3), (1, 4, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_target_changes_nothing_at_first_and_then_what_depends_on_it(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = randomised(build()).double()
    x, label, target = normal(2, *shape), f64(0.3, 0.8), f64(0.1, 0.9)
    with pytest.raises(ValueError, match="without a condition 'target'"):
        network(x, label, {"target": target})
    before = network(x, label)
    assert before.shape == (2, 2 * shape[0] + 1, *shape[1:])
    accept_target(network)
    accept_target(network)  # once is enough
    assert sum("target.outer.weight" in key for key in network.state_dict()) == 1
    close(network(x, label, {"target": target}), before)
    with torch.no_grad():
        network.time.target.outer.weight += 0.3 * torch.randn_like(network.time.target.outer.weight)
    close(network(x, label), before)
    after = network(x, label, {"target": target})
    change = torch.func.jvp(lambda s: network(x, label, {"target": s}), (target,), (torch.ones_like(target),))[1]
    moved = (network(x, label, {"target": target + 1e-5}) - network(x, label, {"target": target - 1e-5})) / 2e-5
    close(change.detach(), moved.detach(), 1e-4, 1e-6)
    assert float((after - before).detach().abs().max()) > 1e-3
    with pytest.raises(ValueError, match=r"target must be floating-point numbers of shape \(2,\)"):
        network(x, label, {"target": target[:1]})
