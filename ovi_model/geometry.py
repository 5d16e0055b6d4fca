"""The arithmetic between seconds, frames, latents, tokens, samples and pixels.

Video: 24 frames per second; the Wan2.2 VAE keeps the first frame and packs every further 4 into one latent frame, and
16x16 pixels into one latent pixel; the video tower reads 2x2 latent pixels as one token, so sizes are multiples of 32.
Audio: 16 kHz, one MMAudio latent per 512 samples (31.25 per second), one token each.

Sizes are (height, width) in pixels throughout, as in the reference. Standard library only.
"""

from __future__ import annotations

import math

FPS = 24
TEMPORAL_STRIDE = 4  # frames per latent frame, after the first
SPATIAL_STRIDE = 16  # pixels per latent pixel
PATCH = 2  # latent pixels per token, each way
SIZE_MULTIPLE = SPATIAL_STRIDE * PATCH
VIDEO_CHANNELS = 48
AUDIO_CHANNELS = 20
AUDIO_RATE = 16_000  # Hz
SAMPLES_PER_AUDIO_LATENT = 512
MEL_HOP = 256  # samples per mel frame
AUDIO_LATENTS_PER_SECOND = AUDIO_RATE / SAMPLES_PER_AUDIO_LATENT
AREA_TOLERANCE = 0.1  # the reference warns beyond this share of the variant's area


def snap_frames(frames: float) -> int:
    """The nearest length of the form 4n+1 (halfway goes up), at least 1: what the video VAE can represent."""
    if frames <= 0:
        raise ValueError(f"The number of frames must be above 0, got {frames}.")
    return TEMPORAL_STRIDE * max(0, math.floor((frames - 1) / TEMPORAL_STRIDE + 0.5)) + 1


def frames_from_seconds(seconds: float) -> int:
    """Frames at 24 fps, snapped to 4n+1; 5 s gives 121, 10 s gives 241."""
    if not seconds > 0:
        raise ValueError(f"The length must be above 0 seconds, got {seconds}.")
    return snap_frames(seconds * FPS)


def latent_frames_from_frames(frames: int) -> int:
    """Latent frames that hold `frames` (of the form 4n+1) video frames: 121 -> 31."""
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        raise ValueError(f"{frames} frames do not fit the video VAE, which needs 4n+1 (1, 5, 9, ...).")
    return (frames - 1) // TEMPORAL_STRIDE + 1


def frames_from_latent(latent_frames: int) -> int:
    """Video frames decoded from that many latent frames: 31 -> 121."""
    if latent_frames < 1:
        raise ValueError(f"At least 1 latent frame is needed, got {latent_frames}.")
    return TEMPORAL_STRIDE * (latent_frames - 1) + 1


def audio_latents_for(latent_frames: int) -> int:
    """Audio latents that go with that many video latent frames; exactly 157 for 31 and 314 for 61.

    The two trained pairs follow no plain rounding of seconds x 31.25 (157.55 and 313.80). They follow the audio VAE's
    own path: round to whole mel frames (62.5 per second); each latent takes two, an odd last one is dropped. The sound
    ends between 23 ms before and 8 ms after the video.
    """
    samples = frames_from_latent(latent_frames) * AUDIO_RATE / FPS
    mel_frames = math.floor(samples / MEL_HOP + 0.5)
    return max(1, mel_frames // 2)


def audio_seconds(audio_latents: int) -> float:
    """Length of the sound decoded from that many audio latents: 157 -> 5.024."""
    return audio_latents / AUDIO_LATENTS_PER_SECOND


def video_tokens(latent_frames: int, height: int, width: int) -> int:
    """Tokens the video tower reads for a clip of height x width pixels (odd latent sizes are padded up)."""
    return latent_frames * math.ceil(height / SIZE_MULTIPLE) * math.ceil(width / SIZE_MULTIPLE)


def _check_size(height: int, width: int) -> None:
    if height <= 0 or width <= 0:
        raise ValueError(f"Width and height must be above 0 pixels, got {width}x{height}.")


def _to_multiple(length: float, multiple: int) -> int:
    """Nearest multiple, at least one. Python's round (half to even) is what the reference's sizes rest on."""
    return max(multiple, round(length / multiple) * multiple)


def _cut_to_multiple(length: int) -> int:
    return max(SIZE_MULTIPLE, length // SIZE_MULTIPLE * SIZE_MULTIPLE)


def snap_hw(height: int, width: int, area: int | None) -> tuple[int, int]:
    """Text-to-video size: scaled to `area` pixels (None: not scaled), then each side to the nearest multiple of 32.

    Equals the reference's `snap_hw_to_multiple_of_32`, including its rounding to whole pixels before snapping.
    """
    _check_size(height, width)
    if area is not None:
        scale = math.sqrt(area / float(height * width))
        height, width = round(height * scale), round(width * scale)
    return _to_multiple(height, SIZE_MULTIPLE), _to_multiple(width, SIZE_MULTIPLE)


def scale_hw_to_area(height: int, width: int, area: int = 1024 * 1024, multiple: int = 16) -> tuple[int, int]:
    """Size for a text-to-image model that makes the first frame; the reference's `scale_hw_to_area_divisible`."""
    _check_size(height, width)
    scale = math.sqrt(area / (height * width))
    return _to_multiple(height * scale, multiple), _to_multiple(width * scale, multiple)


def image_target_hw(height: int, width: int, area: int | None) -> tuple[int, int]:
    """Size an input image of height x width is resized to for image-to-video.

    Among sizes in steps of 32 near the image's aspect ratio the one whose area is closest to `area` wins, then the one
    closest in ratio (reference: `preprocess_image_tensor`); it can differ from `snap_hw`. With `area` None both sides
    are cut down to multiples of 32.
    """
    _check_size(height, width)
    if area is None:
        return _cut_to_multiple(height), _cut_to_multiple(width)
    ratio = width / height
    rows_near = max(1, round(math.sqrt(max(1, area // SIZE_MULTIPLE**2) / ratio)))
    candidates = []
    for offset in range(-3, 4):
        rows = max(1, rows_near + offset)
        columns = max(1, round(rows * ratio))
        candidates.append((rows * SIZE_MULTIPLE, columns * SIZE_MULTIPLE))
    scale = math.sqrt(area / (height * width))
    candidates.append((_to_multiple(height * scale, SIZE_MULTIPLE), _to_multiple(width * scale, SIZE_MULTIPLE)))
    return min(candidates, key=lambda hw: (abs(hw[0] * hw[1] - area), abs(hw[1] / hw[0] - ratio)))


def area_is_off(height: int, width: int, area: int) -> bool:
    """Whether height x width is more than 10 % away from `area` pixels, where the reference warns."""
    return not (1 - AREA_TOLERANCE) * area <= height * width <= (1 + AREA_TOLERANCE) * area
