"""The arithmetic between seconds, frames, latents, tokens, samples and pixels, from the rates of a model family.

A codec packs: a video VAE keeps the first frame and packs every further `temporal_stride` into one latent frame, and
`spatial_stride` pixels each way into one latent pixel; a sound codec makes `sample_rate / samples_per_latent` latents a
second. A `Geometry` is a video codec, a sound codec, the frame rate and the patch that a family's network reads as one
token; families make theirs in `variants.py`.

Sizes are (height, width) in pixels throughout. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AREA_TOLERANCE = 0.1  # Ovi's reference warns beyond this share of the variant's area


@dataclass(frozen=True)
class VideoCodec:
    """What a video VAE packs into one latent."""

    channels: int
    temporal_stride: int  # frames per latent frame, after the first
    spatial_stride: int  # pixels per latent pixel, each way


@dataclass(frozen=True)
class AudioCodec:
    """What a sound codec packs into one latent: mel spectra at `mel_hop`, some of them together."""

    channels: int
    sample_rate: int  # Hz
    mel_bands: int
    mel_hop: int  # samples per mel frame
    mel_frames_per_latent: int

    @property
    def samples_per_latent(self) -> int:
        return self.mel_hop * self.mel_frames_per_latent

    @property
    def latents_per_second(self) -> float:
        return self.sample_rate / self.samples_per_latent


WAN22_VAE = VideoCodec(channels=48, temporal_stride=4, spatial_stride=16)
MMAUDIO_16K = AudioCodec(channels=20, sample_rate=16_000, mel_bands=80, mel_hop=256, mel_frames_per_latent=2)


@dataclass(frozen=True)
class Geometry:
    """The rates of a model family, and the lengths and sizes that follow from them."""

    fps: int
    patch: int  # latent pixels per token, each way
    video: VideoCodec
    audio: AudioCodec

    @property
    def size_multiple(self) -> int:
        """What the sides of a clip are multiples of, in pixels."""
        return self.video.spatial_stride * self.patch

    # lengths

    def snap_frames(self, frames: float) -> int:
        """The nearest length that the video VAE can represent, 4n+1 at a stride of 4 (halfway goes up), at least 1."""
        if frames <= 0:
            raise ValueError(f"The number of frames must be above 0, got {frames}.")
        stride = self.video.temporal_stride
        return stride * max(0, math.floor((frames - 1) / stride + 0.5)) + 1

    def frames_from_seconds(self, seconds: float) -> int:
        """Frames, snapped to what the VAE can represent; of Ovi 5 s gives 121, 10 s gives 241."""
        if not seconds > 0:
            raise ValueError(f"The length must be above 0 seconds, got {seconds}.")
        return self.snap_frames(seconds * self.fps)

    def latent_frames_from_frames(self, frames: int) -> int:
        """Latent frames that hold `frames` (of the form 4n+1) video frames: 121 -> 31."""
        stride = self.video.temporal_stride
        if frames < 1 or frames % stride != 1:
            raise ValueError(f"{frames} frames do not fit the video VAE, which needs {stride}n+1 (1, {1 + stride}, "
                             f"{1 + 2 * stride}, ...).")
        return (frames - 1) // stride + 1

    def frames_from_latent(self, latent_frames: int) -> int:
        """Video frames decoded from that many latent frames: 31 -> 121."""
        if latent_frames < 1:
            raise ValueError(f"At least 1 latent frame is needed, got {latent_frames}.")
        return self.video.temporal_stride * (latent_frames - 1) + 1

    def video_seconds(self, latent_frames: int) -> float:
        """Length of the picture decoded from that many latent frames: 31 -> 5.0417."""
        return self.frames_from_latent(latent_frames) / self.fps

    def audio_seconds(self, audio_latents: int) -> float:
        """Length of the sound decoded from that many audio latents: 157 -> 5.024."""
        return audio_latents / self.audio.latents_per_second

    def audio_latents_for(self, latent_frames: int) -> int:
        """Audio latents that go with that many video latent frames; of Ovi exactly 157 for 31 and 314 for 61.

        The two trained pairs follow no plain rounding of seconds x 31.25 (157.55 and 313.80). They follow the audio
        VAE's own path: round to whole mel frames (62.5 per second); each latent takes two, an odd last one is dropped.
        The sound ends between 23 ms before and 8 ms after the video.
        """
        samples = self.frames_from_latent(latent_frames) * self.audio.sample_rate / self.fps
        mel_frames = math.floor(samples / self.audio.mel_hop + 0.5)
        return max(1, mel_frames // self.audio.mel_frames_per_latent)

    # sizes

    def video_tokens(self, latent_frames: int, height: int, width: int) -> int:
        """Tokens the video tower reads for a clip of height x width pixels (odd latent sizes are padded up)."""
        return latent_frames * math.ceil(height / self.size_multiple) * math.ceil(width / self.size_multiple)

    def latent_hw(self, height: int, width: int) -> tuple[int, int]:
        """Latent pixels of a clip of height x width pixels."""
        return height // self.video.spatial_stride, width // self.video.spatial_stride

    def pixel_hw(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Pixels that a latent of that height and width decodes to."""
        return latent_height * self.video.spatial_stride, latent_width * self.video.spatial_stride

    def snap_hw(self, height: int, width: int, area: int | None) -> tuple[int, int]:
        """Text-to-video size: scaled to `area` pixels (None: not scaled), each side then to the nearest multiple.

        Equals the reference's `snap_hw_to_multiple_of_32`, including its rounding to whole pixels before snapping.
        """
        _check_size(height, width)
        if area is not None:
            scale = math.sqrt(area / float(height * width))
            height, width = round(height * scale), round(width * scale)
        return _to_multiple(height, self.size_multiple), _to_multiple(width, self.size_multiple)

    def image_target_hw(self, height: int, width: int, area: int | None) -> tuple[int, int]:
        """Size an input image of height x width is resized to for image-to-video.

        Among sizes in whole tokens near the image's aspect ratio the one whose area is closest to `area` wins, then the
        one closest in ratio (reference: `preprocess_image_tensor`); it can differ from `snap_hw`. With `area` None both
        sides are cut down to multiples.
        """
        _check_size(height, width)
        multiple = self.size_multiple
        if area is None:
            return max(multiple, height // multiple * multiple), max(multiple, width // multiple * multiple)
        ratio = width / height
        rows_near = max(1, round(math.sqrt(max(1, area // multiple**2) / ratio)))
        candidates = []
        for offset in range(-3, 4):
            rows = max(1, rows_near + offset)
            columns = max(1, round(rows * ratio))
            candidates.append((rows * multiple, columns * multiple))
        scale = math.sqrt(area / (height * width))
        candidates.append((_to_multiple(height * scale, multiple), _to_multiple(width * scale, multiple)))
        return min(candidates, key=lambda hw: (abs(hw[0] * hw[1] - area), abs(hw[1] / hw[0] - ratio)))


def scale_hw_to_area(height: int, width: int, area: int = 1024 * 1024, multiple: int = 16) -> tuple[int, int]:
    """Size for a text-to-image model that makes the first frame; the reference's `scale_hw_to_area_divisible`."""
    _check_size(height, width)
    scale = math.sqrt(area / (height * width))
    return _to_multiple(height * scale, multiple), _to_multiple(width * scale, multiple)


def area_is_off(height: int, width: int, area: int) -> bool:
    """Whether height x width is more than 10 % away from `area` pixels, where the reference warns."""
    return not (1 - AREA_TOLERANCE) * area <= height * width <= (1 + AREA_TOLERANCE) * area


def _check_size(height: int, width: int) -> None:
    if height <= 0 or width <= 0:
        raise ValueError(f"Width and height must be above 0 pixels, got {width}x{height}.")


def _to_multiple(length: float, multiple: int) -> int:
    """Nearest multiple, at least one. Python's round (half to even) is what the reference's sizes rest on."""
    return max(multiple, round(length / multiple) * multiple)
