"""What cannot be decoded is a sentence in both decode nodes, and what is odd about a clip is said on them."""

import math

import comfy.sd
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from devlib.graphs import change, decode, files, node, save_clip, text_of, text_to_av
from devlib.media import read_media
from ovi_native.nodes.decode import OviDecode, OviDecodeVideo
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from tiny import wan_vae
from tiny.video_vae import video_vae

BAD_LATENT = r"values in the {}'s latent are not finite \(NaN or infinite\).*computes in fp16, a damaged or mismatched"
BAD_OUTPUT = r"The decoded {} holds values that are not finite.*--bf16-vae or --fp32-vae"


@pytest.fixture(scope="module")
def vae() -> comfy.sd.VAE:
    return comfy.sd.VAE(sd=video_vae(0))


def joint(frames: int = 3, audio: int | None = None, batch: int = 1) -> dict:
    audio = GEOMETRY.audio_latents_for(frames) if audio is None else audio
    return {"samples": NestedTensor((wan_vae.latents(frames, batch), torch.randn(batch, 20, audio)))}


def frames(latent, vae, sound_vae, **inputs):
    return OviDecode.execute(latent, vae, sound_vae, **({"tile_size": 0, "tile_frames": 64} | inputs))


def straight(latent, vae, sound_vae, crf: float = 23.0):
    return OviDecodeVideo.execute(latent, vae, sound_vae, crf)


both = pytest.mark.parametrize("run", [frames, straight])


def said(output) -> list[str]:
    return output.ui.as_dict()["text"][0].splitlines()


# --- not finite -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stream, name", [(0, "picture"), (1, "sound")])
def test_a_latent_that_is_not_finite(vae, sound_vae, run, value, stream, name):
    """One value, in the last clip; nothing has been decoded when it is found."""
    latent = joint(batch=2)
    latent["samples"].unbind()[stream][1].view(-1)[-1] = value
    hook = vae.first_stage_model.register_forward_pre_hook(lambda *_: pytest.fail("it was decoded"))
    try:
        with pytest.raises(ValueError, match=r"got a latent .*: 1 of .*" + BAD_LATENT.format(name)):
            run(latent, vae, sound_vae)
    finally:
        hook.remove()


@pytest.mark.parametrize("run, value", [(frames, math.nan), (straight, math.nan), (straight, math.inf)])
def test_a_video_vae_that_overflows(sound_vae, run, value):
    """In the second clip only. Core clamps infinities before 'Ovi Decode' sees them; the streaming looks first."""
    broken, calls = wan_vae.small_vae(), []

    def spoil(_, __, out):
        calls.append(1)
        if run is frames or len(calls) == 5:
            out[..., 0, 0] = value

    broken.first_stage_model.decoder.head[-1].register_forward_hook(spoil)
    with pytest.raises(ValueError, match=BAD_OUTPUT.format("picture")):
        run(joint(batch=2), broken, sound_vae)


@both
def test_an_audio_vae_that_overflows(vae, sound_vae, run):
    hook = sound_vae.first_stage_model.vocoder.register_forward_hook(lambda _, __, out: out * math.nan)
    try:
        with pytest.raises(ValueError, match=BAD_OUTPUT.format("sound")):
            run(joint(), vae, sound_vae)
    finally:
        hook.remove()


# --- empty, mismatched, out of range ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("video, audio, match", [
    ((1, 48, 0, 4, 6), (1, 20, 4), "empty joint latent, .1, 48, 0, 4, 6. and .1, 20, 4."),
    ((0, 48, 2, 4, 6), (0, 20, 4), "empty joint latent"), ((1, 48, 2, 0, 6), (1, 20, 4), "empty joint latent"),
    ((1, 48, 2, 4, 6), (1, 20, 0), "empty joint latent"),
    ((2, 48, 2, 4, 6), (1, 20, 6), "2 clips of picture but 1 of sound"),
    ((1, 48, 2, 4, 6), (3, 20, 6), "1 clips of picture but 3 of sound"),
    ((1, 16, 2, 4, 6), (1, 20, 6), "needs a joint latent"), ((1, 48, 4, 6), (1, 20, 6), "needs a joint latent"),
    ((1, 48, 2, 4, 6), (1, 8, 4, 6), "needs a joint latent"), ((1, 48, 2, 4, 6), (1, 40, 6), "needs a joint latent"),
])
def test_latents_that_cannot_be_decoded(vae, sound_vae, run, video, audio, match):
    with pytest.raises(ValueError, match=match):
        run({"samples": NestedTensor((torch.zeros(video), torch.zeros(audio)))}, vae, sound_vae)


@pytest.mark.parametrize("crf", [math.nan, math.inf, -math.inf, -1.0, 51.5])
def test_a_crf_that_x264_does_not_know(vae, sound_vae, crf):
    with pytest.raises(ValueError, match=rf"crf is {crf}, but x264's quality goes from 0 \(lossless\) to 51"):
        straight(joint(), vae, sound_vae, crf)


# --- said on the node -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("extra, warning", [
    (0, ""), (1, ""), (2, ""),
    (3, "the sound 0.45 s: a video file ends with the picture and leaves 0.07 s of sound out."),
    (40, "the sound 1.63 s: a video file ends with the picture and leaves 1.26 s of sound out."),
    (-1, "the sound 0.32 s: a video file has no sound for the last 0.05 s."),
    (-5, "the sound 0.19 s: a video file has no sound for the last 0.18 s."),
])
def test_lengths_that_differ_are_said(vae, sound_vae, run, extra, warning):
    text = said(run(joint(3, audio=GEOMETRY.audio_latents_for(3) + extra), vae, sound_vae))
    warnings = [line for line in text if line.startswith("⚠")]
    assert len(warnings) == bool(warning)
    if warning:
        assert warnings[0].startswith(f"⚠ The picture lasts 0.38 s, {warning} 'Ovi Fit Sound Latent'")
    assert text[-1].startswith("96x64, 9 frames at 24 per second = 0.38 s, sound ")


@pytest.mark.parametrize("tile_size, tile_frames, expected", [
    (0, 64, []), (64, 64, []), (512, 8, []), (0, 32, ["tile_frames has no effect while tile_size is 0."]),
    (32, 64, ["tile_size 32 became 64: at least 64 pixels, in steps of 16."]),
    (100, 13, ["tile_size 100 became 96: at least 64 pixels, in steps of 16.",
               "tile_frames 13 became 12: at least 8, in steps of 4."]),
])
def test_tile_sizes_that_are_changed_or_not_used(vae, sound_vae, monkeypatch, tile_size, tile_frames, expected):
    used = {}
    tiled = comfy.sd.VAE.decode_tiled
    monkeypatch.setattr(comfy.sd.VAE, "decode_tiled", lambda self, samples, **sizes: (
        used.update(sizes), tiled(self, samples, **sizes))[1])
    text = said(frames(joint(), vae, sound_vae, tile_size=tile_size, tile_frames=tile_frames))
    assert [line.removeprefix("⚠ ") for line in text[:-1]] == expected
    for key, asked, unit in (("tile_x", tile_size, 16), ("tile_t", tile_frames, 4)):
        if tile_size and f"became {used[key] * unit}:" not in " ".join(text):
            assert used[key] * unit == asked, "changed without a word"


def test_a_batch_is_described_clip_by_clip(vae, sound_vae):
    assert said(frames(joint(batch=2), vae, sound_vae))[-1].startswith("2 clips, each 96x64, 9 frames")


def with_other_sound(frames: int, sound_frames: int) -> dict:
    """A sampled picture of `frames` and the sound of a latent of `sound_frames`, joined as "joined"."""
    graph = change(text_to_av(), latent={"frames": frames})
    graph["other"] = change(graph, latent={"frames": sound_frames})["latent"]
    return graph | {
        "picture": node("LTXVSeparateAVLatent", av_latent=["latent", 0]),
        "sound": node("LTXVSeparateAVLatent", av_latent=["other", 0]),
        "joined": node("LTXVConcatAVLatent", video_latent=["picture", 0], audio_latent=["sound", 1]),
    }


@pytest.mark.parametrize("frames, sound_frames", [(9, 49), (49, 9)])
def test_lengths_on_a_server_before_and_after_fitting(comfy_client, frames, sound_frames):
    graph = save_clip(decode(with_other_sound(frames, sound_frames), "joined"))
    run = comfy_client.run(graph)
    lengths = f"⚠ The picture lasts {frames / 24:.2f} s, the sound "
    assert text_of(run, "decode").startswith(lengths)

    graph["fit"] = node("OviFitSoundLatent", latent=["joined", 0])
    run = comfy_client.run(change(graph, decode={"latent": ["fit", 0]}, clip_out={"fps": ["decode", 2]}))
    assert "⚠" not in text_of(run, "decode")
    assert ("were cut" if frames < sound_frames else "were added") in text_of(run, "fit")
    clip = read_media(files(comfy_client, run, "save")[0])
    assert clip.fps == 24.0 and abs(clip.durations["video"] - clip.durations["audio"]) < 0.025
