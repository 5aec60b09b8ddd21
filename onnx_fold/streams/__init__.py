"""Values that share a channel axis: who writes and reads it, heads, fused projections.

It finds and describes them, and changes nothing.
"""
