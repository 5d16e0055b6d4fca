"""What is done with a finished joint latent: its parts by name, clips of its batch, and its file.

A LATENT holds "samples", NestedTensor(video [B, 48, T, H/16, W/16], audio [B, 20, A]); it may hold "noise_mask" (nested
like the samples, or one tensor, which masks the video), "batch_index" (the noise each clip gets) and the variant.

The file is safetensors: `video` and `audio`, the masks as `video_noise_mask`, `audio_noise_mask` or `noise_mask`, and
in its metadata the variant, the seconds, batch_index, and what ComfyUI stores with a picture (prompt and workflow).
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from comfy.nested_tensor import NestedTensor
from safetensors.torch import save_file

from ..files.names import printable
from ..geometry import AUDIO_CHANNELS, FPS, VIDEO_CHANNELS, audio_latents_for, audio_seconds, frames_from_latent
from .variants import VARIANT_KEY, VARIANTS

ENDING = ".latent.safetensors"
FORMAT_KEY, FORMAT = "ovi_latent", "1"
LARGEST_HEADER = 64 << 20  # bytes; a workflow may be stored in it
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MASKS = ("video_noise_mask", "audio_noise_mask")


def joint_streams(latent: Mapping, node: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, audio) of a joint Ovi latent; ValueError saying what was connected to `node` otherwise."""
    samples = latent["samples"]
    streams = samples.unbind() if samples.is_nested else [samples]
    shapes = " and ".join(str(list(stream.shape)) for stream in streams)
    fits = [(stream.ndim, stream.shape[1]) for stream in streams if stream.ndim > 1]
    if fits != [(5, VIDEO_CHANNELS), (3, AUDIO_CHANNELS)]:
        raise ValueError(
            f"'{node}' needs a joint latent, video [B, {VIDEO_CHANNELS}, T, H, W] and audio "
            f"[B, {AUDIO_CHANNELS}, A], but got {shapes}. Connect 'Ovi Empty Latent'.")
    if not all(stream.numel() for stream in streams) or streams[0].shape[0] != streams[1].shape[0]:
        raise ValueError(f"'{node}' got a joint latent of {shapes}: both streams need the same number of clips, and no "
                         "side may be 0. Connect 'Ovi Empty Latent'.")
    return streams[0], streams[1]


def check_finite(tensors: Iterable[torch.Tensor], node: str) -> None:
    """Raise ValueError if any of the tensors holds NaN or infinity. Waits for the device they are on."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(f"'{node}' got a latent that is not finite (NaN or infinity), from which nothing can be made. "
                         "Likely causes: float16 weights, a damaged or mismatched model file, or a LoRA.")


def check_joint_latent(shapes) -> list:
    """Return the shapes of a [video, audio] latent; refuse anything else with a sentence for the node's error."""
    if shapes is None or len(shapes) != 2:
        found = "nothing" if not shapes else " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"Ovi samples video and sound together and needs a joint latent of both; got {found}. Connect "
            "'Ovi Empty Latent' or 'Ovi First Frame', or join a video and an audio latent with 'Concat AV Latent'.")
    video, audio = shapes
    if len(video) != 5 or video[1] != 48 or len(audio) != 3 or audio[1] != 20:
        raise ValueError(
            "Ovi needs a video latent [batch, 48, frames, height/16, width/16] followed by an audio latent "
            f"[batch, 20, latents]; got {list(video)} and {list(audio)}. Use the Wan2.2 VAE for the video and "
            "'Ovi Empty Latent' for the sizes.")
    return shapes


def length_disagreement(video: tuple, audio: tuple) -> str | None:
    """One sentence if latents of these shapes do not last equally long, to one audio latent; None if they do."""
    if abs(audio[2] - audio_latents_for(video[2])) <= 1:
        return None
    seconds = frames_from_latent(video[2]) / FPS
    return (f"The picture lasts {seconds:.2f} s and the sound {audio_seconds(audio[2]):.2f} s: the model was trained "
            f"on clips of which both end together, {audio_latents_for(video[2])} audio latents for {video[2]} latent "
            "frames. Connect 'Ovi Fit Sound Latent' before the sampler.")


# --- clips of a batch -------------------------------------------------------------------------------------------------


def select_clips(latent: Mapping, first: int, count: int, node: str) -> dict:
    """`count` clips from `first` on (negative: from the end; count 0: all that follow), as core's 'Latent From Batch'.

    The clips keep their numbers (batch_index), by which samplers draw noise. ValueError for clips that are not there.
    """
    clips = joint_streams(latent, node)[0].shape[0]
    start = first + clips if first < 0 else first
    end = clips if count == 0 else start + count
    if not 0 <= start < clips or not start < end <= clips:
        raise ValueError(f"'{node}' was asked for {count or 'all'} from clip {first} on, but the latent has {clips} "
                         f"clip{'s' * (clips > 1)}: first_clip goes from 0 to {clips - 1} (or -1 to {-clips} from the "
                         "end), and the rest must hold as many as asked for.")
    index = latent.get("batch_index", range(clips))
    taken = _with_rows(latent, list(range(start, end)))
    check_finite(taken["samples"].unbind(), node)  # of those taken: the others may be what went wrong
    return taken | {"batch_index": list(index)[start:end]}


def repeat_clips(latent: Mapping, amount: int, node: str) -> dict:
    """The whole batch `amount` times after itself, as core's 'Repeat Latent Batch'; each repeat gets other noise."""
    if not 1 <= amount <= 64:
        raise ValueError(f"'{node}' repeats 1 to 64 times; got {amount}.")
    video, audio = joint_streams(latent, node)
    check_finite((video, audio), node)
    clips = video.shape[0]
    repeated = _with_rows(latent, list(range(clips)) * amount)
    if "batch_index" in latent:
        index = list(latent["batch_index"])
        offset = max(index) - min(index) + 1
        repeated["batch_index"] = [i + round * offset for round in range(amount) for i in index]
    return repeated


def _with_rows(latent: Mapping, rows: list[int]) -> dict:
    """A copy of the latent with these clips; a mask of fewer clips serves them in turn, as when it is sampled with."""
    out = dict(latent)
    out["samples"] = _map_streams(latent["samples"], lambda stream: stream[rows])
    if "noise_mask" in latent:
        out["noise_mask"] = _map_streams(
            latent["noise_mask"],
            lambda mask: mask.clone() if mask.shape[0] == 1 else mask[[row % mask.shape[0] for row in rows]])
    return out


def _map_streams(value, function):
    return NestedTensor([function(part) for part in value.unbind()]) if value.is_nested else function(value)


# --- its file ---------------------------------------------------------------------------------------------------------


def save(latent: Mapping, path: Path, metadata: Mapping[str, str], node: str) -> None:
    """Write a joint latent, whole or not at all. ValueError if it is not finite, RuntimeError if it cannot be written.

    metadata: further texts, such as the workflow.
    """
    video, audio = joint_streams(latent, node)
    tensors = {"video": video, "audio": audio}
    mask = latent.get("noise_mask")
    if mask is not None:
        tensors |= dict(zip(MASKS, mask.unbind(), strict=False)) if mask.is_nested else {"noise_mask": mask}
    check_finite(tensors.values(), node)
    texts = {**metadata, FORMAT_KEY: FORMAT, "seconds": f"{frames_from_latent(video.shape[2]) / FPS:.3f}"}
    if latent.get(VARIANT_KEY):
        texts[VARIANT_KEY] = latent[VARIANT_KEY]
    if "batch_index" in latent:
        texts["batch_index"] = json.dumps([int(i) for i in latent["batch_index"]])
    part = path.with_name(f".{path.name}.part")  # of a run that was killed, the next one of this name writes over it
    try:
        save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, part,
                  texts)
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise RuntimeError(f"{printable(path.name)} could not be written to {printable(str(path.parent))} ({error}). "
                           "Make room or choose another filename_prefix.") from error


def load(path: Path) -> tuple[dict, dict[str, str]]:
    """(LATENT, metadata) of a file that `save` wrote, in the dtype it was saved in and independent of the file.

    RuntimeError with a sentence for a file that is missing, damaged or something else.
    """
    name = printable(path.name)
    if not os.path.isfile(path):  # False too for what no file can be called
        raise RuntimeError(f"{name} is not there any more. Press R in ComfyUI to refresh its lists.")
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > LARGEST_HEADER:
                raise ValueError("its header is too long")
        with safetensors.safe_open(path, "pt") as file:
            texts, names = file.metadata() or {}, set(file.keys())
            known = names & {"video", "audio", "noise_mask", *MASKS}
            tensors = {key: file.get_tensor(key).clone() for key in known}
    except (OSError, ValueError, UnicodeError, safetensors.SafetensorError) as error:
        raise RuntimeError(f"{name} cannot be read as a latent file ({printable(str(error))[:160]}). It is damaged or "
                           "only partly copied: copy or save it again.") from error
    _check(tensors, texts, name)
    mask = [tensors[key] for key in MASKS if key in tensors]
    latent = {"samples": NestedTensor((tensors["video"], tensors["audio"]))}
    if mask:
        latent["noise_mask"] = NestedTensor(mask)
    elif "noise_mask" in tensors:
        latent["noise_mask"] = tensors["noise_mask"]
    if texts.get(VARIANT_KEY) in VARIANTS:
        latent[VARIANT_KEY] = texts[VARIANT_KEY]
    if "batch_index" in texts:
        latent["batch_index"] = _read_index(texts["batch_index"], tensors["video"].shape[0], name)
    return latent, texts


def _check(tensors: dict[str, torch.Tensor], texts: dict[str, str], name: str) -> None:
    """Raise RuntimeError unless these are the parts of a joint latent."""
    if not {"video", "audio"} <= set(tensors):
        raise RuntimeError(f"{name} is not a joint latent: it lacks 'video' or 'audio'. Choose a file of 'Ovi Save "
                           "Latent'; those of 'Save Latent' are for 'Load Latent'.")
    if texts.get(FORMAT_KEY, FORMAT) != FORMAT:
        raise RuntimeError(f"{name} is of a newer format ({printable(texts[FORMAT_KEY])[:20]}); update this pack.")
    if any(tensor.dtype not in FLOATS for tensor in tensors.values()):
        raise RuntimeError(f"{name} holds numbers of another kind than a latent's. Save the latent again.")
    try:
        video, audio = joint_streams({"samples": NestedTensor((tensors["video"], tensors["audio"]))}, name)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    for key, like in (("noise_mask", video), *zip(MASKS, (video, audio), strict=True)):
        mask = tensors.get(key)
        fits = mask is None or (0 < mask.numel() <= like.numel() and 0 < mask.ndim <= like.ndim and mask.shape[0] <= 64)
        if not fits or (key == MASKS[1] and mask is not None and MASKS[0] not in tensors):
            raise RuntimeError(f"{name} has a noise mask that does not fit its latent. Save the latent again.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise RuntimeError(f"{name} holds numbers that are not finite (NaN or infinity). It is damaged: sample and "
                           "save the latent again.")


def _read_index(text: str, clips: int, name: str) -> list[int]:
    try:
        index = json.loads(text)
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, list) or len(index) != clips or not all(
            type(i) is int and 0 <= i < 1 << 16 for i in index):
        raise RuntimeError(f"{name} has a batch_index that does not fit its {clips} clips. Save the latent again.")
    return index


def seeds(prompt: str | None) -> list[int]:
    """The seeds in a stored API prompt, as its nodes hold them; empty if it is none."""
    try:
        graph = json.loads(prompt or "{}")
    except (ValueError, RecursionError):
        return []
    nodes: Iterable = graph.values() if isinstance(graph, dict) else ()
    inputs = [node.get("inputs") for node in nodes if isinstance(node, dict)]
    found = [values.get(key) for values in inputs if isinstance(values, dict) for key in ("seed", "noise_seed")]
    return sorted({seed for seed in found if type(seed) is int})
