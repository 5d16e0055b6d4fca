"""Loads one model and tells what memory that took: `python tests/ovi/loading_memory.py HOW DTYPE FILE SMALL_FILE`.

HOW: "static", as where there is no DynamicVRAM; "copy", the static copy that LoRA hooks ask for where there is;
"dynamic", with DynamicVRAM; "twice", a control that holds all of the file beside the model. Prints one JSON object of
bytes and seconds, counted from after a first load of the small file, which brings in everything else. Run by
`test_loading_memory.py` in a process of its own.
"""

import gc
import json
import logging
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 (puts ComfyUI and the pack where they can be imported)
import torch
from ovi_native.ovi_model.files import reader
from ovi_native.ovi_model.ovi import checkpoint
from support.loading_state import dynamic_vram, pretend_cuda


def status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def load(how: str, dtype: torch.dtype | str | None, path: str):
    if how == "dynamic":
        with dynamic_vram(), pretend_cuda():
            return checkpoint.load_model(path, dtype)[0]
    if how == "copy":
        with dynamic_vram():
            return checkpoint.reload_patcher(path, None, dtype, None, disable_dynamic=True)
    second = [tensor.clone() for tensor in reader.load_weights(path)[0].values()] if how == "twice" else None
    patcher = checkpoint.load_model(path, dtype)[0]
    del second
    return patcher


class OwnMemory(threading.Thread):
    """The most memory in use that is no file's (`RssAnon`) while it runs; Linux keeps no record of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, status("RssAnon"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.join()
        self.peak = max(self.peak, status("RssAnon"))


def main(how: str, dtype_name: str, path: str, small: str) -> dict:
    logging.disable(logging.CRITICAL)
    dtype = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype_name, dtype_name)
    load(how, dtype, small)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    base, own, started = status("VmRSS"), status("RssAnon"), time.perf_counter()
    with OwnMemory() as memory:
        patcher = load(how, dtype, path)
    out = {"seconds": time.perf_counter() - started, "loading": status("VmHWM") - base, "own": memory.peak - own}
    parameters = [*patcher.model.diffusion_model.parameters()]
    for parameter in parameters:  # as the first step does: read every weight once
        data = getattr(parameter.data, "_qdata", parameter.data)
        data.reshape(-1).view(torch.uint8).numpy().max()
    out |= {"with_first_touch": time.perf_counter() - started, "peak": status("VmHWM") - base,
            "after": status("VmRSS") - base,
            "kept": status("RssAnon") - own,
            "weights": sum(getattr(p.data, "_qdata", p.data).nbytes for p in parameters)}
    return out


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201
