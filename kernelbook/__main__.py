"""``python -m kernelbook`` is the command ``kernelbook``."""

from .cli import main

main()
