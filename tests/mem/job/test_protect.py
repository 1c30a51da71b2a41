"""Protecting a dataset on a disk: exact, complete, resumable, never silently unprotected."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ccu_fast.data.captions import DiskSource, list_pairs
from ccu_fast.data.captions import dataset as dataset_module
from ccu_fast.mem.config import Method
from ccu_fast.mem.job import BadData, Job, estimate, inspection, protect_dataset
from ccu_fast.mem.job import checkpoint as checkpoint_module
from ccu_fast.mem.job import protect as job_module
from ccu_fast.mem.job.checkpoint import Workplace, workplace
from ccu_fast.mem.job.models import small
from ccu_fast.mem.job.share import average_surrogate, share
from ccu_fast.mem.publish import writer as writer_module
from ccu_fast.mem.publish.card import dataset_card
from ccu_fast.ops.noise_store.api import NoiseStore
from tests.support import mem_datasets as made
from tests.support.forked import in_child, on_ranks
from tests.support.mem_datasets import WRITERS
from tests.support.mem_jobs import SHAPE, TINY, job, tree

pytestmark = pytest.mark.usefixtures("one_thread")


def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The protections that runs make, to compare what they optimised with what is read back."""
    seen: list[Any] = []
    inner = job_module.Protection

    def make(*arguments: Any, **options: Any) -> Any:
        seen.append(inner(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(job_module, "Protection", make)
    return seen


@pytest.mark.parametrize("format", WRITERS)
def test_read_back_gives_the_pixels_and_ids_that_were_optimised(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = captured(monkeypatch)
    source = WRITERS[format](tmp_path / "in")
    manifest = protect_dataset(job(source, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()
    original, published = list_pairs(source), list_pairs(tmp_path / "out")
    assert (published.format, published.bad) == (format, [])
    assert torch.equal(published.image_of, original.image_of)
    run = seen[0]
    every = torch.arange(original.n_images)
    pixels = DiskSource(published, SHAPE, threads=1).images(every)
    clean = DiskSource(original, SHAPE, threads=1).images(every)
    assert torch.equal(pixels.short() - clean.short(), run.store.data.short())
    assert 0 < int(run.store.data.abs().max()) == manifest["measured"]["eps_255"] <= 8
    from ccu_fast.mem.triggers import insert_triggers

    want = insert_triggers(run.tokens, run.triggers, run.tokenizer)
    assert torch.equal(run.tokenizer.encode(published.captions), want)
    for mine, theirs in zip(published.captions, original.captions, strict=True):
        assert mine.endswith(" " + theirs) and len(mine.split()) == len(theirs.split()) + 3


def test_the_manifest_names_every_file_and_what_was_done(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    manifest = protect_dataset(job(source, tmp_path / "out", seed=5))
    files = tree(tmp_path / "out")
    assert json.loads(files.pop("manifest.json")) == manifest
    assert files.pop("README.md").decode() == dataset_card(manifest)
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == manifest["sha256"]
    assert (manifest["images"], manifest["rows"], manifest["seed"]) == (6, 7, 5)
    assert manifest["method"]["name"] == "mem" and manifest["settings"]["eps"] == 8
    assert manifest["surrogate"]["model"] == "small" and manifest["versions"]["torch"] == torch.__version__
    assert 25 < manifest["measured"]["psnr_db"] < 60 and 0.5 < manifest["measured"]["ssim"] < 1
    assert [len(manifest["losses"][name]) for name in ("surrogate", "triggers", "noise")] == [2, 1, 2]


def test_tables_keep_columns_order_and_line_ends(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in", kind="jpg")
    protect_dataset(job(source, tmp_path / "out"))
    raw = (tmp_path / "out" / "train.csv").read_bytes()
    assert raw.count(b"\r\n") == raw.count(b"\n") == 8
    rows = list(csv.DictReader(io.StringIO(raw.decode())))
    assert [row["id"] for row in rows] == [*(f"id {i}" for i in range(6)), "again"]
    assert [row["images"] for row in rows] == [*(f"pictures/{i}.png" for i in range(6)), "pictures/0.png"]
    source = made.write_imagefolder(tmp_path / "hf")
    protect_dataset(job(source, tmp_path / "hf out"))
    records = [json.loads(line) for line in (tmp_path / "hf out" / "metadata.jsonl").read_text().splitlines()]
    assert [list(r) for r in records] == [["file_name", "text", "boxes"]] * 6
    assert records[3]["boxes"] == [3, 2.5]


def test_shards_are_read_by_webdataset_and_give_nothing_away(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = made.write_shards(tmp_path / "in", kind="jpg")
    with tarfile.open(source / "00000.tar", "a") as archive:
        made.add_member(archive, "000000002.npy", b"an embedding of the clean picture")
    manifest = protect_dataset(job(source, tmp_path / "out"))
    assert manifest["members_left_out"] == {"npy": 1}
    assert sorted(manifest["sha256"]) == ["00000.tar", "00001.tar"]
    urls = [str(tmp_path / "out" / f"{i:05d}.tar") for i in range(2)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(6)]
    for i, sample in enumerate(samples):
        assert {k for k in sample if k[0] != "_"} == {"png", "txt", "json"}
        about = json.loads(sample["json"])
        assert about["caption"] == sample["txt"].decode() != made.caption(i)
        assert about["sha256"] == hashlib.sha256(sample["png"]).hexdigest()
        assert about["url"] == f"https://example.org/{i}"


def test_reference_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = captured(monkeypatch)
    protect_dataset(job(made.write_csv(tmp_path / "in"), tmp_path / "out", reference_files=True))
    noise, tokens = (torch.load(tmp_path / "out.reference" / f"{n}.pt", weights_only=True) for n in ("noise", "token"))
    assert torch.equal(tokens, seen[0].triggers) and tokens.shape == (7, 3)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    want = seen[0].store.data[seen[0].source.image_of].float() / 255 / std
    assert noise.dtype == torch.float32 and torch.allclose(noise, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["clean", "random-3", "em", "trigger-3", "uap"])
def test_other_methods(tmp_path: Path, method: str) -> None:
    source = made.write_csv(tmp_path / "in")
    manifest = protect_dataset(job(source, tmp_path / "out", method=Method.parse(method)))
    changed = manifest["measured"]["eps_255"] > 0
    assert changed == (method in ("random-3", "em", "uap"))
    longer = len(list_pairs(tmp_path / "out").captions[0].split()) > len(made.caption(0).split())
    assert longer == (method in ("random-3", "trigger-3"))


# Resuming


def kill_at(owner: Any, name: str, call: int) -> Callable[[], None]:
    """The process ends by SIGKILL when ``owner.name`` is called for the ``call``-th time."""
    inner, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **options)

    return lambda: setattr(owner, name, counted)


MOMENTS = {
    "while looking at the pictures": (inspection, "scan", 1),
    "in the first round": (NoiseStore, "scatter_", 1),
    "in the second round": (NoiseStore, "scatter_", 3),
    "when the second checkpoint is begun": (Workplace, "save", 2),
    "when its noise is written": (NoiseStore, "save", 2),
    "when its state is written": (torch, "save", 3),
    "when the export is begun": (writer_module, "encode_png", 1),
    "in the middle of the export": (writer_module.Publisher, "_place", 4),
    "in the second chunk": (writer_module.Publisher, "_write_chunk", 2),
    "before the manifest": (job_module, "write_manifest", 1),
    "before the last rename": (Workplace, "finish", 1),
    "after the last rename": (checkpoint_module, "remove_run", 2),
}

ON_DISK = ("in the second round", "when its noise is written", "in the middle of the export")  # where it differs


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_killed_at_any_moment_the_same_call_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    monkeypatch.setattr(writer_module, "CHUNK", 3)
    source = made.write_csv(tmp_path / "in")
    protect_dataset(job(source, tmp_path / "whole"))
    whole = tree(tmp_path / "whole")
    for moment, place in MOMENTS.items():
        if on_disk and moment not in ON_DISK:
            continue
        out = tmp_path / moment
        task = job(source, out, noise_on_disk=on_disk)

        def killed(task: Job = task, place: Any = place) -> None:
            kill_at(*place)()
            protect_dataset(task)

        status = in_child(killed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
        assert moment == "after the last rename" or not out.exists(), moment
        protect_dataset(task)
        assert tree(out) == whole, moment
        assert not out.with_name(out.name + ".partial").exists(), moment


def test_a_run_that_goes_on_does_not_do_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK", 3)
    task = job(made.write_csv(tmp_path / "in"), tmp_path / "out")

    def killed() -> None:
        kill_at(writer_module.Publisher, "_write_chunk", 2)()
        protect_dataset(task)

    in_child(killed)
    seen = captured(monkeypatch)
    rounds, chunks, looked = [], [], []
    inner = writer_module.Publisher._write_chunk
    monkeypatch.setattr(
        writer_module.Publisher, "_write_chunk", lambda self, chunk: (chunks.append(chunk), inner(self, chunk))[1]
    )
    monkeypatch.setattr(inspection, "scan", lambda *_: looked.append(1))
    protect_dataset(task, lambda stage, done, total, note: rounds.append((stage, done)))
    assert [done for stage, done in rounds if stage.startswith("protecting")] == [10]
    assert len(chunks) == 1 and not looked and len(seen) == 1
    before = tree(tmp_path / "out")
    assert protect_dataset(task)["rows"] == 7, "a finished run is told, not repeated"
    assert tree(tmp_path / "out") == before and len(seen) == 1


def test_a_run_that_was_killed_while_it_looked_at_the_pictures_looks_at_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "KEPT", 0.0)
    monkeypatch.setattr(dataset_module, "_CHUNK", 2)
    source = made.write_csv(tmp_path / "in")
    protect_dataset(job(source, tmp_path / "whole"))
    task = job(source, tmp_path / "out")

    def killed() -> None:
        kill_at(inspection, "unreadable_captions", 1)()  # the scan is over, but nothing of its last part is kept
        protect_dataset(task)

    assert os.WIFSIGNALED(in_child(killed))
    assert (tmp_path / "out.partial" / "scanning-0.pt").exists()
    looked: list[bytes] = []
    inner = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", lambda data, *a, **o: (looked.append(data), inner(data, *a, **o))[1])
    told: list[int] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "checking pictures" and done == total:
            told.append(len(looked))

    protect_dataset(task, progress)
    assert told == [2], "four of six were found good"
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_captions_are_encoded_once_where_one_process_has_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    inner = job_module.Protection

    def make(*arguments: Any, **options: Any) -> Any:
        seen.append(options["captions"])
        return inner(*arguments, **options)

    monkeypatch.setattr(job_module, "Protection", make)
    protect_dataset(job(made.write_csv(tmp_path / "in"), tmp_path / "out"))
    assert seen == [None]


def test_a_torn_file_of_a_finished_chunk_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = job(made.write_csv(tmp_path / "in"), tmp_path / "out")

    def killed() -> None:
        kill_at(job_module, "write_manifest", 1)()
        protect_dataset(task)

    in_child(killed)
    picture = tmp_path / "out.partial" / "publish" / "pictures" / "3.png"
    picture.write_bytes(picture.read_bytes()[:20])
    protect_dataset(task)
    protect_dataset(job(tmp_path / "in" / "train.csv", tmp_path / "again"))
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


# Bad input


def test_bad_parts_are_an_error_or_a_listed_skip(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in", n=8)
    pictures = tmp_path / "in" / "pictures"
    (pictures / "1.png").unlink()
    (pictures / "2.png").write_bytes(made.encoded(2)[:200])
    with pytest.raises(BadData, match="got 2 bad items") as told:
        protect_dataset(job(source, tmp_path / "out"))
    assert "1.png: no such file" in str(told.value) and len(told.value.bad) == 2
    with source.open("a") as file:
        file.write("x,pictures/3.png,\r\n")
    with pytest.raises(BadData, match=r"got 3 bad items .* record 10: empty caption; .*1\.png: no such file") as told:
        protect_dataset(job(source, tmp_path / "out"))
    assert len(told.value.bad) == 3 and not (tmp_path / "out").exists(), "rows and pictures are told at once"
    manifest = protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    assert manifest["skipped"]["count"] == 3
    assert [item["where"] for item in manifest["skipped"]["items"]] == [
        "train.csv, record 10",
        "pictures/1.png",
        "pictures/2.png",
    ]
    rows = list(csv.DictReader((tmp_path / "out" / "train.csv").open(newline="")))
    assert [row["images"] for row in rows] == [f"pictures/{i}.png" for i in (0, 3, 4, 5, 6, 7, 0)]
    assert sorted(p.name for p in (tmp_path / "out" / "pictures").iterdir()) == [f"{i}.png" for i in (0, 3, 4, 5, 6, 7)]
    for number in (0, 3, 4, 5, 6, 7):
        assert (tmp_path / "out" / "pictures" / f"{number}.png").read_bytes() != made.encoded(number)


def test_the_manifest_tells_nothing_of_the_folders_above(tmp_path: Path) -> None:
    """A picture outside the data set's folder is told whole to who runs it, and by its name to who gets the output."""
    made.write_csv(tmp_path / "secret")
    table = tmp_path / "in" / "t.csv"
    table.parent.mkdir()
    rows = [f"{tmp_path}/secret/pictures/{i}.png,{made.caption(i)}" for i in range(6)]
    table.write_text("\n".join(["images,caption", *rows]))
    (tmp_path / "secret" / "pictures" / "2.png").unlink()
    with pytest.raises(BadData, match=rf"{tmp_path}/secret/pictures/2\.png: no such file"):
        protect_dataset(job(table, tmp_path / "out"))
    manifest = protect_dataset(job(table, tmp_path / "out", skip_bad=True))
    assert manifest["skipped"]["items"] == [{"where": "images/2.png", "why": "no such file"}]
    assert "secret" not in (tmp_path / "out" / "manifest.json").read_text()


def test_processes_that_list_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that one of them sees another state of: its pictures would get the others' captions."""
    source = made.write_csv(tmp_path / "in")
    monkeypatch.setattr(job_module, "gather_objects", lambda value: [value, "another"])
    with pytest.raises(ValueError, match=r"input: expected the same files and rows for all processes, got others"):
        protect_dataset(job(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_an_error_or_a_listed_skip(tmp_path: Path) -> None:
    source = made.write_shards(tmp_path / "in", n=9)
    (source / "00001.tar").write_bytes((source / "00001.tar").read_bytes()[:1500])
    with pytest.raises(BadData, match=r"00001\.tar: unreadable shard: .*unexpected end"):
        protect_dataset(job(source, tmp_path / "out"))
    few = made.write_shards(tmp_path / "few", n=2, shard=1)
    (few / "00001.tar").write_bytes((few / "00001.tar").read_bytes()[:1500])
    with pytest.raises(BadData, match=r"00001\.tar: unreadable shard"):  # and not that there are too few
        protect_dataset(job(few, tmp_path / "out"))
    manifest = protect_dataset(job(source, tmp_path / "out", skip_bad=True))
    assert [item["where"] for item in manifest["skipped"]["items"]] == ["00001.tar"]
    assert sorted(manifest["sha256"]) == ["00000.tar", "00002.tar"]


def test_a_full_disk_leaves_no_output_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.write_csv(tmp_path / "in")
    protect_dataset(job(source, tmp_path / "whole"))
    inner, written = Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            inner(path, data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return inner(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        protect_dataset(job(source, tmp_path / "out"))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and len(written) == 3
    protect_dataset(job(source, tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("place", ["", "out", "deep/out"])
def test_the_originals_are_no_place_for_the_output(tmp_path: Path, format: str, place: str) -> None:
    WRITERS[format](tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = tree(tmp_path)
    for start in (protect_dataset, estimate):
        with pytest.raises(ValueError, match="out: expected a folder outside the input"):
            start(job(tmp_path / "in", tmp_path / "link" / place))
    assert tree(tmp_path) == before and not (tmp_path / "in" / "out").exists()


def test_a_finished_dataset_of_other_settings_is_told_as_one(tmp_path: Path) -> None:
    source = made.write_folder(tmp_path / "in")
    protect_dataset(job(source, tmp_path / "out"))
    before = tree(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"out: .*holds a dataset of other settings.*choose another folder"):
        protect_dataset(job(source, tmp_path / "out", settings=replace(TINY, eps=4)))
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"expected a new or empty folder, got [^,]*out$"):
        protect_dataset(job(source, tmp_path / "out"))


def test_outputs_that_are_taken(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        protect_dataset(job(source, tmp_path / "out"))
    assert tree(tmp_path / "out") == {"mine.txt": b"keep"}
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected the folder of an unfinished run"):
        protect_dataset(job(source, tmp_path / "b"))
    task = job(source, tmp_path / "c")
    with (
        workplace(tmp_path / "c.partial", {"seed": 1}) as place,
        pytest.raises(BlockingIOError, match="no other process at work"),
    ):
        protect_dataset(replace(task, fresh=True))
    (place.folder / "checkpoint.json").write_text('{"batches": 1}')
    with pytest.raises(ValueError, match=r"expected the same run.*seed 1 there, 0 here.*--fresh"):
        protect_dataset(task)
    protect_dataset(replace(task, fresh=True))
    with pytest.raises(FileExistsError):
        protect_dataset(job(source, tmp_path / "c", seed=1))


def test_foreign_checkpoints(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name, message in {"text.pt": "expected an undamaged file", "other.pt": "got others"}.items():
        model = partial(small, image_shape=SHAPE, width=32, checkpoint=tmp_path / name)
        with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
            protect_dataset(Job(source, tmp_path / name.replace(".", ""), model, settings=TINY, threads=1))
    task = job(source, tmp_path / "out")

    def killed() -> None:
        kill_at(writer_module, "encode_png", 1)()
        protect_dataset(task)

    in_child(killed)
    noise = tmp_path / "out.partial" / "batch-000000010" / "0.noise"
    noise.unlink()
    NoiseStore(6, SHAPE).save(noise, tag="another run")
    with pytest.raises(ValueError, match="tag"):
        protect_dataset(task)


# Several processes


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_disjoint_and_complete(tmp_path: Path, world: int) -> None:
    for number, source in enumerate((made.write_csv, made.write_shards)):
        listing = list_pairs(source(tmp_path / str(number), n=13))
        shares = [share(listing, rank, world) for rank in range(world)]
        assert sorted(image for part in shares for image in part) == list(range(13))
        if listing.spans is not None:
            shards = [set(listing.spans[part, 0].tolist()) for part in shares]
            assert sum(map(len, shards)) == 5 == len(set.union(*shards)), "no shard has two writers"


def test_too_many_processes(tmp_path: Path) -> None:
    listing = list_pairs(made.write_shards(tmp_path / "in", n=6))
    with pytest.raises(ValueError, match="at least two images in whole shards for each of 3"):
        share(listing, 0, 3)


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()


def step(net: nn.Module, rank: int, at: int, *, average: bool) -> list[torch.Tensor]:
    """One optimiser step on data that depend on the process; the gradients that it used."""
    rng = torch.Generator().manual_seed(100 * at + rank)
    net.zero_grad()
    net(torch.randn(6, 4, generator=rng, dtype=torch.float64)).square().sum().backward()
    if average:
        average_surrogate(net.parameters(), net.buffers())
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    return gradients


def train_shared(rank: int) -> dict[str, Any]:
    mine = net()
    used = [step(mine, rank, at, average=True) for at in range(3)]
    return {"state": mine.state_dict(), "first": used[0]}


def test_two_processes_hold_the_same_bits_and_use_the_mean_gradient(tmp_path: Path) -> None:
    a, b = on_ranks(2, tmp_path, train_shared)
    assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
    alone = [step(net(), rank, 0, average=False) for rank in range(2)]
    for got, x, y in zip(a["first"], *alone, strict=True):
        assert torch.equal(got, (x + y) / 2)
    assert not torch.equal(alone[0][0], alone[1][0])
