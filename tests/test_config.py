import tomllib

import pytest

from seqlm.config import Config, changes, parse_assignment, presets, read_toml, resolve, seconds
from seqlm.errors import InputError, UsageError


def test_a_configuration_comes_back_from_toml_unchanged(tmp_path):
    config = resolve("base", None, {"cell.name": "mingru,lem", "cell.lem.dt": 0.5})
    (tmp_path / "config.toml").write_text(config.toml())
    assert Config().updated(read_toml(tmp_path / "config.toml")) == config


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nwidth = 48\nlayers = 3\n")
    config = resolve("tiny", file, {"model.layers": 5})
    assert (config.model.width, config.model.layers, config.model.mlp) == (48, 5, 2.0)


@pytest.mark.parametrize("beta2", [0.95, 0.99])
def test_an_older_file_has_the_half_life_that_is_its_beta2_in_a_step_of_its_size(tmp_path, beta2):
    file = tmp_path / "old.toml"
    file.write_text(f"[train]\nbatch = 64\nlength = 256\n[optim]\nbeta2 = {beta2}\n")
    config = Config().updated(read_toml(file))
    assert 0.5 ** (64 * 256 / config.optim.half_life) == pytest.approx(beta2)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_describes_a_model_of_every_cell(preset):
    from seqlm import cells
    from seqlm.training import launch

    for cell in cells.names():
        assert launch.configuration(preset, None, {"cell.name": cell})[0].cell.name == cell


def test_a_preset_leaves_out_the_options_of_cells_that_are_not_in_the_stack():
    assert set(resolve("large", None, {"cell.name": "cfc"}).cell.options) == {"cfc"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"model.widht": 3}, "Unknown configuration key 'model.widht'. Did you mean 'model.width'"),
        ({"modle.width": 3}, "Did you mean 'model.width'"),
        ({"model.width": 0}, "model.width is 0; it must be at least 1."),
        ({"model.width": 10**9}, "model.width is 1000000000; it must be at most 65536."),
        ({"train.seed": 10**30}, f"train.seed is {10**30}; it must be at most 2147483647."),
        ({"train.steps": 2**63}, f"train.steps is {2**63}; it must be at most {2**63 - 1}."),
        ({"train.steps": -(10**30)}, f"train.steps is {-(10**30)}; it must be at least 0; "),
        ({"model.width": 2.5}, "model.width is 2.5; it must be a whole number."),
        ({"model.width": True}, "model.width is True; it must be a whole number."),
        ({"model.tie": 1}, "model.tie is 1; it must be true or false."),
        ({"model.dropout": 1.0}, "model.dropout is 1.0; it must be at most 0.95."),
        ({"optim.lr": 0}, "optim.lr is 0.0; it must be greater than 0."),
        ({"optim.lr": float("nan")}, "optim.lr is nan; it must be a finite number."),
        ({"optim.lr": "high"}, "optim.lr is 'high'; it must be a number."),
        ({"train.state": "keep"}, "train.state is 'keep'; it must be one of: carry, reset."),
        ({"train.time_limit": "5x"}, "'5x' is not a duration"),
        ({"cell.name": 3}, "cell.name is 3; it must name a cell"),
        ({"train.steps": 5, "train.time_limit": "5m"}, "Choose --steps or --time-limit"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_can(given, message):
    with pytest.raises(UsageError) as error:
        resolve("tiny", None, given)
    assert message in str(error.value)


def test_what_a_preset_has_for_a_cell_counts_where_the_stack_is_of_it_alone(tmp_path, monkeypatch):
    preset = "[model]\nwidth = 8\n[when.lem.model]\nwidth = 9\n[when.lem.cell.lem]\ndt = 0.5\n"
    (tmp_path / "odd.toml").write_text(preset)
    monkeypatch.setattr("seqlm.config.PRESETS", tmp_path)
    found = {
        cell: resolve("odd", settings={"cell.name": cell})
        for cell in ("lem", "lem, lem", "lem,cfc")
    }
    assert [config.model.width for config in found.values()] == [9, 9, 8]
    assert [config.cell.options for config in found.values()] == [*[{"lem": {"dt": 0.5}}] * 2, {}]
    assert resolve("odd", settings={"cell.name": "lem", "model.width": 7}).model.width == 7


@pytest.mark.parametrize("preset, cell", [("tiny", "mingru"), ("small", "cfc")])
def test_a_given_rate_counts_for_both_optimizers(preset, cell):
    alone = resolve(preset, None, {"cell.name": cell})
    assert alone.optim.adam_lr > 0
    given = resolve(preset, None, {"cell.name": cell, "optim.lr": 1e-4})
    assert (given.optim.lr, given.optim.adam_lr) == (1e-4, 0.0), "0: a tenth"
    both = resolve(preset, None, {"cell.name": cell, "optim.lr": 1e-4, "optim.adam_lr": 0.3})
    assert both.optim.adam_lr == 0.3


@pytest.mark.parametrize("key", ["optim.adam_lr", "optim.momentum"])
def test_what_only_muon_has_is_refused_with_adamw(key):
    with pytest.raises(UsageError, match=f"{key} has an effect with Muon only, but optim.name is"):
        resolve("small", None, {"optim.name": "adamw", key: 0.5})
    assert resolve("small", None, {key: 0.5}).flat()[key] == 0.5


def test_the_preset_small_has_a_rate_for_each_optimizer():
    assert resolve("small").optim.lr == 0.06
    assert resolve("small", settings={"optim.name": "adamw"}).optim.lr == 0.006
    given = {"optim.name": "adamw", "cell.name": "cfc"}
    assert resolve("small", settings=given).optim.lr == 0.006
    assert resolve("small", settings={**given, "optim.lr": 0.5}).optim.lr == 0.5


def test_what_a_preset_has_for_a_short_time_counts_up_to_this_limit(tmp_path, monkeypatch):
    preset = "[model]\nwidth = 8\n[when.lem.model]\nwidth = 9\n"
    preset += "[within.90s.model]\nwidth = 3\n[within.5m.model]\nwidth = 5\nlayers = 2\n"
    (tmp_path / "odd.toml").write_text(preset)
    monkeypatch.setattr("seqlm.config.PRESETS", tmp_path)

    def shape(**settings):
        found = resolve("odd", settings={f"train.{key}": value for key, value in settings.items()})
        return found.model.width, found.model.layers

    assert shape(time_limit="90s") == (3, 2)
    assert shape(time_limit="91s") == shape(time_limit="5m") == (5, 2)
    assert shape(time_limit="6m") == shape(steps=7) == (8, 4)
    given = {"cell.name": "lem", "train.time_limit": "5m", "model.layers": 1}
    model = resolve("odd", settings=given).model
    assert (model.width, model.layers) == (5, 1)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="Unknown preset 'smal'. Did you mean 'small'"):
        resolve("smal")


def test_a_time_limit_takes_the_place_of_the_presets_steps():
    config = resolve("tiny", None, {"train.time_limit": "5m"})
    assert (config.train.steps, config.train.time_limit) == (0, 300.0)
    assert resolve("tiny", None, {"train.steps": 7}).train.time_limit == 0


@pytest.mark.parametrize("text, value", [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_durations_are_read_as_seconds(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    "text, value",
    [("a.b=3", 3), ("a.b=0.5", 0.5), ("a.b=true", True), ("a.b=linear", "linear"), ("a.b=", "")],
)
def test_an_assignment_is_read_as_toml_or_as_bare_text(text, value):
    assert parse_assignment(text) == ("a.b", value)


def test_an_assignment_without_a_value_says_how_to_write_one():
    with pytest.raises(UsageError, match="write it as key=value"):
        parse_assignment("model.width")


def test_changes_lists_what_differs():
    old = resolve("tiny")
    new = old.updated({"optim.lr": 0.1})
    assert changes(old, new) == {"optim.lr": (old.optim.lr, 0.1)}
    assert changes(old, old) == {}


def test_a_damaged_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no.toml: No such file"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[model")
    with pytest.raises(InputError, match="bad.toml is not valid TOML"):
        read_toml(tmp_path / "bad.toml")


def test_every_value_has_a_meaning_for_people():
    from dataclasses import fields

    for section in fields(Config):
        for item in fields(section.type):
            if section.name != "cell":
                assert item.metadata["doc"].endswith("."), item.name
    assert tomllib.loads(Config().toml())["model"]["width"] == 256


def test_an_option_of_all_cells_takes_the_place_of_what_a_preset_says_of_one():
    from seqlm.training import launch

    def expansion(given):
        config, _ = launch.configuration("small", None, {"cell.name": "mingru", **given})
        return config.cell.options["mingru"]["expansion"]

    given = {"cell.name": "mingru"}
    assert resolve("small", settings=given).cell.options == {"mingru": {"expansion": 1.5}}
    assert expansion({"cell.expansion": 2.0}) == 2.0
    assert expansion({"cell.mingru.expansion": 3.0, "cell.expansion": 2.0}) == 3.0


def test_an_option_that_is_gone_is_read_where_it_meant_what_is_left(tmp_path):
    """Runs of LEM were saved with heads = 1, the dense matrices that it still has."""
    path = tmp_path / "config.toml"
    path.write_text("[cell]\nname = 'lem'\n[cell.lem]\nheads = 1\ndt = 0.5\n")
    assert read_toml(path) == {"cell.name": "lem", "cell.lem.dt": 0.5}
    path.write_text("[cell.lem]\nheads = 4\n")
    assert read_toml(path) == {"cell.lem.heads": 4}
