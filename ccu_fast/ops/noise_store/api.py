"""NoiseStore: the noise of every image of a data set, by row, on a GPU, in memory or in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import choose, load, outside_transforms
from ccu_fast.ops.machine import check_range, moved
from ccu_fast.ops.noise_store.file import NoiseFile
from ccu_fast.ops.noise_store.operator import add_out, update
from ccu_fast.ops.noise_store.problem import STEPS, steps_of
from ccu_fast.ops.operator import changed
from ccu_fast.ops.pgd_step.api import by_channel, per_channel

DTYPES = (torch.int8, torch.float16, torch.float32)
IMAGES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)

# How far, in steps, a value may be from a whole one: what rounding in its dtype and one subtraction of an image leave.
_SLACK = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.13}


class NoiseStore:
    """Keep additive noise for a number of images, zero at first::

        store.add_to(images, index)                    == (images + noise[index]).clamp(lower, upper)
        store.scatter_(index, values)                  == noise[index] = values
        store.scatter_add_clamp_(index, delta, eps)    == noise[index] = (noise[index] + delta).clamp(-eps, eps)

    Noise has the units of images in [0, 1]. An int8 store counts steps of 1/255, the levels of an 8-bit pixel: what
    it holds is exactly what can be published, in a quarter of the memory of fp32. It takes and gives int8 (steps)
    or floating point (units), and refuses values that are not whole steps.

    Args:
        rows: how many images.
        item_shape: of one image, such as ``[3, 224, 224]``; its first dimension is the channel.
        dtype: int8, fp16 or fp32.
        device: where the noise lives.
        backend: "auto", "native" or "reference"; a named one raises if it cannot serve.

    :meth:`create` and :meth:`open` keep the noise of a file in one that is mapped into memory, and :meth:`commit`
    replaces the file; :meth:`save` and :meth:`load` write and read such files whole.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    An ``index`` is int64 ``[B]`` with rows in [0, rows), on the store's device or on the CPU. A row may occur more than
    once. On a GPU a row out of range fails the kernel, as in torch's own indexing.

    Attributes:
        data: the noise itself, ``[rows, *item_shape]``; changes of it in place bypass every check.
        progress: what the last :meth:`commit` noted, ``{}`` at first.

    >>> store = ccu_fast.NoiseStore(rows=4, item_shape=[1, 2, 2])
    >>> store.scatter_(torch.tensor([2]), torch.full((1, 1, 2, 2), 8, dtype=torch.int8))
    >>> store.gather(torch.tensor([2]), dtype=torch.int8).unique()
    tensor([8], dtype=torch.int8)
    """

    def __init__(
        self,
        rows: int,
        item_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.int8,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        self.data = torch.zeros(_shape(rows, item_shape, dtype), dtype=dtype, device=device)
        self.progress: dict[str, Any] = {}
        self._file: NoiseFile | None = None
        self._backend = choose(backend, "noise_store", self.data.device, torch.float32)

    @classmethod
    def create(
        cls,
        path: Path | str,
        rows: int,
        item_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.int8,
        tag: str = "",
        backend: str = "auto",
    ) -> NoiseStore:
        """A new file of zeros, opened as by :meth:`open`.

        Args:
            path: must not exist.
            rows, item_shape, dtype, backend: as above.
            tag: says what the noise belongs to (a data set's hash, say); :meth:`open` and :meth:`load` compare it.

        Raises:
            FileExistsError: ``path`` is there.
        """
        NoiseFile.create(Path(path), _shape(rows, item_shape, dtype), dtype, tag)
        return cls.open(path, tag=tag, backend=backend)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        item_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        tag: str | None = None,
        backend: str = "auto",
    ) -> NoiseStore:
        """A copy of a file, mapped into memory; :meth:`commit` replaces the file by it.

        The copy is an unnamed file in the same folder and vanishes when the process ends, however it ends: what was
        not committed is lost.

        Args:
            path: of a file that :meth:`create` or :meth:`save` made.
            item_shape, dtype, tag: refuse the file unless it has these.
            backend: as above.

        Raises:
            ValueError: it is no such file, is damaged, or is another one than expected.
            BlockingIOError: another process has it open.
        """
        file = NoiseFile.open(Path(path))
        try:
            file.expect(None if item_shape is None else _item_shape(item_shape), dtype, tag)
            store = cls(0, file.item_shape, dtype=file.dtype, backend=backend)
            store.data, store.progress, store._file = file.copy(), file.progress, file
        except BaseException:
            file.close()
            raise
        return store

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        item_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        tag: str | None = None,
        backend: str = "auto",
    ) -> NoiseStore:
        """Read a file into memory or onto a GPU; arguments and errors as for :meth:`open`."""
        file = NoiseFile.open(Path(path))
        try:
            file.expect(None if item_shape is None else _item_shape(item_shape), dtype, tag)
            store = cls(0, file.item_shape, dtype=file.dtype, device=device, backend=backend)
            store.data, store.progress = file.read().to(device, copy=True), file.progress
        finally:
            file.close()
        return store

    def save(self, path: Path | str, *, tag: str = "") -> None:
        """Write all of the noise to a new file and rename it into place: ``path`` is never half of one."""
        if self._file is not None and Path(path).resolve() == self._file.path:
            raise ValueError(f"path: expected another file than the one this store maps, got {path}; call commit()")
        NoiseFile.write_whole(Path(path), self.data, tag, self.progress)

    def commit(self, **progress: Any) -> None:
        """Make what was written permanent, together with a note of the caller's progress.

        Writes all of the noise to a new file that takes the place of the old one: after a kill at any moment the file
        is that of the last commit, with its note in :attr:`progress`. Without a file this only keeps the note.

        Args:
            progress: JSON values, such as ``round=3``.
        """
        if self._file is not None:
            self._file.commit(self.data, progress)
        self.progress = progress

    def close(self) -> None:
        """Let go of the file; what was not committed is lost."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self.data = torch.empty(0, *self.data.shape[1:], dtype=self.dtype)

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def item_shape(self) -> torch.Size:
        return self.data.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        where = f"file {str(self._file.path)!r}" if self._file is not None else str(self.device)
        size = self.data.numel() * self.dtype.itemsize / 1e9
        return f"NoiseStore({self.rows} × {list(self.item_shape)}, {self.dtype}, {size:.3g} GB, {where})"

    def gather(self, index: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise of the rows of ``index``, ``[B, *item_shape]``.

        Args:
            index: int64 ``[B]``.
            dtype: fp32, fp16 or bf16 (units); int8 (steps) from an int8 store.
        """
        rows = self._rows(index)
        if dtype == self.dtype:
            return rows
        if dtype not in check.FLOATS:
            raise TypeError(f"dtype: expected a floating dtype or that of the store ({self.dtype}), got {dtype}")
        return (rows.float() / STEPS).to(dtype) if self.dtype == torch.int8 else rows.to(dtype)

    def add_to(
        self,
        images: Tensor,
        index: Tensor,
        *,
        lower: float | Tensor = 0.0,
        upper: float | Tensor = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """``(images + noise[index]).clamp(lower, upper)`` in one pass; not differentiable.

        Args:
            images: ``[B, *item_shape]`` fp32, fp16 or bf16, or uint8 pixels, whose level 255 is 1; then floating-point
                noise is rounded to whole levels. For images on another device than the store only their rows travel.
            index: int64 ``[B]``.
            lower: least valid value, a number, or per channel (``[C, 1, 1]``) for images in normalised units.
            upper: largest, not below ``lower``.
            out: shape and dtype of ``images``, contiguous; may be ``images``. Default: a new tensor.

        Returns:
            ``out``.
        """
        check.tensor("images", images, dtypes=IMAGES)
        outside_transforms("NoiseStore", images, out)
        self._check_index(index)
        check.shape("images", images, (len(index), *self.item_shape))
        low, high, limits = _limits(images, lower, upper)
        if out is not None:
            check.tensor("out", out, dtypes=None)
            check.same("out", out, "images", images)
            check.shape("out", out, images.shape)
            if not out.is_contiguous() or out.requires_grad:
                raise ValueError("out: expected contiguous memory that does not require grad")
        noise = self._matrix(self.data)
        where: Tensor | None = index
        if images.device != self.device:
            noise, where = moved(self._matrix(self._rows(index)), images.device), None
        elif index.device != self.device:
            where = moved(index, self.device)
            check_range("index", "rows", index, self.rows)
        backend = choose(
            self._backend if images.device == self.device else "auto", "noise_store", images.device, torch.float32
        )
        source = self._matrix(images.detach().contiguous())
        if out is None:
            out = torch.empty(images.shape, dtype=images.dtype, device=images.device)
        call = torch.ops.ccu_fast.noise_add_out if check.by_operator(images) else add_out
        with torch.no_grad():
            call(source, noise, where, low, high, limits, self._matrix(out.detach()), backend)
        changed(out)
        return out

    def scatter_(self, index: Tensor, values: Tensor, *, checked: bool = True) -> None:
        """``noise[index] = values``; where a row occurs more than once, its last value stays.

        Args:
            index: int64 ``[B]``.
            values: ``[B, *item_shape]``: fp32, fp16 or fp64 (units), or int8 (steps). An int8 store takes only whole
                steps, within −128..127; a floating-point store only finite values.
            checked: check the values first (on a GPU this waits for them), so that nothing is written if one is
                wrong. If False, an int8 store rounds and clips, and NaN is 0. A compiled graph never checks.

        Raises:
            ValueError: a value that the store cannot hold. Then nothing was written.
        """
        values = self._incoming("values", index, values, checked)
        index = self._local(index)
        if index.numel():
            # Every occurrence of a row writes what its last occurrence brings, so that the order of writes is nothing.
            rows, order = index.sort(stable=True)
            last = order[torch.searchsorted(rows, rows, right=True) - 1]
            source = torch.empty_like(order).scatter_(0, order, last)
            self.data[index] = self._stored(values)[source]

    def scatter_add_clamp_(self, index: Tensor, delta: Tensor, eps: float, *, checked: bool = True) -> None:
        """``noise[index] = (noise[index] + delta).clamp(-eps, eps)`` in one pass.

        Where a row occurs more than once its deltas are added in the order of ``index``, then clamped once.

        Args:
            index: int64 ``[B]``.
            delta: ``[B, *item_shape]``, as the values of :meth:`scatter_`.
            eps: >= 0, in units; an int8 store uses the whole steps in it.
            checked: as for :meth:`scatter_`.
        """
        eps = check.number("eps", eps, low=0.0)
        delta = self._incoming("delta", index, delta, checked)
        index = self._local(index)
        if self.dtype == torch.int8:
            eps = float(min(math.floor(eps * STEPS + 1e-3), 127))
        delta = delta.float() if delta.dtype == torch.float64 else delta
        with torch.no_grad():
            size = math.prod(self.item_shape)
            call = torch.ops.ccu_fast.noise_update_ if check.by_operator(delta) else update
            call(self.data.view(self.rows, size), index, delta.reshape(len(index), size), eps, self._backend)
        changed(self.data)

    def _check_index(self, index: Tensor) -> None:
        check.tensor("index", index, dtypes=(torch.int64,), ndim=1)
        outside_transforms("NoiseStore", index)
        if index.device != self.device and index.device.type != "cpu":
            raise ValueError(f"index: expected device {self.device} (that of the store) or cpu, got {index.device}")

    def _local(self, index: Tensor) -> Tensor:
        check_range("index", "rows", index, self.rows)
        return moved(index, self.device)

    def _rows(self, index: Tensor) -> Tensor:
        self._check_index(index)
        return self.data.index_select(0, self._local(index))

    def _matrix(self, t: Tensor) -> Tensor:
        """``[rows, C, E]``."""
        channels = self.item_shape[0] if self.item_shape else 1
        return t.view(t.shape[0], channels, math.prod(self.item_shape[1:]))

    def _incoming(self, name: str, index: Tensor, values: Tensor, checked: bool) -> Tensor:
        self._check_index(index)
        check.tensor(name, values, dtypes=(torch.int8, *_SLACK))
        outside_transforms("NoiseStore", values)
        check.same(name, values, "the store", self.data, dtype=False)
        check.shape(name, values, (len(index), *self.item_shape))
        values = values.detach().contiguous()
        if values.dtype == torch.int8 or not values.numel():
            return values
        if not checked or values.is_meta or torch.compiler.is_compiling():
            return values.nan_to_num()
        slack = _SLACK[values.dtype] if self.dtype == torch.int8 else None
        first = load("noise_store", self._backend).first_wrong(values, slack)
        if first is None:
            return values
        where = [int(i) for i in torch.unravel_index(torch.tensor(first), values.shape)]
        value = values[tuple(where)].item()
        wanted, in_steps = "finite values", ""
        if slack is not None:
            wanted = "whole steps of 1/255 within -128/255..127/255 for an int8 store"
            in_steps = f" ({value * STEPS:.6g}/255)"
        raise ValueError(f"{name}: expected {wanted}, got {value}{in_steps} at index {where}")

    def _stored(self, values: Tensor) -> Tensor:
        if self.dtype == torch.int8:
            return values if values.dtype == torch.int8 else steps_of(values).clamp(-128, 127).to(torch.int8)
        return (values.float() / STEPS if values.dtype == torch.int8 else values).to(self.dtype)


def _shape(rows: int, item_shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """``[rows, *item_shape]``, if a store can have this shape and dtype."""
    check.integer("rows", rows, low=0)
    shape = (rows, *_item_shape(item_shape))
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected {check.names(DTYPES)}, got {dtype}")
    return shape


def _item_shape(value: Sequence[int]) -> tuple[int, ...]:
    return tuple(check.integer("item_shape", size, low=1) for size in value)


def _limits(images: Tensor, lower: Any, upper: Any) -> tuple[float, float, Tensor | None]:
    """Two numbers in the units of the images, or fp32 ``[2, C]``."""
    values = [
        per_channel(name, value, images) if isinstance(value, Tensor) else check.number(name, value)
        for name, value in (("lower", lower), ("upper", upper))
    ]
    if any(isinstance(value, Tensor) for value in values):
        if images.dtype == torch.uint8:
            name = "lower" if isinstance(lower, Tensor) else "upper"
            raise TypeError(f"{name}: expected a number for uint8 images, got a tensor")
        return 0.0, 0.0, by_channel(values, images, torch.float32)
    low, high = map(float, values)
    if images.dtype == torch.uint8:
        low, high = float(max(math.ceil(low * STEPS - 1e-3), 0)), float(min(math.floor(high * STEPS + 1e-3), STEPS))
    if low > high:
        raise ValueError(f"lower: expected at most upper ({upper}), got {lower}")
    return low, high, None
