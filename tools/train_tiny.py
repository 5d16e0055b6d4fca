"""Make the trained tiny Ovi again from nothing: its world, its codecs, its network, its files and its figures.

    python tools/train_tiny.py prepare                  bases, text encoder, training clips as latents (10 minutes)
    python tools/train_tiny.py codecs --minutes 20      picture and sound codecs, each
    python tools/train_tiny.py fusion --minutes 60      the network: goes on from its last checkpoint
    python tools/train_tiny.py pack                     small files into assets/tiny_ovi
    python tools/train_tiny.py evaluate --clips 24      clips through the nodes as mp4, measured, as tables
    python tools/train_tiny.py all                      all of these
    python tools/train_tiny.py lora --clips 12          teach what is shipped a purple ball, in a real ComfyUI

Everything between is kept in `.tiny_ovi/`, every step can be stopped and goes on where it was. With `--from-shipped`,
`prepare`, `codecs` and `fusion` go on with what assets/tiny_ovi holds. Times are those of two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK, SHIPPED = ROOT / ".tiny_ovi", ROOT / "assets" / "tiny_ovi"
SHORT_SHARDS, LONG_SHARDS = 56, 36
SHORT_STEPS, LONG_STEPS, TAIL = 12_000, 8_000, 3_000
RATE, AVERAGE, BATCH = 1e-3, 0.999, 16
MODES = ("words", "guidance", "skip", "rotary", "first_frame", "given_sound", "given_picture")
"""Tables of `evaluate`, as in tiny_ovi/modes.py."""


def prepare(options: argparse.Namespace) -> None:
    from tiny_ovi.latents import fit_codec
    from tiny_ovi.pool import LONG, SHORT, make_pool
    from tiny_ovi.text import write_text_encoder

    bases, text = WORK / "bases.safetensors", WORK / "umt5.safetensors"
    if options.from_shipped:  # components are the same up to their signs only; what is trained knows these
        shutil.copyfile(SHIPPED / "bases.safetensors", bases)
        shutil.copyfile(SHIPPED / "text_encoder.safetensors", text)
    if not bases.exists():
        fit_codec(seed=options.seed).save(bases)
    if not text.exists():
        write_text_encoder(text, options.seed)
    make_pool(WORK / "pool", bases, SHORT, SHORT_SHARDS, seed=options.seed + 1)
    make_pool(WORK / "pool", bases, LONG, LONG_SHARDS, seed=options.seed + 2)


def codecs(options: argparse.Namespace) -> None:
    from tiny_ovi import audio_codec, video_codec

    shipped = SHIPPED if options.from_shipped else None
    video_codec.train(WORK, options.minutes, start=shipped and shipped / "video_vae.safetensors")
    audio_codec.train(WORK / "acodec", options.minutes, bases=WORK / "bases.safetensors", start=shipped)


def fusion(options: argparse.Namespace) -> None:
    """Short clips first, then long ones from the averaged weights of the short ones, the learning rate falling last."""
    from tiny.sizes import core_layout
    from tiny_ovi.files import averaged_weights, unpacked
    from tiny_ovi.pool import LONG, SHORT
    from tiny_ovi.train import Settings, train

    end = time.time() + options.minutes * 60
    start = {name: value.float() for name, value in core_layout(unpacked("model")[0]).items()}
    if not options.from_shipped:
        short = Settings(SHORT_STEPS, RATE, average=AVERAGE, video_share=0.5, seed=options.seed)
        if train(WORK, SHORT, short, BATCH, end, name="short").step < SHORT_STEPS:
            return
        start = averaged_weights(WORK / "short.safetensors")
    long = Settings(LONG_STEPS, RATE, tail=TAIL, average=AVERAGE, video_share=0.5, seed=options.seed + 1)
    train(WORK, LONG, long, BATCH, end, name="long", start=start)


def pack(_options: argparse.Namespace) -> None:
    from tiny_ovi.files import ship

    for path in ship(WORK, "long"):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.relative_to(ROOT)}")


def evaluate(options: argparse.Namespace) -> None:
    from tiny_ovi.evaluate import Models, Way
    from tiny_ovi.files import install
    from tiny_ovi.modes import Evaluation, report

    install(WORK / "models")
    run = Evaluation(Models(WORK / "models"), WORK / "clips", options.clips, options.seed, Way(options.steps))
    for mode in options.modes:
        print(report(run, mode), flush=True)


def lora(options: argparse.Namespace) -> None:
    from devlib.client import ComfyClient
    from devlib.server import ComfyServer
    from tiny_ovi.files import install
    from tiny_ovi.lora import Way, prove

    base = WORK / "lora"
    (base / "input").mkdir(parents=True, exist_ok=True)
    install(base / "models")
    with ComfyServer(base, models=base / "models") as server, ComfyClient(server.url, timeout=600) as client:
        print(prove(client, options.clips, Way(options.seconds)))


STEPS = {"prepare": prepare, "codecs": codecs, "fusion": fusion, "pack": pack, "evaluate": evaluate}


def main() -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=[*STEPS, "all", "lora"])
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, in codecs (each) and fusion")
    parser.add_argument("--clips", type=int, default=24, help="of a column in evaluate, a third of each kind; in lora")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="evaluate: tables, all by default")
    parser.add_argument("--steps", type=int, default=25, help="evaluate: of the sampler")
    parser.add_argument("--seconds", type=float, default=2.0, help="lora: of a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from-shipped", action="store_true",
                        help="prepare, codecs, fusion: go on with what the repository has")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from devlib.pack import import_pack
    import_pack()
    import torch

    torch.set_num_threads(options.threads)
    WORK.mkdir(exist_ok=True)
    for step in STEPS.values() if options.step == "all" else [{**STEPS, "lora": lora}[options.step]]:
        step(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
