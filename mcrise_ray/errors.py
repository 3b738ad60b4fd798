"""Every error that this package raises on purpose, so that a caller can tell bad input from a bug.

Each message says what was expected, what was found, where, and which knob to turn, on one line.
All of them survive pickling, because actors raise them on other machines.
"""


class MCRiseError(Exception):
    """Base of all errors raised on purpose by `mcrise_ray`; `str()` is one line fit for a user."""


class SpecError(MCRiseError):
    """A setting is out of range, misspelt, or contradicts another one."""


class ModelError(MCRiseError):
    """A model cannot be built, loaded or called; no image of the job can be explained with it."""


class ScoreError(MCRiseError):
    """The black box returned something other than finite scores of the expected shape."""


class TargetError(MCRiseError):
    """A target (class index or name) does not exist in the model's output."""


class ImageError(MCRiseError):
    """One image cannot be listed, read or decoded; other images are not affected."""


class StoreError(MCRiseError):
    """Results cannot be written to, or read from, the output location."""


class DeviceError(MCRiseError):
    """The device under a model has failed; whatever ran on it has to start anew elsewhere."""


class ServerError(ModelError, DeviceError):
    """The server of a model does not answer: like a device that failed, for no fault of an image."""


class ClusterError(MCRiseError):
    """Ray cannot be reached, or cannot give the job what it asks for."""
