"""Numbers and rows of numbers: reading, writing, and the functions that recurrences are made of.

exp, sigmoid and tanh are written out here because the library's are calls, and a loop with a call
in it does not become vector instructions.
"""

import numpy as np
from numba.extending import overload

from seqlm.ops.cpu.compile import part

F32, I32, U32, U16 = np.float32, np.int32, np.uint32, np.uint16
ONE, HALF = F32(1), F32(0.5)


# numba chooses the body of an `overload` by the types of the arguments, when it compiles a loop:
# the same loop reads and writes float32 and bfloat16


def read(x):
    """A number of a tensor, as float32."""


@overload(read)
def _read(x):
    if x.bitwidth == 16:  # bfloat16 is the upper half of a float32's bits
        return lambda x: U32(U32(x) << U32(16)).view(F32)
    return lambda x: x


def write(row, c, x):
    """row[c] = x, rounded to the nearest even bfloat16 where the row is of these."""


@overload(write)
def _write(row, c, x):
    if row.dtype.bitwidth == 32:

        def as_it_is(row, c, x):
            row[c] = x

        return as_it_is

    def rounded(row, c, x):
        # adding half of what is cut off rounds to the nearest; the lowest bit that stays breaks
        # ties towards even.  NaN could become infinity that way, so it is written by itself.
        bits = F32(x).view(U32)
        up = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
        row[c] = U16(up >> U32(16)) if x == x else U16(0x7FC0)

    return rounded


# Rows are copied and filled by these: for out[:] = x numba also compiles the message of an error,
# which takes two seconds a loop.


@part()
def load(out, x):
    for c in range(len(out)):
        out[c] = read(x[c])


@part()
def store(out, x):
    for c in range(len(out)):
        write(out, c, x[c])


@part()
def fill(out, x):
    for c in range(len(out)):
        out[c] = x


@part()
def exp(x):
    """e^x to 2 units in the last place; x beyond +-87 counts as +-87, so that nothing overflows.

    x = n ln 2 + r, and e^x = 2^n e^r: a polynomial for e^r, and n added to the exponent's bits.
    Coefficients: Cephes, expf (Moshier 1989).
    """
    x = min(max(x, F32(-87)), F32(87))
    # adding 1.5 * 2^23 leaves no bits behind the point: it rounds x / ln 2 to a whole number
    n = x * F32(1.44269504) + F32(12582912)
    n = n - F32(12582912)
    # ln 2 in two parts, the first of few bits, so that n times it is exact
    r = x - n * F32(0.693359375)
    r = r - n * F32(-2.12194440e-4)
    p = F32(1.9875691500e-4)
    p = p * r + F32(1.3981999507e-3)
    p = p * r + F32(8.3334519073e-3)
    p = p * r + F32(4.1665795894e-2)
    p = p * r + F32(1.6666665459e-1)
    p = p * r + HALF
    p = p * r * r + r + ONE
    return p * I32((I32(n) + I32(127)) << I32(23)).view(F32)


@part()
def sigmoid(x):
    """Returns sigmoid(x) and 1 - sigmoid(x), both accurate where they are near 0."""
    e = exp(-x)
    s = ONE / (ONE + e)
    return s, e * s


@part()
def tanh(x):
    """Returns tanh(x), with an absolute error of 1e-7, and its slope 1 - tanh(x)^2."""
    e = exp(-(x + x))
    r = ONE / (ONE + e)
    return (ONE - e) * r, F32(4) * (e * r) * r


@part()
def normal(x):
    """Returns P(X < x) for a normal X, to 2e-7, and its density at x.

    By an approximation of erf: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    distance = abs(x) * F32(0.70710678)
    t = ONE / (ONE + F32(0.3275911) * distance)
    p = F32(1.061405429) * t - F32(1.453152027)
    p = p * t + F32(1.421413741)
    p = p * t - F32(0.284496736)
    p = p * t + F32(0.254829592)
    e = exp(-distance * distance)
    beyond = HALF * p * t * e  # the probability of the side that is beyond x
    return ONE - beyond if x > F32(0) else beyond, F32(0.39894228) * e


# What follows works on rows, one or two arrays at a time.  The compiler makes vector instructions
# of a loop only where it knows that arrays do not overlap: it checks that as the loop begins, and
# gives up with more than two or three arrays.


@part()
def sigmoids(x, scale):
    """In place: scale * sigmoid(x)."""
    for c in range(len(x)):
        x[c] = scale * sigmoid(x[c])[0]


@part()
def tanhs(x):
    """In place: tanh(x)."""
    for c in range(len(x)):
        x[c] = tanh(x[c])[0]


@part()
def add(out, x):
    for c in range(len(out)):
        out[c] += read(x[c])


@part()
def add_scaled(out, x, y):
    for c in range(len(out)):
        out[c] += x[c] * y[c]
