"""CLIP models by their name: ``open_clip:NAME`` and ``hf:FOLDER``, for both systems."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ccu_fast.files import read_json, readable
from ccu_fast.models.clip import MEAN, STD, ClipEncoder, OpenClipEncoder, TransformersClipEncoder
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
        weights: the files that ``factory`` reads them from; none of random ones.
    """

    factory: Callable[[], DualEncoder]
    tokenizer: Tokenizer
    image_shape: tuple[int, int, int]
    about: dict[str, Any]
    weights: tuple[Path, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether ``factory`` gives trained weights."""
        return bool(self.weights)


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
    found = (_open_clip if kind == "open_clip" else _transformers)(rest)
    if len(found.tokenizer) > found.vocabulary:
        raise ValueError(
            f"model: expected a tokenizer of at most the {found.vocabulary} ids of the text tower of {name!r}, "
            f"got one of {len(found.tokenizer)}"
        )
    loaded = found.make if weights is None else from_checkpoint(found.make, weights, argument)
    about = {"model": name, "image_shape": [3, *found.size]}
    files = found.weights if weights is None else (weights,)
    return Model(lambda: found.adapter(loaded()), found.tokenizer, (3, *found.size), about, files)


@dataclass(frozen=True)
class _Found:
    """What a library has under a name."""

    make: Callable[[], nn.Module]
    adapter: Callable[[nn.Module], ClipEncoder]
    tokenizer: ClipTokenizer
    vocabulary: int
    size: tuple[int, int]
    weights: tuple[Path, ...] = ()


def _open_clip(name: str) -> _Found:
    library = _library("open_clip", "open_clip_torch")
    if name not in library.list_models():
        raise ValueError(f"model: expected a name of open_clip.list_models(), got {name!r}")
    config = library.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    # Asked before the model is made: open_clip would download other text towers and tokenizers, and take a minute to
    # make what is refused then.
    if other := _other_text(config):
        raise ValueError(f"model: expected an open_clip.CLIP, whose text tower is causal, got {name!r} with {other}")
    if "timm_model_name" in vision:
        _library("timm", "timm")
    side = vision["image_size"]
    height, width = (side, side) if isinstance(side, int) else side
    tokenizer = ClipTokenizer(library.get_tokenizer(name))
    vocabulary = int(text.get("vocab_size", len(tokenizer)))
    return _Found(partial(_random, library, name), OpenClipEncoder, tokenizer, vocabulary, (height, width))


def _other_text(config: dict[str, Any]) -> str:
    """What makes the text tower of a configuration another than that of CLIP; "" for nothing."""
    text = config["text_cfg"]
    if "multimodal_cfg" in config:
        return "the towers of CoCa"
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):
            return f"{key} {text[key]!r}, which lies on a server"
    if config.get("custom_text"):
        return "custom_text"
    if text.get("no_causal_mask"):
        return "no_causal_mask"
    pool = text.get("pool_type", "argmax")
    return "" if pool in ("argmax", "eos") else f"pool_type {pool!r}"


def _random(library: Any, name: str) -> nn.Module:
    with _without("No pretrained weights loaded"):  # which is what was asked for, or they are read afterwards
        made: nn.Module = library.create_model(name, pretrained=None)
    return made


@contextmanager
def _without(words: str) -> Iterator[None]:
    """Without warnings that begin so."""
    root = logging.getLogger()

    def asked(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(words)

    root.addFilter(asked)
    try:
        yield
    finally:
        root.removeFilter(asked)


def _transformers(folder: str) -> _Found:
    library = _library("transformers", "transformers")
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"model: expected a folder with config.json and a tokenizer, got {folder!r}")
    config = library.AutoConfig.from_pretrained(path)
    if config.model_type != "clip":
        raise ValueError(f"model: expected a CLIP in {folder!r}, got a {config.model_type!r}")
    files = sorted((*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")))
    for file in files:
        check_no_pointer(file, "model")
    make = partial(_saved, library, path) if files else partial(library.CLIPModel, config)
    side, text = config.vision_config.image_size, config.text_config
    mean, std = _normalisation(path)
    adapter = partial(TransformersClipEncoder, mean=mean, std=std)
    tokenizer = _saved_tokenizer(library, path, text)
    return _Found(make, adapter, tokenizer, int(text.vocab_size), (side, side), tuple(files))


def _saved_tokenizer(library: Any, path: Path, text: Any) -> ClipTokenizer:
    """The tokenizer of a folder, if it is that of the text tower that ``text`` configures."""
    names = {file.name for file in path.iterdir()}
    # Without these transformers 5 makes one up that knows no word, and all captions would be equal.
    if not ("tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names):
        raise ValueError(
            f"model: expected a tokenizer in {str(path)!r}, tokenizer.json or vocab.json and merges.txt, got neither"
        )
    with readable(path, "model"):
        theirs = library.AutoTokenizer.from_pretrained(path)
    if theirs.bos_token_id is None or theirs.eos_token_id is None:
        kind = type(theirs).__name__
        raise ValueError(f"model: expected a CLIPTokenizer in {str(path)!r}, got a {kind} without bos_token, eos_token")
    tokenizer = ClipTokenizer(theirs, context=int(text.max_position_embeddings))
    # CLIPModel reads a caption's feature at this id and, where it finds none, at the first token, which all share.
    # 2 stands for the highest id, as configurations of 2023 have it.
    end = len(tokenizer) - 1 if text.eos_token_id == 2 else text.eos_token_id
    if end != tokenizer.eot:
        raise ValueError(
            f"model: expected the tokenizer's eos_token_id {tokenizer.eot} in text_config of {str(path)!r}, where the "
            f"feature of a caption is read, got {text.eos_token_id}"
        )
    return tokenizer


def _normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std that a folder's pictures are normalised with: those of its processor, else CLIP's."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            found = read_json(path / name, "model")
            found = found.get("image_processor", found) if isinstance(found, dict) else {}
            if "image_mean" in found and "image_std" in found:
                return found["image_mean"], found["image_std"]
    return MEAN, STD


def _saved(library: Any, path: Path) -> nn.Module:
    """A CLIP of a folder with all its weights: transformers would only warn of those that it makes up."""
    with readable(path, "model"), _without_bars(library):
        model, found = library.CLIPModel.from_pretrained(path, output_loading_info=True)
    lacking = sorted({*map(str, found["missing_keys"]), *map(str, found["mismatched_keys"])})
    if lacking:
        raise ValueError(f"model: expected all weights of the CLIP in {path}, got none that fit {lacking[0]}")
    made: nn.Module = model
    return made


@contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    """Without the progress bars of transformers, which know of no --quiet and fill a log."""
    logs = library.utils.logging
    if hasattr(logs, "set_tqdm_hook"):  # of transformers 5; the older switch is also huggingface_hub's
        before = logs.set_tqdm_hook(lambda _, words, named: logs.EmptyTqdm(*words, **named))
        restore = partial(logs.set_tqdm_hook, before)
    else:
        restore = logs.enable_progress_bar if logs.is_progress_bar_enabled() else logs.disable_progress_bar
        logs.disable_progress_bar()
    try:
        yield
    finally:
        restore()


def _library(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"model: needs {distribution} (pip install {distribution}): {error}") from error
