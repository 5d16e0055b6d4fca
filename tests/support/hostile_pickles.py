"""PyTorch files that mean harm, for `test_pickles.py`: loads one under a memory limit, in a process of its own.

`python tests/support/hostile_pickles.py FILE` prints {"error": [class, sentence], "seconds": n, "grown": bytes}.
"""

import json
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch


def archive(*parts: tuple[str, bytes]) -> bytes:
    """A zip with these parts as they stand, twice the same name included."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in parts:
            info = zipfile.ZipInfo(name)  # writestr would warn of two equal names
            file.filelist.append(info)
            info.header_offset, info.CRC = out.tell(), 0
            info.file_size = info.compress_size = len(content)
            out.write(info.FileHeader() + content)
        file.start_dir, file._didModify = out.tell(), True  # type: ignore[attr-defined]
    return out.getvalue()


def zipped(program: bytes, name: str = "archive/data.pkl") -> bytes:
    """A PyTorch file whose pickle does what `program` says."""
    return archive((name, b"\x80\x02" + program + b"."), ("archive/version", b"3\n"), ("archive/byteorder", b"little"))


def legacy(program: bytes) -> bytes:
    """The same before PyTorch 1.6."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, machine))
    return head + b"\x80\x02" + program + b"." + pickle.dumps([], protocol=2)


def number(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def call(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


LARGE = 400_000_000
FLOATS = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(LARGE) + b"tQ"
NO_HOOKS = b"\x89" + call(b"collections\nOrderedDict")


def view(storage: bytes, shape: bytes, stride: bytes) -> bytes:
    return call(b"torch._utils\n_rebuild_tensor_v2", storage, number(0), shape, stride, NO_HOOKS)


def entry(value: bytes) -> bytes:
    """A dictionary with one weight."""
    return b"}" + text("w") + value + b"s"


PROGRAMS: dict[str, bytes] = {
    "a tensor of another device": entry(call(
        b"torch._utils\n_rebuild_device_tensor_from_cpu_tensor", call(b"torch\nTensor", number(LARGE)),
        b"ctorch\nfloat64\n", text("cpu"), b"\x89")),
    "an empty tensor": entry(call(b"torch\nTensor", number(LARGE))),
    "a tensor of a storage type": entry(call(b"torch\nFloatStorage", number(LARGE))),
    "a bytearray": call(b"builtins\nbytearray", number(2_000_000_000)),
    "a bytearray of Python 2": call(b"__builtin__\nbytearray", number(2_000_000_000)),
    "bytes": entry(call(b"__builtin__\nbytes", number(2_000_000_000))),
    "a meta tensor": entry(call(b"torch._utils\n_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n",
                                number(LARGE) + b"\x85", number(1) + b"\x85", b"\x89")),
    "a sparse tensor": entry(call(b"torch\nSparseTensor", number(LARGE))),
    "a storage larger than the file": entry(view(FLOATS, number(LARGE) + b"\x85", number(1) + b"\x85")),
    "an untyped storage": entry(call(b"torch.storage\nUntypedStorage", number(2_000_000_000))),
    "encoding": entry(call(b"_codecs\nencode", text("a" * 1000), text("utf-32"))),
    "a numpy array": entry(call(b"numpy.core.multiarray\n_reconstruct", b"cnumpy\nndarray\n", number(LARGE) + b"\x85")),
    "copies of a dictionary": b"}" + b"(" + b"".join(text(str(i)) + b"N" for i in range(2000)) + b"uq\x00"
                              + b"(" + (b"ccollections\nOrderedDict\nh\x00\x85R" * 20_000) + b"t",
    "attributes without end": b"}(" + b"".join(text(str(i)) + b"N" for i in range(2000)) + b"uq\x00"
                              + b"(" + (b"ccollections\nOrderedDict\n)Rh\x00b" * 20_000) + b"t",
    "many arguments": b"(" + b"N" * 100_000 + b"tq\x00(" + b"ctorch\ndevice\nh\x00R" * 20_000 + b"t",
    "a nested key": b"N\x85q\x00" + b"0" * 0 + b"h\x00h\x00\x86q\x00" * 60 + b"}q\x01h\x00Ns",
    "colliding keys": b"}(" + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N"
                                       for i in range(1, 100_000)) + b"u",
    "a far place of the memo": b"}r\xff\xff\xff\x7f",
    "a long text": b"X\xff\xff\xff\x7fabc",
    "a long number": b"\x8b\xff\xff\xff\x7fabc",
    "long bytes": b"\x8e\xff\xff\xff\xff\xff\xff\x00\x00abc",
    "a frame": b"\x95\xff\xff\xff\xff\xff\xff\x00\x00N",
    "doubling": b"]q\x00" + b"(h\x00h\x00e" * 40,
    "duplicates on the stack": b"}" + b"2" * 1000,
    "operations without end": b"N0" * 2_000_000,
    "dictionaries without end": b"(" + b"}" * 5_000_000 + b"t",
    "marks without end": b"(" * 5_000_000,
    "a set": b"\x8f",
    "an import of code": call(b"posix\nsystem", text("touch executed")),
    "an import with a long name": b"c" + b"a" * 10_000_000 + b"\nb\n",
    "underflow": b"s",
    "nothing": b"",
}


def expanded() -> bytes:
    """A view of one number, 10^14 elements long, in a file that PyTorch writes without complaint."""
    out = BytesIO()
    torch.save({"w": torch.zeros(1).expand(10**7, 10**7)}, out)
    return out.getvalue()


def saved() -> bytes:
    out = BytesIO()
    torch.save({"w": torch.zeros(1)}, out)
    return out.getvalue()


def overlapping() -> bytes:
    """A thousand storages on the same million bytes, out of line, so that each would be copied."""
    keys = [str(i) for i in range(1000)]
    storage = [b"(" + text("storage") + b"ctorch\nByteStorage\n" + text(key) + text("cpu") + number(1 << 20) + b"tQ"
               for key in keys]
    shape, stride = number(1 << 20) + b"\x85", number(1) + b"\x85"
    weights = b"}(" + b"".join(text(key) + view(each, shape, stride)
                               for key, each in zip(keys, storage, strict=True)) + b"u"
    content = bytearray(archive(("a/data.pkl", b"\x80\x02" + weights + b"."), ("a/data/0", b"\0" * (1 << 20))))
    directory = content.rindex(b"PK\x01\x02")
    first = bytes(content[directory:content.rindex(b"PK\x05\x06")])
    records = b"".join(first[:28] + struct.pack("<H", 7 + len(key)) + first[30:46] + f"a/data/{key}".encode()
                       for key in keys[1:])
    end = bytearray(content[content.rindex(b"PK\x05\x06"):])
    old_size, = struct.unpack("<I", end[12:16])
    end[8:16] = struct.pack("<HHI", 1001, 1001, old_size + len(records))
    return bytes(content[:-len(end)]) + records + bytes(end)


HANG = b"\x80\x02" + b"N0" * 150_000 + b"N."
FILES: dict[str, Callable[[], bytes]] = {
    **{name: (lambda program=program: zipped(program)) for name, program in PROGRAMS.items()},
    **{f"{name}, legacy": (lambda program=program: legacy(program)) for name, program in PROGRAMS.items()},
    "3000 names of one pickle": lambda: archive(*[("archive/data.pkl", HANG)] + [("archive/data.pkl", b"")] * 2999),
    "names that differ in case": lambda: archive(("archive/data.pkl", b"\x80\x02}."), ("archive/DATA.PKL", HANG)),
    "another case": lambda: zipped(PROGRAMS["a bytearray"], "archive/DATA.PKL"),
    "another root": lambda: archive(("a/x", b""), ("archive/data.pkl", HANG), ("b/data.pkl", HANG)),
    "a long table of contents": lambda: archive(("archive/data.pkl", b"\x80\x02}."),
                                          *((f"archive/{i:0500}", b"") for i in range(9_000))),
    "a view without end": expanded,
    "storages over each other": overlapping,
    "a tar": lambda: b"storages" + bytes(249) + b"ustar\x0000" + bytes(2000),
    "cut": lambda: saved()[:-30],
    "junk": lambda: b"PK\x03\x04" + bytes(5000),
    "empty": lambda: b"",
}


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(paths: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401 (puts ComfyUI and the pack where they can be imported)
    from ovi_native.ovi_model.files.reader import load_weights

    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + (1 << 30), resource.RLIM_INFINITY))
    for path in paths:
        error, before, start = None, resident(), time.process_time()
        try:
            load_weights(path)
        except Exception as caught:  # which ones come is the question
            error = [type(caught).__name__, str(caught)]
        print(json.dumps({"error": error, "seconds": time.process_time() - start,  # noqa: T201
                          "grown": resident() - before}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
