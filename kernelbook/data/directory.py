"""Corpora in a folder of the reader's: aligned text files, one sentence a line, plain or gzipped."""

import gzip
import os
import unicodedata
import zlib
from pathlib import Path

from .corpora import LANGUAGES, Corpus, file_names, how_to_get
from .errors import DataError
from .parallel import Pair


def data_root() -> Path | None:
    """The folder named by ``KERNELBOOK_DATA``, which holds one folder for each corpus; None if it is not set."""
    root = os.environ.get("KERNELBOOK_DATA")
    return Path(root).expanduser() if root else None


def present_files(folder: Path, corpus: Corpus) -> list[Path]:
    """Those of the files of a corpus that lie in a folder."""
    candidates = (find_file(folder, name) for name in file_names(corpus))
    return [path for path in candidates if path is not None]


def find_file(folder: Path, name: str) -> Path | None:
    """The file of this name, gzipped or plain, in this order; None if there is neither."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    return None


def find_folder(corpus: Corpus, data_dir: str | os.PathLike | None) -> Path | None:
    """The folder to read a corpus from.

    Parameters
    ----------
    corpus : Corpus
        The corpus that is wanted.
    data_dir : path, optional
        The folder of the corpus, or the parent of several. If it is given, nothing else is considered.

    Returns
    -------
    Path or None
        Without `data_dir`, the folder of the corpus below ``KERNELBOOK_DATA``, or None if there is none.

    Raises
    ------
    DataError
        If `data_dir` is given, but is not a folder or holds nothing of the corpus.
    """
    if data_dir is None:
        root = data_root()
        return root / corpus.folder if root and (root / corpus.folder).is_dir() else None
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {how_to_get(corpus)}")
    for candidate in (folder, folder / corpus.folder):
        if present_files(candidate, corpus):
            return candidate
    raise DataError(
        f"{folder} holds nothing of {corpus.name}: expected {', '.join(file_names(corpus))} "
        f"(plain or with .gz), there or in its folder {corpus.folder}/; {how_to_get(corpus)}"
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or gzipped, in Unicode normal form C and stripped.

    Raises
    ------
    DataError
        If it is empty, not UTF-8, or said to be gzipped and is not.
    """
    try:
        # Only "\n" ends a line: the text may well contain other characters that Python counts as line ends.
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            lines = [unicodedata.normalize("NFC", line).strip() for line in file]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}); copy it again, or name it without .gz if it is plain text"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected one sentence a line") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not any(lines):
        raise DataError(f"{path} is empty; expected one sentence a line")
    return lines


def read_splits(folder: Path, corpus: Corpus) -> dict[str, list[Pair]]:
    """The pairs of each split; pairs of which a side is blank are skipped.

    Raises
    ------
    DataError
        If a file is missing or cannot be read, or two files that belong together differ in length.
    """
    missing = [name for name in file_names(corpus) if find_file(folder, name) is None]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)} (plain or with .gz), which {corpus.name} needs; "
            f"{how_to_get(corpus)}"
        )
    splits = {}
    for split, stem in corpus.splits:
        paths = [find_file(folder, f"{stem}.{language}") for language in LANGUAGES]
        source, target = (read_lines(path) for path in paths)
        if len(source) != len(target):
            raise DataError(
                f"{paths[0]} has {len(source):,} lines and {paths[1].name} has {len(target):,}, but line n of one must "
                "translate line n of the other; copy both files again"
            )
        splits[split] = [Pair(*sides) for sides in zip(source, target, strict=True) if all(sides)]
        if not splits[split]:
            raise DataError(f"{paths[0]} and {paths[1].name} have no line that is not blank in one of them")
    return splits


def inspect(corpus: Corpus) -> tuple[str, Path | None, int, dict, str]:
    """Status, folder, size of the files, (no) manifest, and what is missing, without reading any text."""
    root = data_root()
    if root is None:
        return "not found", None, 0, {}, "KERNELBOOK_DATA is not set"
    folder = root / corpus.folder
    files = present_files(folder, corpus)
    size = sum(path.stat().st_size for path in files)
    if len(files) == len(file_names(corpus)):
        return "found", folder, size, {}, ""
    missing = [name for name in file_names(corpus) if find_file(folder, name) is None]
    return "not found", folder, size, {}, f"{', '.join(missing)} missing"
