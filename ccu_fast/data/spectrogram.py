"""Log-mel spectrograms of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import check

RATE = 22050  # samples per second
MELS, FRAMES = 40, 48
WINDOW, HOP = 1024, 704  # samples: 46 ms, every 32 ms
LOW, HIGH = 50.0, 8000.0  # Hz
QUIET = 1e-6  # mel power, relative to that of a full-scale wave, below which a sound hardly counts


def log_mel(samples: Tensor) -> Tensor:
    """Sound as a picture: how loud each band of pitches is in each stretch of time; silence is 0::

        power = |stft(samples)|² / sum(window)²
        log10(1 + mel_filters @ power / QUIET)

    Args:
        samples: int16 ``[N]``, or floating point ``[N]`` in [−1, 1]; 22050 a second. What comes after 1.5 seconds is
            cut off, a shorter sound is followed by silence.

    Returns:
        fp32 ``[MELS, FRAMES]``, ≥ 0.

    Raises:
        TypeError, ValueError: other samples.

    >>> ccu_fast.data.spectrogram.log_mel(torch.zeros(22050, dtype=torch.int16)).shape
    torch.Size([40, 48])
    """
    check.tensor("samples", samples, dtypes=(torch.int16, torch.float32, torch.float64), ndim=1)
    sound = samples.float() if samples.is_floating_point() else samples.float() / 2**15
    needed = (FRAMES - 1) * HOP + WINDOW
    sound = torch.nn.functional.pad(sound[:needed], (0, max(0, needed - len(sound))))
    window = torch.hann_window(WINDOW)
    waves = torch.stft(sound, WINDOW, HOP, window=window, center=False, return_complex=True)
    power = waves.abs().square() / window.sum().square()
    return (mel_filters() @ power / QUIET).log1p() / torch.tensor(10.0).log()


def mel_filters(
    *, mels: int = MELS, bins: int = WINDOW // 2 + 1, rate: int = RATE, low: float = LOW, high: float = HIGH
) -> Tensor:
    """Triangles over the frequencies of a Fourier transform, evenly spaced in mel::

        mel(f) = 2595 · log10(1 + f / 700)
        triangle k rises from 0 at point k to 1 at point k + 1 and falls to 0 at point k + 2,
        the mels + 2 points being evenly spaced in mel from low to high

    Args:
        mels: how many triangles, at least 1.
        bins: of the transform, at least 2: evenly spaced from 0 to ``rate / 2`` Hz.
        rate: samples per second.
        low, high: in Hz, 0 ≤ low < high ≤ rate / 2.

    Returns:
        fp32 ``[mels, bins]``, in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument.

    Source: O'Shaughnessy, Speech Communication, 1987 (the scale); as HTK and torchaudio have them by default.

    >>> ccu_fast.data.spectrogram.mel_filters(mels=2, bins=5, rate=8000, high=4000.0).shape
    torch.Size([2, 5])
    """
    check.integer("mels", mels, low=1)
    check.integer("bins", bins, low=2)
    check.integer("rate", rate, low=1)
    if not 0 <= low < high <= rate / 2:
        raise ValueError(f"low, high: expected 0 ≤ low < high ≤ {rate / 2}, got {low} and {high}")
    first, last = (2595 * torch.tensor(1 + f / 700, dtype=torch.float64).log10() for f in (low, high))
    steps = torch.linspace(0, 1, mels + 2, dtype=torch.float64)
    points = 700 * (10 ** ((first + (last - first) * steps) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    widths = points.diff()
    rising = (frequencies - points[:-2, None]) / widths[:-1, None]
    falling = (points[2:, None] - frequencies) / widths[1:, None]
    return torch.minimum(rising, falling).clamp(min=0).float()


def heard(mels: Tensor, generator: torch.Generator, *, delay: int = 3, gain: float = 3.0) -> Tensor:
    """Spectrograms as of sounds that begin a little later and are louder or quieter, each at random.

    Args:
        mels: fp32 ``[N, MELS, FRAMES]`` of :func:`log_mel`.
        generator: of the draws, which are uniform and independent of each other.
        delay: up to how many frames later, at least 0; what no longer fits is cut off.
        gain: up to how many decibels louder or quieter.
    """
    n, _, frames = mels.shape
    late = torch.randint(delay + 1, (n, 1), generator=generator)
    factor = 10 ** (gain * (2 * torch.rand(n, 1, 1, generator=generator) - 1) / 10)
    source = torch.arange(frames) - late
    moved = mels.gather(2, source.clamp(min=0)[:, None].expand_as(mels)) * (source >= 0)[:, None]
    return (1 + factor * (10**moved - 1)).log10()
