"""Carves the feed-forward network of a dense layer into experts, without training.

CMoE (arXiv 2502.04416) with two changes that lowered the perplexity of carved models (see
docs/any_model.md): a neuron counts by its contribution to the layer's output, |h_i| times the norm
of its row of the down projection, and the router can be a linear map that is fitted to
the experts' contributions. All functions take and return plain arrays.

Axis letters: N calibration tokens, F neurons of the dense layer, S shared and E routed experts of
M neurons each, D model width.
"""

import dataclasses
import re

import numpy as np

from checkpoints_convert.common import ConversionError
from roe_jax.lazy_modules import LazyModule

optimize = LazyModule("scipy.optimize")
_TINY = 1e-20  # where a contribution is zero, its logarithm is finite


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a layer is divided, in CMoE's notation: S4A8E16.

  Attributes:
    shared: S, experts that process every token; together they are one shared expert.
    active: A, routed experts per token.
    experts: number of all experts, shared and routed.
  """

  shared: int
  active: int
  experts: int

  @classmethod
  def parse(cls, text: str) -> "Plan":
    """Parses a string like S4A8E16.

    Raises:
      ConversionError: the string or its numbers are invalid.
    """
    match = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", text.strip().upper())
    if not match:
      raise ConversionError(
        f"--carve must be like S4A8E16 (4 shared experts, 8 active routed experts, 16 experts in "
        f"all), got {text!r}"
      )
    shared, active, experts = map(int, match.groups())
    if shared + active < 1 or shared + active > experts:
      raise ConversionError(
        f"--carve={text} needs at least one active expert and no more than {experts} shared and "
        f"active experts together, got {shared} shared and {active} active"
      )
    return cls(shared, active, experts)

  def __str__(self) -> str:
    return f"S{self.shared}A{self.active}E{self.experts}"

  @property
  def routed(self) -> int:
    """Number of routed experts."""
    return self.experts - self.shared

  def width(self, num_neurons: int) -> int:
    """Returns M, the number of neurons per expert.

    Raises:
      ConversionError: the neurons cannot be divided evenly.
    """
    if num_neurons % self.experts:
      raise ConversionError(
        f"{num_neurons} neurons cannot be divided into {self.experts} experts of equal size: "
        f"choose a divisor of {num_neurons} as the number of experts"
      )
    return num_neurons // self.experts


@dataclasses.dataclass(frozen=True)
class Division:
  """Which neuron of a dense layer went where.

  Attributes:
    shared: `[S M]` int, ascending.
    experts: `[E, M]` int, ascending in each expert.
    representatives: `[E]` int, the neuron nearest to each cluster's centroid.
  """

  shared: np.ndarray
  experts: np.ndarray
  representatives: np.ndarray

  @property
  def order(self) -> np.ndarray:
    """All neurons `[F]`: those of the shared expert, then those of each expert."""
    return np.concatenate([self.shared, self.experts.reshape(-1)])

  @property
  def owners(self) -> np.ndarray:
    """The expert of each neuron, int `[F]`; E is the shared expert."""
    owners = np.full(len(self.order), len(self.experts))
    owners[self.experts] = np.arange(len(self.experts))[:, None]
    return owners


def divide(
  contributions_NxF: np.ndarray, plan: Plan, marked: int | None = None, by_rate: bool = False
) -> Division:
  """Divides neurons into a shared expert and balanced clusters of co-active neurons.

  The shared expert has the neurons with the largest mean square contribution. The others are
  clustered by the tokens for which they are among the `marked` most active neurons: the
  clusters start from the most often marked neurons, and equally large clusters are assigned such
  that the total number of tokens in which neurons differ from their cluster's start is minimal.

  Args:
    contributions_NxF: float32, of each neuron on calibration tokens.
    plan: the sizes.
    marked: K_a, the number of neurons that are marked per token; a sixteenth by default.
    by_rate: whether the shared expert has the most often marked neurons instead, as in CMoE.

  Raises:
    ConversionError: the neurons cannot be divided evenly.
    ModuleNotFoundError: scipy is not installed.
  """
  num_neurons = contributions_NxF.shape[1]
  width = plan.width(num_neurons)
  marks = activation_marks(contributions_NxF, marked or max(1, num_neurons // 16))
  power = np.einsum("nf,nf->f", contributions_NxF, contributions_NxF, dtype=np.float64)
  ranked = np.argsort(-marks.sum(axis=0) if by_rate else -power, kind="stable")
  shared, rest = (np.sort(part) for part in np.split(ranked, [plan.shared * width]))
  experts, representatives = balanced_clusters(marks[:, rest], plan.routed)
  return Division(shared, rest[experts], rest[representatives])


def activation_marks(contributions_NxF: np.ndarray, count: int) -> np.ndarray:
  """Marks the `count` neurons with the largest absolute contribution of each token: bool [N, F]."""
  size = np.abs(contributions_NxF)
  last = size.shape[1] - count
  marks = size >= np.partition(size, last, axis=1)[:, last, None]  # 8 times faster than an argsort
  tied = np.flatnonzero(marks.sum(axis=1) != count)
  marks[tied] = False
  marks[tied[:, None], np.argpartition(size[tied], last, axis=1)[:, last:]] = True
  return marks


def balanced_clusters(marks_NxF: np.ndarray, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
  """Clusters the columns of a binary matrix into clusters of one size by exact assignment.

  The clusters start from the most often marked columns. Distances are L1 (Hamming).

  Args:
    marks_NxF: bool; F is a multiple of `num_clusters`.
    num_clusters: E.

  Returns:
    The columns of each cluster, `[E, F/E]` int, ascending, and the column nearest to each
    cluster's mean, `[E]`.
  """
  marks = marks_NxF.astype(np.float32)
  rates = marks.sum(0)
  starts = np.argsort(-rates, kind="stable")[:num_clusters]
  width = marks.shape[1] // num_clusters
  # Hamming distances to columns of bits; integers below 2**24 are exact in float32.
  distances_FxE = rates[:, None] + rates[starts] - 2 * (marks.T @ marks[:, starts])
  # Each cluster is repeated once for each neuron that it takes.
  _, places = optimize.linear_sum_assignment(np.repeat(distances_FxE, width, axis=1))
  clusters = np.argsort(places // width, kind="stable").reshape(num_clusters, width)
  nearest = []
  for columns in clusters:
    own = marks[:, columns]
    mean = own.mean(axis=1, dtype=np.float64)
    # |b - c| of a bit b and a mean c in [0, 1] is c + b (1 - 2 c).
    nearest.append(columns[np.argmin((1 - 2 * mean) @ own)])
  return clusters, np.array(nearest)


def expert_contributions(contributions_NxF: np.ndarray, experts_ExM: np.ndarray) -> np.ndarray:
  """Returns the log norm of each expert's contributions, `[N, E]` float32.

  It is the fitted router's target; choosing the experts by it is the oracle of a carved model.
  """
  square = np.stack([np.square(contributions_NxF[:, e]).sum(axis=1) for e in experts_ExM], axis=1)
  return 0.5 * np.log(square + _TINY)


def fit_linear(
  x_NxD: np.ndarray, targets_NxE: np.ndarray, ridge: float = 1e-2
) -> tuple[np.ndarray, np.ndarray]:
  """Fits a linear map with a bias by ridge regression.

  Args:
    x_NxD: inputs.
    targets_NxE: targets.
    ridge: the penalty on weights, relative to the mean square of the inputs.

  Returns:
    The weights `[E, D]` and the bias `[E]`, float32.
  """
  x, targets = x_NxD.astype(np.float64), targets_NxE.astype(np.float64)
  mean, center = x.mean(axis=0), targets.mean(axis=0)
  x = x - mean
  gram = x.T @ x
  gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / len(gram) + _TINY
  weights = np.linalg.solve(gram, x.T @ (targets - center)).T
  return weights.astype(np.float32), (center - weights @ mean).astype(np.float32)
