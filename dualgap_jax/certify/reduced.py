"""The convex problem over the shares of given branches, and its dual vectors.

    min over s >= 0 of (1/n) sum_j l_j(sum_k s_k f_k(x_j)) + penalty sum_k s_k h_k

or without the penalty subject to `sum_k s_k h_k <= K`, with `sum_k s_k = 1` unless shares are free.  Hinge losses make
it a linear program, whose marginals are the dual vectors, at kinks too; the smooth losses are solved by a primal-dual
interior point method (Boyd and Vandenberghe, Convex Optimization, section 11.7), whose dual vectors are the gradients
at the solution.  Neither is trusted: what a bound or a risk is proven from is evaluated anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy

from dualgap_jax.certify.problem import RiskProblem

_STEPS = 100
_FAR = 10  # powers of two from 1
_LARGEST = 1e15  # of a budget, in such units


class Reduced(NamedTuple):
    """A solution: shares `[k]`, dual vectors `[n, out]` and the multiplier of the budget (the penalty without one)."""

    shares: np.ndarray
    alpha: np.ndarray
    multiplier: float


def solve(
    problem: RiskProblem, outputs: np.ndarray, costs: np.ndarray, *, free: bool, bias: np.ndarray | None = None
) -> Reduced:
    """Solves the problem over shares.

    Args:
      problem: the risk.
      outputs: `[k, n, out]`, of the branches.
      costs: `[k]`, their h.
      free: whether shares need not add up to 1.
      bias: `[out]`, an output bias that all branches share and that is held fixed; its square is paid for.
    """
    smooth = problem.conjugate.kind in ("squared", "logistic")
    fixed = np.zeros(problem.shape[1]) if bias is None else bias
    most = 0.0 if problem.budget is None else max(0.0, problem.budget - float(fixed @ fixed))
    # Neither way bears sizes far from 1, such as those that a linear program takes for 0: shares have units.
    sizes = np.abs(outputs).max(axis=(1, 2)) / (problem.loss.tau or 1.0)
    units = np.full(len(sizes), float(_unit(sizes.max()))) if free else np.maximum(_unit(sizes), 1.0)
    outputs, costs, price = outputs / units[:, None, None], costs / units, 1.0
    if problem.budget is not None:
        price = float(_unit(costs.max()))
        costs, most = costs / price, min(most / price, _LARGEST) if most > 1e-200 else 0.0
    found = (_interior if smooth else _linear)(problem, outputs, costs, None if free else 1 / units, fixed, most)
    alpha = problem.conjugate.nearest(found.alpha, problem.y)
    return Reduced(found.shares / units, alpha, found.multiplier / price)


def _unit(sizes: Any) -> np.ndarray:
    """Powers of two near a size, or several, that are far from 1; else 1."""
    powers = np.clip(np.frexp(sizes)[1], -1000, 1000)
    return np.where((sizes > 0) & (np.abs(powers) > _FAR), np.ldexp(1.0, powers), 1.0)


# --- hinges: a linear program -----------------------------------------------------------------------------------------


def _linear(
    problem: RiskProblem, outputs: np.ndarray, costs: np.ndarray, each: np.ndarray | None, fixed: np.ndarray,
    most: float,
) -> Reduced:  # fmt: skip
    k, n, out = outputs.shape
    tau, kind = problem.loss.tau or 1.0, problem.conjugate.kind
    if kind == "hinge":
        rows = -(problem.y[None, :] * outputs[:, :, 0]).T / tau  # -y f / tau - xi <= -1
        which, weight, known = np.arange(n), 1 / n, -problem.y * fixed[0] / tau
    else:
        own = np.take_along_axis(outputs, problem.y[None, :, None].astype(int), axis=2)
        other = np.arange(out)[None, :] != problem.y[:, None]
        rows = ((outputs - own) / tau)[:, other].T  # [n (out - 1), k]
        known = ((fixed[None, :] - fixed[problem.y.astype(int)][:, None]) / tau)[other]
        single = kind == "Crammer-Singer"
        which = np.repeat(np.arange(n), out - 1) if single else np.arange(n * (out - 1))
        weight = 1 / n if single else 1 / (n * out)
    slacks = int(which.max()) + 1
    # Every row has one slack: -xi_which.
    picks = scipy.sparse.csr_array(
        (np.full(len(which), -1.0), (np.arange(len(which)), which)), shape=(len(which), slacks)
    )
    table, right = scipy.sparse.hstack([scipy.sparse.csr_array(rows), picks]).tocsr(), -np.ones(len(which)) - known
    goal = np.concatenate([(problem.penalty or 0.0) * costs, np.full(slacks, weight)])
    if problem.budget is not None:
        spent = np.concatenate([costs, np.zeros(slacks)])
        table = _stacked(table, spent)
        right = np.append(right, most)
    sums = None if each is None else np.concatenate([each, np.zeros(slacks)])[None]
    for method in ("highs", "highs-ipm"):  # the simplex method gives up now and then where the other does not
        answer = scipy.optimize.linprog(
            goal, A_ub=table, b_ub=right, A_eq=sums, b_eq=None if sums is None else np.ones(1), method=method,
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )  # fmt: skip
        if answer.status == 0:
            break
    if answer.status != 0:
        raise ValueError(f"the linear program over {k} branches was not solved: {answer.message}")
    prices = -answer.ineqlin.marginals[: len(which)] * n
    if kind == "hinge":
        alpha = -(prices * problem.y / tau)[:, None]
    else:
        alpha = np.zeros((n, out))
        alpha[other] = prices / tau
        alpha[~other] = -alpha.sum(axis=1)
    lam = problem.penalty if problem.penalty is not None else -float(answer.ineqlin.marginals[-1])
    return Reduced(np.maximum(answer.x[:k], 0.0), alpha, max(0.0, float(lam)))


def _stacked(table: scipy.sparse.csr_array, row: np.ndarray) -> scipy.sparse.csr_array:
    at = np.flatnonzero(row)
    last = scipy.sparse.csr_array((row[at], (np.zeros(len(at), int), at)), shape=(1, len(row)))
    return scipy.sparse.csr_array(scipy.sparse.hstack([table.T, last.T]).T)


# --- smooth losses: an interior point method --------------------------------------------------------------------------


def _curvature(problem: RiskProblem, z: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The Hessian `[k, k]` of the mean loss by the shares."""
    k, n, out = outputs.shape
    if problem.conjugate.kind == "squared":
        flat = outputs.reshape(k, -1)
        return flat @ flat.T / n
    alpha = problem.slope(z)
    if out == 1:
        q = np.abs(alpha[:, 0])
        flat = outputs[:, :, 0] * np.sqrt(q * (1 - q))
        return flat @ flat.T / n
    p = alpha + (np.arange(out)[None, :] == problem.y[:, None])
    flat = (outputs * np.sqrt(np.maximum(p, 0.0))).reshape(k, -1)
    mean = (outputs * p).sum(axis=2)
    return (flat @ flat.T - mean @ mean.T) / n


def _interior(
    problem: RiskProblem, outputs: np.ndarray, costs: np.ndarray, each: np.ndarray | None, fixed: np.ndarray,
    most: float,
) -> Reduced:  # fmt: skip
    k, n, _ = outputs.shape
    budget = int(problem.budget is not None)
    size = k + budget  # the last variable is what is left of the budget
    equalities, right = [], []
    if each is not None:
        equalities.append(np.append(each, np.zeros(budget)))
        right.append(1.0)
    if budget:
        equalities.append(np.append(costs, np.ones(budget)))
        right.append(most)
    e, b = np.array(equalities).reshape(-1, size), np.array(right)
    price = (problem.penalty or 0.0) * costs
    unit = (most or 1.0) / max(1e-300, float(costs.mean()))
    s = np.append(np.full(k, unit / k) if each is None else 1 / (k * each), np.full(budget, max(most, 1e-9)))
    start = problem.slope(np.zeros(problem.shape))
    z = np.full(size, max(1e-12, float(np.abs(price).mean() + np.abs(start).mean() * np.abs(outputs).mean())))
    nu = np.zeros(len(b))
    target = 1e-15 * max(1e-300, float(problem.losses(np.zeros(problem.shape)).mean()))
    for _ in range(_STEPS):
        at = np.tensordot(s[:k], outputs, 1) + fixed
        slope = np.append(outputs.reshape(k, -1) @ problem.slope(at).reshape(-1) / n + price, np.zeros(budget))
        dual, primal = slope - z + e.T @ nu, e @ s - b
        gap = float(s @ z) / size
        if gap < target and np.abs(primal).max(initial=0.0) < 1e-14 * (1 + np.abs(b).max(initial=0.0)):
            break
        mu = 0.1 * gap
        hessian = np.zeros((size, size))
        hessian[:k, :k] = _curvature(problem, at, outputs)
        kkt = np.zeros((size + len(b), size + len(b)))
        kkt[:size, :size] = hessian + np.diag(z / s)
        kkt[:size, size:], kkt[size:, :size] = e.T, e
        answer = np.append(-(dual + z - mu / s), -primal)
        try:
            step = np.linalg.solve(kkt, answer)
        except np.linalg.LinAlgError:
            step = np.linalg.lstsq(kkt, answer, rcond=None)[0]
        ds, dnu = step[:size], step[size:]
        dz = (mu - z * ds) / s - z
        if not np.isfinite(step).all():
            break
        length = min(1.0, *(0.99 / max(0.99, float((-d / v).max())) for v, d in ((s, ds), (z, dz))))
        s, z, nu = s + length * ds, z + length * dz, nu + length * dnu
    alpha = problem.slope(np.tensordot(s[:k], outputs, 1) + fixed)
    lam = problem.penalty if problem.penalty is not None else max(0.0, float(nu[-1]))
    return Reduced(s[:k], alpha, lam)
