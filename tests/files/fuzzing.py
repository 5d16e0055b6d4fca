"""Loads mutated weight files under memory limits: `python tests/files/fuzzing.py LOADER FIRST COUNT FOLDER`.

Run by `test_fuzz.py`, in a process of its own so that a crash or a hang costs no other test. Prints one JSON object:
{"loaded": n, "refused": n, "failures": [[seed, what was done to the file, what came of it], ...], "peak": bytes}.
"""

import faulthandler
import json
import logging
import re
import resource
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 (puts ComfyUI and the pack where they can be imported)
import torch
from ovi_native.ovi_model.media import audio_vae
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.text import umt5
from support.mutations import Draft, mutate_pickle, mutate_safetensors
from tiny import audio
from tiny.audio import vocoder
from tiny.checkpoint import draw_weights
from tiny.sizes import Sizes, core_layout
from tiny.text_encoder import text_encoder, tokenizer_model

SMALL = Sizes(heads=1, blocks=1, ffn=64, text=16, frequencies=32)
HANG, SPARE = 5.0, 600 << 20  # seconds of work on one file; bytes of address space beyond the first load's
FOUND = {"model": [], "text": [30903, 40543, 40646], "audio": [30387]}  # seeds outside the range that once got through
SENTENCE = re.compile(r"[Dd]ownload|[Cc]hoose|update ComfyUI|Exchange them|the safetensors version|google/umt5-xxl")


# --- the loaders ------------------------------------------------------------------------------------------------------

def model_weights() -> list[dict[str, torch.Tensor]]:
    weights = {name: t.to(torch.bfloat16) for name, t in draw_weights(SMALL).items()}
    fp8 = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 and ".blocks." in name else t for name, t in weights.items()}
    scaled = {**fp8, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
              **{name.replace(".weight", ".scale_weight"): torch.tensor(0.5) for name, t in fp8.items()
                 if t.dtype == torch.float8_e4m3fn}}
    return [weights, core_layout(weights), fp8, scaled]


def text_weights() -> list[dict[str, torch.Tensor]]:
    return [text_encoder(0)]


def audio_weights() -> list[dict[str, torch.Tensor]]:
    return [audio.audio_vae(0, 16), vocoder(0, 64)]


class Loader:
    """One of the three, with the files to mutate; `load` takes the mutated one and the index of what it was."""

    def __init__(self, kind: str, folder: Path):
        self.bases = {"model": model_weights, "text": text_weights, "audio": audio_weights}[kind]()
        self.kind, self.whole = kind, []
        for index, base in enumerate(self.bases):
            self.whole.append(folder / f"whole_{index}.safetensors")
            self.whole[-1].write_bytes(Draft(base).file())
            self.load(self.whole[-1], index) if kind != "audio" else None
        (folder / "spiece.model").write_bytes(tokenizer_model())
        if kind == "audio":
            self.load(self.whole[0], 0)

    def load(self, path: Path, index: int) -> None:
        if self.kind == "model":
            checkpoint.load_model(str(path))
        elif self.kind == "text":
            umt5.load_text_encoder(str(path))
        else:
            pair = list(self.whole)
            pair[index:index + 1] = [path]
            audio_vae.load_audio_vae(str(pair[0]), str(pair[1]))


def memory(field: str) -> int:
    """A figure of this process in bytes (Linux)."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def judge(error: Exception, name: str) -> str | None:
    """What is wrong with an error, None if it is one of ours."""
    text, cause = str(error), error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause) or "alloc" in type(cause).__name__.lower():
            return f"tried to allocate: {cause!r}"
        cause = cause.__cause__ or cause.__context__
    if type(error) not in (RuntimeError, ValueError) or name not in text or not SENTENCE.search(text):
        return f"{type(error).__name__}: {text[:300]}"
    return None if len(text) < 1500 and text.isprintable() else f"an unreadable sentence of {len(text)} characters"


FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.mkdir", "os.remove",
             "shutil.rmtree")


def main(kind: str, first: int, count: int, folder: Path) -> dict:
    logging.disable(logging.CRITICAL)
    loader, marker = Loader(kind, folder), folder / "executed"
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event) if event in FORBIDDEN else None)
    start = memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + (8 << 30), resource.RLIM_INFINITY))
    out: dict = {"loaded": 0, "refused": 0, "failures": []}
    for seed in [*range(first, first + count), *FOUND[kind]]:
        rng = Random(f"{kind} {seed}")
        index = rng.randrange(len(loader.bases))
        if rng.random() < 0.75:
            content, done = mutate_safetensors(loader.bases[index], rng)
            path = folder / f"fuzzed_{seed}.safetensors"
        else:
            content, done = mutate_pickle(loader.bases[index], rng, marker)
            path = folder / f"fuzzed_{seed}{rng.choice(['.pt', '.pth', '.ckpt'])}"
        path.write_bytes(content)
        (folder / "seed").write_text(f"{seed} ({done})")
        events.clear()
        before, problem = time.process_time(), None
        faulthandler.dump_traceback_later(12 * HANG, exit=True)
        try:
            loader.load(path, index)
            out["loaded"] += 1
        except Exception as error:  # which ones come is the question
            problem = judge(error, path.name)
            out["refused"] += 1
        faulthandler.cancel_dump_traceback_later()
        seconds, peak = time.process_time() - before, memory("VmPeak") - start
        if seconds > HANG:
            problem = f"took {seconds:.1f} s"
        if peak > out.get("allowed", SPARE):
            problem, out["allowed"] = f"{problem}; address space grew by {peak >> 20} MiB", peak + SPARE
        if events or marker.exists():
            problem = f"ran code: {events}, {marker.exists()}"
        if problem:
            out["failures"].append([seed, done, problem])
        path.unlink()
    return out | {"peak": memory("VmPeak") - start, "resident": memory("VmHWM")}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))  # noqa: T201
