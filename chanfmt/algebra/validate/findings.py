"""Every rule that `atlas validate` checks, once: code, severity, meaning, remedy.

The table in the specification is generated from `RULES`. This module holds data and plain classes only.
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
"""First digit of a code to the subject of its level. A level is checked only if the levels below it found no error."""


@dataclass(frozen=True)
class Rule:
    """One rule of the specification.

    Attributes:
        code: E or W and three digits; the first digit is the level.
        meaning: Fault of a file that breaks the rule, in one line.
        fix: What to do about the fault.
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
        Rule("E001", "bytes that cannot be read as an HDF5 file with the signature at byte 0", _COPY),
        Rule("E002", "an HDF5 file that is not an importance atlas", "name an atlas file"),
        Rule("E003", "a format_version that is not MAJOR.MINOR", _WRITER),
        Rule("E004", "another major version", "upgrade with: pip install -U chanfmt"),
        Rule("E005", "a required feature that this reader does not know", "upgrade with: pip install -U chanfmt"),
        Rule("E006", "a soft or external link", "store the object itself"),
        Rule("E007", "an object with two names", "give every object one name"),
        Rule("E008", "too many objects, attributes or levels of groups", _WRITER),
        Rule("E009", "an object that is neither a group nor a dataset", "remove it"),
        Rule("E010", "a dataset with another type than f4 f8 i4 i8 u1 str", "store it in one of these types"),
        Rule("E011", "a dataset that is empty, a scalar, or has more than 4 axes", _WRITER),
        Rule("E012", "external or virtual storage", "store the values in the file"),
        Rule("E013", "chunked or filtered storage", "store the values contiguously"),
        Rule("E014", "bytes that are missing or lie outside the file, or texts that claim more bytes than the file has", _COPY),
        Rule("E015", "two datasets that share storage", _WRITER),
        Rule("E016", "fewer or more bytes than its HDF5 data", _COPY),
        Rule("E017", "contents on which the HDF5 library crashed, hung or ran out of memory", _COPY),
        Rule("E018", "an attribute that is not a text, a 64-bit integer or a double, or a text that is too long", _WRITER),
        Rule("E101", "a missing group", _REBUILD),
        Rule("E102", "a missing variable", "add the variable, or list it in dropped if it may be dropped"),
        Rule("E103", "a missing attribute", "add the attribute"),
        Rule("E104", "an attribute of the wrong type", "store the type that the specification names"),
        Rule("E105", "a variable of the wrong type", "store the type that the specification names"),
        Rule("E106", "a variable whose axes do not carry the dimension scales of its group", "attach the scales"),
        Rule("E107", "two variables that disagree about the length of a dimension", _WRITER),
        Rule("E108", "a long_name, units or flags of label that are missing or wrong", "set them as the specification says"),
        Rule("E109", "an attribute or column with a value that it may not hold", _WRITER),
        Rule("E110", "a text that should be JSON and is not, or JSON of the wrong type", _WRITER),
        Rule(
            "E111",
            "an extension's array without a merge rule, or with a rule that does not fit its type",
            "set its attribute merge",
        ),
        Rule("E201", "a row of the FFN table that does not match a stack", _WRITER),
        Rule("E202", "a row of a stack that no FFN or several FFNs name", _WRITER),
        Rule("E203", "an FFN table and a stack that disagree about a layer's index", _WRITER),
        Rule("E204", "an FFN whose tensors are not whole slices of read and write projections", _WRITER),
        Rule("E205", "an index that does not count 0, 1, 2, ...", _WRITER),
        Rule("E206", "sequences and contributions that do not agree", _REBUILD),
        Rule("E207", "a sequence or a contribution that is counted twice", "merge only atlases of different text"),
        Rule("E208", "token counts that do not agree with each other or with the sequences", _REBUILD),
        Rule("E209", "a sequence's SHA-256 that is not the SHA-256 of its token ids", _REBUILD),
        Rule("E210", "a config_sha256 that is not the SHA-256 of config", _REBUILD),
        Rule("E211", "an unknown variable in dropped, or a variable that the file holds", "correct dropped"),
        Rule("E212", "a connectivity_at and write support sizes that do not agree", "relabel with: atlas label"),
        Rule("E213", "a sequence that does not begin and end with the special tokens that the calibration states", _REBUILD),
        Rule("E214", "width fields and width factors that do not agree with each other or with the widths", _WRITER),
        Rule("E301", "an infinite value", _REBUILD),
        Rule("E302", "NaN where a value must be known, or a value where NaN must be", _REBUILD),
        Rule("E303", "a negative value in a variable that cannot be negative", _REBUILD),
        Rule("E304", "sums that no set of tokens can have", _REBUILD),
        Rule("E305", "a metric that does not follow from the sums", "derive it again"),
        Rule("E306", "sums of splits that do not add up to the whole", _REBUILD),
        Rule("E307", "a sum or a label where no token arrived", _REBUILD),
        Rule("E308", "a setting outside its range", "relabel with: atlas label"),
        Rule("E309", "labels that do not follow from the metrics and the settings", "relabel with: atlas label"),
        Rule("E310", "protection that does not follow from redundancy and the settings", "relabel with: atlas label"),
        Rule("E311", "a value outside its range", _REBUILD),
        Rule("E401", "content that does not match content_sha256", _COPY),
        Rule("E402", "bytes that do not match file_sha256", _COPY),
        Rule(
            "W501", "a newer minor version, which this reader may understand only in part", "upgrade with: pip install -U chanfmt"
        ),
        Rule("W502", "a name that the specification does not know", "put additions into a group x_<owner>"),
        Rule("W503", "an unfinished build", "finish it with: atlas build ... --resume"),
        Rule("W504", "no file_sha256, so damage outside the content would go unnoticed", "write it with a current chanfmt"),
        Rule(
            "W505",
            "metrics of a definition that this reader does not know and did not check",
            "upgrade with: pip install -U chanfmt",
        ),
    )
}


@dataclass(frozen=True)
class Finding:
    """One breach of a rule.

    Attributes:
        code: Key of `RULES`.
        path: The object at fault, or ``object@attribute``.
        message: What is wrong with the object.
    """

    code: str
    path: str
    message: str

    @property
    def rule(self) -> Rule:
        return RULES[self.code]


MAX_FINDINGS_PER_RULE = 20


class Report:
    """Findings of one file; of every rule, the first `MAX_FINDINGS_PER_RULE`."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._counts: dict[str, int] = {}

    @property
    def failed(self) -> bool:
        """Whether one of the findings is an error."""
        return any(finding.rule.severity == ERROR for finding in self.findings)

    def add(self, code: str, path: str, message: str) -> None:
        self._counts[code] = self._counts.get(code, 0) + 1
        if self._counts[code] <= MAX_FINDINGS_PER_RULE:
            self.findings.append(Finding(code, path, message))

    def check(self, holds: object, code: str, path: str, message: str) -> bool:
        """Add a finding unless ``holds``. Returns ``holds`` as a bool."""
        if not holds:
            self.add(code, path, message)
        return bool(holds)
