"""NoiseStore against its three formulas in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ccu_fast import NoiseStore, pgd_step_
from ccu_fast.ops.machine import PACKAGE, moved

ITEM = (3, 5, 7)
DTYPES = (torch.int8, torch.float16, torch.float32)
IMAGES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


def steps(*shape: int, most: int = 8) -> Tensor:
    return torch.randint(-most, most + 1, shape, dtype=torch.int8)


def filled(dtype: torch.dtype, backend: str, rows: int = 11, item: tuple[int, ...] = ITEM) -> NoiseStore:
    store = NoiseStore(rows, item, dtype=dtype, backend=backend)
    store.scatter_(torch.arange(rows), steps(rows, *item))
    return store


def pictures(dtype: torch.dtype, *shape: int) -> Tensor:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)


def test_only_copies_towards_a_gpu_are_not_waited_for() -> None:
    """A copy from a GPU that nobody waits for would be read, on the next line, before it has arrived."""
    seen: list[tuple[str, bool]] = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to:
                seen.append((args[1].type, kwargs["non_blocking"]))
                return args[0]
            return func(*args, **(kwargs or {}))

    with Copies():
        for device in ("cpu", "cuda", "mps"):
            moved(torch.zeros(2), torch.device(device))
    assert seen == [("cpu", False), ("cuda", True), ("mps", False)]
    assert [path.name for path in PACKAGE.rglob("*.py") if "non_blocking" in path.read_text()] == ["machine.py"]


@pytest.mark.gpu
def test_noise_of_a_gpu_on_images_of_the_host() -> None:
    store = NoiseStore(64, (3, 64, 64), dtype=torch.int8, device="cuda")
    index = torch.arange(64, device="cuda")
    store.scatter_(index, torch.randint(-8, 9, (64, 3, 64, 64), dtype=torch.int8, device="cuda"))
    images = torch.full((64, 3, 64, 64), 0.5)
    noisy = images + store.data.cpu().float() / 255
    torch.cuda._sleep(100_000_000)  # what is read without waiting for the GPU is then from before the copy
    torch.testing.assert_close(store.add_to(images, index), noisy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("item", [(), (1,), (3, 2)], ids=str)
@pytest.mark.parametrize(("rows", "batch"), [(0, 0), (4, 0), (4, 3)])
def test_no_rows_no_images_and_images_of_one_number(
    rows: int, batch: int, item: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    store = NoiseStore(rows, item, dtype=dtype, backend=backend)
    index = torch.arange(batch)
    store.scatter_(index, steps(batch, *item, most=4))
    store.scatter_add_clamp_(index, steps(batch, *item, most=4), 6 / 255)
    most = 6.01 / 255 if dtype != torch.float16 else 6.1 / 255
    assert store.gather(index).shape == (batch, *item) and bool((store.gather(index).abs() <= most).all())
    lower = torch.full([item[0] if item else 1, *[1] * (len(item) - 1)], 0.51)
    images = torch.full((batch, *item), 0.5)
    want = (images + store.gather(index)).clamp(0.51, 1)
    torch.testing.assert_close(store.add_to(images, index, lower=lower), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_scattered_is_gathered(backend: str, dtype: torch.dtype) -> None:
    store, noise = NoiseStore(6, ITEM, dtype=dtype, backend=backend), steps(4, *ITEM, most=127)
    index = torch.tensor([5, 0, 3, 2])
    for values in (noise, noise.float() / 255, noise.double() / 255, (noise.float() / 255).half()):
        store.scatter_(index, values)
        want = (noise.float() / 255).to(torch.float32 if values.dtype != torch.float16 else torch.float16)
        if dtype == torch.int8:
            assert torch.equal(store.gather(index, dtype=torch.int8), noise)
        else:
            assert torch.equal(store.gather(index), want.to(dtype).float())
        assert not store.gather(torch.tensor([1, 4])).any()
    assert store.gather(index).dtype == torch.float32
    assert store.gather(torch.tensor([3, 3]), dtype=torch.bfloat16).shape == (2, *ITEM)
    assert store.gather(torch.empty(0, dtype=torch.int64)).shape == (0, *ITEM)


@pytest.mark.parametrize("image_dtype", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("item", [ITEM, (1,), (2, 64), (3, 33, 40)])
def test_add_to(backend: str, dtype: torch.dtype, image_dtype: torch.dtype, item: tuple[int, ...]) -> None:
    store = filled(dtype, backend, item=item)
    index = torch.tensor([4, 4, 0, 10])
    images = pictures(image_dtype, 4, *item)
    before = images.clone()
    got = store.add_to(images, index)
    assert torch.equal(images, before) and got.dtype == image_dtype
    if image_dtype == torch.uint8:
        whole = (store.gather(index) * 255).round().int()
        expected = (images.int() + whole).clamp(0, 255).to(torch.uint8)
    else:
        expected = (images.float() + store.gather(index)).clamp(0, 1).to(image_dtype)
    assert torch.equal(got, expected)
    out = torch.empty_like(images)
    assert store.add_to(images, index, out=out) is out and torch.equal(out, expected)
    assert store.add_to(images, index, out=images) is images and torch.equal(images, expected)


def test_bounds(backend: str) -> None:
    store, index = filled(torch.int8, backend), torch.tensor([1, 2])
    noise = store.gather(index)
    images = pictures(torch.float32, 2, *ITEM)
    assert torch.equal(store.add_to(images, index, lower=0.25, upper=0.5), (images + noise).clamp(0.25, 0.5))
    std, mean = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    normal = (images - mean) / std
    got = store.add_to(normal, index, lower=-mean / std, upper=(1 - mean) / std)
    assert torch.equal(got, (normal + noise).clamp(-mean / std, (1 - mean) / std))
    got = store.add_to(normal, index, lower=-1.0, upper=(1 - mean) / std)
    assert torch.equal(got, (normal + noise).clamp(torch.full((3, 1, 1), -1.0), (1 - mean) / std))
    pixels = pictures(torch.uint8, 2, *ITEM)
    got = store.add_to(pixels, index, lower=10 / 255, upper=100 / 255)
    assert torch.equal(got, (pixels.int() + store.gather(index, dtype=torch.int8)).clamp(10, 100).to(torch.uint8))


def test_images_of_any_layout(backend: str) -> None:
    store, index = filled(torch.int8, backend), torch.tensor([1, 2])
    images = pictures(torch.float32, 2, *ITEM)
    expected = store.add_to(images, index)
    assert torch.equal(store.add_to(images.contiguous(memory_format=torch.channels_last), index), expected)
    with pytest.raises(ValueError, match="out: expected contiguous memory"):
        store.add_to(images, index, out=torch.empty_like(images).contiguous(memory_format=torch.channels_last))
    assert not store.add_to(images.requires_grad_(), index).requires_grad


@pytest.mark.parametrize("change", ["scatter_", "scatter_add_clamp_", "add_to"])
def test_a_graph_that_needs_the_old_values_raises(backend: str, change: str) -> None:
    store, index, out = NoiseStore(2, (4,), dtype=torch.float32, backend=backend), torch.tensor([1]), torch.rand(1, 4)
    weight, kept = torch.ones(4, requires_grad=True), out if change == "add_to" else store.data
    loss = (weight * kept).sum()
    if change == "scatter_":
        store.scatter_(index, torch.rand(1, 4))
    elif change == "scatter_add_clamp_":
        store.scatter_add_clamp_(index, torch.rand(1, 4), 1.0)
    else:
        store.add_to(torch.rand(1, 4), index, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"^out: expected contiguous memory that does not require grad"):
        store.add_to(torch.rand(1, 4), index, out=torch.rand(1, 4, requires_grad=True))


def test_the_last_value_of_a_row_stays(backend: str) -> None:
    store, values = NoiseStore(3, (4,), backend=backend), steps(6, 4)
    store.scatter_(torch.tensor([1, 2, 1, 0, 2, 1]), values)
    assert torch.equal(store.data, values[[3, 5, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", [torch.int8, torch.float32, torch.float16, torch.float64])
def test_scatter_add_clamp(backend: str, dtype: torch.dtype, delta_dtype: torch.dtype) -> None:
    store = filled(dtype, backend)
    index = torch.tensor([7, 2, 7, 7, 0, 2])
    delta = steps(6, *ITEM)
    given = delta if delta_dtype == torch.int8 else (delta.float() / 255).to(delta_dtype)
    expected = store.data.clone()
    for row in (0, 2, 7):
        total = expected[row].int() if dtype == torch.int8 else expected[row].float()
        for b in (index == row).nonzero()[:, 0]:
            step = delta[b].float() / 255 if delta_dtype == torch.int8 else given[b].float()
            total = total + (delta[b] if dtype == torch.int8 else step)
        bound: Any = 8 if dtype == torch.int8 else torch.tensor(8 / 255)
        expected[row] = total.clamp(-bound, bound).to(dtype)
    store.scatter_add_clamp_(index, given, 8 / 255)
    assert torch.equal(store.data, expected)


@pytest.mark.parametrize("size", [256, 257], ids=["packs", "one_by_one"])
def test_every_step_is_rounded_right(backend: str, size: int) -> None:
    store = NoiseStore(1, (size,), backend=backend)
    noise = (torch.arange(size) - 128).clamp(max=127).to(torch.int8)[None]
    index = torch.tensor([0])
    store.scatter_(index, noise)
    added = store.add_to(torch.zeros(1, size), index, lower=-1.0, upper=1.0)
    assert torch.equal(added, (noise.double() / 255).float())
    sums = NoiseStore(1, (size,), dtype=torch.float32, backend=backend)
    sums.scatter_add_clamp_(index, noise, 1.0)
    assert torch.equal(sums.data, (noise.double() / 255).float())


def test_eps_means_whole_steps(backend: str) -> None:
    store = NoiseStore(1, (1,), backend=backend)
    for eps, most in ((8 / 255, 8), (0.03, 7), (0.0, 0), (1.0, 127)):
        store.scatter_add_clamp_(torch.tensor([0, 0]), torch.full((2, 1), 127, dtype=torch.int8), eps)
        assert store.data.item() == most
        store.scatter_add_clamp_(torch.tensor([0, 0]), torch.full((2, 1), -128, dtype=torch.int8), eps)
        assert store.data.item() == -most


@pytest.mark.parametrize("method", ["scatter_", "scatter_add_clamp_"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(0.5 / 255, r"expected whole steps.*\(0.5/255\)"), (128 / 255, "expected whole steps"), (torch.nan, "got nan")],
)
def test_an_int8_store_refuses_what_it_cannot_hold(backend: str, method: str, value: float, message: str) -> None:
    store = filled(torch.int8, backend)
    before, values = store.data.clone(), torch.zeros(2, *ITEM)
    values[1, 2, 0, 3] = value
    extra = () if method == "scatter_" else (8 / 255,)
    name = "values" if method == "scatter_" else "delta"
    with pytest.raises(ValueError, match=rf"^{name}: {message}|^{name}: .*{message}.* at index \[1, 2, 0, 3\]"):
        getattr(store, method)(torch.tensor([0, 1]), values, *extra)
    assert torch.equal(store.data, before)
    getattr(store, method)(torch.tensor([0, 1]), values, *extra, checked=False)


def test_noise_that_a_pgd_step_made_is_whole(backend: str) -> None:
    image, delta = torch.rand(2, 3, 50, 50), torch.zeros(2, 3, 50, 50)
    image = (image * 255).round() / 255
    for _ in range(10):
        pgd_step_(delta, torch.randn_like(delta), image, step=1 / 255, eps=8 / 255)
    store = NoiseStore(2, (3, 50, 50), backend=backend)
    store.scatter_(torch.arange(2), delta)
    assert torch.equal(store.gather(torch.arange(2), dtype=torch.int8), (delta * 255).round().to(torch.int8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: NoiseStore(-1, (2,)), ValueError, "rows: expected an int at least 0"),
        (lambda s: NoiseStore(2, (0,)), ValueError, "item_shape: expected an int at least 1"),
        (lambda s: NoiseStore(2, (2,), dtype=torch.int16), TypeError, "dtype: expected int8 or float16 or float32"),
        (lambda s: s.gather([0]), TypeError, "index: expected a torch.Tensor"),
        (lambda s: s.gather(torch.tensor([0.0])), TypeError, "index: expected dtype int64"),
        (lambda s: s.gather(torch.tensor(0)), ValueError, "index: expected 1 dimensions"),
        (lambda s: s.gather(torch.tensor([11])), ValueError, r"index: expected rows in \[0, 10\], got 11"),
        (lambda s: s.gather(torch.tensor([-1])), ValueError, r"index: expected rows in \[0, 10\], got -1"),
        (lambda s: s.gather(torch.tensor([0]), dtype=torch.int32), TypeError, "dtype: expected"),
        (lambda s: s.add_to(torch.rand(1, *ITEM), torch.tensor([11])), ValueError, "index: expected rows"),
        (lambda s: s.add_to(torch.rand(2, *ITEM), torch.tensor([1])), ValueError, r"images: expected shape \[1, 3"),
        (lambda s: s.add_to(torch.rand(1, *ITEM).int(), torch.tensor([1])), TypeError, "images: expected dtype"),
        (lambda s: s.add_to(torch.rand(1, *ITEM), torch.tensor([1]), lower=2.0), ValueError, "lower: expected at most"),
        (
            lambda s: s.add_to(pictures(torch.uint8, 1, *ITEM), torch.tensor([1]), lower=torch.zeros(3, 1, 1)),
            TypeError,
            "lower: expected a number for uint8",
        ),
        (
            lambda s: s.add_to(torch.rand(1, *ITEM), torch.tensor([1]), out=torch.rand(1, *ITEM).half()),
            TypeError,
            "out: expected dtype",
        ),
        (lambda s: s.scatter_(torch.tensor([12]), steps(1, *ITEM)), ValueError, "index: expected rows"),
        (lambda s: s.scatter_(torch.tensor([1]), steps(1, 3, 5, 6)), ValueError, "values: expected shape"),
        (lambda s: s.scatter_(torch.tensor([1]), steps(1, *ITEM).int()), TypeError, "values: expected dtype"),
        (lambda s: s.scatter_add_clamp_(torch.tensor([1]), steps(1, *ITEM), -1.0), ValueError, "eps: expected"),
        (lambda s: s.scatter_add_clamp_(torch.tensor([-1]), steps(1, *ITEM), 1.0), ValueError, "index: expected rows"),
    ],
)
def test_bad_arguments(backend: str, call: Any, error: type[Exception], message: str) -> None:
    store = filled(torch.int8, backend)
    before = store.data.clone()
    with pytest.raises(error, match=f"^{message}"):
        call(store)
    assert torch.equal(store.data, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    noise = filled(dtype, backend).data.view(11, 3, 35)
    index, images = torch.tensor([3, 3, 9]), torch.rand(3, 3, 35)
    limits = torch.tensor([[0.0, 0.1, 0.2], [1.0, 0.9, 0.8]])
    ops = torch.ops.ccu_fast
    for bounds, out in ((None, torch.empty_like(images)), (limits, torch.empty_like(images)), (None, images)):
        torch.library.opcheck(ops.noise_add_out.default, (images, noise, index, 0.0, 1.0, bounds, out, backend))
    torch.library.opcheck(ops.noise_update_.default, (noise.view(11, -1), index, steps(3, 105), 8.0, backend))


def test_compiles_as_one_graph(backend: str) -> None:
    store, other = filled(torch.int8, backend), filled(torch.int8, backend)
    other.data.copy_(store.data)

    def f(store: NoiseStore, images: Tensor, index: Tensor) -> Tensor:
        store.scatter_add_clamp_(index, torch.ones(2, *ITEM, dtype=torch.int8), 8 / 255)
        return store.add_to(images * 2, index) + 1

    images, index = pictures(torch.float32, 2, *ITEM), torch.tensor([3, 5])
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(store, images, index)
    assert torch.equal(got, f(other, images, index))
    assert torch.equal(store.data, other.data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(native: str, dtype: torch.dtype) -> None:
    item, index = (3, 130, 129), torch.tensor([2, 0, 2, 1, 2])
    images, delta = pictures(torch.float32, 5, *item), steps(5, *item)
    start, before, results = filled(dtype, native, 3, item), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        store = NoiseStore(3, item, dtype=dtype, backend=native)
        store.data.copy_(start.data)
        torch.set_num_threads(threads)
        try:
            store.scatter_add_clamp_(index, delta, 8 / 255)
            results.append((store.data, store.add_to(images, index)))
        finally:
            torch.set_num_threads(before)
    for data, added in results[1:]:
        assert torch.equal(data, results[0][0]) and torch.equal(added, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_dtype", IMAGES)
@pytest.mark.parametrize("item", [ITEM, (3, 32, 32)])
def test_the_cuda_kernels_have_the_bits_of_the_cpu(
    native: str, dtype: torch.dtype, image_dtype: torch.dtype, item: tuple[int, ...]
) -> None:
    here = filled(dtype, "reference", 11, item)
    there = NoiseStore(11, item, dtype=dtype, device="cuda", backend=native)
    there.data.copy_(here.data)
    index, images, delta = torch.tensor([4, 4, 0, 10]), pictures(image_dtype, 4, *item), steps(4, *item)
    lower = 0.1 if image_dtype == torch.uint8 else torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    far = lower.cuda() if isinstance(lower, Tensor) else lower
    assert torch.equal(
        there.add_to(images.cuda(), index.cuda(), lower=far).cpu(), here.add_to(images, index, lower=lower)
    )
    assert torch.equal(here.add_to(images.cuda(), index, lower=far).cpu(), here.add_to(images, index, lower=lower))
    here.scatter_add_clamp_(index, delta, 8 / 255)
    there.scatter_add_clamp_(index.cuda(), delta.cuda(), 8 / 255)
    assert torch.equal(there.data.cpu(), here.data)
    there.scatter_(index.cuda(), delta.cuda())
    here.scatter_(index, delta)
    assert torch.equal(there.data.cpu(), here.data)
