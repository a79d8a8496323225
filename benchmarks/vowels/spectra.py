"""Utterances of vowels as log spectra over time: men in a quiet room (source), women in a noisy one (target).

Fundamental frequencies and formants are the means that Peterson and Barney measured ("Control methods used in a study
of the vowels", J. Acoust. Soc. Am. 24, 1952, table II), with random deviations for each speaker and each token. Spectra
follow the source-filter model: harmonics with a falling tilt, and three resonances.
"""

from __future__ import annotations

from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

VOWELS = ("IY", "IH", "EH", "AE", "AA", "AO", "UH", "UW", "AH", "ER")  # ARPABET
SILENCE = len(VOWELS)
CLASSES = (*VOWELS, "silence")
FRAMES, BANDS = 40, 24

# In Hz, a row for each vowel: the fundamental and three formants.
MEN = (
    (136, 270, 2290, 3010),
    (135, 390, 1990, 2550),
    (130, 530, 1840, 2480),
    (127, 660, 1720, 2410),
    (124, 730, 1090, 2440),
    (129, 570, 840, 2410),
    (137, 440, 1020, 2240),
    (141, 300, 870, 2240),
    (130, 640, 1190, 2390),
    (133, 490, 1350, 1690),
)
WOMEN = (
    (235, 310, 2790, 3310),
    (232, 430, 2480, 3070),
    (223, 610, 2330, 2990),
    (210, 860, 2050, 2850),
    (212, 850, 1220, 2810),
    (216, 590, 920, 2710),
    (232, 470, 1160, 2680),
    (231, 370, 950, 2670),
    (221, 760, 1400, 2780),
    (218, 500, 1640, 1960),
)

_BANDWIDTHS = (60.0, 90.0, 150.0)
_GRID = torch.linspace(50.0, 5000.0, 160)  # Hz
_OF_SPEAKER, _OF_TOKEN = 0.05, 0.04  # standard deviations of the logarithm


def source_vowels(seed: int, count: int) -> Tuple[Tensor, Tensor]:
    """Return men's utterances ``(N, 24, 40)``, normalised log energies by band and frame, and labels ``(N, 40)``."""
    return _utterances(count, MEN, (-5.0, -4.0), Generator().manual_seed(2 * seed))


def target_vowels(seed: int, count: int) -> Tuple[Tensor, Tensor]:
    """Return women's utterances in noise, and labels, of the same shapes as those of :func:`source_vowels`."""
    return _utterances(count, WOMEN, (-4.0, -2.0), Generator().manual_seed(2 * seed + 1))


def strong_view(utterances: Tensor, rng: Generator, *, masked: float) -> Tensor:
    """Return utterances with bands warped, tilted and masked out, and noise; frames stay where they are.

    Warping is that of vocal-tract-length perturbation (Jaitly and Hinton, 2013), masking that of SpecAugment (Park et
    al., Interspeech 2019).

    Args:
        utterances: Shape ``(N, 24, 40)``.
        rng: Of everything random.
        masked: Share of bands that one mask covers, and of frames.
    """
    count = len(utterances)
    warp = 1.0 + 0.1 * (2 * torch.rand(count, 1, generator=rng) - 1)
    at = torch.arange(BANDS) * warp  # the band to read from
    low = at.floor().clamp(0, BANDS - 1).long()
    high, part = (low + 1).clamp(max=BANDS - 1), (at - low).clamp(0, 1)[:, :, None]
    rows = torch.arange(count)[:, None]
    warped = (1 - part) * utterances[rows, low] + part * utterances[rows, high]
    tilt = 0.4 * torch.randn(count, 1, 1, generator=rng) * torch.linspace(-1, 1, BANDS)[None, :, None]
    changed = warped + tilt + 0.2 * torch.randn(utterances.shape, generator=rng)
    for dim, size in ((1, BANDS), (2, FRAMES)):
        width = round(masked * size)
        first = torch.randint(size - width + 1, (count, 1), generator=rng)
        inside = (torch.arange(size) >= first) & (torch.arange(size) < first + width)
        changed = changed.masked_fill(inside.unsqueeze(3 - dim), 0.0)
    return changed


def _utterances(
    count: int, voices: Sequence[Sequence[int]], noise: Tuple[float, float], rng: Generator
) -> Tuple[Tensor, Tensor]:
    labels = _sequences(count, rng)
    return _recorded(_spoken(labels, voices, rng), rng, noise), labels


def _sequences(count: int, rng: Generator) -> Tensor:
    """Return labels ``(N, 40)``: vowels of 4 to 9 frames and silences of 1 to 4, in random order."""
    length = torch.randint(4, 10, (count, FRAMES), generator=rng)
    vowel = torch.randint(len(VOWELS), (count, FRAMES), generator=rng)
    silent = torch.rand(count, FRAMES, generator=rng) < 0.3
    length = torch.where(silent, torch.randint(1, 5, (count, FRAMES), generator=rng), length)
    drawn = torch.where(silent, torch.full_like(vowel, SILENCE), vowel)
    segment = (torch.arange(FRAMES)[None, :, None] >= length.cumsum(dim=1)[:, None, :]).sum(dim=2)
    return drawn.gather(1, segment)


def _spoken(labels: Tensor, voices: Sequence[Sequence[int]], rng: Generator) -> Tensor:
    """Return energies ``(N, 24, 40)`` of speakers, a new one for each utterance, whose means are a row per vowel."""
    count = len(labels)
    means = torch.tensor(voices, dtype=torch.float32).log()  # (10, 4)
    of_speaker = _OF_SPEAKER * torch.randn(count, 1, 4, generator=rng)
    of_frame = means + of_speaker
    # Tokens differ: one deviation each, held while the label stays.
    change = torch.cat([torch.ones(count, 1, dtype=torch.bool), labels[:, 1:] != labels[:, :-1]], dim=1)
    token = change.long().cumsum(dim=1) - 1
    spread = _OF_TOKEN * torch.randn(count, FRAMES, 4, generator=rng)
    spread = spread.gather(1, token[:, :, None].expand(-1, -1, 4))
    voiced = labels != SILENCE
    # Silence keeps the formants of the vowel before it; its loudness falls to zero.
    spoken = torch.where(voiced, torch.arange(FRAMES).expand(count, -1), torch.zeros_like(labels)).cummax(dim=1).values
    vowel = labels.gather(1, spoken).clamp(max=len(VOWELS) - 1)
    tracks = of_frame.gather(1, vowel[:, :, None].expand(-1, -1, 4)) + spread
    tracks = F.avg_pool1d(F.pad(tracks.transpose(1, 2), (1, 1), mode="replicate"), 3, stride=1).transpose(1, 2).exp()
    loudness = F.avg_pool1d(F.pad(voiced.float()[:, None], (1, 1), mode="replicate"), 3, stride=1)
    loudness = loudness * (0.5 + torch.rand(count, 1, 1, generator=rng))
    return torch.stack([_spectrum(track) for track in tracks]) * loudness


def _spectrum(track: Tensor) -> Tensor:
    """Return band energies ``(24, 40)`` of one utterance's fundamental and formants ``(40, 4)``."""
    fundamental, formants = track[:, :1], track[:, 1:]
    nearest = (_GRID / fundamental).round().clamp(min=1) * fundamental
    harmonics = torch.exp(-0.5 * ((_GRID - nearest) / 35.0) ** 2)
    tilt = 200.0 / _GRID
    response = torch.ones_like(harmonics)
    for index, bandwidth in enumerate(_BANDWIDTHS):
        centre = formants[:, index : index + 1]
        response = response * centre**2 / ((centre**2 - _GRID**2) ** 2 + (bandwidth * _GRID) ** 2).sqrt()
    return _bands() @ (harmonics * tilt * response).square().t()


def _bands() -> Tensor:
    """Return triangular filters ``(24, 160)``, equally spaced on the mel scale."""
    mel = torch.linspace(_mel(100.0), _mel(4800.0), BANDS + 2)
    edges = 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    rising = (_GRID - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - _GRID) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return filters / filters.sum(dim=1, keepdim=True)


def _mel(frequency: float) -> float:
    return float(2595.0 * torch.log10(torch.tensor(1.0 + frequency / 700.0)))


def _recorded(energy: Tensor, rng: Generator, noise: Tuple[float, float]) -> Tensor:
    """Return normalised log energies as a microphone records them.

    Args:
        energy: Shape ``(N, 24, 40)``.
        rng: Of everything random.
        noise: Range of its level relative to the loudest energy, as a power of ten.
    """
    count = len(energy)
    level = 10.0 ** (noise[0] + (noise[1] - noise[0]) * torch.rand(count, 1, 1, generator=rng))
    colour = torch.exp(-2.0 * torch.rand(count, 1, 1, generator=rng) * torch.linspace(0, 1, BANDS)[None, :, None])
    grain = torch.empty_like(energy).exponential_(generator=rng)
    logs = (energy + energy.amax(dim=(1, 2), keepdim=True) * level * colour * grain + 1e-9).log()
    return (logs - logs.mean(dim=(1, 2), keepdim=True)) / logs.std(dim=(1, 2), keepdim=True)
