"""What a fold did and why, for people: dataclasses, terminal and JSON.

It decides nothing.
"""
