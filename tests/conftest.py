"""What all library tests share: the same examples on every run, and one thread, so that a failure can be repeated."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("kernelbook", derandomize=True, deadline=None, max_examples=20, database=None)
settings.load_profile("kernelbook")
torch.set_num_threads(1)


@pytest.fixture
def kernelbook(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns its exit code and what it printed to either stream."""
    from kernelbook import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERNELBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", 160)     # COLUMNS may have been read when the module was loaded

    def run(*args):
        monkeypatch.setattr("sys.argv", ["kernelbook", *map(str, args)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            torch.set_flush_denormal(False)
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return run
