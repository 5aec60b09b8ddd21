"""Matrices that are not evaluated yet, the choice of a basis, and what rounding does to them.

It knows nothing of graphs: an expression is made of arrays, however they are stored.
"""
