"""Time and memory of `tools/convert.py` on a checkpoint of full size: `python benchmarks/conversion.py [--dtype int8]`.

The input is a sparse file: the released layout's 23.3 GB of zeros, which take no disk space. The output takes what its
precision takes (12 to 24 GB) and is deleted. Prints seconds and the converter's peak resident memory (Linux).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert
code = convert.main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(code)
"""


def sparse_checkpoint(path: Path, blocks: int, dtype: str) -> int:
    """Write the released layout with holes for its data; returns its size in bytes."""
    from devlib.pack import import_pack

    import_pack()
    import torch
    from ovi_native.ovi_model.files.safetensors_file import Spec, make_header
    from tiny.sizes import Sizes, tensor_shapes

    shapes = tensor_shapes(Sizes(heads=24, ffn=14336, text=4096, blocks=blocks))
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    header, _, size = make_header({name: Spec(kind, tuple(shape)) for name, shape in shapes.items()}, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp8_scaled", help="precision to convert to (default: fp8_scaled)")
    parser.add_argument("--source", default="bf16", choices=("bf16", "fp32"), help="precision of the input")
    parser.add_argument("--blocks", type=int, default=30, help="blocks of each tower (default: 30, the real model)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, output = folder / "model_960x960.safetensors", folder / "out.safetensors"
        size = sparse_checkpoint(source, args.blocks, args.source)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", RUN, str(ROOT / "tools"), str(source), str(output), "--dtype",
                               args.dtype, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        result = {"dtype": args.dtype, "input_gb": size / 1e9, "output_gb": output.stat().st_size / 1e9,
                  "seconds": time.monotonic() - started,
                  "peak_rss_gb": int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024 / 1e9}
    finally:
        shutil.rmtree(folder)
    print(", ".join(f"{name} {value if isinstance(value, str) else round(value, 2)}" for name, value in result.items()))
    measure.finish("conversion", result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
