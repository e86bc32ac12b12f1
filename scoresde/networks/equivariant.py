r"""A network for points in space, equivariant under rotations, reflections and the order of points of one kind.

A state (B, D + S, L) has L points, each with a position p_i in D dimensions, S scalars s_i and a kind, such as its
chemical element. The network reads distances d_ij = |p_j - p_i| through Gaussians

    f_k(d)  =  exp(-(d - mu_k)^2 / (2 sigma^2)),    mu_k from 0 to reach in steps of sigma.

The features h_i of a point start as embeddings of its kind, of |p_i| and of s_i. In each layer, a point receives r_i,
the features of all points weighted by the distance (continuous-filter convolution, SchNet, 1706.08566, eq. 2):

    r_ik  =  sum_j f_k(d_ij) W_s norm(h_j),        h_i  <-  h_i + W_2 silu(W_1 [r_i, norm(h_i)] + W_t time).

The output is S scalars linear in h_i, and vectors, sums of differences of positions (EGNN, 2102.09844, eq. 4):

    v_i  =  u_i p_i + sum_j w_ij (p_j - p_i) / (1 + d_ij),        w_ij  =  sum_k f_k(d_ij) (A_k h_i) . (W h_j),

with u_i linear in h_i. Sums over pairs are products of matrices, with no hidden layer per pair, which is fast on a CPU.
|p_i| is a distance from the origin: centre the states. The density of a model with this network is invariant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, CountOrZero, Few, FewOrZero, Layers, Positive, Share, checked
from scoresde.configured import Configured
from scoresde.networks.condition_embeddings import Classes
from scoresde.networks.embeddings import PositionalEmbedding, TimeEmbedding
from scoresde.networks.layers import check_shape, checkpointed, linear
from scoresde.protocols import Condition
from scoresde.tensors import FullPrecision


def length(x: Tensor) -> Tensor:
    """Return |x| along the last dimension, differentiable at 0: (|x|^2 + 1e-6)^(1/2)."""
    return (x.square().sum(dim=-1) + 1e-6).sqrt()


class DistanceWaves(FullPrecision):
    """Gaussians of distances, (..., L) -> (..., waves, L): f_k of the module docstring."""

    def __init__(self, waves: int, reach: float):
        super().__init__()
        self.centres, self.spacing = nn.Buffer(torch.linspace(0, reach, waves), persistent=False), reach / (waves - 1)

    def forward(self, d: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((d[..., None, :] - self.centres.to(d.dtype)[:, None]) / self.spacing).square())


class MessageLayer(nn.Module):
    """Features h (B, L, width) plus what the other points send, see the module docstring."""

    def __init__(self, width: int, waves: int, channels: int, dropout: float):
        super().__init__()
        self.norm, self.sent = nn.LayerNorm(width), linear(width, channels)
        self.inner, self.time = linear(waves * channels + width, width), linear(width, width)
        self.dropout, self.outer = nn.Dropout(dropout), linear(width, width, scale=0.0)

    def forward(self, h: Tensor, pairs: Tensor, time: Tensor) -> Tensor:
        """Return h for Gaussians of all pairs (B, L, waves, L) and time features (B, width)."""
        g = self.norm(h)
        received = (pairs.flatten(1, 2) @ self.sent(g)).reshape(*h.shape[:2], -1)
        hidden = self.inner(torch.cat([received, g], dim=2)) + self.time(time)[:, None]
        return h + self.outer(self.dropout(F.silu(hidden)))


@checked
class EquivariantNetwork(nn.Module, Configured):
    """A noise-conditional network for points (B, dims + scalars, L), such as the atoms of a molecule.

    A rotation or reflection of the positions about the origin, or another order of points of one kind, changes the
    output in the same way. The cost per state is of order L^2 waves channels + L waves channels width.

    Args:
        kinds: the kind of each of the L points, 0, 1, ...
        dims: dimensions of space; the first `dims` channels of a state are the positions.
        scalars: number of further channels, which a rotation leaves unchanged.
        width: number of features of a point.
        depth: number of layers.
        waves: number of Gaussians of the distance, at least 2.
        reach: the largest distance that the Gaussians resolve, in the units of the network's input; the scalars are
            resolved between -reach/2 and reach/2.
        channels: number of features that a point sends.
        dropout: dropout probability in the layers.
        time_scale: highest frequency of the embedding of the noise label, see `PositionalEmbedding`.
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.
        checkpointing: if True, recompute each layer in the backward pass instead of storing its activations.

    Raises:
        ValueError: `kinds` is empty, or `waves` is less than 2.
    """

    casts_inputs = True

    def __init__(
        self,
        kinds: Sequence[FewOrZero],
        dims: Count = 3,
        scalars: CountOrZero = 0,
        width: Count = 96,
        depth: Layers = 4,
        waves: Few = 20,
        reach: Positive = 6.0,
        channels: Count = 16,
        dropout: Share = 0.0,
        time_scale: Positive = 10.0,
        classes: Classes = 0,
        cond_features: CountOrZero = 0,
        checkpointing: bool = False,
    ):
        super().__init__()
        if not len(kinds) or waves < 2:
            raise ValueError(f"expected the kind of at least one point, and waves >= 2; got kinds={kinds}, {waves=}")
        self.shape, self.dims, self.scalars = (dims + scalars, len(kinds)), dims, scalars
        self.channels, self.checkpointing = channels, checkpointing
        self.time = TimeEmbedding(PositionalEmbedding(width, time_scale), width, width, classes, cond_features)
        self.conditions = self.time.cond.parts
        self.kinds = nn.Buffer(torch.tensor(list(kinds)), persistent=False)
        self.embedding, self.waves = nn.Embedding(max(kinds) + 1, width), DistanceWaves(waves, reach)
        self.input, self.middle = linear((1 + scalars) * waves, width), reach / 2
        self.layers = nn.ModuleDict({f"layer{i}": MessageLayer(width, waves, channels, dropout) for i in range(depth)})
        self.norm, self.sent = nn.LayerNorm(width), linear(width, channels)
        self.output = linear(width, 1 + scalars + waves * channels, scale=0.0)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return (B, dims + scalars, L) at states x of this shape, noise labels (B,) and a condition."""
        check_shape(x, self.shape)
        time = self.time(c_noise, self.time.named(cond, self.conditions))
        p, kept = x[:, : self.dims].mT, x[:, self.dims :]
        between = p[:, None] - p[:, :, None]  # (B, i, j, dims), from i to j
        distances = length(between)
        own = self.waves(torch.cat([length(p)[:, None], kept + self.middle], dim=1)).flatten(1, 2).mT
        pairs, own = (f.to(self.input.weight.dtype) for f in (self.waves(distances), own))  # pairs: (B, i, k, j)
        h = self.embedding(self.kinds) + self.input(own)
        for layer in self.layers.values():
            h = checkpointed(layer, h, pairs, time, active=self.checkpointing)
        g = self.norm(h)
        radial, scalars, received = self.output(g).split(
            [1, self.scalars, self.output.out_features - 1 - self.scalars], 2
        )
        products = received.reshape(len(x), -1, self.channels) @ self.sent(g).mT  # h_j A_k h_i, (B, i k, j)
        weights = (products.reshape(pairs.shape) * pairs).sum(dim=2) / (1 + distances)
        vectors = (weights[..., None] * between).sum(dim=2) + radial * p
        return torch.cat([vectors, scalars.to(vectors.dtype)], dim=2).mT
