"""Level 3: values, by themselves and against the values that they follow from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import labels, metrics
from chanfmt.base.errors import UsageError
from chanfmt.format import schema
from chanfmt.format.records import LabelSettings

if TYPE_CHECKING:
    from chanfmt.algebra.validate.findings import Report
    from chanfmt.format.container import Container

SUM_TOLERANCE = 1e-9
"""Relative tolerance of the splits' sums against the whole."""
LAW_TOLERANCE = 1e-5
"""Relative slack of inequalities between sums, which are partly accumulated in float32."""
RELATIVE_SLACK = 1e-6
"""Relative slack for the rounding of a share to float32."""


def check_values(container: Container, report: Report) -> None:
    """Add breaches of the rules E3.. to ``report``."""
    stated = {item.name: container.attribute("labels", item.name) for item in schema.ATTRIBUTES["/labels"]}
    core_rho = stated.pop("core_rho")
    settings = LabelSettings(**stated)
    try:
        settings.check()
    except UsageError as error:
        report.add("E308", "/labels", error.message.removeprefix("--"))
        return
    report.check(0 <= core_rho <= 1, "E308", "/labels@core_rho", f"is {core_rho:g}")
    report.check(settings.redundancy_top_k >= 1, "E308", "/labels@redundancy_top_k", f"is {settings.redundancy_top_k}")
    for path, name in (("calibration", "mean_loss"), ("producer", "seconds")):
        value, where = container.attribute(path, name), f"/{path}@{name}"
        report.check(not np.isinf(value), "E301", where, "is infinite")
        report.check(not np.isnan(value), "E302", where, "is NaN")
        report.check(not value < 0, "E303", where, "is negative")
    judged = container.attribute("calibration", "metric_definition") == schema.METRIC_DEFINITION
    report.check(judged, "W505", "/calibration@metric_definition", f"is not {schema.METRIC_DEFINITION}")
    _extensions(container, report)
    for name in container.children("stacks"):
        stack = _Stack(container, report, name)
        with np.errstate(all="ignore"):
            stack.check_each()
            stack.check_sums(judged=judged)
            if judged:
                stack.check_labels(settings)


def _extensions(container: Container, report: Report) -> None:
    for path, node in container.nodes.items():
        if path.startswith(schema.EXTENSION_PREFIX) and node.code in ("f4", "f8"):
            report.check(not np.isinf(container.read(path)).any(), "E301", f"/{path}", "holds an infinite value")


class _Stack:
    """The arrays of one stack; each is read at its first use and kept."""

    def __init__(self, container: Container, report: Report, name: str) -> None:
        self.container = container
        self.report = report
        self.path = f"stacks/{name}"
        self.tokens = container.read(f"{self.path}/tokens")
        self.empty = self.tokens == 0
        self._cache: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return f"{self.path}/{name}" in self.container

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._cache:
            self._cache[name] = self.container.read(f"{self.path}/{name}")
        return self._cache[name]

    def holds(self, *names: str) -> bool:
        return all(name in self for name in names)

    def check(self, holds: Any, code: str, name: str, message: str) -> bool:
        """Add a finding unless ``holds``. If ``holds`` is an array, the finding names the first place where it is False."""
        wrong = ~np.asarray(holds, dtype=bool)
        if wrong.any() and wrong.ndim:
            places = np.argwhere(wrong)
            message = f"{message} at {places[0].tolist()}" + (f" and {len(places) - 1} others" if len(places) > 1 else "")
        return self.report.check(not wrong.any(), code, f"/{self.path}/{name}", message)

    def check_each(self) -> None:
        """Check every array by itself: finite, known where it must be known, inside its range."""
        for variable in schema.STACK_VARIABLES:
            name = variable.name
            if name not in self:
                continue
            values = self[name]
            if variable.dtype in ("f4", "f8"):
                if not self.check(~np.isinf(values), "E301", name, "is infinite"):
                    continue
                self._check_known(variable)
            self._check_range(variable)
            if variable.beside in self:
                there = ~np.isnan(self[variable.beside])
                self.check((values >= 0) == there, "E302", variable.beside, f"is not known exactly where {name} is given")
        if self.holds("write_norm", "write_norm_l1"):
            self.check(
                self["write_norm"] <= self["write_norm_l1"] * np.float32(1 + LAW_TOLERANCE),
                "E311",
                "write_norm",
                "is larger than the L1 norm",
            )

    def _check_range(self, variable: schema.Variable) -> None:
        name, values, allowed = variable.name, self[variable.name], variable.range
        low, high = allowed.low, allowed.high
        if variable.ids_of == "channel":
            high = values.shape[-1] - 1
        if not allowed.closed:
            self.check(~(values < low), "E303", name, "is negative")
            self.check(~(values > high * (1 + RELATIVE_SLACK)), "E311", name, f"is more than {high:.4g}")
        elif values.dtype.kind == "f":
            outside = (values < low) | (values > high * (1 + RELATIVE_SLACK))
            self.check(~outside, "E311", name, f"is not in {low} to {high}")
        else:
            self.check((values >= low) & (values <= high), "E311", name, f"is not in {low} to {high}")

    def _check_known(self, variable: schema.Variable) -> None:
        name, unknown, known = variable.name, np.isnan(self[variable.name]), variable.known_where
        if known == schema.ALWAYS:
            self.check(~unknown, "E302", name, "is NaN")
            return
        if known == schema.PER_FFN:
            self.check(unknown.all(axis=-1) | ~unknown.any(axis=-1), "E302", name, "is NaN for some channels only")
            return
        # One flag per FFN, aligned with the array: (support, layer[, expert], channel) or (layer[, expert]).
        empty = self.empty if "channel" not in variable.dimensions else self.empty[..., None]
        if known == schema.WITH_TOKENS:
            self.check(~unknown | empty, "E302", name, "is NaN where tokens arrived")
        self.check(unknown | ~empty, "E302", name, "has a value where no token arrived")

    def check_sums(self, *, judged: bool) -> None:
        """Check the sums against each other, and the metrics against the sums if their definition is known (``judged``)."""
        count = self.tokens.astype(np.float64)[..., None]
        slack = 1 + LAW_TOLERANCE
        for variable in schema.SUMS:
            if variable.name in self:
                self.check(
                    (self[variable.name] == 0) | ~self.empty[..., None], "E307", variable.name, "is not 0 where no token arrived"
                )
        if self.holds("sum_u", "sum_u2"):
            self.check(
                np.abs(self["sum_u"]) <= np.sqrt(count * self["sum_u2"]) * slack, "E304", "sum_u", "is larger than sum_u2 allows"
            )
        if self.holds("sum_q", "sum_abs_q"):
            self.check(np.abs(self["sum_q"]) <= self["sum_abs_q"] * slack, "E304", "sum_q", "is larger than sum_abs_q")
        if self.holds("sum_abs_q", "sum_q2"):
            self.check(
                self["sum_abs_q"] <= np.sqrt(count * self["sum_q2"]) * slack, "E304", "sum_abs_q", "is larger than sum_q2 allows"
            )
        if self.holds("max_abs_u", "sum_u2"):
            largest = np.square(self["max_abs_u"], dtype=np.float64)
            self.check(
                (largest * count * slack >= self["sum_u2"]) & (largest <= self["sum_u2"] * slack),
                "E304",
                "max_abs_u",
                "is not a largest value that sum_u2 can have",
            )
        if self.holds("sum_q2", "sum_q2_split"):
            self.check(
                np.isclose(self["sum_q2_split"].sum(axis=0), self["sum_q2"], rtol=SUM_TOLERANCE, atol=0),
                "E306",
                "sum_q2_split",
                "does not add up to sum_q2",
            )
            none = self.container.read(f"{self.path}/tokens_split") == 0
            self.check((self["sum_q2_split"] == 0) | ~none[..., None], "E307", "sum_q2_split", "is not 0 where no token arrived")
        if judged:
            sums = {variable.name: self[variable.name] for variable in schema.SUMS if variable.name in self}
            for name, expected in metrics.derive_metrics(sums, self.tokens).items():
                if name in self:
                    self.check(_within_ulps(self[name], expected, 2), "E305", name, "does not follow from the sums")

    def check_labels(self, settings: LabelSettings) -> None:
        """Check labels and protection against the metrics and the settings."""
        if not self.holds("label", settings.score):
            return
        width = self["label"].shape[-1]

        def rows(name: str) -> np.ndarray | None:
            return self[name].reshape(-1, width) if name in self else None

        score, conn, redundancy = rows(settings.score), rows("connectivity"), rows("redundancy")
        assert score is not None
        found = [
            labels.label_ffn(
                values, None if conn is None else conn[row], None if redundancy is None else redundancy[row], settings
            )
            for row, values in enumerate(score)
        ]
        label, protection = (np.stack(parts) for parts in zip(*found, strict=True))
        arrived = ~self.empty.ravel()
        own = self["label"].reshape(-1, width)
        self.check((own == 0) | arrived[:, None], "E307", "label", "is not 0 where no token arrived")
        same = ~(own != label)[arrived].any(axis=1)
        layer = np.flatnonzero(arrived)
        for row in layer[~same][:3]:
            self.check(
                False,
                "E309",
                "label",
                f"FFN {row}: {np.count_nonzero(own[row] != label[row])} labels do not follow; "
                f"{np.count_nonzero(own[row] == 2)} supernodes and {np.count_nonzero(own[row] == 1)} halo, "
                f"{np.count_nonzero(label[row] == 2)} and {np.count_nonzero(label[row] == 1)} expected",
            )
        if "protection" in self and same.all():
            close = np.isclose(self["protection"].reshape(-1, width), protection, rtol=RELATIVE_SLACK, atol=0)
            self.check(close, "E310", "protection", "does not follow from redundancy")


def _within_ulps(found: np.ndarray, expected: np.ndarray, ulps: int) -> np.ndarray:
    """Whether float32 arrays agree to ``ulps`` units in the last place. NaN agrees with everything: E302 judges NaN."""
    with np.errstate(over="ignore"):
        distance = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        unit = np.spacing(np.maximum(np.abs(found), np.abs(expected)))
    return (distance <= ulps * unit.astype(np.float64)) | np.isnan(found) | np.isnan(expected)
