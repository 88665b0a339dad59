"""A step of a model as a list of instructions, which one compiled loop runs on several threads.

An instruction works on rows: out = f(a, b, c).  The threads divide a product by its outputs, and
everything else by rows.  They wait for each other only next to an instruction whose parts need the
parts of others.
"""

# B batch, D width, I inputs, O outputs, K kernel

from numba import carray  # type: ignore[attr-defined]  # numba's __all__ lacks it

from seqlm.ops.cpu.activations import activate
from seqlm.ops.cpu.atoms import (
    SIZE,
    add_to_word,
    load_word,
    pointer_to_words,
    replace_word,
    store_word,
)
from seqlm.ops.cpu.compile import compiled, inlined, part
from seqlm.ops.cpu.gated_scan import advance
from seqlm.ops.cpu.gates import mix
from seqlm.ops.cpu.numbers import ONE, load, sigmoids
from seqlm.ops.cpu.products import write_half_product, write_product
from seqlm.ops.cpu.rms_norm import norm_row
from seqlm.ops.cpu.steps import rows_at

# The columns of an instruction: what it does; B rows of `inner` rows each; the widths of out and c,
# of a, and of b; a number that the operation takes; whether the threads meet after it.
OPERATION, ROWS, INNER, WIDTH, WIDTH_A, WIDTH_B, OPTION, MEETS = range(8)
# then three for each tensor: address, and the numbers from a row to the next, and an inner row
OUT, A, B, C = range(8, 20, 3)
COLUMNS = 20

# The operations.  alpha and beta are the instruction's own two numbers.
LINEAR = 0  # a b^T + c; no c at address 0
NORM = 1  # a, normed, times b
GATED = 2  # the gated scan's step from the state a with the drive b; option: g is positive
CONVOLUTION = 3  # of a, (K, D), with b, (D, K), plus c
ROW = 4  # the row of a whose number is in b, an int64
COPY = 5  # a
SUM = 6  # a + alpha b
PRODUCT = 7  # a b
AFFINE = 8  # alpha a + beta
MIX = 9  # a + c (b - a)
SIGMOID = 10
ACTIVATION = 11  # option: which, as in cfc_scan.py
HALF_LINEAR = 12  # LINEAR with b in bfloat16

# The shared words, by which threads agree on a call.  Words that different threads write are in
# different lines of the processor's caches.
LINE = 8
PROGRAM, CONSTANTS, LENGTH, THREADS, WRONG, MET_BEFORE, MET = 0, 1, 2, 3, 4, 5, LINE
BLOCK = 16  # outputs of a product that go to the same thread
ABSENT, WAKING, READY, ENGAGED, CALLED = range(5)  # what a helper is doing
NONE_READY = -1
PATIENCE = 1 << 20  # polls for a call, about a millisecond, after which a helper goes to sleep


@inlined()
def helper_at(shared, helper):
    """The address of a helper's two words: what it does, and its number among the threads."""
    return shared + 8 * LINE * (1 + helper)


@inlined()
def row_at(p, column, r, k, width):
    return rows_at(p[column] + SIZE * (r * p[column + 1] + k * p[column + 2]), 1, width)[0]


@inlined()
def convolve(out, x, w, bias):
    """out, bias: (D,), x: (K D,), w: (D K,)"""
    width = len(out)
    kernel = len(w) // width
    load(out, bias)
    for k in range(kernel):
        for j in range(width):
            out[j] += w[j * kernel + k] * x[k * width + j]


@inlined()
def run_row(p, out, a, b, c, alpha, beta):
    operation = p[OPERATION]
    if operation == NORM:
        norm_row(a, b, out)
    elif operation == CONVOLUTION:
        convolve(out, a, b, c)
    elif operation == PRODUCT:
        for j in range(len(out)):
            out[j] = a[j] * b[j]
    elif operation == AFFINE:
        for j in range(len(out)):
            out[j] = alpha * a[j] + beta
    else:
        load(out, a)
        if operation == SUM:
            for j in range(len(out)):
                out[j] += alpha * b[j]
        elif operation == GATED:
            advance(out, b, len(out), 0, p[OPTION] != 0)
        elif operation == MIX:
            mix(out, b, c)
        elif operation == SIGMOID:
            sigmoids(out, ONE)
        elif operation == ACTIVATION:
            activate(out, p[OPTION])


@inlined()
def take_row(p, r):
    """Returns whether the row's number is one of the table's; OPTION: how many it has."""
    place = carray(pointer_to_words(p[B] + 8 * r), 1)[0]
    known = 0 <= place < p[OPTION]
    width = p[WIDTH]
    source = p[A] + SIZE * width * (place if known else 0)
    load(row_at(p, OUT, r, 0, width), rows_at(source, 1, width)[0])
    return known


@inlined()
def border(parts, thread, threads):
    """Where a thread's share of the parts begins; the first threads have the larger shares."""
    return (parts * thread + threads - 1) // threads


@part()
def run_instruction(p, alpha, beta, thread, threads):
    """Run a thread's part of an instruction; returns how many of its symbols do not exist."""
    width, wrong = p[WIDTH], 0
    if p[OPERATION] == LINEAR or p[OPERATION] == HALF_LINEAR:
        blocks = (width + BLOCK - 1) // BLOCK
        first = BLOCK * border(blocks, thread, threads)
        end = min(BLOCK * border(blocks, thread + 1, threads), width)
        x, x_step, y, y_step = p[A], p[A + 1], p[OUT], p[OUT + 1]
        if p[OPERATION] == LINEAR:
            write_product(x, x_step, p[B], p[C], y, y_step, p[ROWS], p[OPTION], first, end)
        else:
            write_half_product(x, x_step, p[B], p[C], y, y_step, p[ROWS], p[OPTION], first, end)
        return 0
    for r in range(border(p[ROWS], thread, threads), border(p[ROWS], thread + 1, threads)):
        if p[OPERATION] == ROW:
            wrong += not take_row(p, r)
            continue
        for k in range(p[INNER]):
            out, a = row_at(p, OUT, r, k, width), row_at(p, A, r, k, p[WIDTH_A])
            b, c = row_at(p, B, r, k, p[WIDTH_B]), row_at(p, C, r, k, width)
            run_row(p, out, a, b, c, alpha, beta)
    return wrong


@inlined()
def meet(shared, target):
    """Wait until `target` arrivals are counted; returns how often this thread polled."""
    add_to_word(shared + 8 * MET, 1)
    polls = 0
    while load_word(shared + 8 * MET) < target:
        polls += 1
    return polls


@inlined()
def call_helpers(shared, helpers, program_at, constants_at, length):
    """Have the helpers that are ready run a program; returns the number of threads."""
    threads = 1
    for helper in range(1, helpers + 1):
        at = helper_at(shared, helper)
        if replace_word(at, READY, ENGAGED):
            store_word(at + 8, threads)
            threads += 1
    if threads > 1:
        store_word(shared + 8 * PROGRAM, program_at)
        store_word(shared + 8 * CONSTANTS, constants_at)
        store_word(shared + 8 * LENGTH, length)
        store_word(shared + 8 * THREADS, threads)
        store_word(shared + 8 * WRONG, 0)
        # MET only grows: a helper may still have to see that it was complete in the last call
        store_word(shared + 8 * MET_BEFORE, load_word(shared + 8 * MET))
        for helper in range(1, helpers + 1):
            replace_word(helper_at(shared, helper), ENGAGED, CALLED)
    return threads


@inlined()
def is_called(at):
    """Wait until a helper is called; False if that takes too long, and the helper is absent."""
    store_word(at, READY)
    polls = 0
    while load_word(at) != CALLED:
        polls += 1
        if polls > PATIENCE and replace_word(at, READY, ABSENT):
            return False
    return True


@compiled()
def run(shared, helper, helpers, program_at, constants_at, length):
    """Run a program of `length` instructions; helper: 0, the caller.

    helpers: how many may help, if they are ready.  Returns whether all symbols exist, and how often
    the caller polled in its longest wait for the others, or NONE_READY.  A helper, from 1, runs its
    part of every program that it is called for, and returns when none has come for a while.
    """
    at, thread, threads = helper_at(shared, helper), 0, 1
    if not helper:
        threads = call_helpers(shared, helpers, program_at, constants_at, length)
    while not helper or is_called(at):
        if helper:
            thread, threads = load_word(at + 8), load_word(shared + 8 * THREADS)
            program_at = load_word(shared + 8 * PROGRAM)
            constants_at = load_word(shared + 8 * CONSTANTS)
            length = load_word(shared + 8 * LENGTH)
        program = carray(pointer_to_words(program_at), (length, COLUMNS))
        constants = rows_at(constants_at, length, 2)
        wrong, polls, target = 0, 0, load_word(shared + 8 * MET_BEFORE)
        for i in range(length):
            p = program[i]
            wrong += run_instruction(p, constants[i, 0], constants[i, 1], thread, threads)
            if p[MEETS] and threads > 1:
                if helper and wrong:
                    store_word(shared + 8 * WRONG, 1)
                target += threads
                polls = max(polls, meet(shared, target))
        if not helper:
            if threads > 1:
                wrong += load_word(shared + 8 * WRONG)
            return wrong == 0, NONE_READY if helpers and threads == 1 else polls
    return True, 0
