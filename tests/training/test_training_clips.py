"""Which files of a folder are a clip, and what each is called."""

import json

import pytest
from ovi_native.ovi_model.training.clips import find_clips


def put(folder, *names, text=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"caption of {name}" if text is None else text, "utf-8")


def found(folder):
    clips, faults = find_clips(folder)
    return {clip.name: clip for clip in clips}, {fault.name: fault.reason for fault in faults}


def test_what_shares_a_name_is_one_clip(tmp_path):
    put(tmp_path, "a.mp4", "a.txt", "b.MOV", "b.wav", "b.txt", "only.flac", "only.txt", "deep/er/c ü.webm",
        "deep/er/c ü.txt", "walk/2.png", "walk/10.png", "walk/1.jpg", "walk.wav", "walk.txt", "run/1.png",
        "run/sound.wav", "run.txt")
    clips, faults = found(tmp_path)
    assert not faults and list(clips) == ["a", "b", "deep/er/c ü", "only", "run", "walk"]
    assert clips["a"].video == tmp_path / "a.mp4" and clips["a"].sound is None and clips["a"].has_picture
    assert clips["b"].video == tmp_path / "b.MOV" and clips["b"].sound == tmp_path / "b.wav"
    assert clips["only"].sound and not clips["only"].has_picture
    assert [path.name for path in clips["walk"].frames] == ["1.jpg", "2.png", "10.png"]
    assert clips["walk"].sound == tmp_path / "walk.wav" and clips["run"].sound == tmp_path / "run" / "sound.wav"
    assert clips["deep/er/c ü"].caption == "caption of deep/er/c ü.txt"


def test_what_is_hidden_linked_or_a_cover_is_no_clip(tmp_path):
    put(tmp_path, "a.mp4", "a.txt", "a.png", "._a.mp4", ".git/b.mp4", "b.txt", "notes.txt", "cover.jpg")
    put(tmp_path.parent / "elsewhere", "c.mp4", "c.txt")
    (tmp_path / "link").symlink_to(tmp_path.parent / "elsewhere")
    clips, faults = found(tmp_path)
    assert list(clips) == ["a"] and not faults


@pytest.mark.parametrize("caption, reason", [
    (None, r"it has no caption: write a.txt beside it"), (b"", "its caption is empty"), (b" \n\t", "caption is empty"),
    (b"\xff\xfe\x00", r"its caption a.txt cannot be read"), (b"x" * 100_001, "longer than 100,000 bytes")])
def test_a_clip_without_caption_is_named(tmp_path, caption, reason):
    put(tmp_path, "a.mp4", "b.mp4", "b.txt")
    if caption is not None:
        (tmp_path / "a.txt").write_bytes(caption)
    clips, faults = found(tmp_path)
    assert list(clips) == ["b"] and list(faults) == ["a"]
    assert reason in faults["a"]


def test_two_files_of_one_name_are_named(tmp_path):
    put(tmp_path, "a.mp4", "a.webm", "a.txt", "s.wav", "s.flac", "s.txt", "w.mp4", "w/1.png", "w.txt")
    clips, faults = found(tmp_path)
    assert not clips
    assert faults == {"a": "a.mp4 and a.webm have one name: rename or remove all but one",
                      "s": "s.flac and s.wav have one name: rename or remove all but one",
                      "w": "w.mp4 and w have one name: rename or remove all but one"}


ROWS = [("a.mp4", "A ball, \"red\".\nAudio: a bell."), ("sub/b.mp4", "Ein Bäll"), ("sub\\c", "third")]


def write_csv(folder, rows=ROWS, head="file,caption"):
    lines = ['"{}","{}"'.format(file, caption.replace('"', '""')) for file, caption in rows]
    (folder / "captions.csv").write_text("\n".join([head, *lines]), "utf-8-sig")


def write_json(folder, rows=ROWS):
    lines = [json.dumps({"file": file, "caption": caption}) for file, caption in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_a_table_captions_every_clip(tmp_path, write):
    put(tmp_path, "a.mp4", "sub/b.mp4", "sub/c/1.png")
    write(tmp_path)
    clips, faults = found(tmp_path)
    assert not faults and [clip.caption for clip in clips.values()] == [caption for _, caption in ROWS]


def test_a_text_goes_before_the_table_and_what_is_not_there_is_named(tmp_path):
    put(tmp_path, "a.mp4", "a.txt")
    write_csv(tmp_path, [*ROWS, ("a.mp4", "another")])
    clips, faults = found(tmp_path)
    assert clips["a"].caption == "caption of a.txt"
    assert faults == {"captions.csv, line 6": "a has another one already",
                      "sub/b": "the table of captions names it, and there is no such clip",
                      "sub/c": "the table of captions names it, and there is no such clip"}


@pytest.mark.parametrize("line", ["{", "[1]", '{"file": "x"}', '{"file": 3, "caption": "x"}',
                                  '{"file": "", "caption": ""}', "[" * 100_000])
def test_a_broken_line_is_named_and_the_others_count(tmp_path, line):
    put(tmp_path, "a.mp4")
    (tmp_path / "captions.jsonl").write_text(f'{line}\n{{"file": "a.mp4", "caption": "x"}}', "utf-8")
    clips, faults = found(tmp_path)
    assert list(clips) == ["a"] and list(faults) == ["captions.jsonl, line 1"]


@pytest.mark.parametrize("content", [b"", b"clip,text\na,b", b"file,caption\n\xff,x", b'file,caption\n"a,b'])
def test_a_table_that_is_none_is_a_sentence(tmp_path, content):
    put(tmp_path, "a.mp4")
    (tmp_path / "captions.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"captions\.csv cannot be read .* needs UTF-8 text with 'file' and 'caption'"):
        find_clips(tmp_path)


def test_two_tables_and_no_folder_are_sentences(tmp_path):
    write_csv(tmp_path)
    write_json(tmp_path)
    with pytest.raises(ValueError, match=r"both captions\.csv and captions\.jsonl"):
        find_clips(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        find_clips(tmp_path / "none")


def test_no_table_names_a_file_outside(tmp_path):
    put(tmp_path, "outside.mp4")
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in", [("../outside.mp4", "x"), (str(tmp_path / "outside.mp4"), "x")])
    clips, faults = found(tmp_path / "in")
    assert not clips and len(faults) == 2
