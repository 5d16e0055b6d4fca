"""UMT5: both layouts and their tokenizers, stock encoding row for row, the 512-token limit, and refusals."""

import shutil
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.wan
import nodes
import pytest
import sentencepiece
import torch
from ovi_native.ovi_model.text import umt5
from safetensors.torch import save_file
from support.embeddings import encode
from support.parity_items import text as parity
from support.tokenizer_json import json_tokenizer
from tiny.checkpoint import ovi_checkpoint
from tiny.sizes import BUNDLE
from tiny.text_encoder import text_encoder
from tiny.video_vae import video_vae

SPEECH = "A man turns and says <S>Wait here (for me), at 3:30!<E> ☃ <AUDCAP>wind, birds<ENDAUDCAP>"

# ComfyUI's names to Wan's, written out here so that the pack's own table is not tested against itself.
WAN_NAMES = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
}


pytestmark = pytest.mark.usefixtures("either_loading")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return text_encoder(0)


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("core") / "umt5.safetensors"
    save_file(weights, file)
    return str(file)


@pytest.fixture(scope="module")
def clip(path) -> comfy.sd.CLIP:
    return umt5.load_text_encoder(path)


@pytest.fixture
def native(weights, tmp_path) -> Path:
    """A folder with the encoder in Wan's layout as a pickle, and no tokenizer."""
    renamed = {}
    for name, value in weights.items():
        if name != "spiece_model":
            block, _, rest = name.removeprefix("encoder.block.").partition(".")
            wan = WAN_NAMES.get(name) or f"blocks.{block}.{WAN_NAMES[rest]}"
            renamed[wan] = value
    torch.save(renamed, tmp_path / "models_t5.pth")
    return tmp_path





@pytest.mark.parametrize("either_loading", [False], indirect=True)  # the tool lists the layers of core's own class
def test_reference_numbers(golden):
    found = list(parity.items(golden))
    assert len(found) >= 12
    assert not [item for item in found if not item.ok]


def test_equals_stock_encoding(clip):
    text = "A man turns and says <S>Wait here, at 3:30!<E> ☃"
    embeddings, info = encode(clip, text)
    [[stock, extra]] = nodes.CLIPTextEncode().encode(clip, text)[0]
    assert embeddings.shape == (1, info.tokens, BUNDLE.text)
    assert info.cut_tokens == 0
    assert float((embeddings - stock[:, :info.tokens]).norm() / embeddings.norm()) < 1e-6
    assert stock[:, info.tokens:].abs().max() == 0, "the true length is longer"
    assert extra["pooled_output"] is None


def test_empty_text_is_the_end_token_alone(clip):
    embeddings, info = encode(clip, "")
    assert embeddings.shape == (1, 1, BUNDLE.text)
    assert info == umt5.TextInfo(1)
    assert embeddings.abs().max() > 0
    [[stock, _]] = nodes.CLIPTextEncode().encode(clip, "")[0]
    assert float((embeddings - stock[:, :1]).norm() / embeddings.norm()) < 1e-6


@pytest.mark.parametrize("text", [SPEECH, "(heavy)", "((heavy:1.5) rain)", r"a \(b\) \\ c", "embedding:foo bar"])
def test_brackets_and_backslashes_are_text(clip, weights, text):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=weights["spiece_model"].numpy().tobytes(), add_eos=True)
    tokens, info = umt5.tokenize(clip, text)
    [pairs] = tokens["umt5xxl"]
    assert [token for token, _ in pairs[:info.tokens]] == pieces.encode(text)
    assert {weight for _, weight in pairs} == {1.0}
    assert len(pairs) == info.tokens


def test_padding_is_not_encoded(clip):
    """The network sees a text's own tokens: a short text takes a share of the 512 tokens' time."""
    seen = []
    stack = clip.cond_stage_model.umt5xxl.transformer.encoder
    hook = stack.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        _, info = encode(clip, SPEECH)
    finally:
        hook.remove()
    assert seen == [(1, info.tokens, BUNDLE.text)] and info.tokens < 100


def test_cuts_at_512_tokens_and_says_so(clip):
    text = " ".join(f"word{i}" for i in range(600))
    embeddings, info = encode(clip, text)
    assert embeddings.shape[1] == info.tokens == 512
    assert info.cut_tokens > 0
    assert info.cut_text.endswith("word599")
    start, _ = umt5.tokenize(clip, text)
    ids = [token for token, _ in start["umt5xxl"][0]]
    assert ids[-1] == 1
    assert 1 not in ids[:-1]

    shorter = text[:-len(info.cut_text)].rstrip()
    again, info = encode(clip, shorter)
    assert info.cut_tokens == 0
    assert again.shape[1] <= 512


def test_limit_is_exact(clip):
    text = "☃" * 170  # three byte pieces each, after the leading space piece
    _, info = encode(clip, text)
    assert (info.tokens, info.cut_tokens) == (512, 0)
    _, info = encode(clip, text + "!")
    assert (info.tokens, info.cut_tokens) == (512, 1)
    assert info.cut_text == "!"


def test_wan_layout_with_its_tokenizer(clip, native, weights):
    expected, _ = encode(clip, SPEECH)
    model = weights["spiece_model"].numpy().tobytes()
    for place in ("spiece.model", "umt5-xxl/spiece.model", "google/umt5-xxl/spiece.model", "models_t5.model"):
        (native / place).parent.mkdir(parents=True, exist_ok=True)
        (native / place).write_bytes(model)
        loaded = umt5.load_text_encoder(str(native / "models_t5.pth"))
        assert torch.equal(encode(loaded, SPEECH)[0], expected), place
        (native / place).unlink()
    shutil.copytree(native, native / "elsewhere")
    (native / "elsewhere" / "spiece.model").write_bytes(model)
    for given in (native / "elsewhere", native / "elsewhere" / "spiece.model"):
        loaded = umt5.load_text_encoder(str(native / "models_t5.pth"), str(given))
        assert torch.equal(encode(loaded, SPEECH)[0], expected), given
    assert {"spiece_model", "umt5xxl.transformer.shared.weight"} <= loaded.get_sd().keys()


def test_tokenizer_out_of_a_core_layout_file(clip, native, path):
    loaded = umt5.load_text_encoder(str(native / "models_t5.pth"), path)
    assert torch.equal(encode(loaded, SPEECH)[0], encode(clip, SPEECH)[0])


def test_wan_layout_with_tokenizer_json(clip, native, weights):
    text = json_tokenizer(weights["spiece_model"].numpy().tobytes())
    (native / "umt5-xxl").mkdir()
    (native / "umt5-xxl" / "tokenizer.json").write_text(text, encoding="utf-8")
    loaded = umt5.load_text_encoder(str(native / "models_t5.pth"))
    assert encode(loaded, "")[0].shape == (1, 1, BUNDLE.text)
    assert torch.equal(encode(loaded, "")[0], encode(clip, "")[0])
    for text in ("a dog (barks) twice \\(loudly\\)", "☃"):
        tokens, info = umt5.tokenize(loaded, text)
        ids = [token for token, _ in tokens["umt5xxl"][0]][:info.tokens]
        assert ids[-1] == 1
        assert loaded.tokenizer.decode(ids) == text
    _, info = encode(loaded, "far more than the eight tokens its file allows " * 60)
    assert info.tokens == 512
    assert info.cut_text
    saved = {name: value for name, value in loaded.get_sd().items() if name.startswith("tokenizer")}
    assert saved.keys() == {"tokenizer_json"}

    save_file({**{name: value for name, value in weights.items() if name != "spiece_model"}, **saved},
              native / "embedded.safetensors")
    embedded = umt5.load_text_encoder(str(native / "embedded.safetensors"))
    assert torch.equal(encode(embedded, SPEECH)[0], encode(loaded, SPEECH)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(clip, weights, tmp_path, dtype):
    save_file({name: value if name == "spiece_model" else value.to(dtype) for name, value in weights.items()},
              tmp_path / "umt5.safetensors")
    loaded = umt5.load_text_encoder(str(tmp_path / "umt5.safetensors"))
    assert loaded.cond_stage_model.umt5xxl.transformer.shared.weight.dtype == dtype
    expected, _ = encode(clip, SPEECH)
    found, _ = encode(loaded, SPEECH)
    assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("marker", [torch.zeros(0), torch.zeros(2)])
def test_scaled_fp8_goes_through_cores_quantisation(clip, weights, tmp_path, marker):
    scaled = {"scaled_fp8": marker.to(torch.float8_e4m3fn)}
    for name, value in weights.items():
        if name.endswith(("SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.v.weight",
                          "SelfAttention.o.weight", "wi_0.weight", "wi_1.weight", "wo.weight")):
            scale = value.abs().max().float() / 448
            scaled[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            scaled[name] = value
    save_file(scaled, tmp_path / "umt5_fp8.safetensors")
    loaded = umt5.load_text_encoder(str(tmp_path / "umt5_fp8.safetensors"))
    assert type(loaded.cond_stage_model.umt5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight
                ).__name__ == "QuantizedTensor"
    expected, _ = encode(clip, SPEECH)
    found, _ = encode(loaded, SPEECH)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1


def test_clones_reload_from_the_file(clip, path):
    factory, arguments = clip.patcher.cached_patcher_init
    assert arguments == (path, None, {})
    clone = clip.patcher.deepclone_multigpu(new_load_device=torch.device("cpu"))
    other = factory(*arguments, disable_dynamic=True)
    for model in (clone.model, other.model):
        assert model is not clip.cond_stage_model
        for name, value in clip.cond_stage_model.state_dict().items():
            if ".logit_scale" not in name:
                assert torch.equal(model.state_dict()[name], value)


def test_device_options_reach_core(path):
    device = torch.device("cpu")
    loaded = umt5.load_text_encoder(path, model_options={"load_device": device, "offload_device": device})
    assert loaded.patcher.load_device == loaded.patcher.offload_device == device


def test_missing_tokenizer_says_where_it_belongs(native):
    with pytest.raises(RuntimeError, match=r"models_t5\.pth needs its tokenizer.*of google/umt5-xxl into .*umt5-xxl"):
        umt5.load_text_encoder(str(native / "models_t5.pth"))
    with pytest.raises(RuntimeError, match=f"into {native / 'nothing'}"):
        umt5.load_text_encoder(str(native / "models_t5.pth"), str(native / "nothing"))


def test_wrong_tokenizers(native, weights):
    (native / "spiece.model").write_bytes(b"junk")
    (native / "junk.json").write_bytes(b"{}")
    for given in (None, str(native / "junk.json")):
        with pytest.raises(RuntimeError, match=r"tokenizer for models_t5\.pth cannot be read"):
            umt5.load_text_encoder(str(native / "models_t5.pth"), given)
    large = {name: torch.cat([value, value, value]) if name == "shared.weight" else value
             for name, value in weights.items()}
    save_file(large, native / "large.safetensors")
    with pytest.raises(RuntimeError, match=r"768 pieces and end token 1, but large\.safetensors is for 2304 and 1"):
        umt5.load_text_encoder(str(native / "large.safetensors"))
    save_file({"a": torch.zeros(1)}, native / "no.safetensors")
    with pytest.raises(RuntimeError, match=r"no\.safetensors has no tokenizer inside"):
        umt5.load_text_encoder(str(native / "models_t5.pth"), str(native / "no.safetensors"))


def test_wrong_files(weights, tmp_path):
    t5 = {name: value for name, value in weights.items() if "block.1.layer.0.SelfAttention.relative" not in name}
    t5["shared.weight"] = torch.zeros(32128, 8)
    for content, sentence in (
        (t5, r"is a T5 text encoder \(vocabulary of 32128, width 8\), not the UMT5.*umt5_xxl_fp16"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1)}, "is a CLIP text encoder, not the UMT5"),
        (ovi_checkpoint(0), "is an Ovi checkpoint, not the UMT5"),
        (video_vae(0), "is a tiny video VAE .TAEHV., not the UMT5"),
        ({"decoder.conv1.weight": torch.zeros(1), "encoder.conv1.weight": torch.zeros(2, 3, 1)}, r"the Wan 2\.1 video"),
    ):
        save_file(content, tmp_path / "wrong.safetensors")
        with pytest.raises(RuntimeError, match=sentence) as caught:
            umt5.load_text_encoder(str(tmp_path / "wrong.safetensors"))
        assert str(caught.value).startswith("wrong.safetensors is ")


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("encoder.block.1.layer.1.DenseReluDense.wo.weight", None, r"lacks 1 of \d+ tensors \(encoder.block.1.*wo"),
    ("encoder.final_layer_norm.weight", torch.ones(7), r"wrong shape for 1 of .*\[7\] instead of \[128\]"),
])
def test_incomplete_files(weights, tmp_path, name, value, sentence):
    content = {key: tensor for key, tensor in weights.items() if key != name}
    save_file(content if value is None else {**content, name: value}, tmp_path / "umt5.safetensors")
    with pytest.raises(RuntimeError, match=sentence):
        umt5.load_text_encoder(str(tmp_path / "umt5.safetensors"))


def test_another_clip_is_refused():
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    other = comfy.sd.CLIP(target, model_options={"clip_l_model_config": small})
    with pytest.raises(ValueError, match=r"This CLIP \(SD1ClipModel\) is not the UMT5.*'Load Ovi Text Encoder'"):
        encode(other, "a cat")
