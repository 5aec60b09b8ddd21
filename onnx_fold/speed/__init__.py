"""How fast two models are: paired timings, operator times, plots.

It knows nothing of folds.
"""
