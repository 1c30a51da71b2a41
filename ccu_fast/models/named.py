"""CLIP models by their name: ``open_clip:NAME`` and ``hf:FOLDER``, for both systems."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ccu_fast.files import readable
from ccu_fast.models.clip import ClipEncoder, OpenClipEncoder, TransformersClipEncoder
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.models.tokenizer import ClipTokenizer, Tokenizer
from ccu_fast.models.weights import check_no_pointer, from_checkpoint

KINDS = ("open_clip", "hf")


@dataclass(frozen=True)
class Model:
    """A dual encoder, its tokenizer and its input.

    Attributes:
        factory: makes one, with the weights the name or a checkpoint gives, or random ones.
        tokenizer: of its captions.
        image_shape: (C, H, W).
        about: JSON values that say which it is.
        trained: whether ``factory`` gives trained weights.
    """

    factory: Callable[[], DualEncoder]
    tokenizer: Tokenizer
    image_shape: tuple[int, int, int]
    about: dict[str, Any]
    trained: bool = False


def named_model(name: str, weights: Path | None = None, *, argument: str = "checkpoint") -> Model:
    """The CLIP of a name.

    Args:
        name: "open_clip:NAME" with a name of ``open_clip.list_models()`` (``ViT-B-32``, ``RN50``, …), or "hf:FOLDER"
            with a folder where transformers has saved a CLIP and its tokenizer. Nothing is downloaded: an open_clip
            model has random weights without ``weights``, one of a folder those that lie there, if any do.
        weights: a file, see :func:`~ccu_fast.models.weights.from_checkpoint`.
        argument: what the caller calls ``weights``, for errors.

    Returns:
        The model; its ``about`` names it and its input.

    Raises:
        ValueError: another kind of name, one that open_clip does not know, a folder without a CLIP, or the library is
            not installed.
        FileNotFoundError: no such file of weights.
    """
    kind, _, rest = name.partition(":")
    if kind not in KINDS or not rest:
        raise ValueError(f"model: expected open_clip:NAME or hf:FOLDER, got {name!r}")
    make, adapter, tokenizer, size, trained = (_open_clip if kind == "open_clip" else _transformers)(rest)
    loaded = make if weights is None else from_checkpoint(make, weights, argument)
    about = {"model": name, "image_shape": [3, *size]}
    trained = trained or weights is not None
    return Model(lambda: adapter(loaded()), ClipTokenizer(tokenizer), (3, *size), about, trained)


_Parts = tuple[Callable[[], nn.Module], Callable[[nn.Module], ClipEncoder], Any, tuple[int, int], bool]


def _open_clip(name: str) -> _Parts:
    library = _library("open_clip", "open_clip_torch")
    if name not in library.list_models():
        raise ValueError(f"model: expected a name of open_clip.list_models(), got {name!r}")
    make = partial(library.create_model, name, pretrained=None)
    side = library.get_model_config(name)["vision_cfg"]["image_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return make, OpenClipEncoder, library.get_tokenizer(name), (height, width), False


def _transformers(folder: str) -> _Parts:
    library = _library("transformers", "transformers")
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"model: expected a folder with config.json and a tokenizer, got {folder!r}")
    config = library.AutoConfig.from_pretrained(path)
    if config.model_type != "clip":
        raise ValueError(f"model: expected a CLIP in {folder!r}, got a {config.model_type!r}")
    files = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    for file in files:
        check_no_pointer(file, "model")
    make = partial(_saved, library, path) if files else partial(library.CLIPModel, config)
    side = config.vision_config.image_size
    return make, TransformersClipEncoder, library.AutoTokenizer.from_pretrained(path), (side, side), bool(files)


def _saved(library: Any, path: Path) -> nn.Module:
    """A CLIP of a folder with all its weights: transformers would only warn of those that it makes up."""
    with readable(path, "model"):
        model, found = library.CLIPModel.from_pretrained(path, output_loading_info=True)
    lacking = sorted({*map(str, found["missing_keys"]), *map(str, found["mismatched_keys"])})
    if lacking:
        raise ValueError(f"model: expected all weights of the CLIP in {path}, got none that fit {lacking[0]}")
    made: nn.Module = model
    return made


def _library(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"model: needs {distribution} (pip install {distribution}): {error}") from error
