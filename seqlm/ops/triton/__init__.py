"""The ops as kernels for CUDA devices, compiled by Triton on first use and kept on disk.

Numbers in memory are float32 or bfloat16; states and sums are float32.  Kernels read and write
(B, T, C) in the model's layout.  A file that is not an op holds what several ops share: numbers.py,
lanes.py, tiles.py, scans.py, launch.py.

Under Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) the same kernels run
on the CPU, slowly, for tests.  Inside this folder `import triton` means Triton, because imports
here are absolute.
"""
