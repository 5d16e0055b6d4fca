"""What `fuzzing.py` does to weight files: wrong headers, names, sizes and contents, safetensors and PyTorch files."""

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

import comfy.model_detection
import torch

ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
          torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}
# Names by which core tells one model from another: a file with a few of them sends its detection astray.
STRANGERS = sorted(set(re.findall(r"'\{\}([a-z_0-9]+\.[a-z_0-9.]*[a-z])'",
                                  Path(comfy.model_detection.__file__).read_text(encoding="utf-8"))))
HUGE = (2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)


# --- safetensors ------------------------------------------------------------------------------------------------------

class Draft:
    """A safetensors file under construction: its header's entries, its data, and how its length is told."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.entries: list[tuple[object, object]] = []
        self.data = bytearray()
        self.metadata: object = None
        for name, tensor in tensors.items():
            self.add(name, DTYPES[tensor.dtype], list(tensor.shape), tensor.contiguous().view(torch.uint8).numpy()
                     .tobytes() if tensor.ndim else tensor.reshape(1).view(torch.uint8).numpy().tobytes())

    def add(self, name: str, dtype: str, shape: list, content: bytes) -> None:
        start = len(self.data)
        self.data += content
        self.entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, len(self.data)]}))

    def put(self, name: str, dtype: str, shape: list, content: bytes) -> None:
        """Add a tensor in place of one of that name."""
        self.drop(name)
        self.add(name, dtype, shape, content)

    def drop(self, name: object) -> None:
        """Take a tensor out and close the gap it leaves."""
        for key, entry in [item for item in self.entries if item[0] == name]:
            start, stop = entry["data_offsets"]
            self.entries.remove((key, entry))
            del self.data[start:stop]
            for _, other in self.entries:
                if other["data_offsets"][0] >= stop:
                    other["data_offsets"] = [at - stop + start for at in other["data_offsets"]]

    def header(self) -> bytes:
        pairs = [f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in self.entries]
        if self.metadata is not None:
            pairs.insert(0, f'"__metadata__":{json.dumps(self.metadata)}')
        return ("{" + ",".join(pairs) + "}").encode()

    def file(self) -> bytes:
        header = self.header()
        return struct.pack("<Q", len(header)) + header + bytes(self.data)


def entry_of(draft: Draft, rng: Random) -> dict:
    return rng.choice(draft.entries)[1]


def numbers(rng: Random) -> object:
    return rng.choice([0, -1, -2**40, 1, 7, True, None, "4", 1.5, [], {}, *HUGE])


def offsets(draft: Draft, rng: Random) -> None:
    entry, other = entry_of(draft, rng), entry_of(draft, rng)
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = rng.choice([
        other["data_offsets"], [stop, start], [start - 1, stop - 1], [start + 1, stop + 1], [-start - 1, stop],
        [len(draft.data), len(draft.data) + stop - start], [start], [start, stop, stop], None, "0-4",
        [str(start), stop], [start, stop + 8], [float(start), stop], [numbers(rng), numbers(rng)],
        [start, numbers(rng)], [0, len(draft.data)]])


def shape(draft: Draft, rng: Random) -> None:
    entry = entry_of(draft, rng)
    old = list(entry["shape"])
    entry["shape"] = rng.choice([
        [], [0], [*old, 0], [*old, 1], old[::-1], old[1:], [-n for n in old], [1] * 1000, [2**32, 2**32], [2**62, 0],
        [0, 2**62], [*old, numbers(rng)], [numbers(rng)], [[n] for n in old], None, "x", {"a": 1}, [n + 1 for n in old],
        [rng.choice(HUGE) for _ in old], [1, *old], [float(n) for n in old]])


def shape_with_data(draft: Draft, rng: Random) -> None:
    """A tensor of another shape, which the file really holds."""
    name, entry = rng.choice(draft.entries)
    dims = [rng.choice([0, 1, 2, 3, 17, 128, 256, *entry["shape"][:2]]) for _ in range(rng.randint(0, 4))]
    size = ITEM[entry["dtype"]]
    for n in dims:
        size *= n
    if size < 1 << 22:
        draft.put(name, entry["dtype"], dims, bytes(size))


def swap(draft: Draft, rng: Random) -> None:
    """Two tensors under each other's names."""
    i, j = rng.randrange(len(draft.entries)), rng.randrange(len(draft.entries))
    (a, x), (b, y) = draft.entries[i], draft.entries[j]
    draft.entries[i], draft.entries[j] = (a, y), (b, x)


def dtype(draft: Draft, rng: Random) -> None:
    entry = entry_of(draft, rng)
    entry["dtype"] = rng.choice([*ITEM, *ITEM, "BOOL", "U64", "F4", "F8_E8M0", "C64", "I4", "bf16", "", "X" * 10**5,
                                 None, 5, ["F32"], {"F32": 1}, "F32\0"])


def dtype_with_data(draft: Draft, rng: Random) -> None:
    name, entry = rng.choice(draft.entries)
    kind = rng.choice(list(ITEM))
    size = ITEM[kind]
    for n in entry["shape"]:
        size *= n
    draft.put(name, kind, entry["shape"], bytes(size))


def names(draft: Draft, rng: Random) -> None:
    index = rng.randrange(len(draft.entries))
    name, entry = draft.entries[index]
    draft.entries[index] = (rng.choice([
        "../../etc/passwd", "/etc/passwd", "C:\\windows\\x", f"../{name}", f"{name}\0", "", " ", "x" * 10**5,
        "é" * 300, "\u202egnp.weight", "\ud800", "\U0001f3ac", "__metadata__", draft.entries[0][0], f"model.{name}",
        f"net.{name}", f"model.diffusion_model.{name}", f"_orig_mod.{name}", name.replace(".", ".\n"), name.upper(),
        re.sub(r"\d+", "99999999999", name), re.sub(r"\d+", "٣", name), re.sub(r"\d+", "-1", name),
        f"{name}.weight._data", f"{name}._scale", f"{name}.comfy_quant", name.replace("weight", "weight_v"),
        name + ".parametrizations.weight.original1", "a." * 240, "__class__.__init__"]), entry)


def few(draft: Draft, rng: Random) -> None:
    for _ in range(rng.choice([1, 1, 2, 30])):
        if draft.entries:
            draft.drop(rng.choice(draft.entries)[0])


def extra(draft: Draft, rng: Random) -> None:
    for _ in range(rng.randint(1, 6)):
        dims = [rng.choice([0, 1, 2, 3, 16]) for _ in range(rng.randint(0, 5))]
        size = 4
        for n in dims:
            size *= n
        prefix = rng.choice(["", "", "model.diffusion_model.", "model."])
        draft.add(prefix + rng.choice(STRANGERS), "F32", dims, bytes(size))


def many(draft: Draft, rng: Random) -> None:
    pattern = rng.choice(["blocks.{}.x", "audio_model.blocks.{}.x", "encoder.block.{}.layer.0.layer_norm.weight", "t{}",
                          "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
                          "video_model.blocks.{}.self_attn.q.weight", "decoder.up.{}.block.0.conv1.weight"])
    for i in range(rng.choice([500, 3000, 9000, 20000])):
        draft.entries.append((pattern.format(i), {"dtype": "F32", "shape": [0], "data_offsets": [len(draft.data)] * 2}))


FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4")
CONFS: list[object] = [
    *({"format": f} for f in FORMATS * 2), {}, [], 5, "x", None,
    *({"format": f} for f in (None, ["x"], "x" * 10**4, {}, 1)),
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "y"},
    {"format": "int8_tensorwise", "convrot_groupsize": 10**30},
    {"format": "int8_tensorwise", "params": 3},
    {"format": "convrot_w4a4", "linear_dtype": 9},
    {"format": "nvfp4", "num_experts": 10**9},
    {"format": "float8_e4m3fn", "params": {"a": []}}]


def layers_of(draft: Draft) -> list[str]:
    return [name.removesuffix(".weight") for name, _ in draft.entries
            if isinstance(name, str) and name.endswith(".weight")] or ["x"]


def metadata(draft: Draft, rng: Random) -> None:
    layers = {rng.choice([*layers_of(draft), "nowhere", ""]): rng.choice(CONFS) for _ in range(3)}
    records = rng.choice(["", "{", "null", "[]", "5", '"x"', '{"layers": []}', '{"layers": null}', '{"layers": "x"}',
                          '{"layer": {}}', '{"layers": {"x": 1}}', "[" * 10**5, '{"layers":' * 5000, "\ud800",
                          "9" * 10**4, json.dumps({"layers": layers}), json.dumps({"layers": layers})])
    draft.metadata = rng.choice([
        *({"_quantization_metadata": records} for _ in range(3)), [], 5, "x", {"a": 1}, {"a": None},
        {"_quantization_metadata": {"layers": layers}}, {"ovi_variant": "x" * 10**5}, {"ovi_variant": ["960x960_5s"]},
        {"config": "{}"}, {"config": "["}, {"a" * 10**5: "b"}, {"\0": "\ud800"}])


def records(draft: Draft, rng: Random) -> None:
    for layer in rng.sample(layers_of(draft), min(3, len(layers_of(draft)))):
        text = rng.choice([json.dumps(rng.choice(CONFS)).encode(), rng.randbytes(30), b"", b"[" * 5000, b"\xff\xfe"])
        kind, dims = rng.choice([("U8", [len(text)]), ("U8", [len(text)]), ("U8", [len(text)]), ("I8", [len(text)]),
                                 ("U8", [1, len(text)]), ("F8_E4M3", [len(text)])])
        draft.put(f"{layer}.comfy_quant", kind, dims, text)
        if rng.random() < 0.7:
            scales(draft, rng, layer, rng.choice(["weight_scale", "weight_scale", "weight_scale_2", "input_scale"]))


def scales(draft: Draft, rng: Random, layer: str, leaf: str) -> None:
    dims = rng.choice([[], [1], [0], [128], [128, 1], [2, 2], [1, 1, 1, 1], [128, 128], [5000]])
    kind = rng.choice(["F32", "F32", "BF16", "U8", "F8_E4M3", "I64"])
    size = ITEM[kind]
    for n in dims:
        size *= n
    draft.put(f"{layer}.{leaf}", kind, dims, bytes(size))


def older_records(draft: Draft, rng: Random) -> None:
    dims = rng.choice([[], [0], [1], [2], [2, 2], [10**4]])
    kind = rng.choice(["F8_E4M3", "F8_E4M3", "F32", "U8", "I64"])
    size = ITEM[kind]
    for n in dims:
        size *= n
    draft.put(rng.choice(["scaled_fp8", "scaled_fp8", "scaled_fp8", "model.scaled_fp8"]), kind, dims, bytes(size))
    for layer in rng.sample(layers_of(draft), min(2, len(layers_of(draft)))):
        leaf = rng.choice(["scale_weight", "scale_input", "scale_weight"])
        scales(draft, rng, rng.choice([layer, "nowhere", ""]), leaf)


def quanto(draft: Draft, rng: Random) -> None:
    layer = rng.choice(layers_of(draft))
    if rng.random() < 0.5:
        draft.drop(f"{layer}.weight")
    for leaf in rng.sample(["weight._data", "weight._scale", "input_scale", "output_scale"], 2):
        scales(draft, rng, layer, leaf)


def tokenizer(draft: Draft, rng: Random) -> None:
    kind = rng.choice(["spiece_model", "tokenizer_json"])
    places = [entry["data_offsets"] for name, entry in draft.entries if name == kind]
    old = bytes(draft.data[slice(*places[0])]) if places else b"{}"
    content = rng.choice([b"", b"{}", b"[" * 10**5, rng.randbytes(100), flip(old, rng), flip(old, rng),
                          old[:len(old) // 2], old + old,
                          b'{"version":"1.0","model":{"type":"Unigram","vocab":[],"unk_id":9}}'])
    draft.put(kind, rng.choice(["U8", "U8", "U8", "I8"]), [len(content)], content)


STRUCTURE: list[Callable[[Draft, Random], None]] = [
    offsets, offsets, shape, shape, shape_with_data, shape_with_data, swap, dtype, dtype, dtype_with_data, names, names,
    few, extra, many, metadata, metadata, records, records, older_records, quanto]


def flip(content: bytes, rng: Random, first: int = 0, last: int | None = None) -> bytes:
    """A few bytes changed between two places."""
    out = bytearray(content)
    last = len(out) if last is None else min(last, len(out))
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        if last > first:
            out[rng.randrange(first, last)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256), *b'{}[]",:-9'])
    return bytes(out)


def length_field(content: bytes, rng: Random) -> bytes:
    length, = struct.unpack("<Q", content[:8])
    new = rng.choice([0, 1, 2, length - 1, length + 1, length * 2, len(content), len(content) - 8, len(content) - 7,
                      2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000, 100_000_001])
    return struct.pack("<Q", new) + content[8:]


def raw_header(content: bytes, rng: Random) -> bytes:
    header = rng.choice([b"[" * 10**5, b"{}", b"[]", b"null", b"5", b'"x"', b'{"a":' * 10**4, b"\xff" * 100,
                         b" " * 10**5, b'{"a":' + b"9" * 10**4 + b"}", b'{"a":NaN}', b'{"a":{}}', b'{"a":[]}',
                         b'{"__metadata__":{}}',
                         b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'])
    return struct.pack("<Q", len(header)) + header + content[-64:]


def cut(content: bytes, rng: Random) -> bytes:
    return rng.choice([content[:rng.randrange(len(content))], content[:rng.randrange(200)], content + rng.randbytes(50),
                       content[rng.randrange(1, 100):], content[:-1], b"", content + bytes(10**6)])


def header_bytes(content: bytes, rng: Random) -> bytes:
    return flip(content, rng, 8, 8 + struct.unpack("<Q", content[:8])[0])


BYTES: list[Callable[[bytes, Random], bytes]] = [length_field, raw_header, cut, cut, header_bytes, header_bytes,
                                                 header_bytes]


def mutate_safetensors(tensors: dict[str, torch.Tensor], rng: Random) -> tuple[bytes, str]:
    draft, done = Draft(tensors), []
    structure = [*STRUCTURE, *([tokenizer] * 3 if "spiece_model" in tensors else [])]
    if rng.random() < 0.75:
        for change in rng.choices(structure, k=rng.choice([1, 1, 2, 3])):
            if draft.entries and all(isinstance(e["shape"], list) and isinstance(e["data_offsets"], list)
                                     and str(e["dtype"]) in ITEM for _, e in draft.entries):
                try:
                    change(draft, rng)
                except (TypeError, ValueError, OverflowError):  # what an earlier change left makes no sense to this one
                    continue
                done.append(change.__name__)
    content = draft.file()
    if not done or rng.random() < 0.1:
        change = rng.choice(BYTES)
        content = change(content, rng)
        done.append(change.__name__)
    return content, "+".join(done)


# --- pickles ----------------------------------------------------------------------------------------------------------

def saved(content: object) -> bytes:
    out = BytesIO()
    torch.save(content, out)
    return out.getvalue()


def saved_legacy(tensors: dict[str, torch.Tensor]) -> bytes:
    """As PyTorch wrote before 2020. It names and sorts storages by their addresses, so there is one, with one name."""
    flat, views, at = torch.cat([tensor.reshape(-1).float() for tensor in tensors.values()]), {}, 0
    for name, tensor in tensors.items():
        views[name] = flat[at:at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    out = BytesIO()
    torch.save(views, out, _use_new_zipfile_serialization=False)
    address = str(flat.untyped_storage()._cdata).encode()
    return out.getvalue().replace(struct.pack("<I", len(address)) + address, struct.pack("<I", 8) + b"12345678")


class Calls:
    """Unpickled, it would call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(marker: Path) -> list[Calls]:
    return [Calls(os.mkdir, str(marker)), Calls(os.system, f"touch {marker}"), Calls(bytearray, 10**12),
            Calls(bytearray, 3 << 30), Calls(eval, f"open({str(marker)!r}, 'w')"), Calls(torch.zeros, 10**12),
            Calls(torch.load, str(marker))]


def crafted(tensors: dict[str, torch.Tensor], rng: Random, marker: Path) -> object:
    """Files that PyTorch writes without complaint and that mean harm, or nothing."""
    name = rng.choice(list(tensors))
    one = torch.zeros(1)
    nested: object = dict(tensors)
    for _ in range(rng.choice([1, 3, 60])):
        nested = {"a": nested, "b": nested}
    bad = rng.choice([
        one.expand(10**6, 10**5), one.as_strided((10**7, 10**4), (0, 0)), torch.empty(10**9, 10**3, device="meta"),
        torch.zeros(3, 3).to_sparse(), torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.quint8),
        torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(0), tensors[name].reshape(-1)[:1], 5, None, "x",
        *calls(marker)])
    return rng.choice([{**tensors, name: bad}, {**tensors, "extra": bad}, bad, {"state_dict": bad},
                       {"ema": {name: bad}}, [tensors], {1: tensors}, nested, {}, {"a": 1},
                       {"state_dict": None, "model": tensors}, {f"{i}": one for i in range(rng.choice([100, 12000]))},
                       {"../../x\0": one, **tensors}])


def compressed(content: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.namelist():
            new.writestr(zipfile.ZipInfo(item), old.read(item), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def claim(content: bytes, rng: Random) -> bytes:
    """Numbers of the pickle, such as the sizes of storages, made larger; a zip does not notice where PyTorch reads."""
    out = bytearray(content)
    places = [m.start() for m in re.finditer(rb"[KMJ]", bytes(out[:60_000]))]
    for at in rng.sample(places, min(len(places), rng.choice([1, 5, 50]))):
        width = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[content[at]]
        out[at + 1:at + 1 + width] = (b"\xff" * (width - 1) + b"\x7f")[:width]
    return bytes(out)


def mutate_pickle(tensors: dict[str, torch.Tensor], rng: Random, marker: Path) -> tuple[bytes, str]:
    way = rng.choice(["crafted", "crafted", "crafted", "flip", "flip", "flip", "cut", "claim", "claim", "compressed",
                      "bare"])
    if way == "bare":
        return pickle.dumps(rng.choice([{"a": call} for call in calls(marker)]), protocol=rng.choice([2, 4])), way
    if way == "crafted":
        return saved(crafted(tensors, rng, marker)), way
    legacy = rng.random() < 0.3
    content = saved_legacy(tensors) if legacy else saved(tensors)
    if way == "compressed" and not legacy:
        return compressed(content), way
    if way == "cut":
        return cut(content, rng), way
    if way == "claim":
        return claim(content, rng), f"claim{' legacy' if legacy else ''}"
    at = rng.choice([(0, 30_000), (0, 2000), (len(content) - 30_000, None), (len(content) - 400, None)])
    return flip(content, rng, max(0, at[0]), at[1]), f"flip at {at}{' legacy' if legacy else ''}"
