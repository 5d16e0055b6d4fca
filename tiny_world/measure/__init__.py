"""Finds the small world again in any clip: `describe` looks and listens, `judge` compares with what a caption asks.

Only pixels and samples are read. `shapes` finds coloured bodies, `motion` their bounces, `face` a mouth, `sounds`
loudness and struck sounds, `speech` sung vowels, `scores` says how well they agree, `report` sums it up.
"""

from .report import Report, describe, judge, loudness_by_speed
from .scores import Sync, chance, correlation, pooled, right_share, sync

__all__ = ["Report", "Sync", "chance", "correlation", "describe", "judge", "loudness_by_speed", "pooled", "right_share",
           "sync"]
