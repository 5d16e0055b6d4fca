"""The tiny bundle: same bytes from the same seed, public names, safe writing, and files the stock nodes load."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import comfy.sd
import comfy.utils
import make_tiny
import pytest
import sentencepiece
import torch
from devlib.common import ROOT
from ovi_native.ovi_model.files.disk import write_atomically
from safetensors import safe_open
from tiny.audio import anti_alias_filter
from tiny.bundle import FILES, make_bundle
from tiny.sizes import BUNDLE
from tiny.text_encoder import tokenizer_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def shapes(file: Path) -> dict[str, tuple]:
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def test_what_users_have_of_it_writes_the_same_bytes(bundle, tmp_path):
    """In another process, without the tools of development, which the registry's archive leaves out."""
    for folder in ("tools", "ovi_model"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("devlib", "__pycache__"))
    command = [sys.executable, str(tmp_path / "tools" / "make_tiny.py"), str(tmp_path / "models")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "models") == digests(bundle)
    assert done.stdout.count("written") == len(FILES)


def test_seed_changes_weights_and_is_recorded(bundle, tmp_path):
    make_bundle(tmp_path, seed=5)
    changed = digests(tmp_path)
    assert all(changed[name] != digest for name, digest in digests(bundle).items())
    for name in FILES:
        with safe_open(tmp_path / name, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["ovi_tiny_random"] == "true"
        assert metadata["seed"] == "5"


def test_bundle_is_small(bundle):
    assert sum((bundle / name).stat().st_size for name in FILES) < 250e6


def test_written_once_and_repaired_when_damaged(tmp_path):
    assert len(make_bundle(tmp_path)) == len(FILES)
    assert make_bundle(tmp_path) == []
    name = "text_encoders/ovi_tiny_random_umt5.safetensors"
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-10])
    assert make_bundle(tmp_path) == [tmp_path / name]
    assert (tmp_path / name).read_bytes() == whole
    assert len(make_bundle(tmp_path, seed=1)) == len(FILES)
    assert len(make_bundle(tmp_path, seed=1, force=True)) == len(FILES)


def test_interrupted_write_leaves_nothing(tmp_path):
    def chunks():
        yield b"start"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "vae" / "file.safetensors", chunks())
    assert list((tmp_path / "vae").iterdir()) == []


def test_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "models").write_text("a file where the folder should be")
    assert make_tiny.main([str(tmp_path / "models")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Cannot write the tiny models to")
    assert error.count("\n") == 1


def test_joint_checkpoint_has_upstream_names(bundle, golden):
    listed = json.loads((golden / "full_keys.json").read_text())["keys"]
    expected = {name for name in listed if int((re.search(r"blocks\.(\d+)\.", name) or [0, 0])[1]) < BUNDLE.blocks}
    found = shapes(bundle / "diffusion_models/ovi_tiny_random.safetensors")
    assert found.keys() == expected
    assert {name: len(shape) for name, shape in found.items()} == {name: len(listed[name]) for name in expected}


@pytest.mark.parametrize("part", ["vae", "vocoder"])
def test_audio_files_have_upstream_names(bundle, golden, part):
    listed = json.loads((golden / "mmaudio" / f"{part}_tiny_manifest.json").read_text())["tensors"]
    found = shapes(bundle / f"vae/ovi_tiny_random_mmaudio_{part}.safetensors")
    assert found.keys() == listed.keys()
    assert all(len(shape) == len(listed[name]["shape"]) for name, shape in found.items())
    assert all(shape[2:] == tuple(listed[name]["shape"][2:]) for name, shape in found.items())


def test_anti_alias_filter_is_the_published_one(golden):
    with safe_open(golden / "mmaudio" / "golden_full.safetensors", "pt") as file:
        published = file.get_tensor("vocoder.activation_post.upsample.filter")
    torch.testing.assert_close(anti_alias_filter(), published, rtol=1e-6, atol=1e-8)


def test_tokenizer_takes_any_text():
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(), add_eos=True)
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2)
    assert pieces.encode("") == [1]
    for text in ("<S>Hello (at 3:30)!<E>", "漢字 ☃ ñandú", "a\\b"):
        ids = pieces.encode(text)
        assert pieces.unk_id() not in ids
        assert pieces.decode(ids) == text


def test_stock_vae_loader_reads_the_video_vae(bundle):
    weights, metadata = comfy.utils.load_torch_file(
        str(bundle / "vae/ovi_tiny_random_taew2_2.safetensors"), return_metadata=True)
    vae = comfy.sd.VAE(sd=weights, metadata=metadata)
    vae.throw_exception_if_invalid()
    assert set(weights) == set(vae.get_sd())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 48, 3, 8, 12, generator=generator)
    with torch.inference_mode():
        first, second = (vae.decode(latents[i:i + 1]) for i in (0, 1))
        again = vae.encode(first[0])
    assert first.shape == (1, 9, 128, 192, 3)
    assert 0.05 < first.std() < 0.4, "the picture is flat, or nothing but clipped values"
    assert 0.2 < first.mean() < 0.8
    assert ((first < 0) | (first > 1)).float().mean() < 0.1
    assert (first[:, 1:] - first[:, :-1]).abs().mean() > 0.01, "nothing moves"
    assert (first - second).std() > 0.5 * first.std(), "the picture does not depend on the latents"
    assert again.shape == (1, 48, 3, 8, 12)
    assert 0.2 < again.std() < 2
