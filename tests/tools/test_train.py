"""The command that trains: what it reads, says and refuses, and a run of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devlib.weights import TINY, TINY_FILES
from safetensors import safe_open
from safetensors.torch import load_file
from support.clip_files import write_clip
from training import session
from training.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]


def text(models: Path, last: str, **training) -> str:
    paths = {role: models / folder / name for role, (folder, name) in TINY_FILES.items()}
    lines = [f"{key} = {value!r}" for key, value in {"steps": 2, "save_every": 1, "log_every": 1, **training}.items()]
    return "\n".join([
        'name = "toy"', 'output = "out"', "[model]", f'file = "{paths["model"]}"', "[data]", 'folder = "clips"',
        f'vae = "{paths["video_vae"]}"', f'audio_vae = "{paths["audio_vae"]}"', f'vocoder = "{paths["vocoder"]}"',
        f'text_encoder = "{paths["text_encoder"]}"', "size = 64", "longest_seconds = 0.4", 'cache = "cache"',
        "[training]", *lines, last])


@pytest.fixture
def folder(tmp_path, tiny_models):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", 1, 9)
    (tmp_path / "lora.toml").write_text(text(tiny_models, "[lora]\nrank = 2\nalpha = 2"))
    return tmp_path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / "train.py", *map(str, arguments)], text=True,
                          capture_output=True, timeout=300)


def test_a_lora_from_the_command_line(folder):
    done = run(folder / "lora.toml")
    assert done.returncode == 0, done.stderr
    assert "Trains a LoRA of rank 2" in done.stdout and "Memory at the largest clips" in done.stdout
    assert "Begins anew." in done.stdout and "step 2 of 2, loss" in done.stdout and "trained 2 of 2" in done.stdout
    with safe_open(folder / "out" / "toy.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "2"
    assert (folder / "out" / "toy" / "checkpoint_00000002.safetensors").exists()
    assert len((folder / "out" / "toy" / "log.jsonl").read_text().splitlines()) == 2


def test_full_training_goes_on_and_ends_in_a_checkpoint(folder, tiny_models):
    """In this process, as importing takes longer than all else."""
    path = folder / "full.toml"
    path.write_text(text(tiny_models, '[full]\nrecipe = "fusion"\nfresh_fusion = true', learning_rate=1e-3))
    said = session.run(session.read(path), lambda _: None)
    assert "all attention of both towers" in said[0]
    path.write_text(text(tiny_models, '[full]\nrecipe = "fusion"\nfresh_fusion = true', learning_rate=1e-3, steps=3))
    settings = session.read(path)
    lines = list(session.announce(settings))
    assert "Goes on from checkpoint_00000002.safetensors." in lines and "3 steps of 1 clips" in lines[0]
    assert "goes on after step 2" in session.run(settings, lambda _: None)
    from ovi_native.ovi_model.ovi import checkpoint

    patcher, _ = checkpoint.load_model(str(folder / "out" / "toy.safetensors"))
    before = checkpoint.load_model(str(tiny_models / "diffusion_models" / TINY["model"]))[0].model.state_dict()
    after = patcher.model.state_dict()
    for name in ("ffn.0.weight", "cross_attn.k_fusion.weight", "self_attn.q.weight"):
        key = f"diffusion_model.blocks.0.{name}"
        assert bool((before[key] == after[key]).all()) == ("ffn" in name)


def test_full_training_whose_checkpoints_are_all_damaged_begins_as_at_first(folder, tiny_models):
    """Also with fresh fusion attention, which checkpoints hold otherwise; and another model is refused."""
    path, out = folder / "full.toml", folder / "out"
    path.write_text(text(tiny_models, '[full]\nrecipe = "fusion layers"\nfresh_fusion = true'))
    session.run(session.read(path), lambda _: None)
    truth = load_file(out / "toy.safetensors")
    path.write_text(path.read_text().replace("random.safetensors", "world.safetensors", 1))
    with pytest.raises(ValueError, match="toy was begun on another model"):
        session.run(session.read(path), lambda _: None)
    path.write_text(path.read_text().replace("world.safetensors", "random.safetensors", 1))
    for damaged in (out / "toy").glob("checkpoint*"):
        damaged.write_bytes(damaged.read_bytes()[:1000])
    said = session.run(session.read(path), lambda _: None)
    assert sum("is damaged" in line for line in said) == 2
    again = load_file(out / "toy.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in truth.items())


@pytest.mark.parametrize("change, words", [
    (("rank = 2", "rnak = 2"), r"\[lora\] rnak is no setting: expected one of rank, alpha, towers, layers"),
    (("steps = 2", "steps = 2.5"), r"\[training\] steps must be a whole number, but got 2.5"),
    (("steps = 2", ""), r"\[training\] steps is missing"),
    (("[lora]", "[lore]"), r"one of the sections \[lora\] and \[full"),
    (('name = "toy"', ""), "name is missing"), (("[lora]", "[lora"), "is no TOML"),
    (("alpha = 2", 'towers = "left"'), "towers of a LoRA must be one of both"),
    (("alpha = 2", 'layers = "fusion"'), "layers must be a list of texts"),
    (('folder = "clips"', 'folder = "klips"'), r"\[data\] folder: .*klips is not there"),
    (("[lora]\nrank = 2\nalpha = 2", '[full]\nrecipe = "all"'), r"\[full\] recipe must be one of audio, video, fusion"),
    (("[model]", '[model]\nweight_dtype = "fp16"'), r"\[model\] weight_dtype must be one of default, bf16"),
    (("steps = 2", "steps = 0"), "steps of a training must be at least 1, but got 0"),
    (("steps = 2", "steps = 2\nlearning_rate = nan"), "learning_rate of a training must be from 0 to 1, but got nan"),
    (("steps = 2", 'steps = 2\ndistribution = "cosine"'), "one of logit-normal, uniform, but got 'cosine'"),
    (("steps = 2", "steps = 2\nvideo_given = 0.7\naudio_given = 0.7"), "must not exceed 1 together"),
    (("steps = 2", "steps = 2\nbatch = 0"), r"\[training\] batch must be at least 1, but got 0")])
def test_what_is_wrong_in_a_file_is_named(folder, change, words):
    path = folder / "lora.toml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises((ValueError, RuntimeError), match=words):
        session.read(path)


def test_a_file_from_elsewhere_is_not_overwritten(folder):
    (folder / "out").mkdir()
    (folder / "out" / "toy.safetensors").write_bytes(b"somebody's")
    with pytest.raises(RuntimeError, match=r"toy\.safetensors is there already.*choose another name"):
        session.read(folder / "lora.toml")


def test_defaults_are_the_nodes(folder):
    from ovi_native.nodes.training_lora import OviTrainLora

    settings = read_settings(folder / "lora.toml")
    inputs = OviTrainLora.define_schema().inputs
    shared = {item.id: item.default for item in inputs if hasattr(settings.training, item.id)}
    (folder / "lora.toml").write_text((folder / "lora.toml").read_text().replace("save_every = 1\n", ""))
    defaults = vars(read_settings(folder / "lora.toml").training)
    for name in shared.keys() - {"steps", "save_every"}:
        assert defaults[name] == shared[name], name


def test_tensorboard_that_is_missing_is_said_before_training(folder, tiny_models, monkeypatch):
    path = folder / "lora.toml"
    path.write_text(text(tiny_models, "[lora]", tensorboard="?").replace("tensorboard = '?'", "tensorboard = true"))
    monkeypatch.setattr("ovi_native.ovi_model.training.log.importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="tensorboard is not installed"):
        session.run(session.read(path), lambda _: None)
    assert not list((folder / "out").rglob("*.safetensors"))
