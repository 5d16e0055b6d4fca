"""Ten thousand coverage-guided cases over the readers of files: nothing comes of them but results and our sentences.

What is fuzzed is in `fuzz_atheris.py`. atheris has wheels for Linux on x86-64 and Python 3.11 to 3.13; elsewhere the
mutations of `test_fuzz.py` remain. Each process ends at its first finding and leaves the input in its folder.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("atheris") is None,
                       reason="atheris is not installed: it has no wheel for this system or Python"),
]

RUNS, SECONDS, SEEDS = 5000, 240, (9, 10)  # a process; an idle machine needs a quarter of the time
SCRIPT = Path(__file__).with_name("fuzz_atheris.py")


def test_ten_thousand_cases(tmp_path):
    started = []
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        folder.mkdir()
        log = (folder / "log").open("w+")
        started.append((folder, log, subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(RUNS), str(SECONDS), str(seed)], stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"})))
    total, counts = 0, []
    try:
        for folder, log, process in started:
            code = process.wait(timeout=SECONDS + 120)
            log.seek(0)
            text = log.read()
            assert code == 0, f"ended with {code}; the input is in {folder}\n{text[-4000:]}"
            total += int(re.search(r"Done (\d+) runs", text)[1])
            counts.append(json.loads((folder / "counts.json").read_text()))
    finally:
        for _, log, process in started:
            process.kill()
            process.wait()
            log.close()
    print(f"{total} cases: {counts}")  # noqa: T201
    assert total >= 2000, f"only {total} cases in {SECONDS} s"
    assert all(each[name] for each in counts for name in each)
