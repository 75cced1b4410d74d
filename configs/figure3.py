"""Figure 3: Minkowski averages of the l_{1/2} ball, and their distance to the convex hull against the bound.

    python scripts/run.py --config=configs/figure3.py
    python scripts/run.py --config=configs/figure3.py:p=0.3
    python scripts/run.py --config=configs/figure3.py:set=union
    python scripts/run.py --config=configs/figure3.py:set=random_points,seed=3

Sets: lp_ball (the paper's; any p > 0), union (three pieces; --config.set.pieces="('disc 0 0 1', 'point 2 0')"),
random_points, random_discs.  A set of your own: extend the table
`sets` in a module passed with --extend, and name it in a config of your own (ShapleyFolkmanSpec).
Expect 1, 2 and 10 copies as in the paper; for the l_p balls n times the distance is constant (sqrt(2)/4 for p = 1/2)
and Starr's bound is 2 sqrt(2) times too large from n = 2; for sets with rounded corners it falls like 1/n^2.
"""

from dualgap_jax.config import Absent, component, experiment_config, parse_arg, require
from dualgap_jax.experiments.shapley_folkman import ShapleyFolkmanSpec
from dualgap_jax.shapley_folkman import SETS

# Numbers of copies up to what each method does in seconds.
UP_TO = {"lp_ball": 100, "union": 50, "random_points": 30, "random_discs": 50}
COPIES = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 50, 70, 100)


def get_config(arg=None):
    args = parse_arg(arg, set="lp_ball", p=Absent(0.5), seed=Absent(0), copies=Absent((1, 2, 5)), smoke=False)
    is_ball, is_random = args.set == "lp_ball", args.set.startswith("random_")
    require(is_ball or args.p is None, f"p={args.p}: only the set lp_ball has a p, not {args.set!r}.")
    require(is_random or args.seed is None, f"seed={args.seed}: only the random sets have a seed, not {args.set!r}.")
    p, seed = 0.5 if args.p is None else args.p, args.seed or 0
    settings = {"p": p} if is_ball else {"seed": seed} if is_random else {}
    chosen = component(SETS, args.set, **settings)
    copies = args.copies or tuple(n for n in COPIES if n <= UP_TO[args.set])
    names = {"lp_ball": f"the ℓₚ ball, p = {p:g}", "union": "a union of pieces"}
    spec = ShapleyFolkmanSpec(
        title=f"Minkowski averages of {names.get(args.set, args.set.replace('_', ' '))}",
        paper_item="Figure 3" if (args.set, p) == ("lp_ball", 0.5) else "as Figure 3, another set",
        set=chosen,
        copies=copies[:3] if args.smoke else copies,
    )
    return experiment_config("shapley_folkman", spec)
