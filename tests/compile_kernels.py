"""Compiles the kernels of triton for a GPU that need not be there, as the ops launch them.

Prints a line a kernel: its name, what it is compiled for, its registers, the bytes of them that did
not fit, and of shared memory, of which it may not take more than the least of GPUs has.  Not a test
by itself: test_triton.py runs it, without the interpreter, for short sequences, whose kernels are
short, too.  With the word "all" it takes other sizes and dtypes.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch.autograd import grad
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqlm import cells, ops, runtime
from seqlm.cells import cfc
from seqlm.ops import trial
from seqlm.ops.triton import scans
from seqlm.runtime import using_backend

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
SHARED = 101376  # bytes of a program, from compute capability 8.6 on
found: dict[str, tuple] = {}


def record(kernel, *arguments, grid, warmup, **named) -> None:
    """In the place of a launch: what triton would compile for it."""
    constants = {name: x for name, x in named.items() if name in kernel.arg_names}
    options = {name: x for name, x in named.items() if name not in kernel.arg_names}
    types, values, attributes = {}, dict(constants), {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        types[name] = "fp32" if isinstance(x, float) else "i32"
        if kernel.params[i].do_not_specialize:
            continue
        if isinstance(x, torch.Tensor):
            types[name] = NAMES[x.dtype]
        elif x == 1 and isinstance(x, int):
            types[name], values[name] = "constexpr", 1
        if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    types |= dict.fromkeys(constants, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    key = f"{kernel.fn.__name__} {' '.join(types.values())} {values}"
    found[key] = kernel, types, values, attributes, options


def run(function, *inputs: torch.Tensor) -> None:
    inputs = [x.requires_grad_() for x in inputs]
    grad(sum(y.float().sum() for y in function(*inputs)), inputs)


def launch_all(dtype: torch.dtype, time: int, width: int) -> None:
    """Every op once, forwards and backwards."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    h0 = torch.zeros(2, width)
    for parts, candidate in ((2, "positive"), (3, "linear")):
        drive = zeros(2, time, parts * width)
        run(lambda *x, c=candidate: ops.gated_scan(*x, c), drive, h0)
    launch_cell(dtype, (2, time, width), "lem")
    launch_cell(dtype, (2, time, width), "lem", recurrence="diagonal")
    launch_cell(dtype, (2, time, width), "cfc", recurrence="leaky")
    run(ops.linear_scan, zeros(2, time, width), zeros(2, time, width), h0)
    launch_parts(dtype, (2, time, width))


def launch_parts(dtype: torch.dtype, shape: tuple, kernel: int = 4) -> None:
    """What is around a cell once, forwards and backwards, for a shape (B, T, D)."""
    batch, time, width = shape
    x = torch.zeros(batch, time + kernel - 1, width, dtype=dtype)
    run(lambda *x: [ops.causal_conv(*x)], x, torch.zeros(width, 1, kernel), torch.zeros(width))
    with torch.autocast("cpu", torch.bfloat16):
        run(lambda *x: [ops.rms_norm(*x)], x.detach(), torch.zeros(width))


def launch_cell(dtype: torch.dtype, shape: tuple, name: str, **options: str) -> None:
    """A cell once, forwards and backwards, for a shape (B, T, D)."""
    batch, time, width = shape
    cell = cells.find(name)(width, **options)
    state = [x.float() for x in cell.initial_state(batch)]
    drive = cell.project(torch.zeros(batch, time, width)).detach().to(dtype)
    run(lambda drive, *state: cell.scan(drive, state)[:1], drive, *state)


def compiled(kernel, types, values, attributes, options) -> str:
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    shared = made.metadata.shared
    assert shared <= SHARED, f"{shared} bytes of shared memory"
    return f"{registers} registers, {stack} bytes beside them, {shared} bytes shared"


def main(everything: bool) -> None:
    runtime._triton_fault = lambda device: None
    trial.fault = lambda *_: None
    triton.JITFunction.run = record
    with using_backend("triton"):
        launch_all(torch.bfloat16, 4, 16)
        launch_cell(torch.bfloat16, (64, 2, 512), "lem")
        launch_cell(torch.bfloat16, (64, 2, 512), "cfc")
        if everything:
            for act in cfc.ACTIVATIONS:
                launch_cell(torch.float32, (64, 2, 512), "cfc", backbone_activation=act)
            launch_cell(torch.float32, (64, 2, 512), "lem")
            launch_cell(torch.bfloat16, (256, 2, 512), "lem")
            launch_cell(torch.float32, (2, 2, 32), "lem")
            launch_all(torch.bfloat16, 200, 64)
            launch_all(torch.float32, 200, 64)
            launch_all(torch.bfloat16, 200, 36)
            launch_all(torch.float32, 1, 1)
            for dtype in (torch.bfloat16, torch.float32):
                launch_parts(dtype, (64, 256, 384))
                launch_parts(dtype, (64, 256, 384), 16)
                launch_parts(dtype, (2, 3, 8192), 1)
        scans.chunk_count = lambda *_: 4
        run(ops.gated_scan, torch.zeros(2, 8, 32), torch.zeros(2, 16))
    for key, form in found.items():
        print(f"{key}: {compiled(*form)}", flush=True)


if __name__ == "__main__":
    main("all" in sys.argv)
