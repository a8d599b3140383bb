"""The stages: one folder each, with plain functions in nodes.py and one namespaced pipeline per
layer in pipeline.py.
"""
