"""The stages: one folder each, with plain functions in nodes.py and one namespaced pipeline a layer
in pipeline.py.
"""
