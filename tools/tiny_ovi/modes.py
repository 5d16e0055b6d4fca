"""What the trained tiny Ovi does in each way of using it, as tables for `train_tiny.py evaluate`.

Every column of a table is sampled from the same scenes with the same noise, so that columns differ in the way alone.
In brackets is chance: the same clips with each other's sound, caption or first frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.scenes import Scene, draw_scene

from .evaluate import Models, Way, generate, read_clip
from .given import encoded, given_first_frame, given_stream, rendered, replacing, with_own_clock
from .pool import LONG
from .scores import HEARD, SEEN, Clip, Scores, scores, table

KINDS = {"ball": "one ball", "pair": "ball and square", "face": "face"}
Columns = dict[str, Scores]


def draw(count: int, seed: int, held_out: bool = True) -> list[Scene]:
    """As many scenes of each kind; held out ones, or of captions that training saw."""
    random = np.random.default_rng(seed)
    return [draw_scene(random, LONG.seconds, held_out, kind) for kind in KINDS for _ in range(count // len(KINDS))]


def kind_of(clip: Clip) -> str:
    """What the clip's caption asks for, by its name in tables."""
    return KINDS["face" if " hat" in clip.caption else "pair" if "square" in clip.caption else "ball"]


def by_kind(figures: Callable[..., Scores], *sets: list[Clip]) -> Scores:
    """The figures of each kind of clip, its name before theirs; of several sets, those clips that belong together."""
    found: Scores = {}
    for kind in KINDS.values():
        members = [i for i, clip in enumerate(sets[0]) if kind_of(clip) == kind]
        of_kind = figures(*([clips[i] for i in members] for clips in sets))
        found |= {f"{kind}: {name}": value for name, value in of_kind.items()}
    return found


@dataclass(frozen=True)
class Evaluation:
    """Scenes and noise that all columns share."""

    models: Models
    folder: Path  # of the mp4 files
    count: int  # of clips in a column
    seed: int
    way: Way

    @cached_property
    def scenes(self) -> list[Scene]:
        return draw(self.count, self.seed)

    @cached_property
    def own(self) -> list[Clip]:
        """The renderer's clips of the scenes."""
        return [rendered(scene) for scene in self.scenes]

    @cached_property
    def plain(self) -> list[Clip]:
        """Nothing given, nothing changed."""
        return self.sample("plain")

    def sample(self, name: str, texts: list[str] | None = None, model=None, latents=None, **way) -> list[Clip]:
        """A column; way: what is set otherwise."""
        texts = texts or [caption(scene) for scene in self.scenes]
        return list(generate(self.models, texts, self.folder / name, replace(self.way, **way), LONG.seconds, self.seed,
                             model, latents))


def words(run: Evaluation) -> Columns:
    """Captions that training never saw, and captions that it saw; with new noise both."""
    seen = run.sample("seen", [caption(scene) for scene in draw(run.count, run.seed, held_out=False)])
    return {"held-out captions": by_kind(scores, run.plain), "captions of the training": by_kind(scores, seen)}


def guidance(run: Evaluation) -> Columns:
    """Both streams alike."""
    columns = {}
    for scale in (1.0, 2.5, 4.0):
        same = run.way.video_guidance == run.way.audio_guidance == scale
        clips = run.plain if same else run.sample(f"guidance{scale:g}", video_guidance=scale, audio_guidance=scale)
        columns[f"guidance {scale:g}"] = by_kind(scores, clips)
    return columns


def skip(run: Evaluation) -> Columns:
    """The block that the negative pass leaves out."""
    blocks = range(len(run.models.model.model.diffusion_model.blocks))
    return {"no block": by_kind(scores, run.plain),
            **{f"block {block}": by_kind(scores, run.sample(f"skip{block}", skip_layer=block)) for block in blocks}}


def rotary(run: Evaluation) -> Columns:
    """The audio tower's positions on the video's clock, and counted by themselves."""
    own = run.sample("rotary", model=with_own_clock(run.models.model))
    return {"scale as trained": by_kind(scores, run.plain), "scale 1": by_kind(scores, own)}


def first_frame(run: Evaluation) -> Columns:
    """The renderer's first frame given, with caption and without; beside it the renderer's whole clip through both
    codecs into an mp4, which bounds what can be kept."""
    def sample(name: str, texts: list[str] | None = None) -> list[Clip]:
        return run.sample(name, texts, latents=(given_first_frame(run.models, clip) for clip in run.own))

    alone = sample("first_frame_alone", [""] * len(run.own))
    alone = [replace(clip, caption=own.caption) for clip, own in zip(alone, run.own, strict=True)]  # to be judged by
    return {name: by_kind(going_on, run.own, clips) for name, clips in (
        ("frame and caption", sample("first_frame")), ("frame alone", alone), ("renderer's, coded", coded(run)))}


def given_sound(run: Evaluation) -> Columns:
    """The renderer's sound given, its picture asked for; measured against the very sound."""
    return given(run, "sound", "samples", SEEN)


def given_picture(run: Evaluation) -> Columns:
    """The renderer's picture given, its sound asked for; measured against the very picture."""
    return given(run, "picture", "frames", HEARD)


def given(run: Evaluation, stream: str, part: str, names: tuple[str, ...]) -> Columns:
    """At timestep 0 as trained, and at the other stream's noise level instead."""
    columns = {"nothing given": by_kind(partial(only, names), run.plain)}
    for name, model in (("given", None), ("replaced", replacing(run.models.model, run.seed))):
        latents = (given_stream(run.models, clip, stream) for clip in run.own)
        made = run.sample(f"{stream}_{name}", model=model, latents=latents)
        clips = [replace(clip, **{part: getattr(own, part)}) for clip, own in zip(made, run.own, strict=True)]
        columns[name] = by_kind(partial(only, names), clips)
    return columns


MODES: dict[str, Callable[[Evaluation], Columns]] = {
    "words": words, "guidance": guidance, "skip": skip, "rotary": rotary, "first_frame": first_frame,
    "given_sound": given_sound, "given_picture": given_picture}


def report(run: Evaluation, mode: str) -> str:
    """Markdown: what was sampled, and the table of a mode."""
    return (f"### {mode}\n\n{len(run.scenes)} clips of 5 s a column, {run.count // len(KINDS)} of each kind; scenes of "
            f"seed {run.seed}, noise from seed {run.seed} on; {run.way.steps} steps of {run.way.solver}, guidance "
            f"{run.way.video_guidance:g}.\n\n{table(MODES[mode](run))}\n")


# --- figures of some modes --------------------------------------------------------------------------------------------


def only(names: tuple[str, ...], clips: list[Clip]) -> Scores:
    """All figures but those of what captions ask of the other stream."""
    return {name: value for name, value in scores(clips).items() if name not in {*SEEN, *HEARD} - {*names}}


def coded(run: Evaluation) -> list[Clip]:
    """The renderer's clips through both codecs into mp4 files."""
    clips = []
    for number, own in enumerate(run.own):
        path = run.folder / f"coded{number:03}.mp4"
        run.models.decode(encoded(run.models, own), path)
        clips.append(read_clip(path, own.caption))
    return clips


def going_on(own: list[Clip], clips: list[Clip]) -> Scores:
    """How clips begin that were given the first frame of the renderer's own, and what is seen in them.

    Frame 0 against it, in dB; and how far frame 1 is from frame 0, as a share of the mean step in the following eight.
    """
    starts = [clip.frames[0] for clip in own]
    steps = [rms(clip.frames[1 + i], clip.frames[2 + i]) for clip in clips for i in range(8)]

    def decibels(shift: int) -> float:
        shifted = starts[shift:] + starts[:shift]
        return float(np.mean([20 * np.log10(255 / rms(clip.frames[0], start))
                              for clip, start in zip(clips, shifted, strict=True)]))

    def jump(shift: int) -> float:
        firsts = clips[shift:] + clips[:shift]
        return float(np.mean([rms(first.frames[0], clip.frames[1]) for clip, first in zip(clips, firsts, strict=True)])
                     / np.mean(steps))

    return {"frame 0, dB": (decibels(0), decibels(1)), "step after frame 0": (jump(0), jump(1)), **only(SEEN, clips)}


def rms(one: np.ndarray, other: np.ndarray) -> float:
    """Of the difference, at least a thousandth of a level."""
    return max(1e-3, float(np.sqrt(np.mean((one.astype(float) - other) ** 2))))
