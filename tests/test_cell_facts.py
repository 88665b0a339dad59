"""seqlm cells: what it says of a cell is what the cell is."""

import pytest

from seqlm import cells
from seqlm.lab.cells import GROUPS, facts

D = 256  # width of the preset small


@pytest.mark.parametrize(
    "name, multiplications",
    [
        ("lem", 8 * 192 * 192),  # the preset's width
        ("gru", 6 * D * D),
        ("ltc", 4 * D * D),  # three unfolds
        # 512 channels of 16 states: in, selection, step size, out; convolution; C h
        ("mamba", 2 * 512 * D + 512 * 48 + 16 * 512 + 512 * D + 512 * 4 + 512 * 16),
        ("attention", 4 * D * D + 2 * D * 257),  # the window, and the character itself
    ],
)
def test_multiplications_are_those_of_the_equations(name, multiplications):
    assert facts(name).multiplications == multiplications


def test_sizes_are_those_of_the_preset():
    mingru = facts("mingru")
    assert (mingru.width, mingru.preset_options) == (D, {"expansion": 1.5})
    assert (mingru.state, mingru.state_widths) == (384, 1.5)
    assert mingru.parameters == 3 * 384 * D + 2 * 384 + D


@pytest.mark.parametrize(
    "name, option, values",
    [
        ("lem", "dt", "number above 0 and at most 1"),
        ("lem", "recurrence", "one of dense, diagonal"),
        ("minlstm", "normalize", "true or false"),
        ("minlstm", "forget_bias", "number"),
        ("attention", "context", "whole number from 1 to 65,536"),
        ("attention", "heads", "whole number from 1 to 128"),
    ],
)
def test_legal_values_are_those_of_the_cells_errors(name, option, values):
    assert facts(name).options[option].values == values


@pytest.mark.parametrize("name", cells.names())
def test_every_cell_says_its_group_its_source_and_the_meaning_of_each_option(name):
    cell = facts(name)
    assert cell.group in GROUPS
    assert cell.source
    assert all(option.meaning.endswith(".") for option in cell.options.values())


def test_a_docstring_is_divided_into_its_parts():
    cell = facts("cornn")
    assert cell.about == "coupled, damped and driven oscillators, a baseline."
    assert cell.equations.split("\n")[1] == "y_t = y_{t-1} + dt z_t"
    assert cell.text.startswith("    z_t = z_{t-1} + dt (tanh(")
    assert cell.source.startswith("Rusch and Mishra, Coupled Oscillatory Recurrent Neural Network,")
    assert cell.options["gamma"].meaning == "the squared frequency."
    assert cell.text.endswith("Matrices start as nn.Linear does.")


def test_one_cell_is_described(seqlm_command):
    out = seqlm_command("cells", "lem").out
    assert out.startswith("LEM, the long expressive memory: two coupled states with learned")
    assert "\n\n    D_t  = dt sigmoid(W_1" in out
    assert "\nmultiplications per character\t294,912\n" in out
    assert "\ncell.dt\tnumber above 0 and at most 1\t1.0\tthe largest time step; a" in out


def test_the_cells_are_listed_in_their_groups(seqlm_command):
    _, *lines = seqlm_command("cells").out.splitlines()
    headings = list(dict.fromkeys(line.split("\t")[0] for line in lines))
    assert headings == [heading for heading in GROUPS.values() if heading in headings]


def test_a_cell_of_ones_own_needs_neither_group_nor_defaults(tmp_path, seqlm_command):
    text = '''"""own: a cell."""
from seqlm.cells import Recurrence
class Own(Recurrence):
    """rate: how fast it forgets."""
    def __init__(self, width: int, *, rate: float, units: int = 4):
        assert units > 0
        super().__init__()
'''
    (tmp_path / "own.py").write_text(text)
    (cell,) = seqlm_command("cells", tmp_path / "own.py", "--json").json["cells"]
    assert (cell["group"], cell["parameters"]) == ("other", None)
    rate = {"meaning": "how fast it forgets.", "values": "number", "default": None}
    assert cell["options"]["rate"] == rate
    assert cell["options"]["units"]["values"] == "whole number"
