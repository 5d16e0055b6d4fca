"""Coverage-guided fuzzing of what reads files: `python tests/files/fuzz_atheris.py FOLDER RUNS SECONDS SEED [TARGET]`.

atheris (libFuzzer) changes inputs where that reaches new lines of our readers, which alone are instrumented. An input's
first byte chooses the target. Whatever comes but a result or one of our sentences, more than 10 s or 1 GB for a case,
ends the process with another code than 0, and the input lies in FOLDER. Run by `test_fuzz_atheris.py`.
"""

import base64
import json
import logging
import resource
import struct
import sys
from collections import Counter
from pathlib import Path

import atheris

READERS = ("files.reader", "files.identify", "files.pickles", "files.torch_files", "files.quant_records", "ovi.layouts",
           "text.tokenizer", "text.tokenizer_files", "text.umt5")
with atheris.instrument_imports(include=[f"ovi_native.ovi_model.{name}" for name in READERS]):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401 (puts ComfyUI and the pack where they can be imported)
    from ovi_native.ovi_model.files import identify, quant_records, reader
    from ovi_native.ovi_model.files.names import printable
    from ovi_native.ovi_model.ovi import checkpoint
    from ovi_native.ovi_model.text import tokenizer, umt5

import torch  # noqa: E402
from fuzzing import SENTENCE  # noqa: E402
from safetensors.torch import save  # noqa: E402
from support import hostile_pickles  # noqa: E402
from tiny.checkpoint import draw_weights  # noqa: E402
from tiny.sizes import Sizes  # noqa: E402
from tiny.text_encoder import text_encoder, tokenizer_model  # noqa: E402

TOKENIZER = tokenizer_model()
RECORDED = {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1),
            "b.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "b.weight_scale": torch.ones(())}


class Targets:
    """The readers, each with the bytes of one case; `folder` takes the files."""

    def __init__(self, folder: Path) -> None:
        self.safetensors, self.pickle = folder / "case.safetensors", folder / "case.pth"

    def whole_file(self, data: bytes) -> None:
        """A safetensors file as it is."""
        self.safetensors.write_bytes(data)
        self._describe(*reader.load_weights(self.safetensors))

    def header(self, data: bytes) -> None:
        """A header, in front of as many bytes as it may need."""
        self.safetensors.write_bytes(struct.pack("<Q", len(data)) + data + bytes(64))
        self._describe(*reader.load_weights(self.safetensors))

    def layout(self, data: bytes) -> None:
        """Names and shapes, a line each, as a file would hold them: `a.weight 4 4`."""
        tensors = {}
        for line in data.decode("utf-8", "replace").splitlines()[:200]:
            name, *sizes = line.split(" ")
            if not name.isprintable() or len(name) > reader.LONGEST_NAME:
                continue  # no file with such names is opened
            shape = [int(size) for size in sizes if size.isdecimal() and size.isascii() and len(size) < 4][:5]
            scaled = torch.float8_e4m3fn if "8" in sizes else torch.bfloat16
            kind = torch.uint8 if name.endswith("comfy_quant") else scaled
            tensors[name] = torch.zeros(shape[:2] if len(shape) > 2 and max(shape) > 32 else shape, dtype=kind)
        self._describe(tensors, {})

    def metadata(self, data: bytes) -> None:
        """Records of how layers are quantised."""
        quant_records.check_records(quant_records.resolve_records(
            dict(RECORDED), {"_quantization_metadata": data.decode("utf-8", "replace")}, "case"), "case")
        quant_records.check_records({**RECORDED, "a.comfy_quant": torch.tensor(list(data), dtype=torch.uint8)}, "case")

    def tokenizer_json(self, data: bytes) -> None:
        built = tokenizer.build_tokenizer({"tokenizer_json": data}, 768, "case")
        built.tokenize_with_weights("a dog ☃ <S>barks<E>", disable_weights=True)

    def sentencepiece(self, data: bytes) -> None:
        built = tokenizer.build_tokenizer({"spiece_model": data}, 768, "case")
        built.tokenize_with_weights("a dog ☃ <S>barks<E>", disable_weights=True)

    def program(self, data: bytes) -> None:
        """The pickle of a PyTorch file, with a storage of 64 bytes."""
        self.pickle.write_bytes(hostile_pickles.archive(("a/data.pkl", data), ("a/data/0", bytes(64))))
        self._touch(reader.load_weights(self.pickle)[0])

    def torch_file(self, data: bytes) -> None:
        """A PyTorch file as it is, of either layout."""
        self.pickle.write_bytes(data)
        self._touch(reader.load_weights(self.pickle)[0])

    def _touch(self, tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            assert tensor.numel() < 1 << 28, "it is larger than the file"
            tensor.clone()

    def _describe(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        identify.describe_weights(tensors)
        for read in (self._as_model, self._as_text):
            try:
                read(dict(tensors), metadata)
            except RuntimeError as error:
                judge(error)

    def _as_model(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        checkpoint.make_part("case", tensors, metadata)

    def _as_text(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        umt5._check_family(tensors, "case")
        weights = umt5.to_core_layout(quant_records.resolve_records(tensors, metadata, "case"))
        quant_records.check_records(weights, "case")
        umt5.read_config(weights, "case")


NAMES = ("whole_file", "header", "layout", "metadata", "tokenizer_json", "sentencepiece", "program", "torch_file")


def judge(error: RuntimeError) -> None:
    """Raise what is no sentence of ours."""
    text = str(error)
    named = "case" in text or "tokenizer" in text
    if type(error) is not RuntimeError or not named or len(text) > 1500 or printable(text) != text \
            or not SENTENCE.search(text):
        raise AssertionError(f"no sentence of ours: {type(error).__name__}: {text[:500]}") from error


def seeds() -> list[tuple[str, bytes]]:
    """Inputs to begin with: whole ones, and some of the hostile."""
    from support.tokenizer_json import json_tokenizer

    small = Sizes(heads=1, blocks=1, ffn=8, text=8, frequencies=8)
    names = "\n".join(f"{name} {' '.join(str(min(n, 8)) for n in value.shape)}" for tensors in (
        text_encoder(0), draw_weights(small)) for name, value in list(tensors.items())[:60])
    header = {"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    conf = {"format": "int8_tensorwise", "params": {"group_size": 4}}
    pieces = json.loads(json_tokenizer(TOKENIZER))
    pieces["model"] |= {"vocab": pieces["model"]["vocab"][:259]}
    charsmap = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + b"a\0").decode()
    normal = [{"type": "Precompiled", "precompiled_charsmap": charsmap},
              {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]
    out = [("whole_file", save({"w": torch.zeros(4, 4), "v": torch.zeros(2)})), ("header", json.dumps(header).encode()),
           ("layout", names.encode()), ("layout", b"a.weight 4 4 8\na.comfy_quant 30\na.weight_scale"),
           ("metadata", json.dumps({"layers": {"a": conf, "b": {"format": "float8_e4m3fn"}}}).encode()),
           ("metadata", json.dumps(conf).encode()), ("tokenizer_json", json.dumps(pieces).encode()),
           ("tokenizer_json", json.dumps(pieces | {"normalizer": {
               "type": "Sequence", "normalizers": normal}}).encode()),
           ("sentencepiece", TOKENIZER), ("torch_file", hostile_pickles.saved())]
    out += [("program", b"\x80\x02" + program[:3000] + b".") for program in hostile_pickles.PROGRAMS.values()]
    weight = hostile_pickles.FLOATS.replace(hostile_pickles.number(hostile_pickles.LARGE), hostile_pickles.number(16))
    view = hostile_pickles.view(weight, hostile_pickles.number(16) + b"\x85", hostile_pickles.number(1) + b"\x85")
    out += [("program", b"\x80\x02" + hostile_pickles.entry(view) + b"."),
            ("torch_file", hostile_pickles.legacy(hostile_pickles.entry(view)))]
    return out


def main(folder: Path, runs: int, seconds: int, seed: int, only: str | None) -> None:
    logging.disable(logging.CRITICAL)
    targets, counts = Targets(folder), Counter[str]()
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, (name, content) in enumerate(seeds()):
        if only in (None, name):
            (corpus / f"{index:03}").write_bytes(bytes([NAMES.index(name)]) + content)

    def case(data: bytes) -> None:
        name = only or NAMES[(data[0] if data else 0) % len(NAMES)]
        counts[name] += 1
        try:
            getattr(targets, name)(data[1:])
            counts["read"] += 1
        except RuntimeError as error:
            judge(error)
        if counts.total() % 500 < 2:
            (folder / "counts.json").write_text(json.dumps(counts))

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=10",
                   f"-rss_limit_mb={used + 1024}", "-max_len=20000", "-len_control=0", "-verbosity=1",
                   f"-artifact_prefix={folder}/", str(corpus)], case)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]),
         sys.argv[5] if len(sys.argv) > 5 else None)
