"""Membership by text alone, by the command: a CLIP of open_clip and one of transformers learned pairs by heart."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ccu_fast.cli import main as cli
from ccu_fast.data.paired import PairedData
from ccu_fast.models.named import named_model
from ccu_fast.models.tokenizer import ClipTokenizer
from ccu_fast.unlearn.audit import gibberish_captions
from ccu_fast.unlearn.study.tasks import TrainConfig
from ccu_fast.unlearn.study.train import train
from tests.models.test_clip import hf_tokenizer
from tests.support import torchvision_stub
from tests.support.presence import absent

pytestmark = pytest.mark.usefixtures("one_thread")

GONE, KEPT, NEW = 20, 20, 20  # items
# Of the training: so that pairs are known by heart.
EPOCHS = {"open_clip": (100, 1e-2), "hf": (150, 5e-3)}
TOML = """
[model]
name = "NAME"
weights = "trained.pt"
[data]
path = "pairs.csv"
test = "test.csv"
[forget]
kind = "pairs"
ids = "gone.txt"
[budget]
steps = 2
learning_rate = 1e-5
batch = 4
[compare]
methods = ["ccu"]
gold = "retrained.pt"
[audit]
text_membership = {gibberish = 60, steps = 30}
"""


@pytest.fixture(scope="module")
def libraries() -> tuple[Any, Any]:
    torchvision_stub.install()
    try:
        import open_clip
        import transformers
    except ImportError as error:
        absent("open_clip_torch, transformers", str(error))
    return open_clip, transformers


@pytest.fixture(scope="module", params=["open_clip", "hf"])
def folder(
    libraries: tuple[Any, Any], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Pictures, captions, settings; weights trained on what is to be forgotten and kept, and on the latter alone."""
    into = tmp_path_factory.mktemp(request.param)
    name = (_open_clip if request.param == "open_clip" else _transformers)(libraries, into)
    tokenizer = named_model(name).tokenizer
    words = [tokenizer.decode(torch.tensor([[i]]))[0] for i in tokenizer.allowed().nonzero()[2000 : 2000 + 60, 0]]
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (GONE + KEPT + NEW, 3, 16, 16), generator=rng, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.movedim(0, 2).numpy()).save(into / f"{i}.png")
    for part, start, end in (("pairs", 0, GONE + KEPT), ("test", GONE + KEPT, len(words))):
        rows = [f"{i}.png,{words[i]}" for i in range(start, end)]
        (into / f"{part}.csv").write_text("\n".join(["images,caption", *rows]) + "\n")
    (into / "gone.txt").write_text("\n".join(map(str, range(GONE))))
    (into / "settings.toml").write_text(TOML.replace("NAME", name))
    epochs, rate = EPOCHS[request.param]
    data = PairedData(pictures, tokenizer.encode(words))
    for file, rows in (("trained", torch.arange(GONE + KEPT)), ("retrained", torch.arange(GONE, GONE + KEPT))):
        config = TrainConfig(epochs=epochs, batch=GONE + KEPT, learning_rate=rate)
        model: Any = train(partial(_fresh, name), data[rows], config).model
        torch.save(model.model.state_dict(), into / f"{file}.pt")
    return into, name


def _fresh(name: str) -> Any:
    torch.manual_seed(0)
    return named_model(name).factory()


def _open_clip(libraries: tuple[Any, Any], folder: Path) -> str:
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    (folder / "tiny-16.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    libraries[0].add_model_config(folder / "tiny-16.json")
    return "open_clip:tiny-16"


def _transformers(libraries: tuple[Any, Any], folder: Path) -> str:
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = libraries[1].CLIPConfig(
        text_config={**tower, "eos_token_id": 49407, "bos_token_id": 49406, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    config.save_pretrained(folder / "clip")
    hf_tokenizer(*libraries).save_pretrained(folder / "clip")
    return f"hf:{folder / 'clip'}"


def unlearned(folder: Path, out: str, *more: str, status: int = 0) -> dict[str, Any]:
    assert cli.main(["unlearn", str(folder / "settings.toml"), "--out", str(folder / out), "--quiet", *more]) == status
    found: dict[str, Any] = json.loads((folder / out / "results.json").read_text())
    return found


def test_members_are_found_in_the_model_and_none_after_retraining(folder: tuple[Path, str]) -> None:
    into, _ = folder
    value = unlearned(into, "audit", "--compare")["unlearn"]["pairs.csv"]["pairs"]["0"]
    before, gold = (value["metrics"][name]["text_membership"] for name in ("original", "gold"))
    error = value["text_membership"]["chance"]["error"]
    assert (value["text_membership"]["forgotten"], value["text_membership"]["new"]) == (GONE, NEW) and error < 0.19
    assert before["similarity_auc"] > 0.9 and before["auc"] > 0.5 + error
    assert abs(gold["auc"] - 0.5) < error and abs(gold["similarity_auc"] - 0.5) < error
    told = value["text_membership"]["text"]
    assert "Outside it: before unlearning (" in told and "retrained (" not in told
    page = (into / "audit" / "report.html").read_text()
    assert told in page and re.search(r"<th[^>]*>AUC of similarity</th>", page)
    # A single run says of the model before what the comparison says.
    alone = unlearned(into, "clean", status=3)["text_membership"]  # two small steps forget nothing
    assert alone["before"] == before and "after unlearning too" in alone["text"]


def test_gibberish_is_what_the_tokenizer_makes_of_letters(folder: tuple[Path, str]) -> None:
    tokenizer = named_model(folder[1]).tokenizer
    short, long = ["a dog", "two cats on a mat"], ["a very long sentence " * 9]
    captions = tokenizer.encode(short * 40 + long)
    found = gibberish_captions(tokenizer, captions.int(), 200, seed=1)
    assert found.dtype == torch.int32 and torch.equal(found, gibberish_captions(tokenizer, captions.int(), 200, seed=1))
    assert not torch.equal(found[:, :4], gibberish_captions(tokenizer, captions.int(), 200, seed=2)[:, :4])
    assert set(found[:, 0].tolist()) == {tokenizer.sot} and found.shape[1] <= tokenizer.context
    lengths = ended(found, tokenizer)
    real = ended(captions, tokenizer)
    assert abs(lengths.float().mean() - real.float().mean()) < 1.5 and lengths.max() > 10
    texts = tokenizer.decode(found)
    assert torch.equal(tokenizer.encode(texts), found.long()) and len(set(texts)) > 150
    assert set("".join(texts)) <= set("abcdefghijklmnopqrstuvwxyz ")


def ended(rows: Tensor, tokenizer: ClipTokenizer | Any) -> Tensor:
    """Where each row has its EOT, behind which nothing but padding may stand."""
    ends = (rows == tokenizer.eot).int().argmax(1)
    for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
        assert row[end] == tokenizer.eot and set(row[end + 1 :]) <= {tokenizer.pad}
        assert not {tokenizer.sot, tokenizer.eot} & set(row[1:end])
    return ends
