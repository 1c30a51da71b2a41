"""``python -m benchmarks.protection.memory``: what memory CLIP surrogates take at 224x224, and which batch fits a GPU.

A process for each model, with random weights, does batches of the generator's three phases, as a run does them, and
notes the peak of each. Lines through the peaks tell the largest batch for GPUs of 24, 40 and 80 GB. The figures go to
memory.json beside this file, their tables to MEMORY.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import environment, memory, results
from benchmarks.protection.scale import fit
from build_support.docs.generated import table_lines
from ccu_fast.mem import triggers
from ccu_fast.mem.config import Execution, Method, Settings
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.source import TensorSource
from ccu_fast.models.named import Model, named_model

DEPTH = 2  # a line for a model
RESULTS = Path(__file__).parent / "memory.json"
PAGE = RESULTS.with_name("MEMORY.md")
GPUS = (24, 40, 80)  # GB
RESERVE = 2.0  # GB of each: CUDA's context, and what its allocator cannot use
WORDS = 3  # of a trigger
CONTEXT, VOCABULARY = 77, 49_408  # tokens of CLIP's text tower
DEFAULT = Settings().batch
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _tower(width: int, layers: int, **more: int) -> dict[str, int]:
    heads = width // 64
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


@dataclass(frozen=True)
class Shape:
    """A model and the batches that it is measured with.

    Attributes:
        vision, text: of transformers' configuration; none: the model of this name in open_clip.
        steps: of the surrogate, through which its line goes. In smaller ones gradients take more room than the
            activations whose place they take on the way back, so that their peaks lie above it.
        passes: of triggers and noise, without gradients of weights: their lines begin at what there is before.
        held_out: a step of the surrogate that its line is compared with.
        multiplied: on a CPU, a step and a batch of each pass that are also done with their products.
    """

    vision: dict[str, int]
    text: dict[str, int]
    steps: tuple[int, ...]
    passes: tuple[int, ...]
    held_out: tuple[int, ...] = ()
    multiplied: tuple[int, int] | None = None


_BASE, _LARGE = _tower(512, 12), _tower(768, 12)
SHAPES = {
    "ViT-B/32": Shape(_tower(768, 12, patch_size=32), _BASE, (16, 32), (4, 8), (64,), multiplied=(16, 4)),
    "RN50": Shape({}, {}, (16, 32), (4,)),
    "ViT-B/16": Shape(_tower(768, 12, patch_size=16), _BASE, (16, 24), (4,)),
    "ViT-L/14": Shape(_tower(1024, 24, patch_size=14), _LARGE, (10, 12), (4,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(prog="benchmarks.protection.memory", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--autocast", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="default: memory.json beside this file, on a CPU without autocast")
    parser.add_argument("--page", action="store_true", help="make the page of the stored figures again, nothing else")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    device = environment.choose_device(a.device)
    if a.worker:
        print(json.dumps(of_shape(a.models[0], device, a.autocast)))
        return 0
    if a.out is None and (a.device, a.autocast) != ("cpu", None):
        parser.error("--out: expected a file, because the committed one is of a CPU and fp32")
    out = a.out or RESULTS
    stored = json.loads(out.read_text()) if out.exists() else {"models": {}}
    if not a.page:
        for name in a.models:
            command = [sys.executable, "-m", "benchmarks.protection.memory", "--worker", "--models", name]
            command += ["--device", a.device, *(["--autocast", a.autocast] if a.autocast else [])]
            told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = {**stored["models"], name: json.loads(told.splitlines()[-1])}
            stored = {
                "device": a.device,
                "autocast": a.autocast,
                "models": {known: found[known] for known in SHAPES if known in found},
                "environment": environment.describe(device),
            }
            results.store(out, stored, DEPTH)  # each at once: a large one may want more memory than there is
            print(name, told.splitlines()[-1], flush=True)
    if out == RESULTS:
        PAGE.write_text(page(stored))
    print(table(stored))
    return 0


def of_shape(name: str, device: torch.device, autocast: str | None = None) -> dict[str, Any]:
    """What a model of :data:`SHAPES` takes, measured in this process."""
    memory.return_freed_blocks()
    # Where a CPU has small parts of candidates for its cache, a GPU has large ones, and it is asked what a GPU needs.
    triggers._PART_BYTES = triggers._PART_BYTES_GPU
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        if shape.vision:
            write_folder(Path(folder), shape.vision, shape.text)
            model = named_model(f"hf:{folder}")
        else:
            from tests.support import torchvision_stub

            torchvision_stub.install()
            model = named_model(f"open_clip:{name}")
        found = measure(model, shape, device, autocast, multiply=device.type != "cpu")
    return {"library": "transformers" if shape.vision else "open_clip", **found}


class WithoutProducts(TorchDispatchMode):
    """Products, convolutions and attention make and write all their results, which are 0, and multiply nothing.

    What a run keeps in memory is as with them, but for workspaces within one kernel; a step of ViT-L/14 takes seconds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch's."""
        kwargs = kwargs or {}
        if func.overloadpacket not in _PRODUCTS:
            return func(*args, **kwargs)
        inputs = tree_map_only(torch.Tensor, lambda t: _strided(t, "meta"), (args, kwargs))
        made = func(*inputs[0], **inputs[1])
        return tree_map_only(torch.Tensor, lambda t: _strided(t, "cpu").zero_(), made)


def _strided(like: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


_PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


def write_folder(folder: Path, vision: dict[str, int], text: dict[str, int]) -> None:
    """A CLIP of transformers without weights, and a tokenizer of all words of two letters.

    The table of embeddings and the ids at both ends of a caption are those of CLIP's own vocabulary.
    """
    from transformers import CLIPConfig, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [(first, f"{second}</w>") for first in letters for second in letters]
    known = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(known)}
    vocabulary |= {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    config = CLIPConfig(
        text_config={**text, **ids, "max_position_embeddings": CONTEXT},
        vision_config={**vision, "image_size": 224},
        projection_dim=text["hidden_size"],
    )
    config.save_pretrained(folder)
    tokenizer: Any = CLIPTokenizer  # whose hints know no pairs
    tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def measure(
    model: Model, shape: Shape, device: torch.device, autocast: str | None = None, *, multiply: bool
) -> dict[str, Any]:
    """Bytes of a run's three phases by batch: before it and at its peak; lines through them.

    On a CPU these are the resident bytes of this process less those that it has before it makes the model. There
    ``multiply=False`` leaves products out, see :class:`WithoutProducts`.
    """
    size = max([*shape.steps, *shape.passes, *shape.held_out])
    rng, (channels, height, width) = torch.Generator().manual_seed(0), model.image_shape
    images = torch.randint(0, 256, (size, channels, height, width), dtype=torch.uint8, generator=rng)
    words = model.tokenizer.words().nonzero()[:, 0]
    # As many words as the text tower reads: the longest rows there are.
    drawn = torch.randint(len(words), (size, model.tokenizer.context), generator=rng)
    settings = Settings(batch=size, rounds=1, trigger_rounds=1, first="random", words="everyday", pgd_steps=1)
    run = Protection(
        TensorSource(images, model.tokenizer.decode(words[drawn])),
        model.tokenizer,
        model.factory,
        method=Method.parse(f"mem-{WORDS}"),
        settings=settings,
        device=device,
        execution=Execution(autocast=None if autocast is None else DTYPES[autocast]),
    )
    start = peaks(lambda: None, device)[0]
    run.worker.renew("surrogate 0")

    def batch(phase: Any, count: int, multiply: bool = multiply) -> list[int]:
        def work() -> None:
            place = run.worker.begin(phase, 1)
            place.plan = [torch.arange(count)]
            with nullcontext() if multiply else WithoutProducts():
                for _ in run.worker.through(place):
                    pass

        before, peak = peaks(work, device)
        return [count, before - start, peak - start]

    batch("surrogate", 2)  # the first step makes the optimiser's moments, which all later batches have beside them
    steps = [batch("surrogate", count) for count in shape.steps]
    held = [batch("surrogate", count) for count in shape.held_out]
    found = {"surrogate": steps}
    lines = {"surrogate": fit([(count, peak) for count, _, peak in steps])}
    for phase in ("triggers", "noise"):
        found[phase] = [batch(phase, count) for count in shape.passes]
        lines[phase] = fit([(0, found[phase][0][1]), *((count, peak) for count, _, peak in found[phase])])
    line = lines["surrogate"]
    told: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.worker.surrogate.parameters()),
        "start": start,
        "batches": found,
        "lines": lines,
        "held_out": [
            {"batch": count, "peak": peak, "line": line["start"] + count * line["each"]} for count, _, peak in held
        ],
        "noise_bytes": run.store.data[0].nbytes,
        "token_bytes": run.tokens[0].nbytes + run.triggers[0].nbytes,
    }
    if shape.multiplied and not multiply:
        step, other = shape.multiplied
        asked = {"surrogate": step, "triggers": other, "noise": other}
        told["multiplied"] = {phase: batch(phase, count, True) for phase, count in asked.items()}
    return told


def peaks(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes in use before a call and at its peak: of the device's allocator, or resident in this process."""
    if device.type == "cpu":
        return memory.peaks_of(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return before, torch.cuda.max_memory_allocated(device)


HEAD = """<!-- generated by `python -m benchmarks.protection.memory --page`; do not edit -->
# Memory of CLIP surrogates at 224x224

`python -m benchmarks.protection.memory`: CLIPs with random weights (`hf:FOLDER` and `open_clip:NAME`), {words} trigger
words that are searched for, captions that fill the {context} tokens of the text tower, pictures of the model's size. A
process for each model does batches of the three phases of a round (step of the surrogate, trigger pass, noise pass),
after a step that has made the optimiser's moments, and notes the largest resident memory (VmHWM) of each. The figures
are that less the {low:.0f} to {high:.0f} MB that Python, torch, the libraries and the test's pictures take before.
Measured on {device}, one thread, {precision}. Products, convolutions and attention make and write their results, which
are all that stays in memory, but multiply nothing; last on this page stands what that changes.

**The columns of GPUs are lines through what a CPU took. They were not run on a GPU, whose kernels and attention keep
other tensors for the way back.** On a machine with a GPU this command does the same batches with all products, measures
them by `torch.cuda.max_memory_allocated`, and prints the same table (with `--autocast bf16` that of half precision,
which was not measured here):

    python -m benchmarks.protection.memory --device cuda --out FILE

"""


def page(stored: dict[str, Any]) -> str:
    """MEMORY.md."""
    starts = [row["start"] / 1e6 for row in stored["models"].values()]
    about = {
        "words": WORDS,
        "context": CONTEXT,
        "low": min(starts),
        "high": max(starts),
        "device": stored["environment"]["device"],
        "precision": stored["autocast"] or "fp32",
    }
    return HEAD.format(**about) + table(stored) + "\n"


def fits(lines: dict[str, Any], gigabytes: float) -> int:
    """The largest batch whose three phases stay below so much memory, by their lines; 0 for none."""
    room = 1e9 * (gigabytes - RESERVE)
    return max(0, min(int((room - line["start"]) // line["each"]) for line in lines.values()))


def table(stored: dict[str, Any]) -> str:
    """The tables of a page, in Markdown."""
    models = stored["models"]
    sizes = [f"{size} GB" for size in GPUS]
    head = ("surrogate", "parameters, M", "fixed, GB", "MB a pair", *sizes, f"GB for the default batch of {DEFAULT}")
    lines = [
        f"Largest batch of pairs, with {RESERVE:.0f} GB (of 10⁹ bytes) left to CUDA's context and to fragmentation:",
        "",
    ]
    rows = []
    for name, row in models.items():
        line = row["lines"]["surrogate"]
        cells = [f"{name} ({row['library']})", f"{row['parameters'] / 1e6:.0f}"]
        cells += [f"{line['start'] / 1e9:.1f}", f"{line['each'] / 1e6:.0f}"]
        cells += [f"{fits(row['lines'], size):,}" for size in GPUS]
        cells += [f"{peak_of(row['lines'], DEFAULT) / 1e9:.0f}"]
        rows.append(cells)
    lines += table_lines(head, rows)
    name, first = next(iter(models.items()))
    if stored["device"] == "cpu":
        lines += [
            "",
            f"On a CPU a process takes as much of the machine's memory, and what it takes before: by its line {name} "
            f"{(first['start'] + peak_of(first['lines'], DEFAULT)) / 1e9:.1f} GB with the default batch.",
        ]
    lines += ["", "What was measured, GB by batch, and the slopes of the passes:", ""]
    rows = []
    for name, row in models.items():
        cells = [
            ", ".join(f"{count}: {peak / 1e9:.2f}" for count, _, peak in found) for found in row["batches"].values()
        ]
        cells += [f"{row['lines'][phase]['each'] / 1e6:.0f}" for phase in ("triggers", "noise")]
        rows.append([name, *cells])
    head = ("surrogate", "its step", "trigger pass", "noise pass", "triggers, MB a pair", "noise, MB a pair")
    lines += table_lines(head, rows)
    checks = [
        f"of {name} at a batch of {held['batch']}, which its line was not drawn through, takes "
        f"{held['peak'] / 1e9:.2f} GB, and the line says {held['line'] / 1e9:.2f} GB "
        f"({held['line'] / held['peak'] - 1:+.1%})"
        for name, row in models.items()
        for held in row["held_out"]
    ]
    noise, tokens = first["noise_bytes"], first["token_bytes"]
    lines += [
        "",
        "The step of the surrogate decides: it has the gradients of the weights and the activations of both towers. "
        "In smaller batches than these, gradients take more room than the activations in whose place they come. In "
        "the trigger pass the candidates went through the text tower in the parts that a GPU gets, whose largest "
        "activation has up to 1 GiB; a CPU has smaller ones.",
        *([f"A step {'; one '.join(checks)}."] if checks else []),
        "",
        f"Of a set, each picture takes {noise:,} bytes more for its noise, which lies on the GPU with `--device cuda` "
        f"({10_000 * noise / 1e9:.1f} GB for 10,000 pictures, to be taken off the columns), and each caption at most "
        f"{tokens:,} bytes for its ids and those of its trigger, beside its text, in the memory of the machine.",
    ]
    for name, row in models.items():
        if "multiplied" in row:
            lines += ["", _difference(name, row)]
    return "\n".join(lines)


def _difference(name: str, row: dict[str, Any]) -> str:
    without = {phase: {count: peak for count, _, peak in found} for phase, found in row["batches"].items()}
    told = [
        f"{phase} {peak / 1e9:.2f} in place of {without[phase][count] / 1e9:.2f} "
        f"({peak / without[phase][count] - 1:+.1%})"
        for phase, (count, _, peak) in row["multiplied"].items()
    ]
    counts = [count for count, _, _ in row["multiplied"].values()]
    return f"With all products {name} took, GB by phase in batches of {', '.join(map(str, counts))}: {'; '.join(told)}."


def peak_of(lines: dict[str, Any], batch: int) -> float:
    """Bytes of the phase that takes most, by the lines."""
    return float(max(line["start"] + batch * line["each"] for line in lines.values()))


if __name__ == "__main__":
    sys.exit(main())
