"""What every token-scoring backend receives: one validated, flattened problem, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class TokenProblem:
    """Per row i the k tokens of lowest score = sign · embedding[id] · grad_i + penalty, sign −1 for ``maximize``.

    A token is a position in the table: token t is row ``token_ids[t]`` of the embedding. Order: (float64 score, t).

    Attributes:
        grad: ``[N, D]`` fp32, or fp64 for the reference; contiguous.
        embedding: ``[V, D]``, any strides, finite.
        token_ids: int64 ``[T]`` ascending, or None when every row of the embedding is a token.
        packed: what the backend made of the table, or None.
        coarse: what it knows of the rounding in that, or None.
        max_norm: largest ‖embedding[id]‖ over the tokens.
        k: at most T.
        current: int64 ``[N]`` embedding rows, or None.
        exclude_current: the current id is not a candidate.
        allowed: bool ``[1 or N, T]``, or None.
        penalty: fp32 ``[1 or N, T]``, finite, or None.
        certify: float64 decides which tokens and in which order; otherwise a coarse score may decide which.
    """

    grad: Tensor
    embedding: Tensor
    token_ids: Tensor | None
    packed: Tensor | None
    coarse: Tensor | None
    max_norm: float
    k: int
    maximize: bool
    current: Tensor | None
    exclude_current: bool
    allowed: Tensor | None
    penalty: Tensor | None
    certify: bool

    @property
    def rows(self) -> int:
        return self.grad.shape[0]

    @property
    def tokens(self) -> int:
        return self.embedding.shape[0] if self.token_ids is None else self.token_ids.shape[0]


class TokenResult(NamedTuple):
    """Attributes as an operator returns them.

    ids: int64 ``[N, k]`` rows of the embedding, −1 after the last.
    delta: fp32 ``[N, k]`` (embedding[id] − embedding[current]) · grad, NaN after the last.
    score: fp64 ``[N, k]`` the score less that of the current token, +inf after the last.
    count: int64 ``[N]``.
    valid: bool ``[N]``: the gradient is finite.
    """

    ids: Tensor
    delta: Tensor
    score: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    valid: Tensor
