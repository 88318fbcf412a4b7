from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path

import psutil
import pytest
import worker_targets as targets
from images import SUPPORT

from nnunet_lowmem.errors import UsageError, WorkerError
from nnunet_lowmem.system import process_tree, workers
from nnunet_lowmem.system.stalls import ProgressClock
from nnunet_lowmem.system.worker_child import RESULT_LIMIT_BYTES
from nnunet_lowmem.system.workers import (
    JOB_LIMIT_BYTES,
    JobError,
    Worker,
    WorkerDiedError,
    WorkerLimits,
    WorkerRaisedError,
    WorkerStalledError,
    WorkerStartError,
    can_spawn,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals"),
]

SHORT = WorkerLimits(stall_s=1.0)
# for jobs that must not be flagged while the machine is busy with something else
LONG = WorkerLimits(stall_s=30.0)
STAGES = ("read", "preprocess", "write")


def run(target, argument=None, *, case="liver_07", limits=LONG):
    with Worker(target, argument, case=case, limits=limits) as worker:
        return worker.result()


def failure(kind, target, argument=None, *, limits=LONG) -> JobError:
    with pytest.raises(kind) as caught:
        run(target, argument, limits=limits)
    return caught.value


def started(target, argument) -> Worker:
    """A worker that has reported the last of its stages."""
    worker = Worker(target, argument, case="a")
    assert wait_until(lambda: worker.poll() or worker.stage == argument[0][-1], 20)
    return worker


def wait_until(condition, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def no_more_processes(*args):
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def children() -> set[int]:
    # multiprocessing's resource tracker is started once and stays
    tracker = getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None)
    return {child.pid for child in psutil.Process().children(recursive=True)} - {tracker}


def python(*arguments: str, **options) -> subprocess.Popen:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
    return subprocess.Popen([sys.executable, *arguments], env=environ, text=True, **options)


def script(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


class TestResult:
    def test_comes_back(self):
        assert run(targets.echo, {"path": Path("a"), "shape": (1, 2)}) == {"path": Path("a"), "shape": (1, 2)}

    def test_runs_in_another_process(self):
        assert run(targets.pid) != os.getpid()

    def test_may_be_asked_for_twice(self):
        with Worker(targets.echo, 3, case="a") as worker:
            assert (worker.result(), worker.result()) == (3, 3)

    def test_survives_close(self):
        worker = Worker(targets.echo, 3, case="a")
        assert worker.result() == 3
        worker.close()
        worker.close()
        assert worker.poll()
        assert worker.result() == 3

    def test_last_stage_is_known(self):
        with Worker(targets.echo, 3, case="a") as worker:
            worker.result()
            assert worker.stage == "work"

    def test_many_reports_do_not_fill_the_pipe_of_a_parent_that_does_not_look(self):
        with Worker(targets.many_reports, 200_000, case="a") as worker:
            assert wait_until(lambda: is_gone(worker.pid))
            assert worker.result() == "done"

    def test_two_workers_run_at_the_same_time(self):
        with Worker(targets.pid, None, case="a") as first, Worker(targets.pid, None, case="b") as second:
            assert len({first.result(), second.result(), os.getpid()}) == 3

    def test_output_of_the_child_is_inherited(self, capfd):
        run(targets.say)
        assert capfd.readouterr() == ("out of the child\n", "err of the child\n")

    def test_poll_does_not_wait(self):
        with Worker(targets.busy, 0.5, case="a") as worker:
            assert not worker.poll()
            assert wait_until(worker.poll, 20)
            assert worker.result() == "done"

    def test_a_process_that_will_not_exit_is_ended_once_its_result_is_here(self):
        with Worker(targets.slow_exit, None, case="a") as worker:
            assert worker.result() == "done"
            start = time.monotonic()
        assert time.monotonic() - start < 5
        assert is_gone(worker.pid)


class TestDeath:
    @pytest.mark.parametrize(
        "fault, words",
        [
            ("kill", "SIGKILL"),
            ("segfault", "SIGSEGV"),
            ("terminate", "SIGTERM"),
            ("exit 0", "exit code 0"),
            ("exit 3", "exit code 3"),
        ],
    )
    @pytest.mark.parametrize("stages", [(), STAGES[:1], STAGES[:2], STAGES])
    def test_names_case_stage_and_signal(self, fault, words, stages):
        error = failure(WorkerDiedError, targets.in_stage, (stages, fault))
        stage = stages[-1] if stages else "start"
        assert "liver_07" in str(error)
        assert repr(stage) in str(error)
        assert words in str(error)
        assert (error.case, error.stage) == ("liver_07", stage)
        assert error.retryable

    @pytest.mark.parametrize("fault", ["segfault", "terminate", "exit 0", "exit 3"])
    def test_memory_is_not_mentioned_without_a_reason(self, fault):
        assert "memory" not in str(failure(WorkerDiedError, targets.in_stage, ((), fault)))

    def test_sigkill_is_probably_memory(self):
        assert "probably because memory ran out" in str(failure(WorkerDiedError, targets.in_stage, ((), "kill")))

    def test_sigkill_is_memory_when_the_kernel_counted_it(self, monkeypatch):
        counts = iter([3, 4])
        monkeypatch.setattr(workers, "oom_kills", lambda: next(counts))
        error = failure(WorkerDiedError, targets.in_stage, (("resample",), "kill"))
        assert "because memory ran out: the kernel counts 4 such kills, 3 when it started" in str(error)
        assert "probably" not in str(error)
        assert not error.retryable

    def test_another_death_is_not_memory_even_when_the_kernel_counted_a_kill(self, monkeypatch):
        counts = iter([3, 4])
        monkeypatch.setattr(workers, "oom_kills", lambda: next(counts))
        error = failure(WorkerDiedError, targets.in_stage, ((), "segfault"))
        assert "memory" not in str(error)
        assert error.retryable

    def test_counter_that_cannot_be_read_leaves_probably(self, monkeypatch):
        monkeypatch.setattr(workers, "oom_kills", lambda: None)
        error = failure(WorkerDiedError, targets.in_stage, ((), "kill"))
        assert "probably because memory ran out" in str(error)
        assert "cannot be read" in str(error)

    def test_is_noticed_at_once(self):
        start = time.monotonic()
        failure(WorkerDiedError, targets.in_stage, ((), "exit 0"), limits=WorkerLimits(600))
        assert time.monotonic() - start < 5

    def test_when_somebody_else_waits_for_the_child(self):
        with Worker(targets.in_stage, ((), "sleep"), case="a") as worker:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            with pytest.raises(WorkerDiedError, match="somebody else has waited"):
                worker.result()

    def test_names_the_thread_it_was_tied_to(self):
        if sys.platform != "linux":
            pytest.skip("only Linux ties a process to a thread")
        made: list[Worker] = []
        thread = threading.Thread(target=lambda: made.append(started(targets.in_stage, (("s",), "sleep"))))
        thread.start()
        thread.join()
        with made[0] as worker, pytest.raises(WorkerDiedError, match="the thread that started it ended"):
            worker.result()


class TestException:
    def test_brings_type_message_and_traceback(self):
        error = failure(WorkerRaisedError, targets.fail, "value")
        assert "liver_07" in str(error)
        assert "'work'" in str(error)
        assert "ValueError: bad voxel" in str(error)
        assert isinstance(error.original, ValueError)
        printed = "".join(traceback.format_exception(error))
        assert "worker_targets.py" in printed
        assert "in fail" in printed
        assert not error.retryable

    def test_sys_exit_is_no_success(self):
        assert "SystemExit: 0" in str(failure(WorkerRaisedError, targets.fail, "exit"))

    @pytest.mark.parametrize("kind", ["memory", "torch memory", "torch cpu memory", "errno memory"])
    def test_of_memory_comes_back_as_it_was(self, kind):
        error = failure(WorkerRaisedError, targets.fail, kind)
        told = targets.ERRORS[kind]()
        assert (type(error.original), str(error.original)) == (type(told), str(told))
        assert not error.retryable

    @pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA binds on Linux")
    def test_comes_back_from_a_process_whose_memory_is_used_up(self):
        error = failure(WorkerRaisedError, targets.allocate_under_limit)
        assert error.stage == "allocate"
        assert str(error).endswith("MemoryError")
        assert isinstance(error.original, MemoryError)

    def test_that_cannot_be_sent_is_told_as_text(self):
        error = failure(WorkerRaisedError, targets.fail, "unsendable")
        assert "UnsendableError: 3 x" in str(error)
        assert error.original is None

    def test_with_a_long_message_is_cut(self):
        assert len(str(failure(WorkerRaisedError, targets.fail, "long"))) < 3000

    def test_result_that_cannot_be_pickled(self):
        assert "pickle" in str(failure(WorkerRaisedError, targets.return_unpicklable))

    def test_result_that_cannot_be_unpickled(self, monkeypatch):
        monkeypatch.setenv("THIS_IS_THE_PARENT", str(os.getpid()))
        assert "no such class here" in str(failure(WorkerRaisedError, targets.return_unloadable))

    def test_result_too_large_for_the_pipe(self):
        error = failure(WorkerRaisedError, targets.echo, bytes(RESULT_LIMIT_BYTES))
        assert "return paths" in str(error)
        assert len(run(targets.echo, bytes(RESULT_LIMIT_BYTES - 100))) == RESULT_LIMIT_BYTES - 100

    def test_can_be_pickled_for_a_report(self):
        error = failure(WorkerRaisedError, targets.fail, "memory")
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.case, again.stage, again.retryable) == (str(error), "liver_07", "work", False)

    def test_is_a_worker_error(self):
        assert isinstance(failure(JobError, targets.fail, "value"), WorkerError)


class TestStall:
    @pytest.mark.parametrize("fault, state", [("stop", "stopped (by SIGSTOP"), ("sleep", "sleeping")])
    @pytest.mark.parametrize("stages", [(), STAGES])
    def test_is_ended_and_told(self, fault, state, stages):
        start = time.monotonic()
        with Worker(targets.in_stage, (stages, fault), case="liver_07", limits=SHORT) as worker:
            with pytest.raises(WorkerStalledError) as caught:
                worker.result()
            assert is_gone(worker.pid)
        assert 1.0 < time.monotonic() - start < 10
        error = caught.value
        for part in (
            "liver_07",
            repr(worker.stage),
            "no progress for 1.",
            "limit 1 s",
            state,
            "GiB",
            "--worker_timeout",
        ):
            assert part in str(error)
        assert error.stage == (stages[-1] if stages else "start")
        assert error.retryable

    def test_a_beating_thread_is_no_life(self):
        error = failure(WorkerStalledError, targets.sleep_with_beating_thread, 60, limits=SHORT)
        assert "sleeping" in str(error)

    def test_slow_but_computing_is_left_alone(self):
        assert run(targets.busy, 2.5, limits=SHORT) == "done"

    def test_slow_but_computing_in_a_grandchild_is_left_alone(self):
        assert run(targets.busy_in_a_grandchild, 2.5, limits=SHORT) == "done"

    def test_slow_but_reporting_is_left_alone(self):
        assert run(targets.sleep_with_reports, 2.5, limits=SHORT) == "done"

    def test_zero_turns_the_limit_off(self):
        with Worker(targets.in_stage, (("s",), "sleep"), case="a", limits=WorkerLimits(stall_s=0)) as worker:
            assert not wait_until(worker.poll, 2)

    def test_busy_without_an_end_meets_the_limit_per_stage(self):
        error = failure(WorkerStalledError, targets.busy, 60, limits=WorkerLimits(stall_s=30, stage_s=1))
        assert "was busy for 1." in str(error)
        assert "limit 1 s per stage" in str(error)

    def test_reports_within_a_stage_do_not_extend_it(self):
        limits = WorkerLimits(stall_s=30, stage_s=1)
        assert "limit 1 s per stage" in str(failure(WorkerStalledError, targets.sleep_with_reports, 60, limits=limits))

    def test_a_new_stage_gets_its_own_time(self):
        stages = [0.6] * 4
        assert run(targets.busy_stages, stages, limits=WorkerLimits(stall_s=30, stage_s=1.5)) == "done"

    def test_is_found_by_polling_alone(self):
        with Worker(targets.in_stage, (("s",), "stop"), case="a", limits=SHORT) as worker:
            assert wait_until(worker.poll, 10)
            assert is_gone(worker.pid)

    def test_is_found_in_a_job_that_has_closed_its_files(self):
        failure(JobError, targets.close_all_files, 60, limits=SHORT)

    def test_takes_the_grandchildren_along(self):
        with Worker(targets.leave_grandchild, "stall", case="a", limits=SHORT) as worker:
            with pytest.raises(WorkerStalledError):
                worker.result()
            grandchild = int(worker.stage)
        assert wait_until(lambda: is_gone(grandchild))

    def test_parent_and_worker_stopped_together_is_no_stall(self, tmp_path):
        text = """
            import worker_targets as targets
            from nnunet_lowmem.system.workers import Worker, WorkerLimits
            with Worker(targets.seldom_reports, 4.0, case="a", limits=WorkerLimits(stall_s=1.5)) as worker:
                while not worker.stage == "work":
                    worker.poll()
                print("ready", flush=True)
                print(worker.result(), flush=True)
        """
        process = python(script(tmp_path / "main.py", text), stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "done\n"

    @pytest.mark.parametrize("limit", [-1, float("nan"), float("inf")])
    def test_limit_must_be_a_number_of_seconds(self, limit):
        with pytest.raises(UsageError, match="0 \\(off\\) or more"):
            WorkerLimits(stall_s=limit)


class TestClock:
    def test_counts_from_the_last_progress(self):
        clock = ProgressClock(WorkerLimits(stall_s=10), now=0.0)
        for now in range(1, 6):
            clock.look(now, cpu_s=0.0)
        clock.report(5.0, new_stage=False)
        for now in range(6, 16):
            clock.look(now, cpu_s=0.0)
            assert not clock.overdue()
        clock.look(16.0, cpu_s=0.0)
        assert clock.overdue() == "made no progress for 11.0 s (limit 10 s)"

    def test_takes_cpu_time_for_progress_only_where_it_is_more_than_a_thousandth(self):
        clock = ProgressClock(WorkerLimits(stall_s=600), now=0.0)
        for now in range(1, 601):
            clock.look(now, cpu_s=now * 0.0009)
        assert not clock.overdue()
        clock.look(601.0, cpu_s=0.5409)
        assert clock.overdue()
        clock.look(602.0, cpu_s=0.61)
        assert not clock.overdue()

    def test_lost_descendants_do_not_hide_later_progress(self):
        clock = ProgressClock(WorkerLimits(stall_s=10), now=0.0)
        clock.look(1.0, cpu_s=100.0)
        clock.look(2.0, cpu_s=1.0)
        for now in range(3, 20):
            clock.look(now, cpu_s=now)
        assert not clock.overdue()

    def test_an_unwatched_hour_counts_for_a_fifth_of_the_limit(self):
        clock = ProgressClock(WorkerLimits(stall_s=10, stage_s=20), now=0.0)
        clock.look(3600.0, cpu_s=0.0)
        assert not clock.overdue()
        for now in range(3601, 3608):
            clock.look(now, cpu_s=0.0)
            assert not clock.overdue()
        for now in range(3608, 3611):
            clock.look(now, cpu_s=0.0)
        assert clock.overdue()

    def test_an_unwatched_hour_is_not_credited_after_a_report(self):
        clock = ProgressClock(WorkerLimits(stall_s=10), now=0.0)
        clock.report(3600.0, new_stage=True)
        clock.look(3600.0, cpu_s=0.0)
        for now in range(3601, 3612):
            clock.look(now, cpu_s=0.0)
        assert clock.overdue()


class TestClose:
    def test_ends_a_running_job(self):
        with Worker(targets.in_stage, (("s",), "sleep"), case="a") as worker:
            pass
        assert is_gone(worker.pid)
        with pytest.raises(WorkerDiedError, match="closed before it had finished"):
            worker.result()

    @pytest.mark.parametrize("fault", ["stop", "ignore SIGTERM"])
    def test_ends_a_job_that_does_not_listen(self, fault):
        target = targets.ignore_sigterm if fault == "ignore SIGTERM" else targets.in_stage
        with started(target, (("deaf",), "stop")) as worker:
            start = time.monotonic()
        assert time.monotonic() - start < 5
        assert is_gone(worker.pid)

    def test_follows_an_error_of_the_parent(self):
        with pytest.raises(KeyboardInterrupt), Worker(targets.in_stage, ((), "sleep"), case="a") as worker:
            raise KeyboardInterrupt
        assert is_gone(worker.pid)

    def test_gives_up_on_a_process_that_cannot_be_ended(self, monkeypatch):
        monkeypatch.setattr(workers, "KILL_S", 0.2)
        worker = started(targets.in_stage, (("s",), "stop"))
        assert wait_until(lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(type(worker._process), "kill", lambda self: None)
                worker.close()
            assert not is_gone(worker.pid)
            # at exit Python would wait for ever for those
            assert worker._process not in multiprocessing.active_children()
        finally:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)

    def test_leaves_no_process_and_no_file_open(self, monkeypatch):
        run(targets.echo)
        gc.collect()
        files, processes = psutil.Process().num_fds(), children()
        kept = []
        for target, argument, outcome in [
            (targets.echo, 1, contextlib.nullcontext()),
            (targets.leave_grandchild, None, contextlib.nullcontext()),
            (targets.fail, "value", pytest.raises(WorkerRaisedError)),
            (targets.in_stage, ((), "kill"), pytest.raises(WorkerDiedError)),
            (targets.in_stage, ((), "exit 0"), pytest.raises(WorkerDiedError)),
            (targets.in_stage, ((), "stop"), pytest.raises(WorkerStalledError)),
        ]:
            with outcome, Worker(target, argument, case="a", limits=SHORT) as worker:
                kept.append(worker)
                worker.result()
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing.util, "spawnv_passfds", no_more_processes)
            with pytest.raises(WorkerStartError):
                run(targets.echo)
        gc.collect()
        assert psutil.Process().num_fds() == files
        assert children() == processes


class TestParent:
    """What happens to a worker when its parent is killed, and where it can be started from."""

    @pytest.mark.parametrize("how", ["sleep", "stop", "hold the interpreter"])
    def test_killed_takes_the_worker_along(self, tmp_path, how):
        if how != "sleep" and sys.platform != "linux":
            pytest.skip("only Linux ends a process that runs no Python")
        text = f"""
            import worker_targets as targets
            from nnunet_lowmem.system.workers import Worker
            Worker(targets.write_pid_and_wait, ({str(tmp_path / "pid")!r}, {how!r}), case="a").result()
        """
        process = python(script(tmp_path / "main.py", text))
        note = tmp_path / "pid"
        assert wait_until(lambda: note.exists() and note.read_text(), 20)
        pid = int(note.read_text())
        time.sleep(0.2)
        assert not is_gone(pid)
        process.kill()
        process.wait()
        assert wait_until(lambda: is_gone(pid), 5)

    @pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2])
    def test_killed_while_the_worker_starts(self, tmp_path, delay_s):
        text = """
            import worker_targets as targets
            from nnunet_lowmem.system.workers import Worker
            worker = Worker(targets.in_stage, (("s",), "sleep"), case="a")
            print(worker.pid, flush=True)
            worker.result()
        """
        process = python(script(tmp_path / "main.py", text), stdout=subprocess.PIPE)
        pid = int(process.stdout.readline())
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        assert wait_until(lambda: is_gone(pid), 5)

    def test_death_is_noticed_without_the_help_of_linux(self, tmp_path):
        text = f"""
            import worker_targets as targets
            from nnunet_lowmem.system.workers import Worker
            Worker(targets.survive_deathsig, {str(tmp_path / "pid")!r}, case="a").result()
        """
        process = python(script(tmp_path / "main.py", text))
        note = tmp_path / "pid"
        assert wait_until(lambda: note.exists() and note.read_text(), 20)
        process.kill()
        process.wait()
        assert wait_until(lambda: is_gone(int(note.read_text())), 5)

    def test_exits_although_a_worker_was_left_open(self, tmp_path):
        text = """
            import worker_targets as targets
            from nnunet_lowmem.system.workers import Worker
            worker = Worker(targets.in_stage, (("s",), "sleep"), case="a")
            print(worker.pid, flush=True)
        """
        process = python(script(tmp_path / "main.py", text), stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert wait_until(lambda: is_gone(int(out)), 5)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
    def test_alone_decides_what_a_signal_to_the_group_means(self, number):
        """From the worker's first moment: most of it passes before any code of ours runs there."""
        with Worker(targets.busy_after, (("s",), 0.1), case="a") as worker:
            while not worker.poll():
                os.kill(worker.pid, number)
                time.sleep(0.005)
            assert worker.result() == "done"

    # slow: failed in one of about thirty runs, for a reason not yet found
    @pytest.mark.slow
    def test_interrupted_by_ctrl_c_takes_the_worker_along(self, tmp_path):
        text = """
            import signal
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
            import worker_targets as targets
            from nnunet_lowmem.system.workers import Worker
            with Worker(targets.in_stage, (("s",), "sleep"), case="a") as worker:
                while worker.stage != "s":
                    worker.poll()
                print(worker.pid, flush=True)
                worker.result()
        """
        path = script(tmp_path / "main.py", text)
        process = python(path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        pid = int(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert errors.count("Traceback") == 1
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert is_gone(pid)

    NO_GUARD = """
        import os, sys
        print("main runs", flush=True)
        import worker_targets as targets
        from nnunet_lowmem.system.workers import Worker
        with Worker(targets.echo, 3, case="a") as worker:
            print(worker.result(), flush=True)
        assert "__spec__" in globals()
        print(globals().get("__file__", "no file"), flush=True)
    """

    def test_without_main_guard_runs_its_script_once(self, tmp_path):
        path = script(tmp_path / "main.py", self.NO_GUARD)
        out, _ = python(path, stdout=subprocess.PIPE).communicate(timeout=20)
        assert out == f"main runs\n3\n{path}\n"

    def test_as_module_without_main_guard_runs_it_once(self, tmp_path):
        path = script(tmp_path / "unguarded.py", self.NO_GUARD)
        out, _ = python("-m", "unguarded", stdout=subprocess.PIPE, cwd=tmp_path).communicate(timeout=20)
        assert out == f"main runs\n3\n{path}\n"

    def test_without_a_file_as_in_a_notebook(self):
        process = python("-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        out, _ = process.communicate(textwrap.dedent(self.NO_GUARD), timeout=20)
        assert out.splitlines()[:2] == ["main runs", "3"]

    def test_with_a_tiny_dev_shm(self, tmp_path):
        inner = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} {tmp_path / 'main.py'}"
        path = script(tmp_path / "main.py", self.NO_GUARD)
        if subprocess.run(["unshare", "-m", "sh", "-c", inner.split(" && ")[0]], capture_output=True).returncode:
            pytest.skip("may not mount a file system here")
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
        done = subprocess.run(["unshare", "-m", "sh", "-c", inner], env=environ, capture_output=True, text=True)
        assert done.stdout == f"main runs\n3\n{path}\n"

    def test_that_is_daemonic_is_told_why_not(self):
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            reason, error = pool.apply(targets.try_to_start)
        assert "daemonic" in reason
        assert error == f"case a: in stage 'start' the worker could not be started: {reason}"

    def test_that_is_a_worker_itself_is_told_why_not(self):
        assert "daemonic" in run(targets.nested_can_spawn)

    def test_that_still_imports_main_is_told_why_not(self, tmp_path):
        text = """
            import multiprocessing
            import worker_targets
            from nnunet_lowmem.system.workers import can_spawn
            reason = can_spawn()
            print(reason, flush=True)
            if reason is None:
                process = multiprocessing.get_context("spawn").Process(target=worker_targets.say)
                process.start()
                process.join()
        """
        process = python(script(tmp_path / "main.py", text), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        in_parent, in_child, _ = process.communicate(timeout=20)[0].splitlines()
        assert in_parent == "None"
        assert "still imports the main script" in in_child

    def test_ordinary_can_spawn(self):
        assert can_spawn() is None

    def test_frozen_is_told_why_not(self, monkeypatch):
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        assert "frozen" in can_spawn()
        with pytest.raises(WorkerStartError, match="frozen"):
            run(targets.echo)

    def test_without_an_interpreter_is_told_why_not(self, monkeypatch):
        monkeypatch.setattr(multiprocessing.spawn, "_python_exe", "/nowhere/python")
        assert "/nowhere/python" in can_spawn()

    def test_that_may_start_no_process_gets_an_error(self, monkeypatch):
        before = dict(vars(sys.modules["__main__"]))
        monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", no_more_processes)
        with pytest.raises(WorkerStartError, match="temporarily unavailable"):
            run(targets.echo)
        assert vars(sys.modules["__main__"]) == before

    def test_job_that_cannot_be_pickled(self):
        with pytest.raises(WorkerStartError, match=r"liver_07.*cannot be pickled"):
            run(lambda argument, report: None)

    def test_job_that_would_fill_the_pipe(self):
        with pytest.raises(WorkerStartError, match=f"limit is {JOB_LIMIT_BYTES}; pass paths"):
            run(targets.echo, bytes(JOB_LIMIT_BYTES))
        start = time.monotonic()
        assert run(targets.length, bytes(JOB_LIMIT_BYTES - 200)) == JOB_LIMIT_BYTES - 200
        assert time.monotonic() - start < 20

    def test_target_of_the_main_script_is_an_error(self, tmp_path):
        text = """
            from nnunet_lowmem.system.workers import JobError, Worker
            def target(argument, report):
                return 1
            try:
                with Worker(target, None, case="a") as worker:
                    worker.result()
            except JobError as error:
                print(type(error).__name__, error)
        """
        out, _ = python(script(tmp_path / "main.py", text), stdout=subprocess.PIPE).communicate(timeout=20)
        assert out.startswith("WorkerRaisedError case a")


V2 = "low 0\nhigh 0\nmax 7\noom 5\noom_kill 2\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 6\n"
VMSTAT = {"proc/vmstat": "nr_free_pages 1\noom_kill 9\n"}


class TestOomKills:
    """The kernel's counter, read below a root that the test writes."""

    def write(self, root: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    @pytest.mark.parametrize(
        "files, count",
        [
            ({"proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/job/memory.events": V2, **VMSTAT}, 2),
            ({"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/memory.events": V2, **VMSTAT}, 2),
            (
                {
                    "proc/self/cgroup": "3:cpu:/j\n4:memory:/j\n0::/\n",
                    "sys/fs/cgroup/memory/j/memory.oom_control": V1,
                    **VMSTAT,
                },
                6,
            ),
            ({"proc/self/cgroup": "0::/\n", **VMSTAT}, 9),
            ({"proc/self/cgroup": "4:memory:/j\n", "sys/fs/cgroup/memory/j/memory.oom_control": "oom 1\n"}, None),
            (VMSTAT, 9),
            ({}, None),
        ],
    )
    def test_nearest_counter_counts(self, tmp_path, files, count):
        assert process_tree.oom_kills(self.write(tmp_path, files)) == count

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the counter")
    def test_is_found_on_this_machine(self):
        assert process_tree.oom_kills() is not None
