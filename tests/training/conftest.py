"""The tiny random encoders, as their loaders give them."""

import comfy.sd
import pytest
from devlib.weights import TINY
from ovi_native.ovi_model.text import umt5
from ovi_native.ovi_model.training.encoding import Encoders
from tiny.video_vae import video_vae


@pytest.fixture(scope="session")
def encoders(tiny_models, sound_vae):
    path = tiny_models / "text_encoders" / TINY["text_encoder"]
    return Encoders(comfy.sd.VAE(sd=video_vae(0)), sound_vae, umt5.load_text_encoder(str(path)))
