"""What is compared with the reference, one module per part of it; each yields Items for a golden folder."""

from dataclasses import dataclass

PARTS = ("fusion", "schedules", "sampling", "text", "audio", "video_vae", "prompts", "sizes", "images")

# Tolerances. A looser one needs a reason in the commit message.
EXACT = 0.0
TABLE = 1e-6
FP32 = 1e-5
LOOP = 1e-4
BF16 = 2e-2
BF16_LOOP = 3e-2  # the stored run is bf16 itself: both sides round


@dataclass(frozen=True)
class Item:
    """One comparison: `error` (relative L2, or the share of mismatches) must not exceed `tolerance`."""

    name: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        return f"{self.name}: {self.error:.2e}, tolerance {self.tolerance:.0e} {self.detail}".rstrip()
