"""Every input of every node, with values that graphs can bring: a clear sentence or a finite result, never a raw error.

A linked input reaches a node unchecked: core compares only what stands in a widget with the declared range, and a NaN
passes even that. So numbers outside their range, odd tensors and odd texts are handed to `execute` itself, drawn by
hypothesis, always the same ones. An error counts as a sentence of ours if a `raise` of this pack made it. NaN and
infinity as a number must always be refused: what they do to a MODEL or a GUIDER shows only when it is sampled with.
"""

import ast
import math
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from devlib.weights import TINY, TINY_FILES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ovi_native.nodes import NODES
from ovi_native.nodes.latents import OviEmptyLatent
from ovi_native.nodes.prompt import OviPrompt
from ovi_native.ovi_model.media import audio_vae
from ovi_native.ovi_model.ovi import checkpoint, latents
from ovi_native.ovi_model.sampling import solvers
from ovi_native.ovi_model.text import umt5
from safetensors.torch import save_file
from support.clip_files import write_clip
from support.training import MemoryClips
from tiny.inputs import noise
from tiny.models import plain_wan, tiny_model, write_checkpoint
from tiny.sizes import BUNDLE, Sizes
from tiny.video_vae import video_vae as taehv_weights

PACK = Path(__file__).resolve().parents[2]
SCHEMAS = {node.GET_SCHEMA().node_id: node for node in NODES}
EXAMPLES = 40  # a node
JUDGED = {"LATENT", "IMAGE", "AUDIO", "SIGMAS", "INT", "FLOAT"}  # a text that is not finite is the sampler's to refuse
LATENT_FILE = f"saved{latents.ENDING}"
SIZES = Sizes(text=BUNDLE.text)
SMALL = Sizes(heads=1, blocks=2, ffn=128, text=BUNDLE.text, conv_hidden=32)
LONG = {("OviTrainLora", "steps"): 100}  # more would be accepted, and take days


# --- values that nodes take ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(tiny_models, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A good value for every kind of socket, by the name of the input or else its type; files are the tiny bundle's."""
    folders = {folder: tiny_models / folder for folder, _ in TINY_FILES.values()} | {
        "loras": tmp_path_factory.mktemp("loras"), "output": tmp_path_factory.mktemp("output")}
    before = {folder: list(folder_paths.get_folder_paths(folder)) for folder in folders if folder != "output"}
    for folder in before:
        folder_paths.add_model_folder_path(folder, str(folders[folder]), is_default=True)
    paths = {role: str(tiny_models / folder / name) for role, (folder, name) in TINY_FILES.items()}
    clip = umt5.load_text_encoder(paths["text_encoder"])
    prompt = OviPrompt.execute(clip, "A bell rings <S>Now.<E>", "960x960_5s").args
    latent = OviEmptyLatent.execute(
        variant="960x960_5s", aspect="custom", width=64, height=64, seconds=0.0, frames=5, batch_size=1).args[0]
    latents.save(latent, folders["output"] / LATENT_FILE, {}, "test")
    save_file({f"blocks.0.self_attn.q.{half}.weight": torch.ones(SIZES.dim, SIZES.dim)
               for half in ("lora_A", "lora_B")}, folders["loras"] / "lora.safetensors")
    (folders["output"] / "clips").mkdir()
    write_clip(folders["output"] / "clips" / "a.mp4", 1, 5)
    video_vae = comfy.sd.VAE(sd=taehv_weights(0))
    trained = write_checkpoint(tmp_path_factory.mktemp("model"), "ovi_960x960_5s.safetensors", SMALL)
    yield {
        "OviTrainLora.model": checkpoint.load_model(str(trained))[0], "OVI_DATASET": MemoryClips(width=BUNDLE.text),
        "rank": 2,
        "MODEL": tiny_model(sizes=SIZES), "CLIP": clip, "VAE": video_vae, "audio_vae":
            audio_vae.load_audio_vae(paths["audio_vae"], paths["vocoder"]),
        "CONDITIONING": prompt[0], "negative": prompt[1], "LATENT": latent,
        "IMAGE": torch.rand(1, 64, 64, 3), "AUDIO": {"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000},
        "SIGMAS": solvers.make_sigmas("euler", 2), "model_name": TINY["model"],
        "text_encoder_name": TINY["text_encoder"], "vae_name": TINY["audio_vae"], "vocoder_name": TINY["vocoder"],
        "steps": 2, "skip_layer": 1, "frames": 5, "width": 64, "height": 64, "aspect": "custom", "seconds": 0.0,
        "resize": "crop", "lora_name": "lora.safetensors", "OviLoadLatent.latent": f"{LATENT_FILE} [output]",
        "OviFitSound.seconds": 0.5, "OviDataset.folder": "clips [output]", "OviDataset.size": 64,
        "output": str(folders["output"]),
    }
    for folder, roots in before.items():
        folder_paths.folder_names_and_paths[folder][0][:] = roots


def odd_latents() -> list[Any]:
    """Latents as other nodes leave them, or as nobody should."""
    video, audio = noise(1, 48, 2, 4, 4), noise(1, 20, 8)

    def joint(*streams: torch.Tensor, **more: Any) -> dict[str, Any]:
        return {"samples": NestedTensor(streams), **more}

    nan = video.clone()
    nan[..., 0] = math.nan
    return [
        {}, {"samples": None}, {"samples": video}, {"samples": audio}, {"samples": torch.zeros(1, 4, 8, 8)},
        {"samples": torch.zeros(1, 1, 99)},
        joint(video, audio, audio), joint(audio, video), joint(video), joint(video[:, :, :0], audio),
        joint(video, audio[..., :0]), joint(video[:0], audio[:0]), joint(video[..., :0], audio), joint(nan, audio),
        joint(video, audio * math.inf), joint(video[:, :16], audio), joint(video, audio[:, :8]),
        joint(torch.cat([video, video]), audio), joint(video[..., :3, :3], audio), joint(video.half(), audio.half()),
        joint(video, audio, noise_mask=torch.zeros(1, 1, 8, 8)),
        joint(video, audio, noise_mask=NestedTensor((torch.ones(1, 1, 2, 4, 4), torch.zeros(1, 1, 8)))),
        joint(video, audio, ovi_variant="nonsense"), joint(video, audio, batch_index=[5]),
    ]


def odd_conditioning() -> list[Any]:
    def of(text: torch.Tensor, **options: Any) -> list:
        return [[text, {"pooled_output": None, **options}]]

    width = BUNDLE.text
    return [[], [[None, {}]], of(torch.zeros(1, 0, width)), of(torch.zeros(0, 4, width)), of(noise(1, 4, 7)),
            of(noise(4, width)), of(noise(1, 600, width)), of(torch.zeros(1, 512, width)),
            of(noise(1, 4, width) * math.nan), of(noise(1, 4, width), ovi_audio_text=noise(1, 4, 9)),
            of(noise(1, 4, width), ovi_skip_layer=10**6), of(noise(3, 4, width)), of(noise(1, 4, width).half()),
            of(noise(1, 4, width), start_percent=0.9, end_percent=0.1),
            of(noise(1, 4, width), ovi_variant="720x720_5s")]


ODD_NUMBERS = [-2**63, -1, 0, 1, 7, 31, 10**6, 2**31, 2**64]
ODD_FLOATS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 0.5, 1.0, 1e6, 1e30]
ODD_TEXTS = ["", " ", "\x00", "\udcff", "../../etc/passwd", "<S>", "<S><S>a<E>", "<AUDCAP>", "Audio: a Audio: b",
             "a" * 20000, "\u202eabc", "<script>alert(1)</script>", "\U0001f600" * 600,
             "((a:1.2)", "embedding:none", "nonsense"]
ODD_IMAGES = [torch.zeros(0, 64, 64, 3), torch.zeros(1, 0, 64, 3), torch.zeros(1, 64, 64, 1), torch.zeros(64, 64, 3),
              torch.full((1, 64, 64, 3), math.nan), torch.full((1, 64, 64, 3), 1e9), torch.zeros(1, 1, 1, 3),
              torch.zeros(3, 64, 64, 3), torch.rand(1, 64, 64, 4), torch.zeros(1, 3000, 8, 3)]
ODD_SOUNDS: list[Any] = [
    {"waveform": torch.zeros(1, 1, 0), "sample_rate": 16000}, {"waveform": torch.zeros(1, 8, 100), "sample_rate": 1},
    {"waveform": torch.full((1, 1, 900), math.nan), "sample_rate": 16000},
    {"waveform": torch.zeros(0, 1, 100), "sample_rate": 16000}, {"waveform": torch.zeros(1, 100), "sample_rate": 16000},
    {"waveform": torch.zeros(1, 2, 100), "sample_rate": 0}, {"waveform": torch.rand(2, 2, 9000), "sample_rate": 44100}]
ODD_SIGMAS = [torch.zeros(0), torch.tensor([1.0]), torch.tensor([1.0, math.nan, 0.0]), torch.tensor([0.0, 0.5, 1.0]),
              torch.tensor([0.9, 0.9, 0.0]), torch.tensor([5.0, 1.0, 0.0]), torch.tensor([1.0, -0.5])]


@cache
def odd_models() -> list[Any]:
    return [plain_wan(), tiny_model(sizes=Sizes(text=32))]


@cache
def odd_clips() -> list[Any]:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    return [comfy.sd.CLIP(target, model_options={"clip_l_model_config": small})]


def odd(kind: str, usual: dict[str, Any]) -> list[Any]:
    """Values of a kind of socket that no good graph brings, and a few that one does."""
    vaes = [usual["VAE"], usual["audio_vae"]]
    return {"INT": ODD_NUMBERS, "FLOAT": ODD_FLOATS, "STRING": ODD_TEXTS, "COMBO": ODD_TEXTS, "IMAGE": ODD_IMAGES,
            "LATENT": odd_latents(), "CONDITIONING": odd_conditioning(), "AUDIO": ODD_SOUNDS, "SIGMAS": ODD_SIGMAS,
            "MODEL": odd_models(), "CLIP": odd_clips(), "VAE": vaes, "BOOLEAN": [True, False]}.get(kind, [])


def good(node, item, usual: dict[str, Any]) -> Any:
    """A value for an input: by its node and name, by its name, by its type, its default, the first of its options."""
    for key in (f"{node.GET_SCHEMA().node_id}.{item.id}", item.id, item.io_type):
        if key in usual:
            return usual[key]
    default = getattr(item, "default", None)
    options = getattr(item, "options", None)
    return options[0] if default is None and options else default


# --- what must hold ---------------------------------------------------------------------------------------------------


@cache
def raises(path: str) -> list[tuple[int, int]]:
    """First and last line of every `raise` in a file."""
    return [(node.lineno, node.end_lineno or node.lineno) for node in ast.walk(ast.parse(Path(path).read_text("utf-8")))
            if isinstance(node, ast.Raise)]


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` of the pack made this error, as a kind that ComfyUI shows with its text, and as a sentence."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = any(Path(last.filename).is_relative_to(PACK / folder) for folder in ("nodes", "ovi_model", "server"))
    return (inside and isinstance(error, ValueError | RuntimeError)
            and any(first <= (last.lineno or 0) <= end for first, end in raises(last.filename))
            and len(str(error)) > 25 and str(error).isprintable())


def finite(value: Any) -> bool:
    """Whether all numbers in a node's result are finite."""
    if isinstance(value, NestedTensor):
        return all(map(finite, value.unbind()))
    if torch.is_tensor(value):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def strange(node, usual: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every input of a node with every odd value, as (what it is, a way to make it)."""
    for item in node.GET_SCHEMA().inputs:
        most = LONG.get((node.GET_SCHEMA().node_id, item.id))
        for index, value in enumerate(odd(item.io_type, usual)):
            if most is None or not most < value <= item.max:
                yield item.id, lambda item=item, index=index: odd(item.io_type, usual)[index]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_clear_error_or_a_finite_result(name, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "output_directory", usual["output"])
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    node, fell = SCHEMAS[name], {}
    cases = list(strange(node, usual))
    if not cases:
        pytest.skip("no inputs")

    usual_inputs = {item.id: good(node, item, usual) for item in node.GET_SCHEMA().inputs}
    with torch.inference_mode():
        node.execute(**usual_inputs)  # or every case would end at the same input

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(cases), min_size=1, max_size=2))
    def run(chosen):
        changed = {key: make() for key, make in chosen}
        case = str({key: describe(value) for key, value in changed.items()})
        try:
            with torch.inference_mode():
                out = node.execute(**{**usual_inputs, **changed})
        except (Exception, SystemExit) as error:
            if not is_ours(error):
                fell[case] = (f"{type(error).__name__}: {str(error)[:150]} at "
                              f"{traceback.extract_tb(error.__traceback__)[-1]}")
        else:
            judged = [value for value, output in zip(out.args, node.GET_SCHEMA().outputs, strict=False)
                      if output.io_type in JUDGED]
            if not finite([judged, [value for value in changed.values() if isinstance(value, float)]]):
                fell[case] = "a result that is not finite, or one of a number that is not"

    run()
    assert not fell, "\n".join(f"{key} -> {value}" for key, value in fell.items())


def describe(value: Any) -> str:
    if isinstance(value, dict):
        return str({key: describe(each) for key, each in value.items()})
    if isinstance(value, NestedTensor):
        return str([describe(each) for each in value.unbind()])
    if torch.is_tensor(value):
        return f"{list(value.shape)} of {value.flatten()[:2].tolist()}"
    return ascii(value)[:60]
