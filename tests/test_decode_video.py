"""'Ovi Decode to Video': an mp4 with the frames and the sound of core's way, made bit by bit, or no file at all."""

import gc
import json
import math
import os
import weakref
from fractions import Fraction
from pathlib import Path

import av
import comfy.model_management
import comfy.sd
import folder_paths
import graphs
import make_tiny
import numpy as np
import pytest
import torch
import wan_vae
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import InputImpl, Types
from graphs import change, decode, executed, files, node, read_media, save_clip, text_to_av
from ovi_native.nodes.decode import OviDecode, OviDecodeVideo
from ovi_native.ovi_model import audio_vae
from ovi_native.ovi_model.mp4 import write_mp4
from wan_vae import latents


@pytest.fixture(scope="module")
def vaes() -> dict[str, comfy.sd.VAE]:
    """Core's Wan2.2 VAE at a small width, and the TAEHV of the tiny bundle."""
    return {"wan": wan_vae.small_vae(), "taehv": comfy.sd.VAE(sd=make_tiny.video_vae(0))}


@pytest.fixture(scope="module")
def sound_vae(tmp_path_factory) -> comfy.sd.VAE:
    models = tmp_path_factory.mktemp("models")
    make_tiny.make_bundle(models)
    return audio_vae.load_audio_vae(*(str(models / "vae" / f"ovi_tiny_random_mmaudio_{part}.safetensors")
                                      for part in ("vae", "vocoder")))


@pytest.fixture
def temp(tmp_path, monkeypatch) -> Path:
    """ComfyUI's temp folder, not yet there."""
    folder = tmp_path / "temp"
    monkeypatch.setattr(folder_paths, "temp_directory", str(folder))
    return folder


def joint(frames: int, batch: int = 1) -> dict:
    video = latents(frames, batch)
    audio = torch.randn(batch, 20, max(1, round(frames * 157 / 31)), generator=torch.Generator().manual_seed(1))
    return {"samples": NestedTensor((video, audio))}


def pictures(frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """Moving stripes [frames, H, W, 3], some of them beyond 0..1 as a decoder's may be."""
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, height, width)), indexing="ij")
    return torch.stack([0.5 + 0.6 * torch.sin(x / 17 + t / 9), 0.5 + 0.4 * torch.sin(y / 15), t / frames], dim=-1)


def tone(samples: int) -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(samples) * 2 * math.pi * 440 / 16_000)[None]


# --- the file ---------------------------------------------------------------------------------------------------------


def written(path: Path, frames: torch.Tensor, sound: torch.Tensor, crf: float = 23.0) -> graphs.Media:
    write_mp4(path, iter([frames[:1], *frames[1:].split(4)]), 24, sound, 16_000, crf)
    return read_media(path.read_bytes())


def test_streams_of_the_file(tmp_path):
    sound = tone(157 * 512)
    clip = written(tmp_path / "clip.mp4", pictures(121), sound)
    assert clip.codecs == {"video": "h264", "audio": "aac"}
    assert clip.starts == {"video": 0.0, "audio": 0.0}
    assert clip.fps == 24.0 and clip.rate == 16_000
    assert clip.frames.shape == (121, 64, 96, 3)
    assert clip.durations["video"] == pytest.approx(121 / 24, abs=1e-6)
    assert clip.durations["audio"] == pytest.approx(157 * 512 / 16_000, abs=1e-3)
    assert np.abs(clip.frames - pictures(121).clamp(0, 1).numpy() * 255).mean() < 4
    heard = clip.sound[: sound.shape[1], 0]
    assert np.abs(heard - sound[0].numpy())[2000:-2000].max() < 0.05  # no shift: a sample is 0.09 at this pitch
    assert os.listdir(tmp_path) == ["clip.mp4"]
    video = InputImpl.VideoFromFile(str(tmp_path / "clip.mp4"))
    assert video.get_dimensions() == (96, 64) and video.get_frame_count() == 121 and video.get_frame_rate() == 24


def core_s(path: Path, images: torch.Tensor, audio: dict, crf: float | None) -> graphs.Media:
    """The same clip written by 'Create Video' and 'Save Video'."""
    components = Types.VideoComponents(images=images, audio=audio, frame_rate=Fraction(24))
    InputImpl.VideoFromComponents(components).save_to(str(path), crf=crf)
    return read_media(path.read_bytes())


def encoder_settings(path: Path) -> bytes:
    """What x264 writes about itself at the start of its stream."""
    with av.open(str(path)) as clip:
        packet = bytes(next(clip.demux(video=0)))
    return packet[packet.index(b"x264 - core"):].split(b"\0")[0]


@pytest.mark.parametrize("samples", [16_000, 80_000, 90_000])
def test_file_equals_core_s(tmp_path, samples):
    """Shorter, about equal and longer sound, which is cut. Lossless, as x264 does not repeat itself bit by bit."""
    frames, sound = pictures(49), tone(samples)
    found = written(tmp_path / "ours.mp4", frames, sound, 0.0)
    truth = core_s(tmp_path / "core.mp4", frames, {"waveform": sound[None], "sample_rate": 16_000}, 0.0)
    assert np.array_equal(found.frames, truth.frames) and np.array_equal(found.sound, truth.sound)
    assert (found.starts, found.durations) == (truth.starts, truth.durations)


def test_default_crf_is_what_core_encodes_with(tmp_path):
    default, = (item.default for item in OviDecodeVideo.GET_SCHEMA().inputs if item.id == "crf")
    frames, sound = pictures(9), tone(6000)
    written(tmp_path / "ours.mp4", frames, sound, default)
    core_s(tmp_path / "core.mp4", frames, {"waveform": sound[None], "sample_rate": 16_000}, None)
    assert b"crf=23.0" in encoder_settings(tmp_path / "ours.mp4")
    assert encoder_settings(tmp_path / "ours.mp4") == encoder_settings(tmp_path / "core.mp4")


def test_sound_and_pictures_are_interleaved(tmp_path):
    """Packets of both streams alternate, so that a player need not read ahead."""
    write_mp4(tmp_path / "clip.mp4", pictures(241).split(4), 24, tone(160_000), 16_000, 23.0)
    with av.open(str(tmp_path / "clip.mp4")) as clip:
        times = [(packet.stream.type, float(packet.pts * packet.time_base)) for packet in clip.demux()
                 if packet.pts is not None]
    last = {"video": 0.0, "audio": 0.0}
    for kind, seconds in times:
        last[kind] = max(last[kind], seconds)
        assert abs(last["video"] - last["audio"]) < 1.5


def test_lower_crf_is_larger_and_closer(tmp_path):
    frames = pictures(9).clamp(0, 1)
    sizes, errors = [], []
    for crf in (10.0, 23.0, 40.0):
        clip = written(tmp_path / "clip.mp4", frames, tone(6000), crf)
        sizes.append((tmp_path / "clip.mp4").stat().st_size)
        errors.append(np.abs(clip.frames - frames.numpy() * 255).mean())
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert errors == sorted(errors) and len(set(errors)) == 3


class Stopped(BaseException):
    """Neither an Exception, like ComfyUI's interruption."""


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("error", [ValueError, Stopped])
def test_a_failed_run_leaves_no_file(tmp_path, after, error):
    def pieces():
        yield from pictures(4 * after).split(4) if after else ()
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_mp4(tmp_path / "clip.mp4", pieces(), 24, tone(100_000), 16_000, 23.0)
    assert os.listdir(tmp_path) == []


def test_the_file_appears_only_when_complete(tmp_path):
    seen = []

    def pieces():
        for piece in pictures(80).split(4):
            yield piece
            seen.append(os.listdir(tmp_path))

    write_mp4(tmp_path / "clip.mp4", pieces(), 24, tone(10_000), 16_000, 23.0)
    assert len(seen) == 20 and all(names in ([], ["clip.part"]) for names in seen)
    assert seen[-1] == ["clip.part"], "nothing had been written before the end"
    assert os.listdir(tmp_path) == ["clip.mp4"]


# --- the node ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, batch", [(5, 1), (3, 2)])
def test_node_gives_the_clip_of_the_other_way(vaes, sound_vae, temp, frames, batch):
    latent = joint(frames, batch)
    video = OviDecodeVideo.execute(latent, vaes["wan"], sound_vae, 0.0).args[0]
    assert isinstance(video, InputImpl.VideoFromFile)
    path = Path(video.get_stream_source())
    assert path.parent == temp and os.listdir(temp) == [path.name]
    images, audio = OviDecode.execute(latent, vaes["wan"], sound_vae, 0, 64).args
    found, truth = read_media(path.read_bytes()), core_s(temp / "other.mp4", images, audio, 0.0)
    assert found.frames.shape == (batch * (4 * frames - 3), 64, 96, 3)
    assert np.array_equal(found.sound, truth.sound) and found.durations == truth.durations
    different = (found.frames != truth.frames).mean()
    assert different == 0 if batch == 1 else different < 1e-3  # core decodes clips side by side: rounding


def test_two_runs_do_not_share_a_file(vaes, sound_vae, temp):
    paths = [OviDecodeVideo.execute(joint(1), vaes["taehv"], sound_vae, 23.0).args[0].get_stream_source()
             for _ in range(2)]
    assert len(set(paths)) == len(os.listdir(temp)) == 2


def test_node_refuses_what_does_not_fit(vaes, sound_vae, temp):
    with pytest.raises(ValueError, match="'Ovi Decode to Video' needs a joint video and audio latent"):
        OviDecodeVideo.execute({"samples": latents(2)}, vaes["wan"], sound_vae, 23.0)
    with pytest.raises(ValueError, match="16 latent channels, but Ovi needs the Wan2"):
        other = wan_vae.settings(torch.float32)
        other.latent_channels = 16
        OviDecodeVideo.execute(joint(2), other, sound_vae, 23.0)
    with pytest.raises(ValueError, match="no MMAudio VAE; connect the output of 'Load Ovi Audio VAE'"):
        OviDecodeVideo.execute(joint(2), vaes["wan"], vaes["wan"], 23.0)
    assert not temp.exists()


def test_an_interrupted_node_leaves_no_file_and_no_memory(vaes, sound_vae, temp):
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
    assert len(calls) == 9 and os.listdir(temp) == []


@pytest.mark.usefixtures("temp")
def test_progress_reaches_the_end(vaes, sound_vae, monkeypatch):
    seen = []
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    monkeypatch.setattr("comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    OviDecodeVideo.execute(joint(3, batch=2), vaes["taehv"], sound_vae, 23.0)
    assert [value for value, total in seen if total == 18] == [1, 5, 9, 10, 14, 18]


@pytest.mark.usefixtures("temp")
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


# --- in a real server -------------------------------------------------------------------------------------------------


LOSSLESS = {"codec": "h264", "codec.encoding": "re-encode", "codec.encoding.crf": 0.0}  # for frames


def to_video(graph: dict, latent: str = "sampler", crf: float = 23.0) -> dict:
    """`graph` with 'Ovi Decode to Video' as "straight", saved by "copy"."""
    return graph | {
        "straight": node("OviDecodeVideo", latent=[latent, 0], video_vae=["vae", 0], audio_vae=["audio_vae", 0],
                         crf=crf),
        "copy": node("SaveVideo", video=["straight", 0], filename_prefix="straight", format="auto", codec="auto"),
    }


def video_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as clip:
        return [bytes(packet) for packet in clip.demux(video=0)]


def test_saved_clip_has_the_frames_of_the_other_way_and_the_workflow(comfy_client, comfy_server, tmp_path):
    graph = save_clip(decode(change(text_to_av(), latent={"seconds": 1.0, "frames": 0})))
    graph = to_video(change(graph, save=LOSSLESS), crf=0.0)
    workflow = {"nodes": [], "links": [], "version": 0.4}
    run = comfy_client.run(graph, workflow)
    assert {"straight", "copy", "save"} <= set(executed(run))
    found, truth = (read_media(files(comfy_client, run, name)[0]) for name in ("copy", "save"))
    assert found.codecs == {"video": "h264", "audio": "aac"} and found.starts == {"video": 0.0, "audio": 0.0}
    assert found.frames.shape == (25, 64, 96, 3) and found.frames.std(axis=(1, 2, 3)).min() > 10
    assert np.array_equal(found.frames, truth.frames) and np.array_equal(found.sound, truth.sound)
    assert found.durations == truth.durations

    (tmp_path / "saved.mp4").write_bytes(files(comfy_client, run, "copy")[0])
    with av.open(str(tmp_path / "saved.mp4")) as saved:
        assert json.loads(saved.metadata["workflow"]) == workflow
        assert set(json.loads(saved.metadata["prompt"])) == set(graph)
    made = max((comfy_server.base / "temp").glob("ovi_*.mp4"), key=lambda path: path.stat().st_mtime)
    assert video_packets(made) == video_packets(tmp_path / "saved.mp4"), "'Save Video' encoded it again"


def test_interrupt_on_the_server(comfy_client, comfy_server):
    temp = comfy_server.base / "temp"
    before = set(temp.glob("ovi_*"))
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
    assert set(temp.glob("ovi_*")) == before
    again = comfy_client.run(to_video(text_to_av()))
    assert read_media(files(comfy_client, again, "copy")[0]).frames.shape == (9, 64, 96, 3)
