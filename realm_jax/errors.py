"""Every error Realm raises on purpose. Each message says what was wrong, where, and what would be accepted."""


class RealmError(Exception):
    """Base of all errors a user can mend. The command line prints it as one line and exits with 2."""


class GGUFError(RealmError):
    """A file is not a valid GGUF file, is damaged, or is unsafe to load."""


class UnsupportedModelError(RealmError):
    """A valid file holds an architecture, tensor, type or metadata value that Realm does not implement."""


class CheckpointError(RealmError):
    """A checkpoint is damaged, cut short or written by a newer version, or one cannot be written."""


class TokenizerError(RealmError):
    """A vocabulary is inconsistent or of a kind Realm does not implement."""


class ChatTemplateError(RealmError):
    """A chat template is missing, malformed, unsafe, too slow or too large."""


class ModelNotFoundError(RealmError):
    """No model of that name: not a file, not in the registry, not on the hub."""


class DownloadError(RealmError):
    """A download failed or its content does not match its size or checksum."""


class AdapterError(RealmError):
    """A LoRA adapter is damaged, unknown, or made for another model."""


class InvalidRequestError(RealmError, ValueError):
    """A request's parameter, prompt or token ids are not acceptable."""


class CapacityError(RealmError):
    """A request does not fit the memory, context or queue it was sent to."""


class QuotaError(CapacityError):
    """A tenant is over its quota; the message says when, or for what, it may ask again."""


class BackendError(RealmError):
    """The requested kernel backend is not available here or does not support the case."""


class MissingPackageError(RealmError, ImportError):
    """A package that only an extra of Realm installs is needed, and is not there."""


class ClusterError(RealmError):
    """The processes of a job were not started as one, differ, or do not reach each other."""
