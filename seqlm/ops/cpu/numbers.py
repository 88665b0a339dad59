"""Numbers and rows of numbers: reading, writing, and the functions that recurrences are made of.

exp, sigmoid and tanh are written here because the library's versions are calls, and a loop that
contains a call does not become vector instructions.
"""

import numpy as np
from numba.extending import overload

from seqlm.ops.cpu.compile import inlined

F32, I32, U32, U16 = np.float32, np.int32, np.uint32, np.uint16
ONE, HALF = F32(1), F32(0.5)


# numba chooses the body of an `overload` by the argument types when it compiles a loop, so that one
# loop reads and writes both float32 and bfloat16


def read(x):
    """A number from memory, as float32."""


@overload(read)
def _read(x):
    if x.bitwidth == 16:  # bfloat16 is the upper half of a float32's bits
        return lambda x: U32(U32(x) << U32(16)).view(F32)
    return lambda x: x


def write(row, j, x):
    """row[j] = x; rounded to nearest, ties to even, where the row is bfloat16."""


@overload(write)
def _write(row, j, x):
    if row.dtype.bitwidth == 32:

        def unchanged(row, j, x):
            row[j] = x

        return unchanged

    def rounded(row, j, x):
        # the lower 16 bits are cut off.  Adding half of their range first rounds to nearest, and
        # adding the lowest kept bit breaks ties to even.  NaN could overflow to infinity this way,
        # so it has a value of its own.
        bits = F32(x).view(U32)
        up = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
        row[j] = U16(up >> U32(16)) if x == x else U16(0x7FC0)

    return rounded


# These replace out[:] = x, for which numba also compiles an error message: two seconds a loop.


@inlined()
def load(out, x):
    for j in range(len(out)):
        out[j] = read(x[j])


@inlined()
def store(out, x):
    for j in range(len(out)):
        write(out, j, x[j])


@inlined()
def fill(out, x):
    for j in range(len(out)):
        out[j] = x


@inlined()
def exp(x):
    """e^x to 2 units in the last place; x beyond +-87 counts as +-87, so that nothing overflows.

    x = n ln 2 + r, and e^x = 2^n e^r: a polynomial for e^r, and n added to the exponent's bits.
    Coefficients: Cephes, expf (Moshier 1989).
    """
    x = min(max(x, F32(-87)), F32(87))
    # adding 1.5 * 2^23 leaves no bits for a fraction, so it rounds x / ln 2 to an integer
    n = x * F32(1.44269504) + F32(12582912)
    n = n - F32(12582912)
    # ln 2 is the sum of two numbers; the first has few bits, so that n times it is exact
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


@inlined()
def sigmoid(x):
    """Returns sigmoid(x) and 1 - sigmoid(x), both accurate where they are near 0."""
    e = exp(-x)
    s = ONE / (ONE + e)
    return s, e * s


@inlined()
def tanh(x):
    """Returns tanh(x), with an absolute error of 1e-7, and its slope 1 - tanh(x)^2."""
    e = exp(-(x + x))
    r = ONE / (ONE + e)
    return (ONE - e) * r, F32(4) * (e * r) * r


@inlined()
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
    beyond = HALF * p * t * e  # P(X > |x|)
    return ONE - beyond if x > F32(0) else beyond, F32(0.39894228) * e


# The functions below take only one or two rows.  The compiler vectorises a loop only if its arrays
# do not overlap, which it tests at run time, and it does not test more than two or three arrays.


@inlined()
def sigmoids(x, scale):
    """In place: scale * sigmoid(x)."""
    for j in range(len(x)):
        x[j] = scale * sigmoid(x[j])[0]


@inlined()
def tanhs(x):
    """In place: tanh(x)."""
    for j in range(len(x)):
        x[j] = tanh(x[j])[0]


@inlined()
def add(out, x):
    for j in range(len(out)):
        out[j] += read(x[j])


@inlined()
def add_scaled(out, x, y):
    for j in range(len(out)):
        out[j] += x[j] * y[j]
