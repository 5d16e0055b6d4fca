"""The pack against the reference's numbers, and the checker against damaged numbers."""

import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest
from parity_items import fusion
from safetensors.torch import load_file, save_file

LAST_COLUMN = -1


def copy_of(golden: Path, tmp_path: Path, *folders: str) -> Path:
    """A golden folder of its own with links to the files of `folders` (none: all); replace a link to change a file."""
    root = tmp_path / "golden"
    for source in golden.rglob("*"):
        if source.is_file() and (not folders or source.relative_to(golden).parts[0] in folders):
            target = root / source.relative_to(golden)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    return root


def change_tensor(file: Path, name: str, change) -> None:
    """Rewrite a linked safetensors file with one tensor changed; None drops it."""
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    file.unlink()
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


def failures(golden: Path, part: str) -> list:
    items = list(parity.collect(golden, part))
    assert items, f"{part} checked nothing"
    return [item for item in items if not item.ok]


@pytest.mark.parametrize("part", parity.PARTS)
def test_every_item_of_the_reference(golden, part):
    wrong = failures(golden, part)
    assert not wrong, "\n".join(f"{item.name}: {item.error:.2e} > {item.tolerance:.0e} {item.detail}" for item in wrong)


@pytest.mark.parametrize("part", parity.PARTS)
def test_what_cannot_be_checked_fails(tmp_path, part):
    assert failures(tmp_path, part)


@pytest.mark.parametrize(("part", "file"), [
    ("fusion", "fusion/inputs.safetensors"), ("fusion", "fusion/weights.safetensors"),
    ("schedules", "schedulers/trajectories.safetensors"), ("schedules", "schedulers/tables.json"),
    ("sampling", "sampling/inputs.safetensors"), ("sampling", "sampling/t2v_unipc_fp32.safetensors"),
    ("text", "t5/outputs.safetensors"), ("prompts", "prompts.json"), ("sizes", "sizes.json"),
    ("images", "image_preprocess.safetensors"),
])
def test_a_deleted_file_fails(golden, tmp_path, part, file):
    root = copy_of(golden, tmp_path)
    (root / file).unlink()
    assert any(not item.ok for item in parity.collect(root, part))


def run_tool(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, parity.__file__, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=120)


def test_the_command_exits_with_1_and_names_the_one_changed_tensor(golden, tmp_path):
    root = copy_of(golden, tmp_path, "schedulers")
    change_tensor(root / "schedulers" / "trajectories.safetensors", "unipc.shift5.steps10.f32", lambda x: x * 1.001)
    done = run_tool(root, "schedules")
    rows = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert [row.split()[:2] for row in rows if "FAILED" in row] == [["trajectory", "unipc.shift5.steps10.f32"]]
    assert rows[0].split() == ["item", "relative", "L2", "tolerance", "ok"]
    assert rows[LAST_COLUMN] == f"{len(rows) - 3} of {len(rows) - 2} items ok"


def test_the_command_exits_with_0_when_all_is_well(golden):
    done = run_tool(golden, "schedules", "sizes", "prompts")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "no_such_part"]])
def test_the_command_refuses_what_it_cannot_check(arguments):
    assert run_tool(*arguments).returncode != 0


def test_one_wrong_output_of_the_model_fails(golden, tmp_path):
    """A change of 1e-4, ten times the tolerance for float32."""
    root = copy_of(golden, tmp_path, "fusion")
    change_tensor(root / "fusion" / "outputs_fp32.safetensors", "slg1.audio", lambda x: x * 1.0001)
    items = list(fusion.forward_items(root / "fusion", "fp32"))
    assert [item.name for item in items if not item.ok] == ["fusion fp32 slg1.audio"]
    change_tensor(root / "fusion" / "intermediates_fp32.safetensors", "t2v.block1.vid", lambda x: x * 1.0001)
    items = list(fusion.intermediate_items(root / "fusion"))
    assert [item.name for item in items if not item.ok] == ["fusion fp32 t2v.block1.vid"]


def test_a_missing_tensor_fails(golden, tmp_path):
    root = copy_of(golden, tmp_path, "schedulers")
    change_tensor(root / "schedulers" / "trajectories.safetensors", "euler.shift5.steps4.f64", lambda _: None)
    assert [item.name for item in failures(root, "schedules")] == ["trajectory euler.shift5.steps4.f64"]
