"""How far two sounds are apart, by their short-time spectra."""

from __future__ import annotations

import torch
from torch.nn.functional import l1_loss


class SpectralDistance:
    """Distance of two sounds [B, N] by their short-time spectra at several resolutions."""

    SIZES = (128, 256, 512, 1024, 2048, 4096)
    FLOOR = 1e-4  # of magnitudes, where 0.5 is a full-scale sine; -74 dB

    QUIET = 5e-3  # magnitude below which linear distances count less

    def __init__(self) -> None:
        self.windows = {size: torch.hann_window(size) for size in self.SIZES}

    def spectrum(self, x: torch.Tensor, size: int) -> torch.Tensor:
        found = torch.stft(x, size, size // 4, size, self.windows[size], center=True, return_complex=True)
        return found / self.windows[size].sum()

    def __call__(self, x: torch.Tensor, y: torch.Tensor, sizes=SIZES) -> torch.Tensor:
        total = torch.zeros(())
        for size in sizes:
            a, b = self.spectrum(x, size), self.spectrum(y, size)
            m, n = ((s.real**2 + s.imag**2 + self.FLOOR**2).sqrt() for s in (a, b))
            size_of = (n.square().mean() + self.QUIET**2).sqrt()
            total = total + l1_loss(m.log(), n.log()) + ((m - n).square().mean() + 1e-12).sqrt() / size_of
        return total / len(sizes)
