"""Training data: a folder of clips becomes a dataset, encoded once into a cache on disk."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..ovi_model.ovi.variants import GEOMETRY
from ..ovi_model.training.clips import PICTURES, SOUND_FORMATS, VIDEO_FORMATS
from ..ovi_model.training.data import make_dataset
from ..ovi_model.training.encoding import LARGEST, LONGEST, DataSettings, Encoders
from .clips import OUTPUT
from .decode import VIDEO_VAE, check_video_vae
from .inputs import check_inputs, shown
from .latents import variant_input
from .report import later, report

DATASET = io.Custom("OVI_DATASET")
MEDIA = (*VIDEO_FORMATS, *SOUND_FORMATS)
SHOW_EVERY = 0.5  # seconds between two lines on the node


class OviDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviDataset",
            display_name="Ovi Dataset",
            search_aliases=["training data", "captioned clips", "fine-tune", "dataset folder", "load video folder"],
            category="Ovi/training",
            description="Encodes a folder of captioned clips to train on, once: what was encoded is kept on disk. "
                        "Broken clips are named and left out.",
            inputs=[
                io.Combo.Input("folder", options=clip_folders(), tooltip=(
                    "A folder of clips in ComfyUI's input folder or output folder (marked [output]). A clip is an mp4, "
                    "mov, webm or mkv, a folder of png or jpg frames, or a wav or flac, with its caption in a .txt of "
                    "the same name, or all of them in captions.csv or captions.jsonl. Press R to refresh the list.")),
                io.Vae.Input("vae", tooltip=VIDEO_VAE),
                io.Vae.Input("audio_vae", tooltip="MMAudio VAE from 'Load Ovi Audio VAE'."),
                io.Clip.Input("clip", tooltip="UMT5-XXL from 'Load Ovi Text Encoder' (or 'Load CLIP', type wan)."),
                variant_input(),
                io.Int.Input("size", default=0, min=0, max=LARGEST, step=GEOMETRY.size_multiple, tooltip=(
                    f"Side in pixels of a square with the area that clips get, up to {LARGEST}; 0 for the variant's "
                    "(720 or 960). Each clip keeps its aspect ratio: it is scaled, and its edges cut to multiples of "
                    f"{GEOMETRY.size_multiple}. Half the side takes a quarter of the memory.")),
                io.Float.Input("longest_seconds", default=0.0, min=0.0, max=LONGEST, step=0.1, tooltip=(
                    f"Longest example in seconds, snapped to 4n+1 frames at {GEOMETRY.fps} per second, up to "
                    f"{LONGEST:g}; 0 for the variant's trained length (5 or 10 s). Longer clips are cut into several, "
                    "and the rest at the end is not used; shorter ones keep their length.")),
                io.String.Input("caption_prefix", default="", tooltip=(
                    "Put before every caption, such as a word that is to call up what is learnt. Empty for nothing.")),
                io.Float.Input("caption_dropout", default=0.1, min=0.0, max=1.0, step=0.01, tooltip=(
                    "Share of draws, 0 to 1, in which a clip is shown without its caption, so that guidance keeps "
                    "working. 0.1 is usual.")),
            ],
            outputs=[
                DATASET.Output(display_name="dataset", tooltip="For 'Ovi Train LoRA'."),
                io.String.Output(display_name="report", tooltip=(
                    "What the dataset holds, what was left out and why, and where the cache lies.")),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return contents(folder_path(folder))

    @classmethod
    def execute(cls, folder, vae, audio_vae, clip, variant, size, longest_seconds, caption_prefix,
                caption_dropout) -> io.NodeOutput:
        check_inputs(cls, variant=variant, size=size, longest_seconds=longest_seconds, caption_dropout=caption_dropout)
        check_video_vae(vae)
        dataset = make_dataset(folder_path(folder), Encoders(vae, audio_vae, clip),
                               DataSettings(variant, size, longest_seconds, caption_prefix),
                               say=progress(later(cls)), caption_dropout=caption_dropout)
        return io.NodeOutput(dataset, dataset.summary(), ui=report(cls, dataset.lines, dataset.warnings))


def clip_folders() -> list[str]:
    """Names of folders that hold clips for the list: the output folder's, then the input folder's."""
    output, source = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    return [*(f"{name}{OUTPUT}" for name in found_in(output)), *found_in(source)]


def found_in(root: str) -> list[str]:
    """Folders below one that hold videos, sounds or folders of frames; links to folders are not followed.

    A name that is not UTF-8 is left out: it could not be sent to the browser and back.
    """
    found, frames = set(), set()
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        name = os.path.relpath(place, root).replace(os.sep, "/")
        endings = {os.path.splitext(file)[1].lower() for file in files if not file.startswith(".")}
        if endings & set(MEDIA):
            found.add(name)
        elif endings & set(PICTURES):
            frames.add(os.path.dirname(name))
        if {"captions.csv", "captions.jsonl"} & set(files):
            found.add(name)
    captioned = {name for name in frames if has_captions(os.path.join(root, name))}
    return sorted(name for name in found | captioned if name not in ("", ".") and name.isprintable())


def has_captions(folder: str) -> bool:
    """Whether there are captions beside folders of pictures: else they are pictures for something else."""
    return any(name.endswith(".txt") and os.path.isdir(os.path.join(folder, name[:-4])) for name in os.listdir(folder))


def folder_path(name: str) -> Path:
    """The folder of a name in the list; ValueError for one outside of ComfyUI's folders or that is not there."""
    path = annotated_folder(name) if isinstance(name, str) else None
    if path is None:
        raise ValueError(f"folder of 'Ovi Dataset' must be a folder in ComfyUI's output or input folder, but got "
                         f"{shown(name)}. Choose one of the list; press R to refresh it.")
    return path


def annotated_folder(name: str) -> Path | None:
    """The folder of a name in the list; None for what is no folder, or none below ComfyUI's, through a link or not."""
    roots = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    try:
        path = Path(folder_paths.get_annotated_filepath(name))
        inside = any(folder_paths.is_within_directory(root, str(path)) and not os.path.samefile(root, path)
                     for root in roots)
        return path if inside and path.is_dir() else None
    except (ValueError, OSError):
        return None


def contents(folder: Path) -> str:
    """Another text whenever a file in the folder is added, changed or removed."""
    digest = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            try:
                found = os.stat(path)
            except OSError:  # gone meanwhile, or a link to what is gone
                continue
            digest.update(f"{path!r} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def progress(show: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Shows what is being done on the node: a bar for each kind of work, and a line with the time it still takes."""
    state: dict[str, tuple] = {}

    def say(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in state:
            state[what] = comfy.utils.ProgressBar(total), now, 0.0
        bar, begun, shown_at = state[what]
        bar.update_absolute(done, total)
        if now - shown_at >= SHOW_EVERY or done == total:
            state[what] = bar, begun, now
            show(line(what, done, total, now - begun))

    return say


def line(what: str, done: int, total: int, seconds: float) -> str:
    """What is done, with the time left once something is known of it."""
    left = f", {clock(seconds / done * (total - done))} left" if 0 < done < total else ""
    return f"{what.capitalize()}: {min(done + 1, total)} of {total}{left}"


def clock(seconds: float) -> str:
    """A length of time as 0:07, 12:40 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
