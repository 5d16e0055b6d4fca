"""Ovi Empty Latent, Ovi First Frame and Ovi Prompt, run as ComfyUI runs them, on real (tiny) encoders."""

import copy

import comfy.latent_formats
import comfy.sd
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from ovi_native.nodes.latents import OviEmptyLatent, OviFirstFrame
from ovi_native.nodes.prompt import OviPrompt
from ovi_native.ovi_model.files.disk import write_atomically
from ovi_native.ovi_model.files.safetensors_file import safetensors_chunks
from ovi_native.ovi_model.media import audio_vae, images
from ovi_native.ovi_model.ovi import variants
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from ovi_native.ovi_model.text import umt5
from support.embeddings import encode
from tiny import audio
from tiny.audio import vocoder
from tiny.text_encoder import text_encoder
from tiny.video_vae import video_vae


@pytest.fixture(scope="module")
def vae():
    """The 48-channel tiny video VAE of the demo bundle."""
    return comfy.sd.VAE(sd=video_vae(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The tiny UMT5 of the demo bundle, through the pack's loader."""
    path = tmp_path_factory.mktemp("text") / "umt5.safetensors"
    write_atomically(path, safetensors_chunks(text_encoder(0), {}))
    return umt5.load_text_encoder(str(path))


def empty(**options):
    """Outputs and shown text of Ovi Empty Latent, at its defaults but for the options."""
    options = {"variant": "960x960_5s", "aspect": "16:9 wide", "width": 1280, "height": 704, "seconds": 0.0,
               "frames": 0, "batch_size": 1, **options}
    return run(OviEmptyLatent, **options)


def run(node, **inputs):
    output = node.execute(**inputs)
    return output.args, output.ui.as_dict()["text"][0]


def tiny_latent(**options):
    return empty(aspect="custom", width=96, height=64, frames=9, **options)[0][0]


def shapes(samples):
    return [list(stream.shape) for stream in samples.unbind()]


# --- Ovi Empty Latent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, seconds, latent_frames, audio", [
    ("720x720_5s", 0.0, 31, 157), ("960x960_5s", 5.0, 31, 157), ("960x960_10s", 0.0, 61, 314),
    ("960x960_10s", 10.0, 61, 314), ("960x960_5s", 1.0, 7, 32)])
def test_empty_latent_is_a_joint_pair_of_zeros(variant, seconds, latent_frames, audio):
    options = {"aspect": "custom", "width": 64, "height": 96}
    (latent, width, height, frames, fps), _ = empty(variant=variant, seconds=seconds, **options)
    assert set(latent) == {"samples", "ovi_variant"} and latent["ovi_variant"] == variant
    assert isinstance(latent["samples"], NestedTensor)
    assert shapes(latent["samples"]) == [[1, 48, latent_frames, 6, 4], [1, 20, audio]]
    assert all(not stream.any() for stream in latent["samples"].unbind())
    assert (width, height, frames) == (64, 96, 4 * latent_frames - 3)
    assert fps == 24.0 and isinstance(fps, float)


def test_trained_length_and_size_give_no_warning():
    (_, width, height, frames, _), text = empty()
    assert (width, height, frames) == (1280, 704, 121)
    assert "5.04 s" in text and "sound 5.02 s" in text and "27,437 tokens" in text
    assert "⚠" not in text


def test_frames_take_the_place_of_seconds_and_snap():
    (latent, *_, frames, _), text = empty(aspect="custom", width=64, height=64, frames=10, seconds=5.0)
    assert frames == 9 and shapes(latent["samples"])[0][2] == 3
    assert "⚠ 9 frames: 960x960_5s was trained on 121" in text


def test_the_memory_of_a_step_is_said_and_warned_of(monkeypatch):
    _, text = empty()
    assert "A step needs about 2.3 GB beside the model" in text and "⚠" not in text
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda _: 2 << 30)
    _, text = empty()
    assert "⚠ A step needs about 2.3 GB beside the model, but this machine's CPU has 2.1 GB: lower" in text
    _, text = empty(seconds=60.0)  # sampled in windows
    assert "about 2.3 GB beside" in text


def test_batch_size():
    assert shapes(tiny_latent(batch_size=3)["samples"]) == [[3, 48, 3, 4, 6], [3, 20, 11]]


@pytest.mark.parametrize("variant, aspect, size", [
    ("720x720_5s", "16:9 wide", (960, 544)), ("960x960_5s", "16:9 wide", (1280, 704)),
    ("720x720_5s", "9:16 tall", (544, 960)), ("960x960_10s", "9:16 tall", (704, 1280)),
    ("720x720_5s", "1:1 square", (704, 704)), ("960x960_5s", "1:1 square", (960, 960)),
    ("720x720_5s", "4:3 wide", (832, 640)), ("960x960_5s", "3:4 tall", (832, 1120)),
    ("720x720_5s", "5:2 ultra-wide", (1152, 448)), ("960x960_5s", "5:2 ultra-wide", (1504, 608))])
def test_a_shape_gets_its_size_from_the_variant(variant, aspect, size):
    (_, width, height, *_), text = empty(variant=variant, aspect=aspect)
    assert (width, height) == size
    assert "became" not in text and "⚠" not in text


@pytest.mark.parametrize("variant, frames", [("960x960_5s", 121), ("960x960_10s", 241)])
def test_the_length_follows_the_variant_unless_it_is_set(variant, frames):
    defaults = {item.id: item.default for item in OviEmptyLatent.define_schema().inputs}
    (_, _, _, made, _), text = run(OviEmptyLatent, **{**defaults, "variant": variant})
    assert made == frames and "⚠" not in text
    (_, _, _, made, _), _ = empty(variant=variant, seconds=5.0)  # as workflows were saved before
    assert made == 121


@pytest.mark.parametrize("variant, aspect, size", [
    ("720x720_5s", "720x720 (720 square)", (704, 704)), ("720x720_5s", "960x512 (720 wide)", (992, 512)),
    ("720x720_5s", "1280x704 (960 wide)", (960, 544)), ("960x960_5s", "1120x448 (720 ultra-wide)", (1504, 608))])
def test_presets_of_saved_workflows_make_what_they_made(variant, aspect, size):
    (_, width, height, *_), text = empty(variant=variant, aspect=aspect, frames=5)
    assert (width, height) == size
    assert f"{aspect.split()[0]} became {size[0]}x{size[1]}" in text
    assert OviEmptyLatent.validate_inputs(aspect) is True


def test_custom_size_is_snapped_but_not_scaled():
    (_, width, height, *_), text = empty(aspect="custom", width=300, height=200, frames=5)
    assert (width, height) == (288, 192)
    assert "300x200 became 288x192" in text
    assert "⚠ 288x192 is 6% of the area" in text


def test_custom_ratio_is_scaled_to_the_variant():
    (_, width, height, *_), text = empty(aspect="custom ratio", width=300, height=200, frames=5)
    assert (width, height) == (1184, 768)
    assert "of the area 960x960_5s was trained" not in text


@pytest.mark.parametrize("options, message", [
    ({"aspect": "4:3"}, "Unknown aspect '4:3': expected one of 16:9 wide, 9:16 tall, "),
    ({"variant": "big"}, "Unknown Ovi variant 'big'"),
    ({"aspect": "custom", "width": 0}, "0x704"), ({"seconds": -1.0}, "above 0 seconds"), ({"frames": -4}, "above 0"),
    ({"seconds": float("inf")}, "at most 120, got inf"), ({"seconds": float("nan")}, "got nan"),
    ({"seconds": 1e9}, "at most 120"), ({"frames": 10**9}, "at most 2881"),
    ({"batch_size": 0}, "batch_size goes from 1"), ({"batch_size": 1000}, "got 1000"),
    ({"aspect": "custom", "width": 10**6}, "width goes from 1 to 8192"),
    ({"aspect": "custom", "width": 8192, "height": 8192, "seconds": 120.0},
     "47,251,456 tokens, but at most 20,000,000"),
    ({"aspect": "custom", "width": 8192, "height": 8192},
     "1 x 8192x8192 would need about 175 GB of GPU memory in every step"),
    ({"batch_size": 64}, "64 x 1280x704 would need about 150.* GB of GPU memory in every step.* or batch_size"),
    ({"aspect": "custom ratio", "width": 6000, "height": 20}, "6000x20 would become a clip of 16640x64 pixels"),
])
def test_bad_values_from_the_api_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        empty(**options)


# --- Ovi First Frame --------------------------------------------------------------------------------------------------


def first_frame(vae, image, **options):
    return run(OviFirstFrame, **{"vae": vae, "image": image, "variant": "960x960_5s", "resize": "crop", **options})


def picture(count=1, height=50, width=80, channels=3):
    generator = torch.Generator().manual_seed(count)
    return torch.rand((count, height, width, channels), generator=generator)


def test_first_frame_is_the_encoded_image_and_the_rest_normalises_to_zero(vae):
    (latent, width, height, image, _), text = first_frame(vae, picture(), latent=tiny_latent())
    video, audio = latent["samples"].unbind()
    assert (width, height) == (96, 64) and image.shape == (1, 64, 96, 3)
    assert shapes(latent["samples"]) == [[1, 48, 3, 4, 6], [1, 20, 11]]
    frame = images.center_crop(images.to_frame(picture()), 64, 96)
    torch.testing.assert_close(video[:, :, :1], vae.encode(images.to_image(frame)))
    normalised = comfy.latent_formats.Wan22().process_in(video)
    assert normalised[:, :, :1].abs().min() > 0
    assert not normalised[:, :, 1:].any() and not audio.any()
    assert "96x64, 9 frames" in text


def test_mask_keeps_frame_0_only(vae):
    (latent, *_), _ = first_frame(vae, picture(), latent=tiny_latent(batch_size=2))
    video, audio = latent["noise_mask"].unbind()
    assert [list(video.shape), list(audio.shape)] == [[2, 1, 3, 4, 6], [2, 1, 11]]
    assert not video[:, :, 0].any() and bool((video[:, :, 1:] == 1).all()) and bool((audio == 1).all())


def test_reference_resize_lets_the_image_decide_the_size(vae, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "tiny", variants.Variant("tiny", "", 2, 6, 64 * 64, "plain", ""))
    (latent, width, height, image, _), _ = first_frame(vae, picture(1, 90, 61), variant="tiny", resize="reference")
    assert (height, width) == GEOMETRY.image_target_hw(90, 61, 64 * 64) == (64, 64)
    assert shapes(latent["samples"]) == [[1, 48, 2, 4, 4], [1, 20, 6]]
    expected = images.to_image(images.resize_plain(images.to_frame(picture(1, 90, 61)), 64, 64))
    torch.testing.assert_close(image, expected.clamp(0, 1))
    torch.testing.assert_close(latent["samples"].unbind()[0][:, :, :1], vae.encode(expected))  # unclamped


def test_reference_resize_takes_only_length_and_batch_from_the_latent(vae, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "tiny", variants.Variant("tiny", "", 2, 6, 64 * 64, "plain", ""))
    (latent, *_), _ = first_frame(
        vae, picture(1, 90, 61), variant="tiny", resize="reference", latent=tiny_latent(batch_size=2))
    assert shapes(latent["samples"]) == [[2, 48, 3, 4, 4], [2, 20, 11]]


def test_stretch_shows_the_whole_image_and_crop_the_middle(vae):
    image = picture(1, 64, 192)
    (_, _, _, cropped, _), _ = first_frame(vae, image, latent=tiny_latent())
    (_, _, _, stretched, _), _ = first_frame(vae, image, latent=tiny_latent(), resize="stretch")
    torch.testing.assert_close(cropped, image[:, :, 48:144])
    assert stretched.shape == cropped.shape and not torch.allclose(stretched, cropped)


def test_one_image_per_clip(vae):
    (latent, *_, image, _), _ = first_frame(vae, picture(2, 64, 96), latent=tiny_latent(batch_size=2))
    video = latent["samples"].unbind()[0]
    assert image.shape[0] == 2
    for index in range(2):
        torch.testing.assert_close(video[index, :, :1], vae.encode(image[index:index + 1])[0])
    assert not torch.allclose(video[0], video[1])


def test_alpha_is_ignored(vae):
    image = picture(channels=4)
    (with_alpha, *_), _ = first_frame(vae, image, latent=tiny_latent())
    (without, *_), _ = first_frame(vae, image[..., :3], latent=tiny_latent())
    assert torch.equal(with_alpha["samples"].unbind()[0], without["samples"].unbind()[0])


def test_inputs_are_left_alone(vae):
    image, latent = picture(), tiny_latent()
    image_before, latent_before = image.clone(), copy.deepcopy(latent)
    first_frame(vae, image, latent=latent)
    assert torch.equal(image, image_before) and list(latent) == list(latent_before)
    for found, expected in zip(latent["samples"].unbind(), latent_before["samples"].unbind(), strict=True):
        assert torch.equal(found, expected)


def test_video_only_latent_is_refused(vae):
    with pytest.raises(ValueError, match=r"needs a joint latent.*got \[1, 48, 3, 4, 6\]\. Connect 'Ovi Empty Latent'"):
        first_frame(vae, picture(), latent={"samples": torch.zeros(1, 48, 3, 4, 6)})


def test_joint_latent_of_another_model_is_refused(vae):
    other = {"samples": NestedTensor((torch.zeros(1, 24, 3, 4, 6), torch.zeros(1, 32, 2, 40)))}
    with pytest.raises(ValueError, match=r"got \[1, 24, 3, 4, 6\] and \[1, 32, 2, 40\]"):
        first_frame(vae, picture(), latent=other)


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_crop_and_stretch_need_the_latent(vae, resize):
    with pytest.raises(ValueError, match=f"'{resize}' takes the size from the latent input"):
        first_frame(vae, picture(), resize=resize)


@pytest.mark.parametrize("count, clips", [(2, 1), (2, 3), (3, 2)])
def test_image_count_must_fit_the_batch(vae, count, clips):
    with pytest.raises(ValueError, match=f"{count} images for {clips} clip"):
        first_frame(vae, picture(count), latent=tiny_latent(batch_size=clips))


@pytest.mark.parametrize("image, message", [
    (torch.zeros(0, 4, 4, 3), "The image is empty"), (torch.zeros(1, 0, 4, 3), r"empty: its shape is \[1, 0, 4, 3\]"),
    (torch.full((1, 4, 4, 3), float("nan")), "not finite"), (torch.full((1, 4, 4, 3), float("inf")), "not finite")])
@pytest.mark.parametrize("resize", ["reference", "crop", "stretch"])
def test_images_without_pixels_are_refused(vae, image, message, resize):
    with pytest.raises(ValueError, match=message):
        first_frame(vae, image, latent=tiny_latent(), resize=resize)


@pytest.mark.parametrize("size, made", [((20, 6000), "12480x32"), ((6000, 20), "32x12576")])
def test_hopeless_shapes_are_refused_with_what_they_would_become(vae, size, made):
    image = picture(1, *size)
    with pytest.raises(ValueError, match=rf"would become a clip of {made} pixels.*Crop the image"):
        first_frame(vae, image, variant="720x720_5s", resize="reference")
    assert first_frame(vae, image, latent=tiny_latent(), resize="crop")[0][1:3] == (96, 64)


def test_latent_without_frames_is_refused(vae):
    samples = NestedTensor((torch.zeros(1, 48, 0, 4, 6), torch.zeros(1, 20, 3)))
    with pytest.raises(ValueError, match=r"got an empty joint latent, \[1, 48, 0, 4, 6\].*no side may be 0"):
        first_frame(vae, picture(), latent={"samples": samples})


def test_fps_is_24(vae):
    assert first_frame(vae, picture(), latent=tiny_latent())[0][4] == 24.0


def test_unknown_resize_is_refused(vae):
    with pytest.raises(ValueError, match="Unknown resize 'pad'"):
        first_frame(vae, picture(), latent=tiny_latent(), resize="pad")


def test_wrong_vae_is_named(tmp_path):
    paths = []
    for name, tensors in (("vae", audio.audio_vae(0)), ("vocoder", vocoder(0))):
        paths.append(tmp_path / f"{name}.safetensors")
        write_atomically(paths[-1], safetensors_chunks(tensors, {}))
    wrong = audio_vae.load_audio_vae(*map(str, paths))
    with pytest.raises(ValueError, match=r"20 latent channels, but Ovi needs the Wan2\.2 VAE with 48"):
        first_frame(wrong, picture(), latent=tiny_latent())


# --- Ovi Prompt -------------------------------------------------------------------------------------------------------


def prompt(clip, **options):
    return run(OviPrompt, **{"clip": clip, "scene": "A man waves. <S>Hi (heavy:2).<E>", "variant": "960x960_5s",
                             "audio_caption": "wind", **options})


def test_prompt_gives_both_conditionings_and_the_text(clip):
    (positive, negative, text), shown = prompt(clip, video_negative="blur", audio_negative="echo")
    assert text == shown == "A man waves. <S>Hi (heavy:2).<E> Audio: wind"
    (video_text, options), = positive
    assert torch.equal(video_text, encode(clip, text)[0])
    assert options == {"pooled_output": None, "ovi_variant": "960x960_5s"}
    (video_negative, options), = negative
    assert torch.equal(video_negative, encode(clip, "blur")[0])
    assert torch.equal(options["ovi_audio_text"], encode(clip, "echo")[0])
    assert not torch.equal(video_negative, options["ovi_audio_text"])
    assert options["pooled_output"] is None


def test_prompt_writes_the_variant_s_style(clip):
    assert prompt(clip, variant="720x720_5s")[0][2].endswith("<E> <AUDCAP>wind<ENDAUDCAP>")


def test_negatives_are_not_reformatted(clip):
    (_, negative, _), _ = prompt(clip, variant="720x720_5s", video_negative="Audio: blur", audio_negative="Audio: hum")
    assert torch.equal(negative[0][0], encode(clip, "Audio: blur")[0])
    assert torch.equal(negative[0][1]["ovi_audio_text"], encode(clip, "Audio: hum")[0])


def test_every_text_is_cleaned_as_the_reference_does(clip):
    (positive, negative, text), _ = prompt(
        clip, scene=" A &lt;S&gt;dog<E>\n runs", audio_caption="", video_negative=" blur &amp;amp;\n x ",
        audio_negative="\u201cecho\u201d")
    assert text == "A <S>dog<E> runs"
    assert torch.equal(positive[0][0], encode(clip, "A <S>dog<E> runs")[0])
    assert torch.equal(negative[0][0], encode(clip, "blur & x")[0])
    assert torch.equal(negative[0][1]["ovi_audio_text"], encode(clip, '"echo"')[0])


def test_equal_texts_are_encoded_once(clip):
    texts = []
    stack = clip.cond_stage_model.umt5xxl.transformer.encoder
    hook = stack.register_forward_pre_hook(lambda *_: texts.append(1))
    try:
        (_, negative, _), shown = prompt(clip, video_negative="word " * 600, audio_negative="word " * 600)
    finally:
        hook.remove()
    assert len(texts) == 2
    assert torch.equal(negative[0][0], negative[0][1]["ovi_audio_text"])
    assert "⚠ video_negative has " in shown and "⚠ audio_negative has " in shown


def test_brackets_are_words_not_weights(clip):
    (plain, _, _), _ = prompt(clip, scene="<S>rain<E>")
    (bracketed, _, _), _ = prompt(clip, scene="<S>(rain:1.5)<E>")
    assert bracketed[0][0].shape[1] > plain[0][0].shape[1]


def test_mistakes_in_tags_are_shown_on_the_node(clip):
    _, shown = prompt(clip, scene="He says <S>hello.")
    assert "⚠ <S> is never closed" in shown


def test_truncation_is_shown_with_the_lost_words(clip):
    (positive, _, text), shown = prompt(clip, scene="word " * 900 + "the end <S>x<E>", audio_caption="drums")
    info = encode(clip, text)[1]
    assert positive[0][0].shape[1] == info.tokens == 512
    assert text.endswith("Audio: drums") and info.cut_tokens > 0
    assert (f"⚠ prompt has {512 + info.cut_tokens} tokens, 512 are read: the last {info.cut_tokens} were cut: "
            f"…{info.cut_text[:160]}…") in shown.splitlines()


def test_truncated_negatives_are_named(clip):
    _, shown = prompt(clip, audio_negative="word " * 600)
    assert "⚠ audio_negative has " in shown and "prompt has" not in shown


def test_caption_given_twice_stops_the_prompt(clip):
    with pytest.raises(ValueError, match="given twice"):
        prompt(clip, scene="A. Audio: rain")


def test_negative_defaults_are_the_reference_s(clip):
    (_, negative, _), _ = prompt(clip)
    assert torch.equal(negative[0][0], encode(clip, "jitter, bad hands, blur, distortion")[0])
    assert torch.equal(negative[0][1]["ovi_audio_text"],
                       encode(clip, "robotic, muffled, echo, distorted")[0])


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_default_prompt_gives_no_warning(clip, variant):
    defaults = {item.id: item.default for item in OviPrompt.define_schema().inputs if hasattr(item, "default")}
    _, shown = run(OviPrompt, clip=clip, **{**defaults, "variant": variant})
    assert [line for line in shown.splitlines() if line.startswith("⚠") and " cut: " not in line] == []
