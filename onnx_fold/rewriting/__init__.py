"""Planned changes of a graph: new weights, carried biases, orders and widths of channels.

It knows nothing of which change is worth making.
"""
