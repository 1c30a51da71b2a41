"""Which model a run uses, by its name on the command line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ccu_fast.mem.surrogate import ModelFactory
from ccu_fast.mem.tokenizer import NEUTRAL, Tokenizer, WordTokenizer
from ccu_fast.models.dual_encoder import DualEncoder, SmallDualEncoder

CONTEXT = 77


@dataclass(frozen=True)
class Model:
    """A dual encoder, its tokenizer and its input.

    Attributes:
        factory: makes one, with random weights or those of the checkpoint.
        image_shape: (C, H, W).
        about: JSON values that say which it is.
    """

    factory: ModelFactory
    tokenizer: Tokenizer
    image_shape: tuple[int, int, int]
    about: dict[str, Any]


def small(
    captions: Sequence[str], image_shape: tuple[int, int, int], width: int = 96, checkpoint: Path | None = None
) -> Model:
    """The built-in convolutional and transformer towers, with a vocabulary made of the captions' own words.

    Triggers are everyday words that no caption has.

    Args:
        captions: all that will be encoded.
        image_shape: (C, H, W); pictures are resized to it.
        width: of both towers.
        checkpoint: a ``state_dict`` to start from; its vocabulary must be the same.
    """
    words = {word for caption in captions for word in caption.split()}
    tokenizer = WordTokenizer(
        sorted(words | set(NEUTRAL)), [word for word in NEUTRAL if word not in words], context=CONTEXT
    )
    make = partial(
        SmallDualEncoder,
        len(tokenizer),
        tokenizer.eot,
        image_size=image_shape[1:],
        channels=image_shape[0],
        width=width,
        dim=width,
        context=CONTEXT,
    )
    about = {"model": "small", "width": width, "image_shape": list(image_shape), "checkpoint": _digest(checkpoint)}
    return Model(make if checkpoint is None else loaded(make, checkpoint), tokenizer, image_shape, about)


def loaded(make: Callable[[], Any], checkpoint: Path) -> ModelFactory:
    """``make`` with the weights of a file of tensors (``torch.save`` of a state_dict, or safetensors).

    Raises:
        ValueError: no such file format, or the weights are another model's.
    """

    def factory() -> DualEncoder:
        model = make()
        weights = _weights(checkpoint)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: expected weights of {type(model).__name__}, got others: {error}") from error
        return model

    return factory


def _weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # Unpickling raises whatever the bytes lead it to.
    except Exception as error:
        raise ValueError(f"checkpoint: expected a file of tensors, got {path} ({type(error).__name__})") from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict):
        raise ValueError(f"checkpoint: expected a state_dict, got {type(weights).__name__} in {path}")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def choose(spec: str, *, size: str = "64x64", grey: bool = False, checkpoint: Path | None = None) -> Any:
    """A function from captions to :class:`Model`.

    Args:
        spec: "small", or "small:WIDTH" with a multiple of 32.
        size: "HEIGHTxWIDTH" in pixels, what pictures are resized to.
        grey: one channel instead of three.
        checkpoint: weights to start from.

    Raises:
        ValueError: an unknown spec or size.
        FileNotFoundError: no checkpoint.
    """
    kind, _, width = spec.partition(":")
    if kind != "small" or (width and not width.isdigit()):
        raise ValueError(f"model: expected small or small:WIDTH, got {spec!r}")
    numbers = size.lower().split("x")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"size: expected HEIGHTxWIDTH in pixels, such as 64x64, got {size!r}")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {checkpoint}, which is not there")
    shape = (1 if grey else 3, int(numbers[0]), int(numbers[1]))
    return partial(small, image_shape=shape, width=int(width or 96), checkpoint=checkpoint)
