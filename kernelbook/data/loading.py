"""Loading a corpus by name, from wherever it is had."""

import os
from pathlib import Path

from .cache import entry_path, fetch, is_current, read_entry
from .corpora import CORPORA, DEFAULTS, Corpus, find_corpus, how_to_get
from .directory import data_root, find_folder, own, own_name, read_splits, recognise
from .errors import DataError
from .images import ImageCorpus, read_digits, read_omniglot
from .parallel import ParallelCorpus
from .records import SPLITS, Item, fingerprint
from .texts import LabelledCorpus, TextCorpus


def load_translation(
    name: str | None = None, *, data_dir: str | os.PathLike | None = None, progress: bool = True
) -> ParallelCorpus:
    """Load a parallel corpus, fetching it first if need be.

    Sought in this order: in `data_dir`, if that is given; in the folder of the corpus below ``KERNELBOOK_DATA``;
    in the cache, for a package corpus, which is downloaded and derived if it is not there.

    Parameters
    ----------
    name : str, optional
        A corpus for translation, see ``CORPORA``, or the name of a folder of your own below ``KERNELBOOK_DATA`` or
        `data_dir`. By default the one that `data_dir` holds, and ``"bible"`` without `data_dir`.
    data_dir : path, optional
        The folder of the corpus, or the parent of several. How the files of your own must be called, see
        ``kernelbook.data.directory``.
    progress : bool
        Announce a download and show how far it is, see ``fetch()``.

    Returns
    -------
    ParallelCorpus

    Raises
    ------
    DataError
        If there is no such corpus, or its files are missing, damaged or do not belong together.
    """
    corpus, common = _load("translation", name, data_dir, progress)
    source, target = corpus.suffixes
    return ParallelCorpus(**common, source_language=source, target_language=target)


def load_text(
    name: str | None = None,
    *,
    data_dir: str | os.PathLike | None = None,
    evaluation_only: bool = False,
    progress: bool = True,
) -> TextCorpus:
    """Load documents for language modelling, fetching them first if need be.

    Parameters
    ----------
    name : str, optional
        As in ``load_translation()``; by default the corpus that `data_dir` holds, and ``"wikipedia"`` without.
    data_dir : path, optional
        The folder of the corpus, the parent of several, or a single text file.
    evaluation_only : bool
        Whether the training text may be missing from a folder; ``train`` is empty then.
    progress : bool
        Announce a download and show how far it is, see ``fetch()``.

    Returns
    -------
    TextCorpus

    Raises
    ------
    DataError
        If there is no such corpus, or its files are missing or damaged.
    """
    _, common = _load("language-modelling", name, data_dir, progress, evaluation_only=evaluation_only)
    return TextCorpus(**common)


def load_labelled(
    name: str | None = None, *, data_dir: str | os.PathLike | None = None, progress: bool = True
) -> LabelledCorpus:
    """Load labelled texts for classification, fetching them first if need be.

    Parameters
    ----------
    name : str, optional
        As in ``load_translation()``; by default the corpus that `data_dir` holds, and ``"wikipedia-topics"`` without.
    data_dir : path, optional
        The folder of the corpus, the parent of several, or a single file of labelled lines.
    progress : bool
        Announce a download and show how far it is, see ``fetch()``.

    Returns
    -------
    LabelledCorpus
        Its classes are in the order that the description of the corpus gives, else sorted.

    Raises
    ------
    DataError
        If there is no such corpus, its files are missing or damaged, a line has no label, or valid or test has a
        label that never occurs in train.
    """
    corpus, common = _load("classification", name, data_dir, progress)
    labels = [name for _, name in corpus.labels] or sorted({example.label for example in common["train"]})
    if len(labels) < 2:
        raise DataError(f"all texts of {corpus.name} have the same label, {labels[0]!r}: there is nothing to learn")
    return LabelledCorpus(**common, labels=labels)


def load_images(name: str | None = None, *, data_dir: str | os.PathLike | None = None) -> ImageCorpus:
    """Load images for one-shot classification.

    Parameters
    ----------
    name : str, optional
        ``"omniglot"`` or ``"digits"``. Without it, Omniglot if `data_dir` is given or ``KERNELBOOK_DATA`` has it; else
        the digits stand in for it, and ``stands_in_for`` of the result says so.
    data_dir : path, optional
        The folder of Omniglot, or the parent of several.

    Returns
    -------
    ImageCorpus

    Raises
    ------
    DataError
        If there is no such corpus, or its files are missing or damaged.
    """
    corpus = find_corpus(DEFAULTS["one-shot"] if name is None else name, "one-shot")
    stands_in_for = ""
    if corpus.source == "directory":
        folder = find_folder(corpus, data_dir)
        if folder is None and name is not None:
            raise DataError(f"{corpus.name} is not on this machine; {how_to_get(corpus)}")
        if folder is None:
            stands_in_for, corpus = corpus.name, CORPORA["digits"]
    elif data_dir is not None:
        raise DataError(f"{corpus.name} is not read from a folder, and data_dir is {str(data_dir)!r}; leave it out")
    splits, digest = read_digits() if corpus.source == "installed" else read_omniglot(folder)
    return ImageCorpus(corpus.name, **{split: splits.get(split) for split in (*SPLITS, "runs")}, origin=corpus.source,
                       fingerprint=digest, licence=corpus.licence, citation=corpus.citation,
                       stands_in_for=stands_in_for)


def _load(
    task: str, name: str | None, data_dir: str | os.PathLike | None, progress: bool, *, evaluation_only: bool = False
) -> tuple[Corpus, dict]:
    """The description of a corpus, and what all kinds of corpora are made from."""
    corpus, folder = _find(task, name, None if data_dir is None else Path(data_dir).expanduser())
    if folder is not None:
        origin, splits = "directory", read_splits(folder, corpus, evaluation_only=evaluation_only)
        digest = fingerprint(splits)
    elif corpus.source == "package":
        origin = "package"
        digest, splits = _cached(corpus, progress)
    else:
        raise DataError(f"{corpus.name} is not on this machine; {how_to_get(corpus)}")
    common = {"name": corpus.name, "origin": origin, "fingerprint": digest, "licence": corpus.licence,
              "citation": corpus.citation}
    return corpus, common | {split: splits[split] for split in SPLITS}


def _find(task: str, name: str | None, data_dir: Path | None) -> tuple[Corpus, Path | None]:
    """The corpus that is meant, and the folder it is to be read from, if any."""
    if name is None and data_dir is not None:
        return recognise(task, data_dir)
    name = DEFAULTS[task] if name is None else name
    if name not in CORPORA and (found := _own_by_name(task, name, data_dir)):
        return found
    corpus = find_corpus(name, task)
    return corpus, find_folder(corpus, data_dir)


def _own_by_name(task: str, name: str, data_dir: Path | None) -> tuple[Corpus, Path] | None:
    """A corpus of the reader's own that is called so: the folder named, or one in it, or below ``KERNELBOOK_DATA``."""
    if data_dir is not None and data_dir.exists() and own_name(data_dir) == name and (found := own(task, data_dir)):
        return found
    parent = data_root() if data_dir is None else data_dir
    if parent is not None and parent.is_dir():
        for folder in sorted(path for path in parent.iterdir() if path.is_dir() and own_name(path) == name):
            return own(task, folder)
    return None


def _cached(corpus: Corpus, progress: bool) -> tuple[str, dict[str, list[Item]]]:
    """Fingerprint and records of a package corpus, which is fetched unless it lies in the cache."""
    path = entry_path(corpus)
    if not path.is_file():
        fetch(corpus.name, progress=progress)
    manifest, splits = read_entry(path, corpus)
    if not is_current(manifest, corpus):
        fetch(corpus.name, progress=progress)
        manifest, splits = read_entry(path, corpus)
    return manifest["fingerprint"], splits
