"""The nodes in a real ComfyUI server: from a prompt or a picture to an mp4, alone and among stock nodes."""

import io

import numpy as np
import pytest
import torch
import torchaudio
from devlib import graphs
from devlib.client import RejectedError
from devlib.graphs import (
    change,
    decode,
    files,
    image_to_av,
    node,
    run_latents,
    run_media,
    save_clip,
    save_latents,
    save_media,
    stock_sampler,
    text_of,
    text_to_av,
)
from devlib.media import read_media
from devlib.weights import TINY
from PIL import Image
from safetensors.torch import load_file

FIVE_SECONDS = {"width": 96, "height": 64, "seconds": 5.0, "frames": 0}


def clip_of(client, graph):
    """The mp4 that a graph ends in, decoded."""
    run = client.run(save_clip(decode(graph)))
    return read_media(files(client, run, "save")[0])


def mean_difference(a, b) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


# --- prompt to mp4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph, latent, frames, sound_seconds", [
    (text_to_av(), FIVE_SECONDS, 121, 157 * 512 / 16_000), (image_to_av(), {}, 9, 11 * 512 / 16_000)],
    ids=["text", "image"])
def test_clip_has_h264_video_and_aac_sound(comfy_client, graph, latent, frames, sound_seconds):
    clip = clip_of(comfy_client, change(graph, latent=latent))
    assert clip.codecs == {"video": "h264", "audio": "aac"}
    assert clip.starts == {"video": 0.0, "audio": 0.0}
    assert clip.fps == 24.0 and clip.rate == 16_000
    assert clip.frames.shape == (frames, 64, 96, 3)
    assert clip.durations["video"] == pytest.approx(frames / 24, abs=1e-3)
    assert clip.durations["audio"] == pytest.approx(sound_seconds, abs=1e-3)
    assert abs(clip.durations["video"] - clip.durations["audio"]) < 1 / 24
    # Something to see in every frame, something to hear in every 100 ms.
    assert clip.frames.std(axis=(1, 2, 3)).min() > 10
    pieces = clip.sound[: int(sound_seconds * 10) * 1600].reshape(-1, 1600)
    assert pieces.std(axis=1).min() > 0.01 and np.abs(clip.sound).max() <= 1.0
    assert mean_difference(clip.frames[0], clip.frames[-1]) > 5


def test_frames_come_from_the_video_latent_and_sound_from_the_audio_latent(comfy_client):
    other = {"other": {**text_to_av()["sampler"], "inputs": {**text_to_av()["sampler"]["inputs"], "seed": 8}}}
    mixed = text_to_av() | other | {
        "one": node("LTXVSeparateAVLatent", av_latent=["sampler", 0]),
        "two": node("LTXVSeparateAVLatent", av_latent=["other", 0]),
        "mix": node("LTXVConcatAVLatent", video_latent=["one", 0], audio_latent=["two", 1]),
    }
    frames, sound = run_media(comfy_client, save_media(decode(text_to_av())))
    other_frames, other_sound = run_media(comfy_client, save_media(decode(mixed, "other")))
    mixed_frames, mixed_sound = run_media(comfy_client, save_media(decode(mixed, "mix")))
    assert mean_difference(frames, other_frames) > 5 and mean_difference(sound, other_sound) > 0.01
    assert np.array_equal(mixed_frames, frames)
    assert np.array_equal(mixed_sound, other_sound)


def test_first_frame_stays_the_picture(comfy_client):
    graph = image_to_av()
    start, end = run_latents(comfy_client, graph, "first"), run_latents(comfy_client, graph)
    torch.testing.assert_close(end.video[:, :, 0], start.video[:, :, 0], rtol=0, atol=1e-5)
    assert not torch.allclose(end.video[:, :, 1], start.video[:, :, 1], atol=0.5)

    frames, _ = run_media(comfy_client, save_media(decode(graph)))
    there_and_back = graph | {
        "encoded": node("VAEEncode", pixels=["first", 3], vae=["vae", 0]),
        "decoded": node("VAEDecode", samples=["encoded", 0], vae=["vae", 0]),
        "frames": node("SaveImage", images=["decoded", 0], filename_prefix="frames"),
    }
    picture = Image.open(io.BytesIO(files(comfy_client, comfy_client.run(there_and_back), "frames")[0]))
    assert mean_difference(frames[0], np.asarray(picture)) < 1
    assert mean_difference(frames[4], np.asarray(picture)) > 10


@pytest.mark.parametrize("straight", [False, True])
def test_a_batch_becomes_one_file_a_clip(comfy_client, straight):
    """Each with the picture and the sound of its own clip, as it is alone."""
    pair = change(text_to_av(), latent={"batch_size": 2})
    second = pair | {"second": node("OviSelectClips", latent=["sampler", 0], first_clip=1, clips=1)}

    def clips(graph, source):
        if straight:
            graph = graph | {"decode": node("OviDecodeVideo", latent=[source, 0], video_vae=["vae", 0],
                                            audio_vae=["audio_vae", 0], crf=23.0),
                             "save": node("SaveVideo", video=["decode", 0], filename_prefix="clips", format="auto",
                                          codec="auto")}
        else:
            graph = save_clip(decode(graph, source))
        return [read_media(file) for file in files(comfy_client, comfy_client.run(graph), "save")]

    first, other = clips(pair, "sampler")
    alone, = clips(second, "second")
    assert first.frames.shape == other.frames.shape == alone.frames.shape == (9, 64, 96, 3)
    assert other.durations == alone.durations and first.durations == alone.durations
    assert mean_difference(other.frames, alone.frames) < 1 < 5 < mean_difference(first.frames, other.frames)
    assert mean_difference(other.sound, alone.sound) < 1e-4 < mean_difference(first.sound, other.sound)


@pytest.mark.parametrize("asked, frames, height, width, audio", [
    ({"width": 110, "height": 75, "frames": 10}, 9, 64, 96, 11),
    ({"width": 32, "height": 32, "frames": 1}, 1, 32, 32, 1),
    ({"width": 32, "height": 130, "frames": 0, "seconds": 0.2}, 5, 128, 32, 6)])
def test_odd_sizes_are_snapped_and_run(comfy_client, asked, frames, height, width, audio):
    run = comfy_client.run(save_clip(decode(change(text_to_av(), latent=asked, sampler={"steps": 1}))))
    clip = read_media(files(comfy_client, run, "save")[0])
    assert clip.frames.shape == (frames, height, width, 3)
    assert clip.durations["audio"] == pytest.approx(audio * 512 / 16_000, abs=1e-3)
    assert f"{width}x{height}, {frames} frames" in text_of(run, "latent")


def test_workflows_saved_with_the_former_sizes_run(comfy_client):
    def asking(aspect):
        return {"latent": node("OviEmptyLatent", variant="720x720_5s", aspect=aspect, width=1280, height=704,
                               seconds=5.0, frames=0, batch_size=1),
                "show": node("PreviewAny", source=["latent", 1])}

    assert "992x512, 121 frames" in text_of(comfy_client.run(asking("992x512 (720 wide)")), "latent")
    with pytest.raises(RejectedError, match=r"Unknown aspect '16:10': expected one of 16:9 wide"):
        comfy_client.run(asking("16:10"))


# --- among stock nodes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, denoise", [("unipc", 1.0), ("dpm++", 1.0), ("euler", 0.5)])
def test_sampler_equals_its_parts_under_the_stock_sampler(comfy_client, solver, denoise):
    settings = {"solver": solver, "denoise": denoise}
    whole = run_latents(comfy_client, change(text_to_av(), sampler={"steps": 3, **settings}))
    parts = change(stock_sampler(), solver={"solver": solver}, sigmas={"steps": 3, **settings})
    graphs.assert_equal(run_latents(comfy_client, parts), whole)


def test_plain_ksampler_with_our_conditioning(comfy_client):
    graph = graphs.k_sampler()
    plain = run_latents(comfy_client, graph)
    assert plain.video.shape == (1, 48, 3, 4, 6) and plain.audio.shape == (1, 20, 11)
    assert plain.video.isfinite().all() and plain.audio.isfinite().all()
    other = run_latents(comfy_client, change(graph, prompt={"audio_negative": "a loud crowd"}))
    assert not torch.equal(other.audio, plain.audio)

    one_step = change(graph, sampler={"steps": 1})
    guided = one_step | {"guided": node("OviAudioGuidance", model=["model", 0], audio_guidance=4.0)}
    plain = run_latents(comfy_client, one_step)
    same = run_latents(comfy_client, change(guided, sampler={"model": ["guided", 0]}))
    torch.testing.assert_close(same.audio, plain.audio, rtol=0, atol=1e-4)
    louder = run_latents(comfy_client, change(guided, sampler={"model": ["guided", 0]}, guided={"audio_guidance": 1.5}))
    assert torch.equal(louder.video, plain.video) and not torch.allclose(louder.audio, plain.audio, atol=0.1)


def test_skip_layer_node_equals_the_samplers_own(comfy_client):
    whole = run_latents(comfy_client, text_to_av())
    graph = stock_sampler() | {
        "skip": node("OviSkipLayer", conditioning=["prompt", 1], skip_layer=2),
        "guided": node("OviAudioGuidance", model=["model", 0], audio_guidance=3.0),
        "guider": node("CFGGuider", model=["guided", 0], positive=["prompt", 0], negative=["skip", 0], cfg=4.0),
    }
    graphs.assert_equal(run_latents(comfy_client, graph), whole)


def test_stock_decoders(comfy_client):
    stock = text_to_av() | {
        "split": node("LTXVSeparateAVLatent", av_latent=["sampler", 0]),
        "video": node("VAEDecode", samples=["split", 0], vae=["vae", 0]),
        "audio": node("VAEDecodeAudio", samples=["split", 1], vae=["audio_vae", 0]),
    }
    frames, sound = run_media(comfy_client, save_media(decode(text_to_av())))
    stock_frames, stock_sound = run_media(comfy_client, save_media(stock, ["video", 0], ["audio", 0]))
    assert np.array_equal(frames, stock_frames)
    # Core resamples to 44.1 kHz and changes the loudness; below that it is the same sound.
    same_rate = torchaudio.functional.resample(torch.tensor(stock_sound[:, 0]), 44_100, 16_000)[: len(sound)]
    assert len(same_rate) == pytest.approx(len(sound), abs=2)
    assert np.corrcoef(same_rate, sound[: len(same_rate), 0])[0, 1] > 0.99


def test_decoding_straight_to_video(comfy_client):
    graph = change(text_to_av(), latent={"frames": 21}) | {
        "straight": node("OviDecodeVideo", latent=["sampler", 0], video_vae=["vae", 0], audio_vae=["audio_vae", 0],
                         crf=23.0),
        "save": node("SaveVideo", video=["straight", 0], filename_prefix="straight", format="auto", codec="auto"),
    }
    frames, sound = run_media(comfy_client, save_media(decode(graph)))
    usual = clip_of(comfy_client, graph)
    clip = read_media(files(comfy_client, comfy_client.run(graph), "save")[0])
    assert clip.codecs == {"video": "h264", "audio": "aac"} and clip.starts == {"video": 0.0, "audio": 0.0}
    assert (clip.fps, clip.rate, clip.frames.shape) == (24.0, 16_000, (21, 64, 96, 3))
    assert clip.durations["video"] == pytest.approx(21 / 24, abs=1e-3)
    assert clip.durations["audio"] == pytest.approx(len(sound) / 16_000, abs=1e-3)
    assert mean_difference(clip.frames, usual.frames) < 12  # of noise, encoded twice, with two colour matrices
    assert mean_difference(clip.frames, np.roll(frames, 10, axis=0)) > 20
    assert np.corrcoef(clip.sound[: len(sound), 0], sound[:, 0])[0, 1] > 0.8  # aac


def test_tiled_decoding_is_close_and_equals_the_stock_one(comfy_client):
    graph = change(text_to_av(), latent={"width": 256, "frames": 17}, sampler={"steps": 1})
    frames, sound = run_media(comfy_client, save_media(decode(graph)))
    tiled, tiled_sound = run_media(comfy_client, save_media(decode(graph, tile_size=192, tile_frames=16)))
    stock = decode(graph, tile_size=192, tile_frames=16) | {
        "split": node("LTXVSeparateAVLatent", av_latent=["sampler", 0]),
        "tiles": node("VAEDecodeTiled", samples=["split", 0], vae=["vae", 0], tile_size=192, overlap=48,
                      temporal_size=16, temporal_overlap=8),
    }
    stock_frames, _ = run_media(comfy_client, save_media(stock, ["tiles", 0]))
    assert np.array_equal(tiled_sound, sound)
    assert tiled.shape == frames.shape == (17, 64, 256, 3)
    assert np.array_equal(tiled, stock_frames)
    # The random VAE sees far: its tiles differ near their edges, but nowhere else.
    assert np.corrcoef(tiled.ravel(), frames.ravel())[0, 1] > 0.9
    assert mean_difference(tiled[:, :, :48], frames[:, :, :48]) < 2
    assert mean_difference(tiled, frames) > 0


def test_wan_text_encoder_with_a_chosen_tokenizer(comfy_client, tiny_models):
    weights = load_file(tiny_models / "text_encoders" / TINY["text_encoder"])
    pieces = weights.pop("spiece_model").numpy().tobytes()
    wan = change(text_to_av(), clip={"text_encoder_name": "wan.pth", "tokenizer_name": "other/pieces.model"})
    with graphs.added(tiny_models, {"text_encoders/wan.pth": graphs.wan_layout(weights),
                                    "text_encoders/other/pieces.model": pieces}):
        found = run_latents(comfy_client, wan)
    graphs.assert_equal(found, run_latents(comfy_client, text_to_av()))


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_come_in_order_with_progress_for_each_step(comfy_client):
    graphs.forget(comfy_client)
    run = comfy_client.run(save_latents(change(text_to_av(), sampler={"steps": 4})))
    assert run.status == "success"
    kinds = [kind for _, kind, _ in run.events if kind not in ("status", "progress_state", "preview")]
    assert kinds[0] == "execution_start" and kinds[-1] == "execution_success"
    assert all(data["prompt_id"] == run.prompt_id for _, kind, data in run.events if kind in kinds)
    order = graphs.executed(run)
    assert set(order) == set(save_latents(text_to_av())) - {"vae", "audio_vae"}  # what nothing needs is not loaded
    for before, after in (("model", "sampler"), ("clip", "prompt"), ("prompt", "sampler"), ("latent", "sampler"),
                          ("sampler", "separate"), ("separate", "video_latent"), ("separate", "audio_latent")):
        assert order.index(before) < order.index(after)

    steps = [data for data in run.of("progress") if data["node"] == "sampler"]
    assert [(data["value"], data["max"]) for data in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    sequence = [data["node"] for _, kind, data in run.events if kind in ("executing", "progress") and data.get("node")]
    first = sequence.index("sampler")
    assert sequence[first : first + 5] == ["sampler"] * 5 and "sampler" not in sequence[first + 5 :]
    shown = {data["node"] for data in run.of("executed")}
    assert shown == {"model", "prompt", "latent", "sampler", "video_latent", "audio_latent"}


def test_previews_arrive_for_each_step(comfy_client):
    """With latent2rgb: a JPEG per step, of the shape of the clip, that changes as the clip does."""
    run = comfy_client.run(save_latents(change(text_to_av(), sampler={"steps": 4, "seed": 70})))
    pictures = [Image.open(io.BytesIO(data[8:])) for data in run.of("preview") if data[:4] == b"\0\0\0\1"]
    assert len(pictures) == 4 and {picture.format for picture in pictures} == {"JPEG"}
    assert {picture.size for picture in pictures} == {(512, 341)}  # 6x4 latent pixels, enlarged
    pixels = [np.asarray(picture) for picture in pictures]
    assert all(image.std() > 5 for image in pixels)
    assert mean_difference(pixels[0], pixels[-1]) > 2


def test_nodes_show_what_they_decided_on_themselves(comfy_client):
    graph = change(text_to_av(), latent={"seconds": 3.3})  # makes the node run; frames decides
    run = comfy_client.run(save_latents(graph))
    texts = [data[4:] for data in run.of("preview") if data[:4] == b"\0\0\0\3"]  # length of the id, the id, the text
    reports = {text[4 : 4 + int.from_bytes(text[:4], "big")]: text[4 + int.from_bytes(text[:4], "big") :]
               for text in texts}
    assert "96x64, 9 frames" in reports[b"latent"].decode()
    assert reports[b"latent"].decode() == text_of(run, "latent")
