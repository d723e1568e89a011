"""Corpora in a folder of the reader's: text files, plain or gzipped, UTF-8.

**Which files.** Known corpora have the names that their description says. A folder of the reader's own holds, for

* translation, ``train.X``, ``train.Y``, ``valid.X``, ... with one sentence a line, line n of one file the translation
  of line n of the other. ``X`` and ``Y`` are the languages. Texts are translated from the first in the alphabet to the
  second, unless the name of the folder ends as in ``news-fr-de``: from ``fr`` to ``de``.
* language modelling, ``train.txt``, ``valid.txt``, ``test.txt``, or one text file under any name. Documents are
  separated by blank lines; in a file that has none, each line is one. In a folder whose name begins with ``wikitext``
  they are articles, which begin with a line such as ``= Title =``.
* classification, ``train.tsv``, ``valid.tsv``, ``test.tsv``, each line a label, a tab, and a text; or ``.csv`` files
  with the label and the text, quoted as usual. A first line of the words *label* and *text* names the columns.

**Splits.** Where there is no file for valid or test, a tenth of the training texts is taken for each, chosen by a hash
of the text (of the target sentence), so that equal texts are in the same split.

**Text.** Everything is read in Unicode normal form C. Sentences are stripped; in documents and labelled texts each run
of white space becomes one space.
"""

import csv
import gzip
import io
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

from .corpora import CORPORA, Corpus, file_name, file_names, how_to_get
from .errors import DataError
from .records import SPLITS, Example, Item, Pair, percentile
from .tokenizer import normalise

CARVED_PERCENT = 10
"""The share of the training texts that becomes valid, and test, where a folder has no files for them."""

ENDINGS = {"language-modelling": ("txt",), "classification": ("tsv", "csv")}
"""How the files of a reader's own corpus end; those of a translation corpus end with languages."""

EXPECTED = {
    "translation": "expected train.X and train.Y, X and Y being the languages, such as train.de and train.en (and "
                   "valid.X, valid.Y, test.X, test.Y), one sentence a line",
    "language-modelling": "expected train.txt (and valid.txt, test.txt), or a single text file",
    "classification": "expected train.tsv (and valid.tsv, test.tsv), each line a label, a tab and a text, or the same "
                      "as .csv",
}
"""What a folder of the reader's own must hold, in words."""

_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
_ARTICLE = re.compile(r"= [^=](.*[^=])? =")
_HELD_OUT = re.compile(r"(val|valid|validation|dev|test|eval|evaluation)([\d_.-].*)?")


def data_root() -> Path | None:
    """The folder named by ``KERNELBOOK_DATA``, which holds one folder for each corpus; None if it is not set."""
    root = os.environ.get("KERNELBOOK_DATA")
    return Path(root).expanduser() if root else None


def present_files(folder: Path, corpus: Corpus) -> list[Path]:
    """Those of the files of a corpus that lie in a folder."""
    candidates = (find_file(folder, name) for name in file_names(corpus))
    return [path for path in candidates if path is not None]


def missing_files(folder: Path, corpus: Corpus) -> list[str]:
    """The names of those that do not."""
    return [name for name in file_names(corpus) if find_file(folder, name) is None]


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
    packed = "" if corpus.layout == "images" else " (plain or with .gz)"
    raise DataError(
        f"{folder} holds nothing of {corpus.name}: expected {', '.join(file_names(corpus))}{packed}, there or in its "
        f"folder {corpus.folder}/; {how_to_get(corpus)}"
    )


# --------------------------------------------------------------------------------------------- the reader's own


def own_name(path: Path) -> str:
    """What a reader's own corpus is called: as its folder, or its file, in letters that a file name may hold."""
    path = path.absolute()
    name = path.name if path.is_dir() else _split_name(path)[0]
    name = re.sub(r"[^\w.+-]+", "_", name) or "text"
    return f"own-{name}" if name in CORPORA else name


def own(task: str, path: Path) -> tuple[Corpus, Path] | None:
    """The description of a reader's own corpus and the folder it lies in; None if there is none for this task.

    Raises
    ------
    DataError
        If there are files of one, but it is not clear which are which.
    """
    if path.is_file():
        if task == "translation":
            raise DataError(f"{path} is a file; {EXPECTED[task]}")
        stem, suffix = _split_name(path)
        return _describe(task, path, (suffix,), (("train", stem),)), path.parent
    files = sorted({_split_name(file) for file in path.iterdir() if file.is_file()})
    if task == "translation":
        suffixes = tuple(end for stem, end in files if stem == "train" and _LANGUAGE.fullmatch(end)
                         and not any(end in other for other in ENDINGS.values()))
        if not suffixes:
            return None
        if len(suffixes) != 2:
            raise DataError(
                f"{path} has {', '.join(f'train.{end}' for end in suffixes)}; expected two files, one for each language"
            )
        if re.search(rf"(^|[^A-Za-z]){suffixes[1]}-{suffixes[0]}$", path.absolute().name):
            suffixes = suffixes[::-1]
    else:
        ends = [end for end in ENDINGS[task] if ("train", end) in files]
        single = [(stem, end) for stem, end in files if end in ENDINGS[task]]
        if not ends and len(single) == 1 and not _HELD_OUT.fullmatch(single[0][0]):
            return _describe(task, path, (single[0][1],), (("train", single[0][0]),)), path
        if len(ends) > 1:
            raise DataError(f"{path} has {' and '.join(f'train.{end}' for end in ends)}; expected one of them")
        if not ends:
            held_out = [file_name(*name) for name in single if _HELD_OUT.fullmatch(name[0])]
            if held_out:
                raise DataError(
                    f"{path} has {', '.join(held_out)}, but no train.{' or train.'.join(ENDINGS[task])}, without which "
                    "nothing can be trained"
                )
            return None
        suffixes = (ends[0],)
    strange = [file_name(stem, end) for stem, end in files
               if end in suffixes and _HELD_OUT.fullmatch(stem) and stem not in SPLITS]
    if strange:
        raise DataError(
            f"{path} has {', '.join(strange)}; call the files for validation and test "
            f"{' and '.join(file_name(split, suffixes[0]) for split in ('valid', 'test'))}, so that it is clear which "
            "they are, and keep others elsewhere"
        )
    present = tuple((split, split) for split in SPLITS if any((split, end) in files for end in suffixes))
    return _describe(task, path, suffixes, present), path


def _describe(task: str, path: Path, suffixes: tuple[str, ...], splits: tuple[tuple[str, str], ...]) -> Corpus:
    name = own_name(path)
    articles = name.casefold().startswith("wikitext")
    layout = {"translation": "pairs", "classification": "labelled"}.get(task, "articles" if articles else "paragraphs")
    there = [split for split, _ in splits]
    return Corpus(
        name=name, task=task, title=f"the reader's own text in {path.name}", description="", source="directory",
        licence="not known: the reader's own text", citation="", folder=path.name, suffixes=suffixes, splits=splits,
        carved=tuple(split for split in SPLITS if split not in there), layout=layout,
        separator="," if suffixes[0] == "csv" else "\t",
    )


def _split_name(path: Path) -> tuple[str, str]:
    """``train.de.gz`` has the stem ``train`` and the suffix ``de``."""
    name = path.name.removesuffix(".gz")
    stem, dot, suffix = name.rpartition(".")
    return (stem, suffix) if dot and stem else (name, "")


def recognise(task: str, data_dir: Path) -> tuple[Corpus, Path]:
    """The one corpus for a task that a folder, or a folder in it, holds; and where its files lie.

    A known corpus is recognised by the name of its folder, or by its files where these are not called like everyone's;
    else the folder is taken for the reader's own.

    Raises
    ------
    DataError
        If there is none, or more than one.
    """
    if not data_dir.exists():
        raise DataError(f"{data_dir} is not a folder; expected one with the files of a corpus")
    known = [corpus for corpus in CORPORA.values() if corpus.task == task]
    if data_dir.is_dir():
        here = data_dir.absolute().name
        for corpus in known:
            called_so = here == corpus.folder and present_files(data_dir, corpus)
            unlike_others = {stem for _, stem in corpus.splits} - set(SPLITS)
            if called_so or (unlike_others and not missing_files(data_dir, corpus)):
                return corpus, data_dir
    if found := own(task, data_dir):
        return found
    below = [corpus for corpus in known if present_files(data_dir / corpus.folder, corpus)]
    if len(below) == 1:
        return below[0], data_dir / below[0].folder
    if below:
        names = " or ".join(sorted(corpus.name for corpus in below))
        raise DataError(f"{data_dir} may hold {names}; say which with the name of the corpus")
    raise DataError(f"{data_dir} holds no corpus for {task}; {EXPECTED[task]}")


# ------------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, *, encoding: str = "utf-8", expected: str = "one sentence a line") -> str:
    """The text of a file, plain or gzipped, in Unicode normal form C.

    Parameters
    ----------
    path : Path
        The file.
    encoding : str
        Tried if it is not UTF-8.
    expected : str
        What should be in it, for the messages.

    Raises
    ------
    DataError
        If it is empty, of another encoding, or said to be gzipped and is not.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            if encoding == "utf-8":
                raise
            text = content.decode(encoding)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}); copy it again, or name it without .gz if it is plain text"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected {expected}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty; expected {expected}")
    return unicodedata.normalize("NFC", text)


def read_lines(path: Path, *, encoding: str = "utf-8", expected: str = "one sentence a line") -> list[str]:
    """The lines of a text file, plain or gzipped, in Unicode normal form C and stripped; see ``read_text()``."""
    # Only "\n" ends a line: the text may well contain other characters that Python counts as line ends.
    lines = read_text(path, encoding=encoding, expected=expected).removesuffix("\n").split("\n")
    return [line.strip() for line in lines]


def read_splits(folder: Path, corpus: Corpus, *, evaluation_only: bool = False) -> dict[str, list[Item]]:
    """The records of each split.

    Parameters
    ----------
    folder : Path
        Where the files lie.
    corpus : Corpus
        Which they are and how they are to be read.
    evaluation_only : bool
        Whether the training text may be missing; its split is empty then.

    Raises
    ------
    DataError
        If a file is missing or cannot be read, files that belong together differ in length, or a line has no label.
    """
    missing = missing_files(folder, corpus)
    train = [name for name in missing if name in file_names(corpus)[: len(corpus.suffixes)]]
    if missing and not (evaluation_only and missing == train):
        without = ", without which nothing can be trained" if missing == train else ""
        raise DataError(
            f"{folder} lacks {', '.join(missing)} (plain or with .gz), which {corpus.name} needs{without}; "
            f"{how_to_get(corpus)}"
        )
    read = {"pairs": _read_pairs, "paragraphs": _read_paragraphs, "articles": _read_articles,
            "labelled": _read_labelled}[corpus.layout]
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for split, stem in corpus.splits:
        if split == "train" and train:
            continue
        paths = [find_file(folder, file_name(stem, suffix)) for suffix in corpus.suffixes]
        splits[split] = read(corpus, *paths)
    return carve(splits, corpus) if corpus.carved else splits


def carve(splits: dict[str, list[Item]], corpus: Corpus) -> dict[str, list[Item]]:
    """Take the splits that have no files of their own out of the training texts.

    Raises
    ------
    DataError
        If there are so few texts that a split would be empty.
    """
    carved: dict[str, list[Item]] = {split: [] for split in ("train", *corpus.carved)}
    for record in splits["train"]:
        text = record if isinstance(record, str) else record.target if isinstance(record, Pair) else record.text
        share = int(percentile(text) // CARVED_PERCENT)
        carved[corpus.carved[share] if share < len(corpus.carved) else "train"].append(record)
    if empty := [split for split in carved if not carved[split]]:
        raise DataError(
            f"{corpus.name} has too few {corpus.noun} to train with, {len(splits['train']):,}: nothing is left for "
            f"{', '.join(empty)} when {CARVED_PERCENT} % are chosen for {' and for '.join(corpus.carved)}; add text, "
            "or files for these splits"
        )
    return splits | carved


def _read_pairs(corpus: Corpus, *paths: Path) -> list[Pair]:
    source, target = (read_lines(path, encoding=corpus.encoding) for path in paths)
    if len(source) != len(target):
        raise DataError(
            f"{paths[0]} has {len(source):,} lines and {paths[1].name} has {len(target):,}, but line n of one must "
            "translate line n of the other; copy both files again"
        )
    pairs = [Pair(*sides) for sides in zip(source, target, strict=True) if all(sides)]
    if not pairs:
        raise DataError(f"{paths[0]} and {paths[1].name} have no line that is not blank in one of them")
    return pairs


def _read_paragraphs(corpus: Corpus, path: Path) -> list[str]:
    lines = read_lines(path, encoding=corpus.encoding, expected="text, with blank lines between documents")
    while not lines[0]:
        del lines[0]
    while not lines[-1]:
        del lines[-1]
    if all(lines):
        return [normalise(line) for line in lines]
    return [normalise(" ".join(part)) for part in _parts(lines)]


def _parts(lines: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for line in [*lines, ""]:
        if line:
            part.append(line)
        elif part:
            yield part
            part = []


def _read_articles(corpus: Corpus, path: Path) -> list[str]:
    lines = ["", *read_lines(path, encoding=corpus.encoding, expected="articles that begin with = Title ="), ""]
    begins = [n for n in range(1, len(lines) - 1)
              if _ARTICLE.fullmatch(lines[n]) and not lines[n - 1] and not lines[n + 1]]
    if not begins:
        raise DataError(f"{path} has no line = Title = between blank lines, with which each article of WikiText begins")
    if stray := next((n for n in range(1, begins[0]) if lines[n]), None):
        raise DataError(f"{path} line {stray} stands before the first article, which begins with a line = Title =")
    return [normalise(" ".join(lines[begin:end])) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def _read_labelled(corpus: Corpus, path: Path) -> list[Example]:
    between = {" ": "a space", "\t": "a tab", ",": "a comma"}[corpus.separator]
    expected = f"a label, {between} and a text in each line"
    names = dict(corpus.labels)
    examples = []
    order = (0, 1)
    for n, (number, fields) in enumerate(_rows(corpus, path, expected)):
        columns = [field.strip().casefold() for field in fields]
        if n == 0 and sorted(columns) == ["label", "text"]:
            order = (columns.index("label"), columns.index("text"))
            continue
        if len(fields) != 2:
            columns = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
            raise DataError(f"{path} line {number} has {columns}; expected {expected}")
        label, text = (normalise(fields[n]) for n in order)
        if not label or not text:
            raise DataError(f"{path} line {number} has no {'text' if label else 'label'}; expected {expected}")
        if names and label not in names:
            raise DataError(
                f"{path} line {number} begins with {label!r}, which is no label of {corpus.name}; its labels are "
                f"{', '.join(f'{short} ({name})' for short, name in corpus.labels)}"
            )
        examples.append(Example(text, names.get(label, label)))
    if not examples:
        raise DataError(f"{path} has no line but its first; expected {expected}")
    return examples


def _rows(corpus: Corpus, path: Path, expected: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, by number, as columns."""
    if corpus.separator == ",":
        text = read_text(path, encoding=corpus.encoding, expected=expected)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not CSV ({error}); expected {expected}") from error
        return
    for number, line in enumerate(read_lines(path, encoding=corpus.encoding, expected=expected), 1):
        if line:
            yield number, line.split(corpus.separator, 1 if corpus.separator == " " else -1)


def inspect(corpus: Corpus) -> tuple[str, Path | None, int, dict, str]:
    """Status, folder, size of the files, (no) manifest, and what is missing, without reading any text."""
    root = data_root()
    if root is None:
        return "not found", None, 0, {}, "KERNELBOOK_DATA is not set"
    folder = root / corpus.folder
    files = present_files(folder, corpus)
    size = sum(path.stat().st_size for path in files)
    missing = missing_files(folder, corpus)
    if not missing:
        return "found", folder, size, {}, ""
    return "incomplete" if files else "not found", folder, size, {}, f"{', '.join(missing)} missing"
