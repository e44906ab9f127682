"""Configs: what is read, in which order it counts, and how a mistake is answered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from meloformer.command_config import EvaluateConfig, GenerateConfig
from meloformer.command_line import load
from meloformer.config import MODEL_SIZES, Config, DataConfig, ModelConfig, PreprocessConfig, TrainingConfig
from meloformer.errors import UserError
from meloformer.families import family_of_command_line
from meloformer.settings import describe, read_value

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [Config, PreprocessConfig, GenerateConfig, EvaluateConfig]
DATA = ["--data_dir", "processed"]


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "file.yaml"
    path.write_text(text)
    return str(path)


def refusal(*words: str, cls=Config) -> str:
    with pytest.raises(UserError) as caught:
        load(cls, list(words))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- defaults and presets ---------------------------------------------------------------------------------------


def test_the_users_defaults():
    config = load(Config, DATA)
    assert (config.model.size, config.data.max_seq_len, config.data.max_bars) == ("base", 24576, 2048)
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (4, 8)
    assert (config.training.learning_rate, config.training.epochs) == (3e-4, 100)
    assert config.data.max_samples is None


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_a_size_fills_what_is_not_given(size):
    model = load(Config, [*DATA, "--model_size", size, "--n_layer", "3"]).model
    assert model.n_layer == 3
    assert {name: getattr(model, name) for name in ("n_head", "d_model", "d_ff")} == {
        name: value for name, value in MODEL_SIZES[size].items() if name != "n_layer"
    }


def test_one_feed_forward_is_wider_so_that_the_parameter_count_stays():
    for change in ({"summary_ff": "shared"}, {"summaries": False}, {"pattern": "full_causal"}):
        assert ModelConfig(size="small", **change).d_ff == 3264  # 6 layers have 11 of 1,792 otherwise
    assert ModelConfig(size="small", summary_ff="shared", d_ff=100).d_ff == 100


def test_room_for_summaries_follows_the_row_length():
    assert DataConfig(data_dir="x").max_segments == 2048
    assert DataConfig(data_dir="x", max_seq_len=1024).max_segments == 128
    assert DataConfig(data_dir="x", max_seq_len=1024, max_segments=5).max_segments == 5


def test_a_run_is_named_after_its_size_as_the_three_commands_expect():
    assert load(Config, [*DATA, "--model_size", "small"]).training.output_dir == "runs/small"
    assert load(Config, [*DATA, "--output_dir", "here"]).training.output_dir == "here"


def test_the_learning_rate_ends_at_a_tenth_so_that_a_low_peak_needs_no_second_flag():
    assert load(Config, [*DATA, "--learning_rate", "1e-5"]).training.min_lr == pytest.approx(1e-6)
    assert "training.min_lr" in refusal(*DATA, "--learning_rate", "1e-5", "--min_lr", "1e-4")


def test_instances_do_not_share_lists():
    ModelConfig().cross_bar_offsets.append(9)
    assert ModelConfig().cross_bar_offsets == [0, 1, 2, 4]
    ModelConfig().visible["T"].append("V")
    assert ModelConfig().visible["T"] == ["T", "P"]


# --- order and spelling -----------------------------------------------------------------------------------------


def test_flags_over_yaml_over_preset_over_defaults(tmp_path):
    path = yaml_file(tmp_path, "model: {size: small, n_layer: 5}\nepochs: 7\ntraining: {batch_size: 2}\n")
    config = load(Config, ["--config", path, *DATA, "--epochs", "9"])
    assert (config.model.n_layer, config.model.d_model) == (5, 256)
    assert (config.training.epochs, config.training.batch_size) == (9, 2)


@pytest.mark.parametrize("text", ["model_size: small", "model: {size: small}", "model: {model_size: small}"])
def test_yaml_keys_flat_or_nested(tmp_path, text):
    assert load(Config, ["--config", yaml_file(tmp_path, text), *DATA]).model.size == "small"


@pytest.mark.parametrize(
    "words",
    [
        ["--max_seq_len", "512"],
        ["--max-seq-len", "512"],
        ["--max-seq-len=512"],
        ["max_seq_len=512"],
        ["data.max_seq_len=512"],
        ["data.max-seq-len=5.12e2"],
    ],
)
def test_spellings_of_one_key(words):
    assert load(Config, [*words, *DATA]).data.max_seq_len == 512


def test_overrides_may_stand_between_flags():
    config = load(Config, ["model.n_layer=2", *DATA, "epochs=3", "--batch_size", "1", "training.seed=4"])
    assert (config.model.n_layer, config.training.epochs, config.training.seed) == (2, 3, 4)


@pytest.mark.parametrize("words", [["--cross-bar-offsets", "-1,0,1"], ["--cross_bar_offsets=-1,0,1"]])
def test_a_list_may_begin_with_a_negative_number(words):
    """It was taken for a flag."""
    assert load(Config, [*words, *DATA, "--epochs", "3"]).model.cross_bar_offsets == [-1, 0, 1]
    assert load(Config, [*DATA, "--cross_bar_offsets", "-1"]).model.cross_bar_offsets == [-1]


def test_a_flag_is_no_value_of_the_one_before():
    assert "--cross_bar_offsets: expected one argument" in refusal("--cross_bar_offsets", *DATA)
    assert "--cross_bar_offsets: expected one argument" in refusal(*DATA, "--cross_bar_offsets", "-x")
    assert "-1,0: not understood here" in refusal(*DATA, "--no-summaries", "-1,0")
    assert "-1,0: not understood here" in refusal(*DATA, "--cross_bar_offsets", "0", "-1,0")


def test_switches():
    paths = ["--checkpoint", "runs/x", "--output", "out"]
    assert load(GenerateConfig, [*paths, "--plot"]).plot is True
    assert load(GenerateConfig, [*paths, "--no-plot"]).plot is False
    assert load(GenerateConfig, [*paths, "plot=true"]).plot is True
    assert load(Config, [*DATA, "--no_summaries"]).model.summaries is False


# --- types ------------------------------------------------------------------------------------------------------


def test_yaml_reads_3e_4_as_text_and_it_becomes_a_number_all_the_same(tmp_path):
    config = load(Config, ["--config", yaml_file(tmp_path, "learning_rate: 3e-4\nmax_steps: 1e3"), *DATA])
    assert config.training.learning_rate == 3e-4
    assert config.training.max_steps == 1000 and isinstance(config.training.max_steps, int)


def test_lists_mappings_and_none_from_words():
    words = ["same_bar_offsets=0,1,2", "cross_bar_offsets=[-1, 0]", "visible={T: [P]}", "max_samples=none"]
    config = load(Config, [*DATA, *words])
    assert config.model.same_bar_offsets == [0, 1, 2] and config.model.cross_bar_offsets == [-1, 0]
    assert config.model.visible == {"T": ["P"]} and config.data.max_samples is None
    assert load(Config, [*DATA, "visible=none"]).model.visible is None
    generate = ["--checkpoint", "2024", "--output", "1e3"]
    assert load(GenerateConfig, [*generate, "--instruments", "drums,33"]).instruments == ["drums", "33"]
    assert load(GenerateConfig, generate).checkpoint == "2024"
    assert load(GenerateConfig, generate).output == "1e3"


@pytest.mark.parametrize(
    "text",
    [
        "n_layer: many",
        "n_layer: 2.5",
        "n_layer: true",
        "epochs: [3]",
        "summaries: 1",
        "dropout: .nan",
        "epochs: 1:30",
    ],
)
def test_a_wrong_type_names_file_key_value_and_what_is_accepted(tmp_path, text):
    path = yaml_file(tmp_path, text)
    message = refusal("--config", path)
    assert path in message and text.split(":")[0] in message and "must be" in message


def test_numbers_are_what_people_write(tmp_path):
    """YAML 1.1 counts by eights behind a zero and by sixties around a colon, and so --seed 010 gave the pieces of seed
    8, and --bars 4:4 asked for 244 bars."""
    words = ["--checkpoint", "x", "--output", "y"]
    assert load(GenerateConfig, [*words, "--seed", "010"]).seed == 10
    assert load(GenerateConfig, [*words, "--seed", "9007199254740993"]).seed == 2**53 + 1  # no float holds it
    assert load(GenerateConfig, [*words, "--bars", "1e1"]).bars == 10
    assert "bars is '4:4', must be a whole number" in refusal(*words, "--bars", "4:4", cls=GenerateConfig)
    file = yaml_file(tmp_path, "bars: 010\ntag: 1.10\nseed: 007")
    config = load(GenerateConfig, [*words, "--config", file])
    assert (config.bars, config.tag, config.seed) == (10, "1.10", 7)


def test_a_home_is_found_in_a_file_and_before_the_family_is_known(tmp_path, monkeypatch):
    """`output: ~/out` made a folder called ~, and `generate.py --checkpoint=~/run` looked for the model in one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"family": "fractal"}')
    file = yaml_file(tmp_path, "checkpoint: ~/run\noutput: ~/out\nrewrite: [~/a]")
    config = load(GenerateConfig, ["--config=~/file.yaml", "--prompt", "a.mid"])
    assert (config.checkpoint, config.output) == (str(tmp_path / "run"), str(tmp_path / "out"))
    for words in (["--checkpoint=~/run"], ["--checkpoint", "~/run"], ["--config", file], ["--config=~/file.yaml"]):
        assert family_of_command_line(words) == "fractal"


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_a_distance_beyond_any_piece_is_refused():
    """It took the memory of a table of all distances up to it, and then a traceback."""
    message = refusal(*DATA, "--cross_bar_offsets", "0,1,100000000000")
    assert "model.cross_bar_offsets is" in message and "-16384 to 16384" in message
    assert "model.same_bar_offsets is" in refusal(*DATA, "--same_bar_offsets", "0,-20000")


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("n_layers: 3", "model.n_layer"),
        ("model: {n_layers: 3}", "model.n_layer"),
        ("data: {n_layer: 3}", "model.n_layer"),
        ("model_sise: base", "model.size"),
        ("modle: {n_layer: 3}", "model"),
        ("model: {size: smal}", "small"),
    ],
)
def test_a_wrong_name_in_a_file_names_the_nearest(tmp_path, text, nearest):
    path = yaml_file(tmp_path, text)
    message = refusal("--config", path, *DATA)
    assert message.startswith(path) and f"the nearest is {nearest}" in message


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["--n_layers", "3"], "--n_layer"),
        (["--modelsize=base"], "--model_size"),
        (["--no-sumaries"], "--summaries"),
        (["model.n_laer=3"], "model.n_layer"),
        (["--model_size", "lrge"], "large"),
    ],
)
def test_a_wrong_flag_names_the_nearest(words, nearest):
    assert f"the nearest is {nearest}" in refusal(*words, *DATA)


def test_a_name_near_nothing_points_to_help():
    assert "--help" in refusal("--zzzz", "3", *DATA)


@pytest.mark.parametrize(
    "text, part",
    [
        ("n_layer: 3\nn_layer: 4", "given twice"),
        ("n_layer: 3\nmodel: {n_layer: 4}", "given twice"),
        ("- a\n- b", "mapping"),
        ("model: 3", "section"),
        ("a: [", "not yaml"),
        ("n_layer: 3\n'n_layer': 4", "given twice"),
        ("model: {n_layer: 3, n_layer: 3}", "given twice"),
        ("data_dir: {{ path }}", "not yaml"),  # a template that nobody filled in
        ("[a]: 1", "not yaml"),
        ("output_dir: 2024-02-30", "not yaml: day is out of range"),
        ("summaries: !!bool maybe", "not yaml"),
        ("a: " + "[" * 2000, "not yaml"),
    ],
)
def test_a_broken_file_says_so(tmp_path, text, part):
    path = yaml_file(tmp_path, text)
    message = refusal("--config", path, *DATA)
    assert part in message and path in message


def test_a_merge_key_takes_in_what_the_file_does_not_say_itself(tmp_path):
    """The merge key was refused as "not yaml"."""
    text = "model: &small {size: small, n_layer: 5}\ntraining: {<<: &loop {epochs: 3, seed: 4}, epochs: 7}\n"
    config = load(Config, ["--config", yaml_file(tmp_path, text), *DATA])
    assert (config.training.epochs, config.training.seed, config.model.n_layer) == (7, 4, 5)
    nested = "model: {<<: &b {<<: {n_layer: 5, n_head: 8}, n_layer: 6}, size: small}\n"
    config = load(Config, ["--config", yaml_file(tmp_path, nested), *DATA])
    assert (config.model.n_layer, config.model.n_head) == (6, 8)


def test_other_mistakes(tmp_path):
    assert "training.max_steps is '2024-13-01', must be a whole number" in refusal(*DATA, "--max_steps", "2024-13-01")
    assert "configs/" in refusal("--config", "nowhere.yaml")
    assert "given twice" in refusal(*DATA, "--epochs", "1", "training.epochs=2")
    assert "--epochs" in refusal(*DATA, "--epochs")
    assert "stray" in refusal(*DATA, "stray")
    assert "--data_dir" in refusal()
    with pytest.raises(UserError, match=r"--family is \['fractal'\], must be one of"):
        family_of_command_line(["--config", yaml_file(tmp_path, "family: [fractal]")])
    assert "--input" in refusal("--output", "x", cls=PreprocessConfig)


@pytest.mark.parametrize(
    "word",
    [
        "n_layer=0",
        "n_head=7",
        "dropout=1",
        "same_bar_offsets=1,2",
        "visible={T: [Q]}",
        "visible={X: [T]}",
        "max_seq_len=1",
        "max_samples=0",
        "validation_fraction=1",
        "transpose_probability=2",
        "epochs=0",
        "learning_rate=0",
        "seed=18446744073709551616",
        "seed=-1",
    ],
)
def test_values_out_of_range_name_the_key(word):
    key = word.split("=")[0]
    message = refusal(*DATA, word)
    assert "must be" in message and (key in message or key == "n_head")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--bare_probability 1", "lower --bare_probability"),
        ("--key_probability 0", "raise --key_probability"),
    ],
)
def test_a_condition_that_is_never_given_cannot_be_predicted(words, remedy):
    """The run went to its end, and the model had learnt none."""
    message = refusal(*DATA, "--predict_conditions", "chords,key", *words.split())
    assert message.startswith("data.predict_conditions is ") and remedy in message


@pytest.mark.parametrize("word", ["temperature=-1", "top_p=0", "min_p=2", "tempo=5", "bars=0", f"seed={2**63}"])
def test_generation_out_of_range(word):
    message = refusal("--checkpoint", "a", "--output", "b", word, cls=GenerateConfig)
    assert word.split("=")[0] in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--continue_bars 4", "--continue_bars needs a MIDI file"),
        ("--only_new", "--only_new needs a MIDI file"),
        ("--prompt a.mid", "needs one of --continue_bars, --rewrite, --add_instruments and --anew, received none"),
        ("--anew", "--anew needs a MIDI file"),
        ("--prompt a.mid --anew --only_new", "--anew does not keep them"),
        ("--prompt a.mid --anew --prompt_bars 4", "--anew writes the first --bars"),
        ("--prompt a.mid --anew --tempo 90", "--tempo is for pieces from nothing"),
        ("--prompt a.mid --continue_bars 4 --add_instruments 33", "--continue_bars and --add_instruments"),
        ("--prompt a.mid --prompts_file b.txt --continue_bars 4", "give one of them"),
        ("--prompt a.mid --continue_bars 4 --bars 8", "--bars is for pieces from nothing"),
        ("--prompt a.mid --rewrite track=1,bars=2 --prompt_bars 8", "--rewrite names its bars"),
        ("--prompt a.mid --continue_bars 0", "continue_bars is 0"),
        ("--temperature_pitch -1", "temperature_pitch"),
        ("--soundfont a.sf2", "give --wav too"),
    ],
)
def test_flags_that_contradict_each_other(words, part):
    message = refusal("--checkpoint", "a", "--output", "b", *words.split(), cls=GenerateConfig)
    assert part in message and "\n" not in message


def test_a_list_of_words_may_be_given_in_several_flags():
    words = "--checkpoint a --output b --prompt c.mid --rewrite track=2,bars=8-16 --rewrite track=drums,bars=1"
    config = load(GenerateConfig, words.split())
    assert config.rewrite == ["track=2", "bars=8-16", "track=drums", "bars=1"]


# --- saving -----------------------------------------------------------------------------------------------------


def test_the_resolved_config_comes_back_from_its_file(tmp_path):
    words = [*DATA, "--model_size", "small", "same_bar_offsets=0,1", "visible=none", "--learning_rate", "1e-5"]
    config = load(Config, words)
    config.save(tmp_path / "config.yaml")
    assert load(Config, ["--config", str(tmp_path / "config.yaml")]) == config
    assert Config.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict(config.model.to_dict()) == config.model


def test_from_dict_is_strict():
    with pytest.raises(UserError, match=r"config.json: n_layers is not a key; the nearest is n_layer"):
        ModelConfig.from_dict({"n_layers": 3}, "config.json")


# --- the tables themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_key_has_help_a_unique_flag_and_a_default_of_its_type(cls):
    keys = cls.options()
    assert len({key.flag for key in keys}) == len(keys)
    for key in keys:
        assert key.help and describe(key.hint), key.dotted
        if key.default is not dataclasses.MISSING:
            assert read_value(key, key.default, "default") == key.default, key.dotted


# Those of the second family are read by tests/fractal/test_config.py.
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.name.startswith("fractal")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load_and_hold_differences_only(path):
    config = load(Config, ["--config", str(path), *DATA])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    default = Config(
        model=ModelConfig(size=config.model.size), data=DataConfig(data_dir="processed"), training=TrainingConfig()
    ).to_dict()
    default["model"]["size"] = "base"
    default["training"]["output_dir"] = None
    for section, values in (yaml.safe_load(text) or {}).items():
        for name in values:
            assert config.to_dict()[section][name] != default[section][name], f"{section}.{name} is the default"


def test_readme_table_of_sizes():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for size, preset in MODEL_SIZES.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {size} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:] == [str(preset[name]) for name in ("n_layer", "d_model", "n_head")]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--generated a --reference b --obedience 32", "--obedience is not read here, it goes with --checkpoint"),
        ("--generated a --reference b --split train", "--split is not read here"),
        ("--checkpoint a --max_pieces 3", "--max_pieces is not read here, it goes with --generated"),
    ],
)
def test_what_is_not_read_is_refused(words, part):
    assert part in refusal(*words.split(), cls=EvaluateConfig)
