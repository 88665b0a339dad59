"""The ops as loops for the CPU, compiled by numba on first use and kept on disk.

Numbers in memory are float32, or bfloat16 as 16-bit integers; states and sums are float32.  The
inner loops run over channels, which are adjacent in memory, so that they become vector
instructions.  Files that are not an op are shared by several ops: compile.py, numbers.py,
activations.py, gates.py, products.py, steps.py, threads.py.  One call for a whole step of a model:
recording.py makes its program, program.py runs it, on the threads of helpers.py; atoms.py has what
numba lacks.
"""
