"""What the loops of LEM and CfC share: gated means of states, CfC's two heads, their gradients.

Gradients are computed in place, because a loop over few arrays becomes vector instructions.
"""

from seqlm.ops.cpu.compile import inlined
from seqlm.ops.cpu.numbers import ONE, add_scaled, read, sigmoid, tanh


@inlined()
def mix(state, new, gate):
    """In place: state becomes (1 - gate) state + gate new."""
    for j in range(len(state)):
        state[j] += gate[j] * (new[j] - state[j])


@inlined()
def mix_gradients(d_state, old, new, gate, dt):
    """The gradient of state = mix(old, tanh(new), dt sigmoid(gate)).

    In place: d_state holds dL/d(state), then dL/d(old).  new and gate hold their values, then
    dL/d(new) and dL/d(gate).
    """
    for j in range(len(d_state)):
        (g, rest), (f, slope) = sigmoid(gate[j]), tanh(new[j])
        new[j] = d_state[j] * dt * g * slope
        gate[j] = d_state[j] * (f - read(old[j])) * dt * g * rest
        d_state[j] *= ONE - dt + dt * rest


@inlined()
def add_second_head(first, second, gate, gated):
    """In place: first holds tanh(f_1), then the new h.  second: tanh(f_2).  gate: s."""
    if gated:
        mix(first, second, gate)
    else:
        add_scaled(first, gate, second)


@inlined()
def head_gradients(dh, f_1, f_2, gate, gated):
    """The gradient of h = tanh(f_1) (1 - s) + s tanh(f_2), s = sigmoid(gate); dh: dL/dh.

    In place: f_1, f_2 and gate hold their values, then dL/d(f_1), dL/d(f_2) and dL/d(gate).
    """
    for j in range(len(dh)):
        g, rest = sigmoid(gate[j])
        (u, u_slope), (v, v_slope) = tanh(f_1[j]), tanh(f_2[j])
        f_1[j] = (dh[j] * rest if gated else dh[j]) * u_slope
        f_2[j] = dh[j] * g * v_slope
        gate[j] = dh[j] * (v - u if gated else v) * g * rest
