"""Everything here runs in Triton's interpreter; run it by itself, with TRITON_INTERPRET=1."""

import interpreter  # noqa: F401  (before anything imports triton)
