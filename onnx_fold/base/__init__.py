"""What every storey may use: arguments, progress, memory, tables.

It knows nothing of models.
"""
