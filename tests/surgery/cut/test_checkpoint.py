"""Reading, cutting and writing safetensors: every dtype, axis and slice; damaged and hostile files."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chanfmt.base.errors import ModelError
from chanfmt.format.records import TensorSlice
from chanfmt.models.safetensors import CheckpointIndex, TensorEntry, fingerprint
from surgery.cut.checkpoint import reader
from surgery.cut.checkpoint.cuts import Cut, plan_cuts
from surgery.cut.checkpoint.reader import cut_parts
from surgery.cut.checkpoint.writer import output_bytes, write_checkpoint
from tests.support.plans import KEPT, WIDTH, plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan


def exact(plan: PruningPlan) -> dict[str, int]:
    """Widths without zero channels."""
    return {block.name: block.n_kept for block in plan.blocks}


def piece(tensor: str, axis: int | None, start: int = 0, step: int = 1, role: str = "up") -> TensorSlice:
    stop = 0 if axis is None else start + step * (WIDTH - 1) + 1
    return TensorSlice(role, tensor, tensor, axis, start, stop, step)


def cut_once(directory: Path, output: Path, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Apply ``plan`` to the checkpoint in ``directory`` and read the result with safetensors itself."""
    index = CheckpointIndex.open(directory)
    cuts = plan_cuts(plan, exact(plan), index)
    output.mkdir()
    done: list[int] = []
    write_checkpoint(index, cuts, output, done.append)
    assert sum(done) == output_bytes(index, cuts) == CheckpointIndex.open(output).nbytes
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_gather_any_dtype_along_any_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, axis: int, chunk: int
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    random = np.random.default_rng(0)
    tensor = (
        torch.from_numpy(random.integers(0, 2, (7, 11, 5)))
        if dtype == torch.bool
        else torch.from_numpy(random.normal(0, 20, (7, 11, 5)))
    )
    tensor = tensor.to(dtype)
    save_file({"before": torch.zeros(3), "x": tensor}, tmp_path / "model.safetensors")
    entry = CheckpointIndex.open(tmp_path).tensors["x"]
    positions = np.array([0, 2, -1, 4, -1])
    expected = tensor.index_select(axis, torch.from_numpy(positions.clip(0)))
    for place in (2, 4):
        expected.select(axis, place).copy_(torch.zeros(()))
    cut = Cut(axis, positions[None], tuple(expected.shape))
    assert assembled(entry, cut) == bits(expected).tobytes()


def assembled(entry: TensorEntry, cut: Cut) -> bytes:
    """The tensor that the parts of a cut give, each at its offset."""
    result = bytearray(b"\xaa" * 4096)
    end = 0
    with entry.file.open("rb") as file:
        for part in cut_parts(entry, cut):
            data = part.read(file.fileno())
            result[part.offset : part.offset + len(data)] = data
            assert part.offset == end
            end += len(data)
    return bytes(result[:end])


def test_cuts_rows_columns_biases_and_nothing_else(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "up": torch.randn(WIDTH, 7, generator=random).bfloat16(),
        "up_bias": torch.randn(WIDTH, generator=random).half(),
        "down": torch.randn(7, WIDTH, generator=random).bfloat16(),
        "down_bias": torch.randn(7, generator=random),
        "embed": torch.randn(17, 7, generator=random),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt", "note": "kept"})
    slices = (piece("up", 0), piece("up_bias", 0), piece("down", 1, role="write"), piece("down_bias", None))
    found = cut_once(tmp_path / "in", tmp_path / "out", plan_of(slices))
    keep = torch.from_numpy(KEPT.astype(np.int64))
    expected = tensors | {"up": tensors["up"][keep], "up_bias": tensors["up_bias"][keep], "down": tensors["down"][:, keep]}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert CheckpointIndex.open(tmp_path / "out").metadata == {"format": "pt", "note": "kept"}


@pytest.mark.parametrize(
    ("slices", "kept_rows"),
    [
        # Halves: gate rows, then up rows.
        ((piece("w", 0, 0, role="gate"), piece("w", 0, WIDTH)), [*KEPT, *(KEPT + WIDTH)]),
        # Interleaved: gate, up, gate, up.
        ((piece("w", 0, 0, 2, role="gate"), piece("w", 0, 1, 2)), sorted([*(2 * KEPT), *(2 * KEPT + 1)])),
        # One role at an offset; elements that belong to no role stay.
        ((piece("w", 0, 5),), [*range(5), *(KEPT + 5), *range(18, 26)]),
    ],
)
def test_fused_tensors(tmp_path: Path, slices: tuple[TensorSlice, ...], kept_rows: list[int]) -> None:
    weight = torch.arange(26 * 7, dtype=torch.float32).reshape(26, 7)
    (tmp_path / "in").mkdir()
    save_file({"w": weight}, tmp_path / "in" / "model.safetensors")
    found = cut_once(tmp_path / "in", tmp_path / "out", plan_of(slices))
    assert torch.equal(found["w"], weight[torch.tensor(np.array(kept_rows))])


def sharded(directory: Path) -> dict[str, torch.Tensor]:
    """Three shards with names of the source's own choosing."""
    directory.mkdir()
    tensors = {
        f"{layer}.{name}": torch.randn(*shape)
        for layer in range(3)
        for name, shape in (("up", (WIDTH, 7)), ("down", (7, WIDTH)), ("other", (3, 5)))
    }
    weight_map = {}
    for layer in range(3):
        part = {name: tensor for name, tensor in tensors.items() if name.startswith(str(layer))}
        save_file(part, directory / f"part-{layer}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{layer}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_sharded_checkpoints_keep_their_shards(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "in")
    plan = plan_of(*((piece(f"{layer}.up", 0), piece(f"{layer}.down", 1, role="write")) for layer in range(3)))
    found = cut_once(tmp_path / "in", tmp_path / "out", plan)
    assert torch.equal(found["2.down"], tensors["2.down"][:, torch.from_numpy(KEPT.astype(np.int64))])
    assert torch.equal(found["1.other"], tensors["1.other"])
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in found.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in found.values())
    assert index["weight_map"]["1.up"] == names[1]


def test_fingerprint_ignores_shards_and_sees_values(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "in")
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    first = fingerprint(CheckpointIndex.open(tmp_path / "in"))
    assert first == fingerprint(CheckpointIndex.open(tmp_path / "one"))
    for change in (
        {"0.up": tensors["0.up"] + 1},
        {"0.up": tensors["0.up"].reshape(7, WIDTH)},
        {"0.up": tensors["0.up"].view(torch.int32)},
        {"new": torch.zeros(1)},
    ):
        save_file(tensors | change, tmp_path / "one" / "model.safetensors")
        assert fingerprint(CheckpointIndex.open(tmp_path / "one")) != first


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ((piece("missing", 0),), "no tensor 'missing'"),
        ((piece("w", 1),), "shape"),
        ((piece("w", 0, 14),), "shape"),
        ((piece("w", 2),), "axis"),
        ((piece("w", 0), piece("w", 1)), "axis"),
        ((piece("w", 0), piece("w", 0, 1)), "two roles"),
        ((dataclasses.replace(piece("w", 0), stop=10**30),), "shape"),
        ((dataclasses.replace(piece("w", 0), stop=4),), "shape"),
        ((), "names no tensor"),
    ],
)
def test_plans_that_do_not_fit_the_checkpoint(tmp_path: Path, slices: tuple[TensorSlice, ...], message: str) -> None:
    save_file({"w": torch.zeros(26, 7)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        plan_cuts(plan_of(slices), {"layer.0": len(KEPT)}, CheckpointIndex.open(tmp_path))


def test_tensors_shared_by_two_ffns(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(26, 7)}, tmp_path / "model.safetensors")
    plan = plan_of((piece("w", 0),), (piece("w", 0),))
    with pytest.raises(ModelError, match="shared by several FFNs"):
        plan_cuts(plan, exact(plan), CheckpointIndex.open(tmp_path))


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensor(start: int, stop: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "damaged"),
        (b"[]", b"", "is not a JSON object"),
        (b"[" * 100_000, b"", "damaged"),
        (b"\xff\xff", b"", "damaged"),
        (b'{"a":1,"a":1}', b"", "twice"),
        ({"a": 3}, b"", "not described"),
        ({"a": tensor(0, 8)}, b"1234", "cut short"),
        ({"a": tensor(0, 4)}, b"12345678", "belong to no tensor"),
        ({"a": tensor(4, 8)}, b"12345678", "belong to no tensor"),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, b"123456789012", "overlap"),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, b"12345678", "overlap"),
        ({"a": tensor(8, 4, [1])}, b"12345678", "bytes"),
        ({"a": tensor(0, 8, [3])}, b"12345678", "not F32 of shape"),
        ({"a": tensor(0, 8, [-2])}, b"12345678", "no valid shape"),
        ({"a": tensor(0, 8, [True, 2])}, b"12345678", "no valid shape"),
        ({"a": tensor(0, 8, [1] * 99 + [2])}, b"12345678", "no valid shape"),
        ({"a": tensor(0, 8, [2], "X9")}, b"12345678", "unknown dtype"),
        ({"a": tensor(0, 8, [2], ["F32"])}, b"12345678", "unknown dtype"),
        ({"a": tensor(-8, 0, [2])}, b"12345678", "no valid shape"),
        ({"__metadata__": 3}, b"", "metadata"),
        ({"__metadata__": {"a": 3}}, b"", "metadata"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message):
        CheckpointIndex.open(tmp_path)


def test_truncated_files(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(26, 7)}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    for cut in (0, 5, 8, 20, len(raw) - 1):
        (tmp_path / "model.safetensors").write_bytes(raw[:cut])
        with pytest.raises(ModelError, match="cut short"):
            CheckpointIndex.open(tmp_path)
    raw_file(tmp_path / "model.safetensors", {}, length=2**63)
    with pytest.raises(ModelError, match="cut short"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "model.bin",
        3,
    ],
)
def test_shard_names_may_not_leave_the_directory(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="names the shard"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
def test_damaged_indexes(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json"):
        CheckpointIndex.open(tmp_path)


def test_indexes_that_do_not_match_their_shards(tmp_path: Path) -> None:
    sharded(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    for wrong in ({"0.up": "part-1.safetensors"}, {"nowhere": "part-1.safetensors"}):
        path.write_text(json.dumps({"weight_map": weight_map | wrong}))
        with pytest.raises(ModelError, match=r"holds '[^']+', but part-1\.safetensors does not"):
            CheckpointIndex.open(tmp_path / "in")
    path.write_text(json.dumps({"weight_map": weight_map}))
    save_file(
        {"0.up": torch.zeros(1), **load_file(tmp_path / "in" / "part-2.safetensors")}, tmp_path / "in" / "part-2.safetensors"
    )
    with pytest.raises(ModelError, match="in two shards"):
        CheckpointIndex.open(tmp_path / "in")
    (tmp_path / "in" / "part-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"part-2.safetensors .*missing"):
        CheckpointIndex.open(tmp_path / "in")


def test_pickled_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        CheckpointIndex.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickled") as caught:
        CheckpointIndex.open(tmp_path)
    assert "save_pretrained" in str(caught.value.hint)
    with pytest.raises(ModelError, match="not a directory"):
        CheckpointIndex.open(tmp_path / "nowhere")


def test_packed_dtypes_are_copied_and_never_cut(tmp_path: Path) -> None:
    raw_file(tmp_path / "model.safetensors", {"a": tensor(0, 13, [WIDTH, 2], "F4")}, b"0123456789012")
    index = CheckpointIndex.open(tmp_path)
    with pytest.raises(ModelError, match="packed as F4"):
        plan_cuts(plan_of((piece("a", 0),)), {"layer.0": len(KEPT)}, index)
    (tmp_path / "out").mkdir()
    write_checkpoint(index, {}, tmp_path / "out", lambda count: None)
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(b"0123456789012")


def test_places_after_a_cut_with_zero_channels_between_two_halves() -> None:
    """The positions of the kept channels do not ascend if zero channels follow each half."""
    cut = Cut(0, np.array([[1, 3, -1, -1, 6, 8, -1, -1]]), (8,))
    assert cut.places(np.array([3, 1])).tolist() == [1, 0]
    assert cut.places(np.array([6, 8])).tolist() == [4, 5]
