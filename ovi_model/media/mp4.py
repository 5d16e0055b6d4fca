"""Writing an mp4 while its frames are still being made: x264 encodes some while the VAE decodes the next.

The file is made in RAM. A clip of 5 s takes a few megabytes, one of 5 minutes some tens; in exchange nothing is left
behind in a folder, nobody can delete the file under a cached node, and no full disk or missing right stops a run.

Colours are BT.709 in limited range, and both the h264 stream (VUI) and the file (`colr`) say so. FFmpeg's default for
RGB is BT.601 without a word in the file, which players take for BT.709 when the picture is large: red turns orange.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

import av
import comfy.model_management
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

CHUNKS_AHEAD = 2  # evens out chunks that take longer than others
BT709 = 1  # as matrix, primaries and transfer alike (ITU-T H.273)
NOT_FINITE = ("{} holds values that are not finite (NaN or infinite), although its latent does not. Likely causes: a "
              "VAE that computes in half precision (start ComfyUI with --bf16-vae or --fp32-vae), or a damaged VAE "
              "file.")


def write_mp4(chunks: Iterable[torch.Tensor], fps: int, waveform: torch.Tensor, sample_rate: int, crf: float,
              ahead: int = CHUNKS_AHEAD) -> io.BytesIO:
    """Encode frames and mono sound to an mp4 of h264 (yuv420p) and aac, both from 0 s on.

    chunks: frames [n, H, W, 3] in 0..1 on any device, same even H and W throughout; asked for in the calling thread,
    each let go before the next is asked for, while a second thread encodes those of before. waveform: [1, samples] in
    -1..1; what is longer than the frames is cut. crf: x264's quality, 0 (lossless) to 51, of which 23 is x264's own
    default. Codecs, rounding and cutting are those of core's `VideoFromComponents`, so 'Save Video' copies the streams
    without encoding again; the colour matrix is not (see above).

    ahead: chunks that may wait for the encoder or be in it while the next is made, 0 to encode one after the other.

    Memory: the file; x264 holds back some 60 frames of 1.5 H W bytes; up to ahead + 1 chunks wait as 3 n H W bytes.
    Whatever ends the writing early (an error on either side, ComfyUI's interruption) leaves no thread behind. Raises
    ValueError if frames are not finite or have odd sides.
    """
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as output:
        clip = _Clip(output, fps, waveform.float().cpu(), sample_rate, crf)
        _encode_behind(clip, chunks, ahead)
        clip.finish()
    file.seek(0)
    return file


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
    without waiting, the device goes on with what it is asked to do next in the meantime. The function returned raises
    ValueError if the frames are not finite; their sum tells, and travels with them.
    """
    total = frames.sum(dtype=torch.float32)
    pixels = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    for picture, target in zip(frames, pixels, strict=True):
        target.copy_((picture * 255).clamp_(0, 255))
    if frames.device.type != "cuda" or not comfy.model_management.device_supports_non_blocking(frames.device):
        host, sum_of_all = pixels.cpu(), total.cpu()
        return lambda: _checked(host, sum_of_all)
    host = pixels.to("cpu", non_blocking=True)  # PyTorch takes pinned memory for this
    sum_of_all = total.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(frames.device).record_event()

    def wait() -> np.ndarray:
        copied.synchronize()
        return _checked(host, sum_of_all)

    return wait


def _checked(pixels: torch.Tensor, sum_of_all: torch.Tensor) -> np.ndarray:
    if not math.isfinite(sum_of_all.item()):
        raise ValueError(NOT_FINITE.format("The decoded picture"))
    return pixels.numpy()


class _Clip:
    """An open mp4 that takes frames, and after each few the sound that belongs to them."""

    def __init__(self, output, fps: int, waveform: torch.Tensor, sample_rate: int, crf: float) -> None:
        self.output, self.fps, self.waveform, self.sample_rate = output, fps, waveform, sample_rate
        self.video = output.add_stream("h264", rate=fps, options={"crf": str(crf)})
        self.video.pix_fmt = "yuv420p"
        encoder = self.video.codec_context
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709
        encoder.color_range = ColorRange.MPEG
        self.converter = VideoReformatter()
        self.audio = output.add_stream("aac", rate=sample_rate, layout="mono")
        self.frames = self.samples = 0

    def add(self, fetch: Callable[[], np.ndarray]) -> None:
        """Encode the pictures [n, H, W, 3] that `fetch` gives, and the sound up to their end.

        Neither stream of the file has to wait for the other then.
        """
        pictures = fetch()
        if not self.frames:
            self._set_size(*pictures.shape[1:3])
        for picture in pictures:
            frame = self.converter.reformat(
                av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p", src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
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

    def _set_size(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"The frames are {width}x{height}; the mp4's h264 needs an even width and height. Use "
                             "'Ovi Decode' and crop the images.")
        self.video.height, self.video.width = height, width

    def _sound(self, start: int, end: int) -> av.AudioFrame:
        frame = av.AudioFrame.from_ndarray(
            self.waveform[:, start:end].contiguous().numpy(), format="fltp", layout="mono")
        frame.sample_rate = self.sample_rate
        frame.pts, frame.time_base = start, Fraction(1, self.sample_rate)
        return frame
