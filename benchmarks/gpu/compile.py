"""Compiles the fused kernels for GPUs that need not be there: registers, spills and shared memory,
as a Markdown table.

pip install triton; PYTHONPATH=src python benchmarks/gpu/compile.py [--capability 80 90]
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from assay.numerics.kmeans import fused, fused_rounding, fused_step
from assay.numerics.kmeans.kernels import FUSED_TILE

# As at K = 16,384 and d = 1,024: pointers are multiples of 16 bytes, and so are the sizes that
# follow from the width.
FLOATS = {
    "x",
    "centers",
    "origin",
    "norms",
    "lost",
    "best",
    "second",
    "bounds",
    "least_of",
    "moved",
}
INT32 = {"queue", "queued", "overflown"}
INT64 = {"labels", "order", "begins", "counts"}
SCALARS = {
    "margin",
    "sums",
    "underflow",
    "raised",
    "least_step",
    "grown",
    "packing",
    "least_error",
    "share",
    "most_halved",
    "largest",
    "unit",
}
SIZES = {"n", "d", "width", "n_tiles", "n_centers", "x_stride", "c_stride"}
WIDTH, TILES = 1088, 64


def kernels(capability: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Each kernel with its constants and options, as they are launched."""
    shape = next(
        shape for least, shape in fused._SHAPES.items() if capability >= 10 * least[0] + least[1]
    )
    two_best = {
        "WIDTH": WIDTH,
        "ROWS": shape.rows,
        "TILE": FUSED_TILE,
        "DIMS": fused._DIMS,
        "SPLITS": 2,
        "DESCRIPTORS": shape.descriptors,
    }
    rounding = {"ROWS": fused_rounding.ROUNDED, "DIMS": 256}
    few = {"MOST_NEAR": fused._MOST_NEAR, "MOST_CROWDED": fused._MOST_CROWDED}
    settle = {"TILES": TILES, "TILE": FUSED_TILE, "DIMS": 16}
    return [
        (fused_rounding._round_centers, rounding, {}),
        (fused_rounding.prepare_tokens, rounding, {}),
        (
            fused._two_best,
            {**two_best, "MAY_OVERFLOW": False},
            {"num_warps": shape.warps, "num_stages": shape.stages},
        ),
        (fused._shortlist, {**few, "ROWS": 8, "TILES": TILES, "TILE": FUSED_TILE}, {}),
        (fused._settle, settle, {}),
        (fused._settle_crowded, {**settle, "PROGRAMS": 264}, {"num_warps": 16}),
        (fused_step._move, {"TOKENS": fused_step._TOKENS, "DIMS": fused_step._DIMS}, {}),
        (fused_step._squared, {"DIMS": fused_step._DIMS}, {}),
    ]


def type_of(name: str, kernel: Any, constants: dict[str, Any]) -> str:
    """How Triton's signatures write an argument's type."""
    if name in constants:
        return "constexpr"
    if name in ("tokens", "matrix"):
        rows = constants.get("ROWS") if name == "tokens" else constants.get("TILE")
        return f"tensordesc<fp16[{rows}, 64]>" if constants.get("DESCRIPTORS") else "*fp16"
    if name == "squared":
        return "*fp64"
    for names, written in (
        (FLOATS, "*fp32"),
        (INT32, "*i32"),
        (INT64, "*i64"),
        (SCALARS, "fp32"),
        (SIZES, "i32"),
    ):
        if name in names:
            return written
    raise ValueError(
        f"{kernel.__name__} has an argument {name}, whose type is not known here: add it"
    )


def compiled(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], capability: int
) -> Any:
    """The kernel compiled as for a launch."""
    signature = {name: type_of(name, kernel, constants) for name in kernel.arg_names}
    whole = [
        index
        for index, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*" or name in SIZES - {"n", "n_centers"}
    ]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in whole},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(binary: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of its stack (where spilled registers lie) and bytes of static
    shared memory, by cuobjdump.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    if found is None:
        raise ValueError(f"expected a line of REG, STACK and SHARED, got {said!r}")
    registers, stack, shared = map(int, found.groups())
    return registers, stack, shared


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    capabilities = parser.parse_args().capability
    sys.stdout.write(
        "| kernel | capability | warps | registers | stack, bytes | shared memory, bytes"
        " |\n|---|---|---|---|---|---|\n"
    )
    for capability, place in itertools.product(capabilities, range(len(kernels(90)))):
        kernel, constants, options = kernels(capability)[place]
        made = compiled(kernel, constants, options, capability)
        registers, stack, _ = usage(made.asm["cubin"])
        row = (
            f"`{kernel.__name__}`",
            f"{capability / 10}",
            made.metadata.num_warps,
            registers,
            stack,
            made.metadata.shared,
        )
        sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")


if __name__ == "__main__":
    main()
