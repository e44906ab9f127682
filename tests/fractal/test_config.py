"""The documents' flags and names, their defaults, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml

from meloformer.command_line import load
from meloformer.config import Config
from meloformer.device import choose_device
from meloformer.errors import UserError
from meloformer.families import FAMILIES, config_class, family_of_command_line
from meloformer.fractal.config import FractalConfig, FractalModel
from meloformer.settings import read_values
from meloformer.training.distributed import joined
from tests.conftest import ROOT

# As in the documents, with their defaults.
DEFAULTS = (
    "--train_data train.txt --val_data valid.txt --crop_length 256 --augment_factor 1 --pitch_shift_min -3 "
    "--pitch_shift_max 3 --train_batch_size 8 --val_batch_size 8 --max_steps 200000 --lr 1e-4 --warmup_steps 2000 "
    "--weight_decay 0.05 --grad_clip 3.0 --accumulate_grad_batches 1 --generator_types mar,mar,mar,mar "
    "--scan_order row_major --mask_ratio_loc 1.0 --mask_ratio_scale 0.5 --num_workers 4 --precision 32 "
    "--log_every_n_steps 50 --val_check_interval_steps 2000 --checkpoint_every_n_steps 5000 "
    "--log_images_every_n_steps 5000 --num_images_to_log 4 --save_top_k 3"
)


def read(words: str) -> FractalConfig:
    return load(FractalConfig, words.split())


def test_the_documented_flags_have_the_documented_defaults():
    plain = read("--train_data train.txt --val_data valid.txt")
    assert read(DEFAULTS) == plain
    training = plain.training
    assert (training.learning_rate, training.min_lr, training.max_grad_norm) == (1e-4, 1e-6, 3.0)
    assert (training.beta1, training.beta2, training.optimizer) == (0.9, 0.95, "adamw")
    assert plain.model.img_size_list == [128, 16, 4, 1] and plain.model.num_blocks_list == [12, 3, 2, 1]
    assert not training.gradient_checkpointing and not training.fast_dev_run and plain.data.cache_in_memory


def test_the_switches():
    config = read("--train_data a --grad_checkpoint --no_cache_in_memory --fast_dev_run --devices 1")
    assert config.training.gradient_checkpointing and not config.data.cache_in_memory
    assert config.training.max_steps == 3 and config.training.device == "1"


@pytest.mark.parametrize("words", ["ar,ar,mar,mar", "ar ar mar mar", "ar, ar, mar, mar"])
def test_generator_types_with_commas_or_spaces_in_one_word_or_several(words):
    for argv in (words.split(), [words]):
        config = load(FractalConfig, ["--train_data", "a", "--generator_types", *argv, "--crop_length", "128"])
        assert config.model.kinds == ["ar", "ar", "mar"] and config.data.crop_length == 128
    assert read("--train_data a --generator_types ar mar mar").model.kinds == ["ar", "mar", "mar"]


def test_a_list_with_spaces_leaves_an_override_alone():
    config = read("--train_data a --generator_types ar ar ar model.dropout=0.1")
    assert config.model.kinds == ["ar"] * 3 and config.model.dropout == 0.1


def test_the_documents_yaml_is_read(tmp_path):
    path = tmp_path / "train.yaml"
    given = {
        "model": {"img_size_list": [128, 16, 4, 1], "embed_dim_list": [512, 256, 128, 64], "grad_checkpointing": True},
        "training": {"accumulate_grad_batches": 16, "train_batch_size": 4, "val_batch_size": 4},
        "data": {"train_data": "train.txt", "crop_length": 512},
        "generation_length": 256,
        "num_blocks_list": [12, 3, 2, 1],
        "num_heads_list": [8, 4, 2, 2],
        "patch_size": 4,
    }
    path.write_text(yaml.safe_dump(given))
    config = read(f"--config {path}")
    assert config.training.gradient_checkpointing and config.training.gradient_accumulation_steps == 16
    assert config.training.generation_length == 256 and config.data.crop_length == 512


def test_patch_size_chooses_the_list():
    assert FractalModel(patch_size=8).img_size_list == [128, 16, 8, 1]
    coarse = FractalModel(patch_size=16)
    coarse.validate()
    assert coarse.img_size_list == [128, 16, 1] and coarse.embed_dim_list == [512, 256, 64]


def test_what_is_saved_reads_back(tmp_path):
    config = read("--train_data a --patch_size 16 --generator_types ar,ar --generation_length 64")
    config.save(tmp_path / "config.yaml")
    assert family_of_command_line(["--config", str(tmp_path / "config.yaml")]) == "fractal"
    assert load(FractalConfig, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("name", ["fractal_crop128", "fractal_crop256", "fractal_crop512", "fractal_demo"])
def test_the_configs_that_come_along(name):
    path = ROOT / "configs" / f"{name}.yaml"
    assert family_of_command_line(["--config", str(path)]) == "fractal"
    config = load(FractalConfig, ["--config", str(path), "--train_data", "train.txt"])
    if name.startswith("fractal_crop"):
        assert config.data.crop_length == int(name[-3:])
    default = read("--train_data train.txt").to_dict()
    given = read_values(FractalConfig, yaml.safe_load(path.read_text()), name)
    same = [key for key, value in given.items() if key != "family" and value == default_of(default, key)]
    assert path.read_text().startswith("# ") and not same, f"these are the defaults: {same}"


def default_of(settings: dict, dotted: str):
    section, name = dotted.split(".")
    return settings[section][name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--img_size_list 128,16,5,1", r"5 does not divide 16"),
        ("--img_size_list 128,16,16,1", r"16 is not below 16"),
        ("--img_size_list 128,16,4", r"a list from 128, the pitches, to 1, a cell"),
        ("--embed_dim_list 64,64", r"model.embed_dim_list is \[64, 64\], must be 4 numbers"),
        ("--embed_dim_list 512,256,128,60", r"60 is not one of 8"),
        ("--generator_types mar,marr,mar", r"must be 3 or 4 words, each mar or ar"),
        ("--generator_types mar,mar", r"must be 3 or 4 words"),
        ("--scan_order diagonal", r"one of row_major, column_major"),
        ("--crop_length 130", r"data.crop_length is 130, must be a multiple of 4; 132 is the nearest"),
        ("--crop_length 0", r"must be a multiple of 4; 4 is the nearest"),
        ("--precision 16", r"training.precision is '16', must be 32, bf16 or auto; .*bf16"),
        ("--pitch_shift_min 5", r"at most pitch_shift_max \(3\)"),
        ("--mask_ratio_loc 0", r"model.mask_ratio_loc is 0.0, must be above 0, at most 1"),
        (
            "--preview_num_iter_list 4,2",
            r"preview_num_iter_list is \[4, 2\], must be 3 numbers, one for each level, or 4",
        ),
        ("--patch_size 5 --img_size_list 128,16,4,1", r"model.img_size_list|model.patch_size"),
        ("--lrr 1", r"--lrr: no such flag; the nearest is --lr"),
    ],
)
def test_what_cannot_be_is_one_line(words, said):
    with pytest.raises(UserError, match=said) as caught:
        read(f"--train_data a {words}")
    assert "\n" not in str(caught.value)


# --- which family -------------------------------------------------------------------------------------------------


def test_the_family_is_said_by_flag_or_yaml_or_checkpoint(tmp_path):
    assert family_of_command_line([]) == "meloformer"
    assert family_of_command_line(["--family=fractal"]) == "fractal"
    (tmp_path / "a.yaml").write_text("family: fractal\n")
    words = ["--config", str(tmp_path / "a.yaml")]
    assert family_of_command_line(words) == "fractal"
    assert family_of_command_line([*words, "--family", "meloformer"]) == "meloformer"
    (tmp_path / "config.json").write_text('{"family": "fractal"}')
    assert family_of_command_line(["--checkpoint", str(tmp_path)]) == "fractal"
    nowhere = ["--checkpoint", str(tmp_path / "nowhere")]
    with pytest.raises(UserError, match="nowhere: no model there"):  # it was "--mode: no such flag"
        family_of_command_line([*nowhere, "--mode", "unconditional"])
    assert family_of_command_line([*nowhere, "--help"]) == "meloformer"
    with pytest.raises(UserError, match="--family is 'fractals', must be one of meloformer, fractal"):
        family_of_command_line(["--family", "fractals"])
    assert {name: config_class(name, "train") for name in FAMILIES} == {"meloformer": Config, "fractal": FractalConfig}


def test_choosing_a_family_needs_no_torch():
    code = "import sys, meloformer.families as f; f.config_class('fractal', 'train'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_devices_are_gpus_by_number():
    with (
        pytest.raises(UserError, match=r"devices is '0,1', and this is one process; start 2 with torchrun"),
        joined("0,1"),
    ):
        pass
    with pytest.raises(UserError, match=r"more processes than GPUs"):
        choose_device("0,1", local_rank=2)
    with pytest.raises(UserError, match=r"'cuda:7', and torch sees \d+ GPUs"):
        choose_device("6,7", local_rank=1)


def test_the_gpu_that_is_asked_for_becomes_the_current_one(monkeypatch):
    """A graph is captured on the current GPU: with --device cuda:1 it would have held nothing, and writing gone on for
    ever."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    choose_device("cpu")
    devices = [choose_device("cuda:1"), choose_device("cuda", local_rank=1), choose_device("1")]
    assert current == devices == [torch.device("cuda:1")] * 3
