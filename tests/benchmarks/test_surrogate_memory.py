"""What memory a surrogate takes: measured, and told."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.memory import in_fresh_process
from benchmarks.protection import memory
from ccu_fast.mem import WordTokenizer
from ccu_fast.models.clip import TransformersClipEncoder
from ccu_fast.models.named import Model
from tests.support.presence import absent

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> Model:
    if find_spec("transformers") is None:
        absent("transformers", "the package is not installed")
    return tiny_clip()


def tiny_clip() -> Model:
    import transformers

    words = WordTokenizer.for_captions(["a photo of one thing and of another"])
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "bos_token_id": words.sot, "eos_token_id": words.eot}
    config = transformers.CLIPConfig(
        text_config={**tower, **ids, "max_position_embeddings": words.context},
        vision_config={**tower, "image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    return Model(lambda: TransformersClipEncoder(transformers.CLIPModel(config)), words, (3, 64, 64), {})


def measured() -> dict[str, Any]:
    torch.set_num_threads(1)
    shape = memory.Shape({}, {}, (24, 48), (8, 16), (64,), multiplied=(24, 8))
    return memory.measure(tiny_clip(), shape, CPU, multiply=False)


@pytest.mark.usefixtures("tiny")
def test_every_phase_of_a_tiny_clip_is_measured() -> None:
    found = in_fresh_process(measured)  # blocks that other tests freed here would be taken again, unseen
    assert {phase: [row[0] for row in rows] for phase, rows in found["batches"].items()} == {
        "surrogate": [24, 48],
        "triggers": [8, 16],
        "noise": [8, 16],
    }
    bytes_of_weights = 4 * found["parameters"]
    for rows in (*found["batches"].values(), found["multiplied"].values()):
        assert all(peak >= before >= 2 * bytes_of_weights for _, before, peak in rows)  # weights, two moments
    line, (held,) = found["lines"]["surrogate"], found["held_out"]
    layers = 2 * (64 * 64 + 64 * 256) * 4  # a picture's tokens before and within the two MLPs: kept at the least
    assert line["each"] > layers and abs(held["line"] / held["peak"] - 1) < 0.2
    assert found["noise_bytes"] == 3 * 64 * 64


def test_products_that_are_left_out_leave_their_results(tiny: Model) -> None:
    def after(model: Any) -> list[torch.Tensor]:
        pictures = torch.rand(2, 3, 64, 64, requires_grad=True)
        features = model.encode_image(pictures)
        features.sum().backward()
        assert pictures.grad is not None
        return [features, pictures.grad, *(p.grad for p in model.model.vision_model.parameters())]

    encoder: nn.Module = tiny.factory()  # type: ignore[assignment]
    want = after(encoder)
    encoder.zero_grad(set_to_none=True)
    with memory.WithoutProducts():
        found = after(encoder)
    for a, b in zip(found, want, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert float(want[0].detach().abs().max()) > 0 and float(found[0].detach().abs().max()) == 0


def test_the_largest_batch_of_a_gpu_leaves_the_reserve() -> None:
    lines = {"surrogate": {"start": 2e9, "each": 1e8}, "noise": {"start": 1e9, "each": 3e8}}
    assert memory.fits(lines, 24) == 70 and memory.fits(lines, 3) == 0
    assert memory.peak_of(lines, 128) == 1e9 + 128 * 3e8
