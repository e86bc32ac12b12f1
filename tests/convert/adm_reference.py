"""The networks of guided-diffusion and improved-diffusion from their published equations, as functions of the weights.

2105.05233 (sections 3 and 4.1, appendix) and 2102.09672. Written for these tests on `torch.nn.functional` alone; the
files in `tests/data/adm`, which the original code wrote, check it. Every weight is fetched by its name and shape, so
that the same pass through the network also makes random weights.
"""

import math

import torch
from torch.nn import functional as F

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "num_classes": None,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "pool": None,
}


class Weights(dict):
    """A state dict; with a generator, a weight that is missing is drawn."""

    generator = None

    def named(self, name, *shape):
        if name not in self and self.generator is not None:
            value = torch.randn(shape, generator=self.generator)
            if name.endswith("bias"):
                value = 0.1 * value
            elif len(shape) == 1:
                value = 1 + 0.1 * value
            elif "embedding" not in name and "label_emb" not in name:
                value = value / math.sqrt(math.prod(shape[1:]))
            self[name] = value
        assert tuple(self[name].shape) == shape, name
        return self[name]

    def pair(self, name, *shape):
        return self.named(f"{name}.weight", *shape), self.named(f"{name}.bias", shape[0])

    def linear(self, name, x, out):
        weight, bias = self.pair(name, out, x.shape[1])
        return F.linear(x, weight.to(x), bias.to(x))

    def conv(self, name, x, out, kernel=3, stride=1):
        weight, bias = self.pair(name, out, x.shape[1], *[kernel] * (x.ndim - 2))
        convolve = F.conv1d if x.ndim == 3 else F.conv2d
        return convolve(x, weight.to(x), bias.to(x), stride=stride, padding=kernel // 2)

    def norm(self, name, x):
        weight, bias = self.pair(name, x.shape[1])
        return F.group_norm(x, 32, weight.to(x), bias.to(x), 1e-5)


def resized(x, direction):
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


def attended(qkv, heads, new_order):
    """Attention (B, C, positions) of stacked queries, keys and values (B, 3 C, positions)."""
    b, triple, n = qkv.shape
    width = triple // 3 // heads
    if new_order:
        q, k, v = (part.reshape(b * heads, width, n) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(b * heads, 3 * width, n).split(width, dim=1)
    weights = (torch.einsum("bct,bcs->bts", q, k) / math.sqrt(width)).softmax(dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(b, -1, n)


class Network:
    """A network with the arguments of the original constructor; `network(x, t, y)` evaluates it in the dtype of x."""

    def __init__(self, weights, **settings):
        self.w, self.s = weights, {**DEFAULTS, **settings}

    def heads(self, channels, way):
        if self.s["num_head_channels"] != -1:
            return channels // self.s["num_head_channels"]
        up = self.s["num_heads_upsample"]
        return up if way == "up" and up != -1 else self.s["num_heads"]

    def residual(self, name, x, emb, out, direction=None):
        w, h = self.w, F.silu(self.w.norm(f"{name}.in_layers.0", x))
        if direction:
            h, x = resized(h, direction), resized(x, direction)
        h = w.conv(f"{name}.in_layers.2", h, out)
        scale_shift = self.s["use_scale_shift_norm"]
        e = w.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * out if scale_shift else out)[:, :, None, None]
        if scale_shift:
            h = w.norm(f"{name}.out_layers.0", h) * (1 + e[:, :out]) + e[:, out:]
        else:
            h = w.norm(f"{name}.out_layers.0", h + e)
        h = w.conv(f"{name}.out_layers.3", F.silu(h), out)
        return h + (x if x.shape[1] == out else w.conv(f"{name}.skip_connection", x, out, kernel=1))

    def attention(self, name, x, way="down"):
        flat = x.flatten(2)
        qkv = self.w.conv(f"{name}.qkv", self.w.norm(f"{name}.norm", flat), 3 * x.shape[1], kernel=1)
        mixed = attended(qkv, self.heads(x.shape[1], way), self.s["use_new_attention_order"])
        return (flat + self.w.conv(f"{name}.proj_out", mixed, x.shape[1], kernel=1)).reshape(x.shape)

    def resample(self, name, x, emb, direction):
        if self.s["resblock_updown"]:
            return self.residual(name, x, emb, x.shape[1], direction)
        if not self.s["conv_resample"]:
            return resized(x, direction)
        if direction == "down":
            return self.w.conv(f"{name}.op", x, x.shape[1], stride=2)
        return self.w.conv(f"{name}.conv", resized(x, "up"), x.shape[1])

    def embedding(self, t, y, dtype):
        base, half = self.s["model_channels"], self.s["model_channels"] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        phase = t.to(dtype)[:, None] * frequencies.to(dtype)
        emb = self.w.linear("time_embed.0", torch.cat([phase.cos(), phase.sin()], dim=1), 4 * base)
        emb = self.w.linear("time_embed.2", F.silu(emb), 4 * base)
        if self.s["num_classes"] is None:
            return emb
        return emb + self.w.named("label_emb.weight", self.s["num_classes"], 4 * base)[y].to(dtype)

    def __call__(self, x, t, y=None):
        s, w = self.s, self.w
        emb, widths = self.embedding(t, y, x.dtype), [int(m * s["model_channels"]) for m in s["channel_mult"]]
        h, n, factor = w.conv("input_blocks.0.0", x, widths[0]), 1, 1
        outputs = [h]
        for level, width in enumerate(widths):
            for _ in range(s["num_res_blocks"]):
                h = self.residual(f"input_blocks.{n}.0", h, emb, width)
                if factor in s["attention_resolutions"]:
                    h = self.attention(f"input_blocks.{n}.1", h)
                outputs.append(h)
                n += 1
            if level < len(widths) - 1:
                h = self.resample(f"input_blocks.{n}.0", h, emb, "down")
                outputs.append(h)
                n, factor = n + 1, 2 * factor
        h = self.residual("middle_block.0", h, emb, widths[-1])
        h = self.residual("middle_block.2", self.attention("middle_block.1", h), emb, widths[-1])
        return self.pooled(h, outputs) if s["pool"] else self.decoded(h, outputs, emb, widths, factor)

    def decoded(self, h, outputs, emb, widths, factor):
        n = 0
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.s["num_res_blocks"] + 1):
                h, part = self.residual(f"output_blocks.{n}.0", torch.cat([h, outputs.pop()], dim=1), emb, width), 1
                if factor in self.s["attention_resolutions"]:
                    h, part = self.attention(f"output_blocks.{n}.1", h, "up"), 2
                if level and i == self.s["num_res_blocks"]:
                    h, factor = self.resample(f"output_blocks.{n}.{part}", h, emb, "up"), factor // 2
                n += 1
        return self.w.conv("out.2", F.silu(self.w.norm("out.0", h)), self.s["out_channels"])

    def pooled(self, h, outputs):
        w, pool, k = self.w, self.s["pool"], self.s["out_channels"]
        if pool == "attention":
            flat = F.silu(w.norm("out.0", h)).flatten(2)
            flat = torch.cat([flat.mean(dim=2, keepdim=True), flat], dim=2)
            flat = flat + w.named("out.2.positional_embedding", *flat.shape[1:]).to(flat)
            qkv = w.conv("out.2.qkv_proj", flat, 3 * flat.shape[1], kernel=1)
            mixed = attended(qkv, self.heads(flat.shape[1], "down"), new_order=True)
            return w.conv("out.2.c_proj", mixed, k, kernel=1)[:, :, 0]
        if pool == "adaptive":
            mean = F.silu(w.norm("out.0", h)).mean(dim=(2, 3), keepdim=True)
            return w.conv("out.3", mean, k, kernel=1).flatten(1)
        means = torch.cat([part.mean(dim=(2, 3)) for part in [*outputs, h]], dim=1)
        hidden = w.linear("out.0", means, 2048)
        if pool == "spatial":
            return w.linear("out.2", F.relu(hidden), k)
        return w.linear("out.3", F.silu(w.norm("out.1", hidden)), k)


def drawn(seed=0, **settings):
    """A state dict of random weights for these arguments of the constructor."""
    weights = Weights()
    weights.generator = torch.Generator().manual_seed(seed)
    side, channels = settings["image_size"], settings.get("in_channels", 3)
    arguments = torch.zeros(1, channels, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    Network(weights, **settings)(*arguments)
    return dict(weights)
