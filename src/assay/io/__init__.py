"""The bytes on disk: shards, codes, checkpoints, and how a file is published. No estimators."""
