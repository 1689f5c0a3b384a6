"""Benchmark tasks of lm-eval on a loaded model."""

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
        task, metric, filter: lm-eval's names. A group of tasks is listed too if it has a number of its own.
        value: The number.
        standard_error: lm-eval's estimate; None if lm-eval gives none.
        shots: Examples in a prompt; None for a group.
        items: Number of items that were evaluated; None for a group.
        higher_is_better: None if lm-eval does not say.
        version: Version of the task.
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
    """Tasks of lm-eval, found and loaded before any model is loaded.

    Args:
        names: lm-eval's names of tasks, groups and tags; ``*`` stands for any characters.
        directory: Directory with more task files; None for lm-eval's own tasks only.
        limit: Items to evaluate of each task; 0 means all.

    Raises:
        MissingPackageError: lm-eval is not installed.
        UsageError: lm-eval has no such task, or the task cannot be loaded.
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
                        hint="list the tasks with: lm-eval ls tasks; add a directory of your own with --tasks-from DIR",
                    )
                self.names += [each for each in found if each not in self.names]
            try:
                get_task_dict(self.names, self.manager)
            # Anyone can write a task file, and a task can load data from anywhere, so any exception is possible.
            except Exception as error:
                raise UsageError(
                    f"the tasks {', '.join(self.names)} cannot be loaded ({type(error).__name__}: {first_line(error)})",
                    hint="lm-eval fetches their data sets from the Hub, unless the task files name another place",
                ) from None

    def run(self, model: Any, tokenizer: Any) -> tuple[TaskResult, ...]:
        """Run the tasks on ``model``, a loaded causal language model. The results are sorted by task and metric.

        Raises:
            ChanfmtError: lm-eval failed, or memory ran out.
        """
        import torch

        from chanfmt.models.out_of_memory import out_of_memory_recognised

        with _quiet(self.progress):
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            try:
                # On a GPU, lm-eval finds the largest batch that fits. On a CPU, padding costs more than batches save.
                batch = "auto" if next(model.parameters()).device.type == "cuda" else 1
                wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
                with out_of_memory_recognised():
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
                raise ChanfmtError(f"lm-eval failed: {type(error).__name__}: {first_line(error)}") from error
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
    """Silence lm-eval in the body. Its bars go to stderr if ``progress`` is set; stdout is for results. Errors still raise."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        target = sys.stderr if progress else io.StringIO()
        with contextlib.redirect_stdout(target), contextlib.redirect_stderr(target):
            yield
    finally:
        logger.setLevel(level)
