"""What a protection run is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ccu_fast import check
from ccu_fast.data.captions import Options
from ccu_fast.data.pictures import MAX_PIXELS
from ccu_fast.mem.config import Execution, Method, Settings, check_together
from ccu_fast.models.named import Model


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        input: see :func:`ccu_fast.data.captions.list_pairs`.
        out: a folder that does not exist or is empty, or a link to such a one. Until the run is complete its files are
            in ``<out>.partial``, beside the folder itself.
        model: all captions of the listing → the surrogate; called once.
        method, settings, seed: of the generator.
        options: how to read the input.
        thumbnails: pictures are resized to what the model takes, cut and published so; by default they keep their size.
        skip_bad: leave out what cannot be used, and list it in the manifest; otherwise it is an error.
        fresh: throw an unfinished run away first, unless it is going on.
        noise_on_disk: keep the noise in a mapped file instead of in memory.
        reference_files: also write ``noise.pt`` and ``token.pt`` into ``<out>.reference``; see
            :func:`write_reference_files`.
        threads: decoders.
        max_pixels: larger pictures are bad.
        device: of the surrogate.
        execution: autocast, memory order, compilation. A run goes on with the same.

    >>> from pathlib import Path
    >>> from ccu_fast.mem import Job, Method, choose_model
    >>> job = Job(Path("photos"), Path("protected"), choose_model("small"), Method.parse("mem-3"))
    >>> job.settings.eps
    8
    """

    input: Path
    out: Path
    model: Callable[[Sequence[str]], Model]
    method: Method = field(default_factory=lambda: Method.parse("mem"))
    settings: Settings = field(default_factory=Settings)
    seed: int = check.field(0, "Of everything random.", low=0)
    options: Options = field(default_factory=Options)
    thumbnails: bool = False
    skip_bad: bool = check.field(False, "Leave out and list what cannot be used, instead of stopping.")
    fresh: bool = check.field(False, "Throw an unfinished run with this output away.")
    noise_on_disk: bool = check.field(False, "Noise in a file, not in memory.")
    reference_files: bool = check.field(False, "Also noise.pt and token.pt of the authors' code.")
    threads: int | None = check.field(None, "Decoders; one for each processor if not given.", low=1)
    max_pixels: int = check.field(MAX_PIXELS, "Larger pictures are bad.", low=1)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        check.fields(self)
        check_together(self.method, self.settings)
        for name, asked in (("compat", self.settings.compat), ("reference_files", self.reference_files)):
            if asked and not self.thumbnails:
                raise ValueError(
                    f"{name}: expected with thumbnails (--size HEIGHTxWIDTH) alone, because the authors' noise has one "
                    "size for all pictures; got pictures that keep their own"
                )
        if self.reference_files and self.settings.place != "front":
            raise ValueError(
                "reference_files: expected trigger words in front of captions, as token.pt tells them, got "
                f"place={self.settings.place!r}"
            )
