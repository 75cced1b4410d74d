"""Claims about branches and gaps proven again, by arithmetic and rules of its own: nothing of `bounding` is used."""
