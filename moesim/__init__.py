"""moesim: what will this Mixture-of-Experts model cost on that cluster, given how its router really routes?"""

__version__ = "0.1.0"
