"""The retrained model of a user: weights that there are already, or those that a function of the user trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ccu_fast.files import output_folder
from ccu_fast.models.named import named_model
from ccu_fast.runs.progress import Clock, Progress
from ccu_fast.runs.provenance import Hashes, made_before, save_model, tensors_hash, versions
from ccu_fast.unlearn.described import library_model
from ccu_fast.unlearn.job import load_user_model
from ccu_fast.unlearn.loop import ready
from ccu_fast.unlearn.model import check_problem
from ccu_fast.unlearn.precision import under_autocast
from ccu_fast.unlearn.settings import Job
from ccu_fast.unlearn.study.tasks import Scenario
from ccu_fast.unlearn.users_code import made_by, users_function

FORMAT = 2  # of the kept models


@dataclass(frozen=True)
class Gold:
    """Where a retrained model comes from.

    Attributes:
        job: the settings.
        sets: what it is checked with and, where it is ``made``, trained on.
        ready: a model of given weights; None where a function trains it.
        hashes: what decides the model.
    """

    job: Job
    sets: Scenario
    ready: Any
    hashes: dict[str, str | None]
    known: Hashes

    @property
    def made(self) -> bool:
        """Whether a function trains it, with each seed anew."""
        return self.ready is None

    @classmethod
    def of(cls, job: Job, original: Any, sets: Scenario, known: Hashes) -> Gold | None:
        """What the settings say, checked; None where they name no retrained model.

        Raises:
            ValueError, TypeError, OSError: no such function; no such weights, or those of another model or of the
                original itself.
        """
        compare = job.compare
        if compare.retrain is not None:
            users_function("retrain", compare.retrain)
            return cls(job, sets, None, {"retrain": compare.retrain}, known)
        if compare.gold is None:
            return None
        ready: Any
        if job.named:
            ready = named_model(job.model, compare.gold, argument="gold").factory()
        else:
            ready = load_user_model(job.model, compare.gold, "gold")
        digest = tensors_hash(ready.state_dict())
        if digest == known.of(original):
            raise ValueError(
                f"gold: expected weights of a retrained model, got those of the original in {compare.gold}"
            )
        return cls(job, sets, _checked("gold", ready, job, sets), {"gold_sha256": digest}, known)

    def model(self, seed: int, folder: Path, progress: Progress) -> tuple[Any, dict[str, float]]:
        """The model and, where it was trained, "seconds" and "cpu_seconds"; kept in ``folder`` and found there again.

        Raises:
            TypeError, ValueError: the function returned what is no such model.
        """
        if self.ready is not None:
            return self.ready, {}
        path = folder / f"retrained-seed{seed}.safetensors"
        compare = self.job.compare
        inputs = [self.sets.retain, *([self.sets.forget] if compare.hidden == "visual" else [])]
        made_of = {
            "retrain": compare.retrain,
            "model": self.job.model,
            "hidden": compare.hidden,
            "seed": seed,
            "pairs": [self.known.of(part) for part in inputs],
            "versions": versions("ccu_fast", "torch", "python", "machine"),
            "format": FORMAT,
        }
        found = made_before(path, made_of, self._restored)
        if found is not None:
            return found
        progress("retraining", 0, 1, str(compare.retrain))
        ready()
        clock, device = Clock(), self.job.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            trained = made_by("retrain", cast(str, compare.retrain), self._fresh().to(device), *inputs)
        seconds, cpu_seconds = clock.read()
        model = _checked("retrain", trained, self.job, self.sets)
        cost = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        save_model(library_model(model), output_folder(folder) / path.name, {"made_of": made_of, "cost": cost})
        progress("retraining", 1, 1, str(compare.retrain))
        return model, cost

    def _fresh(self) -> nn.Module:
        if self.job.named:
            return cast(nn.Module, named_model(self.job.model).factory())
        return made_by("model", self.job.model)

    def _restored(self, state: dict[str, Tensor], provenance: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        model = self._fresh()
        library_model(model).load_state_dict(state)
        return _checked("retrain", model, self.job, self.sets), provenance["cost"]


def _checked(argument: str, model: Any, job: Job, sets: Scenario) -> Any:
    model = under_autocast(model.to(job.device).eval(), job.dtype)
    for parameter in model.parameters():  # frozen ones are no fault of a model that is only judged
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        check_problem(model, sets.forget, sets.retain, job.config.forget)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from error
    return model
