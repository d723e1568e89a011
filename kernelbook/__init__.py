"""kernelbook: attention as a binary kernel machine, as a library and as a textbook you can run."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kernelbook")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
