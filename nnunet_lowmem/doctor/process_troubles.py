"""Troubles of memory, disks and processes, in logs: causes, what follows from them, and how messages end without one.

To add one is to add a row; of two that a line shows, the first counts as the cause.
"""

from __future__ import annotations

from nnunet_lowmem.doctor import log_numbers
from nnunet_lowmem.doctor.trouble import ASK, COMMAND, CONTINUE, ESTIMATE, EXPORT, NEEDS_NO_POOL, Trouble, row

TROUBLES: tuple[Trouble, ...] = (
    # -- ended for memory ----------------------------------------------------------------------------------------------
    row(
        "the scheduler's memory limit",
        "oom|out_of_me|out of memory|out-of-memory|memory limit|memlimit|exceeded limit",
        r"oom[-_ ]?kill(?:ed)? event|killed by the cgroup out-of-memory|\bOUT_OF_ME(?:MORY\b|\+)|OOMKilled|OOM Killed"
        r"|srun: error: .{0,80}Out Of Memory|exceeded (?:job )?memory limit|TERM_MEMLIMIT|memory limit exceeded"
        r"|job killed: .{0,20}mem .{0,40}exceeded limit",
        "The job took more memory than it was given, and the system ended one of its processes. Stock then waits, or "
        "says that workers died. " + EXPORT,
        COMMAND,
        "The memory of the job is read by itself (SLURM's variables, the cgroup); to ask for the least: " + ESTIMATE,
    ),
    row(
        "ended by the system for memory",
        "out of memory: kill|oom-kill|memory cgroup out of memory|oom_reaper",
        r"Out of memory: Kill|oom-kill:|Memory cgroup out of memory|oom_reaper",
        "The kernel had no memory left for the machine or the container and ended the largest process. " + EXPORT,
        COMMAND,
        ASK,
    ),
    row(
        "killed",
        "killed|code 137|code: 137|status 137|with 137|sigkill|signal 9|code -9|status -9",
        r"(?:^|: *(?:\d+ +)?)(?-i:[Kk]illed)\b(?! by)|\bSIGKILL\b|killed by signal: Killed"
        r"|(?:killed|terminated|died|ended) .{0,20}\bsignal 9\b"
        r"|(?:exit|return)\w*\b.{0,30}\b(?:code|status|with)\W{0,3}(?:137|-9)\b",
        "A process was ended with SIGKILL (exit code 137). If no person and no scheduler did that, it was the system, "
        "whose reason is memory. " + EXPORT,
        COMMAND,
        ASK,
        is_end=True,
    ),
    row(
        "the paging file is too small",
        "paging file|winerror 1455|winerror 8]",
        r"paging file is too small|\[WinError (?:1455|8)\]",
        "Windows could not promise more memory: libraries that are loaded once more in every worker, and arrays, come "
        "to more than RAM and page file. " + NEEDS_NO_POOL,
    ),
    # -- shared memory -------------------------------------------------------------------------------------------------
    row(
        "an image could not be passed on",
        "unable to mmap",
        r"unable to mmap (?P<bytes>\d+) bytes from file",
        "A process could not map what another had put into shared memory: RAM, or address space (ulimit -v), is used "
        "up. " + NEEDS_NO_POOL,
        COMMAND,
        "Which limit binds here: nnunet-lowmem doctor",
        numbers=log_numbers.of_bytes,
    ),
    row(
        "shared memory is too small",
        "bus error|sigbus|insufficient shared memory|shared memory|/torch_",
        r"Bus error|\bSIGBUS\b|insufficient shared memory|out of shared memory"
        r"|unable to (?:open|write|allocate|resize|map)\b.{0,80}(?:shared memory|</?torch_)",
        "Stock's processes pass images through shared memory, /dev/shm; in a container it has 64 MB unless more is "
        "asked for, and whoever writes beyond it is ended with a "
        "bus error. " + NEEDS_NO_POOL + " It does not use /dev/shm.",
        COMMAND,
        "To stay with stock: docker run --shm-size=16g (or --ipc=host)",
    ),
    row(
        "too many open files",
        "too many open files|ancdata|errno 24",
        r"Too many open files|received 0 items of ancdata|\[Errno 24\]",
        "Tensors that are passed between processes keep a file open each, and the limit on open files is reached. "
        + NEEDS_NO_POOL,
        COMMAND,
        "To stay with stock: ulimit -n 65536",
    ),
    # -- an allocation failed ------------------------------------------------------------------------------------------
    row(
        "an array did not fit into RAM",
        "unable to allocate",
        r"Unable to allocate (?P<size>[\d.]+ \w+) for an array with shape (?P<shape>\([\d, ]*\))"
        r" and data type (?P<dtype>\S+)",
        "One array was larger than what was left of the memory.",
        COMMAND,
        ASK,
        numbers=log_numbers.of_array,
    ),
    row(
        "a tensor did not fit into RAM",
        "defaultcpuallocator",
        r"DefaultCPUAllocator(?:.{0,200}?(?P<bytes>\d{4,}) bytes)?",
        "torch asked for more memory than was left: for a tile of the network, or for all classes of the scan.",
        COMMAND,
        ASK,
        numbers=log_numbers.of_bytes,
    ),
    row(
        "the GPU's memory is too small",
        "out of memory|outofmemoryerror|alloc_failed",
        r"\b(?:CUDA|HIP|MPS backend|GPU)\b.{0,40}out of memory(?:.{0,80}?Tried to allocate (?P<size>[\d.]+ \w+))?"
        r"(?:.{0,80}?total capaci?ty of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free)?"
        r"|\.OutOfMemoryError\b(?!: \w+ out)|CU\w+_STATUS_ALLOC_FAILED",
        "Stock keeps the scores of all classes of the whole scan on the GPU; where that fails it starts the case again "
        "with them in RAM, and where the tile itself does not fit it fails. nnunet_lowmem keeps them one patch deep, "
        "and goes on with less where memory runs out.",
        COMMAND,
        "What the GPU must have: nnunet-lowmem doctor -m MODEL -i IMAGES",
        numbers=log_numbers.of_device,
    ),
    row(
        "the case was begun again in RAM",
        "moving results arrays|prediction on device was unsuccessful",
        r"Prediction on device was unsuccessful|Moving results arrays to CPU",
        "An error came up on the device (stock calls each RuntimeError there a lack of memory), so the whole case was "
        "computed once more with the scores of all classes in RAM: slower, and the next thing to run out is RAM.",
        COMMAND,
        is_consequence=True,
        fails=False,
    ),
    row(
        "memory could not be had",
        "memoryerror|bad_alloc|cannot allocate memory|errno 12|failed to map segment",
        r"\bMemoryError\b|std::bad_alloc|Cannot allocate memory|\[Errno 12\]|failed to map segment",
        "The system refused memory: RAM, a limit of the shell (ulimit), or of the container is used up. " + EXPORT,
        COMMAND,
        "Which limit binds here: nnunet-lowmem doctor",
    ),
    # -- disk ----------------------------------------------------------------------------------------------------------
    row(
        "the disk is full",
        "no space left|errno 28|quota exceeded|errno 122|not enough space|winerror 112",
        r"No space left on device|\[Errno 28\]|quota exceeded|\[Errno 122\]|not enough space on the disk"
        r"|\[WinError 112\]",
        "A disk or a quota is full. Stock leaves what it had written of the file, and `--continue_prediction` takes "
        "that for a finished case: look at the size of the last files, or remove them.",
        "Make room; then, with files that are whole or not there: " + COMMAND,
    ),
    row(
        "no permission",
        "permissionerror|errno 13|read-only file system|errno 30|winerror 5",
        r"PermissionError|\[Errno 13\]|Read-only file system|\[Errno 30\]|\[WinError 5\]",
        "A file or folder may not be read or written by this user.",
        "Choose an output folder of yours with -o, and with --tmp_dir one for temporary files; then " + COMMAND,
    ),
    # -- ended by somebody ---------------------------------------------------------------------------------------------
    row(
        "ended by a time limit",
        "time limit|timeout ***|runlimit|walltime",
        r"DUE TO TIME LIMIT|TIMEOUT \*\*\*|TERM_RUNLIMIT|job killed: walltime",
        "The time of the job was up. If the last lines are those of an export, it may have hung: nnU-Net before 2.8 "
        "waits for ever for a worker that the system has ended.",
        "Go on where finished cases end: " + CONTINUE,
        is_end=True,
    ),
    row(
        "no progress for a long time",
        "without progress|no progress",
        r"(?:no|without) (?:sign of )?progress for",
        "A worker, a disk or a network share did not answer for --worker_timeout seconds.",
        "Copy the images to a local disk; if it is slow and not stuck: {command:--worker_timeout 3600}",
        fails=False,
    ),
    row(
        "more than the budget",
        "does not fit",
        r"does not fit: V?RAM projected.{0,120}",
        "nnunet_lowmem found before it began that the case needs more than --max_ram, --max_vram or the machine "
        "leaves; the line says how much, and of what.",
        "What it needs: " + ESTIMATE,
    ),
    row(
        "ended by a signal",
        "terminated|keyboardinterrupt|interrupted|cancelled at",
        r"^Terminated(?: \(\w+\))?(?:$|\s{2,})|: line \d+: +\d+ Terminated\b|^(?:Keyboard)?Interrupt(?:ed)?$"
        r"|\bCANCELLED AT\b",
        "Somebody, or a scheduler, ended the run.",
        "Go on where finished cases end: " + CONTINUE,
        is_end=True,
    ),
    row(
        "a case failed",
        "error: case",
        r"^error: case .*",
        "nnunet_lowmem predicted the others; the line says at which stage it was, and why. The same stands in "
        "lowmem_failures.json in the output folder.",
        "Mend what the line names; then only the missing cases: " + CONTINUE,
    ),
    # -- what follows from others --------------------------------------------------------------------------------------
    row(
        "a preprocessing worker has gone",
        "background workers died",
        r"Background workers died",
        "A process that preprocesses is gone. Where no error stands above, the system has ended it: RAM was full, "
        "since each of those processes reads, casts and resamples a whole scan in float64. The cases behind it, and "
        "often finished ones, are lost.",
        COMMAND,
        ASK,
        is_consequence=True,
    ),
    row(
        "an export worker has gone",
        "workers are no longer alive|export worker died|6 feet under",
        r"background workers are no longer alive|export worker died|background worker is 6 feet under",
        "A process that resamples and writes is gone. Where no error stands above, the system has ended it: RAM was "
        "full. " + EXPORT,
        COMMAND,
        ASK,
        is_consequence=True,
    ),
    row(
        "a process of the pool has gone",
        "eoferror|brokenpipeerror|connectionreseterror",
        r"\bEOFError\b(?!: (?:Ran out|Compressed))|BrokenPipeError|ConnectionResetError",
        "One process waited for another that is gone: as a rule the system ended that one, for memory. "
        + NEEDS_NO_POOL,
        COMMAND,
        is_consequence=True,
    ),
)

#: How a run's messages end that no error explains, by the last thing that stock says of its way.
ENDINGS = {
    "waiting": Trouble(
        "the export hangs, or was ended",
        "All cases were predicted, and stock waited for the processes that resample and write, but never came to its "
        "last line, Segmentation export complete. It waits for ever for a worker that does not answer, and before 2.8 "
        "for one that the system has ended as well (RAM was full). " + EXPORT,
        (COMMAND, ASK),
    ),
    "sent": Trouble(
        "nothing after the last case was sent off",
        "The log ends where stock waits for the processes that resample and write. If the label maps are there, all is "
        "well, since nnU-Net before 2.8 says nothing more. If one is missing, the export hangs or was ended: RAM was "
        "full. " + EXPORT,
        (COMMAND, ASK),
        fails=False,
    ),
    "predicting": Trouble(
        "ended while a case was predicted",
        "The log stops between the tiles of a case: the process was ended from outside without a word, which the "
        "system does when memory is gone, or it is still running.",
        (COMMAND, ASK),
    ),
    "preprocessing": Trouble(
        "ended, or hangs, before the first case",
        "No case was ready to be predicted: the process that reads and resamples the scan does not answer (a stuck "
        "disk or network share), or it takes very long, or everything was ended from outside.",
        ("Which says which file and which stage do not answer: " + COMMAND,),
    ),
}

#: Of a log that shows no other cause.
UNKNOWN = row(
    "an error that is not known here",
    "error|exception",
    r"(?:^|:: |- )(?:[A-Za-z_]\w*\.)*(?-i:[A-Z])\w*(?:Error|Exception)\b(?::|\s*$)|(?-i:^error: )",
    "A program ended with this error; no line of the log is one of the known troubles.",
    "Which names case, stage and file of what fails: " + COMMAND,
)
