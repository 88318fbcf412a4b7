"""Run any command and measure it from outside: seconds, stages, and the memory of its whole process tree.

    python run.py ours.json -- nnUNetv2_predict_lowmem -m MODEL -i IMAGES -o OUT -f 0 --disable_tta -device cpu

Of commands other than ours only the whole is known. `nnunet-lowmem compare` measures in the same way and tells stock's
stages, too; this is for one side alone. The exit code is that of the command, or 1 where it was ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from nnunet_lowmem.report.measured_command import machine_facts, run_measured
from nnunet_lowmem.sizes import parse_size
from nnunet_lowmem.system.memory_limits import total_ram_bytes
from nnunet_lowmem.system.signals import ending_on_signals


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [--stop_at SIZE] [--timeout S] RESULT.json -- COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, help="file for the result")
    parser.add_argument("--stop_at", default="90%", help="stop at this peak of the process tree (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds (default: %(default)s)")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    if shutil.which(args.command[0]) is None:
        parser.error(f"no such command: {args.command[0]}")
    trace, limit_bytes = args.json.with_suffix(".trace.jsonl"), parse_size(args.stop_at, total_ram_bytes())
    with ending_on_signals():
        run = run_measured(args.command, os.environ, trace, limit_bytes, args.timeout)
    result = {"command": [Path(args.command[0]).name, *args.command[1:]], **run.as_dict(), "machine": machine_facts()}
    args.json.write_text(json.dumps({**result, "timeline": run.timeline}))
    print(json.dumps(result, indent=1))
    return 1 if run.stopped else run.exit_code


if __name__ == "__main__":
    sys.exit(main())
