"""Writing an mp4 while its frames are still being made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import torch


def write_mp4(path: Path, chunks: Iterable[torch.Tensor], fps: int, waveform: torch.Tensor, sample_rate: int,
              crf: float) -> None:
    """Encode frames and mono sound to an mp4 of h264 (yuv420p) and aac, both from 0 s on.

    chunks: frames [n, H, W, 3] in 0..1, same even H and W throughout; each is encoded and let go before the next is
    asked for. waveform: [1, samples] in -1..1; what is longer than the frames is cut. crf: x264's quality, 0 (lossless)
    to 51, of which 23 is x264's own default. Codecs, rounding and cutting are those of core's `VideoFromComponents`, so
    'Save Video' copies the streams without encoding again.

    Memory: x264 holds back some 60 frames of 1.5 H W bytes. The file appears under its name when it is complete;
    whatever ends the writing early (an error, ComfyUI's interruption) leaves nothing behind.
    """
    unfinished = path.with_suffix(".part")
    try:
        with av.open(str(unfinished), mode="w", format="mp4",
                     options={"movflags": "use_metadata_tags+faststart"}) as output:
            _encode(output, chunks, fps, waveform.float().cpu(), sample_rate, crf)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _encode(output, chunks: Iterable[torch.Tensor], fps: int, waveform: torch.Tensor, sample_rate: int,
            crf: float) -> None:
    """Frames chunk by chunk, after each the sound that belongs to it, so that neither stream waits for the other."""
    video = output.add_stream("h264", rate=fps, options={"crf": str(crf)})
    video.pix_fmt = "yuv420p"
    audio = output.add_stream("aac", rate=sample_rate, layout="mono")
    frames = samples = 0
    for chunk in chunks:
        if not frames:
            video.height, video.width = chunk.shape[1:3]
        _encode_pictures(output, video, chunk)
        frames += chunk.shape[0]
        del chunk  # or it would stay until the next one is there
        until = min(math.ceil(Fraction(frames * sample_rate, fps)), waveform.shape[1])
        if until > samples:
            output.mux(audio.encode(_audio_frame(waveform, samples, until, sample_rate)))
            samples = until
    output.mux(video.encode(None))
    output.mux(audio.encode(None))


def _encode_pictures(output, video, chunk: torch.Tensor) -> None:
    for picture in chunk:
        pixels = (picture * 255).clamp(0, 255).byte().cpu().numpy()  # [H, W, 3]
        output.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))


def _audio_frame(waveform: torch.Tensor, start: int, end: int, sample_rate: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(waveform[:, start:end].contiguous().numpy(), format="fltp", layout="mono")
    frame.sample_rate = sample_rate
    frame.pts, frame.time_base = start, Fraction(1, sample_rate)
    return frame
