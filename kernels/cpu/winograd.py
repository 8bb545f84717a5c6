"""3x3 convolutions on the CPU by Winograd's minimal filtering, which make the noise in their input transform: weights, and the launcher of the C++ kernel."""

import ctypes

import torch

from .loader import load

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
COLUMNS = 32  # outputs that are computed at a time; kColumns of winograd.h

_pointer, _i32, _i64, _u32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
_SIGNATURE = (
    *[_pointer] * 3, _i32, *[_i64] * 8, _i32, _pointer, *[_u32] * 3, _pointer, _pointer, _i64, _pointer, _pointer, _i32, _pointer, _i32,
    *[_i64] * 3, _pointer, _pointer, _i32, _i64, _i32,
)  # fmt: skip

# Points at which F(m x m, 3x3) evaluates polynomials, beside infinity: those of winograd.cpp.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.5, -1.5)}


def filter_matrix(tile: int) -> torch.Tensor:
    """G [tile + 2, 3] in float64: a 3x3 filter g becomes ``G g G^T``."""
    points = _POINTS[tile]
    rows = []
    for p in points:
        rest = torch.tensor([p - q for q in points if q != p], dtype=torch.float64).prod()
        rows.append(torch.tensor([1.0, p, p * p], dtype=torch.float64) / rest)
    rows.append(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    return torch.stack(rows)


def transform_weight(weight: torch.Tensor, tile: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    side, outputs, inputs = tile + 2, weight.shape[0], weight.shape[1]
    g = filter_matrix(tile)
    u = torch.einsum("pi,ocij,qj->opqc", g, weight.detach().to("cpu", torch.float64), g)
    pairs = 2 if dtype == torch.bfloat16 else 1
    u = torch.nn.functional.pad(u, (0, -inputs % pairs, 0, 0, 0, 0, 0, -outputs % COLUMNS))
    u = u.reshape(-1, COLUMNS, side, side, u.shape[-1] // pairs, pairs).permute(0, 2, 3, 4, 1, 5)
    return (u if pairs == 2 else u.squeeze(-1)).to(dtype).contiguous()


def convolution(
    x, weight, out, padding=1, bias=None, relu=False, residual=None, sigma=None, at=None, scale=None, shift=None, relu_in=False, pool=False, clean=None,
    block=0,
) -> None:  # fmt: skip
    if not out.numel():
        return
    handle = load().handle
    function = handle.rse_winograd
    if not function.argtypes:
        function.argtypes, function.restype = _SIGNATURE, ctypes.c_int
    pointer = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    rows, channels, x_height, x_width = x.shape
    height, width = (x_height // 2, x_width // 2) if pool else (x_height, x_width)
    images, draws = (rows, 1) if at is None else (at.images, at.draws)
    where = (None, 0, 0, 0, None) if at is None else (at.seed.data_ptr(), at.stream, at.image_offset, at.draw_offset, pointer(at.sample_ids))
    failed = function(
        x.data_ptr(), out.data_ptr(), pointer(clean), DTYPES[x.dtype], rows, images, draws, channels, height, width, x_height, x_width, pool, *where,
        pointer(sigma), 0 if sigma is None else sigma.numel(), pointer(scale), pointer(shift), relu_in, weight.data_ptr(), DTYPES[weight.dtype],
        weight.shape[1] - 2, out.shape[1], padding, pointer(bias), pointer(residual), relu, block, torch.get_num_threads(),
    )  # fmt: skip
    if failed == 2:
        raise TypeError("?")
    if failed:
        raise MemoryError("the CPU convolution could not allocate its workspace")
