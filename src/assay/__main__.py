"""`python -m assay`: the `assay` command."""

from assay.commands import main

main(prog_name="assay")
