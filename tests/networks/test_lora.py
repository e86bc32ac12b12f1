"""Low-rank adapters: the network itself at first, its merged weights, what is trained and saved."""

import pytest
import torch

import scoresde as ss
from scoresde.networks import MLP, DiT, UNet, adapters, add_lora, edm2, load_adapters, merge_lora, save_adapters
from tests.conftest import close, normal

NETWORKS = {
    "mlp": (lambda: MLP(3, width=16, depth=1, cond_features=2), (3,)),
    "unet": (lambda: UNet(4, channels=1, width=8, multipliers=[1, 2], blocks=1, attention=[2]), (1, 4, 4)),
    "edm2": (
        lambda: edm2(4, channels=1, width=8, multipliers=[1, 2], blocks=1, attention=[2], head_channels=8),
        (1, 4, 4),
    ),
    "series": (lambda: UNet([6], channels=2, width=8, multipliers=[1], blocks=1), (2, 6)),
    "dit": (lambda: DiT(4, 1, 2, width=32, depth=1, heads=2), (1, 4, 4)),
}
CASES = [pytest.param(*case, id=name) for name, case in NETWORKS.items()]


def built(make, seed=0):
    torch.manual_seed(seed)
    network = make().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():  # output layers are zero at first
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def moved(network, seed=5):
    """The adapted network after a change of all adapters."""
    torch.manual_seed(seed)
    for tensor in adapters(network).values():
        tensor += 0.3 * torch.randn_like(tensor)
    return network


def output(network, shape):
    return network(normal(3, *shape, seed=1), torch.tensor([0.1, 0.4, 0.9]).double()).detach()


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_adapters_start_as_the_network_and_merge_into_it(make, shape):
    network = built(make)
    before, names = output(network, shape), list(network.state_dict())
    add_lora(network, rank=2)
    assert torch.equal(output(network, shape), before)
    changed = output(moved(network), shape)
    assert float((changed - before).abs().max()) > 1e-3
    merge_lora(network)
    close(output(network, shape), changed, 1e-12, 1e-12)
    assert sorted(network.state_dict()) == sorted(names)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_only_adapters_learn_and_each_change_has_the_rank(make, shape):
    network = moved(add_lora(built(make), rank=2))
    output = network(normal(3, *shape, seed=1), torch.tensor([0.1, 0.4, 0.9]).double())
    output.square().sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained <= set(adapters(network))
    assert all(name.endswith((".up", ".down")) for name in adapters(network))
    original, merged = built(make).state_dict(), merge_lora(network).state_dict()
    changes = {name: (merged[name] - x).flatten(1) for name, x in original.items() if not torch.equal(merged[name], x)}
    assert changes
    assert all(int(torch.linalg.matrix_rank(change, atol=1e-9)) <= 2 for change in changes.values())


def test_the_gradient_is_that_of_the_product():
    """With W' = W + (scale/r) U D, dL/dU = (scale/r) dL/dW' D^T."""
    layer = torch.nn.Sequential(torch.nn.Linear(5, 4)).double()
    x, rank, scale = normal(6, 5), 2, 3.0
    plain = torch.autograd.grad(layer(x).square().sum(), layer[0].weight)[0]
    add_lora(layer, rank, scale)
    part = layer[0].parametrizations.weight[0]
    (up,) = torch.autograd.grad(layer(x).square().sum(), part.up)
    close(up, scale / rank * plain @ part.down.detach().T)


def test_submodules_can_be_trained_in_full():
    network = add_lora(built(NETWORKS["mlp"][0]), rank=1, full=["output"])
    trained = adapters(network)
    assert {"output.weight", "output.bias"} <= set(trained)
    assert not any("output" in name and name.endswith((".up", ".down")) for name in trained)


def test_saved_adapters_restore_the_network(tmp_path):
    make, shape = NETWORKS["unet"]
    path = tmp_path / "adapters.safetensors"
    trained = moved(add_lora(built(make), rank=2))
    save_adapters(trained, path)
    restored = load_adapters(add_lora(built(make), rank=2), path)
    assert torch.equal(output(restored, shape), output(trained, shape))
    full = sum(tensor.nbytes for tensor in built(make).state_dict().values())
    assert path.stat().st_size < full
    with pytest.raises(ValueError, match=r"same rank.*down"):
        load_adapters(add_lora(built(make), rank=1), path)
    with pytest.raises(FileNotFoundError, match="save_adapters"):
        load_adapters(trained, tmp_path / "none")
    path.write_bytes(b"no adapters")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_adapters(trained, path)


def test_an_adapted_flow_map_starts_as_the_map_and_differentiates():
    """Forward-mode derivatives, which MeanFlow takes, pass through adapters; a small map keeps its output."""
    torch.manual_seed(0)
    model = ss.FlowMap(MLP(3, width=16, depth=1, out_channels=4), ss.VP()).double()
    x, t, s = normal(4, 3), torch.linspace(0.2, 0.8, 4).double(), torch.full((4,), 0.1).double()
    before = model.map(x, t, s)
    add_lora(model.network, rank=2)
    assert torch.equal(model.map(x, t, s), before)
    trained = adapters(model.network)
    assert {"time.target.inner.weight", "time.target.outer.bias", "output.parametrizations.weight.0.up"} < set(trained)
    assert "output.bias" not in trained
    loss = ss.flowmaps.MeanFlow()(model, x, generator=torch.Generator().manual_seed(0)).value.mean()
    loss.backward()
    assert float(model.network.output.parametrizations.weight[0].up.grad.abs().max()) > 0


def test_wrong_arguments_are_refused():
    network = built(NETWORKS["mlp"][0])
    for rank in (0, -1):
        with pytest.raises(ValueError, match="rank must be"):
            add_lora(network, rank)
    with pytest.raises(TypeError, match="rank must be"):
        add_lora(network, 1.5)
    with pytest.raises(ValueError, match="scale must be"):
        add_lora(network, 1, scale=0.0)
    with pytest.raises(ValueError, match=r"full must be names of submodules.*'outputs'"):
        add_lora(network, 1, full=["outputs"])
    with pytest.raises(ValueError, match="must have linear layers"):
        add_lora(torch.nn.Identity(), 1)
    for function in (merge_lora, adapters):
        with pytest.raises(ValueError, match="must have adapters"):
            function(network)
    with pytest.raises(ValueError, match="must have no adapters"):
        add_lora(add_lora(network, 1), 1)
