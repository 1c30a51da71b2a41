"""Which model a run uses, by its name on the command line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ccu_fast.mem.tokenizer import WordTokenizer
from ccu_fast.models.dual_encoder import SmallDualEncoder
from ccu_fast.models.named import KINDS, Model, named_model
from ccu_fast.models.weights import from_checkpoint
from ccu_fast.runs.provenance import file_hash


def small(
    captions: Sequence[str], image_shape: tuple[int, int, int], width: int = 96, checkpoint: Path | None = None
) -> Model:
    """The built-in convolutional and transformer towers, with a vocabulary made of the captions' own words.

    Args:
        captions: all that will be encoded.
        image_shape: (C, H, W); pictures are resized to it.
        width: of both towers.
        checkpoint: a ``state_dict`` to start from; its vocabulary must be the same.
    """
    tokenizer = WordTokenizer.for_captions(captions)
    make = partial(
        SmallDualEncoder,
        len(tokenizer),
        tokenizer.eot,
        image_size=image_shape[1:],
        channels=image_shape[0],
        width=width,
        dim=width,
        context=tokenizer.context,
    )
    loaded = make if checkpoint is None else from_checkpoint(make, checkpoint)
    triggers = len(tokenizer.trigger_ids)
    about = {"model": "small", "width": width, "image_shape": list(image_shape), "words": [len(tokenizer), triggers]}
    return _hashed(Model(loaded, tokenizer, image_shape, about, () if checkpoint is None else (checkpoint,)))


def choose_model(
    spec: str,
    *,
    size: str | None = None,
    input_size: str | None = None,
    grey: bool = False,
    checkpoint: Path | None = None,
) -> Callable[[Sequence[str]], Model]:
    """A function from captions to :class:`~ccu_fast.models.named.Model`.

    Args:
        spec: "small", or "small:WIDTH" with a multiple of 32; "open_clip:NAME"; "hf:FOLDER".
        size: "HEIGHTxWIDTH" in pixels, what pictures are resized to; for "small", by default 64x64. The others have
            their own, which it must be.
        input_size: the same under another name, where pictures keep their size and the model alone sees them so.
        grey: one channel instead of three; "small" alone.
        checkpoint: weights to start from.

    Returns:
        What :class:`ccu_fast.mem.Job` and :func:`ccu_fast.mem.evaluate_datasets` take as ``model``.

    Raises:
        ValueError: an unknown spec or size.
        FileNotFoundError: no checkpoint.

    >>> from ccu_fast.mem import choose_model
    >>> choose_model("small:64", size="32x32")(["a cat", "a dog"]).image_shape
    (3, 32, 32)
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("small", *KINDS) or (kind != "small" and not rest):
        raise ValueError(f"model: expected small, small:WIDTH, open_clip:NAME or hf:FOLDER, got {spec!r}")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {checkpoint}, which is not there")
    if kind != "small":
        if grey:
            raise ValueError(f"grey: expected colours for {spec!r}, which has its own input")
        own = None if size is None else _parsed("size", size)
        return lambda captions: _hashed(_of_size(named_model(spec, checkpoint), own, spec))
    if not re.fullmatch(r"\d*", rest, re.ASCII):
        raise ValueError(f"model: expected small or small:WIDTH, got {spec!r}")
    height, width = _parsed("size", size or "64x64") if input_size is None else _parsed("input_size", input_size)
    shape = (1 if grey else 3, height, width)
    return partial(small, image_shape=shape, width=int(rest or 96), checkpoint=checkpoint)


def _parsed(name: str, size: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size.lower(), re.ASCII)
    if numbers is None:
        raise ValueError(f"{name}: expected HEIGHTxWIDTH in pixels, such as 64x64, got {size!r}")
    return int(numbers[1]), int(numbers[2])


def _of_size(model: Model, size: tuple[int, int] | None, spec: str) -> Model:
    _, height, width = model.image_shape
    if size not in (None, (height, width)):
        assert size is not None
        raise ValueError(f"size: expected {height}x{width}, the input of {spec!r}, got {size[0]}x{size[1]}")
    return model


def _hashed(model: Model) -> Model:
    """With the hash of the weights it starts from: a run that is resumed with others is another run."""
    files = [file_hash(path) for path in model.weights]
    digest = hashlib.sha256("".join(files).encode()).hexdigest() if len(files) > 1 else next(iter(files), None)
    return replace(model, about={**model.about, "checkpoint": digest})
