"""Linear boundaries between two kinds of noised pictures, and moves across them (BoundaryDiffusion, arXiv 2302.08357)."""

from .boundary import SPACES, Boundary, Part, Space, coordinate, features_of, fit_part, shifted
from .examples import Examples, held_out, in_turn, parse_labels
from .files import load_boundary, save_boundary
from .moves import MOVES, Move, shift_of
from .orthogonal import Direction, orthogonal_directions
from .search import STEPS_TRIED, Tried, best_of, mean_norm
from .solvers import SOLVERS, Line, Solver

__all__ = [
    "MOVES", "SOLVERS", "SPACES", "STEPS_TRIED", "Boundary", "Direction", "Examples", "Line", "Move", "Part", "Solver",
    "Space", "Tried", "best_of", "coordinate", "features_of", "fit_part", "held_out", "in_turn", "load_boundary",
    "mean_norm", "orthogonal_directions", "parse_labels", "save_boundary", "shift_of", "shifted",
]  # fmt: skip
