"""What is said of sizes, and what is left of files whose writing failed."""

import pytest
from ovi_native.ovi_model.files import disk


def test_sizes_are_readable():
    assert [disk.human(n) for n in (0, 999, 1500, 326_154_893, 1_409_400_960, 23_300_000_000)] == [
        "0 bytes", "999 bytes", "1.5 kB", "326 MB", "1.4 GB", "23.3 GB"]


def test_a_file_is_whole_or_not_there(tmp_path):
    def chunks():
        yield b"begun"
        raise OSError("the disk is full")

    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(OSError, match="full"):
        disk.write_atomically(tmp_path / "file", chunks())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"before")]
    disk.write_atomically(tmp_path / "sub" / "file", [b"a", b"b"])
    assert (tmp_path / "sub" / "file").read_bytes() == b"ab"
