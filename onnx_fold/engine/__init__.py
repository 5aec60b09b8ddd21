"""Which fold is taken: what a pass is, candidates, their cost, what became of each stream.

It knows no strategy by name.
"""
