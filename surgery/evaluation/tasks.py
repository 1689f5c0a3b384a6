"""Benchmark tasks of lm-eval on a model that is loaded already."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ChanfmtError, MissingPackageError, UsageError, first_line
from chanfmt.base.narrate import bars_shown

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class TaskResult:
    """One number that lm-eval reports.

    Attributes:
        task, metric, filter: lm-eval's names, of a group too where it has a number of its own.
        value: The number.
        standard_error: As lm-eval estimates it; None where it does not.
        shots: Examples in a prompt; None of a group.
        items: Items that were evaluated; None of a group.
        higher_is_better: None where lm-eval does not say.
        version: The task's version.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    shots: int | None
    items: int | None
    higher_is_better: bool | None
    version: str | None


class Tasks:
    """The tasks that were asked for, found and loaded before any model is.

    Args:
        names: lm-eval's names of tasks, groups and tags; ``*`` stands for anything.
        directory: Directory of further task files; None for lm-eval's own only.
        limit: Items of each task to evaluate, 0 for all.
        progress: Whether lm-eval may show its bars, where stderr is a terminal.

    Raises:
        MissingPackageError: lm-eval is not installed.
        UsageError: There is no such task, or its data cannot be had.
    """

    def __init__(self, names: tuple[str, ...], *, directory: str | None = None, limit: int = 0) -> None:
        for package in ("lm_eval", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise MissingPackageError(package.replace("_", "-"), "eval", "--tasks")
        self.limit = limit
        self.progress = bars_shown()
        with _quiet(self.progress):
            from lm_eval.tasks import TaskManager, get_task_dict

            self.manager = TaskManager(include_path=directory)
            self.names: list[str] = []
            for name in names:
                found = self.manager.match_tasks([name])
                if not found:
                    raise UsageError(
                        f"lm-eval has no task called {name!r}",
                        hint="list them with: lm-eval ls tasks; name a directory of your own with --tasks-from",
                    )
                self.names += [each for each in found if each not in self.names]
            try:
                get_task_dict(self.names, self.manager)
            # A task is a file of anyone's that loads data from anywhere.
            except Exception as error:
                raise UsageError(
                    f"the tasks {', '.join(self.names)} cannot be loaded ({type(error).__name__}: {first_line(error)})",
                    hint="their data sets come from the Hub unless their files say otherwise",
                ) from None

    def run(self, model: Any, tokenizer: Any) -> tuple[TaskResult, ...]:
        """Results of ``model``, a loaded causal language model, in the order of tasks and metrics.

        Raises:
            ChanfmtError: lm-eval fails.
        """
        import torch

        with _quiet(self.progress):
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            try:
                # On a GPU lm-eval finds the largest batch that fits. On a CPU padding costs more than batches save.
                batch = "auto" if next(model.parameters()).device.type == "cuda" else 1
                wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
                found = lm_eval.simple_evaluate(
                    wrapped,
                    tasks=self.names,
                    task_manager=self.manager,
                    limit=self.limit or None,
                    log_samples=False,
                )
            except torch.OutOfMemoryError:
                raise ChanfmtError("out of memory in lm-eval's tasks", hint="use --dtype bfloat16") from None
            except Exception as error:
                raise ChanfmtError(f"lm-eval fails: {type(error).__name__}: {first_line(error)}") from error
        return tuple(_results(found))


def _results(found: dict[str, Any]) -> Iterator[TaskResult]:
    for task, numbers in sorted((found["results"] | found.get("groups", {})).items()):
        for key, value in sorted(numbers.items()):
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{chosen}")
            version = found["versions"].get(task)
            yield TaskResult(
                task,
                metric,
                chosen,
                float(value),
                float(error) if isinstance(error, int | float) else None,
                found["n-shot"].get(task),
                found["n-samples"].get(task, {}).get("effective"),
                found["higher_is_better"].get(task, {}).get(metric),
                None if version is None else str(version),
            )


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep lm-eval's narration away but for bars, and all of it off stdout, which carries results; what goes wrong raises."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        target = sys.stderr if progress else io.StringIO()
        with contextlib.redirect_stdout(target), contextlib.redirect_stderr(target):
            yield
    finally:
        logger.setLevel(level)
