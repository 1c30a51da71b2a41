"""Gradient caching in one process: the gradients of the uncached pass, with the same random numbers."""

from __future__ import annotations

import copy
import random
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import ccu_fast
from ccu_fast.distributed import cached_step

pytestmark = pytest.mark.usefixtures("one_thread")


class Changing(MutableMapping[str, Any]):
    """A mapping whose copy shares what it holds."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def towers() -> tuple[nn.Module, nn.Module, nn.Parameter]:
    torch.manual_seed(2)
    image, text = (nn.Sequential(nn.Linear(d, 16), nn.Dropout(0.4), nn.GELU(), nn.Linear(16, 8)) for d in (5, 6))
    return image, text, nn.Parameter(torch.tensor(1.0))


def gradients(*modules: Any) -> list[Tensor]:
    found = [p.grad for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])]
    assert all(g is not None for g in found)
    return found


def uncached(
    image: nn.Module,
    text: nn.Module,
    scale: nn.Parameter,
    x: Tensor,
    y: Tensor,
    chunk: int,
    loss: Callable[..., Tensor],
) -> Tensor:
    """One graph over the same chunks in the same order: the same dropout."""
    z = [torch.cat([tower(part) for part in t.split(chunk)]) for tower, t in ((image, x), (text, y))]
    value = loss(*z)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_gradients_are_those_of_the_uncached_pass(chunk: int) -> None:
    x, y = torch.randn(10, 5), torch.randn(10, 6)
    answers = []
    for cached in (False, True):
        image, text, scale = towers()

        def loss(a: Tensor, b: Tensor, scale: nn.Parameter = scale) -> Tensor:
            return ccu_fast.info_nce(a, b, scale=scale.exp())

        torch.manual_seed(5)
        if cached:
            value = cached_step(loss, [(image, x), (text, y)], chunk)
            assert not value.requires_grad
        else:
            value = uncached(image, text, scale, x, y, chunk, loss)
        answers.append([value, *gradients(image, text, scale), torch.rand(3)])  # the random state after it, too
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)


def test_only_one_chunk_keeps_activations() -> None:
    saved: list[weakref.ref[Tensor]] = []
    calls = []

    class Spy(nn.Linear):
        def forward(self, t: Tensor) -> Tensor:
            calls.append((len(t), torch.is_grad_enabled(), sum(kept() is not None for kept in saved)))
            return super().forward(t)

    def keep(t: Tensor) -> Tensor:
        kept = t.clone()
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        cached_step(lambda z: 2 * z.sum(), [(nn.Sequential(Spy(3, 2), nn.Tanh()), torch.randn(7, 3))], 3)
    # The same kernels in both passes, so both with a graph; none outlives its chunk.
    assert calls == 2 * [(3, True, 0), (3, True, 0), (1, True, 0)] and len(saved) > 6


def test_one_module_for_both_towers_and_nested_inputs() -> None:
    module = nn.Linear(3, 2)
    data = {"a": torch.randn(5, 3), "rest": [torch.randn(5, 3), "kept as it is"]}

    def tower(inputs: dict[str, Any]) -> Tensor:
        assert inputs["rest"][1] == "kept as it is"
        return module(inputs["a"]) * module(inputs["rest"][0])

    z = tower(data)
    ccu_fast.info_nce(z, z, scale=2.0).backward()
    expected = gradients(module)
    module.zero_grad()
    cached_step(lambda a, b: ccu_fast.info_nce(a, b, scale=2.0), [(tower, data), (tower, data)], 2)
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: keys are attributes, too."""

    def __init__(self, data: dict[str, Any], max_length: int = 0) -> None:
        super().__init__(data)
        self.max_length = max_length

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Pair(NamedTuple):
    a: Tensor
    names: list[str]


NESTS: dict[str, Callable[[Tensor, list[str]], Any]] = {
    "a dict of a subclass": lambda a, names: Encoding({"a": a, "names": names}, max_length=7),
    "a mapping that cannot be changed": lambda a, names: MappingProxyType({"a": a, "names": names}),
    "a named tuple": lambda a, names: Pair(a, names),
    "a tuple of strings": lambda a, names: {"a": a, "names": tuple(names)},
    "numbers beside": lambda a, names: {"a": a, "names": names, "size": (224, 224), "power": torch.tensor(2.0)},
    "strings alone": lambda a, names: names,
    "objects": lambda a, names: {"names": [{"name": name} for name in names]},
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS.keys())
def test_what_inputs_may_be(nest: Callable[[Tensor, list[str]], Any]) -> None:
    """Strings and other items are cut with the tensors; the nest keeps its class and what else it carries."""
    words = nn.Embedding(26, 4)
    data = torch.randn(5, 4)
    inputs = nest(data, list("abcde"))

    def tower(part: Any) -> Tensor:
        assert not isinstance(part, Encoding) or (part.max_length, part.a is part["a"]) == (7, True)
        if not isinstance(part, list):
            assert not isinstance(part, dict) or part.get("size", (224, 224)) == (224, 224)
            names = part.names if isinstance(part, Pair) else part["names"]
        else:
            names = part
        assert 0 < len(names) <= 2 or len(names) == 5
        letters = [name["name"] if isinstance(name, dict) else name for name in names]
        z = words(torch.tensor([ord(letter) - ord("a") for letter in letters]))
        if isinstance(part, Pair) or (not isinstance(part, list) and "a" in part):
            z = z * (part.a if isinstance(part, Pair) else part["a"])
            assert len(z) == len(names)
        return z

    tower(inputs).square().sum().backward()
    (expected,) = gradients(words)
    words.zero_grad()
    cached_step(lambda z: z.square().sum(), [(tower, inputs)], 2)
    torch.testing.assert_close(gradients(words)[0], expected)


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: {"input_ids": ids}, lambda ids: (ids, ids)])
def test_token_lists_are_items(wrap: Callable[[list[list[int]]], Any]) -> None:
    """As many lists as a list has tokens, where a cut along the tokens would go unseen."""
    words = nn.EmbeddingBag(9, 4)
    ids = torch.randint(0, 9, (4, 4)).tolist()

    def tower(part: Any) -> Tensor:
        lists = part["input_ids"] if isinstance(part, dict) else part[0] if isinstance(part, tuple) else part
        return words(torch.tensor(lists))

    expected = tower(wrap(ids)).square()[1].sum() + 2 * tower(wrap(ids)).square()[3].sum()
    expected.backward()
    (truth,) = gradients(words)
    words.zero_grad()
    loss = cached_step(lambda z: z.square()[1].sum() + 2 * z.square()[3].sum(), [(tower, wrap(ids))], 2)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients(words)[0], truth)


def test_a_tower_may_write_into_its_inputs() -> None:
    """Both passes get a dict of their own, and what a tower leaves in it is not kept."""
    module, data = nn.Linear(3, 2), {"a": torch.randn(5, 3), "b": torch.ones(5, 1)}

    def tower(part: dict[str, Tensor]) -> Tensor:
        part["made"] = module(part.pop("a")) * part["b"]
        return part["made"]

    module(data["a"]).square().sum().backward()
    expected = gradients(module)
    module.zero_grad()
    cached_step(lambda z: z.square().sum(), [(tower, data)], 2)
    assert set(data) == {"a", "b"}
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        lambda x: {"a": x},
        lambda x: (x, x.clone()),
        lambda x: x.tolist(),
        lambda x: [row.numpy() for row in x],
        lambda x: [{"a": (row.tolist(),)} for row in x],
        lambda x: [OrderedDict(a=row.numpy()) for row in x],
        lambda x: [UserDict(a=row.numpy()) for row in x],
        lambda x: {"a": x.numpy()},
        lambda x: Changing({"a": x}),
    ],
)
def test_a_tower_that_changes_its_inputs_in_place(kind: Callable[[Tensor], Any]) -> None:
    """The second pass would see them changed, and give other gradients without a word."""
    module, data = nn.Linear(3, 2), torch.randn(5, 3)

    def double(part: Any) -> list[Tensor]:
        if isinstance(part, (Tensor, np.ndarray)):
            part *= 2
            return [torch.as_tensor(part)]
        if isinstance(part, list) and isinstance(part[0], float):
            part[:] = [2 * v for v in part]
            return [torch.tensor(part)]
        rows = [double(each)[0] for each in (part.values() if isinstance(part, Mapping) else part)]
        return rows if isinstance(part, list) else rows[:1]

    def tower(part: Any) -> Tensor:
        rows = double(part)
        return module(torch.stack(rows) if len(rows) > 1 or rows[0].ndim == 1 else rows[0])

    module(2 * data).square().sum().backward()
    expected = gradients(module)
    module.zero_grad()
    loss = cached_step(lambda z: z.square().sum(), [(tower, kind(data.clone()))], 2)
    torch.testing.assert_close(loss, module(2 * data).square().sum().detach())
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


def test_what_stands_twice_in_the_inputs_still_does() -> None:
    module, x = nn.Linear(3, 2), torch.randn(5, 3)

    def tower(part: Any) -> Tensor:
        part[0].mul_(2)
        return module(part[1])

    module(2 * x).square().sum().backward()
    expected = gradients(module)
    module.zero_grad()
    cached_step(lambda z: z.square().sum(), [(tower, (x, x))], 2)
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


def test_arrays_in_a_nest_are_cut() -> None:
    module, x, w = nn.Linear(3, 2), torch.randn(5, 3), np.arange(5.0, dtype=np.float32)

    def tower(part: dict[str, Any]) -> Tensor:
        return torch.stack([module(row) * float(weight) for row, weight in zip(part["x"], part["w"], strict=True)])

    expected = tower({"x": x, "w": w}).square().sum()
    torch.testing.assert_close(cached_step(lambda z: z.square().sum(), [(tower, {"x": x, "w": w})], 2), expected)
    with pytest.raises(ValueError, match=r"the same number of items, got \[5, 6\]"):
        cached_step(lambda z: z.sum(), [(tower, {"x": x, "w": np.arange(6)})], 2)


DRAWS = {
    "torch": lambda generator: torch.rand(2, 3),
    "numpy": lambda generator: torch.from_numpy(np.random.rand(2, 3)).float(),
    "python": lambda generator: torch.tensor([[random.random() for _ in range(3)] for _ in range(2)]),
    "generator": lambda generator: torch.rand(2, 3, generator=generator),
}
GENERATORS = {
    "numpy": (lambda: np.random.default_rng(3), lambda g: torch.from_numpy(g.random((2, 3))).float()),
    "old numpy": (lambda: np.random.RandomState(3), lambda g: torch.from_numpy(g.rand(2, 3)).float()),
    "python": (lambda: random.Random(3), lambda g: torch.tensor([[g.random() for _ in range(3)] for _ in range(2)])),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_every_kind_among_the_inputs(kind: str) -> None:
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    make, draw = GENERATORS[kind]
    generator = make()
    z = torch.cat([module(part * draw(generator)) for part in (x[:2], x[2:])])
    z.square().sum().backward()
    expected, place = gradients(module), draw(generator)
    module.zero_grad()
    again = make()
    towers = [(lambda part: module(part[0] * draw(part[1]["g"])), (x, {"g": again}))]
    cached_step(lambda z: z.square().sum(), towers, 2)
    for got, truth in zip([*gradients(module), draw(again)], [*expected, place], strict=True):
        torch.testing.assert_close(got, truth)


def test_other_kernels_and_rounding_are_no_other_results() -> None:
    """Without a graph this encoder leaves zeros where there is padding; a frozen copy differs by rounding alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(8, 6, 16)
    padded = torch.zeros(8, 6, dtype=torch.bool)
    padded[::2, 3:] = True
    frozen = copy.deepcopy(encoder).requires_grad_(False)

    def tower(part: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = encoder(part["x"], src_key_padding_mask=part["padded"])
        mean = encoder(part["x"]).mean(1)
        return {
            "hidden": hidden,
            "padded": part["padded"],
            "difference": mean - frozen(part["x"]).mean(1),
            "rounding": hidden.mean(-1),
        }

    def loss(out: dict[str, Tensor]) -> Tensor:
        return (out["hidden"] * ~out["padded"][..., None]).sum(1).sin().sum() + out["difference"].square().sum()

    inputs = {"x": x, "padded": padded}
    loss(tower(inputs)).backward()
    expected = gradients(*encoder.parameters())
    encoder.zero_grad()
    for chunk in (1, 4):
        encoder.zero_grad()
        cached_step(loss, [(tower, inputs)], chunk)
        for got, truth in zip(gradients(*encoder.parameters()), expected, strict=True):
            torch.testing.assert_close(got, truth, atol=2e-5, rtol=1e-4)
    encoder.bfloat16(), frozen.bfloat16()
    score = nn.Linear(16, 1).bfloat16()
    cached_step(lambda z: z.sum(), [(lambda t: score(encoder(t).mean(1))[:, 0], x.bfloat16())], 1)


@pytest.mark.parametrize("source", DRAWS)
def test_both_passes_have_the_same_random_numbers(source: str) -> None:
    """Of the masks of SpecAugment, say, which numpy draws."""
    module, x, generator = nn.Linear(3, 2), torch.randn(4, 3), torch.Generator().manual_seed(3)

    def tower(part: tuple[Tensor, torch.Generator]) -> Tensor:
        return module(part[0] * DRAWS[source](part[1]))

    def seed() -> None:
        torch.manual_seed(0), np.random.seed(0), random.seed(0), generator.manual_seed(3)

    seed()
    z = torch.cat([tower((x[:2], generator)), tower((x[2:], generator))])
    z.square().sum().backward()
    expected = gradients(module)
    module.zero_grad()
    seed()
    cached_step(lambda z: z.square().sum(), [(tower, (x, generator))], 2)
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


def test_a_second_pass_that_gives_other_results_is_refused() -> None:
    module, own, calls = nn.Linear(3, 2), torch.Generator(), []

    def counts(x: Tensor) -> Tensor:
        calls.append(0)
        return module(x) * len(calls)

    def draws(x: Tensor) -> Tensor:
        return module(x * torch.rand(x.shape, generator=own))

    def late(factor: float) -> Callable[[Tensor], Tensor]:
        seen: list[int] = []

        def run(x: Tensor) -> Tensor:
            seen.append(0)
            z = module(x)
            return torch.cat([z[:1], z[1:] * factor]) if len(seen) > 2 else z

        return run

    huge = [lambda x, size=size: counts(x) * size for size in (1e25, 1e-25)]
    once = [late(float("nan")), late(float("inf")), late(0.0), late(1.01)]
    for tower in (counts, draws, nn.utils.spectral_norm(nn.Linear(3, 2)), *huge, *once):
        with pytest.raises(RuntimeError, match=r"towers\[0\]: expected the same results from both passes"):
            cached_step(lambda z: z.square().sum(), [(tower, torch.randn(4, 3))], 2)
    assert module.weight.grad is None


def test_a_tower_that_returns_a_buffer_of_its_own() -> None:
    module, x, buffer = nn.Linear(3, 2), torch.randn(6, 3), torch.empty(2, 2)

    def tower(part: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            buffer.copy_(part[:, :2])
        return module(part), buffer

    expected = (module(x) * x[:, :2]).sum()
    loss = cached_step(lambda out: (out[0] * out[1]).sum(), [(tower, x)], 2)
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("learning", [[0, 1], [2, 3], [1, 2]])
def test_a_tower_of_which_some_chunks_learn(learning: list[int]) -> None:
    """Rows without a picture stay zero, and a chunk may have no other."""
    module, x, has = nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4, dtype=torch.bool)
    has[learning] = True

    def tower(part: dict[str, Tensor]) -> Tensor:
        out = torch.zeros(len(part["x"]), 2)
        if part["has"].any():
            out[part["has"]] = module(part["x"][part["has"]])
        return out

    (tower({"x": x, "has": has}) - 1).square().sum().backward()
    expected = gradients(module)
    module.zero_grad()
    cached_step(lambda z: (z - 1).square().sum(), [(tower, {"x": x, "has": has})], 2)
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


def test_the_gradient_of_inputs_that_learn() -> None:
    prompts, module = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 2)
    module(prompts).square().sum().backward()
    expected = gradients(prompts)
    prompts.grad = None
    cached_step(lambda z: z.square().sum(), [(module, prompts)], 2)
    torch.testing.assert_close(gradients(prompts), expected)


def test_a_number_that_is_none_for_every_chunk() -> None:
    tower = nn.Linear(3, 2)
    cached_step(lambda out: out[0].sum(), [(lambda x: (tower(x), torch.tensor(float("nan"))), torch.randn(4, 3))], 2)


def test_towers_that_return_more_than_one_tensor() -> None:
    """A whole model as one tower: both embeddings, a scale, and a mask that has no gradient."""
    image, text, scale = towers()
    image.eval(), text.eval()
    data = {"image": torch.randn(5, 5), "text": torch.randn(5, 6)}

    def model(part: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any], Tensor]:
        mask = part["text"][:, :1] > 0
        return image(part["image"]), {"text": text(part["text"]), "mask": mask, "pooled": None}, scale.exp()

    def loss(out: tuple[Tensor, dict[str, Any], Tensor]) -> Tensor:
        assert out[1]["pooled"] is None and len(out[1]["mask"]) == 5
        return ccu_fast.info_nce(out[0], out[1]["text"] * out[1]["mask"], scale=out[2])

    loss(model(data)).backward()
    expected = gradients(image, text, scale)
    for p in (*image.parameters(), *text.parameters(), scale):
        p.grad = None
    cached_step(loss, [(model, data)], 2)
    for got, truth in zip(gradients(image, text, scale), expected, strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tower_has_no_second_pass(frozen: int) -> None:
    modules, calls = [nn.Linear(3, 2), nn.Linear(3, 2)], [0, 0]
    modules[frozen].requires_grad_(False)
    inputs = [torch.randn(5, 3) for _ in modules]

    def tower(t: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls[t] += 1
            return modules[t](x)

        return run

    def loss(a: Tensor, b: Tensor) -> Tensor:
        assert [a.requires_grad, b.requires_grad] == [frozen != 0, frozen != 1]
        return ccu_fast.info_nce(a, b, scale=2.0)

    ccu_fast.info_nce(modules[0](inputs[0]), modules[1](inputs[1]), scale=2.0).backward()
    expected = gradients(modules[1 - frozen])
    modules[1 - frozen].zero_grad()
    cached_step(loss, [(tower(0), inputs[0]), (tower(1), inputs[1])], 2)
    for got, truth in zip(gradients(modules[1 - frozen]), expected, strict=True):
        torch.testing.assert_close(got, truth)
    assert calls[frozen] == 3 and calls[1 - frozen] == 6


def test_a_wrapped_module_exchanges_once_though_the_last_tower_is_frozen() -> None:
    """As DistributedDataParallel, which exchanges in every backward pass that is not inside ``no_sync``."""

    class Wrapped(nn.Linear):
        silent, exchanges = False, 0

        @contextmanager
        def no_sync(self) -> Iterator[None]:
            before, self.silent = self.silent, True
            yield
            self.silent = before

        def forward(self, x: Tensor) -> Tensor:
            z, silent = super().forward(x), self.silent

            def count(_: Tensor) -> None:
                self.exchanges += not silent

            if z.requires_grad:
                z.register_hook(count)
            return z

    module, x = Wrapped(3, 2), torch.randn(5, 3)
    towers = [(lambda t: module(t), x), (lambda t: module(t).detach(), x)]
    cached_step(lambda a, b: ccu_fast.info_nce(a, b, scale=2.0), towers, 2, wrapped=[module])
    assert module.exchanges == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z: "text", r"towers\[1\]: expected a callable that returns tensors, got none"),
        (lambda z: (z, "text"), r"towers\[1\]: expected a callable that returns tensors, got str"),
        (lambda z: z[:1], r"towers\[1\]: expected .* one entry for each of 2 items, got a tensor \[1, 2\]"),
        (lambda z: (z, z.sum()), r"towers\[1\]: expected a tensor without dimensions to be the same for every chunk"),
        (lambda z: 1 / 0, "division by zero"),
    ],
)
def test_nothing_is_written_by_a_step_that_fails(answer: Callable[[Tensor], Any], message: str) -> None:
    fine, bad, scale = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.tensor(1.0))
    x = torch.randn(4, 3)
    with pytest.raises((TypeError, ValueError, ZeroDivisionError), match=message):
        cached_step(lambda a, b: scale * a.sum(), [(fine, x), (lambda t: answer(bad(t)), x)], 2)
    assert all(p.grad is None for p in (*fine.parameters(), *bad.parameters(), scale))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), r"towers\[0\]: expected the same shape .*, got \[2, 3\] and \[2, 4\]"),
        ((torch.ones(2, 3), None), r"towers\[0\]: expected None from every chunk or from none"),
        ((None, torch.ones(2, 3)), r"towers\[0\]: expected None from every chunk or from none"),
        ((torch.ones(2), torch.tensor(1.0)), r"towers\[0\]: expected the same shape"),
        (({"a": torch.ones(2), "b": torch.ones(2)}, {"b": torch.ones(2), "a": torch.ones(2)}), r"the same nest"),
    ],
)
def test_chunks_that_do_not_fit_together(answers: tuple[Any, Any], message: str) -> None:
    left = list(answers)
    with pytest.raises(ValueError, match=message):
        cached_step(lambda out: out[0].sum(), [(lambda x: (x, left.pop(0)), torch.randn(4, 3))], 2)


@pytest.mark.parametrize(("answer", "told"), [(lambda z: 1.0, "float"), (lambda z: z, r"\[4, 2\]")])
def test_a_loss_that_is_none(answer: Callable[[Tensor], Any], told: str) -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=rf"loss_fn: expected .* a tensor without dimensions, got {told} from it"):
        cached_step(answer, [(module, torch.randn(4, 3))], 2)
    assert module.weight.grad is None


def test_the_random_state_goes_on_after_a_second_pass_that_fails() -> None:
    module, calls = nn.Linear(3, 2), []

    def tower(x: Tensor) -> Tensor:
        calls.append(torch.rand(()))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return module(x)

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_step(lambda a: a.sum(), [(tower, torch.randn(4, 3))], 2)
    after = torch.rand(())
    torch.manual_seed(0)
    torch.randn(4, 3)
    assert calls[0] == calls[2] == torch.rand(()) and calls[1] == torch.rand(()) and after == torch.rand(())


def test_a_scaled_backward_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (clear(), cleared.append(True)))
    module, x = nn.Linear(3, 2), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        module(x).square().sum().backward()
    expected = [8 * g for g in gradients(module)]
    module.zero_grad()
    cleared.clear()
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(lambda z: z.square().sum(), [(module, x)], 2, backward=lambda loss: (8 * loss).backward())
        assert cleared == [True]  # of weights that were cast without a graph
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=0.02, atol=0.02)


def test_a_tower_the_loss_does_not_use() -> None:
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    cached_step(lambda a, b: a.sum(), [(used, torch.randn(4, 3)), (unused, torch.randn(4, 3))], 2)
    assert all(bool(g.any()) for g in gradients(used))
    assert not any(bool(g.any()) for g in gradients(unused))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), "towers: expected at least one pair"),
        (([(nn.Linear(3, 2), torch.randn(4, 3))], 0), "chunk: expected an int at least 1, got 0"),
        (
            ([(nn.Linear(3, 2), [torch.randn(4, 3), torch.randn(5, 3)])], 2),
            r"towers\[0\]: expected tensors and lists with the same number of items, got \[4, 5\]",
        ),
        (([(nn.Linear(3, 2), "text")], 2), r"towers\[0\]: expected inputs with tensors or lists"),
        (([(nn.Linear(3, 2), {"a": torch.randn(4, 3), "names": ["a", "b"]})], 2), r"items, got \[2, 4\]"),
        (([(nn.Linear(3, 2), pack_sequence([torch.ones(2), torch.ones(1)]))], 2), "got a PackedSequence"),
        (([(nn.Linear(3, 2), nn.Parameter(torch.ones(4, 3)) * 2)], 2), r"towers\[0\]: expected inputs without a graph"),
        (([(nn.Linear(3, 2), (torch.ones(4, 3), nn.Parameter(torch.ones(())).exp()))], 2), "inputs without a graph"),
        (([(nn.Linear(3, 2), torch.eye(3).to_sparse())], 2), r"towers\[0\]: expected inputs of dense tensors, got"),
        (([nn.Linear(3, 2)], 2), r"towers\[0\]: expected a pair of a callable and its inputs, got Linear"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cached_step(lambda z: z.sum(), *arguments)
