"""Which model a run uses, by its name on the command line."""

from __future__ import annotations

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
    return _hashed(Model(loaded, tokenizer, image_shape, about), checkpoint)


def choose(
    spec: str, *, size: str | None = None, grey: bool = False, checkpoint: Path | None = None
) -> Callable[[Sequence[str]], Model]:
    """A function from captions to :class:`~ccu_fast.models.named.Model`.

    Args:
        spec: "small", or "small:WIDTH" with a multiple of 32; "open_clip:NAME"; "hf:FOLDER".
        size: "HEIGHTxWIDTH" in pixels, what pictures are resized to; for "small", by default 64x64. The others have
            their own.
        grey: one channel instead of three; "small" alone.
        checkpoint: weights to start from.

    Raises:
        ValueError: an unknown spec or size.
        FileNotFoundError: no checkpoint.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("small", *KINDS) or (kind != "small" and not rest):
        raise ValueError(f"model: expected small, small:WIDTH, open_clip:NAME or hf:FOLDER, got {spec!r}")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {checkpoint}, which is not there")
    if kind != "small":
        if size is not None or grey:
            raise ValueError(f"size, grey: expected neither for {spec!r}, which has its own input")
        return lambda captions: _hashed(named_model(spec, checkpoint), checkpoint)
    if not re.fullmatch(r"\d*", rest, re.ASCII):
        raise ValueError(f"model: expected small or small:WIDTH, got {spec!r}")
    numbers = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", (size or "64x64").lower(), re.ASCII)
    if numbers is None:
        raise ValueError(f"size: expected HEIGHTxWIDTH in pixels, such as 64x64, got {size!r}")
    shape = (1 if grey else 3, int(numbers[1]), int(numbers[2]))
    return partial(small, image_shape=shape, width=int(rest or 96), checkpoint=checkpoint)


def _hashed(model: Model, checkpoint: Path | None) -> Model:
    digest = None if checkpoint is None else file_hash(checkpoint)
    return replace(model, about={**model.about, "checkpoint": digest})
