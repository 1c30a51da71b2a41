"""transformers' own models from small random configurations, patched."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import ccu_fast
from tests.support.drop_in import counted, left_alone, library, same_numbers, same_training, speed
from tests.support.transformers_models import IMAGE, MODELS, TEXT, VISION, Built, N, build, clip, x_clip


@pytest.fixture(params=list(MODELS))
def built(request: pytest.FixtureRequest) -> Built:
    transformers = library("transformers")
    if importlib.util.find_spec(f"transformers.models.{request.param}") is None:
        pytest.skip(f"this version has no {request.param}")
    return build(transformers, request.param)


def test_the_loss_has_the_same_numbers(built: Built) -> None:
    model, inputs = built
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def problem(dtype: torch.dtype) -> Any:
        model.load_state_dict(state)
        model.to(dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        scales = [p for name, p in model.named_parameters() if "logit" in name or name == "temperature"]
        towers = [p for name, p in model.named_parameters() if "projection" in name and p.ndim == 2]
        leaves = [*scales, *towers][:6]

        def loss() -> Any:
            # transformers 4 makes its causal mask in the default dtype, where float64's lowest number overflows.
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return model(**given, return_loss=True).loss
            finally:
                torch.set_default_dtype(before)

        return loss, leaves

    # The towers run in fp32 on both sides; their rounding is part of both errors.
    same_numbers("transformers", problem, ulps=64)


def test_outputs_are_the_library_s(built: Built) -> None:
    model, inputs = built
    with torch.no_grad():
        theirs, as_tuple = model(**inputs, return_loss=True), model(**inputs, return_loss=True, return_dict=False)
        with ccu_fast.patch.applied("transformers"):
            ours, our_tuple = model(**inputs, return_loss=True), model(**inputs, return_loss=True, return_dict=False)
            without = model(**inputs)
    assert type(ours) is type(theirs)
    assert list(ours.keys()) == list(theirs.keys())
    assert without.loss is None
    assert len(our_tuple) == len(as_tuple)
    torch.testing.assert_close(our_tuple[0], as_tuple[0])
    for key in theirs:
        if isinstance(theirs[key], torch.Tensor) and key != "loss":
            assert torch.equal(ours[key], theirs[key]), key


def loss_of(built: Built, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model, inputs = built
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    loss: torch.Tensor = model(**given, return_loss=True).loss
    return loss


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loss_that_somebody_replaces_in_the_module_is_used(
    built: Built, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[type(built[0]).__module__]
    for name in ("contrastive_loss", f"{module.__name__.split('.')[-2]}_loss", "image_text_contrastive_loss"):
        with monkeypatch.context() as change:

            def replace(name: str = name, change: pytest.MonkeyPatch = change) -> None:
                if hasattr(module, name):
                    change.setattr(module, name, lambda logits: logits.square().mean())

            if when == "before":
                replace()
            with ccu_fast.patch.applied("transformers"):
                replace()
                ours = loss_of(built)
            torch.testing.assert_close(ours, loss_of(built))


@pytest.mark.parametrize("name", ["cross_entropy", "logsigmoid"])
def test_a_loss_that_somebody_replaces_in_torch_is_used(
    built: Built, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = getattr(nn.functional, name)
    monkeypatch.setattr(nn.functional, name, lambda *args, **options: 2 * own(*args, **options))
    left_alone("transformers", lambda: loss_of(built).detach())


def test_a_forward_that_somebody_replaced_is_left_alone_with_a_warning(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(built[0])
    own = kind.forward

    @functools.wraps(own)
    def theirs(self: Any, *args: Any, **options: Any) -> Any:
        out = own(self, *args, **options)
        out.loss = 2 * out.loss
        return out

    monkeypatch.setattr(kind, "forward", theirs)
    with pytest.warns(UserWarning, match=f"{kind.__name__}.forward is not transformers's own but {__name__}."):
        assert ccu_fast.patch.apply("transformers") == []


def test_a_scale_that_is_no_number_is_the_library_s(built: Built) -> None:
    model = built[0]
    name = next(n for n, _ in model.named_parameters() if "logit" in n or n == "temperature")
    setattr(model, name, nn.Parameter(torch.linspace(0.5, 1.5, N)))
    left_alone("transformers", lambda: loss_of(built).detach())


def test_a_call_under_a_transform_is_the_library_s(built: Built) -> None:
    model, inputs = built
    name, weight = next((n, p.detach()) for n, p in model.named_parameters() if "projection" in n or "head" in n)

    def loss(weight: torch.Tensor) -> Any:
        return torch.func.functional_call(model, {name: weight}, kwargs={**inputs, "return_loss": True}).loss

    def tangent() -> torch.Tensor:
        with forward_ad.dual_level():
            out = loss(forward_ad.make_dual(weight, torch.ones_like(weight)))
            return forward_ad.unpack_dual(out).tangent

    left_alone("transformers", lambda: torch.func.grad(loss)(weight))
    left_alone("transformers", lambda: torch.vmap(loss)(torch.stack([weight, 2 * weight])).detach())
    left_alone("transformers", lambda: tangent().detach())


def test_a_model_without_values_stays_without(built: Built) -> None:
    model, inputs = built
    meta = {k: v.to("meta") for k, v in inputs.items()}
    left_alone("transformers", lambda: loss_of((model.to("meta"), meta)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_library_s_dtype(built: Built, dtype: torch.dtype, autocast: bool) -> None:
    if autocast and dtype == torch.float16:
        pytest.skip("a CPU mixes no two half-precision dtypes")
    built[0].to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        try:
            theirs = loss_of(built, dtype)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            pytest.skip("this version makes float64's causal mask in fp32")
        with counted("transformers") as calls:
            ours = loss_of(built, dtype)
    assert ours.dtype == theirs.dtype
    assert calls.kernels > 0 or dtype == torch.float64  # which the reference serves
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_texts_that_each_video_has_its_own_of_stay_with_the_library() -> None:
    """X-CLIP's matrix is the product of each video with a matrix of its own, and no product of two."""
    torch.manual_seed(0)
    model, inputs = x_clip(library("transformers"))
    with torch.no_grad():
        out = model(**inputs)
    assert out.text_embeds.shape == (N, N, 32)
    assert not torch.allclose(out.text_embeds[0], out.text_embeds[1])
    left_alone("transformers", lambda: loss_of((model, inputs)).detach())


def test_training_is_the_same() -> None:
    transformers = library("transformers")

    def train(steps: int) -> list[float]:
        torch.manual_seed(0)
        model, inputs = clip(transformers)
        inputs["input_ids"] = torch.randint(3, 48, (N, 8))
        inputs["input_ids"][:, -1] = 49
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(steps):
            loss = model(**inputs, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    same_training("transformers", train)


def test_speed() -> None:
    transformers = library("transformers")
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    config = transformers.CLIPConfig(text_config=text, vision_config={**VISION, **IMAGE}, projection_dim=512)
    model = transformers.CLIPModel(config)
    inputs = {"pixel_values": torch.randn(4096, 3, 16, 16), "input_ids": torch.randint(3, 48, (4096, 4))}
    speed(
        "transformers",
        "CLIPModel with tiny towers, forward + backward, B = 4096, D = 512",
        lambda: model(**inputs, return_loss=True).loss.backward(),
        rounds=3,
    )
