"""A cut of a GGUF file as a GGUF file: read back by the package gguf and by transformers, which share no code with the writer."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.models.source import ModelSource, local_source
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.cut.prune import apply
from surgery.result.result import open_result
from tests.support.gguf_models import HIDDEN, LAYERS, WIDTH, tiny_llama, to_gguf
from tests.support.plans import planned
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from surgery.planning.plan import PruningPlan

KEPT = 160


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def sources(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelSource]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(kind: str, **changes: Any) -> ModelSource:
        to_gguf(llama, tmp_path / "tiny.gguf", kind, **changes)
        source = local_source(str(tmp_path / "tiny.gguf"))
        assert source is not None
        return source

    return make


def half(source: ModelSource, kept: int = KEPT) -> PruningPlan:
    return planned(source.directory, lambda number, ffn: kept)


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def logits(directory: Path, **extra: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **extra).eval()
    with torch.inference_mode():
        return model(torch.arange(40)[None] * 5 % 256).logits


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.02), ("Q4_1", 0.4), ("F16", 1e-3), ("F32", 1e-5)])
def test_rows_are_copied_and_columns_quantised_again(sources: Any, tmp_path: Path, kind: str, error: float) -> None:
    source = sources(kind)
    plan = half(source)
    report = apply_plan(plan, source, tmp_path / "gguf", CutOptions(format="gguf"))
    apply_plan(plan, source, tmp_path / "plain")
    old, new = tensors(source.file), tensors(tmp_path / "gguf" / "gguf.gguf")
    assert list(new) == list(old)
    again = {"Q4_1": "Q5_0"}.get(kind, kind)
    for name, tensor in new.items():
        assert tensor.tensor_type.name == (again if "ffn_down" in name else old[name].tensor_type.name)
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        kept = plan.blocks[layer].kept
        if "ffn_gate" in name or "ffn_up" in name:
            assert tensor.shape.tolist() == [HIDDEN, KEPT]
            np.testing.assert_array_equal(tensor.data, old[name].data[kept])
        elif "ffn_down" in name:
            assert tensor.shape.tolist() == [KEPT, HIDDEN]
            wanted = values(old[name])[:, kept]
            np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(np.ascontiguousarray(wanted), tensor.tensor_type))
        else:
            np.testing.assert_array_equal(tensor.data, old[name].data)
    exact, quantised = logits(tmp_path / "plain"), logits(tmp_path / "gguf", gguf_file="gguf.gguf")
    found = float((quantised - exact).abs().max() / exact.abs().max())
    assert found <= error
    record = report.gguf
    assert record is not None
    assert record.logit_error is not None
    assert record.logit_error <= error
    assert (record.weight_error == 0) == (kind in ("F32", "F16"))


def test_metadata_is_taken_over_and_narrowed(sources: Any, tmp_path: Path) -> None:
    source = sources("Q8_0")
    apply_plan(half(source), source, tmp_path / "half", CutOptions(format="gguf"))
    before, after = fields(source.file), fields(tmp_path / "half" / "half.gguf")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"llama.feed_forward_length", "general.name", "general.size_label"}
    assert set(after) - set(before) == {"general.base_model.count", "general.base_model.0.name", "general.quantization_version"}
    assert (before["llama.feed_forward_length"], after["llama.feed_forward_length"]) == (WIDTH, KEPT)
    assert (after["general.name"], after["general.base_model.0.name"]) == ("half", "Tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "half", gguf_file="half.gguf")
    assert tokenizer("abc").input_ids == source.tokenizer("abc").input_ids


def test_widths_of_layers_stay_an_array_where_the_source_has_one(sources: Any, tmp_path: Path, llama: Path) -> None:
    from chanfmt.models.gguf_header import Value, read_header
    from surgery.cut.config_width import find_layout
    from surgery.cut.gguf.layout import lay_out
    from surgery.cut.gguf.metadata import narrowed

    source = sources("F32")
    plan = half(source)
    apply_plan(plan, source, tmp_path / "plain")
    header = read_header(source.file)
    layout = find_layout(plan, source.config_fields, source.index)
    decided = lay_out(source.file, header, plan, layout.cuts, source.index, ModelSource(tmp_path / "plain").index)
    header.values["llama.feed_forward_length"] = Value.array([WIDTH] * LAYERS)
    widths = layout.widths | {plan.blocks[1].name: 192}
    assert narrowed(header, decided, plan, widths, "x")["llama.feed_forward_length"].content == [KEPT, 192, KEPT]
    header.values["llama.feed_forward_length"] = Value.of(WIDTH)
    with pytest.raises(ModelError, match="transformers reads one for all layers"):
        narrowed(header, decided, plan, widths, "x")


def test_widths_that_the_file_cannot_say_are_refused_before_a_recovery(sources: Any, tmp_path: Path) -> None:
    source = sources("Q4_1")
    for kept in ((KEPT, KEPT, 192), (KEPT, KEPT, WIDTH)):
        plan = planned(source.directory, lambda number, ffn, kept=kept: kept[number])
        # Whatever reads this recovery fails in another way.
        recovery: Any = object()
        with pytest.raises(UsageError, match="transformers reads one for all layers"):
            apply_plan(plan, source, tmp_path / "out", CutOptions(format="gguf", layout="auto"), recovery=recovery)
        assert not list(tmp_path.glob("out*"))


def test_k_quants_are_read_and_what_is_cut_becomes_q8_0(sources: Any, tmp_path: Path) -> None:
    source = sources("Q8_0", down="Q6_K")
    report = apply_plan(half(source), source, tmp_path / "half", CutOptions(format="gguf"))
    new = tensors(tmp_path / "half" / "half.gguf")
    assert new["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert report.gguf is not None
    assert report.gguf.notes == ("Q6_K can be read and not written, so what is quantised again becomes Q8_0 (3 tensors)",)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "bf16", "f16", "f32"])
def test_quant_gives_all_matrices_a_type(sources: Any, tmp_path: Path, quant: str) -> None:
    source = sources("Q8_0")
    apply_plan(half(source), source, tmp_path / "half", CutOptions(format="gguf", quant=quant))
    kinds = {name: tensor.tensor_type.name.lower() for name, tensor in tensors(tmp_path / "half" / "half.gguf").items()}
    vectors = {name for name in kinds if "norm" in name}
    assert {kinds[name] for name in vectors} == {"f32"}
    # llama.cpp's quantiser gives the output more bits than four.
    assert {kinds[name] for name in kinds if name not in vectors and name != "output.weight"} == {quant}
    assert kinds["output.weight"] == ("q8_0" if quant == "q4_0" else quant)
    number = fields(tmp_path / "half" / "half.gguf")["general.file_type"]
    assert number == {"q8_0": 7, "q4_0": 2, "bf16": 32, "f16": 1, "f32": 0}[quant]


def test_a_width_that_is_not_whole_blocks_becomes_f16(sources: Any, tmp_path: Path) -> None:
    source = sources("Q8_0")
    report = apply_plan(half(source, 100), source, tmp_path / "half", CutOptions(format="gguf"))
    new = tensors(tmp_path / "half" / "half.gguf")
    assert new["blk.1.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert new["blk.1.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert report.gguf is not None
    assert "a width of 100 is not a multiple of the block of 32" in report.gguf.notes[0]


def test_the_result_is_whole_and_opens(sources: Any, tmp_path: Path) -> None:
    source = sources("Q4_1")
    result = apply(half(source), source, tmp_path / "half", CutOptions(format="gguf"))
    assert {path.name for path in (tmp_path / "half").iterdir()} == {
        "README.md", "half.gguf", "kept_channels.safetensors", "layers.svg", "surgery.json"
    }  # fmt: skip
    opened = open_result(tmp_path / "half")
    assert opened.report.gguf == result.report.gguf
    assert json.loads((tmp_path / "half" / "surgery.json").read_text())["gguf"]["types"] == {"Q4_1": 20, "F32": 7, "Q5_0": 3}
    card = (tmp_path / "half" / "README.md").read_text()
    assert 'gguf_file="half.gguf"' in card
    assert "- gguf" in card
    assert opened.report.bytes_before == source.file.stat().st_size
    assert opened.report.bytes_after == (tmp_path / "half" / "half.gguf").stat().st_size


def test_what_cannot_be_a_gguf_file_is_refused(llama: Path, sources: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json") as refused:
        apply(planned(llama, lambda number, ffn: KEPT), str(llama), tmp_path / "out", CutOptions(format="gguf"))
    assert "convert_hf_to_gguf.py" in str(refused.value.hint)
    source = sources("Q8_0")
    with pytest.raises(UsageError, match="is a directory, also with --format gguf"):
        apply(half(source), source, tmp_path / "half.gguf", CutOptions(format="gguf"))
    with pytest.raises(UsageError, match="is the name of an importance matrix"):
        apply(half(source), source, tmp_path / "imatrix", CutOptions(format="gguf"))
    for options in (
        CutOptions(quant="q8_0"),
        CutOptions(cut_quant="q8_0"),
        CutOptions(format="gguf", cut_quant="q9"),
        CutOptions(format="gguf", layout="deci"),
        CutOptions(format="gguf", dtype="float16"),
        CutOptions(format="gguf", shard_bytes=5),
        CutOptions(format="ggml"),
        CutOptions(format="gguf", quant="q9"),
    ):
        with pytest.raises(UsageError):
            options.check()
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_the_files_is_refused(sources: Any, tmp_path: Path) -> None:
    source = sources("Q8_0")
    to_gguf(tiny_llama(tmp_path / "other", rms_norm_eps=1e-5), tmp_path / "other.gguf", "Q4_0")
    source.file = tmp_path / "other.gguf"
    with pytest.raises(ModelError, match="is not model"):
        apply_plan(half(source), source, tmp_path / "half", CutOptions(format="gguf", verify=False))
    assert not (tmp_path / "half").exists()


def matrix(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def dense_matrix(path: Path, width: int = WIDTH) -> Path:
    """An importance matrix of the dense model, as llama.cpp publishes it."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some text"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(2)
    for layer in range(LAYERS):
        for name, length in (("ffn_down", width), ("ffn_up", HIDDEN), ("attn_q", HIDDEN)):
            sums = random.random((1, length)).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{layer}.{name}.weight.counts", np.full((1, 1), 1024, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_is_sliced_to_the_kept_channels(llama: Path, tmp_path: Path) -> None:
    plan = planned(llama, lambda number, ffn: KEPT)
    path = dense_matrix(tmp_path / "dense.gguf")
    apply_plan(plan, ModelSource(llama), tmp_path / "out", CutOptions(imatrix=path))
    before, after = matrix(path), matrix(tmp_path / "out" / "imatrix.gguf")
    assert before.keys() == after.keys()
    for name, own in after.items():
        if "ffn_down" in name and name.endswith("in_sum2"):
            np.testing.assert_array_equal(own, before[name][:, plan.blocks[int(name.split(".")[1])].kept])
        else:
            np.testing.assert_array_equal(own, before[name])
    assert fields(tmp_path / "out" / "imatrix.gguf") == fields(path)
    assert "llama-quantize --imatrix imatrix.gguf" in (tmp_path / "out" / "README.md").read_text()
    assert "imatrix.gguf" in open_result(tmp_path / "out").report.files


def test_an_importance_matrix_of_another_model_is_refused_first(llama: Path, tmp_path: Path) -> None:
    plan = planned(llama, lambda number, ffn: KEPT)
    path = dense_matrix(tmp_path / "dense.gguf", WIDTH - 1)
    with pytest.raises(UsageError, match=f"has 1 x {WIDTH - 1} values"):
        apply_plan(plan, ModelSource(llama), tmp_path / "out", CutOptions(imatrix=path))
    assert not (tmp_path / "out").exists()


def test_experts_keep_channels_of_their_own(tmp_path: Path) -> None:
    """All experts of a layer are one tensor in llama.cpp, and one tensor each in the checkpoint."""
    from safetensors.numpy import save_file

    from chanfmt.format.records import TensorSlice
    from chanfmt.models.gguf_header import read_header
    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.cut.checkpoint.cuts import plan_cuts
    from surgery.cut.gguf.check import check_stored
    from surgery.cut.gguf.layout import lay_out
    from surgery.cut.gguf.metadata import narrowed
    from surgery.cut.gguf.write import write_gguf
    from surgery.planning.plan import BlockPlan
    from tests.support.plans import plan_of

    experts, width, kept = 3, 96, 64
    random = np.random.default_rng(0)
    ids = np.stack([np.sort(random.permutation(width)[:kept]) for _ in range(experts)]).astype(np.int32)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "qwen3moe")
    writer.add_name("moe")
    writer.add_feed_forward_length(500)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_count(experts)
    parts = {"gate": ("gate_proj", 0), "up": ("up_proj", 0), "down": ("down_proj", 1)}
    before: dict[str, np.ndarray] = {}
    after: dict[str, np.ndarray] = {}
    slices: dict[tuple[int, str], TensorSlice] = {}
    for role, (part, axis) in parts.items():
        shape = (experts, width, HIDDEN) if axis == 0 else (experts, HIDDEN, width)
        stored = gguf.quants.quantize(random.normal(size=shape).astype(np.float32), q8)
        writer.add_tensor(f"blk.0.ffn_{role}_exps.weight", stored, raw_dtype=q8)
        for expert in range(experts):
            name = f"model.layers.0.mlp.experts.{expert}.{part}.weight"
            before[name] = gguf.quants.dequantize(stored, q8)[expert]
            after[name] = np.ascontiguousarray(before[name].take(ids[expert], axis=axis))
            slices[expert, role] = TensorSlice("write" if role == "down" else role, name, name, axis, 0, width, 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, tensors_of in (("before", before), ("after", after)):
        (tmp_path / name).mkdir()
        save_file(tensors_of, tmp_path / name / "model.safetensors")
    items = tuple(slices[expert, role] for expert in range(experts) for role in parts)
    block = BlockPlan("moe", 0, "decoder", "moe", "decoder.experts", width, experts, items, ids, 0, 0, None)
    plan = dataclasses.replace(plan_of(), blocks=(block,))
    old, new = (CheckpointIndex.open(tmp_path / name) for name in ("before", "after"))
    source, header = tmp_path / "in.gguf", read_header(tmp_path / "in.gguf")
    layout = lay_out(source, header, plan, plan_cuts(plan, {"moe": kept}, old), old, new)
    values_of = narrowed(header, layout, plan, {"moe": kept}, "cut")
    write_gguf(source, header, layout, values_of, new, tmp_path / "out.gguf")
    check_stored(source, tmp_path / "out.gguf", layout, values_of)
    was, now = tensors(source), tensors(tmp_path / "out.gguf")
    assert fields(tmp_path / "out.gguf")["qwen3moe.expert_feed_forward_length"] == kept
    assert fields(tmp_path / "out.gguf")["qwen3moe.feed_forward_length"] == 500
    for expert in range(experts):
        for role in ("gate", "up"):
            name = f"blk.0.ffn_{role}_exps.weight"
            np.testing.assert_array_equal(now[name].data[expert], was[name].data[expert][ids[expert]])
        name = "blk.0.ffn_down_exps.weight"
        wanted = np.ascontiguousarray(values(was[name])[expert][:, ids[expert]])
        np.testing.assert_array_equal(now[name].data[expert], gguf.quants.quantize(wanted, q8))


@pytest.mark.parametrize("recover", ["lstsq", *repeated("block")])
def test_a_recovery_goes_into_the_file(sources: Any, tmp_path: Path, recover: str) -> None:
    import surgery
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings
    from tests.support.builds import build

    source = sources("Q8_0")
    options = BuildOptions(str(source.file), str(tmp_path / "a.h5"), calib="pydoc", sequences=8, seq_len=64)
    build(options, LabelSettings(rho=0.03, support_size=8))
    given = {"sparsity": 0.375, "recover": recover, "verify": False}
    surgery.prune(source.file, tmp_path / "a.h5", tmp_path / "plain", **given)
    result = surgery.prune(source.file, tmp_path / "a.h5", tmp_path / "half", format="gguf", **given)
    assert result.report.recovery is not None
    old, new = tensors(source.file), tensors(tmp_path / "half" / "half.gguf")
    kept = result.report.plan.blocks[1].kept
    down = values(new["blk.1.ffn_down.weight"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    wanted = plain["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.abs(down - wanted).max() <= 0.01 * np.abs(wanted).max()
    assert np.abs(down - values(old["blk.1.ffn_down.weight"])[:, kept]).max() > 0.02 * np.abs(wanted).max()
    # A recovery that adapts whole FFNs may change rows that stay. Rows that it left alone are copied.
    up, before = plain["model.layers.1.mlp.up_proj.weight"].numpy(), values(old["blk.1.ffn_up.weight"])[kept]
    assert np.abs(values(new["blk.1.ffn_up.weight"]) - up).max() <= 0.01 * np.abs(up).max()
    if np.array_equal(up, before):
        np.testing.assert_array_equal(new["blk.1.ffn_up.weight"].data, old["blk.1.ffn_up.weight"].data[kept])
    else:
        assert recover == "block"


@pytest.mark.parametrize(("quant", "down", "others"), [(None, "Q8_0", "Q4_1"), ("q5_1", "Q8_0", "Q5_1")])
def test_only_what_is_quantised_again_gets_the_type_of_the_cut(
    sources: Any, tmp_path: Path, quant: str | None, down: str, others: str
) -> None:
    source = sources("Q4_1")
    report = apply_plan(half(source), source, tmp_path / "half", CutOptions(format="gguf", quant=quant, cut_quant="q8_0"))
    new = tensors(tmp_path / "half" / "half.gguf")
    assert {new[name].tensor_type.name for name in new if "ffn_down" in name} == {down}
    assert {new[name].tensor_type.name for name in new if "ffn_up" in name or "attn_q" in name} == {others}
    assert report.gguf is not None
    assert (report.gguf.quant, report.gguf.cut_quant) == (quant, "q8_0")
    assert open_result(tmp_path / "half").report.gguf == report.gguf


@pytest.fixture
def measured(sources: Any, tmp_path: Path) -> Callable[[str], ModelSource]:
    """Function from a type to a source whose atlas is ``a.h5``."""
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings
    from tests.support.builds import build

    def make(kind: str) -> ModelSource:
        source: ModelSource = sources(kind)
        options = BuildOptions(str(source.file), str(tmp_path / "a.h5"), calib="pydoc", sequences=8, seq_len=64)
        build(options, LabelSettings(rho=0.03, support_size=8))
        return source

    return make


@pytest.mark.parametrize(
    "options", [{}, {"quant": "f16", "cut_quant": "q4_0"}, *repeated({"quant": "q8_0"}, {"cut_quant": "q8_0"})]
)
def test_a_size_in_bytes_is_that_of_the_file(measured: Any, tmp_path: Path, capsys: Any, options: dict[str, str]) -> None:
    import surgery
    from surgery.cli.main import main

    source = measured("Q4_1")
    plain = surgery.prune(source.file, tmp_path / "a.h5", tmp_path / "half", sparsity=0.5, format="gguf", verify=False, **options)
    wanted = (tmp_path / "half" / "half.gguf").stat().st_size
    words = [
        "--model",
        str(source.file),
        "--format",
        "gguf",
        *(f"--{name.replace('_', '-')}={kind}" for name, kind in options.items()),
    ]
    # The plan leaves room for a longer header, so it is told of that much more.
    assert main(["plan", str(tmp_path / "a.h5"), "--to", f"{(wanted + 5000) / 1e3}KB", "--json", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["after"] == plain.report.parameters_after
    assert 0 <= planned["bytes"]["after"] - wanted <= 5000
    asked = {"to": f"{wanted / 1e3}KB", "format": "gguf", "verify": False, **options}
    result = surgery.prune(source.file, tmp_path / "a.h5", tmp_path / "sized", **asked)
    assert (tmp_path / "sized" / "sized.gguf").stat().st_size <= wanted
    assert result.report.parameters_after >= 0.8 * plain.report.parameters_after
    assert main(["plan", str(tmp_path / "a.h5"), "--to", "100KB", "--format", "gguf"]) == 2
    assert "--model FILE.gguf" in capsys.readouterr().err


def test_uneven_widths_are_refused_before_anything_is_said(measured: Any, tmp_path: Path, capsys: Any) -> None:
    """llama.cpp would read them; transformers, which checks the result, reads one number."""
    from surgery.cli.main import main

    source = measured("Q8_0")
    atlas, model = str(tmp_path / "a.h5"), ["--model", str(source.file)]
    for command in (
        ["plan", atlas],
        ["prune", atlas, *model, "--dry-run"],
        ["prune", atlas, *model, "-o", str(tmp_path / "out")],
    ):
        for more, way in ((["--allocation", "global"], "use --allocation uniform"), (["--layers", "0"], "leave out --layers")):
            assert main([*command, "--sparsity", "0.375", "--format", "gguf", *more]) == 2
            told = capsys.readouterr()
            assert "transformers reads one for all layers" in told.err
            assert way in told.err
            assert "DeciLM" not in told.err
            assert told.out == ""
    assert main(["plan", atlas, "--sparsity", "0.375", "--allocation", "global", "-o", str(tmp_path / "p")]) == 0
    assert "DeciLM" in capsys.readouterr().err
    assert main(["apply", str(tmp_path / "p"), *model, "--format", "gguf", "-o", str(tmp_path / "out")]) == 2
    assert "transformers reads one for all layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
