"""Log-mel spectrograms: the filters against their formula, sines against what they must give."""

from __future__ import annotations

import math

import pytest
import torch

from ccu_fast.data.spectrogram import (
    FRAMES,
    HIGH,
    HOP,
    LOW,
    MELS,
    QUIET,
    RATE,
    WINDOW,
    heard,
    log_mel,
    mel_filters,
)

BINS = WINDOW // 2 + 1


def sine(hertz: float, seconds: float = 2.0) -> torch.Tensor:
    return (2 * math.pi * hertz / RATE * torch.arange(round(seconds * RATE), dtype=torch.float64)).sin()


def test_the_filters_are_those_of_the_formula() -> None:
    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    step = (mel(HIGH) - mel(LOW)) / (MELS + 1)
    points = [700 * (10 ** ((mel(LOW) + step * i) / 2595) - 1) for i in range(MELS + 2)]
    expected = torch.zeros(MELS, BINS)
    for k, (start, peak, end) in enumerate(zip(points, points[1:], points[2:], strict=False)):
        for j in range(BINS):
            f = j * RATE / WINDOW
            if start < f < end:
                expected[k, j] = (f - start) / (peak - start) if f <= peak else (end - f) / (end - peak)
    found = mel_filters()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.sum(1).min() > 0.5  # none falls between two frequencies
    inside = torch.tensor([points[1] <= j * RATE / WINDOW <= points[-2] for j in range(BINS)])
    torch.testing.assert_close(found.sum(0)[inside], torch.ones(int(inside.sum())), atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", [10, 50, 200, 350])
def test_a_sine_is_in_its_band_and_as_loud_as_it_is(place: int) -> None:
    found = log_mel(sine(place * RATE / WINDOW))
    power = torch.zeros(BINS)  # of a sine through a Hann window
    power[place - 1 : place + 2] = torch.tensor([1 / 16, 1 / 4, 1 / 16])
    expected = (1 + mel_filters() @ power / QUIET).log10()
    assert found.shape == (MELS, FRAMES) and found.dtype == torch.float32
    assert found.argmax(0).eq(mel_filters()[:, place].argmax()).all()
    loud = expected > 2
    torch.testing.assert_close(found[loud], expected[loud, None].expand(-1, FRAMES), atol=1e-3, rtol=0)
    assert found[~loud].max() < 0.5


def test_a_sound_is_when_it_is_and_silence_is_nothing() -> None:
    sound = torch.zeros(3 * RATE)
    sound[10 * HOP : 10 * HOP + 3 * WINDOW] = sine(1000.0)[: 3 * WINDOW].float()
    sound[FRAMES * HOP + WINDOW :] = 1  # too late to be seen
    found = log_mel(sound)
    loud = found.amax(0) > 1
    # The first window that reaches into it is that of frame 9, the last one that of frame 14.
    assert loud.nonzero()[:, 0].tolist() == list(range(9, 15)) and found[:, ~loud].eq(0).all()
    assert torch.equal(found, log_mel(sound[: FRAMES * HOP + WINDOW]))
    assert torch.equal(log_mel(sound[: 20 * HOP]), found)  # shorter: silence follows
    assert log_mel(torch.zeros(0)).eq(0).all()
    whole = (sound / 2 * 2**15).to(torch.int16)
    assert torch.equal(log_mel(whole), log_mel(whole.float() / 2**15))


def test_a_sound_is_heard_later_and_louder() -> None:
    mels = 3 * torch.rand(400, MELS, FRAMES, generator=torch.Generator().manual_seed(0))
    seen = heard(mels, torch.Generator().manual_seed(1))
    assert torch.equal(seen, heard(mels, torch.Generator().manual_seed(1)))
    late = (seen.amax(1) > 0).float().argmax(1)
    assert sorted(set(late.tolist())) == [0, 1, 2, 3]
    gains = []
    for one, other, by in zip(mels, seen, late.tolist(), strict=True):
        assert other[:, :by].eq(0).all()
        factor = (10.0 ** other[:, by:] - 1) / (10.0 ** one[:, : FRAMES - by] - 1)
        middle = factor.median()
        assert (factor[one[:, : FRAMES - by] > 1] / middle - 1).abs().max() < 1e-3
        gains.append(10 * math.log10(float(middle)))
    assert -3 <= min(gains) < -2.5 and 2.5 < max(gains) <= 3
    same = heard(mels, torch.Generator().manual_seed(1), delay=0, gain=0)
    torch.testing.assert_close(same, mels, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mels": 0}, "mels: expected"),
        ({"bins": 1}, "bins: expected"),
        ({"rate": 0}, "rate: expected"),
        ({"low": 9000.0}, "low, high: expected"),
        ({"high": 12000.0}, "low, high: expected"),
    ],
)
def test_bad_filters_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mel_filters(**options)  # type: ignore[arg-type]


def test_samples_of_another_form_are_refused() -> None:
    with pytest.raises(TypeError, match="samples: expected"):
        log_mel(torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="samples: expected"):
        log_mel(torch.zeros(2, 9))
