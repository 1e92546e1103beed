"""Print what the hot loops of the Triton kernels are, for the Triton that is installed and a GPU that need not be there.

    python tests/triton_loops.py scan-16 influence-bf16 --target sm_90

names cases of ``test_triton_targets.py``. Each line is a loop without the loops in it: its instructions, and among them
exponentials and reciprocals, additions and products, loads, stores, and exchanges between lanes.
"""

from __future__ import annotations

import argparse

import triton
from test_triton_targets import CASES
from triton_targets import TARGETS, compile_for, count, record

from simba_compile.kernels import gpu

GROUPS = {
    "special": ("MUFU",), "float": ("FFMA", "FADD", "FMUL"), "loads": ("LDG", "LDS", "LDL"),
    "stores": ("STG", "STS", "STL"), "shuffles": ("SHFL",),
}  # fmt: skip


def main() -> None:
    """Compile the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--target", default="sm_90", choices=[name for name in TARGETS if name.startswith("sm")])
    given = parser.parse_args()
    print(f"triton {triton.__version__}, {given.target}")
    for case in given.cases:
        name, arguments = CASES[case]
        for launch in record(gpu.KERNELS[name], *arguments()):
            built = compile_for(given.target, launch)
            print(f"{case}: {built.name}, {built.registers} registers, {built.spilled} bytes spilled")
            for loop in built.loops():
                counts = ", ".join(f"{group} {count(loop, *names)}" for group, names in GROUPS.items())
                print(f"  {loop.total()} instructions: {counts}")


if __name__ == "__main__":
    main()
