"""Files are whole or absent, whatever goes wrong on the way."""

import errno
import os

import pytest
import torch

from kernelbook.files import FileError, load_tensors, save_tensors, write_whole


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left.*unharmed.*Free some space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_it_as_any_file_made_here(tmp_path):
    (tmp_path / "any").touch()
    assert write_whole(tmp_path / "a.txt", "x").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(2, 3).t(), "b": torch.tensor(3), "c": torch.arange(4, dtype=torch.uint8)}
    path = save_tensors(tmp_path / "sub" / "x.safetensors", tensors, {"text": "ß", "nested": {"n": [1, None]}})
    back, metadata = load_tensors(path)
    assert all(torch.equal(back[name], t) and back[name].dtype is t.dtype for name, t in tensors.items())
    assert metadata == {"text": "ß", "nested": {"n": [1, None]}}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not tensors" * 9])
def test_a_damaged_file_is_never_taken_for_a_whole_one(tmp_path, damage):
    path = save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(50)}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match="cannot be read.*make it anew"):
        load_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match="x.safetensors does not exist"):
        load_tensors(tmp_path / "x.safetensors")
