"""Slow, plain reference implementations of the original systems: what the toolkit is tested against.

Everything here computes directly on the state-dict keys and the yaml settings of the official checkpoints,
with functions over tensors: no modules, no cache, nothing shared with the packages under test. Speed is no
goal.
"""
