"""What a log shows: logs of real runs, lines of public reports, and what is no log at all."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_lowmem.doctor import process_troubles
from nnunet_lowmem.doctor.hiding import Hider
from nnunet_lowmem.doctor.log import TROUBLES, Diagnosis, diagnose
from nnunet_lowmem.doctor.log_text import Block, blocks
from nnunet_lowmem.errors import UsageError

LOGS = Path(__file__).parents[1] / "data" / "logs"

# what is told first, whether it fails, and what is said to follow from it; see the README beside the logs
SHOWN: dict[str, tuple[str, bool, str]] = {
    "ok_stock": ("", False, ""),
    "ok_ours": ("", False, ""),
    "disk_full": ("", False, ""),
    "preproc_zero_byte": ("an image that cannot be read", True, "a preprocessing worker has gone"),
    "preproc_killed": ("a preprocessing worker has gone", True, ""),
    "export_killed": ("an export worker has gone", True, ""),
    "main_killed": ("killed", True, ""),
    "main_killed_predict": ("killed", True, ""),
    "main_killed_buffered": ("killed", True, ""),
    "unable_to_allocate": ("an array did not fit into RAM", True, ""),
    "default_cpu_allocator": ("a tensor did not fit into RAM", True, ""),
    "spacing_huge": ("an array did not fit into RAM", True, "a preprocessing worker has gone"),
    "hang_export": ("the export hangs, or was ended", True, ""),
    "hang_export_buffered": ("the export hangs, or was ended", True, ""),
    "hang_preproc": ("killed", True, ""),
    "shm_bus_error": ("shared memory is too small", True, "a preprocessing worker has gone"),
    "unable_to_mmap": ("an image could not be passed on", True, ""),
    "inf_logits": ("logits beyond float16", True, ""),
    "no_main_guard": ("a script without its main guard", True, "a preprocessing worker has gone"),
    "missing_checkpoint": ("a checkpoint is missing", True, ""),
    "missing_variables": ("a dataset that is not found", True, ""),
    "weights_only_nnunet251": ("a checkpoint that torch refuses to load", True, ""),
    "weights_only_torchload": ("a checkpoint that torch refuses to load", True, ""),
    "wrong_channels": ("another number of channels than the model has", True, "a preprocessing worker has gone"),
    "geometry_spacing": ("the channels of a case do not match", True, "a preprocessing worker has gone"),
    "geometry_origin": ("channels that lie elsewhere in space", False, ""),
    "model_mismatch": ("the weights are of another network", True, ""),
    "unknown_trainer": ("an unknown trainer", True, ""),
    "no_cases": ("no case was found", False, ""),
    "no_gpu": ("torch sees no GPU", True, ""),
    "eof_error": ("a process of the pool has gone", True, ""),
    "signal_term": ("ended by a signal", True, ""),
    "failed_case_ours": ("a case failed", True, ""),
    "refused_ours": ("more than the budget", True, ""),
    "totalsegmentator_ok": ("", False, ""),
    "totalsegmentator_allocator": ("a tensor did not fit into RAM", True, ""),
    "totalsegmentator_cut_image": ("an image that cannot be read", True, ""),
    "totalsegmentator_killed": ("killed", True, ""),
}
# of public reports, shortened: what cannot be had here
LINES = {
    "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=191.batch cgroup. Some of your processes may have been "
    "killed by the cgroup out-of-memory handler.": "the scheduler's memory limit",
    "slurmstepd: error: Detected 2 oom_kill events in StepId=12.13. Some of the step tasks have been OOM Killed.": (
        "the scheduler's memory limit"
    ),
    "slurmstepd: error: Job 7518 exceeded memory limit (626359956 > 512000000), being killed": (
        "the scheduler's memory limit"
    ),
    "slurmstepd: error: *** JOB 867816 ON c0700a-s1 CANCELLED AT 2021-05-11T12:06:17 DUE TO TIME LIMIT ***": (
        "ended by a time limit"
    ),
    "Nov 28 01:00:39 ward7 kernel: Out of memory: Killed process 3041 (nnUNetv2_predic) total-vm:9kB": (
        "ended by the system for memory"
    ),
    "/var/spool/slurmd/job00191/slurm_script: line 28:  8156 Killed                  python3 main.py": "killed",
    "Container exited with code 137": "killed",
    "OSError: [WinError 1455] The paging file is too small for this operation to complete.": (
        "the paging file is too small"
    ),
    "srun: error: Orion-18-69: task 289: Bus error": "shared memory is too small",
    "RuntimeError: unable to open shared memory object </torch_29919_1396182366> in read-write mode": (
        "shared memory is too small"
    ),
    "RuntimeError: received 0 items of ancdata": "too many open files",
    "MemoryError": "memory could not be had",
    "Prediction on device was unsuccessful, probably due to a lack of memory. Moving results arrays to "
    "CPU": "the case was begun again in RAM",
    "OSError: [Errno 28] No space left on device": "the disk is full",
    "PermissionError: [Errno 13] Permission denied: '/data/out/x.nii.gz'": "no permission",
    "nnUNet_results is not defined and nnU-Net cannot be used for training": "nnU-Net's variables are not set",
    "RuntimeError: CUDA error: no kernel image is available for execution on the device": "torch sees no GPU",
    "RuntimeError: CUDA error: device-side assert triggered": "the GPU failed",
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.": (
        "torch.compile has no compiler"
    ),
    "ValueError: numpy.dtype size changed, may indicate binary incompatibility.": "packages that do not go together",
    "Segmentation fault (core dumped)": "a crash in compiled code",
    "warning: worker 'preprocessing' of case a: without progress for 600 s": "no progress for a long time",
    "FileNotFoundError: [Errno 2] No such file or directory: '/data/m/plans.json'": "a file of the model is missing",
    "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory": (
        "a checkpoint that is cut"
    ),
    "EOFError: Ran out of input": "a checkpoint that is cut",
    "RuntimeError: nnUNet_results is not defined. nnU-Net cannot be used": "nnUNet_results is not set",
    "nnUNetv2_predict: command not found": "a command that cannot be carried out",
    "nnUNetv2_predict: error: unrecognized arguments: -x": "a command that cannot be carried out",
    "srun: error: klinikgpu: task 0: Out Of Memory": "the scheduler's memory limit",
    "zsh: killed     nnUNetv2_predict -i in": "killed",
    "Process returned non-zero exit status -9": "killed",
    "Process finished with exit code -1073741819 (0xC0000005)": "a crash in compiled code",
    "RuntimeError: Some background workers are no longer alive": "an export worker has gone",
    "EOFError": "a process of the pool has gone",
    "2024/10/09 12:57:37.781 :: ValueError: a thing that nobody knows": "an error that is not known here",
}
OUT_OF_VRAM = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB "
    "of which 12.73 GiB is free. Including non-PyTorch memory, this process has 18.73 GiB memory in use.": (
        "22.78 GiB more were asked for, 12.73 GiB were free, the card has 31.47 GiB."
    ),
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 55.57 GiB. GPU 0 has a total capacty of 12.00 "
    "GiB of which 9.02 GiB is free.": "55.57 GiB more were asked for, 9.02 GiB were free, the card has 12.00 GiB.",
    "RuntimeError: CUDA out of memory. Tried to allocate 450.00 MiB (GPU 0; 10.73 GiB total capacity; 9.23 GiB already "
    "allocated)": "450.00 MiB more were asked for.",
    "RuntimeError: CUDA error: out of memory": "",
}


def of_lines(*lines: str) -> Diagnosis:
    return diagnose([Block(list(enumerate(lines, 1)))])


def test_every_log_is_in_the_table():
    assert {path.stem for path in LOGS.glob("*.txt")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_log(name):
    """The cause comes first, what follows from it last, and nothing names a person or a place."""
    first, fails, led_to = SHOWN[name]
    found = diagnose(blocks(str(LOGS / f"{name}.txt")))
    told = [symptom.trouble.name for symptom in found.symptoms]
    assert (told[0] if told else "", found.fails) == (first, fails)
    ended = [symptom for symptom in found.symptoms if not symptom.is_overcome]
    follows = [symptom.trouble.name for symptom in ended if symptom not in found.causes]
    assert follows == [led_to] * bool(led_to)
    assert found.is_complete == (name in ("ok_stock", "ok_ours", "disk_full", "geometry_origin", "totalsegmentator_ok"))
    tools = {"totalsegmentator": "TotalSegmentator", "ours": "nnunet_lowmem"}
    assert found.tool.name == next((tool for part, tool in tools.items() if part in name), "nnU-Net")
    shown = json.dumps(found.as_json()).lower()
    assert not [word for word in ("mueller", "anna", "schmidt", "peter_", "1957", "study42") if word in shown]


@pytest.mark.parametrize("line", LINES)
def test_line(line):
    assert [symptom.trouble.name for symptom in of_lines("before", line, "after").symptoms] == [LINES[line]]


HARMLESS = [
    "WARNING: No module named 'cupy', falling back to CPU",
    "UserWarning: CUDA is not available, using CPU",
    "resource_tracker: There appear to be 6 leaked semaphore objects",
    "INFO: request timed out after 5 s, retrying",
    "urllib3: Connection reset by peer, retrying",
    "KeyboardInterrupt handler installed",
    "sbatch: --signal=SIGTERM@60",
    "it does not fit the mask",
    "#SBATCH job time limit 1h",
    "Terminated all workers successfully",
    "skilled 137 killed cells, being killed by 9",
    "ERROR: ld.so: object cannot be preloaded: ignored.",
    "No trainer hooks",
    "    except KeyboardInterrupt:",
]


@pytest.mark.parametrize("line", HARMLESS)
def test_what_only_sounds_like_trouble(line):
    assert of_lines(line).symptoms == ()


def test_source_that_a_traceback_shows_is_no_trouble():
    frame = '  File "/home/anna/x.py", line 3, in run'
    found = of_lines(frame, "    raise MemoryError('x')", frame, "    except KeyboardInterrupt:", "ValueError: b")
    assert [symptom.trouble for symptom in found.symptoms] == [process_troubles.UNKNOWN]


GOOD = (LOGS / "ok_stock.txt").read_text().splitlines()
BAD = (LOGS / "export_killed.txt").read_text().splitlines()


def test_what_a_run_went_on_behind_does_not_fail():
    lines = [*GOOD[:10], "Prediction on device was unsuccessful, probably due to a lack of memory", *GOOD[10:]]
    found = of_lines(*lines, "Bus error")
    assert [(told.trouble.name, told.is_overcome) for told in found.symptoms] == [
        ("shared memory is too small", False),
        ("the case was begun again in RAM", True),
    ]
    assert (found.fails, of_lines(*lines).fails, of_lines(*lines).causes) == (True, False, [])


@pytest.mark.parametrize("runs", [[BAD, GOOD], [GOOD, BAD], [GOOD, BAD, GOOD]])
def test_of_several_runs_the_one_that_failed_is_told(runs):
    """Cases of a script that calls the command for each: one of them is lost, whatever the last one says."""
    found = of_lines(*(line for run in runs for line in run))
    assert [symptom.trouble.name for symptom in found.causes] == ["an export worker has gone"]
    assert (found.fails, found.is_complete) == (True, runs[-1] is GOOD)


def test_runs_that_say_nothing_at_their_end():
    """Stock's sequential mode, and TotalSegmentator, which hides nnU-Net's lines."""
    assert (
        of_lines("Running in non-multiprocessing mode", "There are 1 cases that I would like to predict").fails is False
    )
    parts = [f"Predicting part {part} of 3 ..." for part in (1, 2, 3)]
    found = of_lines(*parts, "Predicted in 90.03s", "Saving segmentations...", "Saved in 10.11s")
    assert (found.symptoms, found.is_complete) == ((), True)


def test_inf_on_a_gpu_is_not_about_memory():
    """Stock tries the case once more on the CPU after any RuntimeError."""
    found = of_lines("Prediction on device was unsuccessful", "RuntimeError: Encountered inf in predicted array")
    assert [told.trouble.name for told in found.causes] == ["logits beyond float16"]


@pytest.mark.parametrize("line", OUT_OF_VRAM)
def test_numbers_of_a_gpu(line):
    (symptom,) = of_lines(line).symptoms
    assert (symptom.trouble.name, symptom.numbers) == ("the GPU's memory is too small", OUT_OF_VRAM[line])


def test_each_row_is_shown_by_something():
    names = [first for first, _, _ in SHOWN.values()] + [follows for _, _, follows in SHOWN.values()]
    tried = {*names, *LINES.values(), "the GPU's memory is too small"}
    assert {trouble.name for trouble in TROUBLES} <= tried
    assert all(sign == sign.lower() for trouble in TROUBLES for sign in trouble.signs)


@pytest.mark.parametrize(
    "shape, words",
    [
        ("(118, 350, 350, 128)", "logits of 118 classes on 350 x 350 x 128 voxels"),
        ("(2, 350, 350, 128)", "2 classes, or an image of 2 channels"),
        ("(1, 350, 350, 128)", "a whole volume"),
        ("(1, 3733, 3367, 4067)", "look at the spacing"),
        ("(123456,)", "a part of one"),
    ],
)
def test_numbers_of_an_array(shape, words):
    line = f"MemoryError: Unable to allocate 13.9 GiB for an array with shape {shape} and data type float64"
    (symptom,) = of_lines(line).symptoms
    assert words in symptom.numbers
    assert "13.9 GiB" in symptom.numbers


@pytest.mark.parametrize(
    "lines, ending",
    [
        (["There are 2 cases that I would like to predict"], "preprocessing"),
        (["There are 2 cases that I would like to predict", "Predicting a:"], "predicting"),
        (["Predicting a:", "sending off prediction to background worker", "done with a"], "sent"),
        (["There are 1 cases that I would like to predict", "case a: prediction, 2 of 27, 0.92 GiB"], "predicting"),
    ],
)
def test_messages_that_just_stop(lines, ending):
    assert [symptom.trouble for symptom in of_lines(*lines).symptoms] == [process_troubles.ENDINGS[ending]]


def test_who_ended_a_run_of_an_older_nnunet_may_have_waited_for_a_worker_that_was_gone():
    lines = ["Predicting a:", "sending off prediction to background worker", "done with a", "^C", "KeyboardInterrupt"]
    names = [symptom.trouble.name for symptom in of_lines(*lines).symptoms]
    assert names == ["nothing after the last case was sent off", "ended by a signal"]


def test_a_log_of_nothing_known_shows_its_last_lines(tmp_path):
    (tmp_path / "log").write_text("hello\n\n  0%|   | 0/4 [00:00<?, ?it/s]\n │ Anna │\nthe end of Predicting")
    found = diagnose(blocks(str(tmp_path / "log")))
    assert (found.symptoms, found.fails, found.last_lines) == ((), False, ("hello", "the end of Predicting"))


@pytest.mark.parametrize(
    "line, tool",
    [
        ("If you use this tool please cite: https://pubs.rsna.org/doi/10.1148", "TotalSegmentator"),
        ("STARTING MOOSE-Z V.3.0.0", "MOOSE"),
        ("[INFO][Python] (/opt/slicer/slicer.org/Extensions/TotalSegmentator.py:544)", "3D Slicer"),
        ("monai.bundle.scripts.run", "MONAI"),
    ],
)
def test_whose_log_it_is(line, tool):
    assert of_lines(line, "Killed").tool.name == tool


@pytest.mark.parametrize(
    "line, hidden",
    [
        ('File "/home/a b/env/lib/python3.11/site-packages/nnunetv2/x.py", line 3', 'File ".../nnunetv2/x.py", line 3'),
        ("cannot open C:\\Users\\Anna Maria\\scans\\m.nii.gz now", "cannot open PATH now"),
        ("\\\\server7\\share\\Anna\\x", "PATH"),
        ("reading study/Mueller_Anna.nii.gz failed", "reading FILE.nii.gz failed"),
        ("no '/data/m/fold_1/checkpoint_final.pth'", "no 'PATH/checkpoint_final.pth'"),
        ("anna@ward7.clinic.org at 10.1.2.3:8786", "HOST at HOST"),
        ("*** JOB 1 ON c0700a-s1 CANCELLED", "*** JOB 1 ON HOST CANCELLED"),
        ("Nov 28 01:00:39 ward7 kernel: oom", "Nov 28 01:00:39 HOST kernel: oom"),
        ("PatientName: Mueller^Anna", "PatientName: NAME"),
        ("see https://clinic.org/anna for more", "see URL for more"),
        ("12/27 tiles, 3 it/s", "12/27 tiles, 3 it/s"),
        ("case_07 and case_071", "CASE and case_071"),
        ("home/anna/ct and study42\\Schmidt_Peter\\ct", "PATH and PATH"),
        ("Z:/radio/Schmidt, Peter/ct (1)/x", "PATH"),
        ("cannot open C:\\Users\\Anna Maria", "cannot open PATH"),
        ("Anna Maria Mueller.nii.gz is cut", "FILE.nii.gz is cut"),
        ("nnUNetv2_predict -i schmidt_peter -o results_schmidt", "nnUNetv2_predict -i PATH -o PATH"),
        ("['nnUNetv2_predict', '-i', 'schmidt_peter']", "['nnUNetv2_predict', '-i', PATH"),
        ("error: case Peter Schmidt does not fit: RAM", "error: case CASE does not fit: RAM"),
        (
            "warning: worker 'preprocessing' of case Schmidt_Peter: late",
            "warning: worker 'preprocessing' of case CASE: late",
        ),
        ('"patient_name": "Schmidt^Peter",', '"patient_name": NAME'),
        ("(0010,0010) PN [Schmidt^Peter]", "(0010,0010) NAME"),
        ("Patient's Name: Schmidt", "Patient's Name: NAME"),
        ("JOB 1 ON kliniknode CANCELLED", "JOB 1 ON HOST CANCELLED"),
        ("srun: error: klinik-gpu: task 3", "srun: error: HOST: task 3"),
        ("ran on ward7.klinik.de and gpunode[01-03]", "ran on HOST and HOST"),
        ("2024-01-01 10:00:00 ward7 kernel: oom", "2024-01-01 10:00:00 HOST kernel: oom"),
        ("/home/anna/scripts/schmidt_run.py", "PATH"),
        ("text \x1b\u202e here", "text \\x1b\\u202e here"),
    ],
)
def test_names_are_hidden(line, hidden):
    assert Hider(["case_07"]).hidden(line) == hidden


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(encoding, tmp_path):
    text = (LOGS / "preproc_zero_byte.txt").read_text() + "übrig\n"
    (tmp_path / "log").write_bytes(text.encode(encoding))
    assert diagnose(blocks(str(tmp_path / "log"))).as_json() == diagnose([Block(numbered(text))]).as_json()


def numbered(text: str) -> list[tuple[int, str]]:
    return list(enumerate(text.split("\n"), 1))


def test_a_log_that_was_emptied_while_it_was_written_begins_with_zeros(tmp_path):
    (tmp_path / "log").write_bytes(bytes(100_000) + b"\nKilled\n")
    assert [told.trouble.name for told in diagnose(blocks(str(tmp_path / "log"))).symptoms] == ["killed"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "PYTHONUNBUFFERED=1"),
        (b" \n \n", "PYTHONUNBUFFERED=1"),
        (bytes(range(256)) * 40, "holds no text"),
        (b"\x1f\x8b\x08\x00rest", "zcat LOG"),
    ],
)
def test_what_is_no_log(content, words, tmp_path):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        diagnose(blocks(str(tmp_path / "log")))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file") as missing:
        list(blocks(str(tmp_path / "none")))
    assert isinstance(missing.value, FileNotFoundError)
    with pytest.raises(UsageError, match="is a folder"):
        list(blocks(str(tmp_path)))


def test_a_log_is_read_as_a_stream_whatever_its_lines(monkeypatch):
    """Of a pipe without end of lines no more than a block is held; numbers of lines are those of an editor."""
    bars = b"\r 50%|#####     | 2/4 [00:01<00:01]" * 100_000
    text = b"first\n" + bars + b"\n" + b"x\n" * 2_000_000 + b"third\nKilled\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(text)))
    seen, last = 0, (0, "")
    for block in blocks("-"):
        seen = max(seen, sum(len(line) for _, line in block.lines))
        last = block.lines[-1]
    assert seen < 2**22
    assert last == (2_000_004, "Killed")
