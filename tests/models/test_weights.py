"""The one loader of weights: every layout that people have on their disks, and a sentence for what is none."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ccu_fast.models.weights import from_checkpoint, read_weights


class Tied(nn.Module):
    """Two names of one parameter, and layers to be wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.tower = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        self.head.weight = self.table.weight


class Wrapper(nn.Module):
    """A user's own, whose attribute has the name that DistributedDataParallel gives."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Tied()


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def renamed(state: dict[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(key): value for key, value in state.items()}


@pytest.mark.parametrize(
    "pack",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
        lambda state: {"model": {"state_dict": state}},
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        str,
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("tower.", "tower._orig_mod."),  # one compiled part
    ],
)
def test_layouts_of_torch(tmp_path: Path, pack: Callable[[Any], Any], change: Callable[[str], str]) -> None:
    model = Tied()
    torch.save(pack(renamed(model.state_dict(), change)), tmp_path / "w.pt")
    assert same(from_checkpoint(Tied, tmp_path / "w.pt")(), model)


def test_a_model_that_is_wrapped_itself(tmp_path: Path) -> None:
    model = Wrapper()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert same(from_checkpoint(Wrapper, tmp_path / "w.pt")(), model)
    assert same(from_checkpoint(Tied, tmp_path / "w.pt")(), model.module)
    torch.save(model.module.state_dict(), tmp_path / "w.pt")
    assert same(from_checkpoint(Wrapper, tmp_path / "w.pt")(), model)


@pytest.mark.parametrize("kept", ["table.weight", "head.weight"])
def test_one_name_of_a_tied_tensor_is_enough(tmp_path: Path, kept: str) -> None:
    model = Tied()
    state = {key: value for key, value in model.state_dict().items() if key == kept or "tower" in key}
    save_file(state, tmp_path / "w.safetensors")
    assert same(from_checkpoint(Tied, tmp_path / "w.safetensors")(), model)
    both = {**state, "table.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    save_file(both, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"weights: expected equal tensors for table.weight, head.weight"):
        from_checkpoint(Tied, tmp_path / "w.safetensors", "weights")()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path: Path, kind: str) -> None:
    model = Tied()
    parts = [renamed(dict(part.state_dict()), f"{name}.{{}}".format) for name, part in model.named_children()]
    files = [f"model-0000{number}-of-00003.{kind}" for number in (1, 2, 3)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, tmp_path / file) if kind == "safetensors" else torch.save(part, tmp_path / file)
    where = {key: file for file, part in zip(files, parts, strict=True) for key in part}
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert same(from_checkpoint(Tied, index)(), model)

    def said(text: str) -> str:
        index.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_weights(index, "weights")
        return str(caught.value)

    assert "in the shards of" in said(json.dumps({"weight_map": where | {"more": files[0]}}))
    outside = tmp_path.parent / "outside.bin"
    assert "got none called '../outside.bin'" in said(json.dumps({"weight_map": {"a": f"../{outside.name}"}}))
    assert "expected an index of shards" in said("[]") and "an undamaged file" in said("{")
    (tmp_path / files[1]).unlink()
    assert f"got none called {files[1]!r}" in said(json.dumps({"weight_map": where}))


class Harmless:
    """Unpickled it would call print."""

    def __reduce__(self) -> Any:
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(nn.Linear(1, 1), path), "got a pickle that calls torch.nn.modules.linear.Linear"),
        (lambda path: torch.save({"args": Namespace(), "model": {}}, path), "calls argparse.Namespace"),
        (lambda path: torch.save({"state_dict": Harmless()}, path), "got a pickle that calls print"),
        (lambda path: path.write_bytes(pickle.dumps(Harmless(), 2)), "got a pickle that calls"),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "Git LFS pointer",
        ),
        (lambda path: path.write_bytes(b""), "expected an undamaged file"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "expected an undamaged file"),
        (lambda path: torch.save([torch.zeros(1)], path), "expected a state_dict, got list"),
        (lambda path: torch.save({"epoch": 3, "net": {}}, path), "got int as 'epoch'"),
        (lambda path: torch.save({"model": {}}, path), "got an empty one"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "expected weights of Tied, got others"),
        (lambda path: path.mkdir(), "expected a file, got the folder"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, capsys: Any, write: Callable[[Path], Any], message: str) -> None:
    for file in ("w.pt", "w.safetensors"):
        if file == "w.pt" or "pickle" not in message:
            write(tmp_path / file)
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                from_checkpoint(Tied, tmp_path / file)()
            told = str(caught.value)
            assert told.startswith("checkpoint: expected") and file in told
            assert message in told or file == "w.safetensors"
    assert capsys.readouterr().out == ""
