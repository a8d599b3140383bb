"""A run by several processes of one machine, as `torchrun` starts them: rank 0 runs the one Kedro
session, the others do what it calls.
"""
