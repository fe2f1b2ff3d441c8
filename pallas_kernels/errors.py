"""What the operations of this library raise."""


class UnsupportedError(ValueError):
    """The backend asked for by name does not exist, is not available here, or does not support the case."""
