"""WHO does what: the mesh of ranks, where experts sit, what is dropped and what travels."""
