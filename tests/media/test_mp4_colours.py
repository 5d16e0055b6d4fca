"""Colours of the mp4: BT.709 as its tags say, in the file and in the stream, and through core's own nodes."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from comfy_api.latest import InputImpl
from devlib import graphs
from ovi_native.ovi_model.media.mp4 import write_mp4

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (208, 156, 124), (128, 128, 128), (0, 0, 0), (255, 255, 255),
           (255, 255, 0), (20, 40, 200), *((level, 0, 0) for level in range(16, 256, 48)),
           *((0, level, 0) for level in range(16, 256, 48)), *((0, 0, level) for level in range(16, 256, 48))]
SIZES = [(64, 96), (480, 848), (704, 1280), (64, 80)]  # one whose width core pads before it converts
TAGS = (1, 1, 1, 1)  # BT.709 matrix, primaries and transfer (ITU-T H.273), limited range
KR, KB = 0.2126, 0.0722  # of ITU-R BT.709


def encode(height: int, width: int, crf: float = 10.0) -> io.BytesIO:
    """One frame of each colour."""
    colours = torch.tensor(COLOURS)[:, None, None] / 255 + 1e-4  # core and we round down
    return write_mp4((colour.expand(1, height, width, 3) for colour in colours), 24, torch.zeros(1, 16_000), 16_000,
                     crf)


def tags(codec: av.VideoCodecContext) -> tuple[int, int, int, int]:
    return codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range


def by_the_standard(frame: av.VideoFrame) -> np.ndarray:
    """The middle pixel in 0..255, out of the stored numbers by BT.709's formula in limited range."""
    planes = frame.to_ndarray(format="yuv420p")
    height, chroma = frame.height, frame.height // 4
    y = (planes[:height].mean() - 16) / 219
    blue, red = ((planes[height + i * chroma:height + (i + 1) * chroma].mean() - 128) / 224 for i in range(2))
    r, b = y + 2 * (1 - KR) * red, y + 2 * (1 - KB) * blue
    return 255 * np.array([r, (y - KR * r - KB * b) / (1 - KR - KB), b])


def assert_right(found: np.ndarray, colour: tuple[int, int, int]) -> None:
    assert np.abs(found - np.array(colour)).max() <= 2, f"{colour} became {np.round(found, 1)}"


@pytest.mark.parametrize("height, width", SIZES)
def test_colours_come_back_by_the_tags_and_by_the_standard(height, width):
    with av.open(encode(height, width)) as clip:
        assert tags(clip.streams.video[0].codec_context) == TAGS
        for frame, colour in zip(clip.decode(video=0), COLOURS, strict=True):
            assert (frame.colorspace, frame.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
            assert_right(by_the_standard(frame), colour)
            assert_right(frame.to_ndarray(format="rgb24")[height // 2, width // 2], colour)


def test_file_and_stream_carry_the_tags_each():
    """The `colr` box of the mp4, and the h264 stream by itself, as a player or a remux may see only one of them."""
    file = encode(64, 96)
    assert b"colrnclx" + bytes([0, 1, 0, 1, 0, 1, 0]) in file.getvalue()
    with av.open(file) as clip:
        annex_b = av.BitStreamFilterContext("h264_mp4toannexb", clip.streams.video[0])
        raw = b"".join(bytes(part) for packet in clip.demux(video=0) for part in annex_b.filter(packet))
    with av.open(io.BytesIO(raw), format="h264") as stream:
        next(stream.decode(video=0))
        assert tags(stream.streams.video[0].codec_context) == TAGS


@pytest.mark.parametrize("height, width", SIZES)
def test_core_reads_and_copies_them(tmp_path, height, width):
    """'Get Video Components' gives the colours, 'Save Video' keeps the tags."""
    video = InputImpl.VideoFromFile(encode(height, width))
    for image, colour in zip(video.get_components().images, COLOURS, strict=True):
        assert_right(image[height // 2, width // 2].numpy() * 255, colour)
    video.save_to(str(tmp_path / "copy.mp4"), metadata={"prompt": {}})
    with av.open(str(tmp_path / "copy.mp4")) as clip:
        assert tags(clip.streams.video[0].codec_context) == TAGS and clip.metadata["prompt"] == "{}"
    assert b"colrnclx" in (tmp_path / "copy.mp4").read_bytes()


def test_what_the_help_says_about_encoding_again(tmp_path):
    """Core drops the tags then but keeps the numbers: right for players that take untagged files for BT.709."""
    InputImpl.VideoFromFile(encode(64, 96)).save_to(str(tmp_path / "again.mp4"), crf=10.0)
    with av.open(str(tmp_path / "again.mp4")) as clip:
        for frame, colour in zip(clip.decode(video=0), COLOURS, strict=True):
            assert_right(by_the_standard(frame), colour)
    page = (Path(__file__).resolve().parents[2] / "web" / "docs" / "OviDecodeVideo.md").read_text("utf-8")
    assert "re-encode" in page and "BT.709" in page


def test_the_saved_file_on_a_server_is_tagged(comfy_client):
    graph = graphs.text_to_av() | {
        "straight": graphs.node("OviDecodeVideo", latent=["latent", 0], video_vae=["vae", 0],
                                audio_vae=["audio_vae", 0], crf=18.0),
        "copy": graphs.node("SaveVideo", video=["straight", 0], filename_prefix="tags", format="auto", codec="auto"),
    }
    run = comfy_client.run(graph)
    with av.open(io.BytesIO(graphs.files(comfy_client, run, "copy")[0])) as clip:
        assert tags(clip.streams.video[0].codec_context) == TAGS
