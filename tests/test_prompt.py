"""Caption styles, cleaning, assembling, and the warnings about tags."""

import subprocess
import sys
from pathlib import Path

import pytest
from ovi_native.ovi_model import prompt
from ovi_native.ovi_model.variants import PLAIN, TAGGED, get_variant
from parity_items import prompts

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
    assert prompt.assemble(" A. ", blank, PLAIN_VARIANT) == " A. "


@pytest.mark.parametrize("scene", ["A. Audio: wind", "A. <AUDCAP>wind<ENDAUDCAP> b"])
def test_two_captions_are_refused(scene):
    with pytest.raises(ValueError, match="given twice"):
        prompt.assemble(scene, "rain", PLAIN_VARIANT)


def test_brackets_and_numbers_survive_cleaning():
    text = "(heavy) rain at (3:30), [so] it goes: \\(x\\)"
    assert prompt.clean_for_tokenizer(text) == text


def test_cleaning_repairs_mojibake_and_entities():
    assert prompt.clean_for_tokenizer(" caf\u00c3\u00a9 &amp;lt;S&amp;gt; \n\t x ") == "caf\u00e9 <S> x"


def test_missing_ftfy_is_named():
    folder = Path(prompt.__file__).parent.parent
    code = (
        "import importlib, sys, types\n"
        "sys.modules['ftfy'] = None\n"
        f"pack = types.ModuleType('pack'); pack.__path__ = [{str(folder)!r}]; sys.modules['pack'] = pack\n"
        "module = importlib.import_module('pack.ovi_model.prompt')\n"
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
    ("A. <audcap>x<endaudcap> Audio: y", "<audcap> is read as plain text"),
    ("A man waves. audio: voice", "'audio:' is not an audio marker"),
    ("<S>Hi.<E> AUDIO: voice", "'AUDIO:' is not an audio marker"),
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
