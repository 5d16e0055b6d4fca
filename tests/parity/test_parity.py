"""The pack against the reference's numbers, one subtest an item, and the items against damaged numbers.

`--golden FOLDER` names the folder with the numbers; with `-s` each part prints its worst figure for each tolerance.
"""

import importlib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.parity_items import PARTS, Item, fusion

every_part = pytest.mark.parametrize("part", PARTS)


def items(golden: Path, part: str) -> list[Item]:
    found = list(importlib.import_module(f"support.parity_items.{part}").items(golden))
    assert found, f"{part} checked nothing"
    return found


def failing(golden: Path, part: str) -> list[str]:
    """Names of the items that fail; a part that cannot be checked raises, or has such an item too."""
    return [item.name for item in items(golden, part) if not item.ok]


@every_part
def test_every_item_of_the_reference(golden, part, subtests):
    found = items(golden, part)
    for item in found:
        with subtests.test(item.name):
            assert item.ok, str(item)
    for tolerance in sorted({item.tolerance for item in found}):
        worst = max((item for item in found if item.tolerance == tolerance), key=lambda item: item.error)
        print(f"{part}, worst of {len(found)}: {worst}")  # noqa: T201 (shown by -s, and when the test fails)


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


def assert_fails(golden: Path, part: str) -> None:
    with pytest.raises((AssertionError, OSError, KeyError)):
        assert not failing(golden, part)


@every_part
def test_what_cannot_be_checked_fails(tmp_path, part):
    assert_fails(tmp_path, part)


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
    assert_fails(root, part)


def test_one_wrong_output_of_the_model_fails(golden, tmp_path):
    """A change of 1e-4, ten times the tolerance for float32."""
    root = copy_of(golden, tmp_path, "fusion")
    change_tensor(root / "fusion" / "outputs_fp32.safetensors", "slg1.audio", lambda x: x * 1.0001)
    wrong = [item.name for item in fusion.forward_items(root / "fusion", "fp32") if not item.ok]
    assert wrong == ["fusion fp32 slg1.audio"]
    change_tensor(root / "fusion" / "intermediates_fp32.safetensors", "t2v.block1.vid", lambda x: x * 1.0001)
    wrong = [item.name for item in fusion.intermediate_items(root / "fusion") if not item.ok]
    assert wrong == ["fusion fp32 t2v.block1.vid"]


@pytest.mark.parametrize("change", [lambda x: x * 1.001, lambda _: None], ids=["changed", "missing"])
def test_one_wrong_trajectory_fails(golden, tmp_path, change):
    root = copy_of(golden, tmp_path, "schedulers")
    change_tensor(root / "schedulers" / "trajectories.safetensors", "unipc.shift5.steps10.f32", change)
    assert failing(root, "schedules") == ["trajectory unipc.shift5.steps10.f32"]
