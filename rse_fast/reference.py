"""The noise contract in plain numpy, and plain-torch forms of every op.

Everything here is written to be read, not to be fast: it is what the kernels are tested against and, because the torch forms run
on any device, what `ops` falls back on where no kernel exists.

eps is a pure function ``eps(seed, stream, draw, image, position)``. One Philox4x32-10 call (Salmon et al., SC 2011) with
key = (seed low, seed high) and counter = (quad, image, draw, stream) gives the four normals of four neighbouring channels:
``quad = s * ceil(C / 4) + c // 4`` and lane = ``c % 4``, where ``s`` is the row-major index over the spatial dimensions.
"""

import numpy as np
import torch

from rse_fast.layout import packed_like

__all__ = [
    "activate", "add_noise", "add_noise_u8", "gaussian", "narrow", "noisy_conv", "noisy_linear", "normal", "philox", "sigma_grad",
    "uniforms",
]  # fmt: skip

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox4x32 multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key: golden ratio, sqrt(3) - 1
_LOW = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------------- numpy, float64
def philox(counter: np.ndarray, key: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Philox4x32: uint32 counter ``[..., 4]`` and key ``[..., 2]`` (broadcast against each other) to uint32 words ``[..., 4]``."""
    counter, key = np.asarray(counter, np.uint64), np.asarray(key, np.uint64)
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(rounds):
        p0, p1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)  # 32 x 32 -> 64 bits, exact
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_W0)) & _LOW, (k1 + np.uint64(_W1)) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)


def uniforms(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The float32 uniforms of uint32 words ``[..., 4]``: radius ``u`` in (0, 1] and angle ``v`` in [-1, 1], each ``[..., 2]``.

    ``u = fl(fl(w) * 2^-32 + 2^-33)`` from words 0 and 2, ``v = fl(int32(w)) * 2^-31`` from words 1 and 3; fl rounds to nearest even.
    """
    u = words[..., 0::2].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    v = words[..., 1::2].view(np.int32).astype(np.float32) * np.float32(2.0**-31)
    return u, v


def gaussian(seed, stream, images, draws, channels, spatial, image_offset=0, draw_offset=0) -> np.ndarray:
    """eps as float64 ``[draws * images, spatial, channels]``.

    Row ``d * images + i`` is draw ``draw_offset + d`` of image ``image_offset + i``. ``seed`` is taken modulo 2^64; ``stream``,
    ``image_offset + images`` and ``draw_offset + draws`` must fit 32 bits. Box-Muller in float64 from the float32 uniforms.
    """
    seed = int(seed) % 2**64
    groups = -(-channels // 4)
    counter = np.empty((draws, images, spatial * groups, 4), np.uint32)
    counter[..., 0] = np.arange(spatial * groups, dtype=np.uint32)
    counter[..., 1] = (image_offset + np.arange(images, dtype=np.uint64)).astype(np.uint32)[:, None]
    counter[..., 2] = (draw_offset + np.arange(draws, dtype=np.uint64)).astype(np.uint32)[:, None, None]
    counter[..., 3] = stream
    u, v = uniforms(philox(counter, np.array([seed & _LOW, seed >> 32], np.uint32)))
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    angle = np.pi * v.astype(np.float64)
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)  # [draws, images, quads, 2, 2], lanes in order
    return z.reshape(draws * images, spatial, groups * 4)[..., :channels]


# ------------------------------------------------------------------------------------------------------------- torch, any device
def _philox(counter, key):
    """`philox` on int64 tensors that hold 32-bit words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _M0), _product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _product(word, factor):
    """The high and the low 32 bits of a product of 32-bit numbers. No step leaves 63 bits: code that a compiler generates from this takes
    for granted that signed numbers never wrap around."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _box_muller(w0, w1, real):
    u = w0.to(torch.float32) * 2.0**-32 + 2.0**-33
    v = (w1 - ((w1 >> 31) << 32)).to(torch.float32) * 2.0**-31
    if u.device.type != "mps":  # which has no float64
        u, v = u.to(real), v.to(real)
    quarter = torch.round(2 * v)  # exact reduction first: pi is not a float, v - quarter / 2 is
    angle = torch.pi * (v - quarter / 2)
    sin, cos = torch.sin(angle), torch.cos(angle)
    odd = quarter.remainder(2) == 1
    c = torch.where(odd, -sin, cos) * torch.where((quarter.abs() == 2) | (quarter == -1), -1.0, 1.0)
    s = torch.where(odd, cos, sin) * torch.where((quarter.abs() == 2) | (quarter == -1), -1.0, 1.0)
    radius = torch.sqrt((-2 * torch.log(u)).clamp_min(0))
    return radius * c, radius * s


def normal(
    seed, stream, images, draws, channels, spatial, image_offset=0, draw_offset=0, sample_ids=None, real=torch.float64
) -> torch.Tensor:
    """`gaussian` as torch ops on the device of ``seed`` (int64, 0-dim): ``[draws * images, spatial, channels]`` of dtype ``real``.

    ``sample_ids`` int64 [images, 2] gives each image its own (image, draw_offset) instead of ``(image_offset + i, draw_offset)``.
    float64 keeps the 1e-6 of the contract; float32 is within 2e-6.
    """
    groups = -(-channels // 4)
    count = lambda n: torch.arange(n, device=seed.device)  # noqa: E731
    image, draw = (image_offset + count(images), draw_offset) if sample_ids is None else sample_ids.unbind(1)
    counter = (
        count(spatial * groups),
        image[:, None],
        count(draws)[:, None, None] + (draw if sample_ids is None else draw[:, None]),
        torch.full_like(seed, stream),
    )
    words = _philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    z = torch.stack([*_box_muller(words[0], words[1], real), *_box_muller(words[2], words[3], real)], -1)
    return z.reshape(draws * images, spatial, groups * 4)[..., :channels]


def _noise_like(x, rows, seed, stream, images, draws, image_offset, draw_offset, sample_ids):
    """eps for ``x`` [*, C, *spatial] as float64 [rows, C, *spatial]."""
    eps = normal(seed, stream, images, draws, x.shape[1], x[0, 0].numel() if x.shape[0] else 0, image_offset, draw_offset, sample_ids)
    return eps.movedim(-1, 1).reshape(rows, *x.shape[1:])


def _per_channel(p, x):
    return p.reshape(-1, *[1] * (x.dim() - 2)) if p.dim() else p


def activate(x, scale, shift, relu, pool=False) -> torch.Tensor:
    """``relu(x * scale + shift)`` in float32 (float64 for float64 input); with ``pool`` the largest of each 2x2 window of it."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(real)
    if scale is not None:
        y = y * _per_channel(scale.to(real), x)
    if shift is not None:
        y = y + _per_channel(shift.to(real), x)
    if relu:
        y = y.relu()
    return torch.nn.functional.max_pool2d(y, 2) if pool else y


def add_noise(x, sigma, seed, stream, images, draws, image_offset=0, draw_offset=0, sample_ids=None, scale=None, shift=None, relu=False):
    """``relu(x * scale + shift) + sigma * eps``, computed in float32 (float64 for float64 input) and rounded once to x's dtype.

    x: [images or draws * images, C, *spatial]; sigma: float32 0-dim or [C]; scale, shift: float32 [C] or None; seed: int64 0-dim.
    Returns [draws * images, C, *spatial].
    """
    rows = images * draws
    y = activate(x, scale, shift, relu)
    out = packed_like(x, rows)
    if not out.numel():
        return out
    if x.shape[0] != rows:
        y = y.unsqueeze(0).expand(draws, *y.shape).reshape(rows, *x.shape[1:])
    eps = _noise_like(x, rows, seed, stream, images, draws, image_offset, draw_offset, sample_ids).to(y.dtype)
    return out.copy_(y + _per_channel(sigma.to(y.dtype), x) * eps)


def add_noise_u8(
    x, step, zero_point, sigma, seed, stream, images, draws, image_offset=0, draw_offset=0, sample_ids=None, scale=None, shift=None,
    relu=False, pool=False,
):  # fmt: skip
    """``saturate(zero_point + rint((relu(x * scale + shift) + sigma * eps) / step))`` as uint8, computed in float64; NaN gives 0.

    x: as in `add_noise`, or uint8 or int32; rint to nearest even. pool: the largest of each 2x2 window takes the place of relu(...).
    """
    value = activate(x.double(), scale, shift, relu, pool)
    value = add_noise(value, sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    return (value / step).round_().add_(zero_point).clamp_(0, 255).nan_to_num_(0).to(torch.uint8)


def narrow(y, dtype) -> torch.Tensor:
    """``y`` rounded to nearest even to ``dtype``; int8 and fp8 saturate."""
    if dtype == torch.int8:
        return y.round().clamp(-128, 127).to(dtype)
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        y = y.clamp(-limit, limit)
    return y.to(dtype)


def noisy_conv(
    x, weight, bias, sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids, stride, padding, dilation, groups
):
    """Convolution (1, 2 or 3 spatial dimensions) of ``x + sigma * eps``; the padding carries no noise."""
    y = add_noise(x, sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    return torch.convolution(y, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def noisy_linear(x, weight, bias, sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids=None):
    """``(x + sigma * eps) @ weight.T + bias`` with the features of ``x`` [rows, *, in_features] as channels."""
    y = add_noise(x.movedim(-1, 1), sigma, seed, stream, images, draws, image_offset, draw_offset, sample_ids).movedim(1, -1)
    return torch.nn.functional.linear(y, weight, bias)


def sigma_grad(g, seed, stream, images, draws, image_offset, draw_offset, sample_ids, per_channel) -> torch.Tensor:
    """``sum(g * eps)`` over everything, or per channel: float64 for float64 ``g`` [draws * images, C, *spatial], else float32."""
    real = torch.float64 if g.dtype == torch.float64 else torch.float32
    if not g.numel():
        return g.new_zeros((g.shape[1],) if per_channel else (), dtype=real)
    product = g.double() * _noise_like(g, g.shape[0], seed, stream, images, draws, image_offset, draw_offset, sample_ids)
    return (product.movedim(1, 0).flatten(1).sum(1) if per_channel else product.sum()).to(real)
