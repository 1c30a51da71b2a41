"""Argument checks with one wording: the argument, what was expected, what came; dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from types import UnionType
from typing import Any, TypeGuard, get_args, get_type_hints

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# A subclass with another one than this answers for torch's operators itself, and its own memory may hold nothing.
_NO_DISPATCH = Tensor.__torch_dispatch__


def tensor(name: str, value: Any, *, dtypes: Sequence[torch.dtype] | None = FLOATS, ndim: int | None = None) -> Tensor:
    """``value`` as it is, or a TypeError/ValueError that names the argument."""
    if not readable(value):
        raise TypeError(f"{name}: expected {_unlike(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {names(dtypes)}, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {list(value.shape)}")
    return value


def at_hand(*values: Any) -> bool:
    """All are tensors whose values a kernel can read now."""
    return not _traced() and all(map(_at_hand, values))


def _at_hand(value: Any) -> bool:
    return readable(value) and not value.is_meta


def readable(value: Any) -> TypeGuard[Tensor]:
    """``value`` is a tensor that holds its values itself, or, in a graph, one that torch will see to."""
    kind = type(value)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        if not isinstance(value, Tensor) or hasattr(value, "full_tensor"):
            return False
        if not _traced() and kind.__torch_dispatch__ is not _NO_DISPATCH:
            return False
    if value.layout is not torch.strided or value.is_nested:
        return False
    return torch.compiler.is_compiling() or not (value.is_neg() or value._is_zerotensor())


def _unlike(value: Any) -> str:
    """What to pass instead of a value that is not :func:`readable`, and what it is."""
    kind = type(value).__name__
    if not isinstance(value, Tensor):
        return f"a torch.Tensor, got {kind}"
    if hasattr(value, "full_tensor"):
        return f"this process's own torch.Tensor (.to_local() for ccu_fast.distributed, or .full_tensor()), got {kind}"
    if value.layout is not torch.strided or value.is_nested:
        return f"a dense torch.Tensor, got {'a nested one' if value.is_nested else value.layout}"
    if value.is_neg() or value._is_zerotensor():
        return "a torch.Tensor with its values in memory (.clone()), got one that torch computes when it is read"
    return f"a torch.Tensor with its values in memory, got {kind}"


def by_operator(value: Tensor) -> bool:
    """Whether to call ``torch.ops``: torch makes a graph, or it is asked for shapes alone, or a mode is looking on.

    A kernel called in another way is invisible to make_fx or a FLOP counter, and reads what FakeTensorMode never wrote.
    """
    return _traced() or value.is_meta


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()


def same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """``value`` is on the device of ``other`` (and has its dtype)."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} (that of {other_name}), got {value.dtype}")


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """``value`` has exactly this shape."""
    if list(value.shape) != list(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")


def per_row(name: str, value: Tensor, lead: Sequence[int], items: int) -> Tensor:
    """``[1 or B, items]`` of a tensor ``[items]`` or ``[..., items]`` that broadcasts with ``lead``, of B rows."""
    if value.ndim < 1 or value.shape[-1] != items:
        raise ValueError(f"{name}: expected shape [{items}] or [..., {items}], got {list(value.shape)}")
    if value.ndim <= len(lead) + 1 and math.prod(value.shape[:-1]) == 1:
        return value.reshape(1, items)
    try:
        value = value.expand(*lead, items)
    except RuntimeError:
        raise ValueError(f"{name}: expected shape {[*lead, items]}, got {list(value.shape)}") from None
    return value.reshape(math.prod(lead), items)


def leading(name: str, lead: Sequence[int], of_x: Sequence[int]) -> tuple[int, ...]:
    """The leading dimensions that those of ``name`` and of x broadcast to."""
    try:
        return tuple(torch.broadcast_shapes(tuple(of_x), tuple(lead)))
    except RuntimeError:
        raise ValueError(
            f"{name}: expected leading dimensions that broadcast with {list(of_x)} (those of x), got {list(lead)}"
        ) from None


def number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a finite float within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    result = float(value)
    # Comparisons, which torch.compile can trace for a number that it made symbolic; NaN fails them.
    if not -math.inf < result < math.inf or not low <= result <= high:
        within = "" if low == -math.inf and high == math.inf else f" in [{low}, {high}]"
        raise ValueError(f"{name}: expected a finite number{within}, got {value}")
    return result


def one_element(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``value`` is one floating-point number in a tensor on the device of ``other``; returned without dimensions.

    Of a DTensor that every rank holds whole this is the rank's own, whose gradient is what this rank computes.
    """
    value = _local(name, value)
    tensor(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {list(value.shape)}")
    same(name, value, other_name, other, dtype=False)
    return value.reshape(())


def _local(name: str, value: Any) -> Any:
    if not hasattr(value, "full_tensor"):
        return value
    mesh = value.device_mesh
    if not all(place.is_replicate() or mesh.size(dim) == 1 for dim, place in enumerate(value.placements)):
        places = ", ".join(str(place) for place in value.placements)
        raise TypeError(f"{name}: expected one that every rank holds whole (.full_tensor()), got a DTensor in {places}")
    return value.to_local()


def boolean(name: str, value: Any) -> bool:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """``value`` as an int within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an int {bounds}, got {value}")
    return value


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """``value`` is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {tuple(allowed)}, got {value!r}")
    return str(value)


def device(name: str, value: str | torch.device) -> torch.device:
    """A device of this machine."""
    try:
        where = torch.device(value)
        if where.type == "meta":
            raise ValueError("it holds no values")
        torch.empty(0, device=where)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0][:120]
        said = f"{name}: expected cpu or a GPU that is here (cuda, cuda:1), got {value} ({why})"
        raise ValueError(said) from error
    return where


def finite(name: str, value: Tensor) -> None:
    """Every element is finite. The host reads the tensor, which synchronises a GPU."""
    if value.is_meta:
        return
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: expected finite values, got {value[tuple(where)].item()} at index {where}")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """fp32-or-bf16 style list for messages."""
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def field(default: Any, help: str = "", **bounds: Any) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its value where none is given.
        help: of its option on a command line; without one it has none.
        bounds: ``low`` and ``high`` of a number, ``allowed`` words of a text.
    """
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


def fields(config: Any) -> None:
    """Every number, text and truth value of a dataclass has its type and keeps to the bounds of :func:`field`."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, kind = getattr(config, item.name), hints[item.name]
        if isinstance(kind, UnionType):
            if value is None:
                continue
            kind = get_args(kind)[0]
        if kind in _CHECKS:
            _CHECKS[kind](item.name, value, **item.metadata.get("bounds", {}))


def _text(name: str, value: Any, *, allowed: Sequence[str] | None = None) -> str:
    if allowed is not None:
        return one_of(name, value, allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {value!r}")
    return value


_CHECKS: dict[Any, Any] = {bool: boolean, int: integer, float: number, str: _text}
