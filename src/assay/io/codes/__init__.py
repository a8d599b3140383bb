"""Codes in folders: written, read, and saev's."""

from assay.io.codes.reader import StoredCodes
from assay.io.codes.writer import write_codes

__all__ = ["StoredCodes", "write_codes"]
