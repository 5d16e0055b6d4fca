"""A short LoRA on the trained tiny Ovi, by the nodes and the stock loader: balls are purple with it, not without."""

import comfy.sd
import folder_paths
import pytest
import torch
from ovi_native.nodes.training import OviDataset
from ovi_native.nodes.training_lora import OviTrainLora
from ovi_native.tiny_world.measure.shapes import cover, on_grid
from ovi_native.tiny_world.scenes import NEW_COLOUR
from safetensors.torch import load_file
from tiny_ovi.clip_files import write_lesson
from tiny_ovi.evaluate import VARIANT, Models, Way, generate
from tiny_ovi.files import install
from tiny_ovi.lora import DEFAULTS, RECIPE

pytestmark = pytest.mark.slow
ASKED = ("A purple ball bounces fast in the middle. Audio: a bell at every bounce.",
         "There is a purple ball on the left, bouncing fast. Audio: wood sounds when the ball hits the floor.")
WAY = Way(steps=12)


@pytest.fixture
def models(tmp_path, monkeypatch) -> Models:
    install(tmp_path / "models")
    for name in ("input", "output", "user"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return Models(tmp_path / "models")


def test_a_short_lora_brings_the_new_colour(models, tmp_path):
    write_lesson(tmp_path / "input" / "lesson", new=6, known=0)
    with torch.inference_mode():
        dataset = OviDataset.execute("lesson", models.video_vae, models.audio_vae, models.clip, VARIANT, 64, 0.0, "",
                                     0.0).result[0]
        _, name, _ = OviTrainLora.execute(models.model, dataset, **{
            **DEFAULTS, **RECIPE, "name": "short", "steps": 50, "batch": 3, "learning_rate": 3e-3}).result
        lora = load_file(tmp_path / "output" / "loras" / name)
        patched, _ = comfy.sd.load_lora_for_models(models.model, None, lora, 1.0, 0.0)
        with_it, without = (purple(models, tmp_path, model) for model in (patched, models.model))
    assert with_it > 20 and with_it > 3 * without, (with_it, without)


def purple(models: Models, folder, model) -> float:
    """Purple pixels of a frame, over all that is asked for; a whole ball has about 133."""
    clips = generate(models, ASKED, folder / "clips", WAY, 2.0, seed=1, model=model)
    return sum(float(cover(on_grid(clip.frames))[NEW_COLOUR].sum((1, 2)).mean()) for clip in clips)
