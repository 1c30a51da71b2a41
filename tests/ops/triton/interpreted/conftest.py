"""These tests run kernels on CPU tensors; tests/ops/triton/test_interpreter.py starts them where that is possible."""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def _patch_once_a_launch() -> None:
    """Spare the interpreter work that changes nothing and takes a third of the time of these tests.

    A launch replaces the functions of triton.language by the interpreter's, and so does every call of a device function
    within it: two hundred attributes each time, which the launch or an earlier call has replaced already.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[bool, bool]] = set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        modules = (tl in seen, tl.core in seen)
        if modules in patched:
            return None
        patched.add(modules)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_once


def _look_up_each_dtype_once() -> None:
    """Every result asks for numpy's dtype, and every time the interpreter builds the table of all dtypes to look in."""
    from triton.runtime import interpreter

    ask = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = ask(dtype)
        return known[name]

    interpreter._get_np_dtype = look_up


def _describe_each_shape_once() -> None:
    """Types and tensors keep their shape as constants and as text, which take longer to make than a small tile to add.

    Whatever else a constructor sets is the same for every one of that shape.
    """
    import triton.language as tl

    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[tuple[int, ...], dict[str, Any]] = {}

    def make_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = (str(element_ty), *shape)
        if key in types:
            vars(self).update(types[key], element_ty=element_ty)
            return
        make_type(self, element_ty, shape)
        types[key] = {name: of for name, of in vars(self).items() if name != "element_ty"}

    def make_tensor_once(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape in tensors:
            vars(self).update(tensors[shape], handle=handle, type=type, dtype=type.scalar)
            return
        make_tensor(self, handle, type)
        tensors[shape] = {name: of for name, of in vars(self).items() if name not in ("handle", "type", "dtype")}

    tl.block_type.__init__, tl.tensor.__init__ = make_type_once, make_tensor_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_once_a_launch()
    _look_up_each_dtype_once()
    _describe_each_shape_once()
