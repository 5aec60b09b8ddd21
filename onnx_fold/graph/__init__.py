"""What one model says: operators, constants, shapes, linear layers; and how to edit it.

It knows nothing of streams or strategies.
"""
