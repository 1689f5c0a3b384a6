"""Damaged and forged atlases by the thousand, each read in a process of its own.

    python -m tests.support.mutants [COUNT] [SEED]

Prints how many mutants of each kind were refused, how many the HDF5 library did not survive, and every
failure of ours: an exception that is not an `AtlasError`, more memory than the file's size allows, or a
changed file that `validate` calls valid. Exit code 1 when there was one.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from chanfmt.algebra.validate import validate
from chanfmt.algebra.validate.findings import ERROR
from chanfmt.base.errors import AtlasError
from chanfmt.cli.info import info_data
from chanfmt.format.reader import Atlas
from chanfmt.format.sandbox import mapped_memory
from tests.support.factory import moe_content, random_content

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY = 256 << 20
"""Far above what a file of 100 kB needs, far below what a forged size asks for."""
CPU_SECONDS = 10
HUGE = (0, 1, 0x7F, 0xFF, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
REFUSED, FAILED = 0, 4


def _places(image: bytearray, pattern: bytes) -> list[int]:
    places, start = [], image.find(pattern)
    while start >= 0:
        places.append(start)
        start = image.find(pattern, start + 1)
    return places


def flip_bit(image: bytearray, random: np.random.Generator) -> None:
    image[random.integers(len(image))] ^= 1 << random.integers(8)


def flip_metadata_bits(image: bytearray, random: np.random.Generator) -> None:
    """Near a signature of HDF5's own structures, where its parser is at work."""
    marks = [
        mark
        for signature in (b"OHDR", b"HEAP", b"TREE", b"SNOD", b"GCOL", b"OCHK", b"FRHP", b"BTHD", b"\x89HDF")
        for mark in _places(image, signature)
    ]
    for _ in range(random.integers(1, 4)):
        place = marks[random.integers(len(marks))] + random.integers(0, 256)
        image[min(place, len(image) - 1)] ^= 1 << random.integers(8)


def truncate(image: bytearray, random: np.random.Generator) -> None:
    del image[random.integers(len(image)) :]


def truncate_and_pad(image: bytearray, random: np.random.Generator) -> None:
    start = random.integers(len(image))
    image[start:] = bytes(len(image) - start)


def extend(image: bytearray, random: np.random.Generator) -> None:
    image += random.bytes(random.integers(1, 5000))


def splice(image: bytearray, random: np.random.Generator) -> None:
    length = int(random.integers(1, 2048))
    source, target = (int(random.integers(len(image) - length)) for _ in range(2))
    image[target : target + length] = image[source : source + length]


def forge_number(image: bytearray, random: np.random.Generator) -> None:
    """A size, a count or an address of the metadata becomes a chosen one."""
    for _ in range(random.integers(1, 3)):
        place = int(random.integers(len(image) - 8))
        width = int(random.choice([1, 2, 4, 8]))
        image[place : place + width] = struct.pack("<Q", HUGE[random.integers(len(HUGE))])[:width]


def forge_known_number(image: bytearray, random: np.random.Generator) -> None:
    """A number that HDF5's structures hold as a length or an address, replaced everywhere or once."""
    place = int(random.integers(len(image) - 8))
    number = image[place : place + 8]
    places = _places(image, bytes(number))
    numbers = (*HUGE, len(image), len(image) - 8, 8)
    value = struct.pack("<Q", numbers[random.integers(len(numbers))])
    for index in places if random.random() < 0.5 else places[:1]:
        image[index : index + 8] = value


def rewrite(image: bytearray, random: np.random.Generator) -> None:
    """Something that HDF5 itself finds in order: checksums right, structure wrong."""
    change = REWRITES[random.integers(len(REWRITES))]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.h5"
        path.write_bytes(image)
        with h5py.File(path, "r+") as file:
            change(file, random)
        image[:] = path.read_bytes()


def _any_group(file: h5py.File, random: np.random.Generator) -> h5py.Group:
    groups = [file]
    file.visititems(lambda name, item: groups.append(item) if isinstance(item, h5py.Group) else None)
    return groups[random.integers(len(groups))]


def _any_dataset(file: h5py.File, random: np.random.Generator) -> h5py.Dataset:
    found: list[h5py.Dataset] = []
    file.visititems(lambda name, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found[random.integers(len(found))]


def _link(file: h5py.File, random: np.random.Generator) -> None:
    links = (
        h5py.SoftLink("/model"),
        h5py.SoftLink("/nowhere"),
        h5py.ExternalLink("/etc/hostname", "/"),
        h5py.ExternalLink("a.h5", "/"),
    )
    _any_group(file, random)["x"] = links[random.integers(len(links))]


def _cycle(file: h5py.File, random: np.random.Generator) -> None:
    _any_group(file, random)["again"] = _any_group(file, random)


def _nest(file: h5py.File, random: np.random.Generator) -> None:
    _any_group(file, random).create_group("/".join("a" * int(random.integers(3, 200))))


def _huge(file: h5py.File, random: np.random.Generator) -> None:
    name = _any_dataset(file, random).name
    del file[name]
    shape = tuple(int(length) for length in random.choice([1, 7, 2**20, 2**31, 2**40], int(random.integers(1, 4))))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    try:
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), plist)
    except (ValueError, OSError, RuntimeError):
        file.attrs["status"] = "too large to declare"


def _type(file: h5py.File, random: np.random.Generator) -> None:
    name = _any_dataset(file, random).name
    shape = file[name].shape
    del file[name]
    dtypes = ("f2", ">f4", "c8", "?", "S4", "i1", np.dtype([("a", "f4")]), "u8")
    file.create_dataset(name, data=np.zeros(shape, dtypes[random.integers(len(dtypes))]))


def _attribute(file: h5py.File, random: np.random.Generator) -> None:
    item = _any_dataset(file, random) if random.random() < 0.5 else _any_group(file, random)
    names = [name for name in item.attrs if name not in ("REFERENCE_LIST", "DIMENSION_LIST")]
    name = names[random.integers(len(names))] if names else "units"
    values = (
        3,
        2.5,
        float("nan"),
        float("inf"),
        -1,
        "",
        "\x1b[2J",
        "{",
        "[" * 50_000,
        "x" * 100_000,
        np.arange(9),
        True,
        "9" * 400,
    )
    item.attrs[name] = values[random.integers(len(values))]


def _values(file: h5py.File, random: np.random.Generator) -> None:
    dataset = _any_dataset(file, random)
    if dataset.dtype.kind == "O":
        values = ("", "[" * 100_000, '[{"role": 1}]', "\x1b[2J", "ÿ" * 1000, '[{"role":"up","axis":9e99}]', "null", "{}", "[1]")
        dataset[...] = values[random.integers(len(values))]
        return
    extremes = np.array([0, 1, 2**7, 2**31 - 1, -1, -(2**31), 2**62], dtype="f8")
    fill = random.choice([*extremes, np.nan, np.inf, 1e300, 1e-320] if dataset.dtype.kind == "f" else extremes)
    with np.errstate(all="ignore"):
        values = np.broadcast_to(np.array(fill).astype(dataset.dtype), dataset.shape).copy()
    if random.random() < 0.5:
        whole = dataset[...]
        whole.ravel()[random.integers(whole.size)] = values.ravel()[0]
        values = whole
    dataset[...] = values


def _remove(file: h5py.File, random: np.random.Generator) -> None:
    del file[_any_dataset(file, random).name]


REWRITES: tuple[Callable[[h5py.File, np.random.Generator], None], ...] = (
    _link,
    _cycle,
    _nest,
    _huge,
    _type,
    _attribute,
    _attribute,
    _values,
    _values,
    _values,
    _remove,
)
MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    flip_bit,
    flip_metadata_bits,
    flip_metadata_bits,
    truncate,
    truncate_and_pad,
    extend,
    splice,
    splice,
    forge_number,
    forge_known_number,
    rewrite,
    rewrite,
    rewrite,
)


def images() -> list[bytes]:
    """The atlases that are mutated."""
    from chanfmt.format.writer import atlas_image

    return [
        atlas_image(random_content(layers=2, channels=20, hidden=6))[0],
        atlas_image(moe_content(layers=1, experts=2, channels=8, dense_channels=12, hidden=6))[0],
    ]


def mutant(originals: list[bytes], number: int, seed: int) -> tuple[str, bytes]:
    """The kind of mutant ``number`` and its bytes; the same for the same seed."""
    random = np.random.default_rng((seed, number))
    image = bytearray(originals[number % len(originals)])
    mutate = MUTATIONS[random.integers(len(MUTATIONS))]
    mutate(image, random)
    return mutate.__name__, bytes(image)


def read_everything(path: Path) -> None:
    """Run the tools on a file. Raises only for a failure of ours."""
    findings = validate(path)
    # Without its file_sha256 a file says what it said before, and is remarked upon.
    if not any(finding.rule.severity == ERROR or finding.code == "W504" for finding in findings):
        raise AssertionError("a changed file is called valid")
    try:
        with Atlas.open(path) as atlas:
            atlas.content()
            info_data(atlas)
    except AtlasError:
        pass


def run(path: Path) -> tuple[int, str]:
    """Read ``path`` in a child. Returns its wait status and what it complained about."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_AS, (mapped_memory() + MEMORY, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            read_everything(path)
            code = REFUSED
        except BaseException:
            os.write(writer, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        complaint = pipe.read().decode()
    return os.waitpid(child, 0)[1], complaint


def tally(count: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Try ``count`` mutants. Returns outcomes by kind, and the failures of ours."""
    originals = images()
    outcomes: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "mutant.h5"
        for number in range(first, first + count):
            kind, image = mutant(originals, number, seed)
            if image == originals[number % len(originals)]:
                outcomes[f"{kind}: unchanged"] += 1
                continue
            path.write_bytes(image)
            status, complaint = run(path)
            if os.WIFSIGNALED(status):
                outcomes[f"{kind}: {signal.Signals(os.WTERMSIG(status)).name} inside HDF5, contained"] += 1
            elif os.WEXITSTATUS(status) == REFUSED:
                outcomes[f"{kind}: refused"] += 1
            else:
                outcomes[f"{kind}: FAILED"] += 1
                failures.append(f"mutant {number} of seed {seed} ({kind}):\n{complaint}")
    return outcomes, failures


def main() -> int:
    """Entry point. Returns the exit code."""
    count, seed = (int(text) for text in [*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]])
    outcomes, failures = tally(count, seed)
    for name, number in sorted(outcomes.items()):
        print(f"{number:7} {name}")
    for failure in failures[:20]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
