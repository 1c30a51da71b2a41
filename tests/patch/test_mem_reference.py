"""The MEM authors' functions, patched: a plain transcription of them, and their code if a copy is available.

CCU_FAST_MEM_REFERENCE names a checkout of github.com/thinwayliu/Multimodal-Unlearnable-Examples.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from functools import partial, wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from tests.support import torchvision_stub
from tests.support.drop_in import counted, left_alone, record, same_numbers, same_training, speed, train_towers, unit

CHECKOUT = os.environ.get("CCU_FAST_MEM_REFERENCE")
N, LENGTH, V, WORDS = 10, 12, 120, 3
OPTIONS = SimpleNamespace(inmodal=False, distributed=False, unlearn=False, device="cpu", constraint_weight=0.25)


@dataclass
class Authors:
    """Where the functions are: in one module here, in three of the authors'."""

    loss: ModuleType
    hotflip: ModuleType
    search: ModuleType
    noise: ModuleType


@pytest.fixture(scope="module", params=["transcription", "authors"])
def authors(request: pytest.FixtureRequest) -> Any:
    if request.param == "transcription":
        module = importlib.import_module("tests.support.mem_authors")
        yield Authors(module, module, module, module)
        sys.modules.pop("tests.support.mem_authors")
        return
    if CHECKOUT is None:
        pytest.skip("CCU_FAST_MEM_REFERENCE does not name a checkout of the authors' code")
    before = set(sys.modules)
    torchvision_stub.stand_in("wandb", "textcolor", "ftfy")
    sys.path.insert(0, CHECKOUT)
    modules = {name: importlib.import_module(f"src.{name}") for name in ("utils", "attacks", "poison_train")}
    yield Authors(modules["utils"], modules["attacks"], modules["utils"], modules["poison_train"])
    sys.path.remove(CHECKOUT)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("src", "pkgs"):
            del sys.modules[name]


class Clip(nn.Module):
    """A small CLIP with the methods of the authors' one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.text, self.visual = nn.Embedding(V, 16), nn.Linear(16, 12), nn.Linear(3 * 8 * 8, 12)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        value: Tensor = self.visual(pixel_values.flatten(1)).tanh()
        return value

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        place = torch.arange(1, input_ids.shape[1] + 1, dtype=self.words.weight.dtype)[:, None]
        value: Tensor = self.text((self.words(input_ids) / place).sum(1).tanh())
        return value

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> SimpleNamespace:
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        image, text = (t / t.norm(dim=-1, keepdim=True) for t in (image, text))
        return SimpleNamespace(image_embeds=image, text_embeds=text)


def model() -> Clip:
    torch.manual_seed(0)
    return Clip()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(0, V, (N, LENGTH)),
        "attention_mask": torch.ones(N, LENGTH, dtype=torch.int64),
        "pixel_values": torch.randn(N, 3, 8, 8),
    }


def test_get_loss_has_the_same_numbers(authors: Authors) -> None:
    def problem(dtype: torch.dtype) -> Any:
        x, y = (unit(N, 12, seed=i, dtype=dtype).requires_grad_() for i in (1, 2))
        scale = torch.tensor(3.0, dtype=dtype).requires_grad_()
        owner, outputs = SimpleNamespace(logit_scale=scale), SimpleNamespace(image_embeds=x, text_embeds=y)
        return lambda: authors.loss.get_loss(owner, outputs, nn.CrossEntropyLoss(), OPTIONS, None)[0], [x, y, scale]

    same_numbers("mem_reference", problem)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(logits, target)


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(ignore_index=0), Doubled()],
    ids=["smoothed", "ignores", "subclass"],
)
def test_another_loss_stays_with_the_authors(authors: Authors, criterion: nn.Module) -> None:
    outputs = SimpleNamespace(image_embeds=unit(N, 12, seed=1), text_embeds=unit(N, 12, seed=2))
    left_alone("mem_reference", lambda: authors.loss.get_loss(model(), outputs, criterion, OPTIONS, None)[0].detach())


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t[:0], lambda t: t.to_sparse()])
def test_other_tensors_stay_with_the_authors(authors: Authors, change: Any) -> None:
    outputs = SimpleNamespace(image_embeds=change(unit(N, 12, seed=1)), text_embeds=change(unit(N, 12, seed=2)))
    call = partial(authors.loss.get_loss, model(), outputs, nn.CrossEntropyLoss(), OPTIONS, None)
    left_alone("mem_reference", lambda: call()[0].detach())


def test_the_loss_has_the_authors_dtype(authors: Authors) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        outputs = SimpleNamespace(image_embeds=unit(N, 12, dtype=dtype), text_embeds=unit(N, 12, seed=2, dtype=dtype))
        with ccu_fast.patch.applied("mem_reference"):
            loss = authors.loss.get_loss(model().to(dtype), outputs, nn.CrossEntropyLoss(), OPTIONS, None)[0]
        assert loss.dtype == dtype


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loss_that_somebody_changed_is_used(authors: Authors, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = authors.search.get_loss

    @wraps(own)
    def changed(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, *rest = own(*args, **options)
        return -loss, *rest

    def search() -> Any:
        data = batch()
        given = model(), data["input_ids"], data["attention_mask"], data["pixel_values"]
        torch.manual_seed(0)
        triggers, candidates = torch.randint(0, V, (N, WORDS)), torch.randint(0, V, (N, WORDS, 6)).numpy()
        options = {"criterion": nn.CrossEntropyLoss(), "options": OPTIONS}
        return authors.search.get_best_candidates(*given, triggers, candidates, WORDS, **options)

    monkeypatch.setattr(authors.search, "get_loss", changed)
    theirs = search()
    monkeypatch.undo()
    if when == "before":
        monkeypatch.setattr(authors.search, "get_loss", changed)
    with ccu_fast.patch.applied("mem_reference"):
        monkeypatch.setattr(authors.search, "get_loss", changed)
        assert torch.equal(search(), theirs)


@pytest.mark.parametrize("increase", [False, True])
@pytest.mark.parametrize("k", [1, 16])
def test_hotflip_gives_the_same_tokens(authors: Authors, k: int, increase: bool) -> None:
    torch.manual_seed(0)
    grad, embedding = torch.randn(N, LENGTH, 16), torch.randn(V, 16)
    options = {"increase_loss": increase, "num_candidates": k, "num_trigger_tokens": WORDS}
    theirs = authors.hotflip.hotflip_attack(grad, embedding, **options)
    with counted("mem_reference") as calls:
        ours = authors.hotflip.hotflip_attack(grad, embedding, **options)
    assert calls.kernels == 1
    assert type(ours) is type(theirs)
    assert ours.shape == theirs.shape
    assert (ours == theirs).all()
    record("mem_reference", check="numbers")


@pytest.mark.parametrize("increase", [False, True])
def test_the_same_triggers_and_ids(authors: Authors, increase: bool) -> None:
    data = batch()
    candidates = torch.randint(0, V, (N, WORDS, 6)).numpy()
    triggers = torch.randint(0, V, (N, WORDS))

    def search() -> tuple[Tensor, Tensor, Tensor]:
        ids, given = data["input_ids"].clone(), triggers.clone()
        found = authors.search.get_best_candidates(
            model(),
            ids,
            data["attention_mask"],
            data["pixel_values"],
            given,
            candidates,
            WORDS,
            criterion=nn.CrossEntropyLoss(),
            increase_loss=increase,
            options=OPTIONS,
        )
        return found, ids, given

    theirs = search()
    with counted("mem_reference") as calls:
        ours = search()
    assert calls.kernels == WORDS, "one batch of losses for each position"
    for name, o, t in zip(("triggers", "ids", "given"), ours, theirs, strict=True):
        assert torch.equal(o, t), name


def test_the_same_noise(authors: Authors) -> None:
    data, clip = batch(), model()
    step, epsilon = torch.full((3, 8, 8), 0.02), torch.full((3, 8, 8), 0.06)
    limits = {"lower_limit": torch.full((3, 8, 8), -1.8), "upper_limit": torch.full((3, 8, 8), 1.7)}
    tool = authors.noise.PerturbationTool.__new__(authors.noise.PerturbationTool)
    vars(tool).update(epsilon=epsilon, step_size=step, num_steps=8, num_trigger_tokens=WORDS, **limits)
    triggers, noise = torch.randint(0, V, (N, WORDS)), 0.05 * torch.randn(N, 3, 8, 8)

    def attack() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        given = {name: value.clone() for name, value in data.items()}
        images, eta = tool.min_min_attack(
            given, clip, nn.CrossEntropyLoss(), triggers, random_noise=noise.clone(), options=OPTIONS
        )
        return images.detach(), eta

    theirs = attack()
    clip.zero_grad()
    with counted("mem_reference") as calls:
        ours = attack()
    assert calls.kernels == 8
    assert all(p.grad is None and p.requires_grad for p in clip.parameters())
    for name, o, t in zip(("images", "noise"), ours, theirs, strict=True):
        torch.testing.assert_close(o, t, rtol=0, atol=1e-6, msg=name)


def test_training_is_the_same(authors: Authors) -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        owner, outputs = SimpleNamespace(logit_scale=scale.log()), SimpleNamespace(image_embeds=x, text_embeds=y)
        value: Tensor = authors.loss.get_loss(owner, outputs, nn.CrossEntropyLoss(), OPTIONS, None)[0]
        return value

    same_training("mem_reference", lambda steps: train_towers(loss, steps))


def test_a_module_with_two_names_is_patched_once(authors: Authors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "another_name", authors.hotflip)
    with ccu_fast.patch.applied("mem_reference") as replaced:
        assert len(set(replaced)) == len(replaced)


def test_without_the_authors_modules_there_is_nothing_to_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "tests.support.mem_authors" or n.split(".")[0] == "src"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="to be imported before they are patched"):
        ccu_fast.patch.apply("mem_reference")


def test_speed(authors: Authors) -> None:
    torch.manual_seed(0)
    grad, embedding = torch.randn(128, 77, 512), torch.randn(49408, 512)
    speed(
        "mem_reference",
        "hotflip_attack, [128, 3, 512] gradient, V = 49408, 16 candidates",
        lambda: authors.hotflip.hotflip_attack(grad, embedding, num_candidates=16, num_trigger_tokens=3),
        rounds=3,
    )
