"""The trained tiny Ovi's files: packed without loss that matters, written for ComfyUI's own loaders, whole or not."""

import subprocess
import sys
from pathlib import Path

import install_tiny
import pytest
import torch
from devlib.common import ROOT
from devlib.weights import WORLD_FILES
from safetensors.torch import load_file
from tiny.compare import relative_l2
from tiny_ovi.files import FILES, FIRST_FRAME, INPUT, SHIPPED, read, unpacked
from tiny_ovi.packing import expand, pack


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("my ComfyUI")
    (folder / "input").mkdir()
    command = [sys.executable, str(ROOT / "tools" / "install_tiny.py"), str(folder / "models")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" MB ") == len(FILES) + 2
    return folder / "models"


def test_packing_keeps_a_row_to_a_127th_of_its_largest_value():
    tensors = {"a.weight": torch.randn(7, 5, 3) * torch.logspace(-3, 3, 7).view(-1, 1, 1), "a.bias": torch.randn(7),
               "table": torch.randn(1, 6, 4), "zeros": torch.zeros(3, 4)}
    packed = pack(tensors)
    assert packed["a.weight"].dtype == torch.int8 and packed["a.bias"].dtype == torch.float16
    found = expand(packed, torch.float32)
    assert found.keys() == tensors.keys()
    error = (found["a.weight"] - tensors["a.weight"]).abs().amax((1, 2))
    assert (error <= tensors["a.weight"].abs().amax((1, 2)) / 127 / 2 * 1.001).all()
    assert relative_l2(found["table"], tensors["table"]) < 1e-3 and not found["zeros"].any()
    assert {x.dtype for x in expand(packed, torch.bfloat16).values()} == {torch.bfloat16}


def test_what_is_shipped_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 30e6


def test_files_are_where_the_demo_looks_for_them(models):
    assert {role: tuple(name.split("/")) for role, name in FILES.items()} == WORLD_FILES
    for role, name in FILES.items():
        written, metadata = read(models / name)
        expected, _ = unpacked(role)
        assert metadata["ovi_tiny_world"] == "true"
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in written)
    assert (models.parent / "input" / INPUT).read_bytes() == (SHIPPED / FIRST_FRAME).read_bytes()


def test_the_loaders_read_them(models):
    import comfy.sd
    from ovi_native.ovi_model.media.audio_vae import load_audio_vae
    from ovi_native.ovi_model.ovi.checkpoint import load_model
    from ovi_native.ovi_model.text.umt5 import load_text_encoder

    model, report = load_model(str(models / FILES["model"]))
    assert report.variant == "960x960_5s" and len(model.model.diffusion_model.blocks) == 4
    load_text_encoder(str(models / FILES["text_encoder"]))
    load_audio_vae(str(models / FILES["audio_vae"]), str(models / FILES["vocoder"]))
    vae = comfy.sd.VAE(sd=load_file(models / FILES["video_vae"]))
    vae.throw_exception_if_invalid()
    assert vae.latent_channels == 48


def test_an_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "models").write_text("a file where the folder should be")
    assert install_tiny.main([str(tmp_path / "models")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Cannot write the tiny models to") and error.count("\n") == 1
