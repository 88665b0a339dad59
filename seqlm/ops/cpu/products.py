"""Products of few rows with a matrix, as the dense recurrences take them at every step."""

from collections.abc import Callable

from seqlm.ops.cpu.atoms import HALF_SIZE, SIZE, dots
from seqlm.ops.cpu.compile import inlined
from seqlm.ops.cpu.steps import rows_at


@inlined()
def four_at(x, k):
    """x[k] to x[k + 3]: four numbers, or four rows."""
    return x[k], x[k + 1], x[k + 2], x[k + 3]


@inlined()
def four_rows(x, r, start):
    """Rows r to r + 3 of x, from the column `start` on."""
    return x[r][start:], x[r + 1][start:], x[r + 2][start:], x[r + 3][start:]


@inlined()
def four_by_four(x, r, k):
    """x[r][k] to x[r + 3][k + 3]: for each of four rows, a tuple of four numbers."""
    return four_at(x[r], k), four_at(x[r + 1], k), four_at(x[r + 2], k), four_at(x[r + 3], k)


@inlined()
def dot(x, y):
    """The product of two tuples of four."""
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]


@inlined()
def add_product(out, to, x, start, w):
    """out += x w; out's columns from `to` on, x's columns from `start` on, w: (terms, width).

    Eight rows and four terms at a time, because memory limits the speed: a number loaded from w
    then serves eight rows, and a number loaded from out serves four terms.  The remaining rows and
    terms follow one by one.
    """
    rows, terms, width = out.shape[0], w.shape[0], w.shape[1]
    by_8, by_4 = rows - rows % 8, terms - terms % 4
    for r in range(0, by_8, 8):
        o0, o1, o2, o3 = four_rows(out, r, to)
        o4, o5, o6, o7 = four_rows(out, r + 4, to)
        for k in range(0, by_4, 4):
            w0, w1, w2, w3 = four_at(w, k)
            x0, x1, x2, x3 = four_by_four(x, r, start + k)
            x4, x5, x6, x7 = four_by_four(x, r + 4, start + k)
            for j in range(width):
                column = w0[j], w1[j], w2[j], w3[j]
                o0[j] += dot(x0, column)
                o1[j] += dot(x1, column)
                o2[j] += dot(x2, column)
                o3[j] += dot(x3, column)
                o4[j] += dot(x4, column)
                o5[j] += dot(x5, column)
                o6[j] += dot(x6, column)
                o7[j] += dot(x7, column)
    for r in range(by_8, rows):
        o = out[r][to:]
        for k in range(0, by_4, 4):
            w0, w1, w2, w3 = four_at(w, k)
            x0 = four_at(x[r], start + k)
            for j in range(width):
                o[j] += dot(x0, (w0[j], w1[j], w2[j], w3[j]))
    for r in range(rows):
        o = out[r][to:]
        for k in range(by_4, terms):
            x0, w0 = x[r, start + k], w[k]
            for j in range(width):
                o[j] += x0 * w0[j]


@inlined()
def add_forward(out, h, w):
    """out += h W, where w: (P, D, D), input and output, holds W in P blocks; out: (rows, P D)."""
    for p in range(w.shape[0]):
        add_product(out, p * w.shape[1], h, 0, w[p])


@inlined()
def add_backward(dh, d_out, w):
    """dh += dL/dh for `add_forward`, from d_out = dL/d(out); w: (P, D, D), output and input."""
    for p in range(w.shape[0]):
        add_product(dh, 0, d_out, p * w.shape[1], w[p])


@inlined()
def write_dots(y, y_step, tile, rows, bias, has_bias):
    """Writes a tuple of dot products, the same number for each row, to y; adds the bias."""
    outputs = len(tile) // rows
    for r in range(rows):
        row = rows_at(y + SIZE * r * y_step, 1, outputs)[0]
        for o in range(outputs):
            total = tile[r * outputs + o]
            row[o] = total + bias[o] if has_bias else total


def products_with(w_size: int) -> Callable[..., None]:
    """`write_product` for a w in float32 (w_size: SIZE) or bfloat16 (HALF_SIZE)."""
    one, four, twice_four = (dots(*tile, w_size) for tile in ((1, 1), (1, 4), (2, 4)))

    @inlined()
    def write_product(x, x_step, w, bias, y, y_step, rows, inputs, first, end):
        """Writes the outputs `first` to `end` - 1 of y = x w^T + bias; reads each row of w once.

        x, w, bias, y: addresses; bias 0 means none.  x_step, y_step: numbers from a row to the
        next.  The last tile may compute again what the one before it computed.
        """
        biases, x_bytes, w_bytes = rows_at(bias, 1, end)[0], SIZE * x_step, w_size * inputs
        if end - first < 4:
            for o in range(first, end):
                for r in range(rows):
                    tile = one(x + r * x_bytes, 0, w + o * w_bytes, 0, inputs)
                    write_dots(y + SIZE * (r * y_step + o), 0, tile, 1, biases[o:], bias)
            return
        for start in range(first, end, 4):
            o = min(start, end - 4)
            if rows == 1:
                tile = four(x, 0, w + o * w_bytes, w_bytes, inputs)
                write_dots(y + SIZE * o, 0, tile, 1, biases[o:], bias)
                continue
            for second in range(1, rows + 1, 2):
                r = min(second, rows - 1) - 1
                tile = twice_four(x + r * x_bytes, x_bytes, w + o * w_bytes, w_bytes, inputs)
                write_dots(y + SIZE * (r * y_step + o), y_step, tile, 2, biases[o:], bias)

    return write_product


write_product = products_with(SIZE)
write_half_product = products_with(HALF_SIZE)
