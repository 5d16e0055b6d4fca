"""Prompt text for Ovi: speech between <S> and <E>, the soundtrack in the caption style each checkpoint was trained on.

The 720x720 checkpoint reads `<AUDCAP>caption<ENDAUDCAP>`, the 960x960 ones read `Audio: caption` at the end of the
text. Rewriting and cleaning give the reference's strings exactly (`formatter`, `clean_text` and the
UMT5 tokenizer's whitespace cleaning). Ours are the warnings, and that markers count in any case and width: broken
characters and full-width forms are mended first, markers then spelt as trained, and only then is the style decided.
"""

from __future__ import annotations

import html
import re

from .variants import PLAIN, TAGGED, Variant

SPEECH_OPEN, SPEECH_CLOSE = "<S>", "<E>"
CAPTION_OPEN, CAPTION_CLOSE = "<AUDCAP>", "<ENDAUDCAP>"
PLAIN_MARKER = "Audio:"

_TAGGED_CAPTION = re.compile(r"<AUDCAP>(.*?)<ENDAUDCAP>", re.DOTALL)
_SPEECH = re.compile(r"<S>.*?<E>", re.DOTALL)
_TAG_LIKE = re.compile(r"<\s*/?\s*(?:S|E|AUDCAP|ENDAUDCAP)\s*/?\s*>", re.IGNORECASE)
_ANY_TAG = re.compile(r"<\s*(/?)\s*(END)?AUDCAP\s*>", re.IGNORECASE)
_ANY_MARKER = re.compile(r"(^|\n|[^\w\s])(\s*)audio\s*[:\ufe55\uff1a\u2236]", re.IGNORECASE)  # but not "the audio: x"
_OPENINGS = re.compile(r"^(?:(?:audio\s*[:\ufe55\uff1a\u2236]|<AUDCAP>)\s*)+", re.IGNORECASE)
_QUOTED = re.compile(r'"[^"\n]*\w\s+\w[^"\n]*"|“[^”\n]*\w\s+\w[^”\n]*”|«[^»\n]*\w\s+\w[^»\n]*»|「[^」\n]+」')


def format_for(style: str, text: str) -> str:
    """`text` with its audio captions in the given style (`variants.TAGGED` or `variants.PLAIN`).

    To TAGGED: everything after the first `Audio:` becomes one caption, later markers and tags included. To PLAIN:
    every tagged caption is replaced where it stands. Text already in the style comes back unchanged. ValueError for an
    unknown style.
    """
    if style == TAGGED:
        scene, marker, caption = text.partition(PLAIN_MARKER)
        return f"{scene}{CAPTION_OPEN}{caption.lstrip()}{CAPTION_CLOSE}" if marker else text
    if style == PLAIN:
        return _TAGGED_CAPTION.sub(lambda match: f"{PLAIN_MARKER} {match[1]}", text)
    raise ValueError(f"Unknown caption style {style!r}: expected {TAGGED!r} or {PLAIN!r}.")


def repair(text: str) -> str:
    """Text with ftfy's repairs, full-width letters and signs made plain among them, and HTML entities undone twice.

    RuntimeError when the package ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise RuntimeError(
            "The Python package 'ftfy', which the prompt cleaning needs, is not installed: run "
            "'pip install -r requirements.txt' in the Ovi Native folder with ComfyUI's Python and restart ComfyUI."
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clean_for_tokenizer(text: str) -> str:
    """The text the tokenizer sees: repaired, and every run of whitespace made one space."""
    return " ".join(repair(text).split())


def spell_markers(text: str) -> str:
    """Text with its caption markers spelt as in training: `audio :` and `</audcap>` are `Audio:` and `<ENDAUDCAP>`.

    Not within speech, and not `audio:` after a word, where it belongs to a sentence.
    """
    def spell(part: str) -> str:
        part = _ANY_TAG.sub(lambda tag: CAPTION_CLOSE if tag[1] or tag[2] else CAPTION_OPEN, part)
        return _ANY_MARKER.sub(lambda found: f"{found[1]}{found[2]}{PLAIN_MARKER}", part)

    start, parts = 0, []
    for speech in _SPEECH.finditer(text):
        opening, closing = speech.start() + len(SPEECH_OPEN), speech.end() - len(SPEECH_CLOSE)
        parts += [spell(text[start:opening]), text[opening:closing]]
        start = closing
    return "".join([*parts, spell(text[start:])])


def clean_text(text: str) -> str:
    """What is to be seen only, for a text-to-image model: no speech, no tagged captions, nothing after `Audio:`."""
    text = _TAGGED_CAPTION.sub("", _SPEECH.sub("", text))
    return text.partition(PLAIN_MARKER)[0].strip()


def has_caption(text: str) -> bool:
    """Whether an audio caption in either style is written inline."""
    return PLAIN_MARKER in text or CAPTION_OPEN in text


def assemble(scene: str, audio_caption: str, variant: Variant) -> str:
    """The positive prompt for the tokenizer: the scene with its inline captions in the variant's style, then
    `audio_caption`, all cleaned.

    `audio_caption` may come with its own `Audio:` or <AUDCAP> markers, which are taken off first; blank means none.
    Markers may be in any case and width. ValueError when there is a caption both inline and in the field, because the
    model expects a single one.
    """
    scene = spell_markers(repair(scene))
    text = format_for(variant.caption_style, scene)
    caption = _bare_caption(audio_caption)
    if caption and has_caption(scene):
        raise ValueError(
            f"The audio caption is given twice: in the scene (after {PLAIN_MARKER!r} or {CAPTION_OPEN!r}) and in the "
            "audio_caption field. Keep one of them."
        )
    if caption and variant.caption_style == TAGGED:
        text += f" {CAPTION_OPEN}{caption}{CAPTION_CLOSE}"
    elif caption:
        text += f" {PLAIN_MARKER} {caption}"
    return " ".join(text.split())


def _bare_caption(caption: str) -> str:
    caption = _OPENINGS.sub("", spell_markers(repair(caption).strip()), count=1)
    while caption.endswith(CAPTION_CLOSE):
        caption = caption.removesuffix(CAPTION_CLOSE).rstrip()
    return caption


def check_tags(text: str) -> list[str]:
    """What is likely not meant in a finished prompt, one sentence each; empty when nothing stands out.

    The reference accepts any text, so these are warnings to show, never a reason to stop.
    """
    if not text.strip():
        return ["The prompt is empty."]
    warnings = _tag_faults(text) + _speech_warnings(text)
    captions = text.count(PLAIN_MARKER) + text.count(CAPTION_OPEN)
    if captions > 1:
        warnings.append(f"There are {captions} audio captions, where the model was trained with one, at the end: join "
                        "them.")
    if not captions:
        warnings.append(
            "There is no audio caption: voices, music and room tone are left to chance. Fill in audio_caption, or end "
            "the scene with 'Audio: ...'."
        )
    return warnings


def broken_tags(scene: str) -> list[str]:
    """What nobody can mean in a scene as it is typed, one sentence each: tags that do not pair up or are misspelt."""
    return _tag_faults(spell_markers(repair(scene)))


def _tag_faults(text: str) -> list[str]:
    return [*_pairing_warnings(text, SPEECH_OPEN, SPEECH_CLOSE), *_pairing_warnings(text, CAPTION_OPEN, CAPTION_CLOSE),
            *_spelling_warnings(text)]


def _pairing_warnings(text: str, opening: str, closing: str) -> list[str]:
    """Tags that do not pair up: stray closings, openings inside an open pair, an opening never closed."""
    warnings = []
    is_open = False
    for tag in re.findall(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if tag == opening and is_open:
            warnings.append(f"{opening} is opened again before {closing}.")
        elif tag == closing and not is_open:
            warnings.append(f"{closing} has no {opening} before it.")
        is_open = tag == opening
    if is_open:
        warnings.append(f"{opening} is never closed: add {closing} after its words.")
    return warnings


def _spelling_warnings(text: str) -> list[str]:
    warnings = []
    exact = {SPEECH_OPEN, SPEECH_CLOSE, CAPTION_OPEN, CAPTION_CLOSE}
    for tag in dict.fromkeys(_TAG_LIKE.findall(text)):
        if tag not in exact:
            warnings.append(f"{tag} is read as plain text: tags are exactly {', '.join(sorted(exact))}, in capitals.")
    return warnings


def _speech_warnings(text: str) -> list[str]:
    warnings = []
    if any(not speech[len(SPEECH_OPEN) : -len(SPEECH_CLOSE)].strip() for speech in _SPEECH.findall(text)):
        warnings.append(f"{SPEECH_OPEN}{SPEECH_CLOSE} has no words in between.")
    if _SPEECH.search(text.partition(PLAIN_MARKER)[2]):
        warnings.append(
            f"{SPEECH_OPEN} stands after {PLAIN_MARKER!r}, where everything counts as audio caption: put the caption "
            "last."
        )
    if SPEECH_OPEN not in text and _QUOTED.search(clean_text(text)):
        warnings.append(
            f"There are words in quotation marks but none between {SPEECH_OPEN} and {SPEECH_CLOSE}: untagged text may "
            f"or may not be spoken. Write what is to be said as {SPEECH_OPEN}words{SPEECH_CLOSE}."
        )
    return warnings
