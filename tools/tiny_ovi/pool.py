"""A pool of training clips as latents: rendered once by several processes, kept in shards on disk."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.picture import FPS, render_frames
from ovi_native.tiny_world.scenes import draw_scene
from ovi_native.tiny_world.sound import render_sound
from safetensors import safe_open
from safetensors.torch import save_file

from .latents import SAMPLES_PER_LATENT, SIZE, Codec, Spectra, load_codec

SHARD = 512  # clips


@dataclass(frozen=True)
class Length:
    """How long clips of a pool are."""

    latent_frames: int
    audio_latents: int

    @property
    def frames(self) -> int:
        return 4 * (self.latent_frames - 1) + 1

    @property
    def seconds(self) -> float:
        return self.frames / FPS


SHORT, LONG = Length(13, 64), Length(31, 157)


def render(codec: Codec, spectra: Spectra, random: np.random.Generator, length: Length):
    """A random clip: video latents, audio latents, caption."""
    scene = draw_scene(random, length.seconds)
    video = codec.encode_video(render_frames(scene, length.frames, SIZE))
    sound = torch.from_numpy(render_sound(scene, length.audio_latents * SAMPLES_PER_LATENT))
    return video, codec.encode_audio(spectra(sound)), caption(scene)


def write_shard(task: tuple[Path, Path, Length, int]) -> Path:
    """One file of SHARD clips; a shard that is there is left as it is."""
    codec_path, path, length, seed = task
    if path.exists():
        return path
    torch.set_num_threads(1)
    codec, spectra, random = load_codec(codec_path), Spectra(), np.random.default_rng(seed)
    clips = [render(codec, spectra, random, length) for _ in range(SHARD)]
    tensors = {"video": torch.stack([clip[0] for clip in clips]).half(),
               "audio": torch.stack([clip[1] for clip in clips]).half()}
    part = path.with_suffix(".part")
    save_file(tensors, part, {"captions": json.dumps([clip[2] for clip in clips])})
    part.rename(path)
    return path


def make_pool(folder: Path, codec_path: Path, length: Length, shards: int, seed: int, processes: int = 2) -> None:
    """`shards` files of clips of that length below `folder`; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(codec_path, folder / f"{length.latent_frames}_{index:04}.safetensors", length, seed + 1000 * index)
             for index in range(shards)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for index, path in enumerate(pool.imap_unordered(write_shard, tasks)):
            print(f"pool: {index + 1} of {shards} shards, {path.name}", flush=True)


@dataclass
class Clips:
    """All clips of one length in memory."""

    video: torch.Tensor  # [n, 48, T, h, w] half
    audio: torch.Tensor  # [n, 20, A] half
    captions: list[str]


def read_pool(folder: Path, length: Length) -> Clips:
    """Every shard of that length that is finished."""
    video, audio, captions = [], [], []
    for path in sorted(folder.glob(f"{length.latent_frames}_*.safetensors")):
        with safe_open(path, "pt") as file:
            video.append(file.get_tensor("video"))
            audio.append(file.get_tensor("audio"))
            captions += json.loads(file.metadata()["captions"])
    return Clips(torch.cat(video), torch.cat(audio), captions)
