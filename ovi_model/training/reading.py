"""Frames and sound of a clip as training wants them: 24 frames a second, one size, mono at 16 kHz.

A clip is read as a stream: of a long one, no more than a piece is in memory. A file is opened as
what its ending says and as nothing else, because some formats make FFmpeg open further files or
addresses. Both streams are placed by the file's own times, from the first picture on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image, ImageOps

from ..files.names import first_line, printable
from ..geometry import Geometry
from ..media import images
from .clips import SOUND_FORMATS, VIDEO_FORMATS, Clip

FORMATS = VIDEO_FORMATS | SOUND_FORMATS
LEAST_FRAMES = 5  # two latent frames
LEAST_RATE = 8  # frames a second; below it is a slide show
LONGEST_STILL = 2.0  # seconds between two frames
MISSING = 0.5  # seconds by which a stream may be shorter than its file says
EARLY = 0.1  # frames that one may come before its time: containers round times
LATEST = 600.0  # seconds from the first picture to the first sound
UNKNOWN_SIZE = 0xFFFFFF00
SLACK = 1024  # bytes of a wav that programs miscount by
WIDEST = 8  # long side to short side

Picture = Callable[[], np.ndarray]  # [H, W, 3] uint8


class BrokenClip(ValueError):
    """A clip that cannot be trained on, with the reason."""


@contextmanager
def reading(path: Path):
    """Whatever a file's reader stumbles over becomes a reason to leave the clip out."""
    try:
        yield
    except BrokenClip:
        raise
    except (av.FFmpegError, OSError, ValueError, SyntaxError,
            Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BrokenClip(f"{printable(path.name)} cannot be read ({reason}): it is damaged, or "
                         "something else under this name") from error


@contextmanager
def opened(path: Path):
    """The file for decoding."""
    with reading(path), path.open("rb") as file, av.open(
            file, format=FORMATS[path.suffix.lower()], metadata_errors="replace") as container:
        yield container


def check_whole(stream, end: float) -> None:
    """Raise BrokenClip if a stream ended before the length that its file states."""
    stated = stated_seconds(stream)
    if stated is not None and stated - end > MISSING:
        kind = "picture" if stream.type == "video" else "sound"
        raise BrokenClip(f"its {kind} ends after {max(0.0, end):.1f} of {stated:.1f} s: the file "
                         "is cut short")


def stated_seconds(stream) -> float | None:
    """When a stream ends by its file's own word, if it says."""
    start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    if stream.duration:
        return start + float(stream.duration * stream.time_base)
    try:  # matroska writes it as a text
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


# --- picture --------------------------------------------------------------------------------------


def read_pieces(clip: Clip, geometry: Geometry, area: int, longest: int) -> Iterator[torch.Tensor]:
    """The picture as pieces [n, H, W, 3] uint8 one after another, all of one size near `area`.

    n is `longest` (of the form 4n+1); what is left over at the end is dropped. A clip that is
    shorter is one piece of its own length, cut to 4n+1. Raises BrokenClip with the reason, for a
    file that is cut short after its last piece only.
    """
    piece: list[torch.Tensor] = []
    whole, size = False, None
    timed = video_pictures(clip.video) if clip.video else frame_pictures(clip.frames, geometry.fps)
    for picture in at_rate(timed, geometry.fps):
        pixels = picture()
        size = size or target_size(pixels, geometry, area)
        if pixels.shape[:2] != size[0]:
            raise BrokenClip(f"its size changes from {_shown(size[0])} to {_shown(pixels.shape)} "
                             "pixels")
        piece.append(fit_size(pixels, size[1]))
        if len(piece) == longest:
            yield torch.stack(piece)
            piece, whole = [], True
    if whole:
        return
    if len(piece) < LEAST_FRAMES:
        raise BrokenClip(f"it has {len(piece)} frames at {geometry.fps} a second, and at least "
                         f"{LEAST_FRAMES} are needed")
    yield torch.stack(piece[:whole_length(len(piece), geometry)])


def whole_length(frames: int, geometry: Geometry) -> int:
    """The longest 4n+1 in so many frames."""
    stride = geometry.video.temporal_stride
    return (frames - 1) // stride * stride + 1


def target_size(pixels: np.ndarray, geometry: Geometry, area: int) -> tuple:
    """(height and width as they are, as they are to be)."""
    height, width = pixels.shape[:2]
    if max(height, width) > WIDEST * min(height, width):
        raise BrokenClip(f"its picture of {_shown(pixels.shape)} pixels is longer than {WIDEST}:1")
    return (height, width), geometry.image_target_hw(height, width, area)


def fit_size(pixels: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """[H, W, 3] uint8 scaled to cover a size, its middle kept."""
    frame = images.to_frame(torch.from_numpy(np.ascontiguousarray(pixels))[None].float() / 255)
    image = images.to_image(images.center_crop(frame, *size))[0]
    return (image * 255).round_().clamp_(0, 255).to(torch.uint8)


def at_rate(timed: Iterator[tuple[float, Picture]], fps: int) -> Iterator[Picture]:
    """Pictures at times k / fps after the first: at each what a player shows then."""
    held, made, first, time, interval, count = None, 0, 0.0, 0.0, 0.0, 0
    for seconds, picture in timed:
        if held is None:
            first = seconds
        elif seconds - time > LONGEST_STILL:
            raise BrokenClip(f"no frame comes between {time:.1f} and {seconds:.1f} s: its times "
                             "are wrong, or it is a slide show")
        while held is not None and made < math.ceil((seconds - first) * fps - EARLY):
            yield held
            made += 1
        interval = seconds - time if count else 1 / fps
        held, time, count = picture, seconds, count + 1
    if held is None:
        raise BrokenClip("it has no frames")
    length = time + interval - first
    if count / max(length, 1e-6) < LEAST_RATE and count > 1:
        raise BrokenClip(f"it has {count / length:.1f} frames a second, and at least {LEAST_RATE} "
                         "are needed")
    for _ in range(made, max(1, math.floor(length * fps + 0.5))):
        yield held


def video_pictures(path: Path) -> Iterator[tuple[float, Picture]]:
    """Each frame of a video with its time in seconds.

    Without threads for frames: where somebody switched PyAV's logging on, they and a reader that
    stops midway wait for each other for ever.
    """
    with opened(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise BrokenClip("it has no picture; for sound alone, save it as .wav or .flac")
        end = 0.0
        for frame in container.decode(stream):
            if frame.time is None:
                raise BrokenClip("its frames have no times")
            end = frame.time + float((frame.duration or 0) * (frame.time_base or 0))
            yield frame.time, partial(rgb, path, frame)
        check_whole(stream, end)


def video_stream(container):
    """The moving picture of a file; None if there is none. A cover is none."""
    return next((stream for stream in container.streams.video
                 if not stream.disposition & Disposition.attached_pic), None)


def rgb(path: Path, frame) -> np.ndarray:
    """[H, W, 3] uint8 of a decoded frame, turned as the file says."""
    with reading(path):
        return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def frame_pictures(paths: tuple[Path, ...], fps: int) -> Iterator[tuple[float, Picture]]:
    """Each picture file with its time in seconds."""
    for index, path in enumerate(paths):
        yield index / fps, partial(read_picture, path)


def read_picture(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 of a picture file, without alpha."""
    with reading(path), Image.open(path, formats=("PNG", "JPEG")) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _shown(shape) -> str:
    return f"{shape[1]}x{shape[0]}"


# --- sound ----------------------------------------------------------------------------------------


def read_sound(clip: Clip, rate: int) -> torch.Tensor | None:
    """[N] float32, all of a clip's sound from its first picture on; None if it has none."""
    path = clip.sound or clip.video
    if path is None:
        return None
    check_wav(path)
    with opened(path) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None and clip.sound is None:
            return None
        if stream is None:
            raise BrokenClip(f"there is no sound in {printable(path.name)}")
        chunks, begin = decode_sound(container, stream, rate)
    if not chunks:
        raise BrokenClip(f"the sound of {printable(path.name)} has no samples")
    sound = torch.from_numpy(np.concatenate(chunks))
    if not torch.isfinite(sound).all():
        raise BrokenClip(f"the sound of {printable(path.name)} holds values that are not finite")
    if clip.sound is not None:
        return sound
    late = begin - first_picture(path)
    if late > LATEST:
        raise BrokenClip(f"its sound begins {late:.0f} s after its picture")
    late_samples = round(late * rate)
    return torch.nn.functional.pad(sound[max(0, -late_samples):], (max(0, late_samples), 0))


def check_wav(path: Path) -> None:
    """Raise BrokenClip if a wav is shorter than it says, which FFmpeg takes for its end."""
    if path.suffix.lower() == ".wav":
        with reading(path), path.open("rb") as file:
            head, size = file.read(8), path.stat().st_size
        stated = int.from_bytes(head[4:], "little") + 8
        unknown = stated > UNKNOWN_SIZE  # written to a pipe
        if head[:4] == b"RIFF" and not unknown and size + SLACK < stated:
            raise BrokenClip(f"{printable(path.name)} has {size:,} of {stated:,} bytes: the file "
                             "is cut short")


def decode_sound(container, stream, rate: int) -> tuple[list[np.ndarray], float]:
    """Mono chunks, and the time of the first sample in seconds."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    chunks, begin, end = [], None, 0.0
    for frame in container.decode(stream):
        if frame.time is not None:
            begin = frame.time if begin is None else begin
            end = frame.time + frame.samples / frame.sample_rate
        chunks += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    if chunks:
        chunks += [part.to_ndarray()[0] for part in resampler.resample(None)]
    check_whole(stream, end)
    return chunks, begin or 0.0


def first_picture(path: Path) -> float:
    """The time of a video's first frame in seconds, 0 where there is none."""
    with opened(path) as container:
        stream = video_stream(container)
        frame = next(container.decode(stream), None) if stream else None
        return float(frame.time or 0.0) if frame else 0.0


def cut_sound(sound: torch.Tensor, frames: int, index: int, geometry: Geometry) -> torch.Tensor:
    """The sound [1, samples] of piece `index` of so many frames, silence where it has ended."""
    codec = geometry.audio
    latents = geometry.audio_latents_for(geometry.latent_frames_from_frames(frames))
    start = round(index * frames * codec.sample_rate / geometry.fps)
    part = sound[start:start + latents * codec.samples_per_latent]
    return torch.nn.functional.pad(part, (0, latents * codec.samples_per_latent - len(part)))[None]
