"""The command takes what stock's takes, and refuses in one line what cannot work."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from nnunetv2.inference import predict_from_raw_data

from nnunet_lowmem.cli import predict_entry_point, predict_parser

MODEL = Path(__file__).parents[1] / "nnunet_lowmem" / "data" / "ct118"


class Intercepted(Exception):  # noqa: N818  # not an error
    pass


@pytest.fixture
def stock_parser(monkeypatch):
    parsers = []

    def intercept(self, *args, **kwargs):
        parsers.append(self)
        raise Intercepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", intercept)
    with pytest.raises(Intercepted):
        predict_from_raw_data.predict_entry_point()
    monkeypatch.undo()
    return parsers[0]


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


def test_every_flag_of_stock_with_its_destination_and_default(stock_parser):
    ours = actions(predict_parser())
    for option, action in actions(stock_parser).items():
        if option in ("-h", "--help"):
            continue
        assert ours[option].dest == action.dest
        assert ours[option].nargs == action.nargs
        if option == "-device":
            assert ours[option].default is None  # the best there is
        elif option == "-f":
            assert list(ours[option].default) == list(action.default)
        else:
            assert ours[option].default == action.default, option


def meanings(parser: argparse.ArgumentParser, prefix: str) -> set[str]:
    """Destinations that argparse finds for a word that is no whole option of `parser`."""
    return {entry[0].dest for entry in parser._get_option_tuples(prefix)}


def test_every_abbreviation_of_stock_means_the_same(stock_parser):
    ours = predict_parser()
    options = actions(stock_parser)
    for option in options:
        for length in range(3 if option.startswith("--") else 2, len(option)):
            prefix = option[:length]
            if prefix not in options:
                assert meanings(ours, prefix) == meanings(stock_parser, prefix), prefix


def test_defaults_of_processes_come_from_the_environment_as_in_stock(monkeypatch):
    monkeypatch.setenv("nnUNet_npp", "5")
    monkeypatch.setenv("nnUNet_nps", "many")
    options = predict_parser().parse_args(["-i", "a", "-o", "b"])
    assert (options.npp, options.nps) == (5, 3)


@pytest.fixture
def request_of(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "file").write_text("")

    def make(**changes: str | None) -> list[str]:
        arguments = {"-i": str(images), "-o": str(tmp_path / "out"), "-m": str(MODEL), "-f": "0", "-device": "cpu"}
        arguments |= {f"-{key}": value for key, value in changes.items()}
        pairs = [(key, value.replace("TMP", str(tmp_path))) for key, value in arguments.items() if value is not None]
        return [word for pair in pairs for word in pair]

    return make


BAD = [
    ({"i": "TMP/nowhere"}, ["-i", "nowhere does not exist"]),
    ({"i": "TMP/file"}, ["-i", "file is not a folder"]),
    ({"m": "TMP/nowhere"}, ["nowhere does not exist"]),
    ({"m": "TMP/images"}, ["images/dataset.json does not exist"]),
    ({"f": "7"}, ["fold_7", "checkpoint_final.pth for fold 0", "-f"]),
    ({"chk": "checkpoint_best.pth"}, ["checkpoint_best.pth", "-chk"]),
    ({"device": "tpu"}, ["-device", "'tpu'"]),
    ({"o": "TMP/file"}, ["-o", "file cannot be made"]),
    ({"o": "TMP/file/below"}, ["-o", "below cannot be made"]),
    ({"step_size": "0"}, ["-step_size", "0.0"]),
    ({"step_size": "1.5"}, ["-step_size", "1.5"]),
    ({"part_id": "1"}, ["-part_id", "-num_parts 1"]),
    ({"npp": "-1"}, ["-npp", "-1"]),
    ({"m": None}, ["-m FOLDER", "-d DATASET"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_request_is_one_line_and_exit_code_2(request_of, capsys, changes, words):
    assert predict_entry_point(request_of(**changes)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("flag", ["--max_ram", "--max_vram"])
@pytest.mark.parametrize("size", ["0", "-1", "4X", "", "nan", "0%"])
def test_nonsense_size_is_named_with_its_flag(request_of, capsys, flag, size):
    assert predict_entry_point([*request_of(), f"{flag}={size}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag}: ")
    assert error.count("\n") == 1


def test_missing_temporary_folder_is_named(request_of, capsys):
    assert predict_entry_point([*request_of(), "--tmp_dir", "/no/such/folder"]) == 2
    assert "--tmp_dir: /no/such/folder does not exist" in capsys.readouterr().err


def test_missing_cuda_is_one_line(request_of, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert predict_entry_point(request_of(device="cuda")) == 2
    error = capsys.readouterr().err
    assert "-device cuda" in error
    assert error.count("\n") == 1


def test_bad_requests_are_refused_before_torch_is_loaded(request_of):
    arguments = request_of(f="7")
    code = f"import sys; from nnunet_lowmem.cli import predict_entry_point as run; assert run({arguments}) == 2; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unexpected_error_is_one_line_and_a_traceback_only_with_verbose(request_of, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_lowmem.console.choose_device", lambda name: 1 / 0)
    assert predict_entry_point(request_of()) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert predict_entry_point([*request_of(), "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_estimate_prints_the_plan_and_the_exit_code_tells_whether_it_fits(request_of, capsys):
    import shutil

    arguments = request_of()
    shutil.copy(MODEL.parent / "ct_abdomen_3mm.nii.gz", Path(arguments[1]) / "ct_0000.nii.gz")
    assert predict_entry_point([*arguments, "--estimate"]) == 0
    assert "rolling window" in capsys.readouterr().out
    assert predict_entry_point([*arguments, "--estimate", "--max_ram", "100M"]) == 3


def test_case_beyond_the_budget_is_refused_with_both_numbers(request_of, capsys):
    import shutil

    arguments = request_of()
    shutil.copy(MODEL.parent / "ct_abdomen_3mm.nii.gz", Path(arguments[1]) / "ct_0000.nii.gz")
    assert predict_entry_point([*arguments, "--max_ram", "300M", "--disable_progress_bar"]) == 3
    error = capsys.readouterr().err
    for word in ("case ct", "projected", "budget 0.29 GiB", "--max_ram", "largest allocation"):
        assert word in error
    assert not list((Path(arguments[3])).glob("*.nii.gz"))
