"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["FileError", "write_whole", "save_tensors", "load_tensors"]


class FileError(RuntimeError):
    """A file could not be written or read; the message says which, why, and what to do."""


def write_whole(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file under a temporary name in its folder, then rename it.

    Whatever happens, ``path`` afterwards holds either all of ``content`` or what it held before.

    Parameters
    ----------
    path : path
        Its folder is made if need be.
    content : bytes or str
        Text is written as UTF-8.

    Returns
    -------
    Path

    Raises
    ------
    FileError
        If it cannot be written, as when the disk is full or the folder is read-only.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())      # mkstemp's files are private
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        kept = "; the file that was there is unharmed" if path.exists() else ""
        raise FileError(f"{path} ({len(content):,} bytes) was not written: {error.strerror or error}{kept}. "
                        "Free some space or choose another place, and try again") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Write tensors and a dictionary of plain values as one safetensors file, whole or not at all.

    Parameters
    ----------
    path : path
        Where to.
    tensors : dict of str to Tensor
        Stored as they are, from the CPU.
    metadata : dict
        Anything JSON can hold.

    Returns
    -------
    Path

    Raises
    ------
    FileError
        As :func:`write_whole` does.
    """
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # One key, because safetensors stores several in no certain order: equal content makes equal bytes.
    return write_whole(path, save(plain, metadata={"kernelbook": json.dumps(metadata)}))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    tensors : dict of str to Tensor
    metadata : dict

    Raises
    ------
    FileError
        If it is missing, truncated, or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("kernelbook", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except FileNotFoundError:
        raise FileError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a safetensors file written by kernelbook ({error}); "
                        "it is damaged, cut short, or something else: make it anew") from error
