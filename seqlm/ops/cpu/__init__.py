"""The ops as loops for the CPU, compiled by numba on first use and kept on disk.

Numbers in memory are float32, or bfloat16 as its 16 bits; states and sums are float32.  The inner
loops run over channels, which lie side by side in memory, so that they become vector instructions.
A file that is not an op holds what several ops share: compile.py, numbers.py, gates.py,
products.py, threads.py.
"""
