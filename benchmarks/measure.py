"""What the benchmarks share: timing in turn, the device's matmul peak, FLOP counts, the machine, and the output.

    timings = measure.alternate({"reference": f, "ours": g}, runs=7)
    timings.seconds("ours"), timings.ratio("ours", over="reference")     # Spread(median, min, max)

Single times of a shared machine mean little, so callables are timed in turn within one process and compared round by
round. One FLOP is one multiplication or one addition: a product [M, K] x [K, N] has 2 M K N of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Action = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.min:.3g} to {self.max:.3g})"


class Timings(dict[str, list[float]]):
    """Seconds by name, one entry a round."""

    def seconds(self, name: str) -> Spread:
        return Spread.of(self[name])

    def ratio(self, name: str, over: str) -> Spread:
        """Of the quotients of one round, so that a load that both suffer cancels."""
        return Spread.of(a / b for a, b in zip(self[name], self[over], strict=True))


def synchronise() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(action: Action) -> float:
    """Wall time of one call, the GPU's work included."""
    synchronise()
    start = time.perf_counter()
    action()
    synchronise()
    return time.perf_counter() - start


def alternate(actions: Mapping[str, Action], runs: int = 7, warmup: int = 1) -> Timings:
    """Call every action once a round, in the reverse order every other round; `warmup` rounds are not counted."""
    timings = Timings({name: [] for name in actions})
    for turn in range(-warmup, runs):
        for name in (actions if turn % 2 == 0 else reversed(list(actions))):
            spent = seconds(actions[name])
            if turn >= 0:
                timings[name].append(spent)
    return timings


class Matmul:
    """Square products of `dtype`: the most that a step could reach. Of a few sizes the fastest; `flop` is of one call.

    Timed in turn with what is compared with it, it tells the peak that a busy machine had to give at that time.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, quick: bool = False) -> None:
        sizes = (4096, 8192, 16384) if device.type == "cuda" else (256,) if quick else (1024, 2048)
        self.repeats = 10 if device.type == "cuda" else 3
        self.peak, best = 0.0, None
        for n in sizes:
            self.operands = [torch.randn(n, n, device=device).to(dtype) for _ in range(2)] + [
                torch.empty(n, n, device=device, dtype=dtype)]
            flop = 2 * n**3 * self.repeats
            reached = flop / min(alternate({"": self}, runs=3)[""])
            if reached > self.peak:
                self.peak, self.flop, best = reached, flop, self.operands
        self.operands = best

    def __call__(self) -> None:
        a, b, out = self.operands
        for _ in range(self.repeats):
            torch.mm(a, b, out=out)


class FlopCounter(FlopCounterMode):
    """PyTorch's counter of products and convolutions, plus the attention kernels that it does not know.

    Its own table lacks the CPU's fused kernel. Kernels of other packages are operators it cannot look into: pass
    `attention` to ComfyUI as `optimized_attention_override`, and what it missed is added by the formula.
    """

    def __init__(self) -> None:
        def cpu_attention(q_shape, k_shape, v_shape, *_, **__) -> int:
            return sdpa_flop_count(q_shape, k_shape, v_shape)

        super().__init__(display=False, custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention})
        self.missed = 0

    @property
    def total(self) -> int:
        return self.get_total_flops() + self.missed

    def attention(self, function, q, k, v, heads, *args, **kwargs):
        """ComfyUI's attention call, for q [B, N, H d] and k, v [B, M, H d] or, with skip_reshape, [B, H, N, d]."""
        before = self.get_total_flops()
        out = function(q, k, v, heads, *args, **kwargs)
        if self.get_total_flops() == before:
            self.missed += 4 * q.numel() * k.shape[-2]  # two products of 2 B H N M d each
        return out


def count_flop(action: Action) -> int:
    """FLOP of one call."""
    with FlopCounter() as counter:
        action()
    return counter.total


def machine() -> dict[str, Any]:
    """What the figures come from; `load` is the system's load average of the last minute."""
    import comfyui_version

    names = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) >> 20 for line in read_lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{names[0] if names else platform.processor() or 'CPU'} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gib": memory[0] if memory else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "comfyui": comfyui_version.__version__,
    }


def read_lines(path: str) -> list[str]:
    """Lines of a Linux status file; none where there is no such file."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def arguments(doc: str | None, runs: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; its help is the module's own text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs, help=f"rounds (default: {runs}); more narrow the spread")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, the figures mean little")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there as one JSON object")
    return parser


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table; the first row's keys are the columns."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(cell(row[name]) for name in rows[0])} |", flush=True)


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def finish(name: str, result: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """Print the machine, write `result` with it to `file` if there is one, and return what was written."""
    result = {"benchmark": name, "machine": machine(), **result}
    print(f"\n{', '.join(f'{key} {value}' for key, value in result['machine'].items() if value is not None)}")
    if file:
        file.write_text(json.dumps(result, indent=1, default=asdict))
    return result
