"""The named errors. A message says what was given, what was expected, and the way out."""


class ReadoutGuidanceError(ValueError):
    """What this extension raises on bad input; everything below is one."""


class HeadFileError(ReadoutGuidanceError):
    """A head's file is missing, damaged, unsafe, or not a readout head."""


class BackboneError(ReadoutGuidanceError):
    """The model can't be tapped, or a head was trained on another kind of model."""


class TargetError(ReadoutGuidanceError):
    """A target that can't be compared with a readout: something missing, malformed or out of range."""


class TrainingError(ReadoutGuidanceError):
    """A head can't be trained: its examples, its settings, its checkpoint, or a loss that is not finite."""


class OptimizationError(ReadoutGuidanceError):
    """A latent can't be optimized: a loss or its file, a sampler without gradients, settings out of range."""


class BoundaryError(ReadoutGuidanceError):
    """A boundary can't be fitted, read or applied: its pictures, its file, or a model that it was not fitted on."""


class AdapterError(ReadoutGuidanceError):
    """An orthogonal adapter that can't be read, applied, trained, extracted or written without changing its meaning."""


class ModelWorldError(ReadoutGuidanceError):
    """The embedded demo model's files are missing or damaged."""
