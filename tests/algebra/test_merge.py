"""Atlases of parts add up to the atlas of the whole in any order; atlases that do not fit together are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random as stdlib_random
import string

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.merge import merge
from chanfmt.algebra.metrics import FORMULAS, derive_metrics
from chanfmt.algebra.rewrite import noted
from chanfmt.algebra.strip import stripped
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.cli.main import main
from chanfmt.format import schema
from chanfmt.format.extensions import ExtensionMerge, added
from chanfmt.format.records import ExtensionGroup, ExtensionVariable
from chanfmt.format.writer import write_atlas
from tests.support.factory import moe_content, random_content, with_fields
from tests.support.heard import heard
from tests.support.hygiene import heavy_imports
from tests.support.repeated import repeated

MAKERS = {"dense": random_content, "experts": moe_content}
SUMMED = [variable.name for variable in schema.STACK_VARIABLES if variable.merge == "sum"]
DROPPED = (
    "connectivity",
    "redundancy",
    "redundancy_null",
    "read_connectivity",
    "connectivity_at",
    "redundancy_partner",
    "redundancy_pair",
    "write_dimension",
    "write_share",
    "wanda_group",
    "redundancy_tokens",
    "core_covered",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Function from a kind to six files of one model, each measured on other text; made once."""
    made = {}

    def get(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            made[kind] = [directory / f"{index}.h5" for index in range(6)]
            for index, path in enumerate(made[kind]):
                write_atlas(MAKERS[kind](calibration_seed=index), path)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def bare_shards(shards, tmp_path_factory):
    """The `shards` without the arrays that a merge drops, because the time to open a file grows with its number of arrays."""
    made = {}

    def get(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            made[kind] = []
            for path in shards(kind):
                (content,) = contents([path])
                stacks = tuple(
                    dataclasses.replace(
                        stack,
                        supports=(),
                        variables={name: values for name, values in stack.variables.items() if name not in DROPPED},
                    )
                    for stack in content.stacks
                )
                made[kind].append(write(directory / path.name, content, stacks=stacks, dropped=DROPPED))
        return made[kind]

    return get


def merged(paths, **arguments):
    """`merge` of the files ``paths``."""
    opened = [chanfmt.open(path) for path in paths]
    try:
        return merge(opened, **arguments)
    finally:
        for atlas in opened:
            atlas.close()


def write(path, content, **changes):
    """Write ``content``, with ``changes`` of its fields, to ``path`` and return it."""
    write_atlas(dataclasses.replace(content, **changes), path)
    return path


def contents(paths):
    """The contents of ``paths``, in the order in which a merge adds them."""
    found = []
    for path in paths:
        with chanfmt.open(path) as atlas:
            found.append(atlas.content())
    return sorted(found, key=lambda content: min(row.id for row in content.calibration.contributions))


def assert_same(first, second):
    """Two contents are equal in everything, arrays to the bit."""
    for name in ("title", "model", "labels", "core_rho", "blocks", "producer", "status", "dropped"):
        assert getattr(first, name) == getattr(second, name), name
    for field in dataclasses.fields(first.calibration):
        np.testing.assert_array_equal(getattr(first.calibration, field.name), getattr(second.calibration, field.name), field.name)
    for stack, other in zip(first.stacks, second.stacks, strict=True):
        assert (stack.name, stack.supports, set(stack.variables)) == (other.name, other.supports, set(other.variables))
        for name, values in stack.variables.items():
            assert values.dtype == other.variables[name].dtype, name
            assert values.tobytes() == other.variables[name].tobytes(), name


@pytest.mark.parametrize("kind", MAKERS)
def test_sums_are_those_of_the_parts(kind, shards):
    parts, whole = contents(shards(kind)), merged(shards(kind))
    for number, stack in enumerate(whole.stacks):
        for name in SUMMED:
            values = np.stack([part.stacks[number].variables[name] for part in parts])
            assert stack.variables[name].tobytes() == functools.reduce(np.add, values).tobytes(), name
            np.testing.assert_array_equal(stack.variables[name], values.sum(axis=0), name)
            exact = np.apply_along_axis(math.fsum, 0, values.astype(np.float64))
            # The terms of sums of q and u cancel, so these sums are exact relative to the size of the terms.
            scale = np.abs(values).sum(axis=0)
            assert np.all(np.abs(stack.variables[name] - exact) <= 1e-15 * scale), name
        for name in ("max_abs_u", "write_norm", "write_norm_l1", "up_norm", "gate_norm"):
            values = np.stack([part.stacks[number].variables[name] for part in parts])
            np.testing.assert_array_equal(stack.variables[name], values.max(axis=0), name)
        for name, values in derive_metrics(stack.variables, stack.variables["tokens"]).items():
            assert stack.variables[name].tobytes() == values.tobytes(), name
        assert not set(stack.variables) & set(DROPPED)
        assert stack.supports == ()


@pytest.mark.parametrize("kind", MAKERS)
def test_labels_follow_from_the_merged_scores(kind, shards):
    whole = merged(shards(kind))
    for stack in whole.stacks:
        lp, label = stack.variables["lp"], stack.variables["label"]
        for at in np.ndindex(lp.shape[:-1]):
            expected = np.zeros(lp.shape[-1], dtype=np.uint8)
            if not np.isnan(lp[at]).all():
                expected[sorted(range(len(lp[at])), key=lambda i, row=lp[at]: (-row[i], i))[:1]] = schema.LABEL_SUPERNODE
            np.testing.assert_array_equal(label[at], expected)
        assert (stack.variables["protection"] == 1).all()
    assert whole.core_rho == whole.labels.rho
    assert whole.dropped == DROPPED


def test_the_calibration_is_that_of_all(shards):
    parts, found = contents(shards("dense")), merged(shards("dense")).calibration
    assert list(found.sequence_sha256) == sorted(found.sequence_sha256)
    assert [row.id for row in found.contributions] == sorted(row.id for row in found.contributions)
    assert found.sequences == sum(part.calibration.sequences for part in parts)
    assert found.mean_loss == pytest.approx(4.2, rel=1e-15)
    for part in parts:
        record = part.calibration
        for index, digest in enumerate(record.sequence_sha256):
            at = found.sequence_sha256.index(digest)
            assert found.split_of[at] == record.split_of[index]
            np.testing.assert_array_equal(found.token_ids[at], record.token_ids[index])
            assert found.contributions[found.source_of[at]] == record.contributions[record.source_of[index]]


def test_loss_is_weighted_and_producers_are_joined(tmp_path, shards):
    first, second = contents(shards("dense")[:2])
    half = dataclasses.replace(first.calibration, mean_loss=2.0)
    paths = [
        write(
            tmp_path / "a.h5",
            first,
            calibration=half,
            producer=dataclasses.replace(
                first.producer, seconds=2.0, peak_memory_bytes=7, hardware="A", history=({"command": "label"},)
            ),
        ),
        write(
            tmp_path / "b.h5",
            second,
            producer=dataclasses.replace(second.producer, seconds=3.0, hardware="B", versions={"chanfmt": "other"}),
        ),
    ]
    with heard() as notes:
        found = merged(paths)
    assert found.calibration.mean_loss == pytest.approx((2.0 + 4.2) / 2, rel=1e-15)
    assert (found.producer.seconds, found.producer.peak_memory_bytes, found.producer.hardware) == (5.0, 7, "A + B")
    assert found.producer.versions == first.producer.versions
    assert [line["command"] for line in found.producer.history] == ["label", "merge"]
    with chanfmt.open(paths[0]) as a, chanfmt.open(paths[1]) as b:
        assert found.producer.history[-1]["inputs"] == [a.content_sha256, b.content_sha256]
    assert any("versions" in note for note in notes)


@pytest.mark.parametrize(("kind", "orders"), [("dense", 2), ("experts", 1), *repeated(("dense", 4))])
def test_any_order_on_the_command_line_gives_one_result(kind, orders, bare_shards):
    paths, generator = list(bare_shards(kind)), stdlib_random.Random(0)
    expected = merged(paths)
    for _ in range(orders):
        generator.shuffle(paths)
        assert_same(merged(paths), expected)


@pytest.mark.parametrize(("kind", "trees"), [("dense", 3), ("experts", 2), *repeated(("dense", 6), ("experts", 3))])
def test_any_tree_of_merges_gives_one_result(kind, trees, bare_shards, tmp_path):
    expected, generator = merged(bare_shards(kind)), stdlib_random.Random(1)
    for tree in range(trees):
        nodes = list(bare_shards(kind))
        while True:
            generator.shuffle(nodes)
            count = generator.randint(2, len(nodes))
            found = merged(nodes[:count])
            if count == len(nodes):
                break
            nodes = [*nodes[count:], write(tmp_path / f"{tree}-{len(nodes)}.h5", found)]
        for stack, other in zip(found.stacks, expected.stacks, strict=True):
            for name, values in stack.variables.items():
                wanted = other.variables[name]
                if name in ("sum_u", "sum_q"):
                    # The terms of these sums cancel, so the rounding error is relative to the size of the terms.
                    scale = np.sqrt(other.variables[f"{name}2"] * other.variables["tokens"][..., None])
                    assert np.all(np.abs(values - wanted) <= 4e-15 * scale), name
                elif values.dtype == np.float64:
                    np.testing.assert_allclose(values, wanted, rtol=4e-15, atol=0, err_msg=name)
                elif name in FORMULAS:
                    np.testing.assert_array_max_ulp(values, wanted, 1)
                else:
                    np.testing.assert_array_equal(values, wanted, name)
        assert (found.calibration.sequence_sha256, found.calibration.contributions, found.dropped) == (
            expected.calibration.sequence_sha256,
            expected.calibration.contributions,
            expected.dropped,
        )
        np.testing.assert_array_equal(found.calibration.split_of, expected.calibration.split_of)
        np.testing.assert_array_equal(found.calibration.source_of, expected.calibration.source_of)


def test_the_merged_atlas_is_read_back(shards, tmp_path):
    expected = merged(shards("experts"))
    assert main(["validate", str(write(tmp_path / "all.h5", expected))]) == 0
    with chanfmt.open(write(tmp_path / "all.h5", expected), verify=True) as atlas:
        assert_same(atlas.content(), expected)


def test_token_ids_only_where_all_have_them(shards, tmp_path):
    first, second = contents(shards("dense")[:2])
    bare = write(tmp_path / "bare.h5", second, calibration=dataclasses.replace(second.calibration, token_ids=None))
    with heard() as notes:
        found = merged([write(tmp_path / "a.h5", first), bare])
    assert found.calibration.token_ids is None
    assert notes == [f"note: the token ids are left out, because they are not in {bare}"]
    with chanfmt.open(write(tmp_path / "all.h5", found)) as atlas:
        assert atlas.dropped == found.dropped == DROPPED


def changed_stack(content, **changes):
    """The `stacks` of ``content`` with fields of the first stack changed."""
    return (dataclasses.replace(content.stacks[0], **changes), *content.stacks[1:])


def changed_variables(content, **arrays):
    stack = content.stacks[0]
    return changed_stack(
        content, variables={name: values for name, values in {**stack.variables, **arrays}.items() if values is not None}
    )


def refusals():
    """Name, function from a content to the changes that keep it from merging, and words of the refusal."""
    replace = dataclasses.replace

    def model(**changes):
        return lambda content: {"model": replace(content.model, **changes)}

    def calibration(**changes):
        return lambda content: {"calibration": replace(content.calibration, **changes)}

    def labels(**changes):
        return lambda content: {"labels": replace(content.labels, **changes)}

    def norm(content):
        values = content.stacks[0].variables["up_norm"].astype("f4")
        values[1, 2] = np.nextafter(values[1, 2], np.float32(9))
        return {"stacks": changed_variables(content, up_norm=values)}

    def blocks(content):
        return {"blocks": (replace(content.blocks[0], module="model.layers.0.ffn"), *content.blocks[1:])}

    return [
        ("fingerprint", model(fingerprint="0" * 64), "different models.*fingerprint"),
        ("config", model(config_sha256="0" * 64), "config_sha256"),
        ("dtype", model(dtype="bfloat16"), "dtype is float32 in one and bfloat16.*\n.*--dtype"),
        ("revision", model(revision="abc"), "revision"),
        ("id", model(id="tests/other"), "id is tests/random in one and tests/other"),
        ("parameters", model(parameters=1), "parameters"),
        ("loss", calibration(loss="mean"), "different losses"),
        ("metric definition", calibration(metric_definition="scar-2"), r"defined differently \(scar-1 and scar-2\)"),
        ("tokenizer", calibration(tokenizer="words"), "tokenized differently"),
        (
            "seq_len",
            lambda content: {"calibration": replace(content.calibration, seq_len=16, token_ids=None)},
            r"different lengths \(32 and 16\)",
        ),
        ("FFN table", blocks, "describe FFN 0 differently: module"),
        ("fewer FFNs", lambda content: {"blocks": content.blocks[:-1]}, "4 and 3 FFNs"),
        (
            "stack name",
            lambda content: {
                "stacks": changed_stack(content, name="other"),
                "blocks": tuple(replace(block, stack="other") for block in content.blocks),
            },
            "describe FFN 0 .*stack",
        ),
        (
            "activation",
            lambda content: {"stacks": changed_stack(content, activation="gelu")},
            "activation is silu in one and gelu",
        ),
        ("layers", lambda content: {"stacks": changed_stack(content, layers=np.arange(4) + 1)}, "layers of the stack"),
        ("rho", labels(rho=0.02), "rho is 0.01 in one and 0.02 in the other\n.*atlas label .* --rho 0.01 -o"),
        ("several settings", labels(eta=0.2, gamma=4.0), "--eta 0.1 --gamma 8.0 -o"),
        ("top k", labels(redundancy_top_k=3), "redundancy_top_k.*\n.*build one"),
        ("norm", norm, "disagree about up_norm"),
        ("partial", lambda content: {"status": "partial"}, "unfinished build"),
        (
            "no sums",
            lambda content: {"stacks": changed_variables(content, sum_q2=None), "dropped": ("sum_q2",)},
            "holds no sum_q2 for decoder",
        ),
        (
            "overflow",
            lambda content: {"stacks": changed_variables(content, tokens=np.full(4, np.iinfo(np.int64).max))},
            "adding tokens of .* overflows",
        ),
        ("no source", calibration(source_of=np.full(16, 3, dtype=np.int32)), "a contribution that it does not list"),
    ]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in refusals()], ids=[row[0] for row in refusals()])
def test_what_does_not_fit_is_refused(change, message, shards, tmp_path):
    # The changed atlas comes second in a merge, in whichever order the files are named.
    first, second = contents(shards("dense")[:2])
    other = write(tmp_path / "other.h5", second, **change(second))
    paths = [write(tmp_path / "one.h5", first), other]
    for order in (paths, paths[::-1]):
        with pytest.raises(AtlasError, match="(?s)" + message) as caught:
            merged(order)
        assert "other.h5" in caught.value.message
        assert caught.value.hint
        assert not caught.value.message.endswith(".")


def test_different_splits_are_refused(shards, tmp_path):
    first, second = contents(shards("dense")[:2])
    variables = second.stacks[0].variables
    half = {
        name: variables[name].reshape(4, 2, *variables[name].shape[1:]).sum(axis=1) for name in ("tokens_split", "sum_q2_split")
    }
    stacks = changed_stack(second, splits=4, variables={**variables, **half})
    with pytest.raises(AtlasError, match="splits is 8 in one and 4"):
        merged([write(tmp_path / "a.h5", first), write(tmp_path / "b.h5", second, stacks=stacks)])


def test_nothing_counts_twice(shards, tmp_path):
    a, b, c = shards("dense")[:3]
    copy = tmp_path / "copy.h5"
    copy.write_bytes(a.read_bytes())
    for twin in (a, copy):
        with pytest.raises(AtlasError, match="are the same atlas"):
            merged([a, b, twin])
    both = write(tmp_path / "ab.h5", merged([a, b]))
    with pytest.raises(AtlasError, match="both hold the contribution"):
        merged([both, a])
    with pytest.raises(AtlasError, match="both hold the contribution"):
        merged([both, write(tmp_path / "bc.h5", merged([b, c]))])
    # The same text again, in a build of its own.
    (content,) = contents([c])
    mine, theirs = (list(contents([path])[0].calibration.sequence_sha256) for path in (a, c))
    overlapping = dataclasses.replace(content.calibration, sequence_sha256=tuple(mine[:5] + theirs[5:]))
    with pytest.raises(AtlasError, match="share 5 of 16 calibration sequences") as caught:
        merged([a, write(tmp_path / "c.h5", content, calibration=overlapping)])
    assert "a.h5" not in str(caught.value)
    assert str(a) in caught.value.message


def test_one_file_is_no_merge(shards):
    with pytest.raises(UsageError, match="at least two"):
        merged(shards("dense")[:1])


def test_damage_and_stripped_files_are_refused(shards, tmp_path):
    a, b = shards("dense")[:2]
    (content,) = contents([b])
    with pytest.raises(AtlasError, match="holds no sum_u and 7 others"):
        merged([a, write(tmp_path / "small.h5", stripped(content))])
    raw = bytearray(b.read_bytes())
    at = raw.index(content.stacks[0].variables["sum_q"].tobytes()) + 1000
    raw[at] ^= 1
    (tmp_path / "flipped.h5").write_bytes(raw)
    with pytest.raises(AtlasError, match=r"flipped\.h5 does not match"):
        merged([a, tmp_path / "flipped.h5"])


def test_a_file_replaced_meanwhile_is_noticed(shards, tmp_path):
    a, b, c = shards("dense")[:3]
    path = tmp_path / "b.h5"
    path.write_bytes(b.read_bytes())
    with chanfmt.open(a) as first, chanfmt.open(path) as second:
        (tmp_path / "new").write_bytes(c.read_bytes())
        (tmp_path / "new").replace(path)
        with pytest.raises(AtlasError, match="changed while it was being merged"):
            merge([first, second])


def scale(name, values):
    return ExtensionVariable(name, (name,), values, name, "1", "")


def array(name, dimensions, values, merge, units="1"):
    return ExtensionVariable(name, dimensions, values, name, units, merge)


def test_extensions_merge_by_their_rules(shards, tmp_path):
    paths, groups = [], []
    for number, content in enumerate(contents(shards("dense")[:3])):
        generator = np.random.default_rng(number)
        bins = np.array([0, 1, 2], dtype="i4")
        groups.append(
            ExtensionGroup(
                "x_lab/decoder",
                {"unit": "bits", "run": number},
                (
                    scale("layer", np.arange(4, dtype="i4")),
                    scale("bin", bins),
                    scale("edge", bins + number),
                    array("counts", ("layer", "bin"), generator.integers(0, 9, (4, 3)), "sum"),
                    array("total", ("layer",), generator.random(4), "sum"),
                    array("peak", ("layer",), generator.normal(size=4).astype("f4"), "max"),
                    array("name", ("layer",), ["a", "b", "c", "d"], "equal"),
                    array("same", ("bin",), bins * 2, "equal"),
                    array("differs", ("bin",), bins * number, "equal"),
                    array("temporary", ("layer",), np.zeros(4), "drop"),
                    array("moved", ("edge",), np.ones(3), "sum"),
                    array("full", ("bin",), np.full(3, 100, dtype="u1"), "sum"),
                    array("scaled", ("bin",), np.ones(3), "sum", units=["m", "cm", "m"][number]),
                    *([array("rare", ("bin",), np.ones(3), "sum")] if number else []),
                ),
            )
        )
        extra = (ExtensionGroup("x_other", {"only": 1}, ()),) if number == 1 else ()
        paths.append(write(tmp_path / f"{number}.h5", content, extensions=(groups[-1], *extra)))
    with heard() as notes:
        found = merged(paths)
    (group,) = found.extensions
    values = {item.name: item.values for item in group.variables}
    parts = [{item.name: item.values for item in group.variables} for group in groups]
    assert group.attributes == {"unit": "bits"}
    assert set(values) == {"layer", "bin", "counts", "total", "peak", "name", "same"}
    np.testing.assert_array_equal(values["counts"], sum(part["counts"] for part in parts))
    assert values["total"].tobytes() == (parts[0]["total"] + parts[1]["total"] + parts[2]["total"]).tobytes()
    np.testing.assert_array_equal(values["peak"], np.max([part["peak"] for part in parts], axis=0))
    assert list(values["name"]) == ["a", "b", "c", "d"]
    (note,) = notes
    for name in ("differs", "moved", "full", "scaled", "rare"):
        assert f"x_lab/decoder/{name}" in note
    assert "temporary" not in note
    with chanfmt.open(write(tmp_path / "all.h5", found)) as atlas:
        back = {item.name: item for group in atlas.extensions() for item in group.variables}
    assert (back["counts"].merge, back["counts"].dimensions) == ("sum", ("layer", "bin"))
    # The result is the same in whichever order the files are named.
    again = merged(paths[::-1]).extensions
    assert [item.name for item in again[0].variables] == [item.name for item in group.variables]


def test_extensions_of_one_input_are_not_those_of_all():
    extensions = ExtensionMerge([ExtensionGroup("x_a", {}, (array("n", ("n_",), np.ones(2), "sum"),))])
    extensions.add([ExtensionGroup("x_b", {}, (array("m", ("m_",), np.ones(2), "sum"),))])
    assert (extensions.groups(), list(extensions.lost)) == ((), ["x_a/n", "x_b/m"])


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        (np.array([127], "i4"), np.array([1], "i4"), True),
        (np.array([2**31 - 1], "i4"), np.array([1], "i4"), False),
        (np.array([-(2**31)], "i4"), np.array([-1], "i4"), False),
        (np.array([2**63 - 1], "i8"), np.array([-1], "i8"), True),
        (np.array([2**63 - 1], "i8"), np.array([1], "i8"), False),
        (np.array([255], "u1"), np.array([1], "u1"), False),
        (np.array([3e38], "f4"), np.array([3e38], "f4"), False),
        (np.array([np.nan], "f4"), np.array([1], "f4"), True),
    ],
)
def test_sums_that_overflow_are_noticed(first, second, fits):
    total = added(first, second)
    assert (total is not None) == fits
    if total is not None:
        assert total.dtype == first.dtype


def test_command(shards, tmp_path, capsys):
    output = tmp_path / "all.h5"
    arguments = ["merge", *map(str, shards("dense")[:3]), "-o", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "48 sequences of 3 atlases" in printed.err
    assert "dropped connectivity" in printed.err
    assert f"atlas label {output} --model MODEL --overwrite" in printed.err
    assert "scar-prot and scar-conn rank channels as scar-lp does" in printed.err
    assert "LP mass" in printed.out
    before = output.read_bytes()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main([*arguments, "--overwrite", "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    data = json.loads(printed.out)
    assert data["inputs"] == [str(path) for path in shards("dense")[:3]]
    assert data["calibration"]["sequences"] == 48
    assert data["dropped"] == list(DROPPED)
    assert main(["merge", str(shards("dense")[0]), "-o", str(tmp_path / "x.h5")]) == 2
    assert main(["merge", str(shards("dense")[0]), str(shards("experts")[0]), "-o", str(tmp_path / "x.h5")]) == 2
    assert "different models" in capsys.readouterr().err
    assert not (tmp_path / "x.h5").exists()


def test_nothing_heavy_is_loaded(shards, tmp_path):
    files = [str(path) for path in shards("dense")[:2]]
    assert not heavy_imports("chanfmt.cli.main", ["merge", *files, "-o", str(tmp_path / "all.h5")])


def test_history_is_kept():
    content = noted(noted(random_content(), "label", ["a"], labels={"rho": 0.1}), "strip", ["b"])
    assert [line["command"] for line in content.producer.history] == ["label", "strip"]
    assert content.producer.history[0]["labels"] == {"rho": 0.1}


@pytest.fixture(scope="module")
def halves(tiny_checkpoint, tmp_path_factory):
    """Atlases of a tiny llama on two texts, and on both texts at once."""
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings
    from tests.support.builds import build

    directory, generator = tmp_path_factory.mktemp("halves"), stdlib_random.Random(3)
    # One token per character and whole blocks, so that the blocks of the two texts are the blocks of the joined text.
    texts = ["".join(generator.choices(string.ascii_letters + "    \n", k=8 * 32)) for _ in range(2)]
    paths = []
    for name, text, sequences in (("a", texts[0], 8), ("b", texts[1], 8), ("both", "".join(texts), 16)):
        (directory / f"{name}.txt").write_text(text)
        options = BuildOptions(
            str(tiny_checkpoint("llama")),
            str(directory / f"{name}.h5"),
            seq_len=32,
            calib=str(directory / f"{name}.txt"),
            sequences=sequences,
        )
        paths.append(build(options, LabelSettings(rho=0.03, support_size=8)))
    return paths


def test_two_builds_merge_to_the_build_of_both(halves):
    found = merged(halves[:2])
    (whole,) = contents(halves[2:])
    assert found.calibration.sequence_sha256 == whole.calibration.sequence_sha256
    np.testing.assert_array_equal(found.calibration.token_ids, whole.calibration.token_ids)
    assert found.calibration.mean_loss == pytest.approx(whole.calibration.mean_loss, rel=1e-5)
    for name in FORMULAS:
        np.testing.assert_allclose(
            found.stacks[0].variables[name], whole.stacks[0].variables[name], rtol=1e-5, atol=0, err_msg=name
        )
    for name in ("max_abs_u", "write_norm", "write_norm_l1", "up_norm", "gate_norm", "tokens"):
        np.testing.assert_allclose(found.stacks[0].variables[name], whole.stacks[0].variables[name], rtol=1e-6, err_msg=name)
    labels = [content.stacks[0].variables["label"] == schema.LABEL_SUPERNODE for content in (found, whole)]
    np.testing.assert_array_equal(*labels)


def test_with_the_weights_it_is_the_build_of_both(halves, tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "all.h5"
    assert main(["merge", *map(str, halves[:2]), "-o", str(output), "--model", str(tiny_checkpoint("llama"))]) == 0
    assert "--model" not in capsys.readouterr().err
    (found,), (whole,) = contents([output]), contents(halves[2:])
    for name in ("connectivity", "connectivity_at", "read_connectivity", "label"):
        assert found.stacks[0].variables[name].tobytes() == whole.stacks[0].variables[name].tobytes(), name
    assert found.stacks[0].supports == whole.stacks[0].supports
    assert (found.stacks[0].variables["label"] == schema.LABEL_HALO).any()
    assert (found.stacks[0].variables["protection"] == 1).all()
    assert set(found.dropped) == {
        "redundancy",
        "redundancy_null",
        "redundancy_partner",
        "redundancy_pair",
        "wanda_group",
        "redundancy_tokens",
        "core_covered",
    }


def test_the_command_refuses_another_models_weights(halves, tiny_checkpoint, tmp_path, capsys):
    assert main(["merge", *map(str, halves[:2]), "-o", str(tmp_path / "x.h5"), "--model", str(tiny_checkpoint("gpt2"))]) == 2
    assert "not the model that was measured" in capsys.readouterr().err
    assert not (tmp_path / "x.h5").exists()


def test_what_sets_the_widths_comes_from_any_atlas_that_says_it(tmp_path):
    """An atlas of an older chanfmt does not say it; two atlases that say different things do not merge."""
    fields = {"decoder": ("intermediate_size", 1)}
    older, newer = random_content(calibration_seed=0), with_fields(random_content(calibration_seed=1), fields)
    newer = dataclasses.replace(newer, model=older.model)
    other = with_fields(random_content(calibration_seed=2), {"decoder": ("n_inner", 1)})
    other = dataclasses.replace(other, model=older.model)
    paths = [tmp_path / f"{name}.h5" for name in ("older", "newer", "other")]
    for content, path in zip((older, newer, other), paths, strict=True):
        write_atlas(content, path)
    with chanfmt.open(paths[0]) as first, chanfmt.open(paths[1]) as second, chanfmt.open(paths[2]) as third:
        for order in ((first, second), (second, first)):
            blocks = merge(order).blocks
            assert {(block.width_field, block.width_factor, block.channel_parameters) for block in blocks} == {
                ("intermediate_size", 1, 72)
            }
        with pytest.raises(AtlasError, match="width_field is n_inner in one and intermediate_size in the other"):
            merge((second, third))
