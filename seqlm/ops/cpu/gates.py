"""What the loops of LEM and CfC share: gated means of states, CfC's two heads, their gradients."""

from seqlm.ops.cpu.compile import part
from seqlm.ops.cpu.numbers import ONE, add_scaled, read, sigmoid, tanh


@part()
def mix(state, new, gate):
    """In place: state becomes (1 - gate) state + gate new."""
    for c in range(len(state)):
        state[c] += gate[c] * (new[c] - state[c])


@part()
def mix_gradients(d, old, new, gate, dt):
    """The gradient of state = mix(old, tanh(new), dt sigmoid(gate)).

    In place: d holds dL/dstate, then dL/dold.  new and gate hold what goes into the tanh and into
    the sigmoid, then the gradients of these.
    """
    for c in range(len(d)):
        (g, rest), (f, slope) = sigmoid(gate[c]), tanh(new[c])
        new[c] = d[c] * dt * g * slope
        gate[c] = d[c] * (f - read(old[c])) * dt * g * rest
        d[c] *= ONE - dt + dt * rest


@part()
def add_second_head(first, second, gate, gated):
    """In place: first holds tanh(f_1), then the new h; second: tanh(f_2), gate: s."""
    if gated:
        mix(first, second, gate)
    else:
        add_scaled(first, gate, second)


@part()
def head_gradients(d, f_1, f_2, gate, gated):
    """The gradient of h = tanh(f_1) (1 - s) + s tanh(f_2), s = sigmoid(gate); d: dL/dh.

    In place: f_1, f_2 and gate hold what goes into both tanh and the sigmoid, then their gradients.
    """
    for c in range(len(d)):
        g, rest = sigmoid(gate[c])
        (u, u_slope), (v, v_slope) = tanh(f_1[c]), tanh(f_2[c])
        f_1[c] = (d[c] * rest if gated else d[c]) * u_slope
        f_2[c] = d[c] * g * v_slope
        gate[c] = d[c] * (v - u if gated else v) * g * rest
