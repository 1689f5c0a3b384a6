"""Every rule that `atlas validate` checks, once: code, severity, what it means, what to do.

The table in the specification follows from `RULES`. Pure data and plain classes.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"

LEVELS: dict[str, str] = {
    "0": "container",
    "1": "names, types, dimensions, attributes",
    "2": "references between parts",
    "3": "values",
    "4": "digests",
    "5": "remarks",
}
"""First digit of a code to what its level checks. A level is checked only where those below found no error."""


@dataclass(frozen=True)
class Rule:
    """One rule of the specification.

    Attributes:
        code: E or W and three digits; the first is the level.
        meaning: What a file that breaks the rule has, in one line.
        fix: What to do about it.
    """

    code: str
    meaning: str
    fix: str

    @property
    def severity(self) -> str:
        return ERROR if self.code.startswith("E") else WARNING


_COPY = "copy the file again, or rebuild it"
_WRITER = "correct the program that wrote it"
_REBUILD = "rebuild the atlas"

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule("E001", "not readable as an HDF5 file with the signature at byte 0", _COPY),
        Rule("E002", "an HDF5 file that is not an importance atlas", "name an atlas file"),
        Rule("E003", "format_version is not MAJOR.MINOR", _WRITER),
        Rule("E004", "another major version", "upgrade with: pip install -U chanfmt"),
        Rule("E005", "needs a feature that this reader does not know", "upgrade with: pip install -U chanfmt"),
        Rule("E006", "a soft or external link", "store the object itself"),
        Rule("E007", "an object with two names", "give every object one name"),
        Rule("E008", "too many objects, attributes or levels of groups", _WRITER),
        Rule("E009", "an object that is neither a group nor a dataset", "remove it"),
        Rule("E010", "a dataset's type is none of f4 f8 i4 i8 u1 str", "store it in one of these types"),
        Rule("E011", "a dataset is empty, a scalar, or has more than 4 axes", _WRITER),
        Rule("E012", "external or virtual storage", "store the values in the file"),
        Rule("E013", "chunked or filtered storage", "store the values contiguously"),
        Rule("E014", "a dataset's bytes are not all there, or lie outside the file", _COPY),
        Rule("E015", "two datasets share storage", _WRITER),
        Rule("E016", "bytes before the end of the HDF5 data are missing, or others follow it", _COPY),
        Rule("E017", "the HDF5 library crashed, hung or ran out of memory on the file", _COPY),
        Rule("E018", "an attribute is not a text, a 64-bit integer or a double, or a text is too long", _WRITER),
        Rule("E101", "a group is missing", _REBUILD),
        Rule("E102", "a variable is missing", "add it, or list it in dropped where it may be"),
        Rule("E103", "an attribute is missing", "add the attribute"),
        Rule("E104", "an attribute has the wrong type", "store the type that the specification names"),
        Rule("E105", "a variable has the wrong type", "store the type that the specification names"),
        Rule("E106", "a variable's axes do not carry the dimension scales of its group", "attach the scales"),
        Rule("E107", "two variables disagree about the length of a dimension", _WRITER),
        Rule("E108", "long_name, units or the flags of label are missing or wrong", "set them as the specification says"),
        Rule("E109", "an attribute or column holds none of the values it may hold", _WRITER),
        Rule("E110", "a text that should be JSON is not, or is not of the right shape", _WRITER),
        Rule("E111", "an extension's array has no merge rule, or one that does not fit its type", "set its attribute merge"),
        Rule("E201", "a row of the FFN table does not match a stack", _WRITER),
        Rule("E202", "a row of a stack is named by no FFN or by several", _WRITER),
        Rule("E203", "the FFN table and a stack disagree about a layer's index", _WRITER),
        Rule("E204", "an FFN's tensors are not whole slices of read and write projections", _WRITER),
        Rule("E205", "an index does not count 0, 1, 2, ...", _WRITER),
        Rule("E206", "sequences and contributions do not agree", _REBUILD),
        Rule("E207", "a sequence or a contribution is counted twice", "merge only atlases of different text"),
        Rule("E208", "token counts do not agree with each other or with the sequences", _REBUILD),
        Rule("E209", "a sequence's SHA-256 is not that of its token ids", _REBUILD),
        Rule("E210", "config_sha256 is not that of config", _REBUILD),
        Rule("E211", "dropped names an unknown variable, or one that is there", "correct dropped"),
        Rule("E212", "connectivity_at and the write support sizes do not agree", "relabel with: atlas label"),
        Rule("E301", "an infinite value", _REBUILD),
        Rule("E302", "NaN where a value must be known, or a value where none can be", _REBUILD),
        Rule("E303", "a negative value of what cannot be negative", _REBUILD),
        Rule("E304", "sums that no set of tokens can have", _REBUILD),
        Rule("E305", "a metric that does not follow from the sums", "derive it again"),
        Rule("E306", "the splits' sums do not add up to the whole", _REBUILD),
        Rule("E307", "something was summed or labelled where no token arrived", _REBUILD),
        Rule("E308", "a setting outside its range", "relabel with: atlas label"),
        Rule("E309", "labels that do not follow from the metrics and the settings", "relabel with: atlas label"),
        Rule("E310", "protection that does not follow from redundancy and the settings", "relabel with: atlas label"),
        Rule("E311", "a value outside its range", _REBUILD),
        Rule("E401", "the content is not what content_sha256 says", _COPY),
        Rule("E402", "the file's bytes are not what file_sha256 says", _COPY),
        Rule("W501", "a newer minor version: some of it may not have been understood", "upgrade with: pip install -U chanfmt"),
        Rule("W502", "a name that the specification does not know", "put additions into a group x_<owner>"),
        Rule("W503", "an unfinished build", "finish it with: atlas build ... --resume"),
        Rule("W504", "no file_sha256: damage outside the content would go unnoticed", "write it with a current chanfmt"),
        Rule(
            "W505",
            "metrics of a definition that this reader does not know, which were not judged",
            "upgrade with: pip install -U chanfmt",
        ),
    )
}


@dataclass(frozen=True)
class Finding:
    """One breach of a rule.

    Attributes:
        code: Key of `RULES`.
        path: Where: an object, or ``object@attribute``.
        message: What is wrong there.
    """

    code: str
    path: str
    message: str

    @property
    def rule(self) -> Rule:
        return RULES[self.code]


MAX_FINDINGS_PER_RULE = 20


class Report:
    """Collects findings; of one rule the first `MAX_FINDINGS_PER_RULE`."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._counts: dict[str, int] = {}

    @property
    def failed(self) -> bool:
        """Whether an error was found."""
        return any(finding.rule.severity == ERROR for finding in self.findings)

    def add(self, code: str, path: str, message: str) -> None:
        self._counts[code] = self._counts.get(code, 0) + 1
        if self._counts[code] <= MAX_FINDINGS_PER_RULE:
            self.findings.append(Finding(code, path, message))

    def check(self, holds: object, code: str, path: str, message: str) -> bool:
        """Add a finding unless ``holds``. Returns whether it does."""
        if not holds:
            self.add(code, path, message)
        return bool(holds)
