"""The questions that every patch asks before it takes a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ccu_fast.patch.site import Installed, Site, are_plain, arguments, is_one_number, is_stock

NAME = f"{__name__}.Loss.logits"


class Loss:
    def logits(self, x: int) -> int:
        return x

    @torch.no_grad()
    def decorated(self) -> None: ...


class Inherits(Loss):
    pass


class Overrides(Loss):
    def logits(self, x: int) -> int:
        return 2 * x


def test_a_call_that_does_not_bind_is_the_function_s_own_error() -> None:
    def ours(original: Any, *args: Any, **kwargs: Any) -> int:
        return -arguments(original, args, kwargs)["x"]

    installed = Installed(Site(Loss, "logits", ("self", "x"), ours))
    try:
        assert Loss().logits(3) == -3
        with pytest.raises(TypeError, match=r"^Loss\.logits\(\) missing 1 required positional argument: 'x'$"):
            Loss().logits()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"^Loss\.logits\(\) takes 2 positional arguments but 3 were given$"):
            Loss().logits(3, 4)  # type: ignore[call-arg]
    finally:
        installed.remove()
    assert Loss().logits(3) == 3


def test_a_function_is_stock_until_anybody_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_stock(Loss().logits, NAME)
    assert is_stock(Inherits().logits, NAME)
    assert is_stock(Loss().decorated, f"{__name__}.Loss.decorated")
    assert is_stock(F.cross_entropy, "torch.nn.functional.cross_entropy")
    assert not is_stock(Overrides().logits, NAME)
    assert not is_stock(Loss().decorated, NAME)
    for not_a_function in (None, 3, SimpleNamespace(), functools.partial(Loss.logits, None)):
        assert not is_stock(not_a_function, NAME)

    changed = Loss()
    changed.logits = lambda x: 3 * x  # type: ignore[method-assign, assignment]
    assert not is_stock(changed.logits, NAME)

    exec_globals: dict[str, Any] = {"__name__": "users.module", "functools": functools, "theirs": Loss.logits}
    exec("@functools.wraps(theirs)\ndef wrapped(self, x): return theirs(self, x) + 1", exec_globals)
    monkeypatch.setattr(Loss, "logits", exec_globals["wrapped"])
    assert not is_stock(Loss().logits, NAME), "functools.wraps copies the name"


def test_a_patch_leaves_a_function_stock() -> None:
    installed = Installed(Site(Loss, "logits", ("self", "x"), lambda original, *args: NotImplemented))
    try:
        assert is_stock(Loss().logits, NAME)
    finally:
        installed.remove()


def test_is_stock_is_a_constant_of_a_graph() -> None:
    def double_if_stock(loss: Loss, x: Tensor) -> Tensor:
        return 2 * x if is_stock(loss.logits, NAME) else x

    for loss, factor in ((Inherits(), 2), (Overrides(), 1)):
        torch._dynamo.reset()
        compiled = torch.compile(double_if_stock, fullgraph=True, backend="eager")
        assert compiled(loss, torch.ones(2)).tolist() == [factor, factor]


def test_what_a_kernel_may_read_is_plain() -> None:
    x, weight = torch.ones(3, 2), torch.nn.Parameter(torch.ones(2))
    assert are_plain(x, x.T, weight, x[:, 0])

    class Mine(Tensor):
        pass

    with FakeTensorMode():
        fake = torch.ones(3, 2)
    negated = torch.complex(x, x).conj().imag
    for t in (x.as_subclass(Mine), fake, x.to("meta"), x.to_sparse(), torch.nested.nested_tensor([x]), negated, 3.0):
        assert not are_plain(x, t)


@pytest.mark.parametrize(
    "transform",
    [
        torch.vmap,
        torch.func.grad,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        lambda f: make_fx(f),
        lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
        lambda f: lambda x: _inside(FlopCounterMode(display=False), f, x),
        lambda f: lambda x: _inside(forward_ad.dual_level(), lambda x: f(forward_ad.make_dual(x, x)), x),
    ],
    ids=["vmap", "grad", "jvp", "make_fx", "trace", "mode", "dual"],
)
def test_nothing_is_plain_under_a_transform(transform: Callable[..., Any]) -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(are_plain(x))
        return x.sum()

    transform(watched)(torch.ones(3))
    assert seen
    assert not any(seen)


def _inside(context: Any, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with context:
        return f(x)


def test_one_number_and_what_broadcasts() -> None:
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    half = torch.ones(1, dtype=torch.bfloat16)
    for value in (2, 2.5, torch.tensor(2.5), torch.tensor(2.5).double(), half, half[None], torch.nn.Parameter(half)):
        assert is_one_number(value, x), value
    rows, cube = half.expand(3), half[None, None]
    other_dtype = torch.ones(1)  # makes fp32 of bf16 features
    for wrong in (rows, rows[:, None], cube, other_dtype, torch.tensor(2), half.to("meta"), True, torch.inf, "2", None):
        assert not is_one_number(wrong, x), wrong
