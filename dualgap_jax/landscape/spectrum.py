"""Curvature at a trained network: extreme eigenvalues, trace and spectral density of the Hessian of its mean loss.

The Hessian is never formed.  Products with vectors (Pearlmutter, 1994; reverse over reverse differentiation, so that
what no vector changes is computed once and kept where it fits in memory) feed the Lanczos algorithm with full
reorthogonalisation; its Ritz values approach the ends of the spectrum, and with the squared first components of the
eigenvectors of the tridiagonal matrix they are Gauss quadrature for the density and the trace (stochastic Lanczos
quadrature; Ubaru, Chen and Saad, 2017; Ghorbani, Krishnan and Xiao, 2019).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import humanize
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from dualgap_jax import seeds, trees
from dualgap_jax.data import Dataset, as_dataset, standardise
from dualgap_jax.evaluation import check_fits, check_inputs, check_outputs
from dualgap_jax.landscape.lanczos import Tridiagonal, lanczos
from dualgap_jax.losses import Loss, as_loss, marked
from dualgap_jax.machine import memory_available
from dualgap_jax.networks import check_network, upcast
from dualgap_jax.networks.sources import blocks, check_source
from dualgap_jax.sizes import positive, switch
from dualgap_jax.terminal import COMPILING, Progress
from dualgap_jax.types import BranchSource, Network, PyTree


class Spectrum(NamedTuple):
    """The spectrum of a Hessian, or with `G = I` those of its diagonal blocks, one a branch; else `G = 1`.

    All of it is estimated, none certified.

    Attributes:
      largest: `[G, k]` the algebraically largest eigenvalues, largest first.
      smallest: `[G, k]` the smallest, smallest first; negative where the loss curves downwards.
      largest_errors, smallest_errors: `[G, k]`: rounding aside, some eigenvalue lies within this of each.
      trace: `[G]` Hutchinson's estimate of the trace.
      trace_error: `[G]` its standard error, from an upper estimate of the variance, which one probe gives too.
      nodes, weights: `[G, probes, steps]` the quadrature: each probe's weights sum to 1.
      size: number of parameters, of a branch where there are blocks.
      examples: how many examples the loss feels (a first or second derivative is not 0), and of how many.
      converged: whether the first probe's eigenvalues reached the tolerance.
    """

    largest: Float[np.ndarray, "g k"]
    smallest: Float[np.ndarray, "g k"]
    largest_errors: Float[np.ndarray, "g k"]
    smallest_errors: Float[np.ndarray, "g k"]
    trace: Float[np.ndarray, " g"]
    trace_error: Float[np.ndarray, " g"]
    nodes: Float[np.ndarray, "g probes steps"]
    weights: Float[np.ndarray, "g probes steps"]
    size: int
    examples: tuple[int, int]
    converged: bool

    def density(self, at: Float[np.ndarray, " points"], width: float) -> Float[np.ndarray, "g points"]:
        """The spectral density, of integral 1, each node widened to a Gaussian of standard deviation `width`.

        Raises:
          ValueError: unless width is positive.
        """
        if not width > 0:
            raise ValueError(f"width={width} must be positive.")
        away = (np.asarray(at, np.float64)[:, None, None, None] - self.nodes) / width
        bells = np.exp(-0.5 * away**2) / (width * math.sqrt(2 * math.pi))
        return np.moveaxis((bells * self.weights).sum(-1).mean(-1), 0, -1)


def hessian(
    net: Network,
    loss: Any,
    dataset: Any,
    network: BranchSource,
    *,
    k: int = 5,
    probes: int = 1,
    steps: int = 100,
    tolerance: float = 1e-2,
    per_branch: bool = False,
    batch_size: int = 512,
    seed: int = 0,
) -> Spectrum:
    """Extreme eigenvalues, trace and spectral density of the Hessian of the mean loss at a trained network.

    The loss is differentiated where it is smooth: a ReLU and a hinge have kinks, on whose measure of second derivatives
    automatic differentiation says nothing, so that their Hessian is what bends between the kinks.  Examples that the
    loss does not feel (beyond the margin of a hinge) are found by one pass and left out, which changes nothing.

    Args:
      net: the network, in evaluation mode, its state held.
      loss: a `losses.Loss`, or a function of outputs and labels.
      dataset: a `data.Dataset`, or a pair of arrays; taken a batch at a time.
      network: the trained network; from disk it is brought into memory.
      k: how many eigenvalues at each end, at most the number of parameters.
      probes: random vectors (Rademacher); the eigenvalues are those that the first one finds.
      steps: products with a vector at most, but k and 2 of them are taken; one probe's take `4 x parameters x steps`
        bytes.
      tolerance: the first probe ends when all 2 k errors are below this share of the largest |eigenvalue|.
      per_branch: the diagonal blocks of the branches instead, of a network of `multi_branch`, all at once.
      batch_size: examples at a time.
      seed: of the probes.

    Raises:
      ConfigError: if the loss or the network does not fit the data set.
      ValueError: for a number out of its range, blocks of a network that is no sum of branches, a network whose loss is
        not finite, parameters that are complex, or more memory than there is.
      TypeError: for what is no network or handle.
    """
    net, loss, dataset = check_network(net, "landscape.hessian").computed(), as_loss(loss), as_dataset(dataset)
    check_source(net, network)
    check_fits(loss, dataset)
    k, probes, steps = positive(k, "k"), positive(probes, "probes"), positive(steps, "steps")
    batch_size, per_branch = positive(batch_size, "batch_size"), switch(per_branch, "per_branch")
    if not isinstance(tolerance, int | float | np.number) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must lie in [0, 1).")
    if per_branch and net.stacked is None:
        raise ValueError("per_branch needs a network of multi_branch; this one is no sum of branches.")
    params, state = (upcast(tree) for tree in network.read(0, network.num_branches))
    check_inputs(net, params, state, dataset)
    products = _Products(net, loss, dataset, params, state, per_branch, batch_size)
    groups, size = products.shape
    if k > size:
        raise ValueError(f"k={k} exceeds the {size} parameters{' of a branch' * per_branch}; take fewer.")
    steps = min(max(steps, k, 2), size)
    needed, free = probes * groups * size * steps * products.flat.dtype.itemsize, memory_available()
    if needed > free:
        raise ValueError(
            f"{probes} probe(s) of {steps} steps take {humanize.naturalsize(needed)}, available are"
            f" {humanize.naturalsize(max(free, 0))}; take fewer steps or probes."
        )
    products.room = (free - needed) // 2
    signs = seeds.generator(seed).integers(0, 2, (probes, groups, size)) * 2 - 1
    with Progress(steps, "hessian", at_most=True, first=COMPILING) as progress:

        def done(found: Tridiagonal) -> bool:
            progress.update(found.steps)
            return found.steps >= k and _converged(found, k, tolerance)

        found = lanczos(products, signs.astype(products.flat.dtype), steps, done)
    return _spectrum(found, k, size, tolerance, (products.active, len(dataset.y)))


def _ends(found: Tridiagonal, k: int) -> np.ndarray:
    """The places of the k Ritz values at the upper end, largest first, and of those at the lower end, `[2 k]`."""
    places = np.arange(found.steps)
    return np.concatenate([places[::-1][:k], places[:k]])


def _converged(found: Tridiagonal, k: int, tolerance: float) -> bool:
    errors = found.errors[0][:, _ends(found, k)].max(-1)
    return bool((errors <= tolerance * np.abs(found.values[0]).max(-1)).all())


def _spectrum(found: Tridiagonal, k: int, size: int, tolerance: float, examples: tuple[int, int]) -> Spectrum:
    ends = _ends(found, k)
    values, errors = found.values[0][:, ends], found.errors[0][:, ends]
    nodes, weights = (np.moveaxis(a, 0, 1) for a in (found.values, found.weights))
    # v' H v and |H v|^2 of each probe, by quadrature of two steps or more; the variance of v' H v is at most 2 |H|_F^2.
    power = int(np.frexp(np.abs(nodes).max())[1])  # of two, so that squares stay in range
    first, second = (size * (np.ldexp(nodes, -power) ** p * weights).sum(-1) for p in (1, 2))
    return Spectrum(
        values[:, :k],
        values[:, k:],
        errors[:, :k],
        errors[:, k:],
        np.ldexp(first.mean(1), power),
        np.ldexp(np.sqrt(2 * second.mean(1) / first.shape[1]), power),
        nodes,
        weights,
        size,
        examples,
        _converged(found, k, tolerance),
    )


class _Products:
    """Products of the Hessian with vectors `[probes, G, size]`, over batches of the examples that the loss feels.

    Attributes:
      flat: `[I, numbers of a branch]` the floating parameters; `[1, numbers]` of a network that is no sum of branches.
      shape: `(G, size)`.
      room: bytes that may still be taken by what is kept of batches from one product to the next.
    """

    room = 0

    def __init__(
        self,
        net: Network,
        loss: Loss,
        dataset: Dataset,
        params: PyTree,
        state: PyTree,
        per_branch: bool,
        batch_size: int,
    ) -> None:
        leaves, structure = jax.tree.flatten(params)
        floats = [trees.is_float(leaf) for leaf in leaves]
        if any(jnp.iscomplexobj(leaf) for leaf in leaves):
            raise ValueError("the Hessian of a network with complex parameters is not defined here.")
        rows = net.stacked.num_branches if net.stacked is not None else 1
        moving = [jnp.asarray(leaf) for leaf, is_float in zip(leaves, floats, strict=True) if is_float]
        self.flat = jnp.concatenate([leaf.reshape(rows, -1) for leaf in moving], axis=1)
        self.shape = self.flat.shape if per_branch else (1, self.flat.size)
        cuts = np.cumsum([leaf.size // rows for leaf in moving])[:-1]
        still = [leaf for leaf, is_float in zip(leaves, floats, strict=True) if not is_float]

        def unflatten(flat: Array, still: list[Array]) -> PyTree:
            parts, others = iter(jnp.split(flat, cuts, axis=1)), iter(still)
            shaped = [next(parts).reshape(a.shape) if f else next(others) for a, f in zip(leaves, floats, strict=True)]
            return jax.tree.unflatten(structure, shaped)

        def summed(losses: Array, real: Array) -> Array:
            return jnp.sum(jnp.where(real, losses, 0))

        def risk(flat: Array, rest: tuple[list[Array], PyTree], x: Array, y: Array, real: Array) -> Array:
            params, state = unflatten(flat, rest[0]), rest[1]
            if not per_branch or net.stacked is None:
                return summed(loss.per_example(net.apply(params, state, x)[0], y), real)
            branch, _, scale = net.stacked[:3]
            each = jax.vmap(lambda p, s: branch.apply(p, s, x)[0])(params, state)
            held = jax.lax.stop_gradient(each)  # branch i moves alone: the Hessian of this sum is block diagonal
            moved = scale * (held.sum(0)[None] + each - held)
            return jnp.sum(jax.vmap(lambda outputs: summed(loss.per_example(outputs, y), real))(moved))

        @jax.jit
        def feels(flat: Array, rest: Any, x: Array, y: Array) -> tuple[Array, Array]:
            def one(output: Array, label: Array) -> Array:
                return loss.per_example(output[None], label[None])[0]

            def nonzero(derivatives: Array) -> Array:
                return (derivatives != 0).reshape(len(y), -1).any(1)

            outputs = net.apply(unflatten(flat, rest[0]), rest[1], x)[0]
            slopes, back = jax.vjp(lambda outputs: jax.vmap(jax.grad(one))(outputs, y), outputs)
            units = jnp.arange(slopes[0].size).reshape(slopes.shape[1:])

            def bends(unit: Array, felt: Array) -> Array:  # one output after another: all are [batch, out, out]
                return felt | nonzero(back(jnp.broadcast_to(units == unit, slopes.shape).astype(slopes.dtype))[0])

            felt = jax.lax.fori_loop(0, units.size, bends, nonzero(slopes))
            return felt, jnp.isfinite(marked(loss.per_example(outputs, y), outputs))

        @jax.jit
        def linearise(flat: Array, rest: Any, x: Array, y: Array, real: Array) -> Callable[[Array], tuple[Array]]:
            return jax.vjp(jax.grad(lambda w: risk(w, rest, x, y, real)), flat)[1]

        @jax.jit
        def add(total: Array, vectors: Array, product: Callable[[Array], tuple[Array]]) -> Array:
            return total + jax.vmap(lambda vector: product(vector)[0])(vectors)

        self._rest, self._feels, self._linearise, self._add = (still, state), feels, linearise, add
        self._kept: dict[int, Callable[[Array], tuple[Array]]] = {}
        self._dataset, self._batch = dataset, batch_size
        x = self._examples(np.arange(1))[0]
        check_outputs(jax.eval_shape(lambda p, s, x: net.apply(p, s, x)[0], params, state, x), loss, dataset)

    @functools.cached_property
    def _felt(self) -> np.ndarray:
        """The examples that the loss feels, found by one pass when they are first asked for.

        Raises ValueError where a loss is not finite: its derivatives may be 0, and it would be left out.
        """
        portions = blocks(len(self._dataset.y), self._batch)
        with jax.default_matmul_precision("highest"):
            parts = [
                self._feels(self.flat, self._rest, *self._examples(np.arange(first, first + count)))
                for first, count in portions
            ]
        felt, finite = (np.concatenate([np.asarray(part[k]) for part in parts]) for k in range(2))
        if not finite.all():
            raise ValueError(
                f"the loss of {np.count_nonzero(~finite)} of {len(finite)} examples is not finite, so that the mean has"
                " no Hessian (a diverged run?)."
            )
        return np.flatnonzero(felt)

    @property
    def active(self) -> int:
        """How many they are."""
        return len(self._felt)

    def _examples(self, which: np.ndarray) -> tuple[Array, Array]:
        data = self._dataset
        return standardise(data.x[which], data.mean, data.std), jnp.asarray(data.y[which])

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """The products, `[probes, G, size]`.  Raises ValueError where one is not finite."""
        given = jnp.asarray(vectors).reshape(len(vectors), *self.flat.shape)
        total = jnp.zeros_like(given)
        with jax.default_matmul_precision("highest"):
            for first in range(0, self.active, self._batch):
                total = self._add(total, given, self._product(first))
                if first not in self._kept:
                    total.block_until_ready()  # else many batches are in memory at once
        result = np.asarray(total / len(self._dataset.y)).reshape(vectors.shape)
        if not np.isfinite(result).all():
            raise ValueError(
                "the Hessian is not finite, for the network's parameters or outputs are not (a diverged run?)."
            )
        return result

    def _product(self, first: int) -> Callable[[Array], tuple[Array]]:
        """The product of the Hessian of some examples' loss with a vector, a linear function of it."""
        if first in self._kept:
            return self._kept[first]
        which = self._felt[first : first + self._batch]
        count = len(which)
        if self.active > self._batch:  # one program for all: the last batch is filled up
            which = np.resize(which, self._batch)
        real = jnp.asarray(np.arange(len(which)) < count)
        product = self._linearise(self.flat, self._rest, *self._examples(which), real)
        size = trees.num_bytes(product)
        if size <= self.room:
            self._kept[first] = product
            self.room -= size
        return product
