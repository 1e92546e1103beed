"""These tests run the Triton kernels on the CPU, under Triton's interpreter: `tests/test_triton.py` starts them.

The interpreter is chosen when triton is imported and for the whole process, so they have one to themselves.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
