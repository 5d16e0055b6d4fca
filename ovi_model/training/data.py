"""A folder of clips as examples to train on, in buckets of one size and length.

`make_dataset` encodes what is not in the cache yet (see `encoding`); the `Dataset` it gives knows
where everything lies and reads it when it is drawn. What is random in a draw comes from the
generator it is handed, so that a step is a function of its seed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import comfy.latent_formats
import torch
from torch import Generator, Tensor

from ..files.disk import human
from ..files.names import printable
from ..ovi import prompt
from ..ovi.variants import GEOMETRY
from . import cache
from .clips import Clip, Fault, find_clips
from .encoding import CHANNELS, DataSettings, Encoders, Encoding, Say, Stream
from .objective import Batch, Switches, join_texts

GENERATED = Switches()

SIDE_WITHOUT_PICTURE = 2
"""Latent pixels each way of what stands for the picture of a clip without one: a single token."""

SHOWN_FAULTS = 50
NOTHING = ("There is no mp4, mov, webm, mkv, wav or flac file in it, and no folder of png or jpg "
           "frames")

Bucket = tuple[int, int, int, int]
"""Latent frames, latent height and width, audio latents."""


@dataclass
class Example:
    """A clip, or a piece of a long one."""

    video: Tensor | None  # [48, T, h, w] as the network sees it (normalised)
    audio: Tensor | None  # [20, A]
    text: Tensor  # [n, C]
    audio_text: Tensor | None  # [n, C] for the audio tower, where it is another one
    name: str
    caption: str


@dataclass(frozen=True)
class Item:
    """Where an example lies in the cache."""

    clip: str
    name: str  # of the clip, and which piece of it
    caption: str  # as it was encoded
    video: cache.Place | None
    audio: cache.Place | None
    text: Path
    bucket: Bucket


@dataclass(frozen=True)
class Dataset:
    """Encoded clips. Nothing of them is in memory but their names."""

    items: list[Item]
    empty_text: Path
    settings: DataSettings
    caption_dropout: float = 0.1  # share of draws without their caption
    switches: Switches = GENERATED
    faults: list[Fault] = field(default_factory=list)  # clips that were left out
    notes: list[str] = field(default_factory=list)  # what looks wrong and was used all the same
    encoded: dict[str, int] = field(default_factory=dict)  # by this run, of each kind

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def buckets(self) -> dict[Bucket, list[int]]:
        """Indices of the examples of each size and length."""
        buckets: dict[Bucket, list[int]] = {}
        for index, item in enumerate(self.items):
            buckets.setdefault(item.bucket, []).append(index)
        return buckets

    def example(self, index: int) -> Example:
        """Read one from the cache, in float32."""
        item = self.items[index]
        video = cache.read(item.video) if item.video else None
        if video is not None:
            video = comfy.latent_formats.Wan22().process_in(video[None])[0]
        audio = cache.read(item.audio) if item.audio else None
        return Example(video, audio, cache.read((item.text, 0)), None, item.name, item.caption)

    def draw(self, batch: int, random: Generator, switches: Switches | None = None,
             caption_dropout: float | None = None) -> Batch:
        """A batch out of one bucket; a bucket is as likely as the share of examples it has.

        A bucket that has fewer examples than asked for gives some twice. switches,
        caption_dropout: in place of the dataset's own.
        """
        indices = self._pick(batch, random)
        chosen = [self.example(index) for index in indices]
        frames, height, width, sounds = self.items[indices[0]].bucket
        video = [CHANNELS[0], frames, height, width]
        dropout = self.caption_dropout if caption_dropout is None else caption_dropout
        dropped = torch.rand(batch, generator=random) < dropout
        text, bias = join_texts([cache.read((self.empty_text, 0)) if drop else one.text
                                 for one, drop in zip(chosen, dropped.tolist(), strict=True)])
        seen = torch.tensor([one.video is not None for one in chosen])
        heard = torch.tensor([one.audio is not None for one in chosen])
        masks = (switches or self.switches).draw(batch, frames, random)
        return Batch(
            torch.stack([torch.zeros(video) if one.video is None else one.video for one in chosen]),
            torch.stack([torch.zeros(CHANNELS[1], sounds) if one.audio is None else one.audio
                         for one in chosen]),
            text, bias, *generate_the_missing(*masks, seen, heard),
            None if seen.all() else seen.float(), None if heard.all() else heard.float())

    def _pick(self, batch: int, random: Generator) -> list[int]:
        index = int(torch.randint(len(self.items), (), generator=random))
        bucket = self.buckets[self.items[index].bucket]
        if len(bucket) >= batch:
            order = torch.randperm(len(bucket), generator=random)[:batch]
        else:
            order = torch.randint(len(bucket), (batch,), generator=random)
        return [bucket[i] for i in order.tolist()]

    # what the user is told

    @property
    def lines(self) -> list[str]:
        """What the dataset is."""
        clips = len({item.clip for item in self.items})
        counts = Counter(item.bucket for item in self.items)
        lines = [f"{_count(clips, 'clip')} as {_count(len(self), 'example')}:"]
        lines += [f"  {number} of {describe(bucket)}" for bucket, number in counts.most_common()]
        for stream, number in (("sound", sum(item.audio is None for item in self.items)),
                               ("picture", sum(item.video is None for item in self.items))):
            if number:
                lines.append(f"{_count(number, 'example')} without {stream}: no loss there.")
        made = ", ".join(_count(number, what.removesuffix("s"))
                         for what, number in self.encoded.items() if number)
        lines.append(f"Encoded now: {made}." if made else "Everything was in the cache already.")
        files = {place if isinstance(place, Path) else place[0] for item in self.items
                 for place in (item.video, item.audio, item.text, self.empty_text) if place}
        size = sum(path.stat().st_size for path in files if path.exists())
        return [*lines, f"Cache: {human(size)} in {printable(self.empty_text.parent)}"]

    @property
    def warnings(self) -> list[str]:
        """What was left out and what looks wrong, the first of each."""
        out = [f"Left out: {fault}" for fault in self.faults[:SHOWN_FAULTS]]
        out += self.notes[:SHOWN_FAULTS]
        rest = len(self.faults) + len(self.notes) - len(out)
        return out + [f"... and {rest} more."] * (rest > 0)

    def summary(self) -> str:
        """All of it as a text."""
        return "\n".join([*self.lines, *self.warnings])


def generate_the_missing(video: Tensor, audio: Tensor, seen: Tensor,
                         heard: Tensor) -> tuple[Tensor, Tensor]:
    """Switches [B, ...] for clips of which some lack a stream.

    What a clip lacks is never given, as there is nothing to give, and then the other stream is
    generated: nothing would be learnt otherwise. A first frame may be given all the same.
    """
    nothing_left = ~heard & (video.flatten(1).sum(1) == 0)
    video[~seen | nothing_left] = 1
    audio[~seen | ~heard] = 1
    return video, audio


def describe(bucket: Bucket) -> str:
    """A bucket in pixels, frames and seconds."""
    frames, height, width, _ = bucket
    height, width = GEOMETRY.pixel_hw(height, width)
    size = f"{width}x{height}, " if height > GEOMETRY.pixel_hw(SIDE_WITHOUT_PICTURE, 0)[0] else ""
    return (f"{size}{GEOMETRY.frames_from_latent(frames)} frames "
            f"({GEOMETRY.video_seconds(frames):.2f} s)")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- from a folder --------------------------------------------------------------------------------


def make_dataset(folder: Path, encoders: Encoders, settings: DataSettings,
                 cache_folder: Path | None = None, say: Say = lambda *_: None,
                 caption_dropout: float = 0.1) -> Dataset:
    """Encode the clips of a folder, as far as that was not done before.

    cache_folder: where what is encoded is kept; ComfyUI's by default. say: called as it goes on.
    Broken clips are left out and named in the dataset. Raises ValueError if an encoder is the
    wrong one, or no clip remains; RuntimeError if memory or disk run out.
    """
    encoders.check()
    clips, faults = find_clips(folder)
    run = Encoding(encoders, settings, cache_folder or cache.default_folder(), say, faults)
    clips = run.hash_files(clips)
    pictures = run.pictures(clips)
    sounds = run.sounds(clips, pictures)
    clips = [clip for clip in clips if clip.name in sounds]  # all streams of it
    texts = {clip.name: settings.text(clip) for clip in clips}
    names = {"": "the empty text"} | {text: name for name, text in texts.items()}
    found = run.texts(names) if clips else {}
    items = [item for clip in clips if texts[clip.name] in found
             for item in items_of(clip, texts[clip.name], pictures, sounds[clip.name], found)]
    if not items:
        reasons = "; ".join(map(str, run.faults[:SHOWN_FAULTS])) or NOTHING
        raise ValueError(f"{printable(folder.name)} holds no clip to train on. {reasons}.")
    return Dataset(items, found[""], settings, caption_dropout, faults=run.faults,
                   notes=run.notes + tag_notes(texts), encoded=run.encoded)


def items_of(clip: Clip, text: str, pictures: dict[str, Stream], sound: Stream,
             texts: dict[str, Path]) -> list[Item]:
    """The examples of a clip: one for each piece."""
    picture = pictures.get(clip.name)
    pieces = len(picture.shapes if picture else sound.shapes)
    items = []
    for index in range(pieces):
        if picture:
            frames, height, width = picture.shapes[index][1:]
        else:
            height = width = SIDE_WITHOUT_PICTURE
            frames = latent_frames_for(sound.shapes[index][1])
        items.append(Item(
            clip.name, f"{clip.name} #{index + 1}" if pieces > 1 else clip.name, text,
            (picture.path, index) if picture else None,
            (sound.path, index) if sound.shapes else None,
            texts[text], (frames, height, width, GEOMETRY.audio_latents_for(frames))))
    return items


def latent_frames_for(audio_latents: int) -> int:
    """The latent frames that so many audio latents belong to."""
    frames = 1
    while GEOMETRY.audio_latents_for(frames) < audio_latents:
        frames += 1
    return frames


def tag_notes(texts: dict[str, str]) -> list[str]:
    """What looks wrong in captions, a line for each kind of mistake."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        for warning in prompt.check_tags(text):
            names.setdefault(warning, []).append(name)
    return [f"{printable(found[0])}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {warning}"
            for warning, found in names.items()]
