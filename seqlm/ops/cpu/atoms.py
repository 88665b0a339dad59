"""What compiled loops need beyond numba: raw memory, several dot products at once, atomic words.

Every dot product has 8 partial sums, added up in one order, however many are computed at once.  So
a row's result depends neither on the other rows nor on the number of threads, to the last bit.
"""

# R rows, O outputs

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # partial sums of a dot product
WORD, FLOAT, SIZE = ir.IntType(64), ir.FloatType(), 4  # bytes of a float32
HALF_SIZE = 2  # bytes of a bfloat16: the upper half of a float32
# compiled loops call these without the first argument
loops_only: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
CONTRACT = ("contract",)  # a product and a sum may become one instruction


def dots(rows: int, outputs: int, w_size: int = SIZE) -> Callable[..., Any]:
    """An intrinsic for `rows` x `outputs` dot products.

    w_size: SIZE for a w in float32, HALF_SIZE for bfloat16; x and all sums are float32.
    Its arguments: the address of the first row of x, the bytes from one row to the next, the same
    two for w, and the number of terms.  Returns a tuple of float32, output by output for each row.
    """

    load_w = _load if w_size == SIZE else _load_half

    @loops_only
    def products(context, x, x_bytes, w, w_bytes, terms):
        result = types.UniTuple(types.float32, rows * outputs)

        def code(context, builder, signature, arguments):
            x, x_bytes, w, w_bytes, terms = arguments

            def starts(base: Any, step: Any, count: int) -> list[Any]:
                return [builder.add(base, builder.mul(step, WORD(i))) for i in range(count)]

            def add_products(sums: list[Any], place: Any, kind: Any) -> None:
                of_x = [_load(builder, at, place, kind) for at in starts(x, x_bytes, rows)]
                of_w = [load_w(builder, at, place, kind) for at in starts(w, w_bytes, outputs)]
                pairs = [(a, b) for a in of_x for b in of_w]
                for total, (a, b) in zip(sums, pairs, strict=True):
                    product = builder.fmul(a, b, flags=CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=CONTRACT), total)

            lanes = ir.VectorType(FLOAT, LANES)
            count, whole = range(rows * outputs), builder.udiv(terms, WORD(LANES))
            zeros = ir.Constant(lanes, [0.0] * LANES)
            sums = [cgutils.alloca_once_value(builder, zeros) for _ in count]
            with cgutils.for_range(builder, whole) as loop:
                add_products(sums, builder.mul(loop.index, WORD(LANES)), lanes)
            totals = [
                cgutils.alloca_once_value(builder, _sum(builder, builder.load(lane_sums)))
                for lane_sums in sums
            ]
            rest = builder.mul(whole, WORD(LANES))
            with cgutils.for_range_slice(builder, rest, terms, WORD(1)) as (place, _):
                add_products(totals, place, FLOAT)
            return context.make_tuple(
                builder, signature.return_type, [builder.load(total) for total in totals]
            )

        return result(x, x_bytes, w, w_bytes, terms), code

    return products


def _load(builder: Any, start: Any, place: Any, kind: Any, size: int = SIZE) -> Any:
    """The number, or the vector of numbers, whose first is number `place` from the address `start`.

    size: bytes of a number.
    """
    address = builder.add(start, builder.mul(place, WORD(size)))
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=size, typ=kind)


def _load_half(builder: Any, start: Any, place: Any, kind: Any) -> Any:
    """The same from numbers in bfloat16, as float32; kind: FLOAT, or a vector of LANES."""
    half, word = ir.IntType(16), ir.IntType(32)
    upper = ir.Constant(word, 16)
    if kind is not FLOAT:
        half, word = ir.VectorType(half, LANES), ir.VectorType(word, LANES)
        upper = ir.Constant(word, [16] * LANES)
    bits = builder.zext(_load(builder, start, place, half, HALF_SIZE), word)
    return builder.bitcast(builder.shl(bits, upper), kind)


def _sum(builder: Any, vector: Any) -> Any:
    """The sum of a vector's numbers: halves are added until one number is left."""
    size = vector.type.count
    while size > 1:
        size //= 2
        halves = (
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), size), [*places])
            )
            for places in (range(size), range(size, 2 * size))
        )
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.IntType(32)(0))


@loops_only
def pointer_to_words(context, address):
    """Converts an address to a pointer to int64."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], WORD.as_pointer())

    return types.CPointer(types.int64)(address), code


# The words at these addresses are shared by threads.  What a thread wrote before it stores a word,
# another thread sees after it has loaded that word.


@loops_only
def load_word(context, address):
    def code(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], WORD.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8, typ=WORD)

    return types.int64(address), code


@loops_only
def store_word(context, address, value):
    def code(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], WORD.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(address, types.int64), code


@loops_only
def add_to_word(context, address, value):
    def code(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], WORD.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(address, types.int64), code


@loops_only
def replace_word(context, address, old, new):
    """Stores `new` if the word is `old`; returns whether it was."""

    def code(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], WORD.as_pointer())
        pair = builder.cmpxchg(pointer, *arguments[1:], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(address, types.int64, types.int64), code
