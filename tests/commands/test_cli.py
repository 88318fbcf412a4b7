"""The commands: stock's flags and abbreviations, and one line with exit code 2 for what cannot work."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import SimpleITK
import torch
from factory import ModelSpec
from nnunetv2.inference import predict_from_raw_data
from oracle import INSTALLED, assert_one_line

from nnunet_lowmem.commands import cli, flags

# -- flags


class _ParserFoundError(Exception):
    pass


def built_by(entry_point: Callable[[], None]) -> argparse.ArgumentParser:
    """The parser that a command of nnU-Net builds, taken where it would parse."""
    found = []

    def keep(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        raise _ParserFoundError

    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_npp", "nnUNet_nps"):
            patch.delenv(variable, raising=False)
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        with pytest.raises(_ParserFoundError):
            entry_point()
    return found[0]


@pytest.fixture(scope="module")
def stock_parser() -> argparse.ArgumentParser:
    return built_by(predict_from_raw_data.predict_entry_point)


@pytest.fixture
def our_parser(monkeypatch) -> argparse.ArgumentParser:
    for variable in ("nnUNet_npp", "nnUNet_nps"):
        monkeypatch.delenv(variable, raising=False)
    return cli.predict_parser()


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


# what differs on purpose: the device is found, and a model folder may take the place of a dataset
OTHER_DEFAULT = {"-device"}
NOT_REQUIRED = {"-d", "-c"}


def test_every_flag_of_stock_is_there(stock_parser, our_parser):
    assert len(actions(stock_parser)) > 20
    assert set(actions(stock_parser)) <= set(actions(our_parser))


def test_flags_of_stock_store_the_same_by_default(stock_parser, our_parser):
    ours = actions(our_parser)
    for flag, action in actions(stock_parser).items():
        assert ours[flag].dest == action.dest
        assert (ours[flag].nargs, type(ours[flag])) == (action.nargs, type(action))
        if flag not in OTHER_DEFAULT and flag not in NOT_REQUIRED:
            default = list(action.default) if isinstance(action.default, tuple) else action.default
            assert ours[flag].default == default, flag
            assert ours[flag].required == action.required, flag


FORMS = {
    "by_dataset": (predict_from_raw_data.predict_entry_point, "-i in -o out -d 4 -c 2d"),
    "by_folder": (predict_from_raw_data.predict_entry_point_modelfolder, "-i in -o out -m model"),
}


def parsed(parse: Callable[[list[str]], argparse.Namespace], arguments: list[str]) -> dict[str, Any] | str:
    """What a parser makes of arguments, or why it does not."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            options = vars(parse(arguments))
    except SystemExit as end:
        return heard.getvalue().partition("error: ")[2] if end.code else "help"
    # stock makes numbers of the folds right after
    return {**options, "f": [fold if fold == "all" else int(fold) for fold in options["f"]]}


def ways_to_give(flag: str, action: argparse.Action) -> list[list[str]]:
    """Every prefix of a flag, with its value behind it or joined to it."""
    value = {int: "7", float: "0.25"}.get(action.type, "3")
    prefixes = [flag[:length] for length in range(2, len(flag) + 1) if flag[:length] != "--"]
    if action.nargs == 0:
        return [[prefix] for prefix in prefixes] + [[f"{prefix}=1"] for prefix in prefixes]
    return [
        given for prefix in prefixes for given in ([prefix, value], [f"{prefix}={value}"], [prefix + value], [prefix])
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_prefix_of_stocks_flags_means_what_it_means_to_stock(form, monkeypatch):
    """Whatever names our own flags have, now or later."""
    entry_point, command = FORMS[form]
    stock, build = built_by(entry_point), flags.predict_parser

    def with_more(by_folder: bool) -> argparse.ArgumentParser:
        parser = build(by_folder)
        for flag in ("--space", "--schedule", "--cache", "--dry", "--nothing", "--visible", "--disk", "--hold"):
            parser.add_argument(flag)
        return parser

    for variable in ("nnUNet_npp", "nnUNet_nps"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(flags, "predict_parser", with_more)
    meant = []
    for flag, action in actions(stock).items():
        for given in ways_to_give(flag, action):
            theirs = parsed(lambda words: argparse.ArgumentParser.parse_args(stock, words), [*command.split(), *given])
            ours = parsed(flags.predict_options, [*command.split(), *given])
            if isinstance(theirs, dict):
                ours = {name: ours[name] for name in theirs} if isinstance(ours, dict) else ours
                if ours["device"] is None:  # what is not given is found, where stock takes CUDA
                    ours["device"] = theirs["device"]
            assert ours == theirs, given
            meant += [given] * isinstance(theirs, dict)
    assert len(meant) > 100


@pytest.mark.parametrize(
    "given, hint",
    [
        ("--max_v 6G", "--max_v is not a flag; did you mean --max_vram?"),
        ("--max=6G", "--max is not a flag; did you mean --max_ram or --max_vram?"),
        ("--rep", "did you mean --report?"),
        ("--trust_m", "did you mean --trust_model?"),
        ("-m model -num 2", "-num is not a flag; did you mean -num_parts?"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_shortened_flags_of_ours_are_named(given, hint):
    assert hint in parsed(flags.predict_options, ["-i", "in", "-o", "out", *given.split()])


@pytest.mark.parametrize(
    "command, hint",
    [
        ("compare -i in --stock 6G", "did you mean --stock-limit?"),
        ("compare -i in --rep=2", "did you mean --repeat?"),
        ("compare -i in --d", "ambiguous option: --d could match --disable_tta, --disable_progress_bar"),
        ("run --pred plans", "did you mean --predictor?"),
        ("--vers demo", "did you mean --version?"),
    ],
)
def test_shortened_flags_of_the_other_command(command, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


STOCK_COMMANDS = [
    "-i in -o out -d 4 -c 3d_fullres",
    "-i in -o out -d 4 -c 3d_fullres -f all",
    "-i in -o out -d Dataset004_X -p plans -tr trainer -c 2d -f 0 3 all -chk best.pth --c --v --save --not",
    "-i in -o out -d 4 -c 2d -step 0.7 -num_parts 4 -part_id 3 -npp 1 -nps 0 --disable_t --disable_p -device cpu",
    "-i=in -o=out -d=4 -c=2d -prev_stage_predictions earlier -f 2",
]


@pytest.mark.parametrize("command", STOCK_COMMANDS)
def test_commands_of_stock_parse_to_the_same(command, stock_parser, our_parser):
    if INSTALLED < (2, 7) and "--not" in command:
        pytest.skip("new in nnU-Net 2.7")
    arguments = command.split()
    stock = vars(argparse.ArgumentParser.parse_args(stock_parser, arguments))
    ours = vars(our_parser.parse_args(arguments))
    stock["f"] = [fold if fold == "all" else int(fold) for fold in stock["f"]]  # stock does so right after
    for name, value in stock.items():
        if not (name == "device" and "-device" not in arguments):
            assert ours[name] == value, name


@pytest.mark.parametrize("text, expected", [("7", 7), ("0", 0), ("", 3), ("many", 3), (None, 3)])
@pytest.mark.parametrize("variable, dest", [("nnUNet_npp", "npp"), ("nnUNet_nps", "nps")])
def test_numbers_of_processes_come_from_the_environment(variable, dest, text, expected, monkeypatch):
    if text is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, text)
    if INSTALLED >= (2, 6):
        assert predict_from_raw_data._getDefaultValue(variable, int, 3) == expected
    assert cli.predict_parser().get_default(dest) == expected


# -- what can be refused before torch is loaded


@dataclass(frozen=True)
class Refusal:
    """Flags that replace those of a good command (None drops one), and words of the message."""

    flags: dict[str, str | None]
    words: tuple[str, ...]
    code: int = 2


REFUSALS: dict[str, Refusal] = {
    "no_model_given": Refusal({"-m": None}, ("-m", "-d", "-c")),
    "dataset_without_configuration": Refusal({"-m": None, "-d": "4"}, ("-m", "-c")),
    "results_folder_unknown": Refusal({"-m": None, "-d": "4", "-c": "2d"}, ("-d", "nnUNet_results", "-m")),
    "model_folder_missing": Refusal({"-m": "{root}/none"}, ("trained model folder", "{root}/none", "does not exist")),
    "model_folder_is_a_file": Refusal({"-m": "{root}/file"}, ("trained model folder", "{root}/file")),
    "model_without_plans": Refusal({"-m": "{root}/no_plans"}, ("{root}/no_plans/plans.json", "does not exist")),
    "model_without_dataset": Refusal({"-m": "{root}/images"}, ("{root}/images/dataset.json", "does not exist")),
    "fold_missing": Refusal({"-f": "3"}, ("{root}/model/fold_3/checkpoint_final.pth", "fold 0, all", "-f")),
    "fold_negative": Refusal({"-f": "-1"}, ("fold_-1", "-f")),
    "one_of_several_folds_missing": Refusal({"-f": "0 1"}, ("fold_1", "fold 0, all")),
    "checkpoint_missing": Refusal({"-chk": "best.pth"}, ("fold_0/best.pth", "no best.pth at all", "-chk")),
    "input_missing": Refusal({"-i": "{root}/none"}, ("-i", "{root}/none", "does not exist")),
    "input_is_a_file": Refusal({"-i": "{root}/file"}, ("-i", "{root}/file", "is not a folder")),
    "output_is_a_file": Refusal({"-o": "{root}/file"}, ("-o", "{root}/file", "cannot be made")),
    "output_below_a_file": Refusal({"-o": "{root}/file/a/b"}, ("-o", "{root}/file/a/b", "cannot be made")),
    "previous_stage_missing": Refusal({"-prev_stage_predictions": "{root}/none"}, ("-prev_stage", "{root}/none")),
    "tmp_dir_missing": Refusal({"--tmp_dir": "{root}/none"}, ("--tmp_dir", "{root}/none", "does not exist")),
    "tmp_dir_is_a_file": Refusal({"--tmp_dir": "{root}/file"}, ("--tmp_dir", "{root}/file", "is not a folder")),
    "max_ram_nonsense": Refusal({"--max_ram": "lots"}, ("--max_ram", "'lots'", "6G")),
    "max_ram_zero": Refusal({"--max_ram": "0"}, ("--max_ram", "'0'")),
    "max_ram_negative": Refusal({"--max_ram": "-3G"}, ("--max_ram",)),
    "max_ram_empty": Refusal({"--max_ram": ""}, ("--max_ram", "''")),
    "max_vram_nonsense": Refusal({"--max_vram": "8 gigs"}, ("--max_vram", "'8 gigs'")),
    "step_size_zero": Refusal({"-step_size": "0"}, ("-step_size", "0.0")),
    "step_size_above_one": Refusal({"-step_size": "1.5"}, ("-step_size", "1.5")),
    "step_size_nan": Refusal({"-step_size": "nan"}, ("-step_size", "nan")),
    "part_id_too_large": Refusal({"-part_id": "2", "-num_parts": "2"}, ("-part_id", "-num_parts 2")),
    "part_id_negative": Refusal({"-part_id": "-1"}, ("-part_id", "-1")),
    "no_parts": Refusal({"-num_parts": "0"}, ("-num_parts 0",)),
    "preprocessing_processes_negative": Refusal({"-npp": "-1"}, ("-npp", "-1")),
    "export_processes_negative": Refusal({"-nps": "-2"}, ("-nps", "-2")),
    "worker_timeout_negative": Refusal({"--worker_timeout": "-1"}, ("--worker_timeout", "-1")),
    "device_unknown": Refusal({"-device": "gpu"}, ("-device", "'gpu'", "cuda:N")),
    "device_number_nonsense": Refusal({"-device": "cuda:x"}, ("-device", "'cuda:x'")),
    "worker_timeout_nan": Refusal({"--worker_timeout": "nan"}, ("--worker_timeout", "nan")),
}

_RUN_ALL = """
import contextlib, io, json, sys
from nnunet_lowmem.commands import cli, flags

for name, arguments in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.predict_entry_point(arguments)
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "nnunetv2", "numba"} & set(sys.modules))
    print(json.dumps([name, code, out.getvalue(), err.getvalue(), heavy]))
"""


def command_line(root: Path, changes: dict[str, str | None]) -> list[str]:
    flags = {"-i": f"{root}/images", "-o": f"{root}/out", "-m": f"{root}/model", "-f": "0", "-device": "cpu"}
    flags |= {flag: value if value is None else value.format(root=root) for flag, value in changes.items()}
    folds = (flags.pop("-f") or "0").split()
    # values that begin with a dash need the equals sign
    return [f"{flag}={value}" for flag, value in flags.items() if value is not None] + ["-f", *folds]


def make_folders(root: Path) -> Path:
    for folder in ("images", "no_plans", "model/fold_0", "model/fold_all"):
        (root / folder).mkdir(parents=True)
    for file in ("file", "no_plans/dataset.json", "model/dataset.json", "model/plans.json"):
        (root / file).write_text("{}")
    for fold in ("fold_0", "fold_all"):
        (root / "model" / fold / "checkpoint_final.pth").write_bytes(b"no checkpoint")
    return root


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_folders(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def refused(root) -> dict[str, tuple[int, str, str, list[str]]]:
    """Exit code, stdout, stderr and heavy modules loaded so far, all cases in one process."""
    commands = {name: command_line(root, refusal.flags) for name, refusal in REFUSALS.items()}
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", REFUSALS)
def test_nonsense_is_refused_in_one_line_before_torch_is_loaded(name, refused, root):
    code, stdout, stderr, heavy = refused[name]
    assert code == REFUSALS[name].code, stderr
    assert_one_line(stderr, [word.format(root=root) for word in REFUSALS[name].words])
    assert stdout == ""
    assert heavy == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "-i, -o"),
        (["-i", "in"], "-o"),
        (["-i", "in", "-o", "out", "-f", "one"], "-f"),
        (["-i", "in", "-o", "out", "-step_size", "half"], "-step_size"),
        (["-i", "in", "-o", "out", "--nonsense"], "--nonsense"),
        (["-i", "in", "-o", "out", "--disable"], "ambiguous"),
    ],
)
def test_arguments_that_do_not_parse_end_with_usage_and_code_2(arguments, word, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.predict_entry_point(arguments)
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("usage: nnUNetv2_predict_lowmem")
    assert word in stderr.splitlines()[-1]


def test_refusing_leaves_no_output_folder(root, tmp_path, capsys):
    assert cli.predict_entry_point(command_line(root, {"-o": f"{tmp_path}/out", "-f": "3"})) == 2
    assert not (tmp_path / "out").exists()


# -- what needs torch to be refused


def run(root: Path, changes: dict[str, str | None]) -> int:
    return cli.predict_entry_point(command_line(root, changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(device, root, capsys):
    assert run(root, {"-device": device}) == 2
    assert_one_line(capsys.readouterr().err, (f"-device {device}", "no CUDA device", "-device cpu"))


def test_cuda_number_beyond_the_last(root, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert run(root, {"-device": "cuda:2"}) == 2
    assert_one_line(capsys.readouterr().err, ("-device cuda:2", "2 CUDA devices"))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has MPS")
def test_mps_where_there_is_none(root, capsys):
    assert run(root, {"-device": "mps"}) == 2
    assert_one_line(capsys.readouterr().err, ("-device mps", "-device cpu"))


def test_dataset_that_does_not_exist(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert run(root, {"-m": None, "-d": "999", "-c": "2d"}) == 2
    assert_one_line(capsys.readouterr().err, ("-d 999", "999"))


@pytest.fixture
def real(images, models, root) -> Callable[..., dict[str, str]]:
    """Flags for a real model and a folder with a real image."""
    files = images("head")
    return {"-m": models(ModelSpec(), files), "-i": str(Path(files[0]).parent)}


def copy_of(model: str, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def test_checkpoint_that_is_none(real, root, tmp_path, capsys):
    broken = copy_of(real["-m"], tmp_path / "model")
    (broken / "fold_0/checkpoint_final.pth").write_bytes(b"no checkpoint")
    assert run(root, {**real, "-m": str(broken)}) == 2
    assert_one_line(capsys.readouterr().err, (str(broken / "fold_0/checkpoint_final.pth"),))


def test_checkpoint_of_another_network(real, images, models, root, tmp_path, capsys):
    other = models(ModelSpec(labels=7), images("head"))
    broken = copy_of(real["-m"], tmp_path / "model")
    (broken / "fold_0/checkpoint_final.pth").write_bytes((Path(other) / "fold_0/checkpoint_final.pth").read_bytes())
    assert run(root, {**real, "-m": str(broken)}) == 2
    assert_one_line(capsys.readouterr().err, (str(broken / "fold_0/checkpoint_final.pth"), "do not fit"))


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
def test_model_file_that_is_no_json(file, real, root, tmp_path, capsys):
    broken = copy_of(real["-m"], tmp_path / "model")
    (broken / file).write_text("{ not json")
    assert run(root, {**real, "-m": str(broken)}) == 2
    assert_one_line(capsys.readouterr().err, (str(broken / file),))


def test_input_folder_without_cases(real, root, tmp_path, capsys):
    """Nothing was predicted: that is not success."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing here")
    assert run(root, {**real, "-i": str(tmp_path / "empty")}) == 2
    assert_one_line(capsys.readouterr().err, ("-i", str(tmp_path / "empty"), ".nii.gz"))


@pytest.mark.parametrize("name", ["scan.nii.gz", "patient_scan_number_7.nii.gz", "scan_000.nii.gz"])
def test_input_without_channel_number(name, real, root, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(next(Path(real["-i"]).iterdir()).read_bytes())
    assert run(root, {**real, "-i": str(tmp_path / "in")}) == 2
    assert_one_line(capsys.readouterr().err, (name, "_0000"))


def test_budget_that_is_too_small_has_its_own_code(real, root, capsys):
    assert run(root, {**real, "--max_ram": "1M"}) == 3
    assert_one_line(capsys.readouterr().err, ("case head", "--max_ram", "GiB", "stage"))


def test_verbose_shows_the_traceback_and_the_line(root, capsys):
    assert cli.predict_entry_point([*command_line(root, {"-i": f"{root}/none"}), "--verbose"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback")
    assert re.fullmatch(r"error: -i: .*/none does not exist", stderr.splitlines()[-1])


def test_estimate_prints_plans_and_predicts_nothing(real, root, tmp_path, capsys):
    assert cli.predict_entry_point([*command_line(root, {**real, "-o": f"{tmp_path}/out"}), "--estimate"]) == 0
    assert "plan for head" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_estimate_of_a_case_that_does_not_fit(real, root, tmp_path, capsys):
    arguments = command_line(root, {**real, "-o": f"{tmp_path}/out", "--max_ram": "1M"})
    assert cli.predict_entry_point([*arguments, "--estimate"]) == 3
    assert "case head does not fit: RAM projected" in capsys.readouterr().out


def test_estimate_as_json(real, root, tmp_path, capsys):
    arguments = command_line(root, {**real, "-o": f"{tmp_path}/out"})
    assert cli.predict_entry_point([*arguments, "--estimate", "--json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)
    assert case["case"] == "head"
    assert case["fits"]
    assert case["original_shape"] == [37, 44, 37]
    least, unspilled = case["least_ram_bytes"], case["least_ram_unspilled_bytes"]
    assert 0 < least <= unspilled <= case["projected_bytes"]["RAM"] <= case["budget_bytes"]["RAM"]
    assert case["reserved_bytes"]["RAM"] < least


@pytest.mark.parametrize(
    ("features", "flags"),
    [((3, 5), ())]
    + [pytest.param(wide, ("--disable_tta",), marks=pytest.mark.slow) for wide in ((6, 12), (16, 32), (64, 64))],
)
def test_smallest_budget_that_is_told_is_enough(features, flags, models, images, root, tmp_path):
    """Also for widths that oneDNN has to reorder, which takes several times their tensors."""
    files = images("head")
    model = models(ModelSpec(features=features, patch_size=(36, 36, 32), mirror_axes=(0,)), files)
    wanted = {"-m": model, "-i": str(Path(files[0]).parent), "-o": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "import sys; from nnunet_lowmem.commands.cli import predict_entry_point as p; sys.exit(p())",
    ]
    arguments = [*command_line(root, wanted), *flags]
    told = subprocess.run([*command, *arguments, "--estimate", "--json"], capture_output=True, text=True, check=True)
    (case,) = json.loads(told.stdout)
    limited = [*command, *arguments, f"--max_ram={case['least_ram_bytes']}"]
    assert subprocess.run(limited, capture_output=True, text=True).stderr == ""


def test_estimate_reads_no_weights(real, root, tmp_path, capsys):
    """The same numbers where every weight is overwritten, which prediction would not stand."""
    spoilt = shutil.copytree(real["-m"], tmp_path / "spoilt")
    (checkpoint,) = spoilt.glob("fold_*/checkpoint_final.pth")
    weights = torch.load(checkpoint, weights_only=False)["network_weights"]
    held = checkpoint.read_bytes()
    for weight in weights.values():
        held = held.replace(weight.numpy().tobytes(), b"\xff" * weight.nbytes)
    checkpoint.write_bytes(held)
    found = []
    for model in (real["-m"], str(spoilt)):
        arguments = command_line(root, {**real, "-m": model, "-o": f"{tmp_path}/out"})
        assert cli.predict_entry_point([*arguments, "--estimate", "--json"]) == 0
        (case,) = json.loads(capsys.readouterr().out)
        found.append(case["projected_bytes"]["RAM"] - case["reserved_bytes"]["RAM"])
    assert abs(found[0] - found[1]) < 4 << 20  # a tile of zeros is measured
    assert run(root, {**real, "-m": str(spoilt), "-o": f"{tmp_path}/out"}) != 0


def test_json_alone_is_refused(real, root, tmp_path, capsys):
    assert cli.predict_entry_point([*command_line(root, {**real, "-o": f"{tmp_path}/out"}), "--json"]) == 2
    assert_one_line(capsys.readouterr().err, ("--json", "--estimate"))


def test_budget_from_the_environment(real, root, tmp_path, capsys, monkeypatch):
    arguments = command_line(root, {**real, "-o": f"{tmp_path}/out"})
    monkeypatch.setenv("nnUNet_lowmem_max_ram", "1M")
    assert cli.predict_entry_point([*arguments, "--estimate"]) == 3
    assert cli.predict_entry_point([*arguments, "--estimate", "--max_ram", "9G"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("nnUNet_lowmem_max_ram", "lots")
    assert cli.predict_entry_point([*arguments, "--estimate"]) == 2
    assert_one_line(capsys.readouterr().err, ("nnUNet_lowmem_max_ram", "'lots'"))


def test_more_ram_than_there_is_is_allowed_with_a_warning(real, root, tmp_path, caplog):
    arguments = command_line(root, {**real, "-o": f"{tmp_path}/out", "--max_ram": "999T"})
    assert cli.predict_entry_point([*arguments, "--estimate"]) == 0
    assert "--max_ram" in caplog.text
    assert "more than there is" in caplog.text


def test_tmp_dir_that_takes_no_byte(real, root, tmp_path, capsys):
    """/proc is a folder that nobody, not even root, can write to."""
    assert run(root, {**real, "-o": f"{tmp_path}/out", "--tmp_dir": "/proc"}) == 2
    assert_one_line(capsys.readouterr().err, ("--tmp_dir", "/proc"))


def test_a_case_of_absurd_size_is_refused_and_the_others_are_predicted(real, root, tmp_path, capsys):
    folder = tmp_path / "two"
    folder.mkdir()
    image = SimpleITK.ReadImage(str(next(Path(real["-i"]).glob("*_0000.nii.gz"))))
    SimpleITK.WriteImage(image, str(folder / "usual_0000.nii.gz"))
    image.SetSpacing((600.0, 600.0, 600.0))
    SimpleITK.WriteImage(image, str(folder / "huge_0000.nii.gz"))
    wanted = {**real, "-i": str(folder), "-o": f"{tmp_path}/out"}
    assert cli.predict_entry_point([*command_line(root, wanted), "--estimate"]) == 3
    assert "case huge does not fit" in capsys.readouterr().out
    assert run(root, wanted) == 3
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["usual.nii.gz"]


@pytest.mark.slow
def test_estimates_of_a_thousand_cases_take_seconds(real, root, tmp_path, capsys):
    source = next(Path(real["-i"]).glob("*_0000.nii.gz"))
    (tmp_path / "many").mkdir()
    for number in range(1000):
        os.link(source, tmp_path / "many" / f"case{number:04d}_0000.nii.gz")
    arguments = command_line(root, {**real, "-i": f"{tmp_path}/many", "-o": f"{tmp_path}/out"})
    start_s = time.process_time()
    assert cli.predict_entry_point([*arguments, "--estimate"]) == 0
    assert time.process_time() - start_s < 30
    assert capsys.readouterr().out.count("plan for case") == 1000


# -- the other command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["demo", "-o", "{root}/file", "-device", "cpu"], ("-o", "{root}/file", "cannot be made")),
        (["demo", "-o", "{root}/file/below", "-device", "cpu"], ("-o", "{root}/file/below", "cannot be made")),
        (["demo", "-o", "{root}/out", "-device", "gpu"], ("-device", "gpu")),
    ],
)
def test_demo_refuses_in_one_line(arguments, words, root, capsys):
    assert cli.main([argument.format(root=root) for argument in arguments]) == 2
    assert_one_line(capsys.readouterr().err, [word.format(root=root) for word in words])


def test_no_command_shows_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2


def test_interruption_has_its_own_code(root, capsys, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_check", interrupt)
    assert run(root, {}) == 130
    assert capsys.readouterr().err == "interrupted\n"
