"""gpt-norms: a minimal GPT-2 trainer with pluggable norms."""

import os

# Before torch is imported: two OpenMP threads that spin at every barrier slow each other down
# up to tenfold on a busy machine; waiting passively costs nothing measurable on an idle one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What cuBLAS needs in order to repeat the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
