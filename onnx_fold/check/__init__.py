"""Whether two models are the same function: the proof in float64, and the parity check.

It knows nothing of how a fold was found.
"""
