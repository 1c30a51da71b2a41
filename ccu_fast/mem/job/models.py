"""Which model a run uses, by its name on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ccu_fast.mem.surrogate import ModelFactory
from ccu_fast.mem.tokenizer import NEUTRAL, Tokenizer, WordTokenizer
from ccu_fast.mem.tokenizer_clip import ClipTokenizer
from ccu_fast.models.clip import OpenClipEncoder, TransformersClipEncoder
from ccu_fast.models.dual_encoder import DualEncoder, SmallDualEncoder
from ccu_fast.models.weights import from_checkpoint
from ccu_fast.runs.provenance import file_hash

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
    about = {
        "model": "small",
        "width": width,
        "image_shape": list(image_shape),
        "checkpoint": None if checkpoint is None else file_hash(checkpoint),
    }
    return Model(make if checkpoint is None else from_checkpoint(make, checkpoint), tokenizer, image_shape, about)


def open_clip(name: str, captions: Sequence[str], checkpoint: Path | None = None) -> Model:
    """A model of open_clip's list (``ViT-B-32``, ``RN50``, …) with random weights or a checkpoint's.

    Raises:
        ValueError: a name that open_clip does not know.
    """
    library = _library("open_clip", "open_clip_torch")
    if name not in library.list_models():
        raise ValueError(f"model: expected a name of open_clip.list_models(), got {name!r}")

    def make() -> nn.Module:
        made: nn.Module = library.create_model(name, pretrained=None)
        return made

    config = library.get_model_config(name)
    side = config["vision_cfg"]["image_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return _clip(make, OpenClipEncoder, library.get_tokenizer(name), (height, width), f"open_clip:{name}", checkpoint)


def transformers(folder: str, captions: Sequence[str], checkpoint: Path | None = None) -> Model:
    """A CLIP that transformers has saved in a folder, with its tokenizer; random weights where the folder has none.

    Raises:
        ValueError: a folder without ``config.json``, or of another kind of model.
    """
    library = _library("transformers", "transformers")
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"model: expected a folder with config.json and a tokenizer, got {folder!r}")
    config = library.AutoConfig.from_pretrained(path)
    if config.model_type != "clip":
        raise ValueError(f"model: expected a CLIP in {folder!r}, got a {config.model_type!r}")
    saved = any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))

    def make() -> nn.Module:
        made: nn.Module = library.CLIPModel.from_pretrained(path) if saved else library.CLIPModel(config)
        return made

    side = config.vision_config.image_size
    tokenizer = library.AutoTokenizer.from_pretrained(path)
    return _clip(make, TransformersClipEncoder, tokenizer, (side, side), f"hf:{folder}", checkpoint)


def _clip(
    make: Callable[[], nn.Module],
    adapter: Callable[[nn.Module], DualEncoder],
    tokenizer: Any,
    size: tuple[int, int],
    spec: str,
    checkpoint: Path | None,
) -> Model:
    weighted = make if checkpoint is None else from_checkpoint(make, checkpoint)
    about = {
        "model": spec,
        "image_shape": [3, *size],
        "checkpoint": None if checkpoint is None else file_hash(checkpoint),
    }
    return Model(lambda: adapter(weighted()), ClipTokenizer(tokenizer), (3, *size), about)


def _library(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"model: needs {distribution} (pip install {distribution}): {error}") from error


def choose(spec: str, *, size: str | None = None, grey: bool = False, checkpoint: Path | None = None) -> Any:
    """A function from captions to :class:`Model`.

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
    if kind not in ("small", "open_clip", "hf") or (kind != "small" and not rest):
        raise ValueError(f"model: expected small, small:WIDTH, open_clip:NAME or hf:FOLDER, got {spec!r}")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, got {checkpoint}, which is not there")
    if kind != "small":
        if size is not None or grey:
            raise ValueError(f"size, grey: expected neither for {spec!r}, which has its own input")
        return partial(open_clip if kind == "open_clip" else transformers, rest, checkpoint=checkpoint)
    if rest and not rest.isdigit():
        raise ValueError(f"model: expected small or small:WIDTH, got {spec!r}")
    numbers = (size or "64x64").lower().split("x")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"size: expected HEIGHTxWIDTH in pixels, such as 64x64, got {size!r}")
    shape = (1 if grey else 3, int(numbers[0]), int(numbers[1]))
    return partial(small, image_shape=shape, width=int(rest or 96), checkpoint=checkpoint)
