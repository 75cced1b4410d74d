"""Sabotages the certified paths, one line at a time, and sees whether a test notices.

    python tests/mutations.py --out mutations.json

Each mutation is made in a temporary copy of the package, the tests that should see it are run there, and must fail.
First they must pass on the copy as it is.  Ends with status 1 if a sabotage went unnoticed.
"""

# ruff: noqa: E501 (lines of the package are quoted whole)

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

GAP = "tests/test_gap.py"
CHECKER = "tests/test_verdicts.py -k checker"
VERDICTS = "tests/test_verdicts.py -k not(one_call|sup_d|record|diverged|linear_branches|tiny_tau|checker)"
RESIDUES = "tests/test_mixed.py -k residues"
TERMS = "tests/test_verify.py -k corner_of_the_cells"
CORNER = "tests/test_verify.py -k cones"
MARGINS = "tests/test_verdicts.py -k opposite_outputs"
CHOICES = "tests/test_adversary.py -k choices"
CLOSED = "tests/test_adversary.py -k homogeneous"
DELTAS = "tests/test_adversary.py -k deltas"
BOXES = "tests/test_adversary.py -k boxes"
BOX = "tests/test_branch_and_bound.py -k bounds_of_boxes&tanh"
TREE = "tests/test_branch_and_bound.py -k below_all_weights&tanh&2.0"
TREE_CHECK = "tests/test_branch_and_bound.py -k tampered|gone_through_again|covers_the_set"
FORMS = "tests/test_verify.py -k cones&1.0|one_line"
EXPONENT = "tests/test_verify.py -k rounding_of_an_exponent"
WEIGHTED = "tests/test_certify_weighted.py -k best|prove_more"
UNIT = "tests/test_certify_closed.py -k sphere"
LESS = "tests/test_certify_closed.py -k refuses_less"
SIDES = "tests/test_certify_closed.py -k exact_products"
RATIONAL = "tests/test_certify_closed.py -k own_rounding"
LINEAR = "tests/test_spectral_verify.py -k what_is_proven|dependencies"
FIT = "tests/test_spectral_verify.py -k bad_fit"
EXACT = "tests/test_spectral_certificate.py -k charged_and|low_rank"


OWN = "tests/test_constrained.py -k shifted"
SETS = "tests/test_constrained.py -k membership"
MULTIPLIER = "tests/test_duality.py -k follows_from_its_own_multiplier"
ROOM = "tests/test_clipped.py -k leave_room"
UNDEFINED = "tests/test_numpy_ranges.py -k undefined"
ARRAYS = "tests/test_numpy_ranges.py -k middle|grouped|either"
POINTS = "tests/test_numpy_ranges.py -k true_value_at_every_point&(atan|asinh)"
ROUNDED = "tests/test_numpy_ranges.py -k rounded"


GIVEN = "tests/test_moments.py -k whatever_multipliers|for_nothing"
CANCEL = "tests/test_moments.py -k cancel"
CLAIMS = "tests/test_moments.py -k too_low|several|other_multipliers|large"
KINDS = "tests/test_certify_kinds.py -k program_over|does_not_follow|lies_below"
NEGATIVE = "tests/test_certify.py -k kappa_that_is"
AGAIN = "tests/test_certify.py -k does_not_prove_is_estimated"
OVERFLOW = "tests/test_certify.py -k sizes_out_of_range"
COUNTS = "tests/test_clipped.py -k another_number_of_branches"
MISSING = "tests/test_intervals.py -k missing"
MISSING_TOO = "tests/test_numpy_ranges.py -k missing"
ONE_FOR_ALL = "tests/test_numpy_ranges.py -k all]"
NO_RULE = "tests/test_numpy_ranges.py -k without_a_rule"
JOINT = "tests/test_moments_joint.py -k false_lower|below_every"
DIGITS = "tests/test_terminal.py -k digits_of_a_bound"
TEXT = "tests/test_certify.py -k claims_no_more"
SENTENCE = "tests/test_certify_run.py -k sentence_claims"
TABLE = "tests/test_experiments.py -k bounds_are_rounded"


class Mutation(NamedTuple):
    """What is done to a file of the package, and which tests should see it."""

    kind: str
    file: str
    old: str
    new: str
    tests: str


def _of(folder: str, file: str, kind: str, old: str, new: str, tests: str) -> Mutation:
    return Mutation(kind, f"{folder}/{file}.py", old, new, tests)


MUTATIONS = [
    # Value functions in closed form.
    _of("duality", "closed_forms", "the wrong end of an interval", "lower=offset - kappa.upper * shape", "lower=offset - kappa.lower * shape", CLOSED),
    _of("duality", "closed_forms", "the wrong end of an interval", "upper=offset - kappa.lower", "upper=offset - kappa.upper", CLOSED),
    _of("duality", "closed_forms", "a missing allowance", "(1 + exponent * (1 + abs(math.log(most))))", "(1 + exponent)", EXPONENT),
    _of("duality", "closed_forms", "a missing allowance", "inside = 1 - 2 * BUDGET_SLACK - 2 * _EPS * abs(math.log(radius))", "inside = 1 - 2 * BUDGET_SLACK", EXPONENT),
    _of("duality", "closed_forms", "a dropped candidate", "points = [0.0, most]", "points = [0.0]", CLOSED),
    _of("duality", "closed_forms", "a dropped sign", "for sign in (1.0, -1.0)}", "for sign in (1.0,)}", CLOSED),
    _of("duality", "closed_forms", "a stale partial sum", "return first + np.cumsum(steps, axis=0)", "return first + np.cumsum(steps, axis=0) - steps", CLOSED),
    _of("duality", "closed_forms", "a wrong power", "margin=None if kappa.margin is None else kappa.margin * radius**degree", "margin=None if kappa.margin is None else kappa.margin * radius ** (degree - 1)", CLOSED),
    # From value functions to a verdict.
    _of("duality", "verdict", "a dropped grid step", "belows = [f.step_below() if f.status == \"certified\" else f.lower for f in functions]", "belows = [f.lower for f in functions]", CHOICES),
    _of("duality", "verdict", "a sign", "value - free - _ROUNDING", "value + free - _ROUNDING", CHOICES),
    _of("duality", "verdict", "a rounding direction", "gap_upper = math.nextafter(primal_upper - dual.value, math.inf)", "gap_upper = math.nextafter(primal_upper - dual.value, -math.inf)", CHECKER),
    _of("duality", "verdict", "the wrong bound", "math.nextafter(primal_lower - dual_upper, -math.inf)", "math.nextafter(primal_upper - dual.value, -math.inf)", CHOICES),
    _of("duality", "verdict", "a premise that is not asked for", "hinge = all(margin is not None and margin < 1 for margin in margins)", "hinge = True", VERDICTS),
    _of("duality", "verdict", "a premise that is not asked for", "certified = instance.certified and proven_delta", "certified = instance.certified", VERDICTS),
    _of("duality", "verdict", "a branch too few", "full = min(math.floor(count * share), count)", "full = max(min(math.floor(count * share), count) - 1, 0)", CLOSED),
    _of("duality", "units", "a tolerance that is not charged", "sure, limit = math.floor((room - start) / spread.largest)", "sure, limit = math.floor((room - start) / spread.largest + Fraction(1, 10**6))", GAP),
    _of("duality", "units", "the wrong end of an interval", "math.floor((whole - start) / spread.least)", "math.floor((whole - start) / spread.largest)", GAP),
    _of("duality", "problem", "a dropped projection", "while sum((Fraction(x) ** 2 for x in moved[k].tolist()), Fraction(0)) > limit:", "while False:", VERDICTS),
    _of("duality", "deltas", "a wrong cell", "index = min(int(np.searchsorted(function.budgets, budget - slack)), len(function.lower) - 1)", "index = max(int(np.searchsorted(function.budgets, budget - slack)) - 1, 0)", DELTAS),
    _of("duality", "margins", "a missing factor", "return math.sqrt(2) if one_hot else None", "return 1.0 if one_hot else None", MARGINS),
    # Branch and bound.
    _of("duality", "branch_and_bound", "dropped boxes", "        lower = np.minimum(lower, open_bound.proven())\n", "        pass\n", BOXES),
    _of("duality", "branch_and_bound", "a dropped box", "    return np.concatenate([lo, right_lo]), np.concatenate([left_hi, hi])", "    return np.concatenate([lo, lo]), np.concatenate([left_hi, left_hi])", TREE),
    _of("duality", "branch_and_bound", "a sign", "fitted = base - slope * reach", "fitted = base + slope * reach", TREE),
    _of("duality", "branch_and_bound", "a rounding direction", "return monotone(values + SPARE * (1 + np.abs(values)), points)", "return monotone(values - SPARE * (1 + np.abs(values)), points)", BOXES),
    _of("duality", "boxes", "a sign", "curvature = jnp.diag(h_lo) + 2 * lam - jnp.sum(", "curvature = jnp.diag(h_lo) + 2 * lam + jnp.sum(", BOX),
    _of("duality", "boxes", "a wrong cap", "lam = jnp.where(jnp.isfinite(lam), jnp.maximum(lam, lam0), lam0)", "lam = jnp.where(jnp.isfinite(lam), jnp.minimum(lam, 1e6), lam0)", BOX),
    _of("duality", "boxes", "the wrong end of an interval", "least = jnp.where(\n        inside, -0.5 * slope * slope", "least = jnp.where(\n        inside, -0.25 * slope * slope", BOX),
    # Those who prove it again.
    _of("duality/checker", "value_functions", "one claim for all", "| (squares < out.h_lo[:, None])).all(1)", "| (squares < out.h_lo[:, None])).any(1)", TREE_CHECK),
    _of("duality/checker", "value_functions", "boxes without a bound", "if len(lo) else found", "if False else found", TREE_CHECK),
    _of("duality/checker", "value_functions", "a set that is not covered", "if not tree.edge**2 * (1 - 1e-15) >= squares[-1]:", "if not tree.edge**2 * (1 - 1e-15) >= 0:", TREE_CHECK),
    _of("duality/checker", "gap", "a dropped grid step", "below = [*self._low[1:], *self._low[-1:]]", "below = self._low", CHECKER),
    _of("duality/checker", "gap", "a claim that is not looked at", "prove(\"gap_upper\", said[\"gap_upper\"] >= said[\"primal_upper\"] - said[\"dual_lower\"], \"difference\")", "prove(\"gap_upper\", True, \"difference\")", CHECKER),
    _of("duality/checker", "gap", "a wrong residue", "int(lengths[rest % (q - p)]) * unit", "int(lengths.max()) * unit", RESIDUES),
    _of("duality/checker", "closed_forms", "a dropped sign", "for sign in (1.0, -1.0):\n        corners", "for sign in (1.0,):\n        corners", FORMS),
    _of("duality/checker", "closed_forms", "dropped terms", "open_ * np.maximum(c, 0.0)", "0.0 * open_ * np.maximum(c, 0.0)", TERMS),
    _of("duality/checker", "closed_forms", "a cone narrower than it is", '/ sizes).min(axis=1) * (1 - 16 * _EPS)', '/ sizes).min(axis=1) ** 0.5', CORNER),
    # h and W of one's own.
    _of("duality", "constrained_bounds", "boxes that are taken to lie apart", "lam0, value, jnp.argmax(hi - lo), apart)", "lam0, value, jnp.argmax(hi - lo), ~apart)", OWN),
    _of("duality", "verdict", "a rounding that is not charged", "if lam > 0 and math.isfinite(bound) and any(", "if False and any(", MULTIPLIER),
    _of("duality", "clipped", "a rounding direction", "float(dual.value) - _SPARE * (1 +", "float(dual.value) + _SPARE * (1 +", ROOM),
    _of("duality/checker", "constrained", "one claim for all", "| (sizes < out.h_lo[:, None])).all(axis=1)", "| (sizes < out.h_lo[:, None])).any(axis=1)", OWN),
    _of("duality", "sets", "a larger ball", "<= Fraction(b.radius) ** order)", "<= 2 * Fraction(b.radius) ** order)", SETS),
    _of("duality/checker", "rules", "a place where nothing is defined", "    calculus.undefined(x.value[0] <= 0 if y < 0 else x.value[0] < 0)\n", "    pass\n", UNDEFINED),
    # Theorem 2.
    _of("spectral", "verify", "a missing charge", "0.5 * (top + projection + charge) * _ROOM_EPS", "0.5 * (top + projection) * _ROOM_EPS", LINEAR),
    _of("spectral", "verify", "a missing charge", "0.5 * (top + projection + charge) * _ROOM_EPS", "0.5 * (top + charge) * _ROOM_EPS", FIT),
    _of("spectral", "verify", "a dual variable that is not feasible", "dual = dual * (min(1.0, ceiling / (norm * _ROOM)) if norm > 0 else 1.0)", "dual = dual * (1.0 if norm > 0 else 1.0)", LINEAR),
    _of("spectral", "verify", "directions that are not counted", "hidden = max(rank - len(basis.rows_error), 0)", "hidden = 0", LINEAR),
    _of("spectral", "verify", "a wrong factor", "return (misfit + ceiling / depth * penalty) * powers", "return (misfit + ceiling / (depth + 1) * penalty) * powers", LINEAR),
    _of("spectral", "certificate", "a missing charge", "0.5 * (top + projection + charge) - rounding", "0.5 * (top + projection) - rounding", EXACT),
    _of("spectral", "in_memory", "a rounding direction", "wrong = (near.astype(jnp.float64) - value) * towards < 0", "wrong = (near.astype(jnp.float64) - value) * towards > 0", EXACT),
    # How far from the optimum.
    _of("certify", "weighted", "a factor too small", "return 2 * (max(top, 0.0)", "return 1.9 * (max(top, 0.0)", WEIGHTED),
    _of("certify", "verify", "half of a product", "top = math.ldexp(claim.upper, -ex - ea) / 2", "top = math.ldexp(claim.upper, -ex - ea)", WEIGHTED),
    _of("certify", "structure", "a wrong factor", "** (-self.degree / 2) * 2 ** (self.order - 1)", "** (-self.degree / 2)", UNIT),
    _of("certify", "closed", "a sign", "heads = -np.sign(values[order])", "heads = np.sign(values[order])", UNIT),
    _of("certify", "closed", "the wrong gate", "key=lambda one: -one[0]", "key=lambda one: one[0]", UNIT),
    _of("certify", "closed", "outputs that are not added up", "sum((m @ m for m in square_moments(x, alpha)), np.zeros((d, d)))", "next(m @ m for m in square_moments(x, alpha))", UNIT),
    _of("certify", "structure", "a gate that is shut on its border", "found[j, k] = exact >= 0", "found[j, k] = exact > 0", SIDES),
    _of("certify", "structure", "gates that are always open", "return z * open_gates(self.gates, x).T", "return z", RATIONAL),
    _of("certify", "verify", "a gate that is shut on its border", "pairs), Fraction(0)) >= 0)", "pairs), Fraction(0)) > 0)", SIDES),
    _of("certify", "verify", "one claim for all", "holds = lambda: all(top_at_most(", "holds = lambda: any(top_at_most(", LESS),
    _of("certify", "verify", "a wrong factor", "factor = 1.5 * math.sqrt(3) if squared", "factor = 1.5 * math.sqrt(3.1) if squared", LESS),
    _of("certify", "verify", "a dropped output", "        gram += matrix.T @ matrix\n", "        gram = np.maximum(gram, matrix.T @ matrix)\n", LESS),
    # The checkers' rules of choices and orders.
    _of("duality/checker", "jets", "a wrong end of an interval", "            high = np.where(may, b[..., None, :], -np.inf).max(-1)\n", "            high = np.where(may, b[..., None, :], np.inf).min(-1)\n", ARRAYS),
    _of("duality/checker", "moves", "a sum with terms of another group", "(outputs[0][g], outputs[1][g])", "(outputs[0][0], outputs[1][0])", ARRAYS),
    _of("duality/checker", "ranges", "the other branch of a choice", "            results.append(self._walk(branch, operands))", "            results.insert(0, self._walk(branch, operands))", ARRAYS),
    _of("duality/checker", "choices", "a constant that is not exact", "bool((x.value[0] == x.value[1]).all())", "True", ROUNDED),
    _of("duality/checker", "pairs", "a wrong sign", "    return _rising(np.arctan)(a), slope, neg(", "    return _rising(np.arctan)(a), slope, (", POINTS),
    # The moment relaxation: what is proven, and what is proven again.
    _of("certify/moments", "proof", "a sign", "- (0.5 * (1 + kappa)) @ vn", "- (0.5 * (1 - kappa)) @ vn", GIVEN),
    _of("certify/moments", "proof", "a load that is not charged", "np.maximum(load * (1 + _ROOM * _charge(p + 4)) - 1, 0.0)", "np.maximum(load - 2, 0.0)", GIVEN),
    _of("certify/moments", "proof", "a dropped share of the load", "np.abs(kappa) + curvature, 2 * _UNIT", "np.abs(kappa), 2 * _UNIT", GIVEN),
    _of("certify/moments", "proof", "a wrong factor", "bend = 0.25 / np.where", "bend = 0.2 / np.where", GIVEN),
    _of("certify/moments", "proof", "a wrong factor", "hollow = curvature / (2 * sizes_n)", "hollow = curvature / sizes_n", GIVEN),
    _of("certify/moments", "proof", "a dropped term", "*(0.5 * lengths * ~used), ", "", GIVEN),
    _of("certify/moments", "proof", "a shift that is not charged", "return shift + _ROOM * (", "return _ROOM * (", GIVEN),
    _of("certify/moments", "proof", "an uncovered point", "residual = vp - cover @ vn", "residual = vp - 1.01 * (cover @ vn)", GIVEN),
    _of("certify/moments", "proof", "a missing allowance", "noise += float((bend * off) @ (2 * lengths + off))", "pass", CANCEL),
    _of("certify/moments", "balls", "the better of both signs", "each = [max(side.upper for side in pair)", "each = [min(side.upper for side in pair)", CLAIMS),
    _of("certify/moments", "joint", "a tolerance that is not charged", "if bound.upper <= ceiling:", "if bound.upper <= ceiling * (1 + 1e-2):", JOINT),
    _of("certify/moments", "verify", "a load that is not charged", "total += max(Fraction(0), load - 1) * length / 2", "pass", CLAIMS),
    _of("certify/moments", "verify", "a sign", "s - (1 + kappa) * e / 2", "s - (1 - kappa) * e / 2", CLAIMS),
    _of("certify/moments", "verify", "a pivot that is not looked at", "if pivot < 0 or (pivot == 0 and any(h[k][k:])):", "if pivot == 0 and any(h[k][k:]):", CLAIMS),
    _of("certify/moments", "verify", "a sign, in floats", "-0.5 * (1 + side.kappa)) * (plus | minus)", "-0.5 * (1 - side.kappa)) * (plus | minus)", CLAIMS),
    _of("certify/moments", "verify", "a shift that is not charged", "return least + 2 * _g(p + 8) * (size + p * least)", "return 2 * _g(p + 8) * (size + p * least)", CLAIMS),
    _of("certify/moments", "verify", "a condition that is not asked for", "if not rho <= 2 * Fraction(penalty):", "if not rho <= 3 * Fraction(penalty):", JOINT),
    # Branches of several kinds.
    _of("certify", "kinds", "the better of both kinds", "return min(bound.value for bound in self.kinds)", "return max(bound.value for bound in self.kinds)", KINDS),
    _of("certify", "kinds", "a kind that is not looked at", "problems, bound.kinds, strict=True)):\n        if one.multiplier", "problems[:1], bound.kinds[:1], strict=True)):\n        if one.multiplier", KINDS),
    # What the last search found.
    _of("certify", "verify", "a sign that is not asked for", "if bound.kappa is not None and not 0 <= bound.kappa < math.inf:", "if bound.kappa is not None and not bound.kappa < math.inf:", NEGATIVE),
    _of("certify", "bounds", "a check that is left out", 'if bound.status == "certified" and verify_bound(problem, bound).holds:', 'if bound.status == "certified":', AGAIN),
    _of("certify", "bounds", "an overflow taken for 0", "    if math.isinf(gain):\n        return -math.inf\n", "    if math.isinf(gain):\n        return 0.0\n", OVERFLOW),
    _of("duality", "clipped", "another number of branches", "or sum(row.counts) != row.num_branches:", "or False:", COUNTS),
    _of("duality", "bounding/choices", "a value taken for a slope", 'flat = {"fill_value": 0} if "fill_value" in equation.params else {}', "flat: dict[str, Any] = {}", MISSING),
    _of("duality", "checker/rules", "a value taken for a slope", 'flat = {"fill_value": 0} if "fill_value" in equation.params else {}', "flat: dict[str, Any] = {}", MISSING_TOO),
    _of("duality", "checker/rules", "slopes of one entry for all", "return linear(full, x) if isinstance(x, Jet) else x", "return x", ONE_FOR_ALL),
    _of("duality", "checker/rules", "a rounding that is not known", "if narrow and name not in _EXACT:", "if False:", NO_RULE),
    _of("duality", "checker/ranges", "a program run as if it were called", "if name in INNER else ()", "if name else ()", NO_RULE),
    # From numbers to printed digits.
    Mutation("a rounding direction", "terminal.py", '"upper": decimal.ROUND_CEILING', '"upper": decimal.ROUND_HALF_EVEN', DIGITS),
    Mutation("a rounding direction", "terminal.py", '"lower": decimal.ROUND_FLOOR', '"lower": decimal.ROUND_DOWN', DIGITS),
    _of("certify", "certificate", "a rounding direction", 'digits(self.lower, 6, "lower")', "digits(self.lower, 6)", TEXT),
    _of("experiments", "certify_run", "a rounding direction", "digits(_rounded(made.lower), bound='lower')", "digits(_rounded(made.lower))", SENTENCE),
    _of("experiments", "base", "a bound printed as a number", "cell(v, self.bounds.get(c))", "cell(v)", TABLE),
]  # fmt: skip


def _copy(folder: Path) -> None:
    for name in ("dualgap_jax", "tests", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, folder / name)


def _passes(folder: Path, tests: str, limit: float) -> tuple[bool, str]:
    """Whether the selection passes in a copy, and the name of the test that does not."""
    file, _, chosen = tests.partition(" -k ")
    words = chosen.replace("|", " or ").replace("&", " and ").replace("not(", "not (")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        file,
        *(["-k", words] if words else []),
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TF_CPP_MIN_LOG_LEVEL": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, f"more than {limit:.0f} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0, failed[0].split(" - ")[0].partition("::")[2] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="where the table is written as JSON")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the mutations to make; all by default")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one selection of tests")
    given = parser.parse_args()
    chosen = [(k, m) for k, m in enumerate(MUTATIONS, 1) if given.only is None or k in given.only]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder)
        for tests in sorted({m.tests for _, m in chosen}):
            passes, where = _passes(folder, tests, given.limit)
            if not passes:
                print(f"{tests} does not pass as it is: {where}")
                return 1
        for k, m in chosen:
            path = folder / "dualgap_jax" / m.file
            text = path.read_text()
            if text.count(m.old) != 1:
                print(f"{k}: {m.old!r} stands {text.count(m.old)} times in {m.file}")
                return 1
            path.write_text(text.replace(m.old, m.new))
            start = time.perf_counter()
            passes, where = _passes(folder, m.tests, given.limit)
            path.write_text(text)
            rows.append({"number": k, **m._asdict(), "caught": not passes, "by": where})
            told = where if not passes else "NOT CAUGHT"
            print(f"{k:>3}  {m.file:<34} {m.kind:<36} {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    caught = sum(bool(row["caught"]) for row in rows)
    print(f"{caught} of {len(rows)} caught")
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(caught < len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
