"""One exception type per kind of user mistake. The message says what is wrong, where, and what would be right."""


class GatecastError(Exception):
    """Base of every error a user can cause; experiments print it as one line, without a traceback."""


class CheckpointError(GatecastError):
    """A checkpoint is missing a file or tensor, or a tensor has the wrong shape or dtype."""


class UnsupportedModelError(GatecastError):
    """The architecture is not one whose experts can be offloaded."""


class PackError(GatecastError):
    """A packed expert file is truncated, damaged or could not be written."""


class CapacityError(GatecastError):
    """The fast tier is too small for the request, or a capacity does not parse."""


class TransferError(GatecastError):
    """An expert's bytes could not be brought into a slot."""


class BuildError(GatecastError):
    """Native code could not be compiled."""


class RoutingError(GatecastError):
    """The router handed over something that cannot be executed (NaN weights, expert out of range)."""


class TraceError(GatecastError):
    """A routing trace is damaged or was recorded for another model or workload."""


class PredictorError(GatecastError):
    """A predictor's weights are damaged or were trained for another model; or it cannot be trained on the data given."""


class RecordingError(GatecastError):
    """Recorded states are missing, damaged, or of another model."""


class ConfigError(GatecastError):
    """An option is unknown, of the wrong type, or impossible in combination with another."""


class TokenMismatchError(GatecastError):
    """Arms that must be lossless generated different tokens or logits."""


class ResultsError(GatecastError):
    """A result folder is missing, damaged, or was not written by an experiment of this project."""


class KernelInputError(GatecastError):
    """A kernel's launcher was given tensors or sizes it cannot run on, or the machine or its Triton cannot run it."""
