"""``python -m benchmarks.mem_phases``: MEM's phases on ViT-B/32-shaped towers, done as by the authors and by us.

Providers, on one batch, the same weights and the same ids:

- authors: the plain transcription in tests/support/mem_transcription.py, which makes the authors' decisions with the
  authors' work: the image tower again for every candidate, 77 positions, scores on the host, gradients of all weights;
  the towers are those of transformers
- compat: the same decisions, by ccu_fast
- default: ccu_fast's own decisions (a choice for each row, a gradient for each position), in a process of its own
- before, with ``--before FOLDER``: the same by another checkout with its compiled module, in turn with this one

Nothing is printed unless compat chose the authors' triggers and took the authors' PGD step, and the two checkouts found
the same triggers and noise. The trigger pass runs once (before and default: twice), the rest several times (median; the
first surrogate step also creates the optimiser's state). Times are seconds of CPU time of the process, which other
processes on the machine distort less than wall time; wall time is stored too. A round is one trigger pass, one noise
pass (default and before: the whole pass; else ``--pgd-steps`` PGD steps) and one surrogate step for each batch (the
authors make 200 of them for 234 batches of Flickr8K). Peak memory is what a process held at most, from its start to its
last phase. The result goes to protection/phases.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, results
from benchmarks.host_time import Worker
from ccu_fast.mem import Method, Protection, Settings
from ccu_fast.mem.source import TensorSource
from ccu_fast.models.clip import TransformersClipEncoder

SOT, EOT, CONTEXT = 49406, 49407, 77
DEPTH = 2  # a line for each provider
SCRIPT = Path(__file__).with_name("mem_round_worker.py")


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
    parser.add_argument("--before", type=Path, help="a checkout, with its compiled module in it, to be compared")
    parser.add_argument("--out", type=Path, help="default: protection/phases.json")
    a = parser.parse_args(argv)
    result = measure(a)
    facts = environment.describe(torch.device("cpu"))
    path = a.out or Path(__file__).parent / "protection" / "phases.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.store(path, result | {"environment": facts}, DEPTH)
    told = ("shape", "cpu_seconds", "speedup", "speedup_over_before", "peak_mb", "gate")
    print(results.text({k: result[k] for k in told if k in result}, DEPTH))
    return 0


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """All phases of all providers on one batch.

    Raises:
        RuntimeError: compat and the authors' way, or the two checkouts, do not agree; no figure is given then.
    """
    checkouts = {"default": environment.REPOSITORY}
    if a.before is not None:
        checkouts = {"before": a.before.resolve(), **checkouts}
    workers = {name: Worker(folder, SCRIPT) for name, folder in checkouts.items()}
    try:
        return _measure(a, workers)
    finally:
        for worker in workers.values():
            worker.close()


def _measure(a: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, Any]:
    from transformers import CLIPConfig, CLIPModel

    from ccu_fast.mem.surrogate import frozen
    from ccu_fast.ops.topk_flips.api import TokenTable
    from tests.support import mem_transcription as authors

    shape = {k: getattr(a, k) for k in ("batch", "triggers", "candidates", "pgd_steps", "layers")}
    for worker in workers.values():
        worker.ask(what="prepare", shape=shape, threads=torch.get_num_threads())

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
    settings = Settings(
        compat=True,
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
    method = Method.parse(f"mem-{a.triggers}")
    run = Protection(TensorSource(images, captions), Ids(), make, method=method, settings=settings, seed=0)
    start = torch.randint(300, 40000, (a.batch, a.triggers), generator=rng)
    run.triggers.copy_(start)
    run.worker.renew("surrogate 0")
    ours: Any = run.worker
    theirs: Any = make()
    theirs.load_state_dict(ours.surrogate.state_dict())
    theirs.eval()
    for tower in (theirs.model.text_model, theirs.model.vision_model):
        # Towers that somebody watches are computed by transformers.
        tower.encoder.register_forward_hook(lambda *_: None)
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in ("authors", "compat", *workers)}

    def clock(provider: str, phase: str, work: Callable[[], Any]) -> Any:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        value = work()
        seconds = (time.process_time() - cpu_start, time.perf_counter() - wall_start)
        taken[provider].setdefault(phase, []).append(seconds)
        return value

    def turn(what: str, phase: str) -> None:
        for name, worker in workers.items():
            answer = worker.ask(what=what)
            taken[name].setdefault(phase, []).append((answer["cpu"], answer["wall"]))

    pixels = images.float() / 255
    rows = torch.arange(a.batch)
    put = authors.put(run.tokens, start, CONTEXT, EOT)
    with torch.no_grad():  # what is done once in a process (threads, packing of weights) is nobody's
        for model in (theirs, ours.surrogate):
            model.encode_image(pixels[:2])
            model.encode_text(put[:2])

    def compat_triggers() -> None:
        with frozen(ours.surrogate):
            ours._triggers(images.float(), rows, TokenTable(ours.surrogate.embedding_matrix.detach()))

    clock("compat", "triggers", compat_triggers)
    turn("triggers", "triggers")
    found = clock("authors", "triggers", lambda: authors.search(theirs, pixels, put, a.triggers, a.candidates))
    chosen = found[:, 1 : a.triggers + 1]
    same = float((chosen == run.triggers).double().mean())
    run.triggers.copy_(chosen)

    state = ours.rng.get_state()
    permuted = torch.randperm(a.batch, generator=ours.rng)
    step_text = authors.put(run.tokens[permuted], chosen, CONTEXT, EOT)

    def compat_noise() -> None:
        ours.rng.set_state(state)
        ours.store.scatter_(rows, torch.zeros_like(images, dtype=torch.int8))
        with frozen(ours.surrogate):
            ours._noise(images.float(), rows)

    gate: dict[str, float] = {}
    for i in range(a.repeats):
        clock("compat", "PGD step", compat_noise)
        noise = clock(
            "authors",
            "PGD step",
            lambda: authors.perturb(theirs, pixels, torch.zeros_like(pixels), [step_text], 1 / 255, 8 / 255),
        )
        turn("noise", "noise pass")
        if i == 0 and "before" in workers:
            gate |= _agreement(workers)
    stored = ours.store.gather(rows, dtype=torch.int8).float()
    agree = float((stored == (noise * 255).round()).double().mean())
    gate |= {"triggers that agree": same, "noise that agrees": agree}
    check(gate)

    def compat_surrogate() -> None:
        for _ in ours.through(ours.begin("surrogate", 1)):
            pass

    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    for _ in range(1 + a.repeats):
        clock("authors", "surrogate step", lambda: authors.train(theirs, optimizer, pixels, put))
        clock("compat", "surrogate step", compat_surrogate)
        turn("surrogate", "surrogate step")
    turn("triggers", "triggers")
    cpu, wall = ({name: _round(phases, i, a.pgd_steps) for name, phases in taken.items()} for i in (0, 1))
    result: dict[str, Any] = {"shape": shape, "gate": gate, "cpu_seconds": cpu, "wall_seconds": wall}
    result["speedup"] = {name: _over(cpu["authors"], cpu[name]) for name in cpu if name != "authors"}
    result["peak_mb"] = {name: worker.ask(what="peak")["mb"] for name, worker in workers.items()}
    if "before" in workers:
        result["speedup_over_before"] = _over(cpu["before"], cpu["default"])
        result["before"] = environment.commit(a.before)
    return result


def check(gate: dict[str, float]) -> None:
    """Raise where too little is equal for times to be compared. Noise: signs of gradients near zero may differ."""
    if any(share < (0.99 if what.startswith("noise") else 0.95) for what, share in gate.items()):
        raise RuntimeError(f"the ways do not agree, so no time is given: {gate}")


def _agreement(workers: dict[str, Worker]) -> dict[str, float]:
    """How much of what the checkouts have found until now is equal."""
    saved = []
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            path = Path(folder, name)
            worker.ask(what="save", path=str(path))
            saved.append(torch.load(path))
    before, now = saved
    return {f"{part} as before": float((before[part] == now[part]).double().mean()) for part in ("triggers", "noise")}


def _round(taken: dict[str, list[tuple[float, float]]], clock: int, steps: int) -> dict[str, float]:
    """Medians of one of the clocks, and what they sum up to."""
    phases = {name: median(pair[clock] for pair in pairs) for name, pairs in taken.items()}
    phases.setdefault("noise pass", steps * phases.get("PGD step", 0.0))
    later = phases["noise pass"] + phases["surrogate step"]
    return {**phases, "round with triggers": phases["triggers"] + later, "round without triggers": later}


def _over(slow: dict[str, float], fast: dict[str, float]) -> dict[str, float]:
    """How many times faster each phase is."""
    return {phase: slow[phase] / seconds for phase, seconds in fast.items() if phase in slow}


if __name__ == "__main__":
    sys.exit(main())
