"""CLIP surrogates of both libraries from end to end, at 224x224: pictures of mixed sizes, several captions of some."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from ccu_fast.cli import main as cli
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.job import Job, generation, protect_dataset
from ccu_fast.mem.job.models import choose_model
from ccu_fast.mem.protection import Protection
from tests.support import mem_datasets as made
from tests.support import torchvision_stub
from tests.support.mem_jobs import tree
from tests.support.presence import absent

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ((230, 170), (150, 260), (224, 224), (300, 90), (64, 48))
FIRST = ["--rounds", "2", "--surrogate-steps", "2", "--pgd-steps", "1", "--batch", "4", "--restart", "1"]
WAYS = {"look": [], "searched": ["--first", "random", "--trigger-rounds", "1", "--candidates", "4"]}
TEXT = {"vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def libraries() -> tuple[Any, Any]:
    torchvision_stub.install()
    try:
        import open_clip
        import transformers
    except ImportError as error:
        absent("open_clip_torch and transformers", str(error))
    return open_clip, transformers


def words(transformers: Any) -> Any:
    """CLIP's tokenizer with the letters and the words of the captions, which merges put together."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in ("photo", "of", "the", "digits", *made.WORDS, "cat", "dog", "tree", "boat", "river", "stone"):
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if i == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            known += [] if left in known else [left]
    vocabulary = {token: i for i, token in enumerate(known)}
    vocabulary |= {"<|startoftext|>": 598, "<|endoftext|>": 599}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


def folder_of(libraries: tuple[Any, Any], folder: Path, **text: Any) -> Path:
    """A CLIP without weights, with a tokenizer."""
    transformers = libraries[1]
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, **TEXT, **text},
        vision_config={**tower, "image_size": 224, "patch_size": 112},
        projection_dim=16,
    )
    config.save_pretrained(folder)
    words(transformers).save_pretrained(folder)
    return folder


@pytest.fixture(params=["open_clip", "hf"])
def model(libraries: tuple[Any, Any], request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A tiny model of each library, by the name that the commands take."""
    if request.param == "hf":
        return f"hf:{folder_of(libraries, tmp_path / 'clip')}"
    text = {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 224, "layers": 1, "width": 16, "head_width": 8, "patch_size": 112}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-224.json").write_text(json.dumps(config))
    libraries[0].add_model_config(tmp_path / "tiny-224.json")
    return "open_clip:tiny-224"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["images", "caption"])
        for i, size in enumerate(SIZES):
            (folder / f"{i}.jpg").write_bytes(made.encoded(i, "jpeg", size))
            writer.writerows([f"{i}.jpg", made.caption(10 * i + k)] for k in range(1 + i % 3))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_protected_verified_and_evaluated(
    model: str, pictures: Path, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    asked = ["protect", str(pictures), "--out", str(out), "--model", model, "--words", "everyday", *FIRST, *WAYS[way]]
    assert cli.main([*asked, "--trigger-words", "4", "--quiet"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["surrogate"]["image_shape"] == [3, 224, 224] and manifest["thumbnails"] is None
    assert 0 < manifest["measured"]["eps_255"] <= 8
    assert cli.main(["verify", str(out), "--original", str(pictures)]) == 0
    asked = ["evaluate", f"mem={out}", "--test", str(pictures), "--model", model, "--epochs", "1", "--batch", "4"]
    assert cli.main([*asked, "--out", str(figures), "--quiet"]) == 0
    assert json.loads(figures.read_text())["complete"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Killed(BaseException):
    pass


def test_a_killed_run_ends_with_the_same_bits(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "SOON", 0.0)
    settings = Settings(rounds=2, surrogate_steps=2, pgd_steps=1, batch=4, restart=1, trigger_words=4, words="everyday")

    def protect(out: Path) -> None:
        protect_dataset(Job(pictures, out, choose_model(model), Method.parse("mem-3"), settings, threads=2))

    protect(tmp_path / "whole")
    calls = iter(range(4))
    advance = Protection.advance

    def killed(self: Protection) -> None:
        if next(calls, None) is None:
            raise Killed
        advance(self)

    with monkeypatch.context() as kill, pytest.raises(Killed):
        kill.setattr(Protection, "advance", killed)
        protect(tmp_path / "again")
    protect(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("roberta-ViT-B-32", "hf_model_name 'roberta-base', which lies on a server"),
        ("ViT-B-16-SigLIP", "hf_tokenizer_name 'timm/ViT-B-16-SigLIP', which lies on a server"),
        ("coca_ViT-B-32", "the towers of CoCa"),
        ("EVA02-B-16", "custom_text"),
    ],
)
def test_other_models_of_open_clip_are_refused_before_anything_is_made_or_downloaded(
    libraries: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked, or a model was made")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(libraries[0], "create_model", refused)
    with pytest.raises(ValueError, match=f"model: expected an open_clip.CLIP, .*{why}"):
        choose_model(f"open_clip:{name}")(["a caption"])


def test_the_fast_tokenizer_alone_and_the_length_of_the_text_tower(libraries: tuple[Any, Any], tmp_path: Path) -> None:
    folder = folder_of(libraries, tmp_path / "clip")
    (folder / "tokenizer_config.json").unlink()
    assert not (folder / "vocab.json").exists()
    model = choose_model(f"hf:{folder}")(["a caption"])
    assert (model.tokenizer.context, model.tokenizer.sot, model.tokenizer.eot) == (32, 598, 599)
    rows = model.tokenizer.encode(["cat", "the dog " * 90])
    assert rows.shape == (2, 32) and rows[1, -1] == 599
    features = model.factory().encode_text(rows)
    assert not torch.equal(features[0], features[1])


def test_folders_whose_captions_would_be_equal_or_fail(libraries: tuple[Any, Any], tmp_path: Path) -> None:
    folder = folder_of(libraries, tmp_path / "clip")
    without = tmp_path / "without"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("tokenizer*"))
    others = {
        without: "expected a tokenizer in .*, tokenizer.json or vocab.json and merges.txt, got neither",
        folder_of(libraries, tmp_path / "eos", eos_token_id=5): "expected the tokenizer's eos_token_id 599 .*, got 5",
        folder_of(libraries, tmp_path / "few", vocab_size=100): "expected a tokenizer of at most the 100 ids .* 600",
    }
    for other, message in others.items():
        with pytest.raises(ValueError, match=f"model: {message}"):
            choose_model(f"hf:{other}")(["a caption"])
    folder_of(libraries, tmp_path / "old", eos_token_id=2, vocab_size=600)
    assert choose_model(f"hf:{tmp_path / 'old'}")(["a caption"]).tokenizer.eot == 599  # 2: the highest id


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pictures_are_normalised_as_the_folder_says(libraries: tuple[Any, Any], tmp_path: Path, name: str) -> None:
    folder = folder_of(libraries, tmp_path / "clip")
    said: dict[str, Any] = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.5, 0.5]}
    (folder / name).write_text(json.dumps(said if name.startswith("pre") else {"image_processor": said}))
    model: Any = choose_model(f"hf:{folder}")(["a caption"]).factory()
    assert model.mean.flatten().tolist() == said["image_mean"] and model.std.flatten().tolist() == said["image_std"]


def test_the_weights_of_a_folder_make_the_run(libraries: tuple[Any, Any], tmp_path: Path) -> None:
    transformers = libraries[1]
    folder = folder_of(libraries, tmp_path / "clip")

    def told() -> Any:
        return choose_model(f"hf:{folder}")([]).about["checkpoint"]

    assert told() is None
    model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    whole = told()
    assert whole == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with torch.no_grad():
        model.logit_scale += 1
    model.save_pretrained(folder)
    assert told() not in (None, whole)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = told()
    (changed,) = sorted(folder.glob("*.safetensors"))[-1:]
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert len(list(folder.glob("*.safetensors"))) > 1 and told() != shards
