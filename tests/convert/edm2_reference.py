"""The equations of EDM2's network (2312.02696, figure 21 and appendix B.5), on its state dict, in float64.

A second implementation. It checks the settings without stored outputs; the stored outputs check it.
"""

import numpy as np
import torch
from torch.nn import functional as F

DEFAULTS = {
    "label_dim": 0,
    "sigma_data": 0.5,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "channels_per_head": 64,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
    "resample_filter": [1, 1],
    "logvar_channels": 128,
}


def shapes(img_resolution, img_channels, **kwargs):
    """{name: shape} of the state dict of Precond."""
    k = {**DEFAULTS, **kwargs}
    widths = [k["model_channels"] * factor for factor in k["channel_mult"]]
    noise = k["model_channels"] * k["channel_mult_noise"] if k["channel_mult_noise"] else widths[0]
    emb = k["model_channels"] * k["channel_mult_emb"] if k["channel_mult_emb"] else max(widths)
    table = {"out_gain": (), "emb_fourier.freqs": (noise,), "emb_fourier.phases": (noise,)}
    table["emb_noise.weight"] = (emb, noise)
    if k["label_dim"]:
        table["emb_label.weight"] = (emb, k["label_dim"])

    def block(name, before, after, flavour, attends=False):
        table[f"{name}.emb_gain"] = ()
        table[f"{name}.conv_res0.weight"] = (after, after if flavour == "enc" else before, 3, 3)
        table[f"{name}.emb_linear.weight"] = (after, emb)
        table[f"{name}.conv_res1.weight"] = (after, after, 3, 3)
        if before != after:
            table[f"{name}.conv_skip.weight"] = (after, before, 1, 1)
        if attends and after >= k["channels_per_head"]:
            table[f"{name}.attn_qkv.weight"] = (3 * after, after, 1, 1)
            table[f"{name}.attn_proj.weight"] = (after, after, 1, 1)

    skips, current = [widths[0]], widths[0]
    table[f"enc.{img_resolution}x{img_resolution}_conv.weight"] = (current, img_channels + 1, 3, 3)
    for level, width in enumerate(widths):
        side = img_resolution // 2**level
        if level:
            block(f"enc.{side}x{side}_down", current, current, "enc")
            skips.append(current)
        for j in range(k["num_blocks"]):
            block(f"enc.{side}x{side}_block{j}", current, width, "enc", side in k["attn_resolutions"])
            current = width
            skips.append(current)
    for level in reversed(range(len(widths))):
        side, width = img_resolution // 2**level, widths[level]
        if level == len(widths) - 1:
            block(f"dec.{side}x{side}_in0", current, current, "dec", True)
            block(f"dec.{side}x{side}_in1", current, current, "dec")
        else:
            block(f"dec.{side}x{side}_up", current, current, "dec")
        for j in range(k["num_blocks"] + 1):
            block(f"dec.{side}x{side}_block{j}", current + skips.pop(), width, "dec", side in k["attn_resolutions"])
            current = width
    table["out_conv.weight"] = (img_channels, current, 3, 3)
    table = {f"unet.{name}": shape for name, shape in table.items()}
    n = k["logvar_channels"]
    return {**table, "logvar_fourier.freqs": (n,), "logvar_fourier.phases": (n,), "logvar_linear.weight": (1, n)}


def random_state(**kwargs):
    """A state dict with gains of 0.6 and rows of any magnitude."""
    state = {}
    for i, (name, shape) in enumerate(shapes(**kwargs).items()):
        value = np.random.RandomState(i).standard_normal(shape)
        value = np.full(shape, 0.6) if name.endswith("gain") else (1 + i % 3) * value
        state[name] = torch.from_numpy(np.asarray(value)).float()
    return state


def unit(x, dim, eps=1e-4):
    """x with root mean square 1 over dim."""
    return x / (eps + x.square().mean(dim=dim, keepdim=True).sqrt())


def lerp(a, b, weight):
    return (a * (1 - weight) + b * weight) / np.sqrt(weight**2 + (1 - weight) ** 2)


def layer(state, name, x, gain=1.0):
    weight = state[f"{name}.weight"].double()
    weight = unit(weight.flatten(1), 1).reshape(weight.shape) * gain / np.sqrt(weight[0].numel())
    return x @ weight.T if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def fourier(state, name, x):
    return np.sqrt(2) * torch.cos(x[:, None] * state[f"{name}.freqs"].double() + state[f"{name}.phases"].double())


def activate(x):
    return x * torch.sigmoid(x) / 0.596


def resampled(x, taps, mode):
    """Every second value of the filtered image, or the filtered image with zeros between the values."""
    taps = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    pad = (len(taps) - 1) // 2
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=pad, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=x.shape[1])


def apply_block(state, name, x, emb, k):
    for mode in ("down", "up"):
        x = resampled(x, k["resample_filter"], mode) if name.endswith(mode) else x
    skip, is_down = f"{name}.conv_skip", ".enc." in name
    if is_down:
        x = unit(layer(state, skip, x) if f"{skip}.weight" in state else x, 1)
    scale = 1 + layer(state, f"{name}.emb_linear", emb, state[f"{name}.emb_gain"].double())
    y = activate(layer(state, f"{name}.conv_res0", activate(x)) * scale[:, :, None, None])
    if not is_down and f"{skip}.weight" in state:
        x = layer(state, skip, x)
    x = lerp(x, layer(state, f"{name}.conv_res1", y), k["res_balance"])
    if f"{name}.attn_qkv.weight" in state:
        batch, channels, *space = x.shape
        heads = channels // k["channels_per_head"]
        parts = layer(state, f"{name}.attn_qkv", x).reshape(batch, heads, channels // heads, 3, -1)
        query, key, value = unit(parts, 2).unbind(3)
        weight = torch.softmax(query.transpose(2, 3) @ key / np.sqrt(channels // heads), dim=3)
        mixed = (value @ weight.transpose(2, 3)).reshape(batch, channels, *space)
        x = lerp(x, layer(state, f"{name}.attn_proj", mixed), k["attn_balance"])
    return x if k["clip_act"] is None else x.clamp(-k["clip_act"], k["clip_act"])


def evaluate(state, x, sigma, labels, **kwargs):
    """D(x, sigma) and u(sigma) for one-hot labels, in float64."""
    k = {**DEFAULTS, **kwargs}
    x, sigma = x.double(), sigma.double()
    total, c_noise = (sigma**2 + k["sigma_data"] ** 2)[:, None, None, None], sigma.log() / 4
    emb = layer(state, "unet.emb_noise", fourier(state, "unet.emb_fourier", c_noise))
    if k["label_dim"]:
        scaled = labels.double() * np.sqrt(k["label_dim"])
        emb = lerp(emb, layer(state, "unet.emb_label", scaled), k["label_balance"])
    emb = activate(emb)
    names = list(
        dict.fromkeys(".".join(name.split(".")[:3]) for name in state if name.startswith(("unet.enc", "unet.dec")))
    )
    hidden, skips = x / total.sqrt(), []
    for name in names:
        if name.endswith("_conv"):
            hidden = layer(state, name, torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1))
        else:
            if ".dec." in name and "block" in name:
                skip, t = skips.pop(), k["concat_balance"]
                widths = hidden.shape[1], skip.shape[1]
                size = np.sqrt(sum(widths) / ((1 - t) ** 2 + t**2))
                halves = hidden * (1 - t) * size / np.sqrt(widths[0]), skip * t * size / np.sqrt(widths[1])
                hidden = torch.cat(halves, dim=1)
            hidden = apply_block(state, name, hidden, emb, k)
        if ".enc." in name:
            skips.append(hidden)
    output = layer(state, "unet.out_conv", hidden, state["unet.out_gain"].double())
    s = sigma[:, None, None, None]
    denoised = k["sigma_data"] ** 2 / total * x + s * k["sigma_data"] / total.sqrt() * output
    return denoised, layer(state, "logvar_linear", fourier(state, "logvar_fourier", c_noise)).squeeze(1)
