"""Train a LoRA, or whole weights, from a file of settings: `python tools/train.py SETTINGS.toml`.

For runs of hours and days. Start it with ComfyUI's Python; it takes the ComfyUI of COMFYUI_PATH, else the one whose
custom_nodes this folder is in, else the one that `tools/dev.py setup` fetched. It says what it will do and the memory
it will need, and then begins. Stop it with Ctrl+C or in any other way: started again, it goes on from its last
checkpoint. --dry-run ends before it loads anything. Every setting, with its default, is in `docs/training.md`.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, metavar="SETTINGS.toml")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and end")
    return parser.parse_args(arguments)


def say(line: str) -> None:
    print(line, flush=True)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    sys.path.insert(0, str(ROOT / "tools"))
    from with_comfyui import comfyui_here, import_pack

    signal.signal(signal.SIGTERM, stop)
    begun = time.monotonic()
    try:
        import_pack(comfyui_here())
        from training.session import announce, read, run

        settings = read(args.settings)
        for line in announce(settings):
            say(line)
        if args.dry_run:
            return 0
        for line in run(settings, say):
            say(line)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train: stopped. Start it again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    say(f"Done in {(time.monotonic() - begun) / 60:.1f} minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
