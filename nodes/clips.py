"""Utilities for finished joint latents: save and load them, take clips of a batch, repeat a batch."""

import hashlib
import json
import os
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..ovi_model.ovi import latents
from ..ovi_model.ovi.variants import GEOMETRY, VARIANT_KEY
from .inputs import check_inputs, shown
from .report import report

OUTPUT = " [output]"  # core's mark for names in the output folder; names without one are in the input folder


class OviSaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviSaveLatent",
            display_name="Ovi Save Latent",
            search_aliases=["store latent", "export latent"],
            category="Ovi/latent",
            description="Saves a joint latent, picture and sound bit for bit, so that a run of minutes need not be "
                        "repeated to decode or rework it.",
            inputs=[
                io.Latent.Input("latent", tooltip="A joint latent, such as the output of 'Ovi Sampler'."),
                io.String.Input("filename_prefix", default="latents/Ovi", tooltip=(
                    "Name and, before a slash, folder within ComfyUI's output folder; a number of 5 digits follows. "
                    "%width%, %height%, %year%, %month% and %day% are filled in.")),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The same latent.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent, filename_prefix) -> io.NodeOutput:
        check_inputs(cls, latent=latent)
        video, _ = latents.joint_streams(latent, "Ovi Save Latent")
        height, width = GEOMETRY.pixel_hw(*video.shape[3:])
        folder, name, subfolder = new_file(filename_prefix, width, height)
        latents.save(latent, folder / name, stored_texts(cls.hidden), "Ovi Save Latent")
        shown = report(cls, [f"Saved as {subfolder}/{name}" if subfolder else f"Saved as {name}"], [])
        saved = ui.SavedResult(name, subfolder, io.FolderType.output)
        return io.NodeOutput(latent, ui={**shown.as_dict(), "latents": [saved]})


class OviLoadLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviLoadLatent",
            display_name="Ovi Load Latent",
            search_aliases=["import latent", "open latent"],
            category="Ovi/latent",
            description="Loads a joint latent that 'Ovi Save Latent' saved, with its noise mask and its variant.",
            inputs=[
                io.Combo.Input("latent", options=latent_files(), tooltip=(
                    f"A file ending in {latents.ENDING}, in ComfyUI's output folder (marked [output]) or input "
                    "folder, or in a folder in these.")),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip=(
                "The latent as saved: for 'Ovi Decode', or for a sampler with denoise below 1."))],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        loaded, texts = latents.load(saved_path(latent))
        loaded["samples"] = loaded["samples"].to(comfy.model_management.intermediate_device())
        return io.NodeOutput(loaded, ui=report(cls, [describe(loaded, texts)], []))

    @classmethod
    def fingerprint_inputs(cls, latent):
        with open(folder_paths.get_annotated_filepath(latent), "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):  # hashlib.file_digest is not in Python 3.10
                digest.update(chunk)
            return digest.hexdigest()


class OviSelectClips(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviSelectClips",
            display_name="Ovi Select Clips",
            search_aliases=["latent from batch", "pick clip", "split batch", "select latent"],
            category="Ovi/latent",
            description="Takes clips out of a batch, picture, sound and noise mask together.",
            inputs=[
                io.Latent.Input("latent", tooltip="A joint latent of several clips."),
                io.Int.Input("first_clip", default=0, min=-64, max=63, tooltip=(
                    "Number of the first clip taken: 0 is the first of the batch, -1 the last.")),
                io.Int.Input("clips", default=1, min=0, max=64, tooltip=(
                    "How many clips are taken, 1 to 64; 0 for all that follow.")),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="A joint latent of the clips taken.")],
        )

    @classmethod
    def execute(cls, latent, first_clip, clips) -> io.NodeOutput:
        check_inputs(cls, latent=latent)
        return io.NodeOutput(latents.select_clips(latent, first_clip, clips, "Ovi Select Clips"))


class OviRepeatClips(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviRepeatClips",
            display_name="Ovi Repeat Clips",
            search_aliases=["repeat latent batch", "duplicate latent", "batch"],
            category="Ovi/latent",
            description="Repeats a batch of clips, picture, sound and noise mask together, to sample several at once.",
            inputs=[
                io.Latent.Input("latent", tooltip="A joint latent, such as that of 'Ovi First Frame'."),
                io.Int.Input("amount", default=2, min=1, max=64, tooltip=(
                    "How often the batch stands in the result, 1 to 64. Memory for sampling grows with it.")),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="A joint latent of all repeats.")],
        )

    @classmethod
    def execute(cls, latent, amount) -> io.NodeOutput:
        check_inputs(cls, latent=latent)
        return io.NodeOutput(latents.repeat_clips(latent, amount, "Ovi Repeat Clips"))


def new_file(prefix: str, width: int, height: int) -> tuple[Path, str, str]:
    """(folder, name, subfolder) of a new file in ComfyUI's output folder; ValueError for a prefix outside it."""
    output = folder_paths.get_output_directory()
    name = os.path.basename(os.path.normpath(prefix))
    inside = "\0" not in prefix and folder_paths.is_within_directory(output, os.path.join(output, prefix))
    if not inside or name in ("", ".", ".."):
        raise ValueError(f"filename_prefix {prefix!r} names no file in ComfyUI's output folder. Use a name such as "
                         "'latents/Ovi', without '..' and not starting at the root.")
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    except OSError as error:
        raise RuntimeError(f"No folder can be made for filename_prefix {prefix[:100]!r} ({error.strerror}). Choose "
                           "another one.") from error
    return Path(folder), f"{name}_{counter:05}_{latents.ENDING}", subfolder


def stored_texts(hidden) -> dict[str, str]:
    """Prompt and workflow as core's 'Save Latent' stores them; nothing with --disable-metadata."""
    if args.disable_metadata or hidden is None:
        return {}
    texts = {"prompt": json.dumps(hidden.prompt)} if hidden.prompt is not None else {}
    return texts | {name: json.dumps(value) for name, value in (hidden.extra_pnginfo or {}).items()}


def latent_files() -> list[str]:
    """Names of saved latents for the list: the output folder's, then the input folder's."""
    output, source = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    return [*(f"{name}{OUTPUT}" for name in found_in(output)), *found_in(source)]


def found_in(folder: str) -> list[str]:
    """Latent files in a folder and its folders, with slashes, highest names first; links to folders are not followed.

    A name that is not UTF-8 is left out: it could not be sent to the browser and back.
    """
    names = [os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
             for root, _, files in os.walk(folder) for name in files
             if name.endswith(latents.ENDING) and not name.startswith(".")]
    return sorted((name for name in names if name.isprintable()), reverse=True)


def saved_path(name: str) -> Path:
    """Path of a file by its name in the list; ValueError for a name that leaves ComfyUI's folders."""
    try:
        return Path(folder_paths.get_annotated_filepath(name))
    except ValueError as error:
        raise ValueError(f"latent of 'Ovi Load Latent' must be a file of ComfyUI's output or input folder, but got "
                         f"{shown(name)}. Choose one of the list.") from error


def describe(latent: dict, texts: dict[str, str]) -> str:
    """What was loaded: clips, size, length, variant, mask and the seeds of the run."""
    video, _ = latent["samples"].unbind()
    clips, _, latent_frames, *size = video.shape
    height, width = GEOMETRY.pixel_hw(*size)
    parts = [f"{clips} clip{'s' * (clips > 1)}", f"{width}x{height}",
             f"{GEOMETRY.frames_from_latent(latent_frames)} frames = {GEOMETRY.video_seconds(latent_frames):.2f} s",
             latent.get(VARIANT_KEY, "variant not known")]
    seeds = latents.seeds(texts.get("prompt"))
    return ", ".join([*parts, *(["noise mask"] if "noise_mask" in latent else []),
                      *([f"seed {' and '.join(map(str, seeds[:4]))}"] if seeds else [])])
