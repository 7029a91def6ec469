"""The kernel of `rope`: a tile of heads at a time, in fp32.

Shapes: T tokens, H heads, P parts (query and key of a head stand side by side), D head dim.
"""

import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers


@triton.jit
def _rotate_kernel(
    X, COS_SIN, OUT, num_rows, size, num_heads, num_parts,
    x_token, x_head, x_part, out_token, out_head, out_part,
    BACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part, head, token = rows % num_parts, rows // num_parts % num_heads, rows // (num_parts * num_heads)
    cols, pairs = tl.arange(0, COLS), tl.arange(0, COLS // 2)
    inside = (rows[:, None] < num_rows) & (cols[None, :] < size)
    inside_pairs = (rows[:, None] < num_rows) & (2 * pairs[None, :] < size)
    turn = COS_SIN + token[:, None] * size + 2 * pairs[None, :]
    cos = tl.load(turn, mask=inside_pairs, other=0.0)
    sin = tl.load(turn + 1, mask=inside_pairs, other=0.0)
    if BACK:
        sin = -sin
    x = X + (token * x_token + head * x_head + part * x_part)[:, None] + cols[None, :]
    even, odd = tl.split(tl.reshape(tl.load(x, mask=inside, other=0.0).to(tl.float32), (ROWS, COLS // 2, 2)))
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, COLS))
    out = OUT + (token * out_token + head * out_head + part * out_part)[:, None] + cols[None, :]
    tl.store(out, turned.to(OUT.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos_sin: Tensor, out: Tensor, back: bool) -> Tensor:
    """Write x (T, H, D) or (T, H, P, D), turned by (T, D / 2, 2) fp32, or back by as much, to ``out``; return that."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    a, b = (x, out) if x.dim() == 4 else (x.unsqueeze(2), out.unsqueeze(2))
    num_tokens, num_heads, num_parts, size = a.shape
    num_rows, cols = num_tokens * num_heads * num_parts, max(2, triton.next_power_of_2(size))
    rows = max(1, _TILE // cols)
    if num_rows:
        _rotate_kernel[(triton.cdiv(num_rows, rows),)](
            a, cos_sin.contiguous(), b, num_rows, size, num_heads, num_parts, *a.stride()[:3], *b.stride()[:3],
            BACK=back, ROWS=rows, COLS=cols, num_warps=4,
        )  # fmt: skip
    return out
