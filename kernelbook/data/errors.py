"""The one exception of this package: whatever is wrong with data, the message says how to mend it."""


class DataError(RuntimeError):
    """A file or a download is missing, damaged, or not what was expected.

    The message names the file, says what was expected there, and ends with the command that mends it.
    """
