"""tools/convert.py: layouts, precisions, what it writes, and that nothing half-done is left behind."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import comfy.sd
import convert as tool
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from converting import conversion
from converting import source as source_files
from converting.conversion import Job, convert
from ovi_native.ovi_model.files import disk
from ovi_native.ovi_model.files.reader import load_weights
from ovi_native.ovi_model.files.safetensors_file import Spec, StreamedFile
from ovi_native.ovi_model.ovi import checkpoint, model_base
from ovi_native.ovi_model.ovi.quant_recipe import BLOCK_MATRICES, FORMATS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close
from tiny.inputs import noise, text
from tiny.models import network, write_checkpoint
from tiny.sizes import Sizes, core_layout

SMALL = Sizes(blocks=2)
VIDEO, AUDIO, TEXT = noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 9, seed=2), text(6, 3)


def predict(patcher):
    with torch.no_grad():
        return network(patcher)([VIDEO, AUDIO], torch.tensor([600.0]), TEXT, {})


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[key], tensor))), key


def same_models(found, expected):
    """The same weights to the last bit; outputs may differ by how the weights happen to be aligned in memory."""
    same_tensors(network(found).state_dict(), network(expected).state_dict())
    assert_pair_close(predict(found), predict(expected), 1e-5)


def run(source, output, **options):
    sources = source if isinstance(source, (list, tuple)) else [source]
    return convert(Job(tuple(map(str, sources)), Path(output), **options), lambda _: None)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_file(found, expected):
    same_tensors(load_file(found), load_file(expected))


# --- layouts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("through", ["core", "upstream", "split"])
def test_there_and_back_is_bit_exact(tmp_path, through):
    original = write_checkpoint(tmp_path, dtype=torch.bfloat16, sizes=SMALL)
    there = run(original, tmp_path / "there.safetensors", layout=through, dtype="bf16").files
    back, = run(there, tmp_path / "back.safetensors", layout="upstream").files
    same_file(back, original)
    if through == "core":
        same_tensors(load_file(there[0]), core_layout(load_file(original)))
    elif through == "split":
        assert [path.name for path in there] == ["there_video.safetensors", "there_audio.safetensors"]
        assert "blocks.0.modulation.modulation" in load_file(there[0])
        assert all(key.startswith("audio_model.") for key in load_file(there[1]))


def test_split_names_the_audio_file_after_the_video_file(tmp_path):
    outcome = run(write_checkpoint(tmp_path, sizes=SMALL), tmp_path / "my_video_bf16.safetensors", layout="split")
    assert [path.name for path in outcome.files] == ["my_video_bf16.safetensors", "my_audio_bf16.safetensors"]
    again = run(outcome.files[1], tmp_path / "joined.safetensors")  # the other half is found beside it
    assert again.report.parameters == sum(t.numel() for t in draw_weights(SMALL).values())


def is_block_matrix(name, tensor):
    return ".blocks." in name and tensor.ndim == 2


def scaled_parts(weights):
    """fp8 weights of the block matrices, and their scales by layer."""
    out, scales = {}, {}
    for name, tensor in weights.items():
        if is_block_matrix(name, tensor):
            scales[name.removesuffix(".weight")] = scale = (tensor.abs().max() / 448).reshape(())
            tensor = (tensor / scale).to(torch.float8_e4m3fn)
        out[name] = tensor
    return out, scales


def plain_fp8(folder, weights):
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}, folder / "in.safetensors")


def wrapped_pickle(folder, weights):
    torch.save({"module": {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}},
               folder / "in.pth")


def old_scaled(folder, weights):
    tensors, scales = scaled_parts(weights)
    save_file({**tensors, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
               **{f"{layer}.scale_weight": scale for layer, scale in scales.items()},
               **{f"{layer}.scale_input": torch.tensor(1.0) for layer in scales}}, folder / "in.safetensors")


def metadata_records(folder, weights):
    tensors, scales = scaled_parts({f"model.diffusion_model.{name}": t for name, t in weights.items()})
    records = {"layers": {layer: {"format": "float8_e4m3fn"} for layer in scales}}
    save_file({**tensors, **{f"{layer}.weight_scale": scale for layer, scale in scales.items()}},
              folder / "in.safetensors", metadata={"_quantization_metadata": json.dumps(records)})


def unwrapped_records(folder, weights):
    metadata_records(folder, weights)
    tensors, records = load_file(folder / "in.safetensors"), metadata_of(folder / "in.safetensors")
    save_file(tensors, folder / "in.safetensors", metadata={
        name: value.replace("model.diffusion_model.", "") for name, value in records.items()})


def quanto(folder, weights):
    tensors = {}
    for name, tensor in weights.items():
        if is_block_matrix(name, tensor):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}._data"] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}._scale"] = scale.to(torch.bfloat16)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{way}_scale": torch.ones(()) for way in ("input", "output")}
        else:
            tensors[name] = tensor
    for tower in ("video", "audio"):
        save_file({name.removeprefix("video_model."): t for name, t in tensors.items() if name.startswith(tower)},
                  folder / f"in_{tower}.safetensors")


INPUTS = {"plain fp8": plain_fp8, "wrapped pickle": wrapped_pickle, "scaled fp8": old_scaled,
          "records in the metadata": metadata_records, "records without the wrapper": unwrapped_records,
          "quanto, split": quanto}


@pytest.mark.parametrize("kind", INPUTS)
def test_what_the_loader_reads_is_what_it_converts(tmp_path, kind):
    """A converted file holds, to the last bit, what its source holds; its float32 form what that stands for."""
    INPUTS[kind](tmp_path, draw_weights(SMALL))
    source = sorted(tmp_path.iterdir())[0]
    expected, _ = checkpoint.load_model(str(source))
    kept, = run(source, tmp_path / "kept.safetensors").files
    same_models(checkpoint.load_model(str(kept))[0], expected)
    same_tensors(load_file(kept), checkpoint.read_checkpoint(str(source))[0])
    plain = run(source, tmp_path / "plain.safetensors", dtype="fp32")
    assert plain.quantised == 0 and {tensor.dtype for tensor in load_file(plain.files[0]).values()} == {torch.float32}
    matrix = network(expected).audio_model.blocks[1].cross_attn.k_fusion.weight.data
    matrix = matrix.dequantize() if isinstance(matrix, QuantizedTensor) else matrix
    stored = load_file(plain.files[0])["audio_model.blocks.1.cross_attn.k_fusion.weight"]
    assert torch.allclose(stored, matrix.float(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_is_opened_again_only_where_it_can_be_mapped(tmp_path, zipped, monkeypatch):
    """Pickles from before 2020 cannot: each opening would read them whole."""
    torch.save(draw_weights(SMALL), tmp_path / "in.pth", _use_new_zipfile_serialization=zipped)
    opened = []
    monkeypatch.setattr(source_files, "SITTING", 1 << 20)
    monkeypatch.setattr(source_files, "load_weights", lambda path: opened.append(path) or load_weights(path))
    out, = run(tmp_path / "in.pth", tmp_path / "out.safetensors").files
    assert len(opened) > 5 if zipped else len(opened) == 2  # once to look at it
    same_tensors(load_file(out), core_layout(draw_weights(SMALL)))


# --- precisions -------------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("either_loading")
@pytest.mark.parametrize("name", FORMATS)
def test_converted_files_load_everywhere_alike(tmp_path, name):
    """In our loader, in ComfyUI's own, and as quantising the source while loading: the same bits."""
    source = write_checkpoint(tmp_path, dtype=torch.float32, sizes=SMALL)
    outcome = run(source, tmp_path / "out.safetensors", dtype=name)
    path = str(outcome.files[0])
    ours, report = checkpoint.load_model(path)
    assert FORMATS[name].algorithm in report.precision and outcome.quantised == 48
    assert {tensor.dtype for key, tensor in load_file(path).items() if key.endswith(("bias", "norm3.weight"))} == {
        torch.bfloat16}
    stock = comfy.sd.load_diffusion_model(path)
    assert isinstance(stock.model, model_base.OviBaseModel)
    same_models(stock, ours)
    same_models(checkpoint.load_model(str(source), name)[0], ours)


@pytest.mark.usefixtures("either_loading")
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8_e4m3fn"])
def test_plain_precisions_load_in_both_loaders(tmp_path, dtype):
    source = write_checkpoint(tmp_path, dtype=torch.bfloat16, sizes=SMALL)
    path = str(run(source, tmp_path / "out.safetensors", dtype=dtype).files[0])
    stored = load_file(path)
    assert not any(key.endswith((".comfy_quant", "_scale")) for key in stored)
    for patcher in (checkpoint.load_model(path)[0], comfy.sd.load_diffusion_model(path)):
        assert isinstance(patcher.model, model_base.OviBaseModel)
        weight = network(patcher).blocks[1].ffn[2].weight.data
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        assert torch.equal(weight.float(), stored["blocks.1.ffn.2.weight"].float())
    if dtype == "fp8_e4m3fn":
        assert stored["blocks.1.ffn.2.weight"].dtype == torch.float8_e4m3fn
        assert {t.dtype for key, t in stored.items() if "ffn" not in key and "attn" not in key} == {torch.bfloat16}


def test_files_hold_only_what_every_reader_knows(tmp_path):
    """Core's reader for streamed weights knows no power-of-two dtype; mxfp8 scales are bytes."""
    path = run(write_checkpoint(tmp_path, sizes=SMALL), tmp_path / "out.safetensors", dtype="mxfp8").files[0]
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}
    assert dtypes == {"BF16", "F8_E4M3", "U8"}


def test_conversions_chain(tmp_path):
    """Quantised to quantised, with what has the wanted bits already left alone."""
    source = write_checkpoint(tmp_path, dtype=torch.bfloat16, sizes=SMALL)
    int8, = run(source, tmp_path / "int8.safetensors", dtype="int8", layout="upstream").files
    again, = run(int8, tmp_path / "again.safetensors", dtype="int8", layout="upstream").files
    same_file(again, int8)
    back, = run(run(int8, tmp_path / "fp8.safetensors", dtype="fp8_scaled").files, tmp_path / "b.safetensors",
                dtype="bf16").files
    weight = load_file(source)["video_model.blocks.0.ffn.0.weight"].float()
    error = (load_file(back)["blocks.0.ffn.0.weight"].float() - weight).norm() / weight.norm()
    assert 0.01 < error < 0.035


def test_the_file_says_where_it_comes_from(tmp_path):
    source = write_checkpoint(tmp_path, "model_960x960_10s.safetensors", sizes=SMALL)
    found = metadata_of(run(source, tmp_path / "out.safetensors", dtype="nvfp4").files[0])
    assert found["format"] == "pt" and found["ovi_variant"] == "960x960_10s"
    assert found["ovi_tool"] == f"ovi-native {conversion.version()}" and conversion.version() != "unknown"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert json.loads(found["ovi_source"]) == [{"name": source.name, "sha256": digest}]
    recipe = json.loads(found["ovi_recipe"])
    assert recipe["dtype"] == "nvfp4" and recipe["record"] == {"format": "nvfp4"} and recipe["first_block"] == 0
    assert recipe["layers"] == BLOCK_MATRICES.pattern
    out, = run(source, tmp_path / "x.safetensors", variant="720x720_5s").files
    assert metadata_of(out)["ovi_variant"] == checkpoint.load_model(str(out))[1].variant == "720x720_5s"


# --- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "kind", "sentence"), [
    ({"output": "there.safetensors"}, ValueError, r"there\.safetensors is there already; add --force"),
    ({"output": "folder.safetensors", "force": True}, ValueError, r"folder\.safetensors is there already"),
    ({"output": "out.pt"}, ValueError, r"out\.pt does not end in \.safetensors"),
    ({"output": "there.safetensors", "layout": "split", "source": "none"}, RuntimeError, "is not there"),
    ({"variant": "4k"}, ValueError, "'4k'.*720x720_5s"),
    ({"source": ["ovi.safetensors"] * 3}, ValueError, "3 input files given"),
    ({"source": ["ovi.safetensors"] * 2}, RuntimeError, "holds both towers already"),
    ({"source": "lora.safetensors"}, RuntimeError, "lora.safetensors is no Ovi checkpoint: it holds a LoRA"),
    ({"source": "half.safetensors"}, RuntimeError, "only Ovi's video tower"),
    ({"source": "short.safetensors"}, RuntimeError, "lacks 1 of .*norm3"),
    ({"source": "cut.safetensors"}, RuntimeError, "cut.safetensors .*download it again"),
])
def test_refusals_are_a_sentence_and_leave_nothing(tmp_path, options, kind, sentence):
    write_checkpoint(tmp_path, sizes=SMALL)
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    (tmp_path / "folder.safetensors").mkdir()
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    write_checkpoint(tmp_path, "half.safetensors", SMALL, change=lambda w: {
        k: v for k, v in w.items() if k.startswith("video")})
    write_checkpoint(tmp_path, "short.safetensors", SMALL, change=lambda w: w.pop("video_model.blocks.1.norm3.bias")
                     is None)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ovi.safetensors").read_bytes()[:99_999])
    before = sorted(tmp_path.iterdir())
    options = {"source": "ovi.safetensors", "output": "out.safetensors", "dtype": "int8", **options}
    sources = options.pop("source")
    sources = [tmp_path / name for name in ([sources] if isinstance(sources, str) else sources)]
    with pytest.raises(kind, match=sentence) as error:
        run(sources, tmp_path / options.pop("output"), **options)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.safetensors").read_bytes() == b"precious"
    assert "\n" not in str(error.value)


def test_a_full_disk_is_found_out_first(tmp_path):
    conversion.check_disk(tmp_path / "new" / "folder", 1000)
    with pytest.raises(OSError, match=r"GB free, but the result takes 1000000 GB: free some space"):
        conversion.check_disk(tmp_path / "new" / "folder", 10**15)


def test_failing_midway_keeps_the_old_file(tmp_path):
    """The last layer of the file cannot be quantised: everything before it was written, and is gone."""
    def spoil(weights):
        weights["video_model.blocks.1.self_attn.v.weight"][3, 3] = float("inf")

    source = write_checkpoint(tmp_path, sizes=SMALL, change=spoil)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(RuntimeError, match=r"blocks\.1\.self_attn\.v\.weight holds values that are not finite"):
        run(source, output, dtype="fp8_scaled", force=True)
    assert output.read_bytes() == b"precious" and sorted(p.name for p in tmp_path.iterdir()) == [
        "out.safetensors", "ovi.safetensors"]
    assert tool.main([str(source), str(output), "--dtype", "fp8_scaled", "--force"]) == 1
    run(source, output, force=True)
    assert load_file(output)


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    source, output = write_checkpoint(tmp_path, sizes=SMALL), tmp_path / "out.safetensors"
    for name in (".out.safetensors.123.part", ".out.safetensors.99999999.part"):
        (tmp_path / name).write_bytes(b"left")
    kept = {".out.safetensors.part", ".out.safetensors.12.part.bak", ".other.safetensors.123.part", "precious"}
    for name in kept:
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / ".out.safetensors.7.part").symlink_to(tmp_path / "precious")
    held = "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import disk\n" \
           "part, _ = disk.open_part(Path(sys.argv[2])); print(part.name, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", held, str(Path(disk.__file__).parent), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        part = running.stdout.readline().strip()
        run(source, output)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == kept | {source.name, output.name, ".out.safetensors.7.part", part}, "of a running one"
        running.kill()
    run(source, output, force=True)
    assert part not in {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_part_of_ours_that_is_a_link_is_not_followed(tmp_path):
    source, other = write_checkpoint(tmp_path, sizes=SMALL), tmp_path / "precious"
    other.write_bytes(b"precious")
    (tmp_path / f".out.safetensors.{os.getpid()}.part").symlink_to(other)
    with pytest.raises(FileExistsError, match="is in the way and is a link"):
        run(source, tmp_path / "out.safetensors")
    assert other.read_bytes() == b"precious"


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_a_conversion_is_replaced_only_if_asked(tmp_path, force, monkeypatch):
    source, output = write_checkpoint(tmp_path, sizes=SMALL), tmp_path / "out.safetensors"
    write = conversion.write
    monkeypatch.setattr(conversion, "write", lambda *args: (write(*args), output.write_bytes(b"precious")))
    if force:
        run(source, output, force=True)
        assert load_file(output)
        return
    with pytest.raises(ValueError, match="has appeared during the conversion and is not replaced: move it away"):
        run(source, output)
    assert output.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 2


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    specs = {"a": Spec(torch.float32, (2,)), "b": Spec(torch.uint8, (3,))}
    path, a, b = tmp_path / "x.safetensors", torch.zeros(2), torch.tensor([1, 2, 3], dtype=torch.uint8)
    for wrong, sentence in (({"a": torch.zeros(3)}, "not announced"), ({"a": a.int()}, "not announced"),
                            ({"c": a}, "not announced"), ({"a": a}, "1 tensors were never written")):
        with pytest.raises(RuntimeError, match=sentence), StreamedFile(path, specs, {}) as file:
            for name, tensor in wrong.items():
                file.write(name, tensor)
    with pytest.raises(RuntimeError, match="written twice"), StreamedFile(path, specs, {}) as file:
        file.write("b", b)
        file.write("b", b)
    assert not list(tmp_path.iterdir())
    with StreamedFile(path, specs, {"k": "v"}) as file:
        file.write("b", b)
        file.write("a", torch.tensor([[5.0, 0.0], [6.0, 0.0]])[:, 0])
    assert load_file(path)["a"].tolist() == [5.0, 6.0] and load_file(path)["b"].tolist() == [1, 2, 3]
    assert metadata_of(path) == {"k": "v"}


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path, capsys):
    source = write_checkpoint(tmp_path, sizes=SMALL)
    assert tool.main([str(source), str(tmp_path / "out.safetensors"), "--dtype", "int8"]) == 0
    out = capsys.readouterr().out
    assert "as Ovi's makers published it" in out and "48 layers quantised" in out and "Add --variant" in out
    assert tool.main([str(source), str(tmp_path / "out.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("convert: ") and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(SystemExit):
        tool.main([str(source)])
    assert "give one or two input files" in capsys.readouterr().err
    assert set(tool.DTYPES) == set(conversion.TARGETS)
