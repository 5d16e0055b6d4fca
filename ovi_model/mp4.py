"""Writing an mp4 while its frames are still being made: x264 encodes some while the VAE decodes the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import comfy.model_management
import numpy as np
import torch

CHUNKS_AHEAD = 2  # evens out chunks that take longer than others


def write_mp4(path: Path, chunks: Iterable[torch.Tensor], fps: int, waveform: torch.Tensor, sample_rate: int,
              crf: float, ahead: int = CHUNKS_AHEAD) -> None:
    """Encode frames and mono sound to an mp4 of h264 (yuv420p) and aac, both from 0 s on.

    chunks: frames [n, H, W, 3] in 0..1 on any device, same even H and W throughout; asked for in the calling thread,
    each let go before the next is asked for, while a second thread encodes those of before. waveform: [1, samples] in
    -1..1; what is longer than the frames is cut. crf: x264's quality, 0 (lossless) to 51, of which 23 is x264's own
    default. Codecs, rounding and cutting are those of core's `VideoFromComponents`, so 'Save Video' copies the streams
    without encoding again.

    ahead: chunks that may wait for the encoder or be in it while the next is made, 0 to encode one after the other.

    Memory: x264 holds back some 60 frames of 1.5 H W bytes; up to ahead + 1 chunks wait as 3 n H W bytes. The file
    appears under its name when it is complete; whatever ends the writing early (an error on either side, ComfyUI's
    interruption) leaves neither a file nor a thread behind.
    """
    unfinished = path.with_suffix(".part")
    try:
        with av.open(str(unfinished), mode="w", format="mp4",
                     options={"movflags": "use_metadata_tags+faststart"}) as output:
            clip = _Clip(output, fps, waveform.float().cpu(), sample_rate, crf)
            _encode_behind(clip, chunks, ahead)
            clip.finish()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _encode_behind(clip: _Clip, chunks: Iterable[torch.Tensor], ahead: int) -> None:
    """Add the chunks to the clip in a thread of its own, at most `ahead` behind; raises what either side does."""
    pending: deque[Future[None]] = deque()
    encoder = ThreadPoolExecutor(1, "ovi-mp4")
    try:
        for chunk in chunks:
            pictures = fetch_bytes(chunk)
            del chunk  # or it would stay until the next one is there
            pending.append(encoder.submit(clip.add, pictures))
            del pictures
            if len(pending) > ahead:
                pending.popleft().result()
        for future in pending:
            future.result()
    finally:
        encoder.shutdown(cancel_futures=True)  # waits for the chunk it is at: the file is closed next


def fetch_bytes(frames: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start bringing frames [n, H, W, 3] in 0..1 to RAM as bytes; the function returned waits for them.

    Rounded down as core does, on the frames' own device, so that a quarter of the bytes travel. Where core copies
    without waiting, the device goes on with what it is asked to do next in the meantime.
    """
    pixels = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    for picture, target in zip(frames, pixels, strict=True):
        target.copy_((picture * 255).clamp_(0, 255))
    if frames.device.type != "cuda" or not comfy.model_management.device_supports_non_blocking(frames.device):
        host = pixels.cpu()
        return host.numpy
    host = pixels.to("cpu", non_blocking=True)  # PyTorch takes pinned memory for this
    copied = torch.cuda.current_stream(frames.device).record_event()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


class _Clip:
    """An open mp4 that takes frames, and after each few the sound that belongs to them."""

    def __init__(self, output, fps: int, waveform: torch.Tensor, sample_rate: int, crf: float) -> None:
        self.output, self.fps, self.waveform, self.sample_rate = output, fps, waveform, sample_rate
        self.video = output.add_stream("h264", rate=fps, options={"crf": str(crf)})
        self.video.pix_fmt = "yuv420p"
        self.audio = output.add_stream("aac", rate=sample_rate, layout="mono")
        self.frames = self.samples = 0

    def add(self, fetch: Callable[[], np.ndarray]) -> None:
        """Encode the pictures [n, H, W, 3] that `fetch` gives, and the sound up to their end.

        Neither stream of the file has to wait for the other then.
        """
        pictures = fetch()
        if not self.frames:
            self.video.height, self.video.width = pictures.shape[1:3]
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            self.output.mux(self.video.encode(frame))
        self.frames += len(pictures)
        until = min(math.ceil(Fraction(self.frames * self.sample_rate, self.fps)), self.waveform.shape[1])
        if until > self.samples:
            self.output.mux(self.audio.encode(self._sound(self.samples, until)))
            self.samples = until

    def finish(self) -> None:
        """Encode what the codecs still hold back."""
        self.output.mux(self.video.encode(None))
        self.output.mux(self.audio.encode(None))

    def _sound(self, start: int, end: int) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(
            self.waveform[:, start:end].contiguous().numpy(), format="fltp", layout="mono")
        frame.sample_rate = self.sample_rate
        frame.pts, frame.time_base = start, Fraction(1, self.sample_rate)
        return frame
