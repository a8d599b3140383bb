"""`python -m assay.ranks --nproc-per-node=8 run ...`, or the same by `torchrun -m assay.ranks`."""

import os
import sys

# As settings.py has it, for torch that is imported before those are read.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if "TORCHELASTIC_RUN_ID" in os.environ:
    from assay.ranks.process import be_rank

    sys.exit(be_rank())
else:
    from assay.ranks.launch import launch

    sys.exit(launch(sys.argv[1:]))
