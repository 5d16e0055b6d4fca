"""Frames and sound of real files: rate, size, colour, sync, and every way in which a file is broken."""

import numpy as np
import pytest
import torch
from ovi_native.ovi_model.media.mp4 import write_mp4
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from ovi_native.ovi_model.training.clips import Clip
from ovi_native.ovi_model.training.reading import BrokenClip, at_rate, cut_sound, read_pieces, read_sound
from support.clip_files import RATE, scene, turn, write_clip, write_frames, write_silent, write_sound

AREA = 64 * 64


def pieces(clip, longest=121, area=AREA):
    clip = clip if isinstance(clip, Clip) else Clip("x", "x", clip)
    return list(read_pieces(clip, GEOMETRY, area, longest))


def refused(clip, reason, read=pieces):
    clip = clip if isinstance(clip, Clip) else Clip("x", "x", clip)
    with pytest.raises(BrokenClip, match=reason):
        read(clip)


def sound_of(clip):
    return read_sound(clip, RATE)


# --- picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending, codec", [("mp4", "libx264"), ("mov", "libx264"), ("mkv", "libx264"),
                                           ("webm", "libvpx-vp9")])
def test_every_container_gives_its_frames(tmp_path, ending, codec):
    pictures, _, _ = scene(1, 14)
    found, = pieces(write_silent(tmp_path / f"ü 1.{ending}", pictures, codec=codec))
    assert found.shape == (13, 64, 64, 3) and found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - pictures[:13]).mean() < 6


def test_a_clip_of_the_product_keeps_its_colours(tmp_path):
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.9, 0.8, 0.1]]).repeat_interleave(16, 0)
    frames = colours[None, :, None].expand(5, 64, 64, 3)
    (tmp_path / "a.mp4").write_bytes(write_mp4([frames], 24, torch.zeros(1, 4000), RATE, 0).getvalue())
    found, = pieces(tmp_path / "a.mp4")
    middles = found[2, 8::16, 32].float() / 255
    assert (middles - colours[::16]).abs().max() < 0.03


def test_frames_of_a_folder_are_read_as_they_are(tmp_path):
    pictures, _, _ = scene(1, 11)
    clip = Clip("x", "x", frames=tuple(sorted(write_frames(tmp_path / "f", pictures).iterdir(),
                                              key=lambda path: int(path.stem[6:]))))
    assert np.array_equal(pieces(clip)[0].numpy(), pictures[:9])


@pytest.mark.parametrize("frames, longest, lengths", [(5, 121, [5]), (8, 121, [5]), (12, 9, [9]), (20, 9, [9, 9]),
                                                      (9, 9, [9])])
def test_long_clips_are_cut_and_short_ones_kept(tmp_path, frames, longest, lengths):
    pictures = np.zeros((frames, 32, 32, 3), np.uint8) + np.arange(frames, dtype=np.uint8)[:, None, None, None] * 12
    found = pieces(Clip("x", "x", frames=tuple(sorted(write_frames(tmp_path / "f", pictures).iterdir(),
                                                      key=lambda path: int(path.stem[6:])))), longest, 32 * 32)
    assert [len(piece) for piece in found] == lengths
    assert [int(piece[0, 0, 0, 0]) // 12 for piece in found] == [i * longest for i in range(len(lengths))]


@pytest.mark.parametrize("fps, frames, length", [(12, 12, 21), (25, 26, 25), (30, 31, 25), (60, 61, 21),
                                                 (23.976, 25, 25)])
def test_every_rate_becomes_24(tmp_path, fps, frames, length):
    """A grey that rises with time: each frame shows its own time, or that of the last frame there was."""
    level = (np.arange(frames) / fps * 200).astype(np.uint8)
    pictures = np.broadcast_to(level[:, None, None, None], (frames, 32, 32, 3))
    found, = pieces(write_silent(tmp_path / "a.mp4", np.ascontiguousarray(pictures), fps), area=32 * 32)
    assert len(found) == length
    times = found[:, 16, 16].float().mean(-1) / 200
    late = torch.arange(length) / 24 - times
    assert -0.02 < float(late.min()) and float(late.max()) < 1 / fps + 0.02


def test_at_rate_takes_the_frame_that_is_due():
    assert list(at_rate(iter([(k / 48 + 5, k) for k in range(8)]), 24)) == [0, 2, 4, 6]
    assert list(at_rate(iter([(k / 12, k) for k in range(3)]), 24)) == [0, 0, 1, 1, 2, 2]
    jittered = [(round(k / 24, 3), k) for k in range(50)]  # as webm has it, in milliseconds
    assert list(at_rate(iter(jittered), 24)) == list(range(50))


@pytest.mark.parametrize("size, area, wanted", [((64, 64), 64 * 64, (64, 64)), ((90, 160), 64 * 64, (32, 64)),
                                                ((160, 90), 128 * 128, (160, 96)), ((33, 47), 96 * 96, (64, 96))])
def test_the_aspect_ratio_is_kept_and_the_middle_too(tmp_path, size, area, wanted):
    pictures = np.full((5, *size, 3), 40, np.uint8)
    pictures[:, size[0] // 4:-(size[0] // 4), size[1] // 4:-(size[1] // 4)] = 200
    clip = Clip("x", "x", frames=tuple(write_frames(tmp_path / "f", pictures).iterdir()))
    found, = pieces(clip, area=area)
    assert tuple(found.shape[1:3]) == wanted == GEOMETRY.image_target_hw(*size, area)
    bright = (found[0, ..., 0] > 120).float()
    assert abs(float(bright.mean()) - 0.25) < 0.06
    centre = bright.nonzero().float().mean(0) + 0.5
    assert (centre - torch.tensor(wanted) / 2).abs().max() < 2


def test_a_phone_s_turn_is_applied(tmp_path):
    pictures = np.zeros((5, 64, 96, 3), np.uint8)
    pictures[:, :, :48] = 220  # bright on the left
    path = write_silent(tmp_path / "a.mp4", pictures)
    turn(path, 90)
    found, = pieces(path, area=64 * 96)
    assert tuple(found.shape[1:3]) == (96, 64)
    assert float(found[0, :40].float().mean()) > 180 > 60 > float(found[0, 56:].float().mean())  # bright above


def cut(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def faststart(path, pictures):
    """An mp4 whose index stands before its data, so that a part of it can be played."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def test_broken_videos_are_named(tmp_path):
    refused(tmp_path / "gone.mp4", r"gone\.mp4 cannot be read \(No such file")
    for ending in ("mp4", "mov", "mkv", "webm"):
        for content in (b"", b"a text", b"<!doctype html>" * 100, b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n",
                        b"ffconcat version 1.0\nfile /etc/passwd\n", np.random.default_rng(0).bytes(5000)):
            (tmp_path / f"x.{ending}").write_bytes(content)
            refused(tmp_path / f"x.{ending}", f"x.{ending} cannot be read|it has no picture")
    path = write_clip(tmp_path / "a.mp4", 1)
    path.rename(tmp_path / "a.mkv")  # FFmpeg would read it all the same, as it would a playlist
    refused(tmp_path / "a.mkv", r"a\.mkv cannot be read \(.*: it is damaged, or something else under this name")
    path = write_clip(tmp_path / "a.mp4", 1)
    cut(path, 0.5)
    refused(path, "cannot be read")


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_video_that_ends_early_is_named(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8)
    path = faststart(tmp_path / "a.mp4", noise) if ending == "mp4" else write_silent(tmp_path / "a.mkv", noise)
    assert len(pieces(path)) == 1
    cut(path, 0.6)
    refused(path, r"its picture ends after [\d.]+ of 2\.0 s: the file is cut short|cannot be read")
    refused(path, "cut short|cannot be read", lambda clip: pieces(clip, 5))


@pytest.mark.parametrize("ending", ["mp4", "webm", "wav", "png"])
def test_whatever_is_damaged_is_read_or_named(tmp_path, ending):
    random, (pictures, sound, _) = np.random.default_rng(7), scene(1, 9)
    path = tmp_path / f"a.{ending}"
    {"mp4": lambda: write_clip(path, 1, 9), "webm": lambda: write_silent(path, pictures, codec="libvpx-vp9"),
     "wav": lambda: write_sound(path, sound),
     "png": lambda: (write_frames(tmp_path / "f", pictures[:1]) / "frame_0.png").rename(path)}[ending]()
    clip = {"wav": Clip("x", "x", sound=path), "png": Clip("x", "x", frames=(path,) * 5)}.get(
        ending, Clip("x", "x", path))
    whole, named = path.read_bytes(), 0
    for _ in range(25):
        content = bytearray(whole)
        for _ in range(random.integers(1, 12)):
            content[random.integers(min(len(whole), random.choice([60, 1200, 10**6])))] = random.integers(256)
        path.write_bytes(content[:random.choice([len(whole), random.integers(len(whole))])])
        try:
            if clip.has_picture:
                pieces(clip, 9)
            sound_of(clip)
        except BrokenClip:
            named += 1
    assert 5 < named < 25


def test_a_video_that_is_too_short_slow_or_wide_is_named(tmp_path):
    grey = np.full((30, 32, 32, 3), 99, np.uint8)
    refused(write_silent(tmp_path / "short.mp4", grey[:4]), "it has 4 frames at 24 a second, and at least 5 are needed")
    refused(write_silent(tmp_path / "slow.mp4", grey[:5], 2), r"it has 2\.0 frames a second, and at least 8 are needed")
    refused(write_silent(tmp_path / "still.mp4", grey[:5], 0.25), r"no frame comes between 0\.0 and 4\.0 s")
    wide = np.zeros((5, 32, 288, 3), np.uint8)
    refused(write_silent(tmp_path / "wide.mp4", wide), "its picture of 288x32 pixels is longer than 8:1")


def test_broken_frames_are_named(tmp_path):
    folder = write_frames(tmp_path / "f", np.zeros((6, 32, 32, 3), np.uint8))
    clip = Clip("x", "x", frames=tuple(sorted(folder.iterdir())))
    write_frames(tmp_path / "g", np.zeros((1, 32, 64, 3), np.uint8))
    (tmp_path / "g" / "frame_0.png").replace(folder / "frame_3.png")
    refused(clip, "its size changes from 32x32 to 64x32 pixels")
    for content in (b"", b"text", (folder / "frame_1.png").read_bytes()[:60]):
        (folder / "frame_3.png").write_bytes(content)
        refused(clip, r"frame_3\.png cannot be read")


# --- sound ------------------------------------------------------------------------------------------------------------


def click(frames=30, at=0.5):
    """A clip that is white from one moment on, and sounds from then on."""
    moment = round(at * 24)
    pictures = torch.zeros(frames, 64, 64, 3)
    pictures[moment:] = 1
    sound = torch.zeros(1, frames * RATE // 24)
    sound[0, round(at * RATE):] = torch.sin(torch.arange(sound.shape[1] - round(at * RATE)) * 0.4) * 0.5
    return pictures, sound


def test_picture_and_sound_of_an_mp4_stay_together(tmp_path):
    pictures, sound = click()
    (tmp_path / "a.mp4").write_bytes(write_mp4([pictures], 24, sound, RATE, 10).getvalue())
    clip = Clip("x", "x", tmp_path / "a.mp4")
    frames = torch.cat(pieces(clip, 5, 64 * 64))
    heard = sound_of(clip)
    assert int((frames.float().mean((1, 2, 3)) > 128).nonzero()[0]) == 12
    assert abs(int((heard.abs() > 0.25).nonzero()[0]) - RATE // 2) < 80  # 5 ms
    assert heard.dtype == torch.float32 and abs(len(heard) - sound.shape[1]) < 1100


def test_pieces_of_a_sound_are_those_of_its_picture():
    sound = torch.arange(30 * RATE // 24).float()
    parts = [cut_sound(sound, 9, index, GEOMETRY) for index in range(4)]
    assert all(part.shape == (1, 512 * GEOMETRY.audio_latents_for(3)) for part in parts)
    assert [int(part[0, 0]) for part in parts[:3]] == [0, 6000, 12000]
    assert int(parts[3][0, 0]) == 18000 and not parts[3][0, 2000:].any()


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44_100, 2), (48_000, 6), (16_000, 1)])
def test_every_sound_becomes_mono_at_16_khz(tmp_path, rate, channels):
    wave = np.sin(np.arange(rate) / rate * 2 * np.pi * 440) * 0.5
    wave = wave if channels == 1 else np.repeat(wave[:, None], channels, 1)
    heard = sound_of(Clip("x", "x", sound=write_sound(tmp_path / "a.wav", wave, rate)))
    assert abs(len(heard) - RATE) < 40
    spectrum = torch.fft.rfft(heard[:RATE - 100])
    assert abs(int(spectrum.abs().argmax()) * RATE / (RATE - 100) - 440) < 2


def test_a_sound_of_its_own_takes_the_place_of_the_video_s(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 1)
    wav = write_sound(tmp_path / "a.wav", np.full(RATE, 0.25))
    assert abs(float(sound_of(Clip("x", "x", path, sound=wav)).mean()) - 0.25) < 1e-3


def test_a_clip_without_sound_has_none(tmp_path):
    assert sound_of(Clip("x", "x", write_silent(tmp_path / "a.mp4", scene(1, 9)[0]))) is None
    assert sound_of(Clip("x", "x", frames=(tmp_path / "1.png",))) is None


def test_broken_sounds_are_named(tmp_path):
    path = write_sound(tmp_path / "a.wav", np.zeros(3 * RATE))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:20], whole[:44]):
        path.write_bytes(content)
        refused(Clip("x", "x", sound=path), r"a\.wav (cannot be read|has no samples)|cut short", sound_of)
    path.write_bytes(whole[:len(whole) // 2])
    refused(Clip("x", "x", sound=path), r"a\.wav has 48,022 of 96,044 bytes: the file is cut short", sound_of)
