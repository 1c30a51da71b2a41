"""A run on data that stay on the disk: the same bits, batches alone are read, memory is bounded, kills lose little."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.disk_rows import ArrayRows
from ccu_fast.data.load import load_captions, load_pairs
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.provenance import load_model, save_model
from ccu_fast.unlearn import method
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.job import run_job
from ccu_fast.unlearn.loop import Batch, run
from ccu_fast.unlearn.method import CcuStep, run_ccu
from ccu_fast.unlearn.settings import Job, read_job
from tests.support import mem_datasets, toy_unlearn
from tests.support.forked import in_child
from tests.support.peak import printed_bytes
from tests.support.toy_unlearn import pairs, toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")

TOML = """
[model]
make = "tests.support.toy_unlearn:{make}"
weights = "weights.safetensors"
[data]
path = "{path}"
memory = 0
{data}
[forget]
{forget}
[budget]
steps = 6
batch = 8
"""
KINDS = {
    "class": ("make_model", 'kind = "class"\nclasses = [1]'),
    "instances": ("make_model", 'kind = "instances"\nids = [3, 9, 12, 25, 31]'),
    "pairs": ("TwoTowers", 'kind = "pairs"\nids = [3, 9, 12, 25, 31, 40]'),
}


def job_on_disk(folder: Path, kind: str, layout: str = "npy", data: str = "") -> Job:
    """The settings of a run on toy data of which nothing is held."""
    items = pairs() if kind == "pairs" else toy()
    found = {"visual": items.visual.numpy(), "other": items.other.numpy()}
    found |= {"labels": items.labels.numpy()} if items.labelled else {}
    if layout == "npz":
        np.savez(folder / "pairs.npz", **found)  # type: ignore[arg-type]
    else:
        (folder / "pairs").mkdir()
        for name, array in found.items():
            np.save(folder / "pairs" / f"{name}.npy", array)
    make, forget = KINDS[kind]
    torch.manual_seed(0)
    model = toy_unlearn.TwoTowers() if kind == "pairs" else toy_unlearn.trained()
    save_model(model, folder / "weights.safetensors", {})
    path = "pairs.npz" if layout == "npz" else "pairs"
    (folder / "settings.toml").write_text(TOML.format(make=make, path=path, data=data, forget=forget))
    return read_job(folder / "settings.toml")


@pytest.mark.parametrize("layout", ["npy", "npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_bits_and_the_figures_of_one_in_memory(tmp_path: Path, kind: str, layout: str) -> None:
    job = job_on_disk(tmp_path, kind, layout)
    assert job.memory == 0 and load_pairs(job.data, 0)[0].on_disk
    disk, held = run_job(job, tmp_path / "disk"), run_job(replace(job, memory=1024), tmp_path / "held")
    assert disk is not None and held is not None
    one, two = (load_model(tmp_path / name / "model.safetensors")[0] for name in ("disk", "held"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for result in (disk, held):
        for spent in ("cost", "embeddings"):
            result.pop(spent)
    assert disk == held
    assert sorted(file.name for file in (tmp_path / "disk").iterdir() if not file.name.startswith("lock")) == [
        "card.md",
        "checkpoint.pt",
        "model.safetensors",
        "results.json",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_and_test_pairs_stay_on_the_disk_too(tmp_path: Path, kind: str) -> None:
    for number, name in enumerate(("unseen", "test"), start=1):
        items = pairs(40, number) if kind == "pairs" else toy(40, number)
        (tmp_path / name).mkdir()
        for part in ("visual", "other", *(["labels"] if items.labelled else [])):
            np.save(tmp_path / name / f"{part}.npy", getattr(items, part).numpy())
    job = job_on_disk(tmp_path, kind, data='unseen = "unseen"\ntest = "test"')
    job = replace(job, config=replace(job.config, early_stop=True))
    assert job.unseen is not None and load_pairs(job.unseen, 0)[0].on_disk
    disk, held = run_job(job, tmp_path / "disk"), run_job(replace(job, memory=1024), tmp_path / "held")
    for name in ("rows", "sizes", "losses", "provenance"):
        assert disk[name] == held[name]
    visual = items.visual.numpy().copy()
    visual[3, 1] = np.nan
    np.save(tmp_path / "test" / "visual.npy", visual)
    with pytest.raises(ValueError, match=r"test: expected finite numbers as visual, got NaN or infinity in 1 items"):
        run_job(job, tmp_path / "spoiled")


class PictureTowers(nn.Module):
    """Pictures 3×8×8 and two token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(192, 6)
        self.words = nn.Embedding(300, 6)

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.visual(visual.flatten(1) / 255), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return F.normalize(self.words(other).sum(1), dim=-1)


@pytest.mark.parametrize("write", [mem_datasets.write_csv, mem_datasets.write_imagefolder, mem_datasets.write_shards])
def test_pictures_and_captions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "in")

    def encode(captions: Sequence[str]) -> Tensor:
        return torch.tensor([[len(text), ord(text[-1])] for text in captions])

    torch.manual_seed(0)
    model = PictureTowers()
    config = UnlearnConfig(forget="pairs", budget=Budget(steps=3, batch=2), neighbours=0.1)
    made = []
    for memory in (None, 0):
        data, _ = load_captions(path, (3, 8, 8), encode, memory=memory)
        assert data.on_disk == (memory == 0)
        gone = data.ids < 2
        made.append(weights(run_ccu(model, data[gone], data[~gone], config).model))  # type: ignore[arg-type]
    assert torch.equal(*made) and not torch.equal(made[0], weights(model))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of the file that each reading has."""
    read: list[list[int]] = []
    rows = ArrayRows.rows
    monkeypatch.setattr(ArrayRows, "rows", lambda self, index: (read.append(index.tolist()), rows(self, index))[1])
    return read


def halves(folder: Path, items: int = 60) -> tuple[PairedData, PairedData]:
    """The first ten and the other pairs, on the disk."""
    data = pairs(items)
    for name in ("visual", "other"):
        np.save(folder / f"{name}.npy", getattr(data, name).numpy())
    disk = load_pairs(folder, memory=0)[0]
    return disk[disk.ids < 10], disk[disk.ids >= 10]


def test_a_step_reads_its_batch_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget, retain = halves(tmp_path)
    read = counted(monkeypatch)
    drawn: list[list[int]] = []

    def prepare(*_: Any) -> Callable[[Any, Batch], Tensor]:
        read.clear()

        def step(model: Any, batch: Batch) -> Tensor:
            for part in (batch.forget, batch.retain):
                drawn.extend([part.ids.tolist()] * 2)  # the visual and the other half
            visual, other = batch.embed(model)
            return (visual - other).square().sum()

        return step

    run(toy_unlearn.TwoTowers(), forget, retain, prepare, Budget(steps=4, batch=5))  # type: ignore[arg-type]
    assert read == drawn and [len(rows) for rows in read] == [5] * 16


def test_what_is_read_before_the_steps_does_not_grow_with_the_retain_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    before: list[int] = []
    called = CcuStep.__call__
    from ccu_fast.unlearn import unseen

    for name, count in (("POOL", 16), ("UNSEEN", 8), ("PARTNERS", 8)):
        monkeypatch.setattr(unseen, name, count)
    read = counted(monkeypatch)
    monkeypatch.setattr(CcuStep, "__call__", lambda *a: (before.append(sum(map(len, read))), called(*a))[1])
    for items in (60, 600):
        (tmp_path / str(items)).mkdir()
        forget, retain = halves(tmp_path / str(items), items)
        read.clear()
        before.clear()
        config = UnlearnConfig(forget="pairs", budget=Budget(steps=3, batch=5))
        run_ccu(toy_unlearn.TwoTowers(), forget, retain, config)  # type: ignore[arg-type]
        # Batches of two sets with two halves are read before their step.
        assert [after - at for at, after in pairwise(before)] == [20, 20]
        found.append((before[0], sum(map(len, read))))
    assert found[0] == found[1]


def test_a_resumed_run_reads_neither_the_batches_that_were_taken_nor_what_was_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, retain = halves(tmp_path)
    model: Any = toy_unlearn.TwoTowers()
    config = UnlearnConfig(forget="pairs", neighbours=0.1, budget=Budget(steps=9, batch=5))
    plain = weights(run_ccu(model, forget, retain, config).model)
    checkpoint = Checkpoint(tmp_path / "run.pt", every=4)
    called, calls = CcuStep.__call__, []

    def killed() -> None:
        def call(*arguments: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return called(*arguments)

        monkeypatch.setattr(CcuStep, "__call__", call)
        run_ccu(model, forget, retain, config, checkpoint=checkpoint)

    assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL
    kept = sorted(file.name for file in tmp_path.glob("run.*"))
    assert kept == ["run.forget.pt", "run.levels.pt", "run.neighbours.pt", "run.pt"]

    def never(*_: Any) -> None:
        raise AssertionError("the original model was asked again")

    for name in ("embed", "embed_visual"):
        monkeypatch.setattr(method, name, never)
    read = counted(monkeypatch)
    again, disk = halves_of(tmp_path)
    done = run_ccu(model, again, disk, config, checkpoint=checkpoint)
    assert torch.equal(weights(done.model), plain)
    # The hash of both sets, one item of the model's checks, and the batches of steps 5 to 9.
    small = [rows for rows in read if len(rows) == 5]
    assert len(small) == 5 * 4
    assert not list(tmp_path.glob("run.*.pt"))  # the run is over


def halves_of(folder: Path) -> tuple[PairedData, PairedData]:
    """Those of :func:`halves`, opened anew."""
    disk = load_pairs(folder, memory=0)[0]
    return disk[disk.ids < 10], disk[disk.ids >= 10]


def test_what_was_kept_of_other_data_is_not_used(tmp_path: Path) -> None:
    forget, retain = halves(tmp_path)
    model: Any = toy_unlearn.TwoTowers()
    config = UnlearnConfig(forget="pairs", budget=Budget(steps=2, batch=5))
    kept = method.keep_embeddings(tmp_path / "run.pt", model, retain, forget, config, None)
    assert [len(part) for part in kept.of("forget", lambda: (torch.zeros(3),), about=10)] == [3]
    assert [len(part) for part in kept.of("forget", lambda: (torch.zeros(4),), about=11)] == [4]
    plain = run_ccu(model, forget, retain, config).model
    done = run_ccu(model, forget, retain, config, checkpoint=Checkpoint(tmp_path / "run.pt"))
    assert torch.equal(weights(done.model), weights(plain))
    torch.save({"mine": 1}, tmp_path / "run.forget.pt")
    (tmp_path / "run.pt").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint: expected what a run has kept as .*run.forget.pt, or no such file"
    ):
        run_ccu(model, forget, retain, config, checkpoint=Checkpoint(tmp_path / "run.pt"))


def test_figures_of_a_part_of_the_retain_set(tmp_path: Path) -> None:
    job = job_on_disk(tmp_path, "pairs", data="judged = 20")
    assert job.judged == 20
    some, every = run_job(job, tmp_path / "some"), run_job(replace(job, judged=None), tmp_path / "every")
    assert some is not None and every is not None
    assert some["sizes"] == {"forget items": 6, "retain items": 20, "retain items not judged": 54}
    assert every["sizes"] == {"forget items": 6, "retain items": 74}
    assert some["pool"]["pairs"] == 26 and every["pool"]["pairs"] == 80
    assert some["provenance"]["retain_sha256"] == every["provenance"]["retain_sha256"]
    assert some["provenance"]["weights_sha256"] == every["provenance"]["weights_sha256"]


def test_fresh_removes_what_was_kept_too(tmp_path: Path) -> None:
    job, out = job_on_disk(tmp_path, "pairs"), tmp_path / "out"
    first = run_job(job, out)
    (out / "checkpoint.forget.pt").write_text("damaged")
    with pytest.raises(ValueError, match=r"checkpoint: expected an undamaged file, got .*checkpoint\.forget\.pt"):
        run_job(job, out)
    again = run_job(job, out, fresh=True)
    assert first is not None and again is not None and first["rows"] == again["rows"]
    assert not (out / "checkpoint.forget.pt").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("judged = 0", r"settings \[data\] judged: expected an int at least 1, got 0"),
        ('judged = "all"', r"settings \[data\] judged: expected an int"),
    ],
)
def test_numbers_that_cannot_be(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        job_on_disk(tmp_path, "pairs", data=line)


def test_memory_is_bounded_by_less_than_a_tenth_of_the_data(tmp_path: Path) -> None:
    bound, items, numbers = 16_000_000, 17_000, 10_000  # visual inputs of 170 MB
    for name, n in (("pairs", items), ("unseen", 300)):
        (tmp_path / name).mkdir()
        visual = np.lib.format.open_memmap(tmp_path / name / "visual.npy", "w+", np.uint8, (n, numbers))
        visual[:: n // 50] = np.random.default_rng(0).integers(0, 255, (len(visual[:: n // 50]), numbers))
        np.save(tmp_path / name / "other.npy", np.zeros((n, 1), np.int64))
    assert (tmp_path / "pairs" / "visual.npy").stat().st_size > 10 * bound
    code = f"""
    import tempfile, torch
    from dataclasses import replace
    from pathlib import Path
    from ccu_fast.runs.provenance import save_model
    from ccu_fast.unlearn.job import run_job
    from ccu_fast.unlearn.settings import read_job
    from tests.support.large import Towers

    folder = Path({str(tmp_path)!r})
    save_model(Towers(), folder / "weights.safetensors", {{}})
    (folder / "settings.toml").write_text('''
    [model]
    make = "tests.support.large:Towers"
    weights = "weights.safetensors"
    [data]
    path = "pairs"
    unseen = "unseen"
    memory = 1
    judged = 300
    [forget]
    kind = "pairs"
    ids = [1, 5, 9, 2000, 16000]
    [budget]
    steps = 3
    batch = 64
    ''')
    job = read_job(folder / "settings.toml")
    small = replace(job, data=job.unseen, unseen=None, ids=("1", "5"))
    run_job(small, folder / "small")  # what torch loads at its first use
    before = peak()
    run_job(job, folder / "out")
    print(peak() - before)
    """
    assert printed_bytes(code) < bound
