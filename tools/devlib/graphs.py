"""Workflow graphs on the tiny random models for the server tests, and their results.

A graph maps readable node ids to API-format nodes; `change` gives a copy with other inputs on some of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save_file

from .client import Api, ComfyClient, Run
from .media import read_media
from .weights import TINY

SCENE = "A robot walks through a market and says <S>Twelve oranges.<E> It waves."


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One API-format node; a link is written ["id", output]."""
    return {"class_type": class_type, "inputs": inputs}


def loaders() -> Api:
    """The four loaders: model, clip, vae, audio_vae."""
    return {
        "model": node("OviModelLoader", model_name=TINY["model"], weight_dtype="default"),
        "clip": node("OviTextEncoderLoader", text_encoder_name=TINY["text_encoder"], tokenizer_name="automatic"),
        "vae": node("VAELoader", vae_name=TINY["video_vae"]),
        "audio_vae": node("OviAudioVAELoader", vae_name=TINY["audio_vae"], vocoder_name=TINY["vocoder"]),
    }


def text_to_av() -> Api:
    """Everything up to the sampled latent, "sampler": 96x64, 9 frames, 2 steps, every guidance on."""
    return {
        **loaders(),
        "prompt": node("OviPrompt", clip=["clip", 0], scene=SCENE, variant="960x960_5s", audio_caption="a low hum",
                       video_negative="blur", audio_negative="echo"),
        "latent": node("OviEmptyLatent", variant="960x960_5s", aspect="custom", width=96, height=64, seconds=0.0,
                       frames=9, batch_size=1),
        "sampler": node("OviSampler", model=["model", 0], positive=["prompt", 0], negative=["prompt", 1],
                        latent=["latent", 0], seed=7, steps=2, solver="unipc", shift=5.0, video_guidance=4.0,
                        audio_guidance=3.0, skip_layer=2, denoise=1.0),
    }


def image_to_av(resize: str = "crop") -> Api:
    """The same from the picture that comes with ComfyUI."""
    graph = text_to_av() | {
        "image": node("LoadImage", image="example.png"),
        "first": node("OviFirstFrame", vae=["vae", 0], image=["image", 0], variant="960x960_5s", resize=resize,
                      latent=["latent", 0]),
    }
    return change(graph, sampler={"latent": ["first", 0]})


def stock_sampler() -> Api:
    """The parts of 'Ovi Sampler' on core's SamplerCustomAdvanced, which is "sampler" here."""
    graph = text_to_av()
    inputs = graph.pop("sampler")["inputs"]
    take = {name: inputs[name] for name in ("video_guidance", "audio_guidance", "skip_layer")}
    return graph | {
        "guider": node("OviGuider", model=["model", 0], positive=["prompt", 0], negative=["prompt", 1], **take),
        "solver": node("OviSolver", solver=inputs["solver"]),
        "sigmas": node("OviSchedule", **{name: inputs[name] for name in ("solver", "steps", "shift", "denoise")}),
        "noise": node("RandomNoise", noise_seed=inputs["seed"]),
        "sampler": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["solver", 0],
                        sigmas=["sigmas", 0], latent_image=["latent", 0]),
    }


def k_sampler() -> Api:
    """Our MODEL, CONDITIONING and LATENT on the plain KSampler, which is "sampler" here."""
    return text_to_av() | {
        "sampler": node("KSampler", model=["model", 0], positive=["prompt", 0], negative=["prompt", 1],
                        latent_image=["latent", 0], seed=7, steps=2, cfg=4.0, sampler_name="euler", scheduler="simple",
                        denoise=1.0),
    }


def change(graph: Api, **inputs: dict[str, Any]) -> Api:
    """A copy of `graph` with other inputs: `change(graph, sampler={"seed": 8})`."""
    graph = copy.deepcopy(graph)
    for name, values in inputs.items():
        graph[name]["inputs"].update(values)
    return graph


def save_latents(graph: Api, source: str = "sampler") -> Api:
    """`graph` with both streams of a joint latent written to files, exactly."""
    return graph | {
        "separate": node("LTXVSeparateAVLatent", av_latent=[source, 0]),
        "video_latent": node("SaveLatent", samples=["separate", 0], filename_prefix="latents/video"),
        "audio_latent": node("SaveLatent", samples=["separate", 1], filename_prefix="latents/audio"),
    }


def decode(graph: Api, source: str = "sampler", tile_size: int = 0, tile_frames: int = 64) -> Api:
    """`graph` with 'Ovi Decode', as "decode"."""
    return graph | {
        "decode": node("OviDecode", latent=[source, 0], video_vae=["vae", 0], audio_vae=["audio_vae", 0],
                       tile_size=tile_size, tile_frames=tile_frames),
    }


def save_media(graph: Api, images: list | None = None, audio: list | None = None) -> Api:
    """`graph` with frames as PNG and sound as FLAC (16 bits), of "decode" unless other links are given."""
    return graph | {
        "frames": node("SaveImage", images=images or ["decode", 0], filename_prefix="frames"),
        "sound": node("SaveAudio", audio=audio or ["decode", 1], filename_prefix="sound"),
    }


def save_clip(graph: Api) -> Api:
    """`graph` with an mp4 of "decode"."""
    return graph | {
        "clip_out": node("CreateVideo", images=["decode", 0], audio=["decode", 1], fps=24.0),
        "save": node("SaveVideo", video=["clip_out", 0], filename_prefix="clip", format="auto", codec="auto"),
    }


# --- running ----------------------------------------------------------------------------------------------------------


def forget(client: ComfyClient) -> None:
    """Unload all models and drop all caches of the server, for certain: it does so between prompts."""
    client.free()
    client.run({"1": node("PreviewAny", source=["2", 0]), "2": node("PrimitiveInt", value=0)})


def executed(run: Run) -> list[str]:
    """Ids of the nodes that really ran, in order; one that asked for a lazy input counts where it ran at last."""
    begun = [data["node"] for data in run.of("executing") if data.get("node")]
    return list(dict.fromkeys(begun[::-1]))[::-1]


def text_of(run: Run, name: str) -> str:
    """What a node shows to the user."""
    return "\n".join(run.history["outputs"][name]["text"])


def files(client: ComfyClient, run: Run, name: str) -> list[bytes]:
    """The content of all files that a node wrote."""
    found = [client.view(output) for output in run.outputs if output.node == name]
    assert found, f"{name} wrote nothing; it may have been cached"
    return found


@dataclass(frozen=True)
class Latents:
    """Both streams of a sampled latent, bit for bit."""

    video: torch.Tensor  # [B, 48, T, H, W]
    audio: torch.Tensor  # [B, 20, A]


def run_latents(client: ComfyClient, graph: Api, source: str = "sampler", fresh: bool = False) -> Latents:
    """Sample `graph` and read back both streams; `fresh` asserts that they did not come out of the server's cache."""
    run = client.run(save_latents(graph, source))
    assert not fresh or source in executed(run), f"{source} came out of the cache"
    video, audio = (load(files(client, run, name)[0])["latent_tensor"] for name in ("video_latent", "audio_latent"))
    return Latents(video, audio)


def assert_equal(found: Latents, truth: Latents) -> None:
    """Both streams are the same to the last bit."""
    for stream in ("video", "audio"):
        a, b = getattr(found, stream), getattr(truth, stream)
        assert a.shape == b.shape and torch.equal(a, b), f"{stream} differs by up to {(a - b).abs().max():.2e}"


def run_media(client: ComfyClient, graph: Api) -> tuple[np.ndarray, np.ndarray]:
    """Run a graph with `save_media`: frames [F, H, W, 3] in 0..255, and sound [samples, channels] in -1..1."""
    run = client.run(graph)
    frames = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in files(client, run, "frames")])
    return frames, read_media(files(client, run, "sound")[0]).sound


# --- model files ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def added(models: Path, contents: dict[str, Any]) -> Iterator[None]:
    """More files in the server's model folders for a while: bytes, or an object to save as the name's ending says."""
    paths = [models / name for name in contents]
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif path.suffix == ".safetensors":
                save_file(content, path)
            else:
                torch.save(content, path)
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def wan_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A UMT5 encoder in Wan's own names."""
    names = {
        "encoder.block.": "blocks.", "layer.0.SelfAttention.relative_attention_bias.": "pos_embedding.embedding.",
        "layer.0.SelfAttention.": "attn.", "layer.0.layer_norm.": "norm1.", "layer.1.layer_norm.": "norm2.",
        "layer.1.DenseReluDense.wi_0.": "ffn.gate.0.", "layer.1.DenseReluDense.wi_1.": "ffn.fc1.",
        "layer.1.DenseReluDense.wo.": "ffn.fc2.", "shared.": "token_embedding.", "encoder.final_layer_norm.": "norm.",
    }
    renamed = {}
    for key, value in weights.items():
        for core, wan in names.items():
            key = key.replace(core, wan)
        renamed[key] = value
    return renamed
