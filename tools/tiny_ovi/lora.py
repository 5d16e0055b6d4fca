"""Proof of 'Ovi Train LoRA' on the trained tiny Ovi: a purple ball, taught, loaded and sampled in a real ComfyUI.

Everything goes through a server's nodes: 'Ovi Dataset' and 'Ovi Train LoRA' on a folder of mp4s, the stock 'Load LoRA',
'Ovi Sampler', 'Ovi Decode' and 'Save Video'. What comes out is measured in the mp4s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from devlib.client import Api, ComfyClient
from devlib.graphs import decode, files, loaders, node, save_clip, text_of
from devlib.media import read_media
from devlib.weights import WORLD
from devlib.workflows import set_files
from ovi_native.nodes.prompt import AUDIO_NEGATIVE, VIDEO_NEGATIVE
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.measure.shapes import cover, on_grid
from ovi_native.tiny_world.scenes import NEW_COLOUR, draw_scene

from .clip_files import LESSON, purple_scenes
from .scores import Clip, scores, table

VARIANT = "960x960_5s"
LONGEST = 7200.0  # seconds that a training may take
DEFAULTS: dict[str, Any] = {
    "audio_learning_rate": 0.0, "layers": "all", "video_given": 0.0, "audio_given": 0.0, "first_frame": 0.2,
    "distribution": "logit-normal", "shift": 3.0, "video_share": 0.85, "seed": 0, "save_every": 0, "sample_every": 0,
    "resume": False}
RECIPE: dict[str, Any] = {"steps": 800, "learning_rate": 1e-3, "rank": 16, "alpha": 16.0, "batch": 4,
                          "towers": "video"}
"""What suits the tiny Ovi, found by trying; the template `ovi_train_lora_tiny` has the same."""


@dataclass(frozen=True)
class Way:
    """How clips are sampled."""

    seconds: float = 2.0
    steps: int = 16
    seed: int = 100


def models() -> Api:
    """Loaders of the trained tiny Ovi."""
    return set_files(loaders(), WORLD)


def training(name: str, folder: str = LESSON, **settings: Any) -> Api:
    """The graph that trains a LoRA, shown by "train"; `settings` are inputs of 'Ovi Train LoRA'."""
    return models() | {
        "data": node("OviDataset", folder=folder, vae=["vae", 0], audio_vae=["audio_vae", 0], clip=["clip", 0],
                     variant=VARIANT, size=64, longest_seconds=0.0, caption_prefix="", caption_dropout=0.1),
        "train": node("OviTrainLora", model=["model", 0], dataset=["data", 0],
                      **{**DEFAULTS, **RECIPE, "name": name, **settings})}


def sampling(text: str, way: Way, seed: int, lora: str | None = None) -> Api:
    """The graph of one clip, saved by "save"; `lora` is put on by the stock 'Load LoRA'."""
    graph = models() | {
        "prompt": node("OviPrompt", clip=["clip", 0], scene=text, variant=VARIANT, audio_caption="",
                       video_negative=VIDEO_NEGATIVE, audio_negative=AUDIO_NEGATIVE),
        "latent": node("OviEmptyLatent", variant=VARIANT, aspect="custom", width=64, height=64, seconds=way.seconds,
                       frames=0, batch_size=1),
        "sampler": node("OviSampler", model=["model", 0], positive=["prompt", 0], negative=["prompt", 1],
                        latent=["latent", 0], seed=seed, steps=way.steps, solver="unipc", shift=5.0,
                        video_guidance=2.5, audio_guidance=2.5, skip_layer=-1, denoise=1.0)}
    if lora is not None:
        graph["lora"] = node("LoraLoader", model=["model", 0], clip=["clip", 0], lora_name=lora, strength_model=1.0,
                             strength_clip=0.0)
        graph["sampler"]["inputs"]["model"] = ["lora", 0]
    return save_clip(decode(graph))


def train(client: ComfyClient, name: str, folder: str = LESSON, **settings: Any) -> str:
    """Train a LoRA; returns what the node shows, which begins with the file's name."""
    return text_of(client.run(training(name, folder, **settings), timeout=LONGEST), "train")


def sample(client: ComfyClient, texts: list[str], way: Way, lora: str | None = None) -> Iterator[Clip]:
    """A clip for each text, seeds counting up, so that clips with and without a LoRA begin with the same noise."""
    for number, text in enumerate(texts):
        run = client.run(sampling(text, way, way.seed + number, lora))
        media = read_media(files(client, run, "save")[0])
        yield Clip(text, media.frames, media.sound.mean(axis=1))


def purple_captions(count: int, seconds: float, seed: int = 7) -> list[str]:
    """Descriptions that no clip of the lesson has, in all wordings."""
    return [caption(scene) for scene in purple_scenes(count, seconds, seed, held_out=True)]


def known_captions(count: int, seconds: float, seed: int = 7) -> list[str]:
    """Balls of the world's own colours and faces, by turns."""
    random = np.random.default_rng(seed)
    return [caption(draw_scene(random, seconds, kind=("ball", "ball", "face")[number % 3])) for number in range(count)]


def purple(clips: list[Clip]) -> str:
    """Share of clips that show a purple ball, and of their coloured pixels that are purple."""
    balls = [clip.report.ball is not None and clip.report.ball.colour == NEW_COLOUR for clip in clips]
    covers = [cover(on_grid(clip.frames)) for clip in clips]
    coloured = sum(float(part.sum()) for found in covers for part in found.values())
    share = sum(float(found[NEW_COLOUR].sum()) for found in covers) / max(coloured, 1.0)
    return f"a purple ball in {np.mean(balls):.2f}, purple pixels {share:.2f}"


def prove(client: ComfyClient, clips: int, way: Way, name: str = "purple_ball", **settings: Any) -> str:
    """Train, sample new and old captions with and without the LoRA, and return a table."""
    begun = time.monotonic()
    said = train(client, name, **settings)
    minutes, file = (time.monotonic() - begun) / 60, said.partition(":")[0]
    print(said, flush=True)
    texts = {"purple asked": purple_captions(clips, way.seconds), "old asked": known_captions(clips, way.seconds)}
    rows, shares = {}, []
    for which, lora in (("with LoRA", file), ("without", None)):
        for what, asked in texts.items():
            found = list(sample(client, asked, way, lora))
            rows[f"{what}, {which}"] = scores(found)
            shares.append(f"{what}, {which}: {purple(found)}")
            print(shares[-1], flush=True)
    return "\n".join([f"{minutes:.1f} minutes of data and training; {clips} clips each, {way.seconds:g} s, "
                      f"{way.steps} steps, seeds from {way.seed}", *shares, table(rows)])
