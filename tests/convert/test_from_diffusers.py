"""Models of diffusers: at every node of the schedule ours equals theirs; models without a counterpart are refused."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde import build
from scoresde.convert.from_diffusers import DiffusersNetwork, DiffusersSchedule
from scoresde.convert.from_diffusers import diffusers as convert
from scoresde.convert.runs import save_run
from scoresde.random_stream import RandomStream
from tests.conftest import close, make_transition, seeded


def setup_module():
    """Import diffusers when the first test runs: every process collects these tests, and few run them."""
    global hf
    hf = pytest.importorskip("diffusers")


NODES = (0, 1, 500, 999)
TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def unet(seed=0, **changes):
    """A tiny network of diffusers with random weights, frozen and in eval mode."""
    torch.manual_seed(seed)
    return hf.UNet2DModel(**{**TINY, **changes}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    return unet()


def states(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def squared(scheduler):
    """alpha^2 of a scheduler's steps, computed in float64."""
    return torch.cumprod(1 - scheduler.betas.double(), dim=0)


def their_noise(scheduler, network, x, i):
    """The noise prediction of diffusers at timestep i, from its own network's output, by the definitions."""
    output = network(x, i).sample.double()
    alpha, sigma = squared(scheduler)[i].sqrt(), (1 - squared(scheduler)[i]).sqrt()
    return {
        "epsilon": output,
        "sample": (x - alpha * output) / sigma,
        "v_prediction": alpha * output + sigma * x,
    }[scheduler.config.prediction_type].float()


@pytest.mark.parametrize(
    ("kind", "schedule", "prediction"),
    [
        ("DDPMScheduler", "linear", "epsilon"),
        ("DDPMScheduler", "squaredcos_cap_v2", "sample"),
        ("DDIMScheduler", "scaled_linear", "v_prediction"),
    ],
)
def test_at_its_nodes_the_model_is_theirs(network, kind, schedule, prediction):
    scheduler = getattr(hf, kind)(beta_schedule=schedule, prediction_type=prediction)
    model, x = convert((network, scheduler)).model, states(2, 3, 8, 8)
    assert not model.training
    for i in NODES:
        t = torch.tensor(i / 999, dtype=torch.float64)
        expected = their_noise(scheduler, network, x, i)
        # At the first nodes the noise is (x - alpha x_0) / 0.01, in float32.
        close(model.noise(x, t), expected, rtol=2e-5, atol=1e-6 * max(5.0, float(expected.abs().max())))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_the_path_goes_through_their_table(network, kind, schedule):
    scheduler = getattr(hf, kind)(beta_schedule=schedule, num_train_timesteps=500)
    sde = convert((network, scheduler)).model.sde
    nodes = torch.arange(500, dtype=torch.float64) / 499
    assert (sde.t_min, sde.t_max) == (0, 1)
    close(sde.alpha(nodes).square(), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)
    # The variance at the first step is its beta, which their float32 table does not resolve.
    close(sde.sigma(nodes[0]).square(), scheduler.betas[0].double(), rtol=1e-9)


def test_labels_are_their_timesteps_and_fractions_between_them(network):
    model = convert((network, hf.DDPMScheduler())).model
    t = torch.tensor([0.0, 1 / 999, 0.5, 700.25 / 999, 1.0], dtype=torch.float64)
    labels = model.prediction.c_noise(model.sde, t)
    close(labels, torch.tensor([0, 1, 499.5, 700.25, 999], dtype=torch.float64), rtol=1e-12)
    x = states(1, 3, 8, 8)
    close(model.noise(x, t[3]), network(x, torch.tensor([700.25])).sample, rtol=2e-5, atol=1e-5)
    assert not torch.allclose(model.noise(x, t[3]), network(x, 700).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variance", "ours"), [("fixed_small", "posterior"), ("fixed_large", "forward")])
def test_an_ancestral_step_is_their_ddpm_step(network, variance, ours):
    scheduler = hf.DDPMScheduler(variance_type=variance, clip_sample=False)
    model, x = convert((network, scheduler)).model, states(2, 3, 8, 8)
    for i in (1, 20, 500, 999):
        t, s = (torch.tensor(k / 999, dtype=torch.float64) for k in (i, i - 1))
        step = make_transition(ss.samplers.Ancestral(ours), model, x, t, s, RandomStream(seeded(3)))
        theirs = scheduler.step(network(x, i).sample, i, x, generator=seeded(3)).prev_sample
        # At the first step their float32 table has three digits of 1 - alpha^2 = 1e-4.
        close(step, theirs, rtol=1e-5, atol=1e-3 if i == 1 else 2e-5)


def test_a_learned_variance_is_theirs():
    network, scheduler = unet(out_channels=6), hf.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    run, x = convert((network, scheduler)), states(2, 3, 8, 8)
    assert run.model.learned_variance
    for i in (1, 500, 999):
        t, s = (torch.tensor(k / 999, dtype=torch.float64) for k in (i, i - 1))
        views = run.model.predict(x, t)
        noise, raw = network(x, i).sample.chunk(2, dim=1)
        close(views.noise, noise, rtol=2e-5, atol=1e-5)
        forward = run.model.sde.transition(s, t)[1]
        posterior = forward * (run.model.sde.sigma(s) / run.model.sde.sigma(t)).square()
        log_variance = views.variance * forward.log() + (1 - views.variance) * posterior.log()
        close(log_variance.float(), scheduler._get_variance(i, raw), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_a_terminal_snr_of_zero_is_left_out(network, kind):
    scheduler = getattr(hf, kind)(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.warns(UserWarning, match="its last timestep, 999, is left out, and t_max is timestep 998.*= 4e-09"):
        model = convert((network, scheduler)).model
    assert len(model.sde.nodes) == 999
    x = states(2, 3, 8, 8)
    for i in (0, 500, 998):
        t = torch.tensor(i / 998, dtype=torch.float64)
        close(model.noise(x, t), their_noise(scheduler, network, x, i), rtol=2e-5, atol=1e-5)


def test_a_network_with_classes_reads_them():
    network = unet(num_class_embeds=4)
    model, x = convert((network, hf.DDPMScheduler())).model, states(2, 3, 8, 8)
    for labels in (torch.tensor([0, 3]), torch.tensor([1, 1])):
        expected = network(x, 999, class_labels=labels).sample
        close(model.noise(x, 1.0, labels), expected, rtol=2e-5, atol=1e-5)
    assert not torch.allclose(model.noise(x, 1.0, torch.tensor([0, 3])), expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"cond must be class labels \(B,\), .*; got None"):
        model.noise(x, 1.0)
    with pytest.raises(TypeError, match=r"must be class labels, a tensor.*got a dict of y"):
        model.noise(x, 1.0, {"y": torch.tensor([0, 3])})
    with pytest.raises(ValueError, match=r"cond must be None, as .*; got shape \(2,\)"):
        convert((unet(), hf.DDPMScheduler())).model.noise(x, 1.0, torch.tensor([0, 3]))


def test_likelihoods_do_not_depend_on_the_batch():
    run = convert((unet(in_channels=1, out_channels=1, sample_size=(8, 4)), hf.DDPMScheduler()))
    assert list(run.config.data.shape) == [1, 8, 4]
    assert run.transform == ss.data.Levels(256, -1.0, 1.0)
    images = torch.randint(0, 256, (3, 1, 8, 4), generator=seeded())
    options = {"dequantization": ss.Uniform(), "solver": ss.solvers.RungeKutta(steps=2)}
    bits = ss.bits_per_dim(run.model, images, run.transform, **options, seeds=range(3)).per_image
    alone = ss.bits_per_dim(run.model, images[1:2], run.transform, **options, seeds=[1]).per_image
    assert bool(torch.isfinite(bits).all())
    close(alone, bits[1:2], rtol=1e-5)
    assert float((bits[0] - bits[1]).abs()) > 1e-3 * float(bits[1].abs())


def test_the_exact_trace_works_with_attention():
    model = convert((unet(in_channels=1, out_channels=1, sample_size=4), hf.DDPMScheduler())).model
    t, x = torch.tensor(0.4, dtype=torch.float64), states(2, 1, 4, 4)
    _, trace, _ = ss.ExactTrace().bind(RandomStream(), x)(lambda x: model.noise(x, t), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.noise(x, t).sum(dim=0), x)
    expected = torch.einsum("chwbchw->b", jacobian)
    close(trace[:, 0].float(), expected, rtol=1e-3, atol=1e-4)


def exploding(network=None, **config):
    network = network or unet(time_embedding_type="fourier")
    return network, hf.ScoreSdeVeScheduler(sigma_max=50.0, sampling_eps=1e-4, **config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_half_precision_keeps_the_frequencies_of_fourier_features(dtype):
    run, x, t = convert(exploding()), states(2, 3, 8, 8), torch.tensor([0.3, 0.8], dtype=torch.float64)
    before = run.model.network.unet.time_proj.weight.clone()
    exact = run.model.score(x, t)
    run.model.to(dtype)
    assert torch.equal(run.model.network.unet.time_proj.weight, before)
    assert run.model.network.unet.conv_in.weight.dtype == dtype
    error = (run.model.score(x, t) - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_score_sde_ve_is_a_ve_of_images_from_0_to_1():
    network, scheduler = exploding()
    run, x = convert((network, scheduler)), states(2, 3, 8, 8)
    sde = run.model.sde
    scheduler.set_timesteps(7)
    scheduler.set_sigmas(7)
    t = scheduler.timesteps.double()
    close(sde.sigma(t).float(), scheduler.sigmas, rtol=1e-5)
    assert (type(sde), sde.t_min, sde.t_max) == (ss.VE, 1e-4, 1.0)
    for time, sigma in zip(t, scheduler.sigmas, strict=True):
        expected = network(x, sigma).sample
        close(run.model.score(x, time), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    levels = torch.tensor([[0.0, 128.0, 256.0]])
    close(run.transform(levels), torch.tensor([[0, 0.5, 1]]))
    assert list(run.config.data.range) == [0, 256]


def is_same(run, other):
    """Return whether two runs have the same model, to the last bit."""
    x, t = states(2, *run.config.data.shape), torch.tensor(0.3, dtype=torch.float64)
    return torch.equal(run.model.score(x, t), other.model.score(x, t)) and run.config == other.config


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_a_saved_pipeline_equals_its_objects(tmp_path, network, layout):
    pipeline = hf.DDPMPipeline(network, hf.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    path = tmp_path / "cats"
    pipeline.save_pretrained(path)
    if layout == "flat":  # as the first published ones are
        for file in [*path.glob("*/*")]:
            file.rename(path / file.name)
        for folder in ("unet", "scheduler"):
            (path / folder).rmdir()
    run = convert(str(path))
    assert (run.path, run.config.name) == (path, "cats")
    from_objects = [convert(pipeline), convert((pipeline.unet, pipeline.scheduler))]
    for other in from_objects:
        other.config.name = "cats"
        assert is_same(run, other)
    assert not is_same(run, convert((unet(seed=1), pipeline.scheduler)))


@pytest.mark.filterwarnings("ignore:.*zero terminal SNR")
@pytest.mark.parametrize("kind", ["ddpm", "learned", "zero", "exploding", "flow", "edm"])
def test_a_saved_run_comes_back(tmp_path, network, kind):
    pairs = {
        "ddpm": lambda: (network, hf.DDPMScheduler(trained_betas=np.linspace(1e-4, 0.02, 50))),
        "learned": lambda: (unet(out_channels=6), hf.DDPMScheduler(variance_type="learned_range")),
        "zero": lambda: (network, hf.DDIMScheduler(rescale_betas_zero_snr=True)),
        "exploding": exploding,
        "flow": lambda: (network, hf.FlowMatchEulerDiscreteScheduler(shift=2.0)),
        "edm": lambda: (network, hf.EDMEulerScheduler(prediction_type="v_prediction")),
    }
    run = convert(pairs[kind]())
    loaded = ss.load(save_run(run, tmp_path / "run"))
    assert is_same(run, loaded)
    assert not loaded.model.training
    assert loaded.transform == run.transform


def test_a_conversion_copies_the_weights_in_float32(network):
    run = convert((unet().half(), hf.DDPMScheduler()))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    expected = network(states(1, 3, 8, 8), 999).sample
    close(run.model.noise(states(1, 3, 8, 8), 1.0), expected, rtol=1e-2, atol=1e-2)
    run = convert((network, hf.DDPMScheduler()))
    before = network.conv_in.weight.clone()
    next(run.model.network.unet.conv_in.parameters()).data.zero_()
    assert torch.equal(network.conv_in.weight, before)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: hf.FlowMatchHeunDiscreteScheduler(), "with tables .* convert; got FlowMatchHeunDiscreteScheduler"),
        (lambda: hf.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas must be false"),
        (
            lambda: hf.EDMDPMSolverMultistepScheduler(prediction_type="sample"),
            "one of epsilon, v_prediction; got 'sample'",
        ),
        (lambda: hf.CogVideoXDDIMScheduler(), r"must be cumprod\(1 - betas\); in this CogVideoXDDIMScheduler.* 0\.3"),
        (lambda: hf.DDPMScheduler(prediction_type="x"), "one of epsilon, sample, v_prediction; got 'x'"),
        (lambda: hf.UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas .* must be false"),
        (
            lambda: hf.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type must be 'discrete'; got 'continuous'",
        ),
        (lambda: hf.DDPMScheduler(variance_type="learned_range"), "got 3 in, 3 out, variance_type 'learned_range'"),
    ],
)
def test_refuses_schedulers_without_a_counterpart(network, scheduler, message):
    with pytest.raises(ValueError, match=message):
        convert((network, scheduler()))


@pytest.mark.parametrize(
    ("changes", "variance", "message"),
    [
        ({"sample_size": None}, "fixed_small", "unet.config.sample_size is not set"),
        ({"time_embedding_type": "fourier"}, "fixed_small", "DDPMScheduler must have .* 'positional'.*; got 'fourier'"),
        ({"out_channels": 6}, "fixed_small", "got 3 in, 6 out, variance_type 'fixed_small'"),
        ({"out_channels": 6}, "learned", r"\('learned' has no counterpart\).*variance_type 'learned'"),
        ({"out_channels": 4}, "learned_range", "got 3 in, 4 out"),
    ],
)
def test_refuses_networks_without_a_counterpart(changes, variance, message):
    with pytest.raises(ValueError, match=message):
        convert((unet(**changes), hf.DDPMScheduler(variance_type=variance)))


def test_refuses_a_table_altered_by_hand(network):
    scheduler = hf.DDPMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    with pytest.raises(ValueError, match=r"must be cumprod\(1 - betas\)"):
        convert((network, scheduler))
    scheduler = hf.DDPMScheduler()
    scheduler.betas = hf.DDPMScheduler(beta_end=0.01).betas
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas, dim=0)
    with pytest.raises(
        ValueError, match=r"betas of the DDPMScheduler must be those that its config gives.*trained_betas="
    ):
        convert((network, scheduler))


class Pipeline:
    """A pipeline of these components, such as a latent one."""

    def __init__(self, **components):
        self.components = components


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda n: n, "converts; got UNet2DModel$"),
        (lambda n: 3, "converts; got int$"),
        (lambda n: (n, 3), r"got tuple of unet \(UNet2DModel\), scheduler \(int\)"),
        (lambda n: (nn.Conv2d(3, 3, 1), hf.DDPMScheduler()), r"unet \(Conv2d\), scheduler \(DDPMScheduler\)"),
        (lambda n: Pipeline(unet=n, scheduler=hf.DDPMScheduler(), vqvae=nn.Identity()), r"got Pipeline of .*vqvae"),
    ],
    ids=["network", "int", "no scheduler", "other network", "latent"],
)
def test_refuses_other_models(network, source, message):
    with pytest.raises(TypeError, match=message):
        convert(source(network))


def test_empty_components_do_not_matter(network):
    scheduler = hf.DDPMScheduler()
    run = convert(Pipeline(unet=network, scheduler=scheduler, tokenizer=None))
    assert is_same(run, convert(network, scheduler))


@pytest.fixture
def folder(tmp_path, network):
    hf.DDPMPipeline(network, hf.DDPMScheduler()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vqvae": ["diffusers", "VQModel"]}, r"saved holds .*vqvae \(diffusers.VQModel\)"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, r"unet \(diffusers.UNet2DConditionModel\)"),
        ({"unet": ["mine", "UNet2DModel"]}, r"unet \(mine.UNet2DModel\)"),
        ({"scheduler": ["mine", "DDPMScheduler"]}, r"scheduler \(mine.DDPMScheduler\)"),
        ({"scheduler": [None, None]}, r"saved holds unet \(diffusers.UNet2DModel\)$"),
    ],
)
def test_refuses_folders_of_other_pipelines(folder, changes, message):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "feature_extractor": [None, None], **changes}))
    with pytest.raises(TypeError, match=message):
        convert(folder)


@pytest.mark.parametrize("name", ["UNet2DModel", "Nothing", "os"])
def test_refuses_a_name_that_is_not_a_scheduler(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    message = f"'{name}' is not a scheduler of diffusers"
    with pytest.raises(ValueError, match=message):
        convert(folder)
    with pytest.raises(ValueError, match=message):
        DiffusersSchedule(name, {})


def test_reads_no_pickles(folder, network, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: pytest.fail("called"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no weights in safetensors in .*saved/unet, and pickles are not read"):
        convert(folder)
    (folder / "unet" / "other.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model.safetensors"):
        convert(folder)
    with pytest.raises(FileNotFoundError, match=r"no pipeline of diffusers at google/ddpm.*not downloaded"):
        convert("google/ddpm-cifar10-32")


def test_names_the_package_to_install(network, monkeypatch):
    run = convert((network, hf.DDPMScheduler()))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[diffusers\]'"):
        convert((network, hf.DDPMScheduler))
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[diffusers\]'"):
        DiffusersNetwork(run.config.network.config)


def test_names_a_configuration_that_diffusers_rejects():
    with pytest.raises(ValueError, match=r"cannot build .*DiffusersSchedule: DDPMScheduler rejects.*'beta'"):
        build.instantiate(
            {
                "_target_": f"{DiffusersSchedule.__module__}.DiffusersSchedule",
                "scheduler": "DDPMScheduler",
                "config": {"beta": 1},
            }
        )
    with pytest.raises(ValueError, match=r"cannot build .*DiffusersNetwork: .*'channels'"):
        build.instantiate({"_target_": f"{DiffusersNetwork.__module__}.DiffusersNetwork", "config": {"channels": 1}})
    with pytest.raises(ValueError, match="DDPMScheduler rejects its configuration: wrong is not implemented"):
        DiffusersSchedule("DDPMScheduler", {"beta_schedule": "wrong"})
