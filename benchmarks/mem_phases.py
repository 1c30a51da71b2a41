"""``python -m benchmarks.mem_phases``: MEM's phases on ViT-B/32-shaped towers, done as by the authors and by us.

Providers, on one batch, the same weights and the same ids:

- authors: the plain transcription in tests/support/mem_transcription.py, which makes the authors' decisions with the
  authors' work: the image tower again for every candidate, 77 positions, scores on the host, gradients of all weights
- compat: the same decisions, by ccu_fast
- default: ccu_fast's own decisions (a choice for each row, a gradient for each position)

Nothing is printed unless compat chose the authors' triggers and took the authors' PGD step. The trigger pass runs once,
the steps several times (median; the first surrogate step also creates the optimiser's state). Times are seconds of CPU
time of this process, which other processes on the machine distort less than wall time; wall time is stored too. A round
is one trigger pass, ``--pgd-steps`` PGD steps and one surrogate step for each batch (the authors make 200 of them for
234 batches of Flickr8K). The result goes to protection/phases.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, results
from ccu_fast.mem import Method, Protection, Settings
from ccu_fast.mem.source import TensorSource
from ccu_fast.models.clip import TransformersClipEncoder

SOT, EOT, CONTEXT = 49406, 49407, 77
DEPTH = 2  # a line for each provider


class Ids:
    """Captions that are written as numbers; CLIP's special ids and context."""

    sot, eot, pad, context = SOT, EOT, 0, CONTEXT

    def __len__(self) -> int:
        return 49408

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Numbers → ids."""
        rows = [[SOT, *map(int, caption.split()), EOT] for caption in captions]
        out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out

    def decode(self, ids: Tensor) -> list[str]:
        """Ids → numbers."""
        return [" ".join(map(str, row)) for row in ids.tolist()]

    def words(self) -> Tensor:
        """Those."""
        return self.allowed()

    def allowed(self) -> Tensor:
        """Every id but the special ones."""
        mask = torch.ones(len(self), dtype=torch.bool)
        mask[SOT:] = False
        return mask


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, check, store, print."""
    parser = argparse.ArgumentParser(prog="benchmarks.mem_phases", description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--triggers", type=int, default=3, help="trigger words")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--pgd-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of a PGD and of a surrogate step; the median counts")
    parser.add_argument("--layers", type=int, default=12, help="of both towers; fewer for a quick look")
    parser.add_argument("--out", type=Path, help="default: protection/phases.json")
    a = parser.parse_args(argv)
    result = measure(a)
    facts = environment.describe(torch.device("cpu"))
    path = a.out or Path(__file__).parent / "protection" / "phases.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.store(path, result | {"environment": facts}, DEPTH)
    print(results.text({k: result[k] for k in ("shape", "cpu_seconds", "speedup", "gate")}, DEPTH))
    return 0


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """All phases of all providers on one batch.

    Raises:
        RuntimeError: compat and the authors' way do not agree; no figure is given then.
    """
    from transformers import CLIPConfig, CLIPModel

    from tests.support import mem_transcription as authors

    def make() -> Any:
        config = CLIPConfig(
            text_config={"num_hidden_layers": a.layers, "vocab_size": 49408, "eos_token_id": EOT},
            vision_config={"num_hidden_layers": a.layers},
        )
        return TransformersClipEncoder(CLIPModel(config))

    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (a.batch, 3, 224, 224), generator=rng, dtype=torch.uint8)
    # Captions of 8 to 14 tokens, as Flickr8K's are.
    captions = [
        " ".join(map(str, torch.randint(300, 40000, (8 + i % 7,), generator=rng).tolist())) for i in range(a.batch)
    ]
    base = Settings(
        eps=8,
        step=1,
        pgd_steps=1,
        rounds=1,
        trigger_rounds=1,
        first="random",
        words="everyday",
        trigger_words=None,
        candidates=a.candidates,
        surrogate_steps=1,
        restart=0,
        batch=a.batch,
        lr=1e-4,
        weight_decay=0.2,
        beta2=0.999,
    )
    runs = {
        name: Protection(
            TensorSource(images, captions),
            Ids(),
            make,
            method=Method.parse(f"mem-{a.triggers}"),
            settings=changed(base, compat=name == "compat"),
            seed=0,
        )
        for name in ("compat", "default")
    }
    start = torch.randint(300, 40000, (a.batch, a.triggers), generator=rng)
    for run in runs.values():
        run.triggers.copy_(start)
        run.worker.renew("surrogate 0")
    ours, default = runs["compat"].worker, runs["default"].worker
    theirs: Any = make()
    theirs.load_state_dict(ours.surrogate.state_dict())  # type: ignore[attr-defined]
    theirs.eval()
    cpu: dict[str, dict[str, float]] = {"authors": {}, "compat": {}, "default": {}}
    wall: dict[str, dict[str, float]] = {"authors": {}, "compat": {}, "default": {}}
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {"authors": {}, "compat": {}, "default": {}}

    def clock(provider: str, phase: str, work: Callable[[], Any]) -> Any:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        value = work()
        taken[provider].setdefault(phase, []).append(
            (time.process_time() - cpu_start, time.perf_counter() - wall_start)
        )
        cpu[provider][phase], wall[provider][phase] = map(median, zip(*taken[provider][phase], strict=True))
        return value

    pixels = images.float() / 255
    rows = torch.arange(a.batch)
    put = authors.put(runs["compat"].tokens, start, CONTEXT, EOT)
    with torch.no_grad():  # what is done once in a process (threads, packing of weights) is nobody's
        for model in (theirs, ours.surrogate, default.surrogate):
            model.encode_image(pixels[:2])
            model.encode_text(put[:2])
    from ccu_fast.mem.surrogate import frozen
    from ccu_fast.ops.topk_flips.api import TokenTable

    def whole(worker: Any, phase: str) -> None:
        for _ in worker.through(worker.begin(phase, 1)):
            pass

    def compat_triggers() -> None:
        with frozen(ours.surrogate):
            ours._triggers(images.float(), rows, TokenTable(ours.surrogate.embedding_matrix.detach()))  # type: ignore[attr-defined]

    clock("compat", "triggers", compat_triggers)
    found = clock("authors", "triggers", lambda: authors.search(theirs, pixels, put, a.triggers, a.candidates))
    clock("default", "triggers", lambda: whole(default, "triggers"))
    chosen = found[:, 1 : a.triggers + 1]
    same = float((chosen == runs["compat"].triggers).double().mean())
    runs["compat"].triggers.copy_(chosen)

    state = ours.rng.get_state()
    permuted = torch.randperm(a.batch, generator=ours.rng)
    step_text = authors.put(runs["compat"].tokens[permuted], chosen, CONTEXT, EOT)

    def compat_noise() -> None:
        ours.rng.set_state(state)
        ours.store.scatter_(rows, torch.zeros_like(images, dtype=torch.int8))
        with frozen(ours.surrogate):
            ours._noise(images.float(), rows)  # type: ignore[attr-defined]

    for _ in range(a.repeats):
        clock("compat", "PGD step", compat_noise)
        noise = clock(
            "authors",
            "PGD step",
            lambda: authors.perturb(theirs, pixels, torch.zeros_like(pixels), [step_text], 1 / 255, 8 / 255),
        )
    cpu["default"]["PGD step"], wall["default"]["PGD step"] = cpu["compat"]["PGD step"], wall["compat"]["PGD step"]
    stored = runs["compat"].store.gather(rows, dtype=torch.int8).float()
    agree = float((stored == (noise * 255).round()).double().mean())
    gate = {"triggers that agree": same, "noise that agrees": agree}
    if same < 0.95 or agree < 0.99:
        raise RuntimeError(f"compat and the authors' way do not agree, so no time is given: {gate}")

    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    for _ in range(1 + a.repeats):
        clock("authors", "surrogate step", lambda: authors.train(theirs, optimizer, pixels, put))
        clock("compat", "surrogate step", lambda: whole(ours, "surrogate"))
    for times in (cpu, wall):
        times["default"]["surrogate step"] = times["compat"]["surrogate step"]
        for phases in times.values():
            later = a.pgd_steps * phases["PGD step"] + phases["surrogate step"]
            phases["round with triggers"] = phases["triggers"] + later
            phases["round without triggers"] = later
    speedup = {
        name: {phase: cpu["authors"][phase] / seconds for phase, seconds in cpu[name].items()}
        for name in ("compat", "default")
    }
    shape = {k: getattr(a, k) for k in ("batch", "triggers", "candidates", "pgd_steps", "layers")}
    return {"shape": shape, "gate": gate, "cpu_seconds": cpu, "wall_seconds": wall, "speedup": speedup}


if __name__ == "__main__":
    sys.exit(main())
