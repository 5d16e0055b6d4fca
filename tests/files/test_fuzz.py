"""More than two thousand mutated weight files: each loads or is refused in a sentence, whatever is in it.

Seeds are fixed, so a failure can be repeated: `python tests/files/fuzzing.py LOADER SEED 1 FOLDER`. What is done
to them is in `fuzzing.py`. Each loader has a process of its own, which watches its address space, its time and what
it calls.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory limits and figures are Linux's"),
]

BATCHES = {"model": 1100, "text": 750, "audio": 200}
SCRIPT = Path(__file__).with_name("fuzzing.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All of them at once; the slowest takes half the time of all."""
    started = {}
    for kind, count in BATCHES.items():
        folder = tmp_path_factory.mktemp(kind)
        started[kind] = folder, subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, "0", str(count), str(folder)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", BATCHES)
def test_mutated_files(runs, kind):
    folder, process = runs[kind]
    output, errors = process.communicate(timeout=600)
    seed = (folder / "seed").read_text() if (folder / "seed").exists() else "none"
    assert process.returncode == 0, f"ended with {process.returncode} at seed {seed}:\n{errors[-3000:]}"
    result = json.loads(output)
    assert result["failures"] == []
    assert result["loaded"] + result["refused"] >= BATCHES[kind]
    assert result["refused"] > 0.6 * BATCHES[kind] and result["loaded"] > 0.03 * BATCHES[kind], result
    print(f"{kind}: {result['loaded']} loaded, {result['refused']} refused, address space grew by "  # noqa: T201
          f"{result['peak'] >> 20} MiB, {result['resident'] >> 20} MiB resident at most")


def test_there_are_enough_of_them():
    assert sum(BATCHES.values()) >= 2000
