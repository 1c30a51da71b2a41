"""Adapters of open_clip and transformers: the libraries' own numbers, shorter text, and tokens that survive."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from ccu_fast.cli import main as cli
from ccu_fast.data.paired import PairedData
from ccu_fast.data.strips import load_strips, write_strips
from ccu_fast.mem import Method, Protection, Settings
from ccu_fast.mem.job.models import choose_model
from ccu_fast.mem.source import TensorSource
from ccu_fast.models import clip_towers
from ccu_fast.models.clip import MEAN, STD, OpenClipEncoder, TransformersClipEncoder
from ccu_fast.models.named import named_model
from ccu_fast.models.tokenizer import ClipTokenizer
from ccu_fast.models.weights import from_checkpoint, read_weights
from ccu_fast.unlearn.job import load, run_job
from ccu_fast.unlearn.settings import read_job
from tests.support import torchvision_stub
from tests.support.presence import absent

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTIONS = ["A dog's ball, 3 cats & the café!", "two people on a beach", "word " * 90]


@pytest.fixture(scope="module")
def open_clip() -> Any:
    torchvision_stub.install()
    try:
        import open_clip
    except ImportError as error:
        absent("open_clip_torch", str(error))
    return open_clip


@pytest.fixture(scope="module")
def transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        absent("transformers", str(error))
    return transformers


@pytest.fixture(scope="module")
def tokenizer(open_clip: Any) -> ClipTokenizer:
    """One, which finds out once which tokens are allowed."""
    return ClipTokenizer(open_clip.SimpleTokenizer())


def small(open_clip: Any, tower: str, vocabulary: int = 49408) -> Any:
    vision = (
        {"layers": [1, 1, 1, 1], "width": 16} if tower == "resnet" else {"layers": 1, "width": 32, "patch_size": 16}
    )
    vision |= {"image_size": 32, "head_width": 16}
    text = {"context_length": 77, "vocab_size": vocabulary, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(24, vision, text)


def hf_tokenizer(open_clip: Any, transformers: Any) -> Any:
    """transformers' tokenizer with open_clip's vocabulary, which comes with that package."""
    simple = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): i for word, i in simple.encoder.items()}
    merges = [tuple(pair) for pair in simple.bpe_ranks]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.mark.parametrize("tower", ["resnet", "vit"])
def test_open_clip_features_are_its_own_at_any_length(open_clip: Any, tower: str) -> None:
    model = small(open_clip, tower)
    model.eval()
    ours = OpenClipEncoder(model)
    tokenizer = open_clip.SimpleTokenizer()
    pixels = torch.rand(3, 3, 32, 32)
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(pixels), model.encode_image(normalised, normalize=True))
        whole = tokenizer(CAPTIONS)
        theirs = model.encode_text(whole, normalize=True)
        torch.testing.assert_close(ours.encode_text(whole), theirs)
        short = ClipTokenizer(tokenizer).encode(CAPTIONS[:2])
        assert short.shape[1] < 20
        torch.testing.assert_close(ours.encode_text(short), theirs[:2])
        torch.testing.assert_close(ours.encode_text(short, model.token_embedding(short)), theirs[:2])
    assert ours.scale.item() == pytest.approx(1 / 0.07)
    embeddings = ours.embedding_matrix[short].detach().requires_grad_()
    (grad,) = torch.autograd.grad(ours.encode_text(short, embeddings)[:, 0].sum(), embeddings)
    assert (grad[:, 1].abs().sum(1) > 0).all()


def tiny_transformers(transformers: Any, *, layers: int = 1, eot: int = 99, act: str = "quick_gelu") -> Any:
    """Two towers of width 32 for pictures of four patches."""
    shared = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "hidden_act": act}
    text = {"num_hidden_layers": max(layers, 2), "vocab_size": 100, "bos_token_id": 98, "pad_token_id": 99}
    config = transformers.CLIPConfig(
        projection_dim=24,
        text_config=shared | text | {"eos_token_id": eot},
        vision_config=shared | {"num_hidden_layers": layers, "image_size": 32, "patch_size": 16},
    )
    return TransformersClipEncoder(transformers.CLIPModel(config).eval())


def test_transformers_features_are_its_own(transformers: Any) -> None:
    ours = tiny_transformers(transformers)
    model = ours.model
    tokens = torch.tensor([[98, 5, 6, 7, 99, 99], [98, 9, 99, 99, 99, 99]])
    pixels = torch.rand(2, 3, 32, 32)
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=normalised)
        torch.testing.assert_close(ours.encode_text(tokens), out.text_embeds)
        torch.testing.assert_close(ours.encode_image(pixels), out.image_embeds)
        torch.testing.assert_close(ours.encode_text(tokens[:1, :5]), out.text_embeds[:1])
        assert ours.scale.item() == pytest.approx(model.logit_scale.exp().item())
    embeddings = ours.embedding_matrix[tokens].detach().requires_grad_()
    features = ours.encode_text(tokens, embeddings)
    (grad,) = torch.autograd.grad(features[:, 0].sum(), embeddings)
    assert (grad[1, 1].abs().sum() > 0) and not grad[1, 3:].any()
    assert not ours._embedding._forward_hooks


@pytest.mark.parametrize(("eot", "act"), [(99, "quick_gelu"), (2, "quick_gelu"), (99, "gelu")])
def test_transformers_towers_are_the_librarys_with_all_gradients(transformers: Any, eot: int, act: str) -> None:
    """Every weight and the pixels get the library's gradient; eot 2 is how old configurations say "the largest id"."""
    ours = tiny_transformers(transformers, layers=2, eot=eot, act=act)
    tokens = torch.tensor([[98, 5, 6, 7, 99, 0], [98, 9, 99, 0, 0, 0]])
    found: list[list[torch.Tensor]] = []
    for library in (False, True):
        # A hook on a block makes the adapter call the library's forward.
        handles = [
            tower.encoder.layers[0].register_forward_hook(lambda *_: None)
            for tower in (ours.model.text_model, ours.model.vision_model)
            if library
        ]
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        features = torch.cat([ours.encode_image(pixels), ours.encode_text(tokens)])
        weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
        inputs = [pixels, *(p for name, p in ours.named_parameters() if "logit_scale" not in name)]
        found.append([features, *torch.autograd.grad((features * weight).sum(), inputs)])
        for handle in handles:
            handle.remove()
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_last_block_of_a_transformers_tower_has_one_position(transformers: Any) -> None:
    """Where the library's has all of them: counted at the products that only the asked positions need."""
    ours = tiny_transformers(transformers, layers=2)
    rows: dict[str, list[int]] = {}
    for name, module in ours.model.named_modules():
        if name.endswith(("q_proj", "k_proj", "out_proj")):
            note = rows.setdefault(name.split("_model")[0] + " " + name.split(".")[-1], [])
            module.register_forward_hook(lambda _m, _i, out, note=note: note.append(out.shape[1]))
    with torch.no_grad():
        ours.encode_image(torch.rand(2, 3, 32, 32))
        ours.encode_text(torch.tensor([[98, 5, 6, 7, 99], [98, 9, 99, 99, 99]]))
    for tower, positions in (("vision", 5), ("text", 5)):
        assert rows[f"{tower} k_proj"] == [positions, positions]
        assert rows[f"{tower} q_proj"] == rows[f"{tower} out_proj"] == [positions, 1]


def test_a_noise_step_keeps_one_wide_activation_of_a_block(transformers: Any) -> None:
    """QuickGELU's input; the library keeps its input and its sigmoid, and autograd no input of a frozen layer."""
    ours = tiny_transformers(transformers, layers=3)
    ours.requires_grad_(False)

    def wide() -> int:
        kept: set[int] = set()

        def keep(t: torch.Tensor) -> torch.Tensor:
            if t.shape[-1] == 48 and t.numel() == 2 * 5 * 48:
                kept.add(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            features = ours.encode_image(torch.rand(2, 3, 32, 32).requires_grad_())
        assert features.requires_grad
        return len(kept)

    ours_keeps = wide()
    ours.model.vision_model.encoder.layers[0].register_forward_hook(lambda *_: None)
    assert (ours_keeps, wide()) == (2, 6)  # in our last block one position is wide, not five


def test_what_a_tower_may_not_leave_out(transformers: Any) -> None:
    """A hook on a wide layer is called; dropout in training and pictures of another size are the library's."""
    ours = tiny_transformers(transformers, layers=1)
    vision, called = ours.model.vision_model, []
    handle = vision.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: called.append(1))
    ours.encode_image(torch.rand(2, 3, 32, 32))
    handle.remove()
    assert called == [1] and clip_towers.usable(vision, training=True)
    vision.encoder.layers[0].self_attn.dropout = 0.5
    assert clip_towers.usable(vision, training=False) and not clip_towers.usable(vision, training=True)
    with pytest.raises(ValueError, match="image size"):
        ours.encode_image(torch.rand(2, 3, 48, 48))


def test_a_part_that_was_replaced_is_called(transformers: Any) -> None:
    vision = tiny_transformers(transformers, layers=1).model.vision_model
    layer = vision.encoder.layers[0]
    assert clip_towers.usable(vision, training=False)
    layer.forward = layer.forward  # as libraries that wrap a module do
    assert not clip_towers.usable(vision, training=False)
    del layer.forward
    for name in ("self_attn", "mlp"):
        own = getattr(layer, name)
        setattr(layer, name, type("Other", (type(own),), {})(own.config))
        assert not clip_towers.usable(vision, training=False)
        setattr(layer, name, own)
    assert clip_towers.usable(vision, training=False)


def test_checkpoints(open_clip: Any, tmp_path: Path) -> None:
    model = small(open_clip, "vit", 60)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pt")
    read = from_checkpoint(lambda: small(open_clip, "vit", 60), tmp_path / "a.pt")()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), read.parameters(), strict=True))
    with pytest.raises(ValueError, match="checkpoint: expected weights of CLIP"):
        from_checkpoint(lambda: small(open_clip, "resnet", 60), tmp_path / "a.pt")()


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="open_clip"):
        OpenClipEncoder(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="transformers"):
        TransformersClipEncoder(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="tokenizer: expected"):
        ClipTokenizer(object())


class TestTokenizer:
    def test_open_clip_ids_and_the_end_of_long_captions(self, open_clip: Any) -> None:
        theirs = open_clip.SimpleTokenizer()
        ours = ClipTokenizer(theirs)
        assert torch.equal(ours.encode(CAPTIONS), theirs(CAPTIONS))
        assert ours.encode(CAPTIONS)[2, -1] == ours.eot
        assert len(ours) == 49408

    def test_allowed_tokens_are_words_and_survive_before_any_caption(self, tokenizer: ClipTokenizer) -> None:
        ours = tokenizer
        allowed = ours.allowed()
        ids = allowed.nonzero()[:, 0]
        assert len(ids) > 20000
        assert not allowed[[ours.sot, ours.eot, 0, 255]].any()
        rng = torch.Generator().manual_seed(0)
        triggers = ids[torch.randint(len(ids), (300, 3), generator=rng)]
        captions = [f"{word} {CAPTIONS[i % 2]}" for i, word in enumerate(ours.decode(triggers))]
        assert torch.equal(ours.encode(captions)[:, 1:4], triggers)

    def test_transformers_tokenizer_agrees_with_open_clip(
        self, open_clip: Any, transformers: Any, tokenizer: ClipTokenizer
    ) -> None:
        hf = ClipTokenizer(hf_tokenizer(open_clip, transformers))
        ours = tokenizer
        for caption in CAPTIONS:
            assert torch.equal(hf.encode([caption]), ours.encode([caption]))
        assert (hf.sot, hf.eot, hf.context) == (ours.sot, ours.eot, 77)
        ids = ours.allowed().nonzero()[::997, 0]
        assert hf.decode(ids[:, None]) == ours.decode(ids[:, None])


def test_a_protection_with_clip(open_clip: Any, tokenizer: ClipTokenizer) -> None:
    strips, _ = load_strips(6, 1)
    images = strips.images[:, :, :, :32].repeat(1, 3, 2, 1)
    settings = Settings(
        rounds=1, trigger_rounds=1, surrogate_steps=1, pgd_steps=1, candidates=4, batch=4, trigger_words=None
    )
    captions = [CAPTIONS[i % 3] for i in range(6)]
    run = Protection(
        TensorSource(images, captions),
        tokenizer,
        lambda: OpenClipEncoder(small(open_clip, "resnet")),
        method=Method.parse("mem-2"),
        settings=settings,
    )
    run.round(0)
    published = run.published_captions(torch.arange(6))
    assert all(p.endswith(c) for p, c in zip(published, captions, strict=True))
    read = tokenizer.encode(published)
    assert torch.equal(read[:, 1:3], run.triggers)
    assert (read[:, -1] == tokenizer.eot)[[2, 5]].all()
    assert run.store.data.flatten(1).any(1).all()


@pytest.fixture(scope="module")
def saved(open_clip: Any, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as transformers saves it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    text = {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    hf_tokenizer(open_clip, transformers).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "clip")
    return tmp_path / "clip"


def test_the_commands_take_a_clip_from_a_folder(folder: Path, tmp_path: Path) -> None:
    data, out = write_strips(tmp_path / "digits", n_train=12, n_test=4), tmp_path / "protected"
    words = ["protect", str(data / "train.csv"), "--out", str(out), "--model", f"hf:{folder}", "--method", "mem-2"]
    words += ["--rounds", "1", "--surrogate-steps", "1", "--pgd-steps", "1", "--candidates", "4", "--batch", "6"]
    assert cli.main([*words, "--trigger-rounds", "1", "--quiet"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["surrogate"]["image_shape"] == [3, 32, 32]
    figures = tmp_path / "figures.json"
    words = ["evaluate", f"mem={out}", "--test", str(data / "test.csv"), "--model", f"hf:{folder}", "--epochs", "1"]
    assert cli.main([*words, "--batch", "6", "--treatment", "jpeg", "--out", str(figures)]) == 0
    assert list(json.loads(figures.read_text())["datasets"]) == ["mem", "mem, jpeg"]


UNLEARN = """
[model]
name = "hf:clip"
[data]
path = "digits/train.csv"
[forget]
kind = "pairs"
ids = "gone.txt"
[budget]
steps = 2
learning_rate = 1e-5
batch = 4
"""


def trained_anew(model: Any, pairs: PairedData) -> Any:
    """In place of a training: other weights, from the seed of the comparison."""
    assert len(pairs) == 10 and pairs.visual.dtype == torch.uint8
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class TestUnlearning:
    def run(self, tmp_path: Path, text: str, ids: str, out: str) -> tuple[int, dict[str, Any]]:
        if not (tmp_path / "digits").exists():
            write_strips(tmp_path / "digits", n_train=12, n_test=4)
        (tmp_path / "settings.toml").write_text(text)
        (tmp_path / "gone.txt").write_text(ids)
        status = cli.main(["unlearn", str(tmp_path / "settings.toml"), "--out", str(tmp_path / out), "--quiet"])
        figures = tmp_path / out / "results.json"
        return status, json.loads(figures.read_text()) if figures.exists() else {}

    def test_a_folder_with_pictures_and_captions(self, transformers: Any, folder: Path, tmp_path: Path) -> None:
        status, figures = self.run(tmp_path, UNLEARN, "3\ntrain/00000.png\n", "one")
        assert status == 0 and figures["sizes"] == {"forget items": 2, "retain items": 10}
        assert figures["provenance"]["model"] == f"hf:{folder}"
        assert figures["pool"]["pairs"] == 12 and figures["pool"]["chance"]["forget"] == pytest.approx(1 / 12)
        assert "partner first of 12 (chance 0.083)" in (tmp_path / "one" / "report.html").read_text()
        # The written weights can be read by the library and by every --checkpoint.
        clean = transformers.CLIPModel.from_pretrained(folder)
        clean.load_state_dict(read_weights(tmp_path / "one" / "model.safetensors"))
        original = transformers.CLIPModel.from_pretrained(folder)
        assert any(not torch.equal(a, b) for a, b in zip(clean.parameters(), original.parameters(), strict=True))
        again = UNLEARN.replace("[data]", 'weights = "one/model.safetensors"\n[data]')
        status, second = self.run(tmp_path, again, "3\n", "two")
        assert status == 0
        assert second["provenance"]["original_sha256"] == figures["provenance"]["weights_sha256"]

    def test_captions_of_new_pairs_may_be_longer_than_those_of_the_data(
        self, transformers: Any, folder: Path, tmp_path: Path
    ) -> None:
        write_strips(tmp_path / "digits", n_train=12, n_test=4)
        rows = (tmp_path / "digits" / "test.csv").read_text().splitlines()
        longer = "a much longer caption of two digits than any that the model was trained on"
        for name, said in (("unseen", longer), ("test", longer + " or was not"), ("short", "two")):
            lines = [rows[0], *(f"{row.partition(',')[0]},{said}" for row in rows[1:])]
            (tmp_path / "digits" / f"{name}.csv").write_text("\n".join(lines) + "\n")
        text = UNLEARN.replace("[forget]", 'unseen = "digits/unseen.csv"\ntest = "digits/test.csv"\n[forget]')
        for memory in (0, 1024):
            more = text.replace("[forget]", f"memory = {memory}\n[forget]")
            status, figures = self.run(tmp_path, more, "3\n", f"out{memory}")
            assert status == 0 and figures["sizes"]["test items"] == 4
        of = read_job(tmp_path / "settings.toml")
        _, data, _, unseen, test = load(of)
        alone = replace(of, unseen=None, test=None)
        assert data.other.shape[1] == unseen.other.shape[1] == test.other.shape[1] > load(alone)[1].other.shape[1]
        tokenizer = named_model(f"hf:{folder}").tokenizer
        assert set(tokenizer.decode(test.other)) == {longer + " or was not"}
        status, _ = self.run(tmp_path, text.replace("test.csv", "short.csv"), "3\n", "short")
        assert status == 0

    def test_adapters_and_half_precision_of_a_part_named_as_the_library_names_it(
        self, transformers: Any, folder: Path, tmp_path: Path
    ) -> None:
        text = UNLEARN.replace("[data]", 'trainable = ["vision_model.encoder.*"]\nlora = 2\ndtype = "bf16"\n[data]')
        status, figures = self.run(tmp_path, text, "3\n", "out")
        assert status == 0 and figures["provenance"]["dtype"] == "bf16"
        before = transformers.CLIPModel.from_pretrained(folder).state_dict()
        after = read_weights(tmp_path / "out" / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
        linear = {n for n, v in before.items() if n.startswith("vision_model.encoder.") and v.ndim == 2}
        assert changed.keys() == linear and len(linear) >= 6
        for difference in changed.values():
            values = torch.linalg.svdvals(difference.double())
            assert values[1] > 0 and values[2] < 1e-2 * values[0]  # but for the rounding of the sum

    def test_methods_are_compared_on_pictures_and_captions(
        self, transformers: Any, folder: Path, tmp_path: Path
    ) -> None:
        write_strips(tmp_path / "digits", n_train=12, n_test=4)
        text = UNLEARN.replace("[forget]", 'test = "digits/test.csv"\n[forget]').replace('"gone.txt"', "[3, 4]")
        names = 'methods = ["random_label", "scrub", "ccu"]\nretrain = "tests.models.test_clip:trained_anew"\n'
        (tmp_path / "settings.toml").write_text(text + "[compare]\n" + names)
        words = ["unlearn", str(tmp_path / "settings.toml"), "--compare", "--out", str(tmp_path / "out"), "--quiet"]
        assert cli.main(words) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        value = results["unlearn"]["train.csv"]["pairs"]["0"]
        assert list(value["metrics"]) == ["original", "gold", "scrub", "ccu"]
        assert [what for what, _ in results["left_out"]] == ["linear probe", "relearning", "random labels"]
        assert set(value["metrics"]["ccu"]["retrieval"]) == {"forget", "retain", "retain_test"}
        assert value["reference"]["other"] == value["metrics"]["gold"]["other"]  # of pairs nothing is to stay
        # The library reads the retrained model, which is found again.
        kept = tmp_path / "out" / "models" / "retrained-seed0.safetensors"
        transformers.CLIPModel.from_pretrained(folder).load_state_dict(read_weights(kept))
        written = kept.stat().st_mtime_ns
        (tmp_path / "out" / "parts" / "gold-seed0.json").unlink()
        assert cli.main(words) == 0 and kept.stat().st_mtime_ns == written
        again = json.loads((tmp_path / "out" / "results.json").read_text())
        assert again["unlearn"]["train.csv"]["pairs"]["0"]["metrics"] == value["metrics"]

    def test_open_clip_by_name_with_arrays(self, open_clip: Any, tmp_path: Path) -> None:
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-clip.json")
        torch.save(open_clip.create_model("tiny-clip", pretrained=None).state_dict(), tmp_path / "w.pt")
        named = UNLEARN.replace("hf:clip", "open_clip:tiny-clip").replace("digits/train.csv", "pairs.npz")
        pictures = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
        tokens = open_clip.get_tokenizer("tiny-clip")([f"picture number {i}" for i in range(12)])
        np.savez(
            tmp_path / "pairs.npz", visual=pictures, other=tokens.numpy().astype(np.uint16), ids=np.arange(12) + 20
        )
        with pytest.raises(ValueError, match="weights: expected a file of trained weights"):
            (tmp_path / "settings.toml").write_text(named)
            run_job(read_job(tmp_path / "settings.toml"), tmp_path / "none")
        status, figures = self.run(tmp_path, named.replace("[data]", 'weights = "w.pt"\n[data]'), "22 23", "out")
        assert status == 0 and figures["sizes"] == {"forget items": 2, "retain items": 10}
        written = from_checkpoint(open_clip_model("tiny-clip", open_clip), tmp_path / "out" / "model.safetensors")
        assert OpenClipEncoder(written()).embed_visual(torch.from_numpy(pictures)).shape == (12, 16)
        np.savez(tmp_path / "pairs.npz", visual=pictures.astype(np.float32), other=tokens.int(), ids=np.arange(12) + 20)
        with pytest.raises(ValueError, match=r"path: expected uint8 pixels or numbers in \[0, 1\] as visual"):
            load(read_job(tmp_path / "settings.toml"))
        np.savez(tmp_path / "pairs.npz", visual=pictures / 255, other=tokens.int(), ids=np.arange(12) + 20)
        model, data, *_ = load(read_job(tmp_path / "settings.toml"))
        assert model.embed_other(data.other).shape == (12, 16)

    @pytest.mark.parametrize(
        ("old", "new", "ids", "message"),
        [
            ("hf:clip", "clip", "3", "model: expected open_clip:NAME or hf:FOLDER"),
            ('"hf:clip"', '"hf:clip"\nmake = "a:b"', "3", "expected make or name in [model]"),
            ("hf:clip", "hf:nowhere", "3", "model: expected a folder with config.json"),
            ('"hf:clip"', '"hf:clip"\nweights = "none.pt"', "3", "weights: expected a file"),
            ("train.csv", "none.csv", "3", "path: expected a file or folder"),
            ('train.csv"', 'train.csv"\ncaption_column = "words"', "3", "expected the columns images and words"),
            ("steps", "steps", "12", "ids: expected ids or pictures of items"),
            ("steps", "steps", "train/99999.png", "ids: expected ids or pictures of items"),
            ('kind = "pairs"\nids = "gone.txt"', "classes = [1]", "3", "data: expected labels to forget classes"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, folder: Path, tmp_path: Path, capsys: Any, old: str, new: str, ids: str, message: str
    ) -> None:
        status, _ = self.run(tmp_path, UNLEARN.replace(old, new, 1), ids, "out")
        assert status == 1 and message in capsys.readouterr().err


def open_clip_model(name: str, open_clip: Any) -> Any:
    return lambda: open_clip.create_model(name, pretrained=None)


@pytest.mark.parametrize("older", [False, True])
def test_bars_of_the_library_are_off_while_we_load_and_as_before_then(
    older: bool,
    transformers: Any,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs = transformers.utils.logging
    if older:  # transformers 4 has one switch alone
        monkeypatch.delattr(logs, "set_tqdm_hook", raising=False)
    for shown in (True, False):
        (logs.enable_progress_bar if shown else logs.disable_progress_bar)()
        try:
            capfd.readouterr()
            transformers.CLIPModel.from_pretrained(folder)
            bar = "Loading weights" in capfd.readouterr().err
            named_model(f"hf:{folder}").factory()
            assert "Loading" not in capfd.readouterr().err and logs.is_progress_bar_enabled() == shown
            transformers.CLIPModel.from_pretrained(folder)
            assert ("Loading weights" in capfd.readouterr().err) == bar
        finally:
            logs.enable_progress_bar()


def test_a_folder_whose_weights_are_not_all_there(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    for changed, message in (
        ({key: value for key, value in state.items() if key != "logit_scale"}, "got none that fit logit_scale"),
        (b"version https://git-lfs.github.com/spec/v1\n", "model: expected weights, got a Git LFS pointer"),
        (b"junk", "model: expected an undamaged file"),
    ):
        file.write_bytes(changed if isinstance(changed, bytes) else save(changed, {"format": "pt"}))
        with pytest.raises(ValueError, match=message):
            choose_model(f"hf:{folder}")(["a caption"]).factory()


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("open_clip:ViT-Z-1", {}, "model: expected a name of open_clip.list_models"),
        ("open_clip:", {}, "model: expected small, small:WIDTH, open_clip:NAME or hf:FOLDER"),
        ("hf:nowhere", {}, "model: expected a folder with config.json"),
        ("open_clip:RN50", {"size": "64x64"}, "size: expected 224x224, the input of 'open_clip:RN50', got 64x64"),
        ("open_clip:RN50", {"grey": True}, "grey: expected colours"),
    ],
)
def test_models_that_cannot_be(open_clip: Any, spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_model(spec, **options)(["a caption"])


def test_open_clip_by_name(open_clip: Any) -> None:
    model = choose_model("open_clip:RN50")(["a caption"])
    assert model.image_shape == (3, 224, 224)
    assert model.about["model"] == "open_clip:RN50"
    assert len(model.tokenizer) == 49408
