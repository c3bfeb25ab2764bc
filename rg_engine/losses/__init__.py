"""Losses of a readout: pure functions of tensors, one a file, one number a picture."""

from .appearance import appearance_loss
from .correspondence import correspondence_loss
from .identity import identity_loss
from .matching import matching_loss
from .sketch import sketch_loss
from .spatial import spatial_loss

__all__ = ["appearance_loss", "correspondence_loss", "identity_loss", "matching_loss", "sketch_loss", "spatial_loss"]
