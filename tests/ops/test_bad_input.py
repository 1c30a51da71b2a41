"""Bad input: the message names the argument, what was expected and what came, and nothing is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ccu_fast
import ccu_fast.distributed as over
from ccu_fast import ALL, SAME, SELF, reduce_similarity
from ccu_fast.ops import backend as registry

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.randn(4, 3), torch.randn(5, 3)
LABELS = torch.zeros(4, dtype=torch.long)
META = torch.empty(4, 3, device="meta")
NAN = torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])


def reduce(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: reduce_similarity(*args, **{"rows": [("lse", ALL)], **kwargs})


def call(name: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: getattr(ccu_fast, name)(*args, **kwargs)


def forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: module(*args, **kwargs)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # the features
    (reduce([[1.0]], Y), TypeError, "x: expected a torch.Tensor, got list"),
    (reduce(X, None), TypeError, "y: expected a torch.Tensor, got NoneType"),
    (reduce(X.long(), Y), TypeError, "x: expected dtype float16 or bfloat16 or float32 or float64, got torch.int64"),
    (reduce(X, Y.bool()), TypeError, "y: expected dtype float16 or bfloat16 or float32 or float64, got torch.bool"),
    (reduce(X.to(torch.complex64), Y), TypeError, "x: expected dtype float16 or bfloat16 or float32 or float64, got "),
    (reduce(X, Y.double()), TypeError, "y: expected dtype torch.float32 (that of x), got torch.float64"),
    (reduce(X, META), ValueError, "y: expected device cpu (that of x), got meta"),
    (reduce(X[0], Y), ValueError, "x: expected shape [..., items, D], got [3]"),
    (reduce(X, Y[0]), ValueError, "y: expected shape [..., items, D], got [3]"),
    (reduce(X, Y[:, :2]), ValueError, "y: expected last dimension 3 (that of x), got 2"),
    (
        reduce(torch.randn(2, 4, 3), torch.randn(3, 5, 3)),
        ValueError,
        "y: expected leading dimensions that broadcast with [2] (those of x), got [3]",
    ),
    (reduce(NAN, NAN, nan_policy="raise"), ValueError, "x: expected finite values, got nan at index [1, 0]"),
    (
        reduce(X, torch.full((5, 3), torch.inf), nan_policy="raise"),
        ValueError,
        "y: expected finite values, got inf at index [0, 0]",
    ),
    (reduce(X, Y, nan_policy="omit"), ValueError, "nan_policy: expected one of ('propagate', 'raise'), got 'omit'"),
    # scale and bias
    (reduce(X, Y, scale="10"), TypeError, "scale: expected a number, got str"),
    (reduce(X, Y, scale=True), TypeError, "scale: expected a number, got bool"),
    (reduce(X, Y, scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    (reduce(X, Y, scale=torch.ones(2)), ValueError, "scale: expected one element, got shape [2]"),
    (reduce(X, Y, scale=torch.tensor(3)), TypeError, "scale: expected dtype float16 or bfloat16 or float32 or float64"),
    (reduce(X, Y, scale=torch.ones((), device="meta")), ValueError, "scale: expected device cpu (that of x), got meta"),
    (reduce(X, Y, bias=[1.0]), TypeError, "bias: expected a number, got list"),
    (reduce(X, Y, bias=float("inf")), ValueError, "bias: expected a finite number, got inf"),
    (reduce(X, Y, bias=torch.zeros(1, 2)), ValueError, "bias: expected one element, got shape [1, 2]"),
    # labels and ids
    (reduce(X, X, row_labels=[0, 1, 2, 3]), TypeError, "row_labels: expected a torch.Tensor, got list"),
    (reduce(X, X, row_labels=LABELS.float()), TypeError, "row_labels: expected dtype int64 or int32 or "),
    (reduce(X, X, row_labels=LABELS[:3]), ValueError, "row_labels: expected shape [4] or [..., 4], got [3]"),
    (reduce(X, X, row_labels=LABELS[0]), ValueError, "row_labels: expected shape [4] or [..., 4], got []"),
    (
        reduce(X, Y, row_labels=LABELS, col_labels=LABELS),
        ValueError,
        "col_labels: expected shape [5] or [..., 5], got [4]",
    ),
    (
        reduce(X, Y, row_labels=LABELS),
        ValueError,
        "col_labels: expected a tensor because row_labels is given, got None",
    ),
    (
        reduce(X, X, col_labels=LABELS),
        ValueError,
        "row_labels: expected a tensor because col_labels is given, got None",
    ),
    (reduce(X, X, row_ids=LABELS[None].expand(2, 4)), ValueError, "row_ids: expected shape [4], got [2, 4]"),
    (reduce(X, X, row_ids=LABELS.to("meta")), ValueError, "row_ids: expected device cpu (that of x), got meta"),
    (reduce(X, Y, row_ids=LABELS), ValueError, "col_ids: expected a tensor because row_ids is given, got None"),
    (reduce(X, X, col_ids=LABELS), ValueError, "row_ids: expected a tensor because col_ids is given, got None"),
    (reduce(X, Y, paired=True), ValueError, "paired: expected as many rows in x as in y, got 4 and 5"),
    # limits and guide
    (reduce(X, Y, row_limits=0.5), TypeError, "row_limits: expected a torch.Tensor, got float"),
    (reduce(X, Y, row_limits=LABELS), TypeError, "row_limits: expected dtype float16 or bfloat16 or float32 or "),
    (reduce(X, Y, row_limits=Y[:, 0]), ValueError, "row_limits: expected shape [4] or [..., 4], got [5]"),
    (reduce(X, Y, row_limits=torch.zeros(2, 4)), ValueError, "row_limits: expected shape [4], got [2, 4]"),
    (reduce(X, Y, row_limits=META[:, 0]), ValueError, "row_limits: expected device cpu (that of x), got meta"),
    (reduce(X, Y, col_limits=X[:, 0]), ValueError, "col_limits: expected shape [5] or [..., 5], got [4]"),
    (reduce(X, Y, guide=(X, Y)), ValueError, "guide: expected row_limits or col_limits beside it, got neither"),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=X),
        TypeError,
        "guide: expected a pair of tensors, for the rows of x and of y, got Tensor",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(X, Y, X)),
        TypeError,
        "guide: expected a pair of tensors, for the rows of x and of y, got 3 of them",
    ),
    (reduce(X, Y, row_limits=X[:, 0], guide=(X, None)), TypeError, "guide[1]: expected a torch.Tensor, got NoneType"),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(X, Y.half())),
        TypeError,
        "guide[1]: expected dtype torch.float32 (that of guide[0]), got torch.float16",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(X, X)),
        ValueError,
        "guide[1]: expected shape [..., 5, Dg] with Dg at least 1, got [4, 3]",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(X[:, :0], Y[:, :0])),
        ValueError,
        "guide[0]: expected shape [..., 4, Dg] with Dg at least 1, got [4, 0]",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(X, Y[:, :2])),
        ValueError,
        "guide[1]: expected last dimension 3 (that of guide[0]), got 2",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(X.expand(2, 4, 3), Y)),
        ValueError,
        "guide[0]: expected shape [4, 3], got [2, 4, 3]",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], guide=(META, Y)),
        ValueError,
        "guide[0]: expected device cpu (that of x), got meta",
    ),
    (
        reduce(X, Y, row_limits=X[:, 0], rows=[("count", 4)] * 9),
        ValueError,
        "rows: expected at most 8 reductions (counts over OTHER included, because of limits), got 9",
    ),
    # what is asked for
    (reduce(X, Y, rows=["lse"]), TypeError, "rows: expected pairs such as ('lse', ALL), got 'lse'"),
    (reduce(X, Y, rows="lse"), TypeError, "rows: expected a sequence of pairs such as ('lse', ALL), got str"),
    (
        reduce(X, Y, cols=[("mean", ALL)]),
        ValueError,
        "cols: expected a reduction in ('lse', 'sum', 'softplus', 'logsigmoid', 'count', 'mass', 'expected'), got 'mea",
    ),
    (reduce(X, Y, rows=[("lse", 0)]), ValueError, "rows: expected a set of SELF, SAME and OTHER, got 0"),
    (reduce(X, Y, rows=[("lse", 8)]), ValueError, "rows: expected a set of SELF, SAME and OTHER, got 8"),
    (reduce(X, Y, rows=[("lse", "ALL")]), ValueError, "rows: expected a set of SELF, SAME and OTHER, got 'ALL'"),
    (
        reduce(X, Y, cols=[("sum", SELF)] * 9),
        ValueError,
        "cols: expected at most 8 reductions besides counts, got 9",
    ),
    (reduce(X, Y, rows=[]), ValueError, "rows: expected at least one reduction in rows or cols, got none"),
    (
        reduce(X, X, cols=[("lse", SAME)]),
        ValueError,
        "row_labels: expected a tensor for ('lse', SAME) in cols, got None",
    ),
    # how it is computed
    (reduce(X, Y, backend="cuda"), ValueError, "backend: expected one of ('auto', 'triton', 'native', 'reference'), "),
    (reduce(X, Y, workspace=-1), ValueError, "workspace: expected an int at least 0, got -1"),
    (reduce(X, Y, workspace=1e6), TypeError, "workspace: expected an int, got float"),
    # the losses
    (call("info_nce", X, Y, scale=1.0), ValueError, "y: expected 4 rows (those of x) or row_ids and col_ids, got 5"),
    (
        call("info_nce", X, X, scale=1.0, paired=False),
        ValueError,
        "paired: expected True or row_ids and col_ids, got False",
    ),
    (call("info_nce", X, 1, scale=1.0), TypeError, "y: expected a torch.Tensor, got int"),
    (
        call("info_nce", X, X, scale=1.0, reduction="max"),
        ValueError,
        "reduction: expected one of ('mean', 'sum', 'none'), got 'max'",
    ),
    (
        call("info_nce", X, Y, scale=1.0, reduction="none", row_ids=LABELS, col_ids=torch.zeros(5, dtype=torch.long)),
        ValueError,
        "reduction: expected 'mean' or 'sum' for a symmetric loss of 4 rows and 5 columns, got 'none'",
    ),
    (
        call("inverse_info_nce", X, X, scale=1.0, kind="soft"),
        ValueError,
        "kind: expected one of ('bounded', 'contrastive', 'ascent'), got 'soft'",
    ),
    (
        call("inverse_info_nce", X, X, scale=1.0, kind="contrastive"),
        ValueError,
        "row_labels: expected a tensor for ('lse', SAME) in rows, got None",
    ),
    (call("inverse_info_nce", X, X, scale=1.0, reduction=None), ValueError, "reduction: expected one of ('mean', "),
    (
        call("inverse_info_nce", X, Y, scale=1.0),
        ValueError,
        "y: expected 4 rows (those of x) or row_ids and col_ids or row_labels and col_labels, got 5 rows",
    ),
    (call("sup_con", X, X, scale=1.0, row_labels=LABELS[:2]), ValueError, "row_labels: expected shape [4] or [..., 4]"),
    (
        call("sup_con", X, X, scale=1.0, row_labels=None),
        ValueError,
        "row_labels: expected a tensor for ('lse', SAME) in rows, got None",
    ),
    (call("sup_con", X, X, scale=1.0, row_labels=LABELS, reduction="avg"), ValueError, "reduction: expected one of "),
    (
        call("sigmoid_loss", X, Y, scale=1.0),
        ValueError,
        "y: expected 4 rows (those of x) or row_ids and col_ids, got 5",
    ),
    (call("sigmoid_loss", X, X, scale=1.0, reduction="avg"), ValueError, "reduction: expected one of ('mean', 'sum', "),
    # arguments by another name, or by position
    (
        call("info_nce", X, X, 0.07),
        TypeError,
        "scale: expected by keyword (scale = 1 / temperature), got 0.07 by position",
    ),
    (call("info_nce", X, X, scale=1.0, normalise=True), TypeError, "normalise: expected normalize, got an unknown key"),
    (call("info_nce", X, X, temperature=0.07), TypeError, "temperature: expected scale (1 / temperature), got an"),
    (call("info_nce", X, X, tau=0.07), TypeError, "tau: expected scale (1 / temperature), got an unknown keyword"),
    (call("InfoNCE", scale=X), TypeError, "scale: expected a number, with learnable=True to train it, got a tensor"),
    (call("sup_con", X, labels=LABELS), TypeError, "labels: expected row_labels or col_labels, got an unknown keyword"),
    (
        call("sup_con", X, X, labels=LABELS, scale=1.0),
        TypeError,
        "labels: expected row_labels or col_labels, got an un",
    ),
    (call("inverse_info_nce", X, X, scale=1.0, rowids=LABELS), TypeError, "rowids: expected row_ids"),
    (call("sigmoid_loss", X, X, scale=1.0, group=None), TypeError, "group: expected x or y or scale or bias"),
    (lambda: over.info_nce(X, X, scale=1.0, modes="ring"), TypeError, "modes: expected mode"),
    (lambda: over.sup_con(X, labels=LABELS), TypeError, "labels: expected row_labels or col_labels, got an unknown"),
    (call("InfoNCE", 0.07), TypeError, "scale: expected by keyword (scale = 1 / temperature), got 0.07 by position"),
    (
        call("InverseInfoNCE", 0.07),
        TypeError,
        "scale: expected by keyword (scale = 1 / temperature), got 0.07 by position",
    ),
    (call("SupCon", 0.07), TypeError, "scale: expected by keyword (scale = 1 / temperature), got 0.07 by position"),
    (
        call("SigmoidLoss", 10.0, -10.0),
        TypeError,
        "scale: expected by keyword (scale = 1 / temperature), got 10.0 by position",
    ),
    (call("InfoNCE", normalise=True), TypeError, "normalise: expected normalize, got an unknown keyword"),
    (call("SupCon", reducton="sum"), TypeError, "reducton: expected reduction, got an unknown keyword"),
    (
        forward(ccu_fast.SupCon(scale=1.0), X, X, LABELS, collabels=LABELS),
        TypeError,
        "collabels: expected col_labels or row_labels, got an unknown keyword",
    ),
    # the modules
    (
        call("ClipLoss", use_horovod=True),
        ValueError,
        "use_horovod: expected False (only torch.distributed is supported)",
    ),
    (call("ClipLoss", rank=2, world_size=2), ValueError, "rank: expected an int in [0, 1], got 2"),
    (call("ClipLoss", world_size=0), ValueError, "world_size: expected an int at least 1, got 0"),
    (call("ClipLoss", rank="0"), TypeError, "rank: expected an int, got str"),
    (
        call("SigLipLoss", dist_impl="ring"),
        ValueError,
        "dist_impl: expected one of ('bidir', 'shift', 'reduce', 'gather'), got 'ring'",
    ),
    (
        forward(ccu_fast.ClipLoss(), X, Y, 1.0),
        ValueError,
        "text_features: expected 4 rows (those of image_features), got",
    ),
    (forward(ccu_fast.ClipLoss(), X, X, None), TypeError, "logit_scale: expected a number, got NoneType"),
    (forward(ccu_fast.ClipLoss(backend="gpu"), X, X, 1.0), ValueError, "backend: expected one of ("),
    (call("InfoNCE", scale="3"), TypeError, "scale: expected a number, got str"),
    (call("InfoNCE", learnable=True), ValueError, "scale: expected a positive number for learnable=True, got None"),
    (
        call("SupCon", scale=-1.0, learnable=True),
        ValueError,
        "scale: expected a positive number for learnable=True, got -1.0",
    ),
    (call("InfoNCE", reduction="max"), ValueError, "reduction: expected one of ('mean', 'sum', 'none'), got 'max'"),
    (
        call("InverseInfoNCE", kind="soft"),
        ValueError,
        "kind: expected one of ('bounded', 'contrastive', 'ascent'), got",
    ),
    (call("SigmoidLoss", bias="0"), TypeError, "bias: expected a number, got str"),
    (
        forward(ccu_fast.InfoNCE(), X, X),
        ValueError,
        "scale: expected a number or tensor because the module was built without one, got None",
    ),
    (
        forward(ccu_fast.InfoNCE(scale=2.0), X, X, scale=3.0),
        ValueError,
        "scale: expected None because the module has its own scale, got a value",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_message(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        make()
    assert caught.type is error
    assert "got" in str(caught.value)


@pytest.fixture
def choice_anew() -> Iterator[None]:
    """Earlier choices are forgotten, and so are those made here."""
    registry.forget()
    yield
    registry.forget()


@pytest.mark.usefixtures("choice_anew")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_backend_that_cannot_serve_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by the user: an error with the reason, and no silent fallback."""
    with pytest.raises(ValueError, match=f"^backend: '{name}' cannot run reduce_similarity here: "):
        reduce_similarity(X.double(), Y.double(), rows=[("lse", ALL)], backend=name)
    monkeypatch.setattr(registry, "unavailable", lambda backend: "it was never built")
    with pytest.raises(ValueError, match=f"^backend: '{name}' cannot run reduce_similarity here: it was never built$"):
        reduce_similarity(X, Y, rows=[("lse", ALL)], backend=name)


@pytest.mark.usefixtures("choice_anew")
def test_auto_falls_back_where_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry, "unavailable", lambda backend: None if backend == "reference" else "it was never built"
    )
    (lse,), _ = reduce_similarity(X, Y, rows=[("lse", ALL)])
    torch.testing.assert_close(lse, (X @ Y.T).logsumexp(1))
