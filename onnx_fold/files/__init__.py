"""Models in and out: read lazily, checked, written safely beside what others need.

It knows nothing of what a model computes.
"""
