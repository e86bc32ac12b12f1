"""Samples in any number: functions of their seeds only, and finished batches are not drawn again."""

import threading

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine, Standardize
from scoresde.evaluation.generation import DRAWING, draw_samples
from scoresde.guidance import Autoguidance, Classifier, ClassifierFree
from scoresde.samplers import Ancestral, Langevin, PredictorCorrector
from scoresde.thresholding import Clipped
from scoresde.training import checkpoint
from scoresde.training.trainer import Interrupted
from tests.conftest import oracle

SDE = ss.VP()
SAMPLER = PredictorCorrector(Ancestral(), Langevin(snr=0.1), steps=4, grid="uniform_log_snr", denoise_final=True)


def a_run(path, scale=0.5):
    config = OmegaConf.create({"data": {"shape": [2, 3]}})
    return Run(oracle((2, 3)).score_model(SDE), Affine(scale), config, path)


class Recording:
    """The sampler; records the batches drawn, and is interrupted at a seed."""

    def __init__(self, stop_at=None, name="first"):
        self._stop_at, self._drawn, self.name = stop_at, [], name

    def __call__(self, model, shape, seeds, progress):
        if seeds[0] == self._stop_at:
            raise KeyboardInterrupt
        self._drawn.append(list(seeds))
        return SAMPLER(model, shape=shape, seeds=seeds)


def drawn(run, n, batch_size=3, name="first", **settings):
    """The batches drawn for n samples."""
    sampler = Recording(name=name)
    draw_samples(run, sampler, n, batch_size, **settings)
    return sampler._drawn


def test_samples_are_those_of_the_sampler_in_data_units_for_any_batches(tmp_path):
    run = a_run(tmp_path)
    result = draw_samples(run, SAMPLER, 7, 3, seed=5)
    expected = run.transform.inverse(SAMPLER(run.model, shape=(7, 2, 3), seeds=range(5, 12)).x)
    assert torch.allclose(result.x, expected, atol=1e-5)
    assert (result.nfe, result.backward) == (9, 0)
    assert result.seconds > 0
    assert torch.allclose(draw_samples(run, SAMPLER, 7, 100, seed=5).x, expected, atol=1e-5)
    assert not list((tmp_path / DRAWING).iterdir())


def test_samples_far_from_zero_keep_the_digits_of_their_states(tmp_path):
    """1.7e9 + 50 z of float32 states z, also after they were stored in a file."""
    run = a_run(tmp_path)
    run.transform = Standardize(1.7e9, 50.0)
    states = SAMPLER(run.model, shape=(7, 2, 3), seeds=range(7)).x
    samples = draw_samples(run, SAMPLER, 7, 7).x
    torch.testing.assert_close((samples - 1.7e9) / 50, states.double(), rtol=0, atol=1e-8)


def test_an_interrupted_draw_resumes_also_for_another_number_of_samples(tmp_path):
    run, sampler = a_run(tmp_path), Recording()
    with pytest.raises(Interrupted, match="after 2 of 4 parts"):
        draw_samples(run, Recording(stop_at=6), 10, 3)
    (directory,) = (tmp_path / DRAWING).iterdir()
    assert sorted(path.stem for path in directory.glob("*.safetensors")) == ["0-3", "3-6"]
    result = draw_samples(run, sampler, 12, 3)
    assert sampler._drawn == [[6, 7, 8], [9, 10, 11]]
    assert torch.allclose(result.x, draw_samples(run, SAMPLER, 12).x, atol=1e-5)
    assert not list((tmp_path / DRAWING).iterdir())


def test_stored_batches_are_used_for_the_same_model_and_sampler_only(tmp_path):
    run = a_run(tmp_path)
    with pytest.raises(Interrupted):
        draw_samples(run, Recording(stop_at=3), 6, 3)
    assert drawn(run, 6, name="second")[0][0] == 0
    assert drawn(run, 6, batch_size=2)[0][0] == 0
    assert drawn(run, 6, model=Clipped(run.model, -1.0, 1.0))[0][0] == 0
    assert drawn(a_run(tmp_path, scale=2.0), 6)[0][0] == 0
    assert drawn(run, 6) == [[3, 4, 5]]


def test_every_sample_has_its_condition_in_any_batches(tmp_path):
    run, label = a_run(tmp_path), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    result = draw_samples(run, SAMPLER, 7, 3, seed=5, cond={"label": label})
    for i, of in enumerate(label):
        alone = SAMPLER(run.model.given(of), shape=(1, 2, 3), seeds=[5 + i]).x
        assert torch.allclose(result.x[i : i + 1], run.transform.inverse(alone), atol=1e-5)
    one_for_all = draw_samples(run, SAMPLER, 7, 3, seed=5, cond=torch.tensor([2]))
    assert torch.allclose(one_for_all.x[label == 2], result.x[label == 2], atol=1e-5)
    assert not torch.allclose(one_for_all.x[0], result.x[0], atol=1e-2)
    with pytest.raises(ValueError, match=r"one label for each of the 7 samples; got shape \(2,\)"):
        draw_samples(run, SAMPLER, 7, cond=torch.tensor([2, 1]))


def test_rows_repeat_the_seeds_of_the_first(tmp_path):
    run, label = a_run(tmp_path), torch.tensor([1]).repeat(6)
    x = draw_samples(run, SAMPLER, 6, 4, seed=5, cond=label, columns=3).x
    assert torch.allclose(x[:3], x[3:], atol=1e-5)
    assert torch.allclose(x[:3], draw_samples(run, SAMPLER, 3, seed=5, cond=label[:3]).x, atol=1e-5)
    label[3:] = 2
    other = draw_samples(run, SAMPLER, 6, 4, seed=5, cond=label, columns=3).x
    assert torch.allclose(other[:3], x[:3], atol=1e-5)
    assert not torch.allclose(other[3:], x[3:], atol=1e-2)


def test_stored_batches_are_those_of_one_condition_and_one_guidance(tmp_path):
    """Also if two labels differ in a batch that is not the first, and in rows with the same seeds."""
    run, ones = a_run(tmp_path), torch.ones(6, dtype=torch.int64)
    mixture = oracle((2, 3))

    models = [run.model, ClassifierFree(run.model, scale=1.0), ClassifierFree(run.model, scale=2.0)]
    models += [ClassifierFree(run.model, scale=1.0, interval=(0.1, 2.0)), Autoguidance(run.model, run.model, 1.0)]
    models += [Autoguidance(run.model, Clipped(run.model, -1.0, 1.0), 1.0)]
    models += [Classifier(run.model, lambda x, t: mixture.log_posterior(x, SDE, t), scale=s) for s in (1.0, 1.1)]
    for model in models:
        for cond in (ones, 0 * ones):
            with pytest.raises(Interrupted):
                draw_samples(run, Recording(stop_at=3), 6, 3, model=model, cond=cond)
    assert len(list((tmp_path / DRAWING).rglob("*.safetensors"))) == 2 * len(models)
    for model in models:
        assert drawn(run, 6, model=model, cond=ones) == [[3, 4, 5]]  # the first batch is stored, the second is not
        assert drawn(run, 6, model=model, cond=2 * ones) == [[0, 1, 2], [3, 4, 5]]
        assert drawn(run, 6, model=model, cond=ones, columns=3)[0] == [0, 1, 2]


def test_commands_with_the_same_settings_at_once_are_all_right(tmp_path):
    """Each draws or takes over batches; one also has other seeds."""
    run = a_run(tmp_path)
    expected = SAMPLER(run.model, shape=(16, 2, 3), seeds=range(16)).x
    barrier, results = threading.Barrier(3), {}

    def draw(name, n, seed):
        barrier.wait(10)
        results[name] = draw_samples(run, SAMPLER, n, 2, seed).x

    threads = [threading.Thread(target=draw, args=job) for job in (("a", 8, 0), ("b", 8, 0), ("c", 12, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name, seeds in (("a", slice(0, 8)), ("b", slice(0, 8)), ("c", slice(4, 16))):
        torch.testing.assert_close(results[name], run.transform.inverse(expected[seeds]), rtol=0, atol=1e-5)
    assert not list((tmp_path / DRAWING).iterdir())


@pytest.mark.parametrize("x", [torch.zeros(3, 2), torch.full((3, 2, 3), torch.nan)], ids=["shape", "not finite"])
def test_a_changed_batch_is_refused(tmp_path, x):
    run = a_run(tmp_path)
    with pytest.raises(Interrupted):
        draw_samples(run, Recording(stop_at=3), 6, 3)
    (file,) = (tmp_path / DRAWING).rglob("0-3.safetensors")
    checkpoint.save(file, {"samples": {"x": x}}, {})
    with pytest.raises(
        ValueError, match=r"0-3\.safetensors must hold finite samples of shape \(3, 2, 3\): delete .* to"
    ):
        draw_samples(run, Recording(), 6, 3)


@pytest.mark.parametrize("arguments", [{"n": 0}, {"n": 2, "batch_size": 0}, {"n": 1.5}, {"n": True}])
def test_wrong_numbers(arguments, tmp_path):
    with pytest.raises(ValueError, match="must be an integer >= 1; got"):
        draw_samples(a_run(tmp_path), SAMPLER, **arguments)
