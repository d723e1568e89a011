"""kernelbook: attention as a binary kernel machine, as a library and as a textbook you can run.

``import kernelbook`` brings :mod:`~kernelbook.kernels` and :mod:`~kernelbook.attention` and loads torch and little
else; the other modules (``data``, ``models``, ``training``, ``plotting``, ...) load what they need when they are
imported.
"""

from importlib.metadata import PackageNotFoundError, version

from . import attention, kernels
from .attention import KernelAttention, attend, explain
from .debugging import debug

try:
    __version__ = version("kernelbook")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["attention", "kernels", "attend", "explain", "KernelAttention", "debug", "__version__"]
