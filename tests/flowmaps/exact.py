"""The flow map of a Gaussian in closed form, and small flow maps with random weights."""

import torch

import scoresde as ss
from scoresde.networks import MLP
from scoresde.tensors import broadcast, sum_dims


class GaussianMap(ss.FlowMap):
    """The exact flow map of N(mean, std^2), with states of any shape; std is (*) or a number.

    With m = cos(phi) mean/S and q^2 = cos(phi)^2 std^2/S^2 + sin(phi)^2, y_s = m_s + (q_s/q_t) (y_t - m_t). `amount`
    times a smooth function of (x, t, s) is added to F, and to h.
    """

    def __init__(self, sde, mean, std, data_scale=1.0, amount=0.0, targets="all"):
        super().__init__(torch.nn.Identity(), sde, data_scale=data_scale, targets=targets)
        self.mean, self.std = torch.as_tensor(mean).double(), torch.as_tensor(std).double()
        self.amount = torch.nn.Parameter(torch.tensor(float(amount), dtype=torch.float64))

    def moments(self, phi, like):
        phi = broadcast(phi, like.double()).expand(like.shape)
        mean, std = self.mean / self.data_scale, self.std / self.data_scale
        return phi.cos() * mean, (phi.cos() ** 2 * std**2 + phi.sin() ** 2).sqrt()

    def exact(self, x, t, s):
        """F (B, *) and h (B,) of the exact map, by the derivative on the diagonal."""
        path = self.path
        x = x.double()
        phi, psi = path.angle(t).expand(len(x)), path.angle(s).expand(len(x))
        y = x / broadcast(path.size(t), x)
        (m_t, q_t), (m_s, q_s) = self.moments(phi, x), self.moments(psi, x)
        d, rate = broadcast(psi - phi, x), broadcast(path.clock_rate(t), x)
        same = d.abs() < 1e-9
        std = self.std / self.data_scale
        turn = broadcast(phi, x).cos() * broadcast(phi, x).sin() * (1 - std**2) / q_t**2  # q'/q
        slope = -broadcast(phi, x).sin() * self.mean / self.data_scale + turn * (y - m_t)
        safe = torch.where(same, 1.0, d)
        F = (m_s + q_s / q_t * (y - m_t) - safe.cos() * y) / safe.sin()
        clocks = broadcast(path.clock(s) - path.clock(t), x)
        grown = torch.where(same, turn / rate, (q_s / q_t).log() / torch.where(same, 1.0, clocks))
        return torch.where(same, slope, F), sum_dims(grown.expand(x.shape)) / x[0].numel()

    def average(self, x, t, s):
        F, h = self.exact(x, t, s)
        wrong = torch.sin(3 * x.double() + broadcast(self.path.angle(s) + 2 * self.path.angle(t), x))
        return F + self.amount * wrong, h + self.amount * wrong.flatten(1).mean(dim=1)


def small_map(sde, shape=(3,), prediction=None, width=16, seed=0, correction=True, divergence=True, **options):
    """A flow map with random weights, also in the output layer and the embedding of the target."""
    torch.manual_seed(seed)
    channels = shape[0] * (2 if correction else 1) + divergence
    network = MLP(shape, width=width, depth=1, time_scale=4.0, out_channels=channels)
    model = ss.FlowMap(network, sde, prediction, correction=correction, divergence=divergence, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


class MixtureMap(ss.FlowMap):
    """The flow map of a mixture of isotropic Gaussians in 2-D, by 48 steps of the classical Runge-Kutta method.

    In the angle, with c = cos(phi), s = sin(phi) and v_k = c^2 std_k^2 + s^2, the velocity is
    sum_k r_k [-s m_k + (s c (1 - std_k^2) / v_k) (y - c m_k)] with the responsibilities r_k. Here data_scale = 1.
    """

    def __init__(self, sde, mixture):
        super().__init__(torch.nn.Identity(), sde)
        self.mixture = mixture

    def velocity_of(self, y, phi):
        """v (B, 2), and its divergence per dimension (B,)."""
        c, s = phi.cos()[:, None], phi.sin()[:, None]
        means, variances = self.mixture.means, self.mixture.stds[:, 0] ** 2
        total = c**2 * variances + s**2
        offsets = y[:, None] - c[..., None] * means
        weights = torch.softmax(
            -0.5 * offsets.square().sum(dim=2) / total - total.log() + self.mixture.log_weights, dim=1
        )
        gain = s * c * (1 - variances) / total
        parts = -s[..., None] * means + gain[..., None] * offsets
        scores = -offsets / total[..., None]
        v, score = ((weights[..., None] * part).sum(dim=1) for part in (parts, scores))
        turn = (weights[..., None] * parts * (scores - score[:, None])).sum(dim=(1, 2))  # of the responsibilities
        return v, ((2 * weights * gain).sum(dim=1) + turn) / 2

    def average(self, x, t, s):
        t, s = t.expand(len(x)), s.expand(len(x))
        phi, d = self.path.angle(t), self.path.angle(s) - self.path.angle(t)
        y = start = x / self.path.size(t)[:, None]
        total, step = torch.zeros_like(d), d / 48
        for k in range(48):
            at = phi + k * step
            first, div1 = self.velocity_of(y, at)
            second, div2 = self.velocity_of(y + step[:, None] / 2 * first, at + step / 2)
            third, div3 = self.velocity_of(y + step[:, None] / 2 * second, at + step / 2)
            fourth, div4 = self.velocity_of(y + step[:, None] * third, at + step)
            y = y + step[:, None] / 6 * (first + 2 * second + 2 * third + fourth)
            total = total + step / 6 * (div1 + 2 * div2 + 2 * div3 + div4)
        v, divergence = self.velocity_of(start, phi)
        same = d.abs() < 1e-9
        safe = torch.where(same, 1.0, d)[:, None]
        F = torch.where(same[:, None], v, (y - safe.cos() * start) / safe.sin())
        clock = torch.where(same, 1.0, self.path.clock(s) - self.path.clock(t))
        return F, torch.where(same, divergence / self.path.clock_rate(t), total / clock)


class ExactGenerator(ss.flowmaps.DenoisingGenerator):
    """The generator of a mixture in closed form: a draw of p(x_0 | x_t), its spread multiplied by `spread`.

    The first latent chooses the component, the others are its standard normal coordinates.
    """

    def __init__(self, mixture, sde, steps=2, spread=1.0):
        super().__init__(torch.nn.Identity(), sde, steps=steps, latent=1 + mixture.means[0].numel())
        self.mixture = mixture
        self.spread = torch.nn.Parameter(torch.tensor(float(spread), dtype=torch.float64))

    def generate(self, x, t, z):
        weights, means, stds = self.mixture.denoising_posterior(x, self.sde, t)
        u = torch.special.ndtr(z[:, :1].double())
        k = (weights.cumsum(dim=1) < u).sum(dim=1).clamp(max=weights.shape[1] - 1)
        rows = torch.arange(len(x))
        return means[rows, k] + self.spread * stds[rows, k] * z[:, 1:].double().reshape(x.shape)


class Shifted(torch.nn.Module):
    """A discriminator: a fixed logit plus smooth functions of the first input, whose weights are 0."""

    def __init__(self, logit):
        super().__init__()
        self.logit = logit
        self.weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, inputs, *given):
        a = inputs[0]
        total = a.flatten(1).sum(dim=1)
        features = torch.stack([torch.ones_like(total), total.tanh(), total**2], dim=1)
        return self.logit(a, *given) + features @ self.weights
