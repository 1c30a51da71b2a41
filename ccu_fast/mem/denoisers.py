"""Denoisers that somebody may run over published pictures: non-local means, and a net that needs no clean pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The learned denoiser: the noise that is added, in 1/255, and the net that undoes it.
WIDTH = 8
CHANNELS = 16
LAYERS = 4
STEPS = 200
BATCH = 8
PATCH = 32
LR = 1e-2
_CENTRE, _UNIT = 127.5, 32.0  # of the pixels that the net takes
_PART_PIXELS = 1 << 18  # that the net takes at once when it is applied


def nlmeans(images: Tensor) -> Tensor:
    """Non-local means by OpenCV with its defaults: strength 3, patches of 7 px, compared within 21 px.

    Args:
        images: uint8 ``[N, C, H, W]``, C = 1 or 3.

    Returns:
        uint8 of the same shape.

    Raises:
        ImportError: no OpenCV.

    Source: Buades, Coll & Morel 2011, Non-local means denoising, doi 10.5201/ipol.2011.bcm_nlm.
    """
    import cv2

    out = torch.empty_like(images)
    for i, image in enumerate(images):
        if len(image) == 1:
            out[i, 0] = torch.from_numpy(cv2.fastNlMeansDenoising(image[0].numpy()))
        else:  # OpenCV's order of colours is blue, green, red
            array = image.flip(0).permute(1, 2, 0).contiguous().numpy()
            out[i] = torch.from_numpy(cv2.fastNlMeansDenoisingColored(array)).permute(2, 0, 1).flip(0)
    return out


def learned(images: Tensor, rng: torch.Generator, width: int = WIDTH) -> Tensor:
    """Pictures without the noise that a small net, trained on nothing but these pictures, finds in them.

    Further noise n, uniform in ±``width``, is added to patches, and a residual net of four convolutions learns to say
    what was added. If the noise m that the pictures already have were of the same kind, the net could not tell the two
    apart, so that E[m] = E[n] and twice what it finds is all noise::

        z = published + n,   net ← argmin (net(z) − n)²,   result = published − 2 net(published)

    The net is applied to what was published, without n: the paper's z − 2 net(z) brings back some of n.

    Args:
        images: uint8 ``[N, C, H, W]``; pictures larger than ``PATCH`` are trained on in random windows.
        rng: of weights, batches and noise; the same generator gives the same bits (with the same number of threads).
        width: of the added noise, in 1/255.

    Returns:
        uint8 of the same shape.

    Source: Moran, Schmidt, Zhong & Coady 2020, Noisier2Noise (arXiv 1910.11908).
    """
    net = _net(images.shape[1], rng)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            patches = _patches(images, rng)
            added = width * (2 * torch.rand(patches.shape, generator=rng) - 1)
            loss = (_noise(net, patches + added) - added / width).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        parts = images.split(max(1, _PART_PIXELS // (images.shape[2] * images.shape[3])))
        clean = [part - 2 * width * _noise(net, part.float()) for part in parts]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in clean])


def _net(channels: int, rng: torch.Generator) -> nn.Sequential:
    sizes = [channels, *(CHANNELS,) * (LAYERS - 1), channels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        layers = [
            layer
            for i in range(LAYERS)
            for layer in ([nn.ReLU()] if i else []) + [nn.Conv2d(sizes[i], sizes[i + 1], 3)]
        ]
    return nn.Sequential(*layers)


def _patches(images: Tensor, rng: torch.Generator) -> Tensor:
    """fp32 windows of random pictures, at most ``PATCH`` high and wide."""
    n, _, height, width = images.shape
    h, w = min(PATCH, height), min(PATCH, width)
    number = torch.randint(n, (BATCH,), generator=rng).tolist()
    top = torch.randint(height - h + 1, (BATCH,), generator=rng).tolist()
    left = torch.randint(width - w + 1, (BATCH,), generator=rng).tolist()
    windows = [images[i, :, y : y + h, x : x + w] for i, y, x in zip(number, top, left, strict=True)]
    return torch.stack(windows).float()


def _noise(net: nn.Sequential, images: Tensor) -> Tensor:
    """What the net finds in pixels 0…255, in units of the added noise's width."""
    found: Tensor = net((F.pad(images, (LAYERS,) * 4, mode="replicate") - _CENTRE) / _UNIT)
    return found
