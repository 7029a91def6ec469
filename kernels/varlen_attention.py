"""Bidirectional attention over packed documents that never see each other.

For every head h, query i and key j of one document, with the rules of ``attention_rules.py``::

    s_ij = scale * q_i . k_j + bias_ij      p_ij = exp(s_ij - lse_i)      lse_i = log sum_j exp(s_ij)
    o_i  = sum_j m_ij p_ij v_j              m_ij = 1, or dropout's 0 or 1 / (1 - dropout_p)

where j runs over the keys that i sees; a query that sees none gets 0. No score between two documents is ever computed,
so the cost is sum_n len_n^2, not T^2. What runs (``backend``):

    flash-attn     the package, on CUDA in bf16 and fp16: no bias, stages, positions or largest score
    torch-flash    PyTorch's copy of the same kernels
    triton         everything, on CUDA in fp32, bf16 and fp16 (``varlen_attention_triton.py``)
    cpu-flash      PyTorch's flash kernel, once a document
    formulas       everything, everywhere, once a document (``varlen_attention_per_document.py``)

Measured on two shared cores, forward + backward, T 4096, 12 heads of 32, 31 documents of 9..500 tokens (fp32 / bf16):
55 / 52 ms, against 58 / 116 ms for a loop over ``F.scaled_dot_product_attention``, 617 / 573 for a dense block mask and
953 / 750 for padding; with 193 documents of about 22 tokens 47 / 54 ms against 56 / 195 for the loop. Batching
documents of equal length was within 25 % either way, mostly slower, and is left out.

Shapes: Tq queries, T keys, H heads, D head dim, N documents. T = cu_seqlens[N].
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from enc.kernels import dispatch
from enc.kernels import varlen_attention_flash as flash
from enc.kernels import varlen_attention_per_document as per_document
from enc.kernels.attention_rules import RelativeBias, Rules, relative_buckets
from enc.kernels.tensors import at_least_fp32

_FLASH_DTYPES = torch.bfloat16, torch.float16


class Inputs(NamedTuple):
    """The arguments of the operation that come before its rules."""

    q: Tensor  # (Tq, H, D)
    k: Tensor  # (T, H, D)
    v: Tensor  # (T, H, D)
    table: Tensor | None  # (num_buckets, H), of the bias
    seed: Tensor | None  # (1,) int64, of dropout


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    bias: RelativeBias | None = None,
    stages: tuple[Tensor, Tensor] | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    max_logits: Tensor | None = None,
) -> Tensor:
    """Attend within each document.

    Args:
        q: (Tq, H, D); k, v: (T, H, D), one floating dtype; strided views of a fused projection are fine.
        cu_seqlens: (N + 1,) int32, the documents' bounds among the keys, from 0 to T, on the device of q.
        dropout_p: Probability of dropping an attention weight, drawn from torch's global generator of the device.
        scale: Factor on the scores; 1 / sqrt(D) when None.
        cu_seqlens_q: (N + 1,) int32, the bounds among the queries, from 0 to Tq; those of the keys when None.
        max_seqlen: At least the longest document's number of keys, and of queries. None waits for a GPU to count.
        window: Only keys up to this distance are seen.
        bias: Added to the scaled scores by the distance between key and query; its table gets a gradient.
        stages: (Tq,) and (T,) int32, stages of queries and keys.
        positions: (Tq,) and (T,) int32, positions of queries and keys; the index in the document when None. On GPUs the
            gradient of a bias takes least time where neighbours have neighbouring positions.
        max_logits: (H,) fp32, raised in place to the largest score of each head.

    Returns:
        (Tq, H, D) in the dtype of q.

    Raises:
        ValueError: Bounds do not run from 0 to the number of tokens without going back (seen on the CPU only), or
            queries and keys differ where window or bias need positions.
    """
    if cu_seqlens_q is None and len(q) != len(k):
        raise ValueError(f"there are {len(q)} queries and {len(k)} keys: pass cu_seqlens_q, the bounds of the queries")
    if cu_seqlens_q is not None and positions is None and (window is not None or bias is not None):
        raise ValueError("window and bias need the positions of queries and keys where cu_seqlens_q is given")
    # Drawn here and not in the operation, whose results may be kept where a block is computed again.
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    table, max_distance = (None, 0) if bias is None else bias
    (query_positions, key_positions), (query_stages, key_stages) = positions or (None, None), stages or (None, None)
    rules = Rules(
        cu_seqlens, cu_seqlens_q, query_positions, key_positions, query_stages, key_stages,
        max_seqlen, scale, dropout_p, window, max_distance, max_logits is not None,
    )  # fmt: skip
    out: Tensor
    out, _, peak = torch.ops.enc.varlen_attention(*Inputs(q, k, v, table, seed), *rules)
    if max_logits is not None:
        with torch.no_grad():
            max_logits.copy_(torch.maximum(max_logits, peak))
    return out


def backend(device: str, dtype: torch.dtype, head_dim: int = 64, **features: bool) -> str:
    """Name what would run; the names are at the top of this file.

    Features: ``bias``, ``stages``, ``window``, ``positions`` (given, or fewer queries than keys under a window),
    ``max_logits``, ``dropout``.
    """
    return _choose(device, dtype, head_dim, **features)[0]


def why_not(device: str, dtype: torch.dtype, head_dim: int = 64, **features: bool) -> str | None:
    """Say why no fused variable-length kernel runs on this device; None if one does. Features as for ``backend``."""
    return _choose(device, dtype, head_dim, **features)[1]


def _choose(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    bias: bool = False,
    stages: bool = False,
    window: bool = False,
    positions: bool = False,
    max_logits: bool = False,
    dropout: bool = False,
) -> tuple[str, str | None]:
    """Return the name of what runs, and why it is no fused kernel."""
    own = bias or stages or max_logits or dropout or (window and positions)
    if device == "cpu":
        if own or window:
            return "formulas", "no fused variable-length attention exists for the CPU: formulas run once a document"
        return (
            "cpu-flash",
            "no fused variable-length attention exists for the CPU: its flash kernel runs once a document",
        )
    new_enough = not torch.cuda.is_available() or dispatch.capability(torch.device("cuda")) >= (8, 0)
    if device == "cuda" and dtype in _FLASH_DTYPES and not own and head_dim % 8 == 0 and head_dim <= 256 and new_enough:
        package = dispatch.allowed.flash_attn and dispatch.import_problem("flash_attn") is None
        return "flash-attn" if package else "torch-flash", None
    problem = dispatch.why_not_triton(device, dtype)
    if problem is None and head_dim > 128:
        problem = f"fused attention has no heads of {head_dim} in this form"
    if problem is None:
        return "triton", None
    return "formulas", f"{problem}: attention runs once a document, several times slower"


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None, **rules: Any) -> Tensor:
    """Compute the same by a softmax over all T keys, in fp32, or fp64 for fp64 inputs. (Tq, H, D)"""
    p = reference_scores(q, k, cu_seqlens, scale, **rules).softmax(-1).nan_to_num(0)  # NaN: the query sees nothing
    return torch.einsum("hij,jhd->ihd", p, v.to(p.dtype)).to(q.dtype)


def reference_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    window: int | None = None,
    bias: RelativeBias | None = None,
    stages: tuple[Tensor, Tensor] | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return all scores, -inf where the key is not seen. (H, Tq, T)"""
    dtype = at_least_fp32(q.dtype)
    bounds = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q, cu_seqlens
    document_q, document_k = (
        torch.repeat_interleave(torch.arange(len(x) - 1), x.cpu().diff()).to(q.device) for x in bounds
    )
    visible = document_q[:, None] == document_k[None, :]  # (Tq, T)
    index_q, index_k = (
        torch.arange(len(document), device=q.device) - x.to(q.device).long()[document]
        for document, x in zip((document_q, document_k), bounds, strict=True)
    )
    position_q, position_k = positions or (index_q, index_k)
    distance = position_k[None, :] - position_q[:, None]
    if window is not None:
        visible = visible & (distance.abs() <= window)
    if stages is not None:
        stage, key_stage = stages[0][:, None], stages[1][None, :]
        seen = torch.where(key_stage > 0, stage >= key_stage, stage < -key_stage) | (key_stage == 0)
        visible = visible & seen
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k.to(dtype)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        buckets = relative_buckets(distance, len(bias.table), bias.max_distance)
        scores = scores + bias.table.to(dtype)[buckets].permute(2, 0, 1)
    return scores.masked_fill(~visible, -torch.inf)


# One operation, opaque to torch.compile: a traced loop over documents would recompile for each batch. It is registered
# by hand, since torch.library.custom_op imports the compiler, a second of time, at its first call. Its arguments are
# the fields of Inputs and Rules, in their order, tensors first: the schemas and all that follows are made from these.
_ARGUMENTS = Inputs.__annotations__ | Rules.__annotations__
_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", float: "float", bool: "bool",
}  # fmt: skip
_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _ARGUMENTS.items())
_NUM_TENSORS = sum(kind in (Tensor, Tensor | None) for kind in _ARGUMENTS.values())
_NUM_GRADIENTS = 4  # of q, k, v and table

torch.library.define("enc::varlen_attention", f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "enc::varlen_attention_backward",
    f"(Tensor grad, Tensor out, Tensor lse, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("enc::varlen_attention", "default")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (Tq, H, D), the logsumexp of the scores (H, Tq) and the largest scores (H,).

    The logsumexp is as this backend's backward pass wants it; what nobody needs later is empty.
    """
    (q, k, v, table, seed), rules = _split(arguments)
    name = _backend_of(q, table, rules)
    if name == "cpu-flash":
        return *per_document.flash(q, k, v, rules), _nothing(q)
    if name == "formulas":
        out, peak = per_document.formulas(q, k, v, table, seed, rules)
        return out, _nothing(q), peak
    if name == "triton":
        from enc.kernels import varlen_attention_triton  # only where it runs: triton may be missing

        return varlen_attention_triton.forward(q, k, v, table, seed, rules)
    return *flash.forward(name, q, k, v, rules), _nothing(q)


@torch.library.impl("enc::varlen_attention_backward", "default")
def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v and the table; the last is empty without one."""
    (q, k, v, table, seed), rules = _split(arguments)
    name = _backend_of(q, table, rules)
    if name == "cpu-flash":
        return *per_document.flash_backward(grad, out, lse, q, k, v, rules), _nothing(q)
    if name == "formulas":
        return per_document.formulas_backward(grad, q, k, v, table, seed, rules)
    if name == "triton":
        from enc.kernels import varlen_attention_triton

        return varlen_attention_triton.backward(grad, out, lse, q, k, v, table, seed, rules)
    return *flash.backward(name, grad, out, lse, q, k, v, rules), _nothing(q)


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (q, _, _, table, _), rules = _split(arguments)
    peak = q.new_empty(q.shape[1] if rules.max_logits else 0, dtype=torch.float32)
    if _backend_of(q, table, rules) == "formulas":
        return q.new_empty(q.shape), _nothing(q), peak
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=at_least_fp32(q.dtype)), peak


def _backward_shapes(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (q, k, v, table, _), _ = _split(arguments)
    dtable = _nothing(q) if table is None else table.new_empty(table.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dtable


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, _ = output
    ctx.save_for_backward(out, lse, *inputs[:_NUM_TENSORS])
    ctx.settings = inputs[_NUM_TENSORS:]


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dtable = torch.ops.enc.varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    has_table = ctx.needs_input_grad[Inputs._fields.index("table")]
    return dq, dk, dv, dtable if has_table else None, *[None] * (len(_ARGUMENTS) - _NUM_GRADIENTS)


torch.library.register_fake("enc::varlen_attention", _forward_shapes)
torch.library.register_fake("enc::varlen_attention_backward", _backward_shapes)
torch.library.register_autograd("enc::varlen_attention", _gradients, setup_context=_save)


def _split(arguments: tuple[Any, ...]) -> tuple[Inputs, Rules]:
    count = len(Inputs._fields)
    return Inputs(*arguments[:count]), Rules(*arguments[count:])


def _backend_of(q: Tensor, table: Tensor | None, rules: Rules) -> str:
    return backend(
        q.device.type,
        q.dtype,
        q.shape[-1],
        bias=table is not None,
        stages=rules.key_stages is not None,
        window=rules.window is not None,
        positions=rules.key_positions is not None,
        max_logits=rules.max_logits,
        dropout=rules.dropout_p > 0,
    )


def _nothing(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)
