"""What ``nnunet-lowmem doctor`` prints: findings line by line, a diagnosis, tables of what a case takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.names import shown
from nnunet_lowmem.sizes import format_gib, format_gib_up

if TYPE_CHECKING:  # the first lines stand before torch is loaded
    from nnunet_lowmem.budget.estimates import Estimate
    from nnunet_lowmem.doctor.advice import Advice
    from nnunet_lowmem.doctor.log import Diagnosis, Symptom
    from nnunet_lowmem.doctor.tools import Command

_STYLES = {Verdict.FINE: "green", Verdict.MIND: "yellow", Verdict.FAILS: "bold red"}
_SHOWN_PROBLEMS = 3
_SENTENCE = re.compile(r"(?<=[.:]) (?=[A-Z])")


class Teller:
    """Prints what is found as it comes, or keeps it for JSON.

    Attributes
    ----------
    told : dict
        Plain data.
    fails : bool
        Something will fail.
    """

    def __init__(self, as_json: bool) -> None:
        self._console = Console(markup=False, emoji=False, highlight=False, quiet=as_json)
        self.told: dict[str, Any] = {}
        self.fails = False

    def finding(self, finding: Finding) -> None:
        """Tell of one thing."""
        self.fails |= finding.verdict is Verdict.FAILS
        self.told.setdefault("findings", []).append(finding.as_json())
        verdict, style = f"{finding.verdict.value:<14}", _STYLES[finding.verdict]
        advice = f"-> {finding.advice}" if finding.advice else ""
        if not self._console.is_terminal:  # for grep: one line
            self._console.print(f"{verdict} {finding.about:<20} {finding.seen} {advice}".rstrip(), soft_wrap=True)
            return
        grid = Table.grid(Column(width=14), Column(min_width=20, no_wrap=True), Column(overflow="fold"), padding=(0, 1))
        grid.add_row(verdict, finding.about, finding.seen, style=style)
        if advice:
            grid.add_row("", "", advice)
        self._console.print(grid)

    def diagnosis(self, found: Diagnosis, command: Command, estimate: str) -> None:
        """Tell what a log shows, and what to type."""
        self.fails |= found.fails
        causes = [told for told in found.causes if told.fails] or found.causes
        advice = [line.format(command=command, estimate=estimate) for told in causes for line in told.trouble.advice]
        advice = list(dict.fromkeys(advice))
        self.told["log"] = {**found.as_json(), "advice": advice}
        self._console.print(f"A log of {found.tool.name}{f': {found.way}' if found.way else ''}.\n")
        for told in found.symptoms:
            if told.is_overcome:
                self._console.print(f"Seen, but the run went on to its end: {_named(told)}")
        if not causes:
            self._nothing(found, command)
            return
        said: set[str] = set()
        for number, told in enumerate(causes):
            self._console.print("What happened" if number == 0 else "And", end=": ")
            self._symptom(told, said)
        for told in found.symptoms:
            if told not in causes and not told.is_overcome:
                how = "Which led to" if told.trouble.is_consequence else "Also seen"
                self._console.print(f"{how}: {_named(told)}\n")
        self._advise(advice, command)

    def _advise(self, advice: Sequence[str], command: Command) -> None:
        self._console.print("What to type now", style="bold")
        for line in advice:
            self._console.print(f"  {line}", soft_wrap=True)
        if any("FLAGS" in line for line in advice):
            more = " Give them to the doctor, too: it tells what the case takes." if command.takes_flags else ""
            self._console.print(f"FLAGS stands for the flags of that run.{more}")

    def _symptom(self, told: Symptom, said: set[str]) -> None:
        self._console.print(told.trouble.name, style="bold red" if told.fails else "yellow")
        if told.line_number:
            more = f", and {told.count - 1} more" if told.count > 1 else ""
            self._console.print(f"  line {told.line_number}{more}: {told.line}", soft_wrap=True)
        sentences = [text for text in _SENTENCE.split(told.trouble.happened) if text not in said]
        said.update(sentences)
        self._console.print(" ".join([*sentences, told.numbers]).strip() + "\n")

    def _nothing(self, found: Diagnosis, command: Command) -> None:
        if found.is_complete:
            self._console.print(
                "It ends as the log of a run does in which nothing is missing. Stock says so, too, when the disk was "
                "full "
                "and a file was cut: look at the sizes of the last ones."
            )
            if command.takes_flags:
                self._console.print(
                    "This compares files with their records, decodes others, and predicts again what is damaged:"
                )
                self._console.print(f"  {command:--continue_prediction}", soft_wrap=True)
            return
        self._console.print("None of the known troubles. The last lines that may matter:")
        for line in found.last_lines:
            self._console.print(f"  {line}", soft_wrap=True)
        self._console.print("What is known of this machine: nnunet-lowmem doctor")

    def case(self, largest: Advice | None, estimates: Sequence[Estimate]) -> None:
        """Tell what the largest case takes here and elsewhere, and which do not fit."""
        problems = [estimate for estimate in estimates if estimate.problem is not None]
        self.fails |= bool(problems)
        self.told["problems"] = {shown(estimate.case): estimate.problem for estimate in problems}
        if largest is not None:
            self._largest(largest, len(estimates))
        for estimate in problems[:_SHOWN_PROBLEMS]:
            self._console.print(f"{estimate.case}: {shown(str(estimate.problem))}", style="bold red", soft_wrap=True)
        if len(problems) > _SHOWN_PROBLEMS:
            self._console.print(f"and {len(problems) - _SHOWN_PROBLEMS} more cases that cannot be predicted here")

    def _largest(self, largest: Advice, cases: int) -> None:
        self.told["largest_case"] = largest.as_json()
        facts, plan = largest.facts, largest.plan
        shape = " x ".join(map(str, facts.original_shape))
        which = "The case" if cases == 1 else f"The largest of {cases} cases"
        self._console.print(f"{which}: {facts.name}, {shape} voxels, {largest.model.heads} classes or regions")
        here = "not known" if plan.budget.ram_bytes is None else format_gib(plan.budget.ram_bytes)
        table = Table(*(Column(name, justify="right") for name in ("RAM in", "stock", "this package", "here")))
        for name, stock, ours in largest.stages():
            table.add_row(name, f"about {format_gib(stock)}", format_gib(ours), here)
        self._console.print(table)
        self._console.print(f"{largest.least()}\nHere: {plan.placement.in_words()}", soft_wrap=True)
        if facts.previous_stage_bytes:
            self._console.print("It is the second stage of a cascade: -prev_stage_predictions FOLDER is needed, too")
        self._console.print()
        self._hardware(largest)

    def _hardware(self, largest: Advice) -> None:
        carried = largest.hardware()
        sizes = list(dict.fromkeys(cell.vram_gib for cell in carried))
        names = [f"GPU {size} GiB" if size else "no GPU" for size in sizes]
        table = Table("RAM", *names, title="Machines that carry it")
        for ram in dict.fromkeys(cell.ram_gib for cell in carried):
            table.add_row(f"{ram} GiB", *(cell.in_words() for cell in carried if cell.ram_gib == ram))
        self._console.print(table)
        self._console.print(
            "Stock is counted with one process each (-npp 1 -nps 1). 1 GiB of RAM is left to the system, and 0.7 GiB "
            "of a GPU to CUDA. What spills needs as much room in "
            "--tmp_dir.\n"
        )

    def configurations(self, rows: Mapping[str, Advice | str]) -> None:
        """Tell of the other trained configurations of the model's data, each with its case or with words."""
        told = {name: found if isinstance(found, str) else found.as_json() for name, found in rows.items()}
        self.told["other_configurations"] = told
        table = Table("configuration", "RAM, stock", "smallest", "here", title="Other trained configurations")
        for name, found in rows.items():
            if isinstance(found, str):
                self._console.print(f"{name}: {shown(found)}", soft_wrap=True)
                continue
            estimate = found.estimate
            fits = "does not fit" if estimate.problem else "fits"
            fits += ", behind its previous stage" if found.facts.previous_stage_bytes else ""
            table.add_row(name, format_gib(estimate.stock_bytes), format_gib_up(estimate.least_ram_bytes), fits)
        if table.row_count:
            self._console.print(table)


def _named(told: Symptom) -> str:
    return f"{told.trouble.name} (line {told.line_number})"
