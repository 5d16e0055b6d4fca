"""Convert an Ovi checkpoint to another layout or precision: `python tools/convert.py IN [IN2] OUT --dtype fp8_scaled`.

IN is any file 'Load Ovi Model' reads, joint or one half of a split model (the other half is IN2, or found beside it).
Start it with ComfyUI's Python. It takes the ComfyUI of COMFYUI_PATH, else the one whose custom_nodes this folder is in,
else the one that `tools/dev.py setup` fetched. For any size of file it needs about 1.5 GB of memory. Runs on the GPU
where ComfyUI finds a CUDA one, unless --device cpu.

layouts    core      for 'Load Ovi Model' and ComfyUI's own 'Load Diffusion Model'
           upstream  the names of the released files
           split     two files, NAME_video and NAME_audio
dtypes     keep, bf16, fp32; float16 is not offered, this model overflows in it
"""

import argparse
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ("core", "upstream", "split")
DTYPES = {
    "keep": "as the file has it",
    "bf16": "16 bits",
    "fp32": "32 bits",
    "fp8_e4m3fn": "bare 8-bit floats without scales, for programs that know nothing better",
    "fp8_scaled": "8-bit floats, one scale a matrix",
    "int8": "8-bit integers, one scale a row: the smallest error in 8 bits",
    "mxfp8": "8-bit floats, one scale every 32 weights",
    "nvfp4": "4-bit floats, one scale every 16 weights",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    dtypes = "".join(f"\n           {name:10} {what}" for name, what in DTYPES.items()
                     if name not in ("keep", "bf16", "fp32"))
    parser = argparse.ArgumentParser(description=f"{(__doc__ or '').rstrip()}{dtypes}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="IN [IN2] OUT", help="one or two inputs, then the output")
    parser.add_argument("--layout", choices=LAYOUTS, default="core", help="names of the tensors (default: core)")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="precision (default: keep)")
    parser.add_argument("--variant", help="720x720_5s, 960x960_5s or 960x960_10s, where the input's name does not tell")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="where to quantise (default: auto)")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    args = parser.parse_args(arguments)
    if not 2 <= len(args.files) <= 3:
        parser.error("give one or two input files, then the output file.")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    *inputs, output = args.files
    sys.path.insert(0, str(ROOT / "tools"))
    from with_comfyui import comfyui_here, import_pack

    def say(line: str) -> None:
        print(line, flush=True)

    started = time.monotonic()
    try:
        import_pack(comfyui_here())
        from converting.conversion import Job, convert
        from ovi_native.ovi_model.files.quantise import quantising_device

        job = Job(tuple(inputs), Path(output), args.layout, args.dtype, args.variant, args.force,
                  device=quantising_device() if args.device == "auto" else None)
        outcome = convert(job, say)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was written.", file=sys.stderr)
        return 130
    if outcome.report.variant is None:
        say("The name does not tell which variant this is: nodes will ask for it. Add --variant to write it down.")
    for path in outcome.files:
        say(f"{path}: {path.stat().st_size / 1e9:.2f} GB")
    say(f"{outcome.quantised} layers quantised, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up after itself
    sys.exit(main())
