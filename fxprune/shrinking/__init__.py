"""From masks to a smaller program: liveness, folding, slicing, rewriting."""
