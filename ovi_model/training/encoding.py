"""Encodes the clips of a folder into the cache: all pictures, then all sounds, then all texts.

In that order each encoder is loaded once, where clip by clip a small GPU would change models three
times a clip. What is in the cache already is not encoded again. A broken clip is named and left
out; a run that is cancelled keeps the streams it has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.sd
from torch import Tensor

from ..files.names import printable
from ..media import audio_vae
from ..ovi import prompt
from ..ovi.variants import DEFAULT_VARIANT, GEOMETRY, get_variant
from ..text import umt5
from . import cache
from .clips import Clip, Fault
from .reading import (
    LEAST_FRAMES,
    BrokenClip,
    cut_sound,
    read_pieces,
    read_sound,
    reading,
    whole_length,
)

Say = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and of how many."""

KINDS = "pictures", "sounds", "texts"
CHANNELS = GEOMETRY.video.channels, GEOMETRY.audio.channels
SMALLEST, LARGEST = GEOMETRY.size_multiple, 2048  # side of a square of the same area, in pixels
LONGEST = 60.0  # seconds


@dataclass(frozen=True)
class DataSettings:
    """What clips are made into."""

    variant: str = DEFAULT_VARIANT
    size: int = 0  # side in pixels of a square of the area they get; 0: the variant's
    longest_seconds: float = 0.0  # longer ones are cut into several; 0: the variant's length
    prefix: str = ""  # put before each caption

    def __post_init__(self) -> None:
        get_variant(self.variant)
        if self.size and not SMALLEST <= self.size <= LARGEST:
            raise ValueError(f"size goes from {SMALLEST} to {LARGEST} pixels, or is 0 for the "
                             f"variant's; got {self.size}.")
        if self.longest_seconds and not 0.3 <= self.longest_seconds <= LONGEST:
            raise ValueError(f"longest_seconds goes from 0.3 to {LONGEST:g}, or is 0 for the "
                             f"variant's length; got {self.longest_seconds}.")

    @property
    def area(self) -> int:
        return self.size**2 or get_variant(self.variant).area

    @property
    def longest(self) -> int:
        """Frames of a piece at most."""
        if not self.longest_seconds:
            return get_variant(self.variant).frames
        return GEOMETRY.frames_from_seconds(self.longest_seconds)

    def text(self, clip: Clip) -> str:
        """What the text encoder reads for a clip."""
        return prompt.assemble(f"{self.prefix.strip()} {clip.caption}".strip(), "",
                               get_variant(self.variant))


@dataclass(frozen=True)
class Encoders:
    """The product's own, as its loader nodes give them."""

    vae: comfy.sd.VAE
    audio_vae: comfy.sd.VAE
    clip: comfy.sd.CLIP

    def check(self) -> None:
        """Raise ValueError unless each is what it should be."""
        if self.vae.latent_channels != CHANNELS[0]:
            raise ValueError(f"The video VAE has {self.vae.latent_channels} latent channels, but "
                             f"Ovi needs the Wan2.2 VAE with {CHANNELS[0]}.")
        audio_vae.check_audio_vae(self.audio_vae)
        umt5.tokenize(self.clip, "")


@dataclass(frozen=True)
class Stream:
    """A clip's picture or sound in the cache, one shape for each piece; none for no sound."""

    path: Path
    shapes: list[tuple[int, ...]]


@dataclass
class Encoding:
    """One run over the clips of a folder."""

    encoders: Encoders
    settings: DataSettings
    folder: Path  # of the cache
    say: Say = lambda *_: None
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    encoded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    hashes: dict[str, tuple[str, str]] = field(default_factory=dict)  # picture's, sound's

    def hash_files(self, clips: list[Clip]) -> list[Clip]:
        """Know what is in every file; the clips whose files can be read."""
        return [clip for clip in self._one_by_one("reading files", clips)
                if self._try(clip, self._hash)]

    def _hash(self, clip: Clip) -> bool:
        with reading(clip.video or clip.sound or clip.frames[0]):
            picture = cache.content_hash([clip.video] if clip.video else clip.frames)
            sound = cache.content_hash([clip.sound]) if clip.sound else ""
        self.hashes[clip.name] = picture, sound
        return True

    # pictures

    def pictures(self, clips: list[Clip]) -> dict[str, Stream]:
        """The pictures of clips by name; of those without, none."""
        weights, s = cache.fingerprint(self.encoders.vae.patcher), self.settings
        paths = {clip.name: cache.entry_path(
                    self.folder, "video", weights=weights, area=s.area, longest=s.longest,
                    source=self.hashes[clip.name][0], files=len(clip.frames))
                 for clip in clips if clip.has_picture}
        like = (CHANNELS[0], None, None, None)
        found = {name: Stream(path, shapes) for name, path in paths.items()
                 if (shapes := self._kept(name, path, like))}
        missing = [clip for clip in clips if clip.name in paths and clip.name not in found]
        for clip in self._one_by_one("encoding pictures", missing):
            pieces = self._try(clip, self._encode_pictures)
            if pieces:
                found[clip.name] = self._keep(clip, paths[clip.name], pieces, "pictures")
        return found

    def _encode_pictures(self, clip: Clip) -> list[Tensor]:
        s, latents = self.settings, []
        for piece in read_pieces(clip, GEOMETRY, s.area, s.longest):
            comfy.model_management.throw_exception_if_processing_interrupted()
            latents.append(self.encoders.vae.encode(piece.float() / 255)[0].half().cpu())
        return latents

    # sounds

    def sounds(self, clips: list[Clip], pictures: dict[str, Stream]) -> dict[str, Stream]:
        """The sounds of clips by name, as long as the pieces of their pictures."""
        weights = cache.fingerprint(self.encoders.audio_vae.patcher)
        clips = [clip for clip in clips if clip.name in pictures or not clip.has_picture]
        paths, found = {}, {}
        for clip in clips:
            source, sound = self.hashes[clip.name]
            path = paths[clip.name] = cache.entry_path(
                self.folder, "audio", weights=weights, longest=self.settings.longest,
                source=source, sound=sound,
                pieces=str([shape[1] for shape in pictures[clip.name].shapes]
                           if clip.has_picture else []))
            shapes = self._kept(clip.name, path, (CHANNELS[1], None))
            if shapes is not None:
                found[clip.name] = Stream(path, shapes)
        missing = [clip for clip in clips if clip.name not in found]
        for clip in self._one_by_one("encoding sounds", missing):
            picture = pictures.get(clip.name)
            pieces = self._try(clip, partial(self._encode_sound, picture))
            if pieces is not None:
                found[clip.name] = self._keep(clip, paths[clip.name], pieces, "sounds")
        return found

    def _encode_sound(self, picture: Stream | None, clip: Clip) -> list[Tensor]:
        sound = read_sound(clip, GEOMETRY.audio.sample_rate)
        if sound is None:
            return []
        lengths = ([GEOMETRY.frames_from_latent(shape[1]) for shape in picture.shapes]
                   if picture else sound_lengths(len(sound), self.settings.longest))
        latents = []
        for index, frames in enumerate(lengths):
            comfy.model_management.throw_exception_if_processing_interrupted()
            waveform = cut_sound(sound, frames, index, GEOMETRY)[None]
            latents.append(audio_vae.encode_mean(self.encoders.audio_vae, waveform)[0])
        return latents

    # texts

    def texts(self, texts: dict[str, str]) -> dict[str, Path]:
        """The embedding of each text, given with what it is called in a note."""
        weights = cache.fingerprint(self.encoders.clip.patcher)
        paths = {text: cache.entry_path(self.folder, "text", weights=weights, text=text)
                 for text in texts}
        found = {text: path for text, path in paths.items()
                 if self._kept(texts[text], path, (None, None))}
        missing = [Clip(name, text) for text, name in texts.items() if text not in found]
        for clip in self._one_by_one("encoding texts", missing):
            embedding = self._try(clip, self._encode_text)
            if embedding is not None:
                kept = self._keep(clip, paths[clip.caption], [embedding], "texts")
                found[clip.caption] = kept.path
        return found

    def _encode_text(self, clip: Clip) -> Tensor:
        try:
            conditioning, info = umt5.encode_conditioning(self.encoders.clip, clip.caption)
        except ValueError as error:
            raise BrokenClip(str(error)) from error
        if len(conditioning) != 1:
            raise BrokenClip("hooks on the CLIP change with the steps of sampling, which training "
                             "has none of: connect a CLIP without them")
        if info.cut_tokens:
            tokens = info.tokens + info.cut_tokens
            self.notes.append(f"{printable(clip.name)}: its caption has {tokens} tokens, "
                              f"{umt5.MAX_TOKENS} are read")
        return conditioning[0][0][0]

    # what the three share

    def _one_by_one(self, what: str, clips: list[Clip]) -> Iterator[Clip]:
        for index, clip in enumerate(clips):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.say(what, index, len(clips))
            yield clip
        if clips:
            self.say(what, len(clips), len(clips))

    def _try(self, clip: Clip, function):
        """What a function makes of a clip; None, and a fault noted, if the clip is broken."""
        try:
            with memory_advice(clip):
                return function(clip)
        except BrokenClip as error:
            self.faults.append(Fault(clip.name, str(error)))
            return None

    def _kept(self, name: str, path: Path,
              like: tuple[int | None, ...]) -> list[tuple[int, ...]] | None:
        """Shapes in the cache's file, None if it has to be made."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            return cache.check(path, like)
        except cache.Damaged as error:
            self.notes.append(f"{printable(name)}: {path.name} of the cache was damaged ({error}) "
                              "and was made again")
            return None

    def _keep(self, clip: Clip, path: Path, pieces: list[Tensor], what: str) -> Stream:
        cache.write(path, pieces, clip.name)
        self.encoded[what] += bool(pieces)
        return Stream(path, [tuple(piece.shape) for piece in pieces])


def sound_lengths(samples: int, longest: int) -> list[int]:
    """Frames of the pieces that a sound without picture is cut into, as pictures are."""
    frames = int(samples * GEOMETRY.fps / GEOMETRY.audio.sample_rate + 0.1)
    if frames < LEAST_FRAMES:
        raise BrokenClip(f"it lasts {samples / GEOMETRY.audio.sample_rate:.2f} s, and at least "
                         f"{LEAST_FRAMES / GEOMETRY.fps:.2f} s are needed")
    return [longest] * (frames // longest) or [whole_length(frames, GEOMETRY)]


@contextmanager
def memory_advice(clip: Clip):
    """Say what to lower when memory runs out."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise RuntimeError(f"Memory ran out while {printable(clip.name)} was encoded. Lower size "
                           "or longest_seconds; what was encoded so far is kept.") from error
