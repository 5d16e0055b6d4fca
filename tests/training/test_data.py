"""A folder of clips through the real tiny encoders: what is kept, what is made again, and what a draw gives."""

import shutil
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from devlib.weights import TINY
from ovi_native.ovi_model.media import audio_vae
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from ovi_native.ovi_model.text import umt5
from ovi_native.ovi_model.training import cache, encoding
from ovi_native.ovi_model.training.data import make_dataset
from ovi_native.ovi_model.training.encoding import DataSettings
from ovi_native.ovi_model.training.objective import Levels, Switches, losses, weighted
from support.clip_files import RATE, scene, write_clip, write_frames, write_silent, write_sound
from support.loading_state import pretend_cuda

SETTINGS = DataSettings(size=64, longest_seconds=0.4)  # 9 frames: 3 latents, 11 of sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of 9 frames, one of 20, one without sound and one without picture, and three that are broken."""
    folder = tmp_path_factory.mktemp("data") / "meine Clips ü"
    folder.mkdir()
    write_clip(folder / "a b.mp4", 1, 9)
    write_clip(folder / "ö.mp4", 2, 20)
    pictures, sound, words = scene(3, 9)
    write_silent(folder / "silent.mp4", pictures)
    write_frames(folder / "walk", pictures)
    write_sound(folder / "walk.wav", sound)
    write_sound(folder / "only.wav", sound)
    for name in ("silent", "walk", "only", "cut", "text"):
        (folder / f"{name}.txt").write_text(words, "utf-8")
    (folder / "cut.mp4").write_bytes((folder / "a b.mp4").read_bytes()[:2000])
    (folder / "text.mp4").write_text("a text")
    write_clip(folder / "empty.mp4", 4, 9, text=" ")
    return folder


@pytest.fixture(scope="module")
def made(folder, encoders, tmp_path_factory):
    """A dataset that every test may read; nobody changes its cache."""
    return make_dataset(folder, encoders, SETTINGS, tmp_path_factory.mktemp("made"))


@pytest.fixture
def own_cache(made, tmp_path):
    """A copy of that cache."""
    return Path(shutil.copytree(made.empty_text.parent, tmp_path / "cache"))


@pytest.fixture
def own(folder, encoders, own_cache):
    """The dataset on that copy."""
    return make_dataset(folder, encoders, SETTINGS, own_cache)


class Counted:
    """Counts the passes of each encoder."""

    def __init__(self, encoders):
        stages = (encoders.vae.first_stage_model.encoder, encoders.audio_vae.first_stage_model.mel_converter,
                  encoders.clip.cond_stage_model.umt5xxl.transformer.encoder)
        self.order = []
        self.hooks = [stage[0].register_forward_pre_hook(lambda *_: self.note("video")) if index == 0 else
                      stage.register_forward_pre_hook(lambda *_, kind=kind: self.note(kind))
                      for index, (stage, kind) in enumerate(zip(stages, ("video", "audio", "text"), strict=True))]

    def note(self, kind):
        if not self.order or self.order[-1] != kind:
            self.order.append(kind)

    def __enter__(self):
        return self.order

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


# --- what is made -----------------------------------------------------------------------------------------------------


def test_every_clip_becomes_examples(made, encoders):
    assert [item.name for item in made.items] == ["a b", "only", "silent", "walk", "ö #1", "ö #2"]
    assert made.buckets == {(3, 4, 4, 11): [0, 2, 3, 4, 5], (3, 2, 2, 11): [1]}
    shapes = [(one.video is not None and list(one.video.shape), one.audio is not None and list(one.audio.shape))
              for one in map(made.example, range(len(made)))]
    both = ([48, 3, 4, 4], [20, 11])
    assert shapes == [both, (False, both[1]), (both[0], False), both, both, both]
    assert made.encoded == {"pictures": 4, "sounds": 4, "texts": 4}
    text = umt5.encode_conditioning(encoders.clip, made.example(0).caption)[0][0][0][0]
    assert (made.example(0).text - text).abs().max() < 1e-3 * text.abs().max()
    assert made.example(0).audio_text is None and made.example(4).name == "ö #1"


def test_broken_clips_are_named_and_left_out(made):
    assert {fault.name: fault.reason.split(":")[0].split(" (")[0] for fault in made.faults} == {
        "empty": "its caption is empty", "cut": "cut.mp4 cannot be read", "text": "text.mp4 cannot be read"}
    text = made.summary()
    assert text.startswith("5 clips as 6 examples:\n  5 of 64x64, 9 frames (0.38 s)\n  1 of 9 frames (0.38 s)\n")
    assert "1 example without sound" in text and "1 example without picture" in text
    assert "Left out: empty: its caption is empty" in text and "Encoded now: 4 pictures, 4 sounds, 4 texts." in text


def test_latents_are_those_of_the_encoders(encoders, made):
    """Frames that were stored without loss, and the sound as it is; the rest is float16."""
    pictures, sound, _ = scene(3, 9)
    frames = torch.from_numpy(pictures).float() / 255
    truth = comfy.latent_formats.Wan22().process_in(encoders.vae.encode(frames))[0]
    walk = made.example(3)
    assert (walk.video - truth).abs().max() < 4e-3 * truth.abs().max()
    waveform = torch.from_numpy((np.clip(sound, -1, 1) * 32767).astype("<i2")).float()[None, None] / 32768
    waveform = torch.nn.functional.pad(waveform, (0, 11 * 512))[..., :11 * 512]
    truth = audio_vae.encode_mean(encoders.audio_vae, waveform)[0]
    assert (walk.audio - truth).abs().max() < 2e-3 * truth.abs().max()
    assert torch.equal(made.example(1).audio, walk.audio)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing(folder, encoders, own, own_cache):
    before = {path: path.stat().st_mtime_ns for path in own_cache.iterdir()}
    with Counted(encoders) as order:
        again = make_dataset(folder, encoders, SETTINGS, own_cache)
    assert order == [] and not any(again.encoded.values()) and again.items == own.items
    assert {path: path.stat().st_mtime_ns for path in own_cache.iterdir()} == before
    assert "Everything was in the cache already." in again.summary()


def test_each_encoder_has_its_turn_once(folder, encoders, tmp_path):
    with Counted(encoders) as order:
        make_dataset(folder, encoders, SETTINGS, tmp_path / "cache")
    assert order == ["video", "audio", "text"]


@pytest.mark.parametrize("settings, changed", [
    (DataSettings(size=96, longest_seconds=0.4), "pictures"),
    (DataSettings(size=64, longest_seconds=0.5), "pictures sounds"),
    (DataSettings("720x720_5s", 64, 0.4), "texts"),
    (DataSettings(size=64, longest_seconds=0.4, prefix="zzz"), "texts")])
def test_another_setting_makes_what_depends_on_it(folder, encoders, own_cache, settings, changed):
    again = make_dataset(folder, encoders, settings, own_cache)
    assert {what for what, number in again.encoded.items() if number} == set(changed.split())


def test_another_caption_encodes_that_text_alone(folder, encoders, own, own_cache):
    words = (folder / "a b.txt").read_text("utf-8")
    try:
        (folder / "a b.txt").write_text("Another. Audio: x.", "utf-8")
        again = make_dataset(folder, encoders, SETTINGS, own_cache)
    finally:
        (folder / "a b.txt").write_text(words, "utf-8")
    assert again.encoded == {"pictures": 0, "sounds": 0, "texts": 1}
    assert again.items[0].caption == "Another. Audio: x." and again.items[0].video == own.items[0].video


def test_another_encoder_has_files_of_its_own(encoders):
    import comfy.sd
    from tiny.video_vae import video_vae

    prints = [cache.fingerprint(comfy.sd.VAE(sd=video_vae(seed)).patcher) for seed in (0, 1, 0)]
    assert prints[0] == prints[2] == cache.fingerprint(encoders.vae.patcher) != prints[1]


@pytest.mark.usefixtures("dynamic_loading")
def test_weights_that_stay_in_their_file_have_the_same_fingerprint(encoders, tiny_models):
    path = str(tiny_models / "text_encoders" / TINY["text_encoder"])
    with pretend_cuda():
        clip = umt5.load_text_encoder(path)
    assert clip.patcher.is_dynamic()
    assert cache.fingerprint(clip.patcher) == cache.fingerprint(encoders.clip.patcher)


def test_a_lora_on_the_text_encoder_counts(encoders):
    clip = encoders.clip.clone()
    before = cache.fingerprint(clip.patcher)
    name = next(name for name in clip.patcher.model.state_dict() if name.endswith("SelfAttention.q.weight"))
    weight = clip.patcher.model.state_dict()[name]
    clip.add_patches({name: ("diff", (torch.ones_like(weight),))}, 0.5)
    half = cache.fingerprint(clip.patcher)
    comfy.model_management.load_models_gpu([clip.patcher])
    assert before != half == cache.fingerprint(clip.patcher)
    other = encoders.clip.clone()
    other.add_patches({name: ("diff", (torch.ones_like(weight),))}, 1.0)
    assert cache.fingerprint(other.patcher) not in (before, half)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE = {"flipped": flip, "empty": lambda path: path.write_bytes(b""), "gone": lambda path: path.unlink(),
          "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
          "no header": lambda path: path.write_bytes(b"\xff" * 500)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again_and_named(folder, encoders, own, own_cache, damage):
    for path in (own.items[3].video[0], own.items[3].audio[0], own.items[0].text):
        there = path.read_bytes()
        DAMAGE[damage](path)
        again = make_dataset(folder, encoders, SETTINGS, own_cache)
        assert sum(again.encoded.values()) == 1 and path.read_bytes() == there
        named = [note for note in again.notes if f"{path.name} of the cache was damaged" in note]
        assert len(named) == (damage != "gone")


def test_a_file_that_is_changed_later_is_a_sentence(own):
    own.items[3].video[0].unlink()
    own.items[0].text.write_bytes(b"x")
    for index in (3, 0):
        with pytest.raises(RuntimeError, match=r"training cache is gone or damaged.*Run 'Ovi Dataset' again"):
            own.example(index)


def test_a_cancelled_run_keeps_what_it_finished(folder, encoders, tmp_path):
    def cancel(what, done, _):
        if (what, done) == ("encoding pictures", 3):
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        make_dataset(folder, encoders, SETTINGS, tmp_path / "cache", cancel)
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 2 and all(name.startswith("video-") for name in names)
    assert make_dataset(folder, encoders, SETTINGS, tmp_path / "cache").encoded["pictures"] == 2


def test_memory_that_runs_out_says_what_to_lower(folder, encoders, tmp_path, monkeypatch):
    def run_out(*_):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(encoding.audio_vae, "encode_mean", run_out)
    with pytest.raises(RuntimeError, match=r"Memory ran out while a b was encoded\. Lower size or longest_seconds"):
        make_dataset(folder, encoders, SETTINGS, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_values_that_are_not_finite_are_not_kept(tmp_path):
    with pytest.raises(RuntimeError, match="What the encoder made of x is not finite"):
        cache.write(tmp_path / "x.safetensors", [torch.tensor([[float("inf")]])], "x")
    with pytest.raises(RuntimeError, match="cannot be written to"):
        cache.write(tmp_path / ("n" * 300), [torch.zeros(1)], "x")
    assert not list(tmp_path.iterdir())


def test_the_cache_is_in_no_folder_that_is_served():
    place = str(cache.default_folder())
    for root in (folder_paths.get_output_directory(), folder_paths.get_input_directory(),
                 folder_paths.get_temp_directory()):
        assert not folder_paths.is_within_directory(root, place)
    assert folder_paths.get_public_user_directory("__ovi_native") is None and "__ovi_native" in place


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_without_clips_is_a_sentence(encoders, tmp_path):
    with pytest.raises(ValueError, match=r"holds no clip to train on\. There is no mp4"):
        make_dataset(tmp_path, encoders, SETTINGS, tmp_path / "cache")
    (tmp_path / "x.mp4").write_text("x")
    (tmp_path / "y.mp4").write_text("y")
    (tmp_path / "y.txt").write_text("y")
    with pytest.raises(ValueError, match=r"no clip to train on\. x: it has no caption.*; y: y\.mp4 cannot be read"):
        make_dataset(tmp_path, encoders, SETTINGS, tmp_path / "cache")


def test_wrong_encoders_are_named_before_anything_is_read(folder, encoders, tmp_path):
    e = encoders
    for wrong, sentence in ((encoding.Encoders(e.audio_vae, e.audio_vae, e.clip), "20 latent channels, but Ovi needs"),
                            (encoding.Encoders(e.vae, e.vae, e.clip), "is no MMAudio VAE")):
        with pytest.raises(ValueError, match=sentence):
            make_dataset(folder, wrong, SETTINGS, tmp_path / "cache")


@pytest.mark.parametrize("options, sentence", [
    ({"size": 16}, "size goes from 32"), ({"size": -64}, "size goes from 32"),
    ({"longest_seconds": 0.1}, "from 0.3 to"),
    ({"longest_seconds": float("nan")}, "from 0.3"), ({"variant": "big"}, "Unknown Ovi variant")])
def test_settings_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataSettings(**options)


def test_the_variant_decides_what_is_not_set():
    settings = DataSettings("960x960_10s")
    assert (settings.area, settings.longest) == (960 * 960, 241)
    assert DataSettings("720x720_5s").longest == 121


# --- draws ------------------------------------------------------------------------------------------------------------


def draw(made, seed, batch=4, **options):
    return made.draw(batch, torch.Generator().manual_seed(seed), **options)


def test_a_draw_is_a_function_of_its_generator(made):
    for seed in range(8):
        one, two = draw(made, seed), draw(made, seed)
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a is b for a, b in
                   zip(vars(one).values(), vars(two).values(), strict=True))
    assert len({float(draw(made, seed).video.sum()) for seed in range(8)}) > 4


def test_buckets_are_drawn_by_their_size(made):
    drawn = [draw(made, seed, 1).video.shape[-1] for seed in range(240)]
    assert 20 < drawn.count(2) < 60 and drawn.count(2) + drawn.count(4) == 240  # 40 expected


def test_a_draw_holds_its_clips_and_their_texts(made):
    batch = draw(made, 3, 5, caption_dropout=0.0)
    assert batch.video.shape == (5, 48, 3, 4, 4) and batch.audio.shape == (5, 20, 11)
    examples = [made.example(i) for i in made.buckets[3, 4, 4, 11]]
    seen = set()
    for index in range(5):
        name, = (one.name for one in examples if torch.equal(one.video, batch.video[index])
                 and torch.equal(batch.text[index, :len(one.text)], one.text))
        seen.add(name)
        silent = name == "silent"
        assert batch.audio_weight[index] == (not silent) and batch.audio[index].any() == (not silent)
    assert len(seen) == 5 and batch.video_weight is None
    assert batch.video_generated.all() and batch.audio_generated.all()


def test_a_bucket_of_fewer_clips_gives_some_twice(made):
    batch = next(batch for batch in (draw(made, seed, 3) for seed in range(50)) if batch.video_weight is not None)
    assert batch.video.shape == (3, 48, 3, 2, 2) and not batch.video.any() and not batch.video_weight.any()
    assert torch.equal(batch.audio[0], batch.audio[2])


def test_captions_are_dropped_as_often_as_asked(made):
    empty = cache.read((made.empty_text, 0))
    assert len(empty) == 1
    for share in (0.0, 0.3, 1.0):
        lengths = torch.cat([(draw(made, seed, 4, caption_dropout=share).text != 0).any(-1).sum(1)
                             for seed in range(60)])
        assert abs(float((lengths == 1).float().mean()) - share) < 0.08


def test_what_a_clip_lacks_is_never_given(made):
    """Nor is all that it has, or nothing of it would be learnt."""
    for switches in (Switches(1.0, 0, 0), Switches(0, 1.0, 0), Switches(0.3, 0.3, 1.0)):
        for seed in range(40):
            batch = draw(made, seed, 3, switches=switches)
            video_weight = torch.ones(3) if batch.video_weight is None else batch.video_weight
            audio_weight = torch.ones(3) if batch.audio_weight is None else batch.audio_weight
            for index in range(3):
                given = not batch.video_generated[index].any(), not batch.audio_generated[index].any()
                if not video_weight[index] or not audio_weight[index]:
                    assert given == (False, False)
                if not video_weight[index]:
                    assert batch.video_generated[index].all()


def test_no_gradient_comes_from_what_is_missing(made):
    def velocity(noisy, _sigma, _text, **_):
        return [noisy[0] * scale[0], noisy[1] * scale[1]]

    scale = torch.ones(2, requires_grad=True)
    batch = next(batch for batch in (draw(made, seed, 2) for seed in range(50)) if batch.video_weight is not None)
    random = torch.Generator().manual_seed(0)
    sigma = Levels().draw(2, random)
    noise = [torch.randn(x.shape, generator=random) for x in (batch.video, batch.audio)]
    weighted(*losses(velocity, batch, sigma, *noise), batch).backward()
    assert scale.grad[0] == 0 and scale.grad[1] != 0


def test_half_precision_is_chosen_by_its_error(made):
    """What float16 and bfloat16 lose of latents and texts, relative to their size."""
    for tensor in (made.example(0).video, made.example(0).audio, made.example(0).text):
        random = tensor * (1 + 1e-3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)))
        errors = [float((random.to(kind).float() - random).norm() / random.norm())
                  for kind in (torch.float16, torch.bfloat16)]
        assert errors[0] < 3e-4 < 1e-3 < errors[1] and tensor.abs().max() < 100


def test_lengths_of_sounds_alone_are_those_of_pictures():
    from ovi_native.ovi_model.training.data import latent_frames_for

    for frames in range(2, 62):
        assert latent_frames_for(GEOMETRY.audio_latents_for(frames)) == frames
    assert encoding.sound_lengths(RATE * 3 - 10, 25) == [25, 25]
    assert encoding.sound_lengths(RATE, 121) == [21]
