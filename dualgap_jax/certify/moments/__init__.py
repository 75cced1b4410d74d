"""The moment relaxation: lower bounds on the risk of two-layer ReLU networks in any dimension (docs/moments.md)."""
