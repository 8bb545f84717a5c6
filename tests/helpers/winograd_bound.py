"""Winograd's algorithm written out in float64, and a bound of the rounding error of one in float32, bfloat16 or bytes."""

import numpy as np
import torch
from torch.nn.functional import conv2d, pad

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def matrices(tile):
    """A^T, G, B^T of F(tile x tile, 3x3) by Toom and Cook, in float64, with the denominators of Lagrange's formula in G."""
    points = {2: (0, 1, -1), 4: (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}[tile]
    a = [[p**i for p in points] + [float(i == tile - 1)] for i in range(tile)]
    g = [[p**i / np.prod([p - q for q in points if q != p]) for i in range(3)] for p in points] + [[0, 0, 1]]
    polynomials = [np.poly([q for q in points if q != p])[::-1] for p in points] + [np.poly(points)[::-1]]
    b = [[*polynomial, *[0] * (tile + 2 - len(polynomial))] for polynomial in polynomials]
    return tuple(torch.tensor(np.array(m, dtype=float)) for m in (a, g, b))


def tiles(z, tile, padding):
    """[N, C, tiles down, tiles across, tile + 2, tile + 2], zeros beyond the edges."""
    sides = [side + 2 * padding - 2 for side in z.shape[2:]]
    down, across = (-side % tile for side in sides)
    z = pad(z, (padding, padding + across, padding, padding + down))
    return z.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)


def transformed(z, weight, tile, padding, magnitude=lambda a: a):
    """A^T [sum over channels of (G w G^T) (B^T z B)] A in float64, of the magnitudes where ``magnitude`` is abs."""
    a, g, b = matrices(tile)
    u = magnitude(torch.einsum("pi,ocij,qj->ocpq", g, weight, g))
    a, b, z = magnitude(a), magnitude(b), magnitude(z)
    v = torch.einsum("pi,nctsij,qj->nctspq", b, tiles(z, tile, padding), b)
    y = torch.einsum("ip,notspq,jq->notsij", a, torch.einsum("nctspq,ocpq->notspq", v, u), a)
    y = y.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return y[:, :, : z.shape[2] + 2 * padding - 2, : z.shape[3] + 2 * padding - 2]


def bound(z, weight, tile, padding, dtype, products=torch.float32, *added):
    """Largest possible error of each output, for an exact z.

    Written out, an output is a sum of terms a * u * b * z. Computed, each term carries one factor (1 + d), |d| <= u = 2^-24, for every
    rounding on its way: at most 4 in each pass of the input transform (a product and a sum, twice; with FMA half of it), 1 for the weight,
    one product and C sums over channels, at most 5 in each pass of the output transform, 2 for bias and residual: n = C + 22. So the error
    is at most gamma_n = n u / (1 - n u) times the same sum over magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, lemma
    3.1). Products of bfloat16 round both factors once more, by 2^-8 each, and their hardware rounds a pair's two products one by one. Then
    the result is rounded to its dtype.
    """
    n = weight.shape[1] + 22
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    if products == torch.bfloat16:
        gamma = (1 + gamma) * (1 + 2.0**-8) ** 2 - 1
    size = transformed(z.double(), weight.double(), tile, padding, torch.abs) + sum(a.double().abs() for a in added)
    exact = conv2d(z.double(), weight.double(), padding=padding).abs() + sum(a.double().abs() for a in added)
    rounding = UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0.0  # in float32 the last rounding is among the n
    return gamma * size * (1 + rounding) + rounding * exact + 1e-37


def filters_bound(weight, tile):
    """Largest possible error of a transformed weight [..., 3, 3]: each of its terms G w G^T carries at most 2 roundings of G's values, 2
    products and 4 sums, those of float32."""
    g = matrices(tile)[1].abs()
    return 8 * 2.0**-24 / (1 - 8 * 2.0**-24) * torch.einsum("pi,ocij,qj->ocpq", g, weight.double().abs(), g) + 1e-37


def weight_gradient(z, g, tile, padding, magnitude=lambda a: a):
    """The weight's gradient, G^T [sum over tiles of (A g A^T) (B^T z B)] G in float64, of the magnitudes where ``magnitude`` is abs."""
    a, filters, b = (magnitude(m) for m in matrices(tile))
    down, across = (-side % tile for side in g.shape[2:])
    g = pad(magnitude(g.double()), (0, across, 0, down)).unfold(2, tile, tile).unfold(3, tile, tile)
    v = torch.einsum("pi,nctsij,qj->nctspq", b, tiles(magnitude(z.double()), tile, padding), b)
    sums = torch.einsum("nctspq,notspq->ocpq", v, torch.einsum("ip,notsij,jq->notspq", a, g, a))
    return torch.einsum("pi,ocpq,qj->ocij", filters, sums, filters)


def weight_gradient_bound(z, g, tile, padding):
    """Largest possible error of each value of `weight_gradient` in float32, for an exact z.

    As in `bound`: a term carries at most 4 roundings in each of the two passes over z and over g, one product and as many sums as there are
    tiles, and in each pass back one of G's values, a product and 4 sums.
    """
    n = 29 + len(z) * -(-g.shape[2] // tile) * -(-g.shape[3] // tile)
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    return gamma * weight_gradient(z, g, tile, padding, torch.abs) + 1e-37


def of_bytes(z, narrow, products, units, tile, padding):
    """(A^T M A in float64, the largest possible error of a float32 computation of it), M being integer products times their steps.

    narrow [positions, outputs, C], products [positions, outputs], units: as in `rse_fast.kernels.cpu.winograd`. Sums of bytes are exact.
    A transformed value carries at most 8 roundings in the transform and 3 up to its byte: where that reaches a tie, the byte may be
    the next one, which costs its weights once. An output carries at most 2 roundings per product and 10 in the output transform.
    """
    (a, _, b), side, (_, outputs, channels) = matrices(tile), tile + 2, narrow.shape
    pairs, factors = units[: 2 * side * side].double().view(side, side, 2), units[2 * side * side :][:channels].double()
    pick = "pi,nctsij,qj->ntspqc"
    scale, zero = pairs[..., :1] * factors, pairs[..., 1:]
    value = torch.einsum(pick, b, tiles(z.double(), tile, padding), b) * scale + zero
    slack = 11 * 2.0**-24 * (torch.einsum(pick, b.abs(), tiles(z.double(), tile, padding).abs(), b.abs()) * scale.abs() + zero)
    tie = ((value - value.floor() - 0.5).abs() <= slack) & (value > -1) & (value < 256)
    weight = narrow.double().view(side, side, outputs, channels) * products.double().view(side, side, outputs, 1)

    def back(t, w, a):
        y = torch.einsum("ip,ntspqc,pqoc,jq->notisj", a, t, w, a).flatten(4, 5).flatten(2, 3)
        return y[:, :, : z.shape[2] + 2 * padding - 2, : z.shape[3] + 2 * padding - 2]

    bytes_ = value.round().clamp(0, 255) - zero
    limit = back(tie.double(), weight.abs(), a.abs()) + 12 * 2.0**-24 * back(bytes_.abs(), weight.abs(), a.abs())
    return back(bytes_, weight, a), limit + 1e-37
