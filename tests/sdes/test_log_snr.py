"""A path from its log-SNR: that of VP and of VE give these paths."""

import pytest
import torch

import scoresde as ss
from tests.conftest import close, f64, gradient, times

NAMES = ("alpha", "sigma", "alpha_dot", "sigma_dot", "drift", "diffusion", "log_snr")


@pytest.mark.parametrize(("path", "preserving"), [(ss.VP(), True), (ss.VE(), False)])
def test_the_log_snr_determines_the_path(path, preserving):
    class Same(ss.sdes.LogSNRPath):
        def schedule(self, t):
            return path.log_snr(t.double()), gradient(path.log_snr, t.double())

    sde, t = Same(path.t_min, path.t_max, preserving), times(path)
    for name in NAMES:
        close(getattr(sde, name)(t), getattr(path, name)(t), rtol=1e-11, atol=1e-14)
        assert getattr(sde, name)(t.float()).dtype == torch.float32


def test_a_path_without_a_schedule_says_so():
    with pytest.raises(NotImplementedError, match="LogSNRPath must define schedule"):
        ss.sdes.LogSNRPath(0.0, 1.0).alpha(f64(0.5))
