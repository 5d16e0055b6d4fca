"""From one or two checkpoint files to one or two others, a layer at a time.

Twice over the layers: first with zeros of the same shapes, which tells the output's header and size before anything is
written, then with the weights. Both passes run the same functions, so they cannot disagree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ovi_native.ovi_model.files import quantise
from ovi_native.ovi_model.files.disk import human, put_in_place, remove_leftovers, shortages
from ovi_native.ovi_model.files.safetensors_file import Spec, StreamedFile, spec_of
from ovi_native.ovi_model.ovi import checkpoint, quant_recipe
from ovi_native.ovi_model.ovi.layouts import AUDIO_PREFIX, VIDEO_PREFIX
from ovi_native.ovi_model.ovi.variants import VARIANT_KEY, get_variant

from .source import Digest, Source

TARGETS = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8_e4m3fn": quant_recipe.PLAIN_FP8,
           **quant_recipe.FORMATS}
NO_DIGEST = "0" * 64  # holds the place of a digest not known yet: metadata must not change length
_TABLE = re.compile(r"(blocks\.\d+\.)modulation$")


@dataclass(frozen=True)
class Job:
    """What to make of which files."""

    inputs: tuple[str, ...]
    output: Path
    layout: str = "core"
    dtype: str = "keep"
    variant: str | None = None
    force: bool = False
    device: torch.device | None = None


@dataclass(frozen=True)
class Outcome:
    """What was written."""

    files: tuple[Path, ...]
    report: checkpoint.CheckpointReport
    bytes: int
    quantised: int


def convert(job: Job, say: Callable[[str], None]) -> Outcome:
    """Convert; returns the Outcome.

    Raises ValueError for what was asked, RuntimeError for what the files hold, OSError for what the disk says; no file
    is left under the output's name then, and one that was there stays as it was.
    """
    if job.variant is not None:
        get_variant(job.variant)
    paths = output_paths(job)
    sources, report = open_sources(job)
    say(str(report))
    target = TARGETS[job.dtype]
    if isinstance(target, quantise.Format):
        target = target.for_blocks(report.blocks)
    specs, quantised = plan(sources, job, target)
    digests = [Digest(source.path) for source in sources]
    metadata = describe(job, sources, report, [NO_DIGEST] * len(sources))
    publish = os.replace if job.force else publish_new
    files = [StreamedFile(path, part, metadata, publish) for path, part in zip(paths, specs, strict=True)]
    size = sum(file.size for file in files)
    for path in paths:
        remove_leftovers(path)
    check_disk(paths[0].parent, size)
    for digest in digests:
        digest.start()
    with contextlib.ExitStack() as open_files:
        for file in files:
            open_files.enter_context(file)
        write(sources, files, job, target, progress(sum(source.nbytes for source in sources), say))
        metadata = describe(job, sources, report, [digest.result() for digest in digests])
        for file in files:
            file.metadata = metadata
    return Outcome(paths, report, size, quantised)


def output_paths(job: Job) -> tuple[Path, ...]:
    """The files to write; ValueError if one is in the way or the name will not do."""
    path = job.output
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} does not end in .safetensors, the only kind of file this tool writes.")
    paths: tuple[Path, ...] = (path,)
    if job.layout == "split":
        video = path if "video" in path.name else path.with_name(f"{path.stem}_video.safetensors")
        paths = video, video.with_name(video.name.replace("video", "audio"))
    taken = next((p for p in paths if p.exists()), None)
    if taken is not None and (taken.is_dir() or not job.force):
        raise ValueError(f"{taken} is there already; add --force to replace it, or give another name.")
    return paths


def publish_new(finished: Path, target: Path) -> None:
    """Give a finished file its name; ValueError if another program has taken it meanwhile."""
    try:
        put_in_place(finished, target)
    except FileExistsError:
        raise ValueError(f"{target} has appeared during the conversion and is not replaced: move it away, or add "
                         "--force, and convert again.") from None


def open_sources(job: Job) -> tuple[list[Source], checkpoint.CheckpointReport]:
    """The input files and what they are together, by the loader's own rules."""
    if len(job.inputs) > 2:
        raise ValueError(f"{len(job.inputs)} input files given: give one joint file, or a video and an audio file.")
    sources: list[Source] = []

    def look(path: str) -> checkpoint.Part:
        sources.append(Source(path))
        return sources[-1].part

    second = job.inputs[1] if len(job.inputs) == 2 else None
    _, report = checkpoint.read_checkpoint(job.inputs[0], second, job.variant, look)
    return sources, report


def place(key: str, layout: str) -> tuple[int, str]:
    """Which output file a core-layout key goes to, and its name there."""
    if layout == "core":
        return 0, key
    name = _TABLE.sub(r"\1modulation.modulation", key)
    audio = name.startswith(AUDIO_PREFIX)
    if layout == "split":
        return int(audio), name
    return 0, name if audio else VIDEO_PREFIX + name


def plan(sources: list[Source], job: Job, target) -> tuple[list[dict[str, Spec]], int]:
    """Rehearse on zeros: (the tensors of each output file, how many layers end up quantised)."""
    files: list[dict[str, Spec]] = [{} for _ in range(2 if job.layout == "split" else 1)]
    known: dict[tuple, dict[str, Spec]] = {}
    quantised = 0
    for source in sources:
        for core in source.rehearse():
            for layer, zeros in quantise.by_layer(core).items():
                alike = likeness(layer, zeros, target)
                if alike not in known:
                    known[alike] = {key.removeprefix(layer): spec_of(tensor)
                                    for key, tensor in converted({layer: zeros}, target, job.device).items()}
                quantised += any(spec.dtype.itemsize == 1 for leaf, spec in known[alike].items() if leaf == ".weight")
                for leaf, spec in known[alike].items():
                    at, name = place(layer + leaf, job.layout)
                    files[at][name] = spec
    return files, quantised


def likeness(layer: str, tensors: dict[str, torch.Tensor], target) -> tuple:
    """What decides, beside the weights themselves, what a layer becomes: equal for layers of one kind."""
    weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
    record = tensors.get(f"{layer}.comfy_quant")
    return (isinstance(target, quantise.Format) and target.wants(layer, weight),
            tuple((key.removeprefix(layer), tensor.dtype, tensor.shape) for key, tensor in tensors.items()),
            None if record is None else bytes(record.tolist()),
            scale is not None and scale.is_floating_point() and bool((scale.float() == 1).all()))


def converted(layers: dict[str, dict[str, torch.Tensor]], target, device) -> dict[str, torch.Tensor]:
    """A few layers' tensors in the target's precision, as files hold them."""
    out: dict[str, torch.Tensor] = {}
    for layer, tensors in layers.items():
        out |= quantise.convert_layer(layer, tensors, target, device or "cpu")
    return {key: quantise.storable(tensor) for key, tensor in out.items()}


def write(sources: list[Source], files: list[StreamedFile], job: Job, target, done: Callable[[int], None]) -> None:
    """The second pass: read, convert and write every layer."""
    def put(core: dict[str, torch.Tensor]) -> None:  # a function, so that nothing outlives its layer
        for key, tensor in converted(quantise.by_layer(core), target, job.device).items():
            at, name = place(key, job.layout)
            files[at].write(name, tensor)

    for source in sources:
        for core in source.read(done):
            put(core)
            del core


def describe(job: Job, sources: list[Source], report: checkpoint.CheckpointReport,
             digests: list[str]) -> dict[str, str]:
    """The output's metadata: where it comes from and how it was made."""
    target = TARGETS[job.dtype]
    recipe: dict[str, object] = {"dtype": job.dtype, "layout": job.layout}
    if isinstance(target, quantise.Format):
        sized = target.for_blocks(report.blocks)
        recipe |= {"layers": quant_recipe.BLOCK_MATRICES.pattern, "first_block": sized.first_block,
                   "others": "bfloat16", "record": sized.record if sized.recorded else None}
    origin = [{"name": source.name, "sha256": digest} for source, digest in zip(sources, digests, strict=True)]
    return {"format": "pt", **({VARIANT_KEY: report.variant} if report.variant else {}),
            "ovi_source": json.dumps(origin), "ovi_recipe": json.dumps(recipe), "ovi_tool": f"ovi-native {version()}"}


def version() -> str:
    """The pack's version."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else "unknown"


def check_disk(folder: Path, size: int) -> None:
    """OSError, before anything is written, if the folder's disk has not that many bytes left."""
    for place, needed, free in shortages([(folder / "result", size)]):
        raise OSError(f"{place} has {human(free)} free, but the result takes {human(needed)}: free some space, or "
                      "write to another disk.")


def progress(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """A function to be told of bytes done, which says a line every tenth of a large file."""
    done = said = 0

    def step(count: int) -> None:
        nonlocal done, said
        done += count
        if total > 1e9 and done * 10 // total > said:
            said = done * 10 // total
            say(f"{said * 10:3d} %  {human(done)} of {human(total)}")

    return step
