"""The activation functions of a network of one layer, such as CfC's backbone."""

from seqlm.ops.cpu.compile import inlined
from seqlm.ops.cpu.numbers import F32, ONE, normal, sigmoid, tanh

LECUN_TANH, TANH, RELU, SILU, GELU = range(5)  # the order of cfc_scan.ACTIVATIONS


@inlined()
def activate(x, kind):
    """In place: f(x) for a row."""
    for j in range(len(x)):
        x[j] = activation(x[j], kind)[0]


@inlined()
def activation(x, kind):
    """Returns f(x) and f'(x)."""
    if kind == RELU:
        return max(x, F32(0)), ONE if x > F32(0) else F32(0)
    if kind == SILU:
        s, rest = sigmoid(x)
        return x * s, s + x * s * rest
    if kind == GELU:
        below, density = normal(x)
        return x * below, below + x * density
    if kind == TANH:
        return tanh(x)
    f, slope = tanh(F32(0.666) * x)
    return F32(1.7159) * f, F32(1.7159 * 0.666) * slope
