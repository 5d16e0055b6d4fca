"""Check the pack against a folder of numbers from the reference: `python tools/parity.py GOLDEN_DIR [part ...]`.

Prints `item, relative L2, tolerance, ok` for every item and exits with 1 if any fails; what cannot be checked fails.
Needs ComfyUI importable: COMFYUI_PATH, or the one `tools/dev.py setup` fetched.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("fusion", "schedules", "sampling", "text", "audio", "video_vae", "prompts", "sizes", "images")


def collect(golden: Path, part: str) -> Iterator:
    """Yield the items of one part; an exception becomes a failing item."""
    from parity_items import Item

    try:
        yield from importlib.import_module(f"parity_items.{part}").items(golden)
    except Exception as error:  # whatever stops a check is reported as that check's failure
        traceback.print_exc()
        yield Item(f"{part}: stopped", float("inf"), 0.0, f"{type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, help="folder in the golden format")
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"what to check (default: {' '.join(PARTS)})")
    args = parser.parse_args()
    if not args.golden.is_dir():
        parser.error(f"{args.golden} is not a folder; give the folder with the reference's numbers.")

    sys.path.insert(0, str(ROOT / "tools"))
    from devlib.pack import import_pack

    import_pack()
    print(f"{'item':64} {'relative L2':>11} {'tolerance':>9}  ok")
    failed = total = 0
    for part in args.parts:
        for item in collect(args.golden, part):
            total += 1
            failed += not item.ok
            detail = f"  {item.detail}" if item.detail and not item.ok else ""
            print(f"{item.name:64} {item.error:11.2e} {item.tolerance:9.1e}  {'ok' if item.ok else 'FAILED'}{detail}",
                  flush=True)
    print(f"{total - failed} of {total} items ok")
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
