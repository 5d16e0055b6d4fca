"""The weight files that Ovi needs: where they are published, where ComfyUI keeps them, which are already here.

Sizes and addresses are those of the public repositories in late 2026; a download asks for the real size. Where a file's
SHA-256 is publicly known apart from the host that serves it, it is pinned here together with a commit that holds it;
the others can only be checked against the hash that the host itself tells, and lists say so. Names under which the same
weights circulate elsewhere (`file_names`) count as present too. Nothing here touches the network.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..files.disk import is_plain
from ..files.names import printable
from .file_names import ACCEPTED, ROLES, first_served
from .variants import VARIANTS, get_variant

PRECISIONS = ("bf16", "fp8")
DEFAULT_PRECISION = "bf16"
SMALLEST = 1_000_000  # bytes; anything smaller is a Git LFS pointer or an error page under a weight file's name


@dataclass(frozen=True)
class WeightFile:
    """One published file: `path` in the Hugging Face repository `repo`, kept in ComfyUI's model folder `folder`."""

    id: str
    role: str
    repo: str
    path: str
    folder: str
    size: int  # bytes, as published
    sha256: str | None = None  # pinned; None: only the Hub's own is known
    revision: str | None = None  # the commit that holds it; None: the newest
    licence: str = "licence unknown"  # of the weights, as those who trained them name it

    @property
    def name(self) -> str:
        """The file's own name, here and there."""
        return self.path.rpartition("/")[2]


_OVI, _OVI_FP8 = "chetwinlow1/Ovi", "Kijai/WanVideo_comfy_fp8_scaled"
_BF16_SIZE, _FP8_SIZE = 23_300_000_000, 12_341_119_544
_APACHE, NON_COMMERCIAL = "Apache-2.0", "CC-BY-NC-4.0"

# The two pinned hashes stand, with size and commit, in several independent public lists; SwarmUI's download table has
# the text encoder's too. For the others none was found outside the Hub. Where each licence is stated: docs/formats.md.
FILES: dict[str, WeightFile] = {
    file.id: file
    for file in (
        *(WeightFile(f"model_{v.name}_bf16", "model", _OVI, v.checkpoint, "diffusion_models", _BF16_SIZE,
                      licence=_APACHE)
          for v in VARIANTS.values()),
        WeightFile("model_720x720_5s_fp8", "model", "rkfg/Ovi-fp8_quantized", "model_fp8_e4m3fn.safetensors",
                   "diffusion_models", 12_000_000_000, licence=_APACHE),
        WeightFile("model_960x960_5s_fp8", "model", _OVI_FP8,
                   "TI2V/Ovi/Wan2_2-5B-Ovi_960x960_fp8_e4m3fn_scaled_KJ.safetensors", "diffusion_models", _FP8_SIZE,
                   licence=_APACHE),
        WeightFile("model_960x960_10s_fp8", "model", _OVI_FP8,
                   "TI2V/Ovi/Wan2_2-5B-Ovi_960x960_10s_fp8_e4m3fn_scaled_KJ.safetensors", "diffusion_models",
                   _FP8_SIZE, licence=_APACHE),
        WeightFile("text_encoder", "text_encoder", "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
                   "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders", 6_735_906_897,
                   sha256="c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68",
                   revision="617a7633e636506f850e043bc4605f290a466a8e", licence=_APACHE),
        WeightFile("video_vae", "video_vae", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
                   "split_files/vae/wan2.2_vae.safetensors", "vae", 1_409_400_960,
                   sha256="e40321bd36b9709991dae2530eb4ac303dd168276980d3e9bc4b6e2b75fed156",
                   revision="ee6f4a40737a995bf5818954cfce6d59443b0f04", licence=_APACHE),
        WeightFile("audio_vae", "audio_vae", "Kijai/WanVideo_comfy",
                   "Ovi/mmaudio_vae_16k_bf16.safetensors", "vae", 326_154_893, licence=NON_COMMERCIAL),
        WeightFile("vocoder", "vocoder", "Kijai/WanVideo_comfy",
                   "Ovi/mmaudio_vocoder_bigvgan_best_netG_bf16.safetensors", "vae", 213_323_484,
                   licence=NON_COMMERCIAL),
    )
}


@dataclass(frozen=True)
class Need:
    """One role of a workflow: what is here for it, and the file to download when nothing is."""

    file: WeightFile
    found: tuple[str, ...]  # names below ComfyUI's folders; empty when missing
    partial: int = 0  # bytes kept from an interrupted download

    @property
    def present(self) -> bool:
        return bool(self.found)

    def line(self) -> str:
        """One line of a list for people."""
        what = ROLES[self.file.role]
        if self.present:
            return f"✔ {what}: {' + '.join(map(printable, self.found))} ({self.file.licence})"
        kept = f", {human(self.partial)} of it here" if self.partial else ""
        return (f"✘ {what}: {self.file.name} ({human(self.file.size)}{kept}, {self.file.licence}) "
                f"from {self.file.repo}")


def needed_files(variant: str, precision: str = DEFAULT_PRECISION) -> list[WeightFile]:
    """The files to download for a variant, one for each role; ValueError for a name that is not one of ours."""
    get_variant(variant)
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}.")
    return [FILES[f"model_{variant}_{precision}"], *(FILES[role] for role in ROLES if role != "model")]


def needs(variant: str, precision: str = DEFAULT_PRECISION) -> list[Need]:
    """What a workflow with this variant needs, and what of it ComfyUI's folders hold.

    A model of another precision counts as present: `precision` only says which one to download.
    """
    files = needed_files(variant, precision)
    held = {folder: list(_held(folder)) for folder in {file.folder for file in files}}
    return [
        Need(file, first_served(held[file.folder], ACCEPTED[variant if file.role == "model" else file.role]),
             partial_bytes(target(file)))
        for file in files
    ]


def _held(folder: str) -> Iterator[str]:
    """Names of all files in a model folder that are big enough, fresh from the disk, whatever they end in."""
    for root in folder_paths.get_folder_paths(folder):
        names, _ = folder_paths.recursive_search(root, [".git"])
        for name in sorted(names):
            try:
                if os.path.getsize(os.path.join(root, name)) >= SMALLEST:
                    yield name
            except OSError:  # a link to a file that is gone
                continue


def get_files(ids: Iterable[str]) -> list[WeightFile]:
    """The files of these ids, each once; ValueError for an id that is not in the table."""
    files = {}
    for id in ids:
        if id not in FILES:
            raise ValueError(f"Unknown file {id!r}: expected ids of this pack's table, such as {next(iter(FILES))}.")
        files[id] = FILES[id]
    return list(files.values())


def target(file: WeightFile) -> Path:
    """Where the file belongs: in the first of ComfyUI's folders for its kind, but not in a folder kept for old names.

    ComfyUI lists `models/unet` before `models/diffusion_models`.
    """
    roots = folder_paths.get_folder_paths(file.folder)
    old = {os.path.join(folder_paths.models_dir, name) for name in ("unet", "clip")}
    return Path(next((root for root in roots if root not in old), roots[0])) / file.name


def partial_path(path: Path, sha256: str) -> Path:
    """Where an unfinished download of `path` is kept; the hash in its name keeps two releases of a file apart."""
    return path.with_name(f".{path.name}.{sha256[:12]}.part")


def partials(path: Path) -> list[Path]:
    """All unfinished downloads of `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.part")
    if not path.parent.is_dir():
        return []
    return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and is_plain(entry)]


def partial_bytes(path: Path) -> int:
    """Size of the largest unfinished download of `path`."""
    return max((entry.stat().st_size for entry in partials(path)), default=0)


def unpinned(files: Iterable[WeightFile]) -> str:
    """What people should know of these files' hashes before they download them; empty if all are pinned."""
    names = [file.name for file in files if file.sha256 is None]
    if not names:
        return ""
    return (f"Checked against the Hub's own hash only, since no other is known to this pack: {', '.join(names)}.")


def restricted(files: Iterable[WeightFile]) -> str:
    """What people should know of these files' licences before they use them; empty if all allow any use."""
    what = [ROLES[file.role] for file in files if file.licence == NON_COMMERCIAL]
    if not what:
        return ""
    return f"For non-commercial use only ({NON_COMMERCIAL}): {', '.join(what)}. Every clip passes through them."


def missing(listed: Iterable[Need]) -> list[WeightFile]:
    """The files to download."""
    return [need.file for need in listed if not need.present]


def bytes_to_fetch(listed: Iterable[Need]) -> int:
    """Bytes still to be downloaded, by the published sizes."""
    return sum(max(0, need.file.size - need.partial) for need in listed if not need.present)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds, or will hold, `path`."""
    return shutil.disk_usage(existing_parent(path)).free


def disk_shortages(wanted: Iterable[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """Disks that cannot take all of `wanted` (path, bytes to write); each as (a folder on it, needed, free)."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for path, size in wanted:
        place = existing_parent(path.parent)
        device = place.stat().st_dev
        needed[device] = needed.get(device, 0) + size
        folders.setdefault(device, place)
    return [(folder, needed[device], free) for device, folder in folders.items()
            if needed[device] > (free := free_bytes(folder))]


def human(size: int) -> str:
    """A size for people, in the decimal units of download pages: 23.3 GB."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}" if size < 100 * step else f"{size / step:.0f} {unit}"
    return f"{size} bytes"
