"""Opening weight files: what is missing, damaged, unsafe or something else is refused in a sentence."""

import os
import pickle
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from ovi_native.ovi_model.files.identify import describe_weights
from ovi_native.ovi_model.files.names import printable
from ovi_native.ovi_model.files.reader import load_weights
from safetensors.torch import save, save_file
from support.loading_state import dynamic_vram

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_reads_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(TENSORS, path, metadata={"note": "kept"})
    else:
        torch.save(TENSORS, path)
    tensors, metadata = load_weights(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
    assert metadata == ({"note": "kept"} if path.suffix == ".safetensors" else {})


@pytest.mark.parametrize("content", [
    {"generator": TENSORS},
    {"generator": TENSORS, "steps": 5, "optimizer": {"lr": 0.1}},
    {f"generator.{key}": value for key, value in TENSORS.items()},
    TENSORS,
])
def test_finds_nested_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    tensors, _ = load_weights(tmp_path / "w.pt", nested="generator")
    assert tensors.keys() == TENSORS.keys()


def test_never_runs_code_from_a_pickle(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    torch.save({"a": Payload()}, tmp_path / "evil_zip.pt")
    for name in ("evil.pt", "evil_zip.pt"):
        with pytest.raises(RuntimeError, match=r"evil\w*\.pt cannot be read .*get the safetensors version"):
            load_weights(tmp_path / name)


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("w.safetensors", b"", "damaged or only partly downloaded"),
    ("w.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{", "damaged or only partly downloaded"),
    ("w.pth", b"PK\x03\x04 not a zip", "damaged or only partly downloaded"),
    ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS placeholder"),
    ("w.safetensors", b"<!DOCTYPE html><html></html>", "is a web page"),
    ("w.pth", b"\n<html>", "is a web page"),
])
def test_refuses_what_is_no_weight_file(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        load_weights(tmp_path / name)
    assert name in str(caught.value)


def test_refuses_cut_and_empty_files(tmp_path):
    save_file(TENSORS, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    with pytest.raises(RuntimeError, match="download it again"):
        load_weights(tmp_path / "cut.safetensors")
    torch.save({"epoch": 3, "name": "x"}, tmp_path / "no_tensors.pt")
    with pytest.raises(RuntimeError, match="holds no tensors"):
        load_weights(tmp_path / "no_tensors.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(RuntimeError, match=r"list\.pt"):
        load_weights(tmp_path / "list.pt")
    with pytest.raises(RuntimeError, match="is not there"):
        load_weights(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(("shapes", "words"), [
    ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "shared.weight": (32128, 8)}, "T5 .*32128"),
    ({"blocks.0.attn.q.weight": (8, 8), "token_embedding.weight": (256384, 8)}, "UMT5 .*256384"),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "CLIP text encoder"),
    ({"data_mean": (1, 128, 1), "decoder.conv_in.weight": (8, 40, 3)}, "44 kHz VAE"),
    ({"decoder.conv_in.weight": (8, 20, 3)}, "16 kHz VAE without its vocoder"),
    ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "image or video VAE"),
    ({"decoder.conv1.weight": (8, 16, 3, 3, 3), "encoder.conv1.weight": (8, 3, 3, 3, 3)}, r"Wan 2\.1"),
    ({"decoder.conv1.weight": (8, 48, 3, 3, 3), "encoder.conv1.weight": (8, 12, 3, 3, 3)}, r"Wan 2\.2"),
    ({"conv_pre.weight_v": (8, 80, 7)}, "vocoder"),
    ({"patch_embedding.weight": (8, 48, 1, 2, 2)}, "Wan video model with 48"),
    ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}, "diffusion model"),
    ({"blocks.0.q.lora_A.weight": (8, 8)}, "LoRA"),
    ({"z": (1,), "y": (1,)}, r"2 tensors this pack does not know \(y, z"),
])
def test_describes_what_a_file_is(shapes, words):
    text = describe_weights({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert re.search(words, text), text


# --- headers that the library refuses and core's own reader would take ------------------------------------------------

WORD = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(("header", "data"), [
    (f'{{"a":{WORD}}}', 12),
    ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8),
    (f'{{"a":{WORD},"b":{{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}}}', 12),
    (f'{{"a":{WORD},"b":{{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}}}', 4),
    (f'{{"a":{WORD},"a":{WORD}}}', 4),
    ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    (f'{{"a":{WORD},"__metadata__":{{"x":"1","x":"2"}}}}', 4),
    (f'{{"a":{WORD},"__metadata__":{{"x":"\\ud800"}}}}', 4),
    (f'{{"a":{WORD},"__metadata__":{{"x":{"[" * 100_000}{"]" * 100_000}}}}}', 4),
    (f'{{"a":{WORD},"__metadata__":{{"x":{"9" * 100_000}}}}}', 4),
    ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', 4),
    ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', 4),
    ('{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', 4),
    ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', 4),
    ('{"a":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,4]}}', 4),
    (f'{{"a":{WORD}}}'.encode("utf-16"), 4),
    (f'{{"a":{WORD},"b":[{"[]," * 600_000}[]]}}', 4),
])
@pytest.mark.parametrize("dynamic", [False, True])
def test_headers_are_checked_before_core_reads_them(tmp_path, header, data, dynamic):
    """The check stands before both of core's readers, the library and the one that streams from disk (DynamicVRAM)."""
    content = header if isinstance(header, bytes) else header.encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(data))
    with dynamic_vram(dynamic), pytest.raises(RuntimeError, match=r"read as a weight file .*download it again"):
        load_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(save(TENSORS))
    with dynamic_vram(dynamic):
        assert load_weights(tmp_path / "w.safetensors")[0].keys() == TENSORS.keys()


# --- names ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "shown"), [
    ("good\udcff.safetensors", r"good\xff.safetensors"), ("a\nb\x1b[31m.pt", r"a\nb\x1b[31m.pt"),
    ("nept.\u202etp", r"nept.\u202etp"), ("zero\u200bwidth", r"zero\u200bwidth"), ("\ud800", r"\ud800"),
    ("é 模型\u3000☃ 🦊.pth", "é 模型\u3000☃ 🦊.pth")])
def test_names_are_printable(name, shown):
    assert printable(name) == shown
    printable(name).encode("utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
@pytest.mark.parametrize("suffix", [b".safetensors", b".pth"])
def test_names_that_are_no_text(tmp_path, suffix):
    """Such a file opens or is refused for its name, and what is wrong with it can be said."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/good\xff" + suffix))
    for content in (b"", b"<html>", b"version https://git-lfs", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"good\\xff") as caught:
            load_weights(path)
        str(caught.value).encode("utf-8")
    if suffix == b".pth":
        torch.save(TENSORS, path.open("wb"))
        assert load_weights(path)[0].keys() == TENSORS.keys()
    else:  # the safetensors library takes no such names
        path.write_bytes(save(TENSORS))
        with pytest.raises(RuntimeError, match=r"good\\xff.safetensors cannot be opened: .* Rename"):
            load_weights(path)
    path.unlink()
    with pytest.raises(RuntimeError, match=r"good\\xff.* is not there"):
        load_weights(path)
