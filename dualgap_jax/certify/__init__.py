"""How far a network is from the global optimum: proven lower bounds on the regularised risk of any number of branches.

`F*` is the least regularised risk over all probability measures of branches, so at most that of I branches for every I.
"""
