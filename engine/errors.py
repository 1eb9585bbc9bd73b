# SPDX-License-Identifier: Apache-2.0
"""Named exceptions. Every message says what is wrong and what to do about it."""


class VirstError(Exception):
    """Base of everything that this package raises on purpose."""


class BadFrame(VirstError):
    """An image that cannot be used: zero size, wrong dtype or channels. The frame is skipped, goals stay."""


class BadGoal(VirstError):
    """A goal that cannot be set: empty, too long, no word of it known, too many goals. Nothing changes."""


class UnknownGoal(VirstError):
    """A goal id that is not set. Nothing changes."""


class Unanswered(VirstError):
    """A question that gets no answer: no frame, no reasoner, none in time, too many at once, or it cannot be read."""


class WeightsError(VirstError):
    """Weights that are missing, damaged or made for another model."""


class CheckpointError(WeightsError):
    """A published checkpoint (SAM 2.1) that is missing, damaged, unsafe or of another model or size."""


class WireError(VirstError):
    """A message that breaks the reasoner's wire protocol. It is dropped."""


class EndpointError(VirstError):
    """A reasoner address that cannot be used: malformed, taken, without permission, tcp without keys."""


class SceneError(VirstError):
    """A simulated scene or recording that cannot be made, found or read."""


class BackendError(VirstError):
    """A backend that cannot run the model here: package, device, precision or stages are missing or do not fit."""


class ExportError(VirstError):
    """Exported stages that differ from the model, or cannot be written or read."""


class EngineMismatch(BackendError):
    """A compiled engine that is stale, or was built for another GPU, model or version. It is not used."""


class BadPrompt(VirstError):
    """A box, point or mask that cannot be used: outside the image, for a frame that is gone, no free object."""


class VideoError(VirstError):
    """A video, folder of images or bag that cannot be read, or results of one that cannot be written."""
