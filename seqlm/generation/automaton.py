"""A program: a regex from standard input -> its automaton over bytes, to standard output.

It is a process of its own because the construction may take hours, and cannot be interrupted.  It
imports nothing of seqlm, so that it starts in a tenth of a second.

Column b of the table, 0 to 255, has the state after byte b, and -1 where no match goes on.  Column
256 is 1 for an accepting state, else 0.  State 0 is the first one.
"""

import sys

import numpy as np
from outlines_core import Index, Vocabulary

BYTES = 256
# Outlines-core drops edges that go on after a match, and stops at the first alternative that
# matches.  So a match ends with a character that no text has, and never goes on after it.
END = chr(sys.maxunicode)


def table(regex: str) -> np.ndarray:
    """(states, 257) int32; ValueError for a regex that the library refuses."""
    tokens = {bytes([byte]): [byte] for byte in range(BYTES)}
    index = Index(f"(?:{regex}){END}", Vocabulary(BYTES, tokens))
    transitions = index.get_transitions()
    numbers = {index.get_initial_state(): 0}
    for edges in transitions.values():
        for state in edges.values():
            numbers.setdefault(state, len(numbers))
    rows = np.full((len(numbers) + 1, BYTES + 1), -1, dtype=np.int32)
    for state, edges in transitions.items():
        for byte, target in edges.items():
            # BYTES itself is the library's end of the text; what follows END is in no numbers
            if byte < BYTES and state in numbers:
                rows[numbers[state], byte] = numbers[target]
    final = np.isin(rows, [numbers[state] for state in index.get_final_states()])
    if final[:, : END.encode()[-1]].any():
        raise ValueError("its parentheses do not match")
    after = np.arange(len(rows))
    for byte in END.encode():
        after = rows[after, byte]  # -1, the row of no state, stays -1
    rows[:, BYTES] = np.isin(after, rows[final])
    rows[final] = -1
    return rows[:-1]


if __name__ == "__main__":
    try:
        found = table(sys.stdin.buffer.read().decode("utf-8"))
    except ValueError as error:
        sys.exit(str(error))
    np.save(sys.stdout.buffer, found)
