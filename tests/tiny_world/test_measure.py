"""The detectors: near 1 on the renderer's own clips, also when these are roughened, and at chance on shuffled ones."""

import numpy as np
import pytest
from ovi_native.tiny_world.captions import caption, parse
from ovi_native.tiny_world.measure import chance, describe, judge, loudness_by_speed, pooled, right_share, sync
from ovi_native.tiny_world.measure.motion import motion
from ovi_native.tiny_world.measure.speech import sung
from ovi_native.tiny_world.picture import FPS
from ovi_native.tiny_world.scenes import BALL_RADIUS, FLOOR, GRAVITY, Ball, Face, Scene, Square, draw_scene
from support.degraded_clips import clip, rough, through_h264

BALL = Scene(ball=Ball("red", "left", "slow", "bell"))
FACE = Scene(face=Face("green", "high", ("a", "u")))
EMPTY = np.zeros((0, 64, 64, 3), np.uint8)  # no picture


def held_out(kind: str, count: int) -> list[Scene]:
    random = np.random.default_rng(11)
    return [draw_scene(random, 2.0, held_out=True, kind=kind) for _ in range(count)]


@pytest.fixture(scope="module")
def balls():
    """(scene, report) of clean and rough clips, half of them with a square."""
    random, found = np.random.default_rng(0), []
    for i, scene in enumerate([*held_out("ball", 8), *held_out("pair", 8)]):
        frames, samples = clip(scene, size=(64, 96, 128)[i % 3])
        found.append((scene, describe(*(rough(frames, samples, random) if i % 2 else (frames, samples)))))
    return found


@pytest.fixture(scope="module")
def faces():
    random, found = np.random.default_rng(0), []
    for i, scene in enumerate(held_out("face", 10)):
        frames, samples = clip(scene)
        found.append((scene, describe(*(rough(frames, samples, random) if i % 2 else (frames, samples)))))
    return found


def marks(found, shift: int = 0) -> dict[str, float]:
    """Means over the reports, each against the caption that comes so many later."""
    all_marks: dict[str, list[float]] = {}
    for i, (_, report) in enumerate(found):
        for name, mark in judge(report, parse(caption(found[(i + shift) % len(found)][0]))).items():
            all_marks.setdefault(name, []).append(mark)
    return {name: float(np.mean(values)) for name, values in all_marks.items()}


def test_balls_are_as_their_captions_say(balls):
    assert marks(balls) == dict.fromkeys(("ball", "place", "speed", "timbre", "square", "square_place"), 1.0)


def test_another_clips_caption_is_right_by_chance_only(balls):
    shuffled = marks(balls, 3)
    assert max(shuffled["ball"], shuffled["place"], shuffled["timbre"]) <= 0.6 and shuffled["speed"] <= 0.8


def test_bounces_are_found_to_a_fraction_of_a_frame(balls):
    for scene, report in balls:
        true = [time for time, _ in scene.ball.contacts(2.0)]
        assert report.motion.bounces == pytest.approx(true, abs=0.01)


def test_impact_speeds_are_found(balls):
    for scene, report in balls:
        assert report.motion.impacts == pytest.approx([speed for _, speed in scene.ball.contacts(2.0)], rel=0.1)


def test_sounds_are_found_at_their_times(balls):
    for scene, report in balls:
        true = [time for time, _ in scene.ball.contacts(2.0)]
        assert [onset.time for onset in report.onsets] == pytest.approx(true, abs=0.02)


def test_picture_and_sound_agree_and_shuffled_do_not(balls):
    assert pooled(report.sync for _, report in balls).f1 > 0.97
    times = [(report.motion.bounces, [onset.time for onset in report.onsets]) for _, report in balls]
    assert chance(times).f1 < 0.5


def test_the_faster_the_louder():
    random = np.random.default_rng(1)
    found = [describe(*clip(draw_scene(random, 2.0, kind="ball"))) for _ in range(8)]
    assert loudness_by_speed(found) > 0.9


def test_a_contact_between_the_last_two_frames_is_a_bounce():
    ball = Ball("red", "left", "fast", "wood", fallen=0.07)
    (*_, (last, _)) = ball.contacts(2.0)
    assert 47.6 / 24 < last < 47.9 / 24  # the last frame is the lowest
    assert describe(*clip(Scene(ball=ball))).motion.bounces[-1] == pytest.approx(last, abs=0.01)


def test_a_tone_that_flickers_is_no_row_of_onsets():
    """A tone that fades over seconds flickers, but nothing strikes."""
    times = np.arange(32_000) / 16_000
    flicker = np.exp(-times) * (1 + 0.15 * np.sin(2 * np.pi * 4 * times)) * np.sin(2 * np.pi * 1180 * times)
    assert len(describe(EMPTY, 0.3 * flicker).onsets) <= 1


def test_noise_in_the_voices_band_is_no_voice():
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(0, 1, 32_000))
    spectrum[:600], spectrum[1600:] = 0, 0  # 2 s: bins of half a hertz
    noise = np.fft.irfft(spectrum)
    noise[:8000], noise[16_000:] = 0, 0
    assert not describe(EMPTY, 0.3 * noise / np.abs(noise).max()).vowels


def test_a_hum_below_all_voices_is_no_voice():
    """At its one peak among the pitches of voices it is less like itself than noise would be."""
    times = np.arange(16_000) / 16_000
    hum = 0.3 * np.sin(2 * np.pi * 70 * times) + 0.19 * np.sin(2 * np.pi * 140 * times)
    assert sung(hum) == []


def test_what_floats_is_no_ball_though_it_seems_to_turn_at_once():
    times: np.ndarray = np.arange(121) / FPS
    smooth = 32 + 14 * np.sin(2 * np.pi * times / 2.0)
    shaken = smooth + np.maximum(0, 6 - 3.0 * np.abs(np.arange(121) % 48 - 12))  # a point at each lowest place
    assert not motion(smooth).falls
    assert motion(shaken).bounces and not motion(shaken).falls
    for speed in GRAVITY:
        ball = Ball("red", "left", speed, "bell")
        assert motion(FLOOR - BALL_RADIUS - ball.heights(times)).falls


def test_a_square_alone_is_no_ball():
    report = describe(*clip(Scene(square=Square("blue", "right"))))
    assert report.ball is None and (report.square.colour, report.square.place) == ("blue", "right")


def test_faces_are_as_their_captions_say(faces):
    assert marks(faces) == dict.fromkeys(("hat", "voice", "vowels", "mouth_vowels"), 1.0)
    assert marks(faces, 3)["vowels"] < 0.5
    assert all(report.face and not report.onsets for _, report in faces)


def test_mouth_and_voice_go_together(faces):
    assert np.mean([report.lip_sync for _, report in faces]) > 0.9


def test_vowels_begin_and_end_when_they_are_sung(faces):
    for scene, report in faces:
        for heard, (start, end, _) in zip(report.vowels, scene.face.spoken(), strict=True):
            assert heard.start == pytest.approx(start, abs=0.05) and heard.end == pytest.approx(end, abs=0.05)


def test_a_vowel_is_known_at_pitches_of_other_voices(monkeypatch):
    from ovi_native.tiny_world import sound

    for pitch in (95.0, 135.0, 180.0, 260.0):
        monkeypatch.setitem(sound.PITCHES, "low", pitch)
        report = describe(*clip(Scene(face=Face("red", "low", ("a", "e", "i", "o", "u"))), 3.0))
        assert report.heard == ("a", "e", "i", "o", "u"), pitch
        assert [vowel.pitch for vowel in report.vowels] == pytest.approx([pitch] * 5, rel=0.03)


@pytest.mark.parametrize("scene", (Scene(ball=Ball("yellow", "middle", "fast", "drum"), square=Square("red", "left")),
                                   Scene(face=Face("blue", "low", ("i", "o", "e")))))
def test_an_mp4_is_read_as_well(scene):
    frames, samples = clip(scene)
    report = describe(through_h264(frames), samples)
    assert set(judge(report, parse(caption(scene))).values()) == {1.0}


def test_what_is_wrong_is_marked_wrong():
    report = describe(*clip(BALL))
    asked = parse("A blue ball bounces fast on the right. Audio: a drum at every bounce.")
    assert judge(report, asked) == {"ball": 0.0, "place": 0.0, "speed": 0.0, "timbre": 0.0}
    assert judge(report, parse("A red ball.")) == {"ball": 1.0}
    assert judge(report, parse("A face with a red hat says <S>a i<E>")) == {"hat": 0, "vowels": 0, "mouth_vowels": 0}


def test_sound_that_comes_late_is_no_sync_and_says_by_how_much():
    frames, samples = clip(BALL)
    late = describe(frames, np.concatenate([np.zeros(800, np.float32), samples[:-800]]))
    assert late.sync.f1 == 1 and late.sync.mean_offset == pytest.approx(0.05, abs=0.01)
    assert describe(frames, np.concatenate([np.zeros(3200, np.float32), samples[:-3200]])).sync.f1 == 0


@pytest.mark.parametrize(("scene", "sentence"), (
    (BALL, "2 bounces, 2 sounds, within 1 frame: a red ball on the left, a bell"),
    (Scene(ball=Ball("blue", "middle", "fast", "wood"), square=Square("green", "right")),
     "3 bounces, 3 sounds, within 1 frame: a blue ball in the middle and a green square on the right, a wood"),
))
def test_a_report_is_a_sentence(scene, sentence):
    assert describe(*clip(scene)).sentence == sentence


def test_a_face_is_a_sentence():
    assert describe(*clip(FACE)).sentence.startswith(
        "a face with a green hat, its mouth opens 2 times, a high voice sings a u, mouth and loudness agree at 0.9")


NOISE = np.random.default_rng(0)


@pytest.mark.parametrize(("frames", "samples", "says"), (
    (EMPTY, np.zeros(0), "no bounces, no sounds: neither a ball nor a face, no picture, no sound track"),
    (np.zeros((49, 64, 64, 3), np.uint8), np.zeros(32_000), "neither a ball nor a face, silence"),
    (np.full((2, 80, 80, 3), 255, np.uint8), np.full(32_000, 0.5), "neither a ball nor a face, silence"),
    (NOISE.integers(0, 256, (49, 64, 64, 3), dtype=np.uint8), NOISE.normal(0, 0.2, 32_000),
     "neither a ball nor a face, a sound without strokes or voices"),
    (np.full((49, 64, 64, 3), (214, 40, 40), np.uint8), np.zeros(100), "neither a ball nor a face, silence"),
    (clip(BALL)[0], np.zeros(32_000), "2 bounces, no sounds: a red ball on the left, silence"),
    (clip(BALL)[0][:1], np.zeros(700), "no bounces, no sounds: a red ball on the left, silence"),
    (EMPTY, clip(BALL)[1], "no bounces, 2 sounds: neither a ball nor a face, a bell, no picture"),
    (clip(FACE)[0], np.zeros(32_000), "its mouth opens 2 times, no voice, silence"),
), ids=("empty", "black", "white", "noise", "red", "silent", "one frame", "no picture", "mute face"))
@pytest.mark.filterwarnings("error")
def test_clips_with_nothing_in_them_say_so(frames, samples, says):
    report = describe(frames, samples)
    assert says in report.sentence
    assert not report.onsets or says.startswith("no bounces, 2")


@pytest.mark.parametrize(("frames", "samples", "message"), (
    (np.zeros((4, 64, 64), np.uint8), np.zeros(10), r"frames are uint8 \[4, 64, 64\]; expected uint8 \[T, S, S, 3\]"),
    (np.zeros((4, 64, 96, 3), np.uint8), np.zeros(10), "square pictures"),
    (np.zeros((4, 64, 64, 3)), np.zeros(10), "frames are float64"),
    (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(10), "8 pixels wide; expected 32 to 1024"),
    (EMPTY, np.zeros((2, 10)), r"samples are float64 \[2, 10\]; expected one channel"),
    (EMPTY, np.zeros(10, np.int16), "samples are int16"),
    (EMPTY, np.array([0.0, np.nan]), "no finite numbers"),
))
def test_other_shapes_are_refused(frames, samples, message):
    with pytest.raises(ValueError, match=message):
        describe(frames, samples)


def test_sync_matches_one_to_one():
    both = sync([0.5, 1.0, 1.5], [0.52, 0.55, 1.6])
    assert (both.bounces, both.sounds, len(both.offsets)) == (3, 3, 1)
    assert both.precision == both.recall == both.f1 == pytest.approx(1 / 3)
    assert both.mean_offset == pytest.approx(0.02)
    crowded = sync([0.50, 0.57], [0.43, 0.52])
    assert len(crowded.offsets) == 2, "a greedy nearest match would leave one over"
    assert sync([], []).f1 == 0 and sync([], []).mean_offset is None


def test_vowels_right_by_edit_distance():
    assert right_share("aoi", "aoi") == 1 and right_share("ai", "aoi") == pytest.approx(2 / 3)
    assert right_share("", "ao") == 0 and right_share("eaoi", "aoi") == 0.75 and right_share("", "") == 1
