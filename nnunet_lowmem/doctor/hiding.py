"""Lines of somebody's log with what may name a person, a place or a machine hidden: paths, files, cases, users, hosts.

What can be told by its form is hidden; a name that stands in a sentence like any other word cannot be.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterable

from nnunet_lowmem.names import shown

#: Lines with the name of a case: of stock, of ours.
CASE_NAMES = re.compile(
    r"^\s*(?:Predicting|done with) (?!image of shape|part \d)(?P<stock>.+?):?\s*$"
    r"|\bcase '?(?P<ours>[^\s:,'](?:[^:,']{0,80}?))(?=[:,']| does not| cannot| failed|$)"
)

# what such a file is called is nobody's name
_KNOWN_FILE = re.compile(
    r"^(?:checkpoint_(?:final|best|latest)\.pth|(?:plans|dataset|dataset_fingerprint|lowmem_failures)\.json"
    r"|fold_(?:\d+|all)|torch_[\d_]+)$"
)
# the part of a path below which names are those of packages
_PACKAGES = re.compile(r".*[/\\](?:site-packages|dist-packages|python3\.\d+)[/\\](?P<inner>.+)$")
_URL = re.compile(r"\b\w+://\S+")
_QUOTED = re.compile(r"""(?P<quote>['"<])(?P<path>(?:~|[A-Za-z]:|\\\\|\.{0,2}/)[^'"<>]*)(?P<end>['">])""")
# words of a path may be followed by others if a slash comes behind them: "C:\Users\Anna Maria\scans"
_WORD = r"[^\s'\"<>|\[\]/\\]+"
_PATH = re.compile(
    rf"(?<![\w<>/\\.])(?:[A-Za-z]:[/\\]|\\\\|~?/|\.{{1,2}}/)(?:{_WORD}(?: {_WORD}){{0,6}}[/\\]+)*"
    rf"(?:[^\s'\"<>|,;()\[\]/\\]+)?(?: [A-Z][\w.-]*)*"
)
_RELATIVE = re.compile(
    r"(?<![\w<>/\\.])(?!(?:[Ii]t/s|s/it|and/or|[Nn]/[Aa]|I/O)\b)(?=\S*[A-Za-z])\w[\w.+-]*(?:[/\\][\w.+-]+)+"
)
_ENDINGS = (
    r"nii(?:\.gz)?|nii_tmp|nrrd|nhdr|mha|mhd|mgz|mgh|dcm|ima|tiff?|png|jpe?g|bmp|gipl(?:\.gz)?|npz|npy|pkl|h5|hdf5"
    r"|zarr|b2nd"
    r"|zip|gz|csv|txt|log|json|ya?ml|xml|pdf|docx?|xlsx?|py|sh"
)
# with the capitalised words before it
_FILE = re.compile(
    rf"(?<![\w/\\])(?:(?-i:[A-Z])[\w-]*[ ,]+){{0,3}}[^\s'\"<>=:(]{{1,200}}?(?P<ending>\.(?:{_ENDINGS}))\b",
    re.IGNORECASE,
)
# values of the flags that name files, and of variables
_FLAG = re.compile(
    r"(?P<flag>(?<!\S)['\"]?-{1,2}(?:i|o|m|input|output|prev_stage_predictions|tmp_dir|n)['\"]?[ =,]+)\S+"
)
_ADDRESS = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@[\w.-]{1,200}|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|\b(?:[0-9a-f]{1,4}:){4,7}[0-9a-f]{1,4}\b"
    r"|(?<![\w.])(?:[\w-]{1,63}\.){1,5}(?:de|com|org|edu|net|ch|uk|fr|at|cn|jp|nl|es|ca|us|au|gov|local|lan|internal)\b"
)
_HOST = re.compile(
    r"(?P<before>\bON |\b(?:host|hostname|nodelist|server|NODELIST)[ =:]+|\bsrun: error: |\bslurmstepd-)"
    r"[\w.-]+(?:\[[\d,-]+\])?|(?<!\w)[A-Za-z][\w-]*\[\d[\d,-]*\]"
)
_SYSTEM_LOG = re.compile(
    r"^(?P<time>(?:[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d|\d{4}-\d\d-\d\d[T ][\d:.,+Z-]+)) [\w.-]+ "
    r"(?=[\w.-]+(?:\[\d+\])?:)"
)
_PERSON = re.compile(
    r"(?P<before>(?:\b(?:patient\w*|subject\w*|user(?:name)?|logname|login|mrn|accession\w*|birth\w*)\b(?:'s)?['\"]?"
    r"\s*(?:name|id|date)?['\"]?[\s:=]+)|\(0010,\d{4}\)\s*)\S.*$",
    re.IGNORECASE,
)
_NAMED = re.compile(r"""(?P<quote>['"])(?!PATH|FILE|\.\.\.)[^'"]+(?P=quote)""")
_SHORTEST_NAME = 3
# longer ones are cut before they are looked at
_LONGEST = 2000


class Hider:
    """Hides names, those included that it is told of.

    Parameters
    ----------
    names : iterable of str
        Of cases.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        known = sorted({name for name in names if len(name) >= _SHORTEST_NAME}, key=len, reverse=True)
        self._cases = [re.compile(rf"(?<!\w){re.escape(name)}(?:_\d{{4}})?(?!\w)") for name in known]
        here = [_user(), socket.gethostname().partition(".")[0]]
        here = [name for name in here if len(name) >= _SHORTEST_NAME and name not in ("root", "localhost")]
        self._here = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in here]

    def hidden(self, line: str, *, with_quoted: bool = False) -> str:
        """Return a line, escaped for any terminal, with capital letters in the places of names.

        With `with_quoted` whatever is in quotes is hidden as well: of a line that is not known it may be anything.
        """
        line = shown(line[:_LONGEST].replace("\t", " "))
        line = _SYSTEM_LOG.sub(r"\g<time> HOST ", line)
        for case in self._cases:
            line = case.sub("CASE", line)
        line = CASE_NAMES.sub(_without_case, line)
        line = _URL.sub("URL", line)
        line = _QUOTED.sub(lambda found: found["quote"] + _of_path(found["path"]) + found["end"], line)
        line = _PATH.sub(lambda found: _of_path(found[0]), line)
        line = _FLAG.sub(r"\g<flag>PATH", line)
        line = _FILE.sub(lambda found: found[0] if _is_known(found[0]) else f"FILE{found['ending']}", line)
        line = _RELATIVE.sub(lambda found: found[0] if found[0].startswith(("PATH/", "FILE")) else "PATH", line)
        line = _PERSON.sub(r"\g<before>NAME", line)
        line = _ADDRESS.sub("HOST", line)
        line = _HOST.sub(lambda found: (found["before"] or "") + "HOST", line)
        for name in self._here:
            line = name.sub("NAME", line)
        return _NAMED.sub(r"\g<quote>...\g<quote>", line) if with_quoted else line


def _without_case(found: re.Match[str]) -> str:
    start, end = (position - found.start() for position in found.span(found.lastgroup or 0))
    return f"{found[0][:start]}CASE{found[0][end:]}"


def _is_known(file: str) -> bool:
    return _KNOWN_FILE.match(file) is not None or file.startswith((".../", "PATH/"))


def _of_path(path: str) -> str:
    """Name of a path what any machine may have: the part below Python's packages, or a file that every model has."""
    if inner := _PACKAGES.match(path):
        return f".../{inner['inner']}"
    trailing = path[len(path.rstrip(".:,;)")) :]
    last = re.split(r"[/\\]", path.rstrip(".:,;)"))[-1]
    return (f"PATH/{last}" if _KNOWN_FILE.match(last) else "PATH") + trailing


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return os.environ.get("USERNAME", "")
