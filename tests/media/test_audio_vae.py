"""The sound codec: the pack's conversion of MMAudio's files, 16 kHz in and out, stock audio nodes, and refusals."""

import comfy.model_management
import comfy.sd
import comfy_extras.nodes_audio as stock
import pytest
import torch
import torchaudio
from comfy.cli_args import args
from ovi_native.ovi_model.media import audio_vae
from safetensors.torch import load_file, save_file
from support.parity_items import audio as parity

VAE, VOCODER = (f"vae/ovi_tiny_random_mmaudio_{part}.safetensors" for part in ("vae", "vocoder"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny convolutions: on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tiny_models) -> tuple[str, str]:
    return str(tiny_models / VAE), str(tiny_models / VOCODER)


@pytest.fixture(scope="module")
def vae(files) -> comfy.sd.VAE:
    return audio_vae.load_audio_vae(*files)


def latents(batch: int = 1, length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 20, length, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sound(vae) -> torch.Tensor:
    return audio_vae.decode_waveform(vae, latents(2))


def test_reference_numbers(golden):
    truth = load_file(golden / "mmaudio" / "golden_tiny.safetensors")
    found = list(parity.tensor_items("tiny", parity.load_golden_vae(golden / "mmaudio", "tiny", truth), truth))
    assert len(found) >= 10
    assert not [item for item in found if not item.ok]


def test_decodes_at_16_khz_unchanged(vae, sound):
    assert sound.shape == (2, 1, 10 * 512)
    assert sound.dtype == torch.float32
    assert 0.02 < sound.std() < 0.3, "silence or overload"
    assert sound.abs().max() < 1
    for index in range(2):
        alone = audio_vae.decode_waveform(vae, latents(2)[index:index + 1])
        torch.testing.assert_close(alone[0], sound[index], rtol=0, atol=1e-6)
    assert (sound[0] - sound[1]).std() > 0.5 * sound.std(), "the sound does not depend on the latents"


def test_encodes_what_it_is_given(vae, sound):
    mean = audio_vae.encode_mean(vae, sound)
    assert mean.shape == (2, 20, 10)
    assert mean.dtype == torch.float32
    stereo = sound.repeat(1, 2, 1)
    torch.testing.assert_close(audio_vae.encode_mean(vae, stereo), mean, rtol=0, atol=1e-5)
    assert audio_vae.encode_mean(vae, sound[:, :, :1500]).shape == (2, 20, 2)
    loud = audio_vae.encode_mean(vae, sound * 100)
    torch.testing.assert_close(loud, audio_vae.encode_mean(vae, (sound * 100).clamp(-1, 1)), rtol=0, atol=1e-6)


def test_stock_audio_nodes(vae):
    with torch.inference_mode():
        decoded = stock.VAEDecodeAudio.execute(vae, {"samples": latents(2)}).args[0]
        assert decoded["sample_rate"] == 44100
        assert abs(decoded["waveform"].shape[-1] - 10 * 512 * 44100 / 16000) < 2
        plain = audio_vae.decode_waveform(vae, latents(2))
        resampled = torchaudio.functional.resample(plain, 16000, 44100)
        torch.testing.assert_close(decoded["waveform"], resampled, rtol=0, atol=1e-5)

        encoded = stock.VAEEncodeAudio.execute(vae, decoded).args[0]["samples"]
        assert encoded.shape == (2, 20, 10)
        tiled = stock.VAEDecodeAudioTiled.execute(vae, {"samples": latents(1, 80)}, 64, 16).args[0]["waveform"]
        assert abs(tiled.shape[-1] - 80 * 512 * 44100 / 16000) < 3


def test_is_loaded_by_memory_management(vae):
    comfy.model_management.unload_all_models()
    audio_vae.decode_waveform(vae, latents())
    assert any(loaded.model is vae.patcher for loaded in comfy.model_management.current_loaded_models)
    assert vae.model_size() == comfy.model_management.module_size(vae.first_stage_model) > 20e6
    assert vae.memory_used_decode((1, 20, 157), torch.float32) > 0


def test_pickles_in_both_namings_give_the_same_sound(files, sound, tmp_path):
    weights = load_file(files[1])
    long = {name.replace(".weight_g", ".parametrizations.weight.original0")
            .replace(".weight_v", ".parametrizations.weight.original1"): value for name, value in weights.items()}
    assert long.keys() != weights.keys()
    torch.save(load_file(files[0]), tmp_path / "v1-16.pth")
    for name, content in (("a.pt", {"generator": weights}), ("b.pt", {"generator": long, "steps": 3}),
                          ("c.pth", long), ("d.pt", {f"generator.{key}": value for key, value in weights.items()})):
        torch.save(content, tmp_path / name)
        loaded = audio_vae.load_audio_vae(str(tmp_path / "v1-16.pth"), str(tmp_path / name))
        assert torch.equal(audio_vae.decode_waveform(loaded, latents(2)), sound)


@pytest.mark.usefixtures("either_loading")
def test_merged_file_in_core_layout(vae, sound, tmp_path):
    path = str(tmp_path / "merged.safetensors")
    state = vae.get_sd()
    assert state.keys() >= {"vae.data_mean", "vocoder.conv_pre.weight", "mel_converter.mel_basis"}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    for vocoder in (None, path):
        loaded = audio_vae.load_audio_vae(path, vocoder)
        assert torch.equal(audio_vae.decode_waveform(loaded, latents(2)), sound)
    with pytest.raises(RuntimeError, match="has its vocoder merged in"):
        audio_vae.load_audio_vae(path, str(tmp_path / "other.pt"))


def test_reduced_precision_files(files, sound, tmp_path):
    for file, name in zip(files, ("vae", "vocoder"), strict=True):
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, tmp_path / f"{name}.safetensors")
    loaded = audio_vae.load_audio_vae(str(tmp_path / "vae.safetensors"), str(tmp_path / "vocoder.safetensors"))
    assert all(value.dtype == torch.float32 for value in loaded.get_sd().values())
    lengths = loaded.get_sd()["vae.decoder.mid.block_1.conv1.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=0.02)
    assert (audio_vae.decode_waveform(loaded, latents(2)) - sound).std() < 0.1 * sound.std()


@pytest.mark.parametrize("option", ["bf16_vae", "fp16_vae"])
def test_stays_in_float32(files, vae, sound, monkeypatch, caplog, option):
    """Started with --bf16-vae or --fp16-vae: it encodes all the same, and says that it does not follow."""
    monkeypatch.setattr(args, option, True)
    other = audio_vae.load_audio_vae(*files)
    assert "float32, not in" in caplog.text
    assert torch.equal(audio_vae.encode_mean(other, sound), audio_vae.encode_mean(vae, sound))


def test_kernels_are_normalised_once():
    kernel = torch.randn(4, 6, 3)
    weights = {"conv.weight": kernel, "learnable_gain": torch.tensor(0.5), "data_mean": torch.ones(1, 80, 1)}
    once = audio_vae.normalise_kernels(weights)
    size = 18
    expected = kernel / (kernel.pow(2).sum((1, 2), keepdim=True).sqrt() + 1e-4 * size ** 0.5)
    torch.testing.assert_close(once["conv.weight"], expected)
    assert once["learnable_gain"] == 0.5
    assert torch.equal(once["data_mean"], weights["data_mean"])


def test_weight_norm_is_folded_over_all_axes_but_the_first():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(6, 4, 8), dim=0)
    layer.parametrizations.weight.original0.data.uniform_(0.5, 2)
    folded = audio_vae.fold_weight_norm({f"ups.0.0.{name}": value for name, value in layer.state_dict().items()})
    assert folded.keys() == {"ups.0.0.weight", "ups.0.0.bias"}
    torch.testing.assert_close(folded["ups.0.0.weight"], layer.weight.detach())


def test_a_kernel_row_of_zeros_stays_zero():
    rows = torch.randn(3, 2, 5)
    rows[1] = 0
    folded = audio_vae.fold_weight_norm({"conv.weight_v": rows, "conv.weight_g": torch.full((3, 1, 1), 2.0)})
    lengths = torch.linalg.vector_norm(folded["conv.weight"], dim=(1, 2))
    torch.testing.assert_close(lengths, torch.tensor([2.0, 0.0, 2.0]))


def test_filterbank_is_slaneys():
    other = torchaudio.functional.melscale_fbanks(513, 0.0, 8000.0, 80, 16000, norm="slaney", mel_scale="slaney").T
    mine = audio_vae.mel_filterbank()
    assert mine.shape == (80, 513)
    assert (mine - other).norm() / other.norm() < 1e-4  # torchaudio works in float32


@pytest.mark.usefixtures("either_loading")
def test_clones_reload_from_the_files(files, vae, sound):
    factory, arguments = vae.patcher.cached_patcher_init
    assert arguments == files
    clone = vae.patcher.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert clone.model is not vae.patcher.model
    other = factory(*arguments, disable_dynamic=True)
    for model in (clone.model, other.model):
        with torch.no_grad():
            again = model.vocoder(model.vae.decode(latents(2)))
        torch.testing.assert_close(again, sound, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 10), (1, 48, 10), (1, 20, 0), (1, 48, 3, 4, 4)])
def test_wrong_latents(vae, shape):
    with pytest.raises(ValueError, match=r"audio VAE decodes \[batch, 20, length\]"):
        audio_vae.decode_waveform(vae, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16000), (1, 1, 511)])
def test_wrong_waveforms(vae, shape):
    with pytest.raises(ValueError, match="at least 512 samples"):
        audio_vae.encode_mean(vae, torch.zeros(shape))


def test_another_kind_of_vae(tiny_models):
    video = comfy.sd.VAE(sd=load_file(tiny_models / "vae/ovi_tiny_random_taew2_2.safetensors"))
    with pytest.raises(ValueError, match=r"TAEHV.* is no MMAudio VAE; connect the output of 'Load Ovi Audio VAE'"):
        audio_vae.decode_waveform(video, latents())


def test_wrong_files(tiny_models, files, tmp_path):
    text = str(tiny_models / "text_encoders/ovi_tiny_random_umt5.safetensors")
    video = str(tiny_models / "vae/ovi_tiny_random_taew2_2.safetensors")
    ovi = str(tiny_models / "diffusion_models/ovi_tiny_random.safetensors")
    for pair, sentence in (
        ((files[1], files[0]), "The two files are swapped: .*vocoder.safetensors is the vocoder"),
        ((files[0], None), "is the MMAudio VAE without its vocoder"),
        ((files[0], files[0]), "_vae.safetensors is an MMAudio 16 kHz VAE without its vocoder, not the BigVGAN"),
        ((text, files[1]), r"umt5.safetensors is a UMT5 text encoder .*, not the MMAudio 16 kHz VAE.*v1-16\.pth"),
        ((video, files[1]), r"is a tiny video VAE \(TAEHV\), not the MMAudio"),
        ((ovi, files[1]), "is an Ovi checkpoint, not the MMAudio"),
        ((files[0], text), "is a UMT5 text encoder .*, not the BigVGAN vocoder"),
        ((files[0], str(tmp_path / "absent.pt")), r"absent\.pt is not there"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            audio_vae.load_audio_vae(*pair)


@pytest.mark.usefixtures("either_loading")
@pytest.mark.parametrize(("part", "change", "sentence"), [
    (0, {"encoder.conv_in.weight": (64, 128, 3), "decoder.conv_in.weight": (256, 40, 3)}, "44 kHz VAE .128 mel bands"),
    (1, {"conv_pre.weight_v": (256, 128, 7)}, "the vocoder takes 128 mel bands"),
    (0, {"decoder.mid.attn_1.qkv.weight": None}, r"lacks 1 of .* tensors \(vae.decoder.mid.attn_1.qkv.weight\)"),
    (1, {"ups.2.0.bias": (7,)}, r"wrong shape for 1 of .*ups.2.0.bias \[7\] instead of \[32\]"),
    (1, {"conv_pre.weight_v": None, "conv_pre.weight_g": None}, "conv_pre.weight' is missing"),
])
def test_other_models_and_damaged_files(files, tmp_path, part, change, sentence):
    weights = load_file(files[part])
    for name, shape in change.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = torch.ones(shape)
    save_file(weights, tmp_path / "changed.safetensors")
    pair = [*files]
    pair[part] = str(tmp_path / "changed.safetensors")
    with pytest.raises(RuntimeError, match=sentence):
        audio_vae.load_audio_vae(*pair)
