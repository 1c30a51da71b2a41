"""The process that benchmarks.mem_phases starts: a round of MEM with the measured checkout first on the path.

Reads one request a line and answers with one line of JSON:

- ``{"what": "prepare", "shape": {…}, "threads": n}``: the run, and what is done once in a process
- ``{"what": "triggers", "noise" or "surrogate"}``: that phase over the one batch; its seconds
- ``{"what": "save", "path": …}``: triggers and noise, for a comparison
- ``{"what": "peak"}``: the most memory that the process has held until now, in MB

Commit 235c665 had a method for each phase, later ones draw a plan and go through it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OLD = {"triggers": "improve_triggers", "noise": "improve_noise", "surrogate": "train_surrogate"}


class Run:
    """One batch of MEM-n; weights, pictures, captions and first triggers depend on the shape alone."""

    def __init__(self, shape: dict[str, int], threads: int) -> None:
        import torch
        from transformers import CLIPConfig, CLIPModel

        from benchmarks.mem_phases import EOT, Ids
        from ccu_fast.mem import Method, Protection, Settings
        from ccu_fast.mem.source import TensorSource
        from ccu_fast.models.clip import TransformersClipEncoder

        def model() -> Any:
            text = {"num_hidden_layers": shape["layers"], "vocab_size": 49408, "eos_token_id": EOT}
            config = CLIPConfig(text_config=text, vision_config={"num_hidden_layers": shape["layers"]})
            return TransformersClipEncoder(CLIPModel(config))

        torch.set_num_threads(threads)
        n, rng = shape["batch"], torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, 3, 224, 224), generator=rng, dtype=torch.uint8)
        ids = [torch.randint(300, 40000, (8 + i % 7,), generator=rng).tolist() for i in range(n)]
        options: dict[str, Any] = {"candidates": shape["candidates"], "pgd_steps": shape["pgd_steps"], "batch": n}
        options |= {"eps": 8, "step": 1, "rounds": 1, "trigger_rounds": 1, "surrogate_steps": 1, "restart": 0}
        options |= {"lr": 1e-4, "weight_decay": 0.2, "beta2": 0.999, "trigger_words": None, "shuffle": 0.0}
        known = {field.name for field in dataclasses.fields(Settings)}
        later = {"first": "random", "words": "everyday"}  # settings that older checkouts do not have
        options |= {name: value for name, value in later.items() if name in known}
        self.run = Protection(
            TensorSource(images, [" ".join(map(str, row)) for row in ids]),
            Ids(),
            model,
            method=Method.parse(f"mem-{shape['triggers']}"),
            settings=Settings(**options),
            seed=0,
        )
        self.run.triggers.copy_(torch.randint(300, 40000, (n, shape["triggers"]), generator=rng))
        self.worker: Any = self.run.worker
        self.worker.renew("surrogate 0")
        with torch.no_grad():  # what is done once in a process (threads, packing of weights) is no phase's
            self.worker.surrogate.encode_image(images[:2] / 255)
            self.worker.surrogate.encode_text(self.worker.tokens[:2])

    def phase(self, name: str) -> None:
        """All of a phase over the batch, as a run does it."""
        old = getattr(self.worker, OLD[name], None)
        if old is not None:
            old(*[1] if name == "surrogate" else [])
            return
        for _ in self.worker.through(self.worker.begin(name, 1)):
            pass

    def save(self, path: str) -> None:
        """To a file of torch's."""
        import torch

        noise = self.run.store.gather(torch.arange(len(self.run.triggers)), dtype=torch.int8)
        torch.save({"triggers": self.run.triggers, "noise": noise}, path)


def peak() -> float:
    """MB; not ru_maxrss, which begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def main() -> None:
    """Answer until the input ends."""
    sys.path.remove(str(HERE))  # its results.py is not what an import of the checkout means
    run: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        what, answer = request["what"], {}
        wall, cpu = time.perf_counter(), time.process_time()
        if what == "prepare":
            run = Run(request["shape"], request["threads"])
        elif what == "save":
            run.save(request["path"])
        elif what == "peak":
            answer = {"mb": peak()}
        else:
            run.phase(what)
        answer |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
