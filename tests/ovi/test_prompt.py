"""Caption styles, cleaning, assembling, the warnings about tags, and what the CLIP brings along."""

import json
import subprocess
import sys
from pathlib import Path

import comfy.hooks
import comfy.sd
import nodes
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from ovi_native.nodes.prompt import OviPrompt
from ovi_native.ovi_model.ovi import prompt
from ovi_native.ovi_model.ovi.variants import PLAIN, TAGGED, get_variant
from ovi_native.ovi_model.text import umt5
from support.parity_items import prompts
from tiny.inputs import noise

TAGGED_VARIANT = get_variant("720x720_5s")
PLAIN_VARIANT = get_variant("960x960_10s")
GOOD = "A man waves and says <S>Good morning.<E> Audio: warm male voice"


def test_strings_equal_the_reference(golden):
    found = list(prompts.items(golden))
    assert len(found) == 6
    assert [item for item in found if not item.ok] == []


def test_missing_reference_strings_fail(tmp_path):
    assert [item.ok for item in prompts.items(tmp_path)] == [False]


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match=r"'srt'.*'tagged' or 'plain'"):
        prompt.format_for("srt", "text")


@pytest.mark.parametrize("text", ["plain", "<AUDCAP>a<ENDAUDCAP> b", "x Audio: y", "Audio: a Audio: b", ""])
@pytest.mark.parametrize("style", [TAGGED, PLAIN])
def test_formatting_again_to_plain_changes_nothing(style, text):
    once = prompt.format_for(PLAIN, prompt.format_for(style, text))
    assert prompt.format_for(PLAIN, once) == once


@pytest.mark.parametrize("caption", ["soft rain", "  soft rain\n", "Audio: soft rain", "<AUDCAP>soft rain<ENDAUDCAP>"])
def test_caption_field_is_written_in_the_variant_s_style(caption):
    scene = "A street. <S>Hi.<E>\n"
    assert prompt.assemble(scene, caption, TAGGED_VARIANT) == "A street. <S>Hi.<E> <AUDCAP>soft rain<ENDAUDCAP>"
    assert prompt.assemble(scene, caption, PLAIN_VARIANT) == "A street. <S>Hi.<E> Audio: soft rain"


def test_caption_alone_is_a_prompt():
    assert prompt.assemble("", "rain", PLAIN_VARIANT) == "Audio: rain"


@pytest.mark.parametrize("blank", ["", " \n", "Audio:", "<AUDCAP> <ENDAUDCAP>"])
def test_blank_caption_leaves_the_scene_to_the_formatter(blank):
    assert prompt.assemble("A. Audio: b", blank, TAGGED_VARIANT) == "A. <AUDCAP>b<ENDAUDCAP>"
    assert prompt.assemble("A. <AUDCAP>b<ENDAUDCAP>", blank, PLAIN_VARIANT) == "A. Audio: b"
    assert prompt.assemble(" A. ", blank, PLAIN_VARIANT) == "A."


@pytest.mark.parametrize("scene", ["A. Audio: wind", "A. <AUDCAP>wind<ENDAUDCAP> b"])
def test_two_captions_are_refused(scene):
    with pytest.raises(ValueError, match="given twice"):
        prompt.assemble(scene, "rain", PLAIN_VARIANT)


FULL_WIDTH = {ord(letter): ord(letter) + 0xFEE0 for letter in "AUDIOCPEN:<>"}
MARKERS = ("Audio:", "audio:", "AUDIO :", "aUdIo\t:", "Audio:".translate(FULL_WIDTH), "AUDIO:".translate(FULL_WIDTH),
           "audio\ufe55")
TAGS = (("<AUDCAP>", "<ENDAUDCAP>"), ("<audcap>", "<endaudcap>"), ("< AudCap >", "</AudCap>"),
        ("<AUDCAP>".translate(FULL_WIDTH), "<ENDAUDCAP>".translate(FULL_WIDTH)),
        ("&lt;audcap&gt;", "&lt;endaudcap&gt;"))


@pytest.mark.parametrize(("opening", "closing"), [*((marker, "") for marker in MARKERS), *TAGS])
@pytest.mark.parametrize("before", ["He says <S>Hi.<E>", "He waves,", "He waves\n", "\u4ed6<S>\u5927<E>\u3002", ""])
def test_markers_count_in_any_case_and_width(opening, closing, before):
    """Wherever they stand, the style is the variant's, and a second caption is noticed."""
    caption, start = f"{opening} warm voice{closing}", " ".join(before.split())
    for variant, expected in ((TAGGED_VARIANT, "<AUDCAP>warm voice<ENDAUDCAP>"), (PLAIN_VARIANT, "Audio: warm voice")):
        for found in (prompt.assemble(f"{before} {caption}", "", variant), prompt.assemble(before, caption, variant)):
            assert found.replace("<AUDCAP> ", "<AUDCAP>") == f"{start} {expected}".strip()
        with pytest.raises(ValueError, match="given twice"):
            prompt.assemble(f"{before} {caption}", "rain", variant)
        with pytest.raises(ValueError, match="given twice"):
            prompt.assemble(f"{before} Audio: x", caption, variant)
        twice = prompt.assemble(f"{before} Audio: rain. {caption}", "", variant)
        assert any("There are 2 audio captions" in warning for warning in prompt.check_tags(twice))


@pytest.mark.parametrize("caption", ["audio: Audio: rain", "Audio:audio :AUDIO: rain",
                                     "Audio: <audcap>audio: rain</audcap>",
                                     "<AUDCAP><AUDCAP> rain <ENDAUDCAP> <ENDAUDCAP>"])
def test_repeated_markers_of_the_field_become_one(caption):
    found = prompt.assemble("A street", caption, PLAIN_VARIANT)
    assert found == "A street Audio: rain"


def test_a_marker_may_come_out_of_an_entity():
    """ftfy leaves entities alone where there are tags, so that the full-width colon comes after its repair."""
    assert prompt.assemble("<S>Hi<E> Audio&#xFF1A;rain", "", TAGGED_VARIANT) == "<S>Hi<E> <AUDCAP>rain<ENDAUDCAP>"


@pytest.mark.parametrize("scene", ["He turns up the audio: it hums.", "He says <S>audio: one, two.<E>", "audiophile: x",
                                   "<S>\uff21udio here: x<E>", "A <B>bold</B> audience: <audcapture>"])
def test_what_is_no_marker_stays_as_it_is(scene):
    for variant in (TAGGED_VARIANT, PLAIN_VARIANT):
        assert prompt.assemble(scene, "", variant) == prompt.clean_for_tokenizer(scene)


@pytest.mark.parametrize("variant", ["720x720_5s", "960x960_5s", "960x960_10s"])
def test_whole_prompts_equal_the_reference(golden, variant):
    """Rewritten, then cleaned, as upstream does it; spaces at the end of a line and of the text among them."""
    data = json.loads((golden / "prompts.json").read_text(encoding="utf-8"))
    variant = get_variant(variant)
    scenes = [entry["input"] for entry in data["prompts"]]
    scenes = [scene for scene in scenes if prompt.spell_markers(scene) == scene]  # in the reference's spelling
    assert len(scenes) > len(data["prompts"]) / 2
    scenes += ["<S>b<E> Audio: c \n", "A.\nAudio:  c", "A. <AUDCAP> c\n<ENDAUDCAP>\n", "Audio:c", "Audio: c Audio: d"]
    for scene in scenes:
        expected = prompt.clean_for_tokenizer(prompt.format_for(variant.caption_style, scene))
        assert prompt.assemble(scene, "", variant) == expected


# --- hooks that are set on the CLIP -----------------------------------------------------------------------------------

LORA_KEY = "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(scope="module")
def clip(tiny_models):
    return umt5.load_text_encoder(str(next(tiny_models.rglob("*umt5*"))))


def text_lora(clip) -> dict:
    out, width = clip.cond_stage_model.umt5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight.shape
    return {f"{LORA_KEY}.lora_{way}.weight": noise(*shape, seed=3)
            for way, shape in (("up", (out, 2)), ("down", (2, width)))}


def encode(clip, **texts) -> tuple[list, list]:
    texts = {"scene": "A red house. Audio: wind", "video_negative": "blur", "audio_negative": "echo", **texts}
    return OviPrompt.execute(clip, variant="960x960_5s", **texts).args[:2]


def texts_of(positive: list, negative: list) -> list[list[torch.Tensor]]:
    return [[pos[0], neg[0], neg[1]["ovi_audio_text"]] for pos, neg in zip(positive, negative, strict=True)]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_on_the_clip_reach_the_conditioning(clip):
    """As with core's text node: its LoRA on the encoder, and on the model where it says so."""
    hooks = comfy.hooks.create_hook_lora(lora=text_lora(clip), strength_model=1.0, strength_clip=1.0)
    plain, = texts_of(*encode(clip))
    merged, = texts_of(*encode(comfy.sd.load_lora_for_models(None, clip, text_lora(clip), 0, 1.0)[1]))
    for apply_to_conds in (True, False):
        hooked, = SetClipHooks().apply_hooks(clip, False, apply_to_conds, hooks)
        conds = encode(hooked)
        stock, = nodes.CLIPTextEncode().encode(hooked, "x")
        assert all(entry[1].get("hooks") is stock[0][1].get("hooks") for cond in conds for entry in cond)
        assert ("hooks" in stock[0][1]) == apply_to_conds
        found, = texts_of(*conds)
        assert_equal(found, merged)
        assert not any(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert_equal(texts_of(*encode(clip))[0], plain)


def test_a_schedule_of_hooks_on_the_clip_is_followed(clip):
    """One entry for each part of the schedule, with the texts of that strength, in both conditionings alike."""
    hooks = comfy.hooks.create_hook_lora(lora=text_lora(clip), strength_model=0.0, strength_clip=1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    hooked, = SetClipHooks().apply_hooks(clip, True, True, hooks)
    positive, negative = encode(hooked)
    for cond in (positive, negative):
        parts = [(entry[1]["clip_start_percent"], entry[1]["clip_end_percent"]) for entry in cond]
        assert parts == [(0, 0.5), (0.5, 1)]
        assert all(entry[1]["hooks"] is hooks and entry[1]["ovi_variant"] == "960x960_5s" for entry in cond)
    plain, = texts_of(*encode(clip))
    merged, = texts_of(*encode(comfy.sd.load_lora_for_models(None, clip, text_lora(clip), 0, 1.0)[1]))
    first, second = texts_of(positive, negative)
    assert_equal(first, merged)
    assert_equal(second, plain)


# --- cleaning ---------------------------------------------------------------------------------------------------------

def test_brackets_and_numbers_survive_cleaning():
    text = "(heavy) rain at (3:30), [so] it goes: \\(x\\)"
    assert prompt.clean_for_tokenizer(text) == text


def test_cleaning_repairs_mojibake_and_entities():
    assert prompt.clean_for_tokenizer(" caf\u00c3\u00a9 &amp;lt;S&amp;gt; \n\t x ") == "caf\u00e9 <S> x"


def test_missing_ftfy_is_named():
    folder = Path(prompt.__file__).parents[2]
    code = (
        "import importlib, sys, types\n"
        "sys.modules['ftfy'] = None\n"
        f"pack = types.ModuleType('pack'); pack.__path__ = [{str(folder)!r}]; sys.modules['pack'] = pack\n"
        "module = importlib.import_module('pack.ovi_model.ovi.prompt')\n"
        "module.clean_for_tokenizer('text')\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "RuntimeError: The Python package 'ftfy'" in result.stderr
    assert "requirements.txt" in result.stderr


@pytest.mark.parametrize("text", [
    GOOD,
    "A man says <S>Hi.<E> <AUDCAP>male voice<ENDAUDCAP>",
    'A sign reads "no entry". She says <S>Well.<E> Audio: female voice',
    "No speech here. Audio: wind",
    'No speech. Audio: a voice says "hello there" far away',
    "Its 12\" record spins. Audio: music",
])
def test_good_prompts_get_no_warning(text):
    assert prompt.check_tags(text) == []


@pytest.mark.parametrize("text, expected", [
    ("", "empty"),
    (" \n ", "empty"),
    ("He says <S>hello. Audio: voice", "<S> is never closed"),
    ("He says hello.<E> Audio: voice", "<E> has no <S>"),
    ("<S>a <S>b<E> Audio: voice", "<S> is opened again"),
    ("A. <S>b<E> <AUDCAP>rain", "<AUDCAP> is never closed"),
    ("A. <S>b<E> rain<ENDAUDCAP> Audio: x", "<ENDAUDCAP> has no <AUDCAP>"),
    ("He says <s>hello<e> Audio: voice", "<s> is read as plain text"),
    ("He says <S>hello</S> Audio: voice", "</S> is read as plain text"),
    ("He says <S>hello< E > Audio: voice", "< E > is read as plain text"),
    ("A. Audio: rain. Audio: wind", "There are 2 audio captions"),
    ("A. <AUDCAP>x<ENDAUDCAP> b <AUDCAP>y<ENDAUDCAP>", "There are 2 audio captions"),
    ("A. <AUDCAP>x Audio: y<ENDAUDCAP>", "There are 2 audio captions"),
    ("He nods. <S> <E> Audio: voice", "no words in between"),
    ("A. Audio: rain, then <S>hello<E>", "put the caption last"),
    ("A man <S>speaks<E>.", "no audio caption"),
    ('He says "good morning to you". Audio: voice', "may or may not be spoken"),
    ("He says \u201cgood morning\u201d. Audio: voice", "may or may not be spoken"),
])
def test_likely_mistakes_are_named(text, expected):
    assert any(expected in warning for warning in prompt.check_tags(text))


def test_each_warning_is_given_once():
    warnings = prompt.check_tags("<s>a<e> <s>b<e> Audio: x")
    assert len(warnings) == len(set(warnings)) == 2
