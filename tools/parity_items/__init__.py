"""What `tools/parity.py` checks, one module per part of the reference; each yields Items for a golden folder."""

from dataclasses import dataclass


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
