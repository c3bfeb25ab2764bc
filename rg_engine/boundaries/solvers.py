"""Lines between two classes: each solver is a function of features (N, D) and labels (N,), True for the class that the
normal points to. A new one is a function and a line in SOLVERS."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("readout_guidance")
C = 1.0  # the paper's code leaves scikit-learn's default
TOLERANCE = 1e-8
MOST_UPDATES = 300_000
SHRINKAGE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """decision(x) = <x, coef> + intercept, above 0 for the class True. coef (D,) in float64."""

    coef: Tensor
    intercept: float

    def decide(self, features: Tensor) -> Tensor:
        return features.double() @ self.coef + self.intercept

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The share of features (N, D) that lie on their label's side."""
        return float(((self.decide(features) > 0) == labels).double().mean())


def linear_svm(features: Tensor, labels: Tensor) -> Line:
    """The soft-margin support vector machine that the paper fits (C = 1, features as they are).

    Solved in its dual by sequential minimal optimization, two multipliers at a time, chosen by second-order information
    (Fan, Chen and Lin, JMLR 2005, working set selection 2).
    """
    x = features.double()
    kernel, y = (x @ x.T).numpy(), np.where(labels.numpy(), 1.0, -1.0)
    diagonal = kernel.diagonal()
    alpha = np.zeros(len(y))
    slope = y.copy()  # -y times the dual's gradient
    violation = np.inf
    for _ in range(MOST_UPDATES):
        up = np.where(y > 0, alpha < C, alpha > 0)
        low = np.where(y > 0, alpha > 0, alpha < C)
        i = int(np.where(up, slope, -np.inf).argmax())
        gain = slope[i] - slope
        violation = float(np.where(low, gain, -np.inf).max())
        if violation < TOLERANCE:
            break
        curve = np.maximum(diagonal[i] + diagonal - 2 * kernel[i], 1e-12)
        j = int(np.where(low & (gain > 0), gain**2 / curve, -np.inf).argmax())
        room_i = C - alpha[i] if y[i] > 0 else alpha[i]
        room_j = alpha[j] if y[j] > 0 else C - alpha[j]
        step = min(gain[j] / curve[j], room_i, room_j)
        for k, room, signed in ((i, room_i, y[i] * step), (j, room_j, -y[j] * step)):
            alpha[k] = (C if signed > 0 else 0.0) if step == room else alpha[k] + signed
        slope -= step * (kernel[i] - kernel[j])
    else:
        log.warning("Boundary: the support vector machine stopped %.2g short of its optimum.", violation)
    free = (alpha > 0) & (alpha < C)
    up = np.where(y > 0, alpha < C, alpha > 0)
    low = np.where(y > 0, alpha > 0, alpha < C)
    intercept = slope[free].mean() if free.any() else (slope[up].max() + slope[low].min()) / 2
    return Line(x.T @ torch.from_numpy(alpha * y), float(intercept))


def mean_difference(features: Tensor, labels: Tensor) -> Line:
    """From one class's mean to the other's; the line is half way."""
    return _half_way(features, labels, _means_apart(features, labels))


def fisher(features: Tensor, labels: Tensor) -> Line:
    """Fisher's discriminant: the means' difference in units of the scatter within the classes, S^-1 (m1 - m0), with S
    shrunk a tenth of the way to a multiple of the identity. Solved among the N pictures, not the D numbers (Woodbury)."""
    x, apart = features.double(), _means_apart(features, labels)
    centred = torch.cat([x[labels] - x[labels].mean(0), x[~labels] - x[~labels].mean(0)])
    count, width = centred.shape
    ridge = SHRINKAGE * float(centred.square().sum()) / (count * width) + 1e-12
    scatter = (1 - SHRINKAGE) / count
    inner = torch.linalg.solve(torch.eye(count).double() * ridge / scatter + centred @ centred.T, centred @ apart)
    return _half_way(features, labels, (apart - centred.T @ inner) / ridge)


def _means_apart(features: Tensor, labels: Tensor) -> Tensor:
    x = features.double()
    return x[labels].mean(0) - x[~labels].mean(0)


def _half_way(features: Tensor, labels: Tensor, coef: Tensor) -> Line:
    x = features.double()
    return Line(coef, -float((x[labels].mean(0) + x[~labels].mean(0)) @ coef) / 2)


Solver = Callable[[Tensor, Tensor], Line]
SOLVERS: dict[str, Solver] = {"svm": linear_svm, "mean difference": mean_difference, "fisher": fisher}


def cross_validated(features: Tensor, labels: Tensor, solver: Solver, folds: int = 5) -> float:
    """Accuracy on pictures left out, a fold at a time; classes are dealt out evenly. NaN with fewer than two of one."""
    fold = torch.zeros(len(labels), dtype=torch.long)
    for value in (True, False):
        rows = labels == value
        fold[rows] = torch.arange(int(rows.sum())) % folds
    if min(int(labels.sum()), int((~labels).sum())) < 2:
        return float("nan")
    right = 0
    for number in range(folds):
        out = fold == number
        if bool(out.any()):
            line = solver(features[~out], labels[~out])
            right += int(((line.decide(features[out]) > 0) == labels[out]).sum())
    return right / len(labels)
