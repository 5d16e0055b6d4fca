"""What is done with a finished joint latent: its parts by name, clips of its batch, and its file.

A LATENT holds "samples", NestedTensor(video [B, 48, T, H/16, W/16], audio [B, 20, A]); it may hold "noise_mask" (nested
like the samples, or one tensor, which masks the video), "batch_index" (the noise each clip gets) and the variant.

The file is safetensors: `video` and `audio`, the masks as `video_noise_mask`, `audio_noise_mask` or `noise_mask`, and
in its metadata the variant, the seconds, batch_index, and what ComfyUI stores with a picture (prompt and workflow).
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from comfy.nested_tensor import NestedTensor

from ..files.names import first_line, printable
from ..files.safetensors_file import write_tensors
from ..files.safetensors_header import read_header
from ..sampling.packed import STREAMS, not_finite
from .variants import GEOMETRY, VARIANT_KEY, VARIANTS

ENDING = ".latent.safetensors"
FORMAT_KEY, FORMAT = "ovi_latent", "1"
LARGEST_HEADER, MOST_PARTS = 64 << 20, 5_000_000  # bytes, values; a workflow may be stored in it
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MASKS = ("video_noise_mask", "audio_noise_mask")


def streams_of(samples) -> list[torch.Tensor]:
    """The tensors of a latent's samples, in a list of its own: of a joint one its streams, else itself."""
    return list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]


def joint_streams(latent: Mapping, node: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, audio) of a joint latent; ValueError naming `node` and what was connected to it otherwise."""
    streams = streams_of(latent["samples"])
    check_joint_latent([stream.shape for stream in streams], f"'{node}'")
    return streams[0], streams[1]


def check_joint_latent(shapes: Sequence | None, who: str = "Ovi") -> list:
    """Return the shapes of a [video, audio] latent; ValueError for any other, saying who (a node) got what."""
    shapes = list(shapes or ())
    got = " and ".join(str(list(shape)) for shape in shapes) or "nothing"
    if len(shapes) != 2:
        raise ValueError(f"{who} needs a joint latent of picture and sound, but got {got}. Connect 'Ovi Empty Latent' "
                         "or 'Ovi First Frame', or join a video and an audio latent with 'Concat AV Latent'; a single "
                         "one is for 'VAE Decode' or 'VAE Decode Audio'.")
    video, audio = shapes
    channels = GEOMETRY.video.channels, GEOMETRY.audio.channels
    if (len(video), len(audio)) != (5, 3) or (video[1], audio[1]) != channels:
        raise ValueError(f"{who} needs a joint latent, video [B, {channels[0]}, T, H, W] followed by audio "
                         f"[B, {channels[1]}, A], but got {got}. Use the Wan2.2 VAE for the video and 'Ovi Empty "
                         "Latent' for the sizes.")
    if 0 in (*video, *audio):
        raise ValueError(f"{who} got an empty joint latent, {got}: no side may be 0. Make one with 'Ovi Empty Latent' "
                         "of at least one clip and one frame.")
    if video[0] != audio[0]:
        raise ValueError(f"{who} got a joint latent of {video[0]} clips of picture but {audio[0]} of sound, and needs "
                         "the same number of clips. Use 'Ovi Fit Sound Latent' to give one sound to all clips, or join "
                         "latents of equal batch size.")
    return shapes


def check_finite(streams: Sequence[torch.Tensor], node: str, names: Sequence[str] = STREAMS) -> None:
    """Raise ValueError if any of the tensors of a latent holds NaN or infinity. Waits for their device once."""
    tensors = dict(zip(names, streams, strict=True))
    for name in not_finite(tensors):
        bad = int((~torch.isfinite(tensors[name])).sum())
        raise ValueError(f"'{node}' got a latent from which nothing can be made: {bad:,} of {tensors[name].numel():,} "
                         f"values in the {name}'s latent are not finite (NaN or infinite). Something went wrong before "
                         "or during sampling. Likely causes: a model that computes in fp16, a damaged or mismatched "
                         "model file, or a LoRA. Sample again without them.")


def length_disagreement(video: Sequence[int], audio: Sequence[int]) -> str | None:
    """One sentence if picture and sound of these shapes end more than a frame apart; None if they do not."""
    picture, sound = GEOMETRY.video_seconds(video[2]), GEOMETRY.audio_seconds(audio[2])
    if abs(picture - sound) <= 1 / GEOMETRY.fps:
        return None
    effect = (f"a video file has no sound for the last {picture - sound:.2f} s" if sound < picture else
              f"a video file ends with the picture and leaves {sound - picture:.2f} s of sound out")
    return (f"The picture lasts {picture:.2f} s, the sound {sound:.2f} s: {effect}. 'Ovi Fit Sound Latent' before the "
            "sampler makes them equal, as in all clips the model was trained on.")


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
    check_finite(list(tensors.values()), node, list(tensors))
    texts = {**metadata, FORMAT_KEY: FORMAT, "seconds": f"{GEOMETRY.video_seconds(video.shape[2]):.3f}"}
    if latent.get(VARIANT_KEY):
        texts[VARIANT_KEY] = latent[VARIANT_KEY]
    if "batch_index" in latent:
        texts["batch_index"] = json.dumps([int(i) for i in latent["batch_index"]])
    try:
        write_tensors(path, tensors, texts)
    except OSError as error:
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
        header = read_header(path, LARGEST_HEADER, MOST_PARTS)
        texts, known = header.metadata, {"video", "audio", "noise_mask", *MASKS} & set(header.names)
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in known}
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise RuntimeError(f"{name} cannot be read as a latent file ({first_line(error)}). It is damaged or "
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
    if not_finite(tensors):
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
