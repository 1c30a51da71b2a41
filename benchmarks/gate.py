"""Who may be timed: a provider whose answer is right for the same inputs, in the same process.

Ours must follow the three-way rule: the error against fp64 is at most twice that of plain torch (the op's baseline) in
the same arithmetic, plus a few units in the last place. Peers only have to compute the same thing: their limit is
loose, so that none is dropped for sloppy rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.registry import Case, Expected, Provider, Tensors

_SANE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25, torch.float64: 1e-9}


@dataclass(frozen=True)
class Verdict:
    """Errors of each output, what was allowed, and against what they were taken."""

    errors: dict[str, float]
    limits: dict[str, float]
    reference: str

    @property
    def passed(self) -> bool:
        return bool(self.errors) and all(self.errors[k] <= self.limits[k] for k in self.errors)

    def failure(self) -> str:
        """What was wrong, for the table."""
        wrong = (f"{k} is off by {self.errors[k]:.2g} (allowed {self.limits[k]:.2g})" for k in self.errors)
        return "; ".join(w for k, w in zip(self.errors, wrong, strict=True) if not self.errors[k] <= self.limits[k])


class Gate:
    """The gate of one case; show it the baselines first."""

    def __init__(self, case: Case, inputs: Tensors) -> None:
        self.case, self.inputs = case, inputs
        self.expected = case.op.expect(inputs, case.shape)
        self._baseline: dict[str, dict[str, float]] = {}

    def order(self, providers: list[Provider]) -> list[Provider]:
        """Baselines first, each the measure of its arithmetic."""
        first = (self.case.op.baseline, self.case.op.bf16_baseline)
        return sorted(providers, key=lambda p: p.name not in first)

    def judge(self, provider: Provider, outputs: Tensors) -> Verdict:
        """Compare one answer with fp64."""
        dtype = torch.bfloat16 if provider.arithmetic == "bf16" else self.case.dtype
        expected = self.expected
        if provider.expect is not None:
            expected = provider.expect(self.inputs, self.case.shape)
        errors = self.case.op.errors(outputs, expected, self.inputs)
        measure = self._baseline.get(provider.arithmetic)
        limits = dict.fromkeys(errors, _SANE[dtype])
        if provider.role == "ours" and measure is not None:
            ulps = 8 * torch.finfo(dtype).eps
            limits = {k: min(sane, 2 * measure.get(k, 0.0) + ulps) for k, sane in limits.items()}
        verdict = Verdict(errors, limits, expected.said)
        if provider.name in (self.case.op.baseline, self.case.op.bf16_baseline) and verdict.passed:
            self._baseline[provider.arithmetic] = errors
        return verdict


def relative_errors(outputs: Tensors, expected: Expected, inputs: Tensors) -> dict[str, float]:
    """For each output max |out − expected| relative to max |expected| or to its terms; the usual :attr:`Op.errors`."""
    errors = {}
    for name, want in expected.values.items():
        got = outputs[name].detach()
        if expected.rows is not None and got.ndim >= 2:
            got = got[expected.rows]
        if got.shape != want.shape:
            errors[name] = math.inf
            continue
        magnitude = max(float(want.abs().max()), expected.terms.get(name, 0.0), torch.finfo(torch.float32).tiny)
        error = (got.double() - want).abs().max() / magnitude
        errors[name] = error.item() if bool(torch.isfinite(error)) else math.inf
    return errors


def spread_rows(count: int, most: int, device: torch.device) -> torch.Tensor | None:
    """``most`` row numbers spread evenly over ``count``, first and last included; None when that is all of them."""
    if count <= most:
        return None
    return torch.linspace(0, count - 1, most, device=device).round().long()
