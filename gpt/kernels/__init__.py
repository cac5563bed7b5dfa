"""CUDA kernels, compiled at run time: no toolkit, no compiler, no extra package."""
