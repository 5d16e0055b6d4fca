"""'Ovi Decode to Video': an mp4 with the frames and the sound of core's way, made bit by bit and kept in RAM."""

import gc
import io
import json
import math
import shutil
import weakref
from fractions import Fraction
from pathlib import Path

import av
import comfy.model_management
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import InputImpl, Types
from devlib.graphs import change, decode, executed, files, node, save_clip, text_of, text_to_av
from devlib.media import Media, read_media
from ovi_native.nodes.decode import OviDecode, OviDecodeVideo
from ovi_native.ovi_model.media.mp4 import write_mp4
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from support.decode_faults import short_of_memory
from tiny import wan_vae
from tiny.video_vae import video_vae
from tiny.wan_vae import latents


@pytest.fixture(scope="module")
def vaes() -> dict[str, comfy.sd.VAE]:
    """Core's Wan2.2 VAE at a small width, and the TAEHV of the tiny bundle."""
    return {"wan": wan_vae.small_vae(), "taehv": comfy.sd.VAE(sd=video_vae(0))}


def joint(frames: int, batch: int = 1) -> dict:
    video = latents(frames, batch)
    audio = torch.randn(batch, 20, GEOMETRY.audio_latents_for(frames), generator=torch.Generator().manual_seed(1))
    return {"samples": NestedTensor((video, audio))}


def pictures(frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """Moving stripes [frames, H, W, 3], some of them beyond 0..1 as a decoder's may be."""
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, height, width)), indexing="ij")
    return torch.stack([0.5 + 0.6 * torch.sin(x / 17 + t / 9), 0.5 + 0.4 * torch.sin(y / 15), t / frames], dim=-1)


def tone(samples: int) -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(samples) * 2 * math.pi * 440 / 16_000)[None]


# --- the file ---------------------------------------------------------------------------------------------------------


def encode(frames: torch.Tensor, sound: torch.Tensor, crf: float = 23.0) -> io.BytesIO:
    return write_mp4(iter([frames[:1], *frames[1:].split(4)]), 24, sound, 16_000, crf)


def test_streams_of_the_file():
    sound = tone(157 * 512)
    file = encode(pictures(121), sound)
    clip = read_media(file.getvalue())
    assert clip.codecs == {"video": "h264", "audio": "aac"}
    assert clip.starts == {"video": 0.0, "audio": 0.0}
    assert clip.fps == 24.0 and clip.rate == 16_000
    assert clip.frames.shape == (121, 64, 96, 3)
    assert clip.durations["video"] == pytest.approx(121 / 24, abs=1e-6)
    assert clip.durations["audio"] == pytest.approx(157 * 512 / 16_000, abs=1e-3)
    assert np.abs(clip.frames - pictures(121).clamp(0, 1).numpy() * 255).mean() < 4
    heard = clip.sound[: sound.shape[1], 0]
    assert np.abs(heard - sound[0].numpy())[2000:-2000].max() < 0.05  # no shift: a sample is 0.09 at this pitch
    video = InputImpl.VideoFromFile(file)
    assert video.get_dimensions() == (96, 64) and video.get_frame_count() == 121 and video.get_frame_rate() == 24


def core_s(path: Path, images: torch.Tensor, audio: dict, crf: float | None) -> Media:
    """The same clip written by 'Create Video' and 'Save Video'."""
    components = Types.VideoComponents(images=images, audio=audio, frame_rate=Fraction(24))
    InputImpl.VideoFromComponents(components).save_to(str(path), crf=crf)
    return read_media(path.read_bytes())


def encoder_settings(file: str | io.BytesIO) -> bytes:
    """What x264 writes about itself at the start of its stream."""
    with av.open(file) as clip:
        packet = bytes(next(clip.demux(video=0)))
    return packet[packet.index(b"x264 - core"):].split(b"\0")[0]


def same_pictures(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether frames are the same but for two colour matrices: what each does to the colour of 2x2 pixels in common."""
    difference = np.abs(halved(a) - halved(b))
    return a.shape == b.shape and difference.mean() < 1 and np.quantile(difference, 0.99) < 4


def halved(frames: np.ndarray) -> np.ndarray:
    count, height, width, _ = frames.shape
    return frames.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))


@pytest.mark.parametrize("samples", [16_000, 80_000, 90_000])
def test_file_equals_core_s(tmp_path, samples):
    """Shorter, about equal and longer sound, which is cut. Lossless; of the colours only the matrix differs."""
    frames, sound = pictures(49), tone(samples)
    found = read_media(encode(frames, sound, 0.0).getvalue())
    truth = core_s(tmp_path / "core.mp4", frames, {"waveform": sound[None], "sample_rate": 16_000}, 0.0)
    assert same_pictures(found.frames, truth.frames) and np.array_equal(found.sound, truth.sound)
    assert (found.starts, found.durations) == (truth.starts, truth.durations)


def test_default_crf_is_what_core_encodes_with(tmp_path):
    default, = (item.default for item in OviDecodeVideo.GET_SCHEMA().inputs if item.id == "crf")
    frames, sound = pictures(9), tone(6000)
    ours = encoder_settings(encode(frames, sound, default))
    core_s(tmp_path / "core.mp4", frames, {"waveform": sound[None], "sample_rate": 16_000}, None)
    assert b"crf=23.0" in ours
    assert ours == encoder_settings(str(tmp_path / "core.mp4"))


def test_sound_and_pictures_are_interleaved():
    """Packets of both streams alternate, so that a player need not read ahead."""
    with av.open(write_mp4(pictures(241).split(4), 24, tone(160_000), 16_000, 23.0)) as clip:
        times = [(packet.stream.type, float(packet.pts * packet.time_base)) for packet in clip.demux()
                 if packet.pts is not None]
    last = {"video": 0.0, "audio": 0.0}
    for kind, seconds in times:
        last[kind] = max(last[kind], seconds)
        assert abs(last["video"] - last["audio"]) < 1.5


def test_lower_crf_is_larger_and_closer():
    frames = pictures(9).clamp(0, 1)
    sizes, errors = [], []
    for crf in (10.0, 23.0, 40.0):
        content = encode(frames, tone(6000), crf).getvalue()
        sizes.append(len(content))
        errors.append(np.abs(read_media(content).frames - frames.numpy() * 255).mean())
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert errors == sorted(errors) and len(set(errors)) == 3


class Stopped(BaseException):
    """Neither an Exception, like ComfyUI's interruption."""


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("error", [ValueError, Stopped])
def test_a_failed_run_ends_with_the_decoder_s_own_error(after, error):
    def pieces():
        yield from pictures(4 * after).split(4) if after else ()
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_mp4(pieces(), 24, tone(100_000), 16_000, 23.0)


def test_odd_sides_are_a_sentence():
    with pytest.raises(ValueError, match="The frames are 96x63; the mp4's h264 needs an even width and height"):
        encode(pictures(5, height=63), tone(6000))


# --- the node ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, batch", [(5, 1), (3, 2)])
def test_node_gives_the_clips_of_the_other_way(vaes, sound_vae, tmp_path, frames, batch):
    latent = joint(frames, batch)
    videos, = OviDecodeVideo.execute(latent, vaes["wan"], sound_vae, 0.0).args
    pictures, sounds, fps = OviDecode.execute(latent, vaes["wan"], sound_vae, 0, 64).args
    assert len(videos) == len(pictures) == len(sounds) == batch
    for video, images, audio in zip(videos, pictures, sounds, strict=True):
        assert isinstance(video, InputImpl.VideoFromFile)
        found = read_media(video.get_stream_source().getvalue())
        truth = core_s(tmp_path / "other.mp4", images, audio, 0.0)
        assert found.frames.shape == (4 * frames - 3, 64, 96, 3) and fps == found.fps == 24.0
        assert np.array_equal(found.sound, truth.sound) and found.durations == truth.durations
        assert same_pictures(found.frames, truth.frames)
        different = (found.frames != read_media(encode(images, audio["waveform"][0], 0.0).getvalue()).frames).mean()
        assert different == 0 if batch == 1 else different < 1e-3  # core decodes clips side by side: rounding


def test_every_clip_of_a_batch_is_as_it_is_alone(vaes, sound_vae):
    batch = joint(3, 2)
    alone = [{"samples": NestedTensor([stream[i:i + 1] for stream in batch["samples"].unbind()])} for i in range(2)]
    for decoder, more in ((OviDecode, (0, 64)), (OviDecode, (64, 8)), (OviDecodeVideo, (0.0,))):
        together = decoder.execute(batch, vaes["taehv"], sound_vae, *more).args
        single = [decoder.execute(each, vaes["taehv"], sound_vae, *more).args for each in alone]
        for i in range(2):
            if decoder is OviDecode:
                assert torch.allclose(together[0][i], single[i][0][0], atol=1e-5)
                assert torch.allclose(together[1][i]["waveform"], single[i][1][0]["waveform"], atol=1e-5)
            else:
                a, b = (read_media(v.get_stream_source().getvalue()) for v in (together[0][i], single[i][0][0]))
                assert a.frames.shape == b.frames.shape and a.durations == b.durations
                difference = np.abs(a.frames.astype(int) - b.frames)  # a value on the edge of two may fall either way
                assert difference.mean() < 0.1 and difference.max() < 8


def test_node_refuses_what_does_not_fit(vaes, sound_vae):
    with pytest.raises(ValueError, match="'Ovi Decode to Video' needs a joint latent of picture and sound"):
        OviDecodeVideo.execute({"samples": latents(2)}, vaes["wan"], sound_vae, 23.0)
    with pytest.raises(ValueError, match="16 latent channels, but Ovi needs the Wan2"):
        other = wan_vae.settings(torch.float32)
        other.latent_channels = 16
        OviDecodeVideo.execute(joint(2), other, sound_vae, 23.0)
    with pytest.raises(ValueError, match="no MMAudio VAE; connect the output of 'Load Ovi Audio VAE'"):
        OviDecodeVideo.execute(joint(2), vaes["wan"], vaes["wan"], 23.0)


def test_an_interrupted_node_leaves_no_memory(vaes, sound_vae):
    vae, calls = vaes["wan"], []

    def count(*_):
        calls.append(1)
        if len(calls) % 3 == 0:
            comfy.model_management.interrupt_current_processing()

    def interrupted_run():
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            OviDecodeVideo.execute(latent, vae, sound_vae, 23.0)
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    latent = joint(9)
    hook = vae.first_stage_model.decoder.register_forward_hook(count)
    try:
        before = interrupted_run()
        assert [interrupted_run() for _ in range(2)] == [before] * 2
    finally:
        hook.remove()
    assert len(calls) == 9


def test_progress_reaches_the_end(vaes, sound_vae, monkeypatch):
    seen = []
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    monkeypatch.setattr("comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    OviDecodeVideo.execute(joint(3, batch=2), vaes["taehv"], sound_vae, 23.0)
    assert [value for value, total in seen if total == 18] == [1, 5, 9, 10, 14, 18]


def test_each_piece_is_let_go_before_the_next_is_made(sound_vae):
    """Through the node: whenever the decoder starts, no frames of before are left."""
    vae, made, alive = wan_vae.small_vae(), [], []
    finish = vae.process_output

    def note(pixels):
        made.append(weakref.ref(pixels.untyped_storage()))
        return finish(pixels)

    vae.process_output = note
    vae.first_stage_model.decoder.register_forward_pre_hook(
        lambda *_: alive.append(sum(piece() is not None for piece in made)))
    OviDecodeVideo.execute(joint(3, batch=2), vae, sound_vae, 23.0)
    assert len(made) == 6 and alive == [0] * 6


def test_memory_that_runs_out_is_said_and_changes_nothing(vaes, sound_vae):
    latent = joint(5)
    truth = OviDecodeVideo.execute(latent, vaes["wan"], sound_vae, 0.0)
    with short_of_memory(vaes["wan"], 3):
        found = OviDecodeVideo.execute(latent, vaes["wan"], sound_vae, 0.0)
    a, b = (read_media(out.args[0][0].get_stream_source().getvalue()) for out in (found, truth))
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.sound, b.sound)
    (with_word,), (without,) = (out.ui.as_dict()["text"] for out in (found, truth))
    assert with_word.startswith("⚠ Memory ran out: from frame 10 on") and "Memory" not in without


# --- in a real server -------------------------------------------------------------------------------------------------


LOSSLESS = {"codec": "h264", "codec.encoding": "re-encode", "codec.encoding.crf": 0.0}  # for frames


def to_video(graph: dict, latent: str = "sampler", crf: float = 23.0) -> dict:
    """`graph` with 'Ovi Decode to Video' as "straight", saved by "copy"."""
    return graph | {
        "straight": node("OviDecodeVideo", latent=[latent, 0], video_vae=["vae", 0], audio_vae=["audio_vae", 0],
                         crf=crf),
        "copy": node("SaveVideo", video=["straight", 0], filename_prefix="straight", format="auto", codec="auto"),
    }


def video_packets(source: str | io.BytesIO) -> list[bytes]:
    with av.open(source) as clip:
        return [bytes(packet) for packet in clip.demux(video=0)]


def test_core_copies_the_streams(vaes, sound_vae, tmp_path):
    """'Save Video' at its defaults does not encode again, as often as it is asked to."""
    (video,), = OviDecodeVideo.execute(joint(3), vaes["wan"], sound_vae, 23.0).args
    for name in ("first.mp4", "second.mp4"):
        video.save_to(str(tmp_path / name), metadata={"prompt": {"1": {}}})
        assert video_packets(str(tmp_path / name)) == video_packets(video.get_stream_source())


def test_saved_clip_has_the_frames_of_the_other_way_and_the_workflow(comfy_client, tmp_path):
    graph = save_clip(decode(change(text_to_av(), latent={"seconds": 1.0, "frames": 0})))
    graph = to_video(change(graph, save=LOSSLESS), crf=0.0)
    workflow = {"nodes": [], "links": [], "version": 0.4}
    run = comfy_client.run(graph, workflow)
    assert {"straight", "copy", "save"} <= set(executed(run))
    found, truth = (read_media(files(comfy_client, run, name)[0]) for name in ("copy", "save"))
    assert found.codecs == {"video": "h264", "audio": "aac"} and found.starts == {"video": 0.0, "audio": 0.0}
    assert found.frames.shape == (25, 64, 96, 3) and found.frames.std(axis=(1, 2, 3)).min() > 10
    assert same_pictures(found.frames, truth.frames) and np.array_equal(found.sound, truth.sound)
    assert found.durations == truth.durations
    assert text_of(run, "straight").startswith("96x64, 25 frames at 24 per second = 1.04 s, sound 1.02 s; the file has")

    (tmp_path / "saved.mp4").write_bytes(files(comfy_client, run, "copy")[0])
    with av.open(str(tmp_path / "saved.mp4")) as saved:
        assert json.loads(saved.metadata["workflow"]) == workflow
        assert set(json.loads(saved.metadata["prompt"])) == set(graph)


def test_nothing_stays_in_temp_and_nothing_there_is_needed(comfy_client, comfy_server):
    """Many runs, then one more on the cached clip with the temp folder emptied: no file of ours, and no error."""
    temp = comfy_server.base / "temp"
    before = set(temp.glob("**/*"))
    graph = to_video(text_to_av(), latent="latent")
    for crf in range(20, 26):
        comfy_client.run(change(graph, straight={"crf": float(crf)}))
    assert set(temp.glob("**/*")) == before
    shutil.rmtree(temp, ignore_errors=True)
    again = comfy_client.run(change(graph, straight={"crf": 25.0}, copy={"filename_prefix": "again"}))
    assert "straight" not in executed(again), "the control: the clip is the cached one"
    assert read_media(files(comfy_client, again, "copy")[0]).frames.shape == (9, 64, 96, 3)


def test_interrupt_on_the_server(comfy_client):
    seen = []

    def stop(kind, data):
        if kind == "progress" and data["node"] == "straight":
            seen.append(data["value"])
            if len(seen) == 1:
                comfy_client.interrupt()

    slow = change(text_to_av(), latent={"width": 512, "height": 512, "frames": 241})
    run = comfy_client.run(to_video(slow, latent="latent"), on_event=stop)
    assert run.status == "interrupted" and run.of("execution_interrupted")[0]["node_id"] == "straight"
    assert seen[-1] < 121 and not run.outputs
    again = comfy_client.run(to_video(text_to_av()))
    assert read_media(files(comfy_client, again, "copy")[0]).frames.shape == (9, 64, 96, 3)
