r"""Discriminators, and the logistic loss by which a generator and a discriminator learn from each other (1406.2661).

A discriminator maps tensors a to a logit D(a). With sp(u) = log(1 + e^u), the losses of a pair of real and generated
tensors are

    discriminator:  sp(-D(real)) + sp(D(generated)) + gamma/2 |dD(real)/d real|^2        (R1, 1801.04406)
    generator:      sp(-D(generated)),                                                   non-saturating

where D is fixed in the second line and the generated tensors are in the first. Without the penalty, the best D is the
log density ratio log q_real(a) - log q_generated(a); it is 0 if the generator is exact, and the gradient in the
generator then vanishes. One optimiser that scales each gradient by itself, such as Adam, takes both steps at once.

| class                  | a                                            | source                             |
| ---------------------- | -------------------------------------------- | ---------------------------------- |
| `PairDiscriminator`    | y_s = x_s/n(s), given x_t and t              | 2112.07804                         |
| `FeatureDiscriminator` | features of x_u in a trained score network   | 2311.17042, 2402.13929, 2403.12015 |
| `PatchDiscriminator`   | images, each patch of which has a logit      | 1611.07004, section 3.2.2          |
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, EvenCount, checked
from scoresde.configured import Configured
from scoresde.divergence import attention_kernels
from scoresde.flowmaps.angle import AnglePath
from scoresde.guidance.blends import check_same_path
from scoresde.networks.embeddings import PositionalEmbedding, TimeEmbedding
from scoresde.networks.layers import cast_for, group_norm, linear
from scoresde.probability_flow import frozen
from scoresde.protocols import Condition, Network, call_network, expand
from scoresde.score import BaseModel
from scoresde.tensors import broadcast, check_instance, float64
from scoresde.wrappers import for_inference

BLOCK = re.compile(r"(?!(.*\.)?up\.)(.*\.)?(block|layer)\d+")  # blocks of this library's networks, before the way up


class Losses(NamedTuple):
    """The losses of the module docstring, (B,) each."""

    generator: Tensor
    discriminator: Tensor


def losses(
    discriminator: nn.Module, real: Sequence[Tensor], generated: Sequence[Tensor], given: Sequence[Any], penalty: float
) -> Losses:
    """Return the losses of the module docstring.

    Args:
        discriminator: (tensors, *given) -> logits (B,).
        real, generated: the tensors a, each (B, *); a gradient flows to the generator through `generated`.
        given: further arguments of the discriminator.
        penalty: gamma; the gradient is that with respect to all tensors in `real`.
    """
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    generator = F.softplus(-torch.func.functional_call(discriminator, fixed, (generated, *given)))
    loss = F.softplus(discriminator([a.detach() for a in generated], *given))
    if not penalty:
        return Losses(generator, loss + F.softplus(-discriminator([a.detach() for a in real], *given)))
    is_training = torch.is_grad_enabled()
    with torch.enable_grad(), attention_kernels(fused=False):
        real = [a.detach().requires_grad_() for a in real]
        logits = discriminator(real, *given)
        gradients = torch.autograd.grad(logits.sum(), real, create_graph=is_training)
    squares = sum(gradient.square().flatten(1).sum(dim=1) for gradient in gradients)
    return Losses(generator, loss + F.softplus(-logits) + penalty / 2 * squares)


class PairDiscriminator(nn.Module, Configured):
    """The logit of x_s given x_t and t, by a network on both states.

    The network reads y_s and y_t, the states divided by n (`flowmaps.angle`), joined along the first dimension `C` of
    `(C, *)`, and as noise label the fraction of the clock at t, in [0, 1]. The logit is the mean of its output.

    Args:
        network: maps ((B, 2 C, ...), labels (B,), cond) to (B, ...), such as `EncoderUNet(..., classes=1)` or
            `MLP(..., out_channels=1)`.

    Raises:
        TypeError: the network cannot be called.
    """

    def __init__(self, network: nn.Module | Network):
        super().__init__()
        check_instance("network", network, "__call__")
        self.network = network

    def forward(
        self, inputs: Sequence[Tensor], path: AnglePath, x_t: Tensor, t: Tensor, cond: Condition = None
    ) -> Tensor:
        """Return the logits (B,) of inputs = [y_s], (B, *), given x_t (B, *) at t (B,)."""
        both = torch.cat([*inputs, x_t / broadcast(path.size(t), x_t)], dim=1)
        output = call_network(self.network, both, path.fraction(t), expand(cond, len(both)))
        return output.flatten(1).mean(dim=1)


@checked
class PatchDiscriminator(nn.Module, Configured):
    """The logit of an image (B, C, H, W): the mean over the logits of overlapping patches (1611.07004, section 3.2.2).

    Each layer halves the resolution and doubles the channels. Three layers read patches of 22 x 22 pixels.

    Args:
        channels: channels of the images.
        width: channels after the first layer.
        layers: number of layers.
    """

    def __init__(self, channels: Count = 3, width: Count = 32, layers: Count = 3):
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(layers):
            entering = channels if i == 0 else width << (i - 1)
            norm = [group_norm(width << i)] if i else []
            parts += [nn.Conv2d(entering, width << i, 4, stride=2, padding=1), *norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(width << (layers - 1), 1, 1))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits (B,) of the images inputs = [x], (B, C, H, W)."""
        return self.layers(inputs[0]).flatten(1).mean(dim=1)


class FeatureHead(nn.Module):
    """Logits of features (B, positions, channels) at each position, from two layers and an embedding of the level."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(channels), linear(channels, width)
        self.outer = linear(width, 1, scale=0.0)

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """Return the mean logit (B,); level is (B, width)."""
        hidden = F.silu(self.inner(self.norm(cast_for(self.inner, features))) + level[:, None])
        return self.outer(hidden).flatten(1).mean(dim=1)


@checked
class FeatureDiscriminator(nn.Module, Configured):
    """The logit of a noisy state x_u from its features in a trained score network with fixed weights.

    Each chosen block of the network has a head (`FeatureHead`); the logit is the mean over the heads.

    Args:
        teacher: a score model whose network is a module; its weights stay fixed, and are not among the parameters of
            this module. A guided model evaluates its network several times; the features are those of the last time.
        shape: shape `*` of one state.
        blocks: names of the modules in `teacher.network` whose outputs are the features, (B, C, *positions); default:
            those named block0, layer0, ..., except on the way up of a U-Net.
        width: number of features of the heads.
        channels_last: whether the outputs are (B, *positions, C) with C last, as those of `DiT`.

    Raises:
        TypeError: the teacher has no `predict`, or no module as `network`.
        ValueError: a name is not that of a module, there is no block, or the network does not call a block or gets no
            tensor (B, C, *) from it.
    """

    def __init__(
        self,
        teacher: Any,
        shape: Sequence[int],
        blocks: Sequence[str] = (),
        width: EvenCount = 64,
        channels_last: bool = False,
    ):
        super().__init__()
        check_instance("teacher", teacher, "predict")
        network = getattr(teacher, "network", None)
        if not isinstance(network, nn.Module):
            raise TypeError(f"the teacher must have a torch.nn.Module as `network`; got {type(teacher).__name__}")
        known = [name for name, _ in network.named_modules() if name]
        self.blocks = list(blocks) or [name for name in known if BLOCK.fullmatch(name)]
        if unknown := [name for name in self.blocks if name not in known]:
            raise ValueError(f"blocks must be names of modules of the teacher's network; got {unknown[0]!r}")
        if not self.blocks:
            fix = f"choose some of {', '.join(known)}" if known else "take a teacher whose network has submodules"
            raise ValueError(f"blocks must be names of modules of the teacher's network; got none: {fix}")
        self._teacher, self.channels_last = (teacher,), channels_last  # a tuple: no part of this module
        parameter = next(network.parameters(), torch.empty(0))
        with torch.no_grad():
            blank = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
            features = self._features(teacher, blank, float64(teacher.sde.t_max))
        self.level = TimeEmbedding(PositionalEmbedding(width), width, width)
        self.heads = nn.ModuleList([FeatureHead(part.shape[2], width) for part in features])

    def check_path(self, model: Any) -> None:
        """Raise ValueError unless the teacher has the SDE of the model."""
        check_same_path(self._teacher[0], model)

    def inputs(self, x: Tensor, u: Tensor, cond: Condition = None) -> list[Tensor]:
        """Return the features of x (B, *) at u (B,), differentiable in x: (B, positions, channels) of each block."""
        (teacher,) = self._teacher
        teacher = for_inference(teacher, cond).to(x.device)
        with frozen(teacher):
            return self._features(teacher, x, u)

    def _features(self, teacher: BaseModel, x: Tensor, u: Tensor) -> list[Tensor]:
        network: Any = teacher.network
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
                if isinstance(output, Tensor) and output.ndim > 1:
                    seen[name] = output.movedim(-1, 1) if self.channels_last else output

            return hook

        with ExitStack() as hooks:
            for name in self.blocks:
                handle = network.get_submodule(name).register_forward_hook(keep(name))
                hooks.callback(handle.remove)
            teacher.predict(x, u)
        if missing := [name for name in self.blocks if name not in seen]:
            raise ValueError(
                f"blocks must be modules that the network calls and that return tensors (B, C, *); got {missing[0]!r}: "
                "choose others"
            )
        return [seen[name].reshape(*seen[name].shape[:2], -1).transpose(1, 2) for name in self.blocks]

    def forward(self, inputs: Sequence[Tensor], label: Tensor) -> Tensor:
        """Return the logits (B,) of the features `inputs`; label: the level u as a number in [0, 1], (B,)."""
        level = self.level(label.to(inputs[0].device), {})
        logits = [head(part, level) for head, part in zip(self.heads, inputs, strict=True)]
        return torch.stack(logits).mean(dim=0)
