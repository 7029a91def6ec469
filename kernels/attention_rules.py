"""Who sees whom in ``varlen_attention``, and at which distance.

Query i and key j of one document have positions a_i, b_j and stages s_i >= 0, c_j::

    near   |b_j - a_i| <= window
    open   c_j = 0,  or c_j > 0 and s_i >= c_j,  or c_j < 0 and s_i < -c_j
    bias   table[bucket(b_j - a_i), h]

Stages order what is uncovered: a key c > 0 appears at stage c, a key c < 0 goes away at stage -c. With them MPNet's two
streams (arXiv 2004.09297) are one attention. Of P predicted tokens, the j-th real one has stage j + 1, its placeholder
-(j + 1), a token that is not predicted 0; as queries, real token i has stage i + 1, the query stream's token i has i,
all others 0.

The bucket of a distance is T5's (arXiv 1910.10683), bidirectional: exact up to a quarter of ``num_buckets`` on either
side, then logarithmic up to ``max_distance``, from where on it is constant.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class RelativeBias(NamedTuple):
    """A learned bias for each bucket of the distance between key and query, and each head."""

    table: Tensor  # (num_buckets, H) fp32
    max_distance: int


class Rules(NamedTuple):
    """What a call computes beside q, k and v. Shapes: Tq queries, T keys, N documents."""

    cu_seqlens: Tensor  # (N + 1,) int32, of the keys
    cu_seqlens_q: Tensor | None  # (N + 1,) int32; None: as the keys
    query_positions: Tensor | None  # (Tq,) int32; both None: the index in the document
    key_positions: Tensor | None  # (T,) int32
    query_stages: Tensor | None  # (Tq,) int32; both None: every stage is seen
    key_stages: Tensor | None  # (T,) int32
    max_seqlen: int | None
    scale: float
    dropout_p: float
    window: int | None
    max_distance: int  # of the bias
    max_logits: bool = False  # whether the largest scores are wanted

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The documents' bounds among the queries, and among the keys."""
        return self.cu_seqlens if self.cu_seqlens_q is None else self.cu_seqlens_q, self.cu_seqlens


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each distance (position of the key minus position of the query), any shape, int64.

    Raises:
        ValueError: ``num_buckets`` is less than 4, or ``max_distance`` is not beyond the exact buckets.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    if num_buckets < 4 or max_distance <= exact:
        raise ValueError(
            f"{num_buckets} buckets up to a distance of {max_distance} cannot be formed: num_buckets must be at least "
            f"4, and max_distance greater than a quarter of it"
        )
    size = distance.abs()
    # In fp32, as in T5 and MPNet: a wider logarithm could move the first distance of a bucket.
    steps = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    bucket = torch.where(size < exact, size, (exact + steps.long()).clamp(max=half - 1))
    return bucket.long() + half * (distance > 0)


@cache
def buckets_by_distance(num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Return the bucket of every distance from -max_distance to max_distance, int64."""
    distances = torch.arange(-max_distance, max_distance + 1, device=device)
    return relative_buckets(distances, num_buckets, max_distance)
