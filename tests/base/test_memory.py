"""The memory that a process may still use, read from trees like those that the kernel shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chanfmt.base.memory import available_memory

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def tree(root: Path, **files: str) -> Path:
    """Write ``files``, by their paths below ``root``, on a machine with 64 GiB available."""
    for name, text in {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {64 << 20} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(place: str, limit: object, used: int, stat: str = "", high: str = "max") -> dict[str, str]:
    home = f"sys/fs/cgroup/{place}".rstrip("/")
    return {
        f"{home}/memory.max": f"{limit}\n",
        f"{home}/memory.high": f"{high}\n",
        f"{home}/memory.current": f"{used}\n",
        f"{home}/memory.stat": stat,
    }


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path)) == 64 * GIB


def test_pages_of_files_are_available_in_a_container(tmp_path: Path) -> None:
    stat = f"anon {GIB}\nfile {6 * GIB}\ninactive_file {4 * GIB}\nactive_file {2 * GIB}\nshmem 0\n"
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/\n"}, **group("", 8 * GIB, 7 * GIB, stat))
    assert available_memory(root) == 7 * GIB


def test_a_group_without_a_limit(tmp_path: Path) -> None:
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/\n"}, **group("", "max", 7 * GIB))
    assert available_memory(root) == 64 * GIB


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        **{"proc/self/cgroup": "0::/outer/inner\n"},
        **group("outer", 4 * GIB, GIB),
        **group("outer/inner", 16 * GIB, GIB),
    )
    assert available_memory(root) == 3 * GIB


def test_a_container_that_reads_the_path_of_the_host(tmp_path: Path) -> None:
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/../../docker/abc\n"}, **group("", 4 * GIB, GIB))
    assert available_memory(root) == 3 * GIB


def test_the_throttling_limit_counts(tmp_path: Path) -> None:
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/\n"}, **group("", "max", GIB, high=str(3 * GIB)))
    assert available_memory(root) == 2 * GIB


def test_version_one_has_other_names(tmp_path: Path) -> None:
    home = "sys/fs/cgroup/memory/job"
    root = tree(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n",
            f"{home}/memory.limit_in_bytes": f"{8 * GIB}\n",
            f"{home}/memory.usage_in_bytes": f"{7 * GIB}\n",
            f"{home}/memory.stat": f"inactive_file {GIB}\ntotal_inactive_file {4 * GIB}\ntotal_active_file {GIB}\n",
        },
    )
    assert available_memory(root) == 6 * GIB


@pytest.mark.parametrize("text", ["", "nonsense\n", "0 :: x\n"])
def test_never_less_than_nothing(tmp_path: Path, text: str) -> None:
    root = tree(tmp_path, **{"proc/self/cgroup": "0::/\n"}, **group("", GIB, 2 * GIB, text))
    assert available_memory(root) == 0
