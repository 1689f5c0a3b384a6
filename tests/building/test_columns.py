"""The columns of a build against plain numpy on activations and gradients that hooks and autograd give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

import chanfmt
from chanfmt.algebra.driving import Driving
from chanfmt.algebra.merge import merge
from chanfmt.analysis.driving import DrivingToken, in_context
from chanfmt.base.errors import UsageError
from chanfmt.building.columns import delimiter_ids, ffn_columns, plan_columns, read_ids
from chanfmt.building.loss import MaskedTokenLoss, ReconstructionLoss
from chanfmt.building.measure import measure
from chanfmt.building.options import BuildOptions
from chanfmt.cli.main import main
from chanfmt.data.tokens import canonical
from chanfmt.format.columns import ARRAY_BY_NAME, COLUMN_BY_NAME, MEASURED_GROUPS, OWNER, measured_groups
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.matrices import ffn_weights
from chanfmt.reporting.explore import explored
from tests.support.direct import direct
from tests.support.tiny import random_tokens, tiny_model, tiny_tokenizer
from tests.support.zoo import IMAGE, tiny

BOS = 1
TOKENIZER = tiny_tokenizer()


def sequences(count, length):
    """Sequences that begin with BOS, from two sources in turn; a seventh of the tokens are delimiters."""
    ids = 4 + random_tokens(count, length).numpy() % 100
    ids[:, ::7] = TOKENIZER.convert_tokens_to_ids(".")
    ids[:, 3] = TOKENIZER.convert_tokens_to_ids("\n")
    ids[1:, 0] = BOS
    return canonical(ids, np.arange(count) % 2)


def expected_columns(tokens, u, s, place_of, write):
    """All columns from u and s (row, m), the sequence and position of each row (row, 2), and the write matrix (d, m)."""
    q = u * s
    sequence, position = place_of.T
    token = tokens.ids[sequence, position]
    texts = [TOKENIZER.decode([int(item)]) for item in token]
    delimiter = (position > 0) & np.array(
        [text in ".,:;!?'\"()-[]{}/\\&%#@*_\n\r\x0b\x0c" and item > 3 for text, item in zip(texts, token, strict=True)]
    )
    best = np.abs(u).argmax(0)
    weights = np.abs(write)
    found = {
        "super_weight": np.abs(u).max(0) * weights.max(0),
        "super_weight_row": weights.argmax(0),
        "peak_token": token[best],
        "peak_position": position[best],
        "peak_sequence": sequence[best],
        "active_tokens": (u > 0).sum(0),
        "firing_rate": (u > 0).mean(0),
    }
    for name, rows in (("first", position == 0), ("delimiter", delimiter)):
        found[f"{name}_sum_u2"], found[f"{name}_sum_q2"] = (u[rows] ** 2).sum(0), (q[rows] ** 2).sum(0)
        found[f"{name}_power_share"] = (u[rows] ** 2).sum(0) / (u**2).sum(0)
        found[f"{name}_lp_share"] = (q[rows] ** 2).sum(0) / (q**2).sum(0)
    source = tokens.source_of[sequence]
    rates = np.stack([(u[source == item] > 0).mean(0) for item in (0, 1)])
    share = rates / rates.sum(0)
    found["source_entropy"] = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0 * share).sum(0)
    # The eight largest, of equal ones the first in the order of the text.
    size = np.abs(u).astype("f4")
    order = np.stack([np.lexsort((position, sequence, -size[:, channel]))[:8] for channel in range(u.shape[1])])
    known = np.take_along_axis(size, order.T, 0).T > 0
    value = np.take_along_axis(u, order.T, 0).T
    found["driving_value"] = np.where(known, value, np.nan)
    found["driving_sequence"], found["driving_position"] = (np.where(known, values[order], -1) for values in (sequence, position))
    return {f"{OWNER}/{name}": values for name, values in found.items()}


def measured(model, tokens, batch_size):
    """The columns of every FFN, as a build measures them."""
    ffns = find_ffns(model)
    plan = plan_columns(MEASURED_GROUPS, tokens, ffns, None, TOKENIZER, everything=False)
    found = measure(model, ffns, tokens, rho=0.05, batch_size=batch_size, columns=plan)
    return ffns, [
        ffn_columns(plan, item, [ffn_weights(model, member) for member in ffn.members], ffn.place)
        for ffn, item in zip(ffns, found.statistics, strict=True)
    ]


def assert_columns(found, expected):
    known = COLUMN_BY_NAME | ARRAY_BY_NAME
    assert found.keys() == expected.keys() == {name for name in known if name in expected}
    for name, values in found.items():
        exact = known[name].dtype.startswith("i")
        np.testing.assert_allclose(values, expected[name], 0 if exact else 1e-5, 1e-12, err_msg=name)


def test_a_dense_ffn():
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    tokens = sequences(9, 40)
    ffns, columns = measured(model, tokens, 4)
    us, ss = direct(model, ffns, torch.from_numpy(tokens.ids).long())
    place_of = np.stack(np.divmod(np.arange(tokens.ids.size), 40), 1)
    with np.errstate(invalid="ignore"):
        for number, (ffn, found) in enumerate(zip(ffns, columns, strict=True)):
            u, s = (values[ffn.write].reshape(-1, ffn.width) for values in (us, ss))
            expected = expected_columns(tokens, u, s, place_of, model.get_parameter(ffn.write).numpy())
            if number == 1:
                # A channel that is 0 on all tokens has no largest token.
                for name in ("peak_token", "peak_position", "peak_sequence"):
                    expected[f"{OWNER}/{name}"][5] = -1
            assert_columns(found, expected)


def test_driving_tokens_of_parts_are_those_of_the_whole():
    """What a merge makes of two parts of a text, with channels that few tokens drive, and with many equal values."""
    model = tiny_model("opt", dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[:8] = torch.linspace(-1.5, -0.2, 8)
    whole = sequences(9, 24)
    order = np.random.default_rng(0).permutation(9)
    parts = [canonical(whole.ids[rows], whole.source_of[rows]) for rows in (order[:4], order[4:])]
    names = list(ARRAY_BY_NAME)

    def driving(tokens, batch_size):
        return [Driving(*(found[name] for name in names)) for found in measured(model, tokens, batch_size)[1]]

    numbers = [np.array([whole.sha256.index(digest) for digest in part.sha256]) for part in parts]
    unfilled = 0
    for expected, first, second in zip(driving(whole, 2), driving(parts[0], 3), driving(parts[1], 1), strict=True):
        found = second.renumbered(numbers[1]).joined(first.renumbered(numbers[0]))
        np.testing.assert_array_equal(found.sequence, expected.sequence)
        np.testing.assert_array_equal(found.position, expected.position)
        np.testing.assert_allclose(found.value, expected.value, 1e-6)
        unfilled += int((expected.sequence < 0).sum())
    assert unfilled


def test_experts():
    """Each token that an expert reads is traced to its sequence and position. All sequences but one begin with the same token."""
    model = tiny_model(
        "mixtral",
        dtype=torch.float64,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
    ).requires_grad_(False)
    tokens = sequences(9, 24)
    _, columns = measured(model, tokens, 4)
    kept = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.forward = written_out(layer.mlp.experts, number, kept)
    rows = {key: [] for key in np.ndindex(2, 4)}
    for sequence, ids in enumerate(torch.from_numpy(tokens.ids).long()):
        logits = model(ids[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], ids[1:], reduction="sum").backward()
        for key, (token, u) in kept.items():
            rows[key].append((u.detach().numpy(), u.grad.numpy(), np.stack([np.full(len(token), sequence), token.numpy()], 1)))
    for (layer, expert), parts in rows.items():
        u, s, place_of = (np.concatenate(values) for values in zip(*parts, strict=True))
        write = model.model.layers[layer].mlp.experts.down_proj[expert].numpy()
        found = {name: values[expert] for name, values in columns[layer].items()}
        assert_columns(found, expected_columns(tokens, u, s, place_of, write))


def written_out(experts, number, kept):
    """Mixtral's experts, one after the other; keeps the tokens and u of each."""

    def forward(hidden, chosen, weights):
        result = torch.zeros_like(hidden)
        for expert in range(experts.num_experts):
            token, slot = torch.where(chosen == expert)
            gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            u = functional.silu(gate) * up
            u = u if u.requires_grad else u.detach().requires_grad_(True)
            u.retain_grad()
            kept[number, expert] = token, u
            result = result.index_add(0, token, (u @ experts.down_proj[expert].T) * weights[token, slot, None])
        return result

    return forward


def test_experts_that_run_at_once():
    """Llama 4 gives each expert all tokens, those of other experts as zeros."""
    model = tiny("llama4_text").requires_grad_(False)
    tokens = sequences(4, 16)
    ffns, columns = measured(model, tokens, 3)
    number = next(number for number, ffn in enumerate(ffns) if ffn.experts)
    experts = model.get_submodule(ffns[number].container)
    seen = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(torch.from_numpy(tokens.ids).long(), use_cache=False)
    x = seen[0].view(ffns[number].experts, tokens.ids.size, -1)
    gate, up = torch.bmm(x, experts.gate_up_proj).chunk(2, -1)
    u = (experts.act_fn(gate) * up).numpy()
    for name, values in ((f"{OWNER}/first_sum_u2", (u[:, ::16] ** 2).sum(1)), (f"{OWNER}/active_tokens", (u > 0).sum(1))):
        np.testing.assert_allclose(columns[number][name], values, rtol=1e-4, atol=1e-9)
    best = np.abs(u).argmax(1)
    np.testing.assert_array_equal(columns[number][f"{OWNER}/peak_token"], tokens.ids.reshape(-1)[best])


def test_tokens_are_those_that_the_model_reads():
    masked = MaskedTokenLoss(None, 2)
    ids = random_tokens(3, 40).numpy()
    read = read_ids(masked, ids, "encoder")
    assert ((read != ids).sum(1) == 6).all()
    assert (read[read != ids] == 2).all()
    model = tiny("t5", "seq2seq")
    np.testing.assert_array_equal(read_ids(ReconstructionLoss(model), ids, "decoder")[:, 1:], ids[:, :-1])
    np.testing.assert_array_equal(read_ids(ReconstructionLoss(model), ids, "encoder"), ids)


def test_delimiters():
    ids = range(len(TOKENIZER))
    expected = set("!\"#%&'()*,-./:;?@[\\]_{}\n\r\x0b\x0c")
    assert set(TOKENIZER.convert_ids_to_tokens(delimiter_ids(TOKENIZER, ids).tolist())) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("peak", "did you mean peaks"), ("none,peaks", "cannot be combined"), (" , ", "names nothing")],
)
def test_a_choice_that_is_not_possible_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        measured_groups(text)
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert measured_groups("activity, peaks") == ("peaks", "activity")
    assert measured_groups("all") == MEASURED_GROUPS


def test_a_number_of_drivers_without_drivers_is_refused():
    for columns in ("drivers", "all"):
        BuildOptions("model", "a.h5", columns=columns, drivers=3).check()
    with pytest.raises(UsageError, match="--drivers has no effect without --columns drivers"):
        BuildOptions("model", "a.h5", columns="peaks", drivers=3).check()


def test_arrays_have_no_tokens(tmp_path):
    model = tiny("vit", IMAGE)
    path = tmp_path / "images.npz"
    np.savez(path, pixel_values=np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype("f4"))
    with pytest.raises(UsageError, match="needs token ids"):
        chanfmt.build(model, tmp_path / "a.h5", path, columns=["positions"], loss="embedding", device="cpu")
    with pytest.raises(UsageError, match="the atlas would not hold them"):
        plan_columns(("drivers",), sequences(2, 8), [], None, TOKENIZER, everything=False, stored=False)
    with chanfmt.build(model, tmp_path / "a.h5", path, columns="all", loss="embedding") as atlas:
        (stack,) = atlas.stacks.values()
        names = {name.partition("/")[2] for name in stack.extension_names}
    assert names == {
        "super_weight",
        "super_weight_row",
        "peak_sequence",
        "peak_position",
        "active_tokens",
        "firing_rate",
        "redundancy_chance",
    }


@pytest.fixture(scope="module")
def halves(tiny_checkpoint, tmp_path_factory):
    """Two atlases of one model on different sequences, with all columns."""
    directory = tmp_path_factory.mktemp("halves")
    return [
        chanfmt.build(
            tiny_checkpoint("llama"),
            directory / f"{seed}.h5",
            "pydoc",
            sequences=6,
            seq_len=32,
            seed=seed,
            columns="all",
            rho=0.03,
        ).path
        for seed in (0, 1)
    ]


def test_a_merge_keeps_what_adds_up(halves):
    with chanfmt.open(halves[0]) as first, chanfmt.open(halves[1]) as second:
        one, two = first.stacks["decoder"], second.stacks["decoder"]
        merged = merge([first, second])
        group = next(item for item in merged.extensions if item.path == f"{OWNER}/decoder")
        ids = first.calibration.token_ids
        attributes = next(item.attributes for item in first.extensions() if item.path == f"{OWNER}/decoder")
        assert attributes == {
            "columns": "peaks, positions, activity, drivers",
            "delimiter_ids": len(delimiter_ids(TOKENIZER, np.unique(ids))),
            "delimiter_tokens": int(np.isin(ids[:, 1:], delimiter_ids(TOKENIZER, range(len(TOKENIZER)))).sum()),
        }
        found = {f"{OWNER}/{item.name}": item.values for item in group.variables}
        kept = {name for name in one.extension_names if COLUMN_BY_NAME[name].merge != "drop"}
        assert {name for name in found if name in COLUMN_BY_NAME} == kept
        name = f"{OWNER}/delimiter_sum_q2"
        np.testing.assert_array_equal(found[name], one[name] + two[name])
        name = f"{OWNER}/super_weight"
        np.testing.assert_array_equal(found[name], np.maximum(one[name], two[name]))
        value, sequence, position = (found[name] for name in ARRAY_BY_NAME)
        both = np.concatenate([np.abs(part[f"{OWNER}/driving_value"]) for part in (one, two)], -1)
        np.testing.assert_array_equal(np.abs(value), -np.sort(-both, -1)[..., :8])
        # The number of a sequence names the same text as before.
        shas = merged.calibration.sequence_sha256
        for layer, channel in ((0, 3), (1, 7)):
            drivers = {
                (atlas.calibration.sequence_sha256[item.sequence], item.position, item.value)
                for atlas in (first, second)
                for item in chanfmt.analysis.driving_tokens(atlas, atlas.blocks[layer], channel)
            }
            rows = zip(*(item[layer, channel].tolist() for item in (sequence, position, value)), strict=True)
            assert {(shas[number], place, u) for number, place, u in rows} <= drivers


def test_driving_tokens_as_text(halves, tiny_checkpoint, capsys):
    with chanfmt.open(halves[0]) as atlas:
        block, ids = atlas.blocks[1], atlas.calibration.token_ids
        (first, *_) = found = chanfmt.analysis.driving_tokens(atlas, block, 5, window=3)
        assert len(found) == 8
        assert abs(first.value) == atlas.stacks["decoder"]["max_abs_u"][1, 5]
        row, at = ids[first.sequence].tolist(), first.position
        assert (*first.before, first.token, *first.after) == tuple(row[max(0, at - 3) : at + 4])
    arguments = ["show", str(halves[0]), "--layer", "1", "--channel", "5"]
    assert main([*arguments, "--model", str(tiny_checkpoint("llama")), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["driving_tokens"]
    assert [item["value"] for item in shown] == [item.value for item in found]
    for item in shown:
        around = [*item["before"], item["token"], *item["after"]]
        text = TOKENIZER.decode(around, clean_up_tokenization_spaces=False)
        assert "".join(item["text"].values()) == text.replace("\n", "↵")
    # Without a tokenizer, the tokens are ids.
    assert main(arguments) == 0
    assert f"»{first.token}«" in capsys.readouterr().out


def test_a_place_that_does_not_exist_is_not_known():
    ids = np.arange(6, dtype=np.int32).reshape(2, 3)
    values, sequences_, positions = np.array([3.0, -2, 1, np.nan]), np.array([2, 1, 0, -1]), np.array([0, 2, 3, -1])
    found = in_context(values, sequences_, positions, ids, window=1)
    assert found == (DrivingToken(3.0), DrivingToken(-2.0, 1, 2, 5, (4,), ()), DrivingToken(1.0))
    assert in_context(values, sequences_, positions, None)[1] == DrivingToken(-2.0, 1, 2)


def test_super_weights_of_the_model(halves, capsys):
    with chanfmt.open(halves[0]) as atlas:
        stack = atlas.stacks["decoder"]
        values = stack[f"{OWNER}/super_weight"]
        layer, channel = np.unravel_index(values.argmax(), values.shape)
        ids = atlas.calibration.token_ids
        found = chanfmt.analysis.super_weights(atlas, 5)
        assert [item.value for item in found] == sorted(values.ravel().tolist(), reverse=True)[:5]
        first = found[0]
        assert (first.layer, first.channel, first.expert) == (layer, channel, None)
        assert ids[first.sequence, first.position] == first.token
        assert first.peak == stack["max_abs_u"][layer, channel]
        unit = explored(list(atlas.units()), several_stacks=False)[layer].as_json()
        place = unit["channels"].index(first.channel)
        assert unit["values"][f"{OWNER}/peak_token"][place] == first.token
    assert main(["show", str(halves[0]), "--super-weights", "--top", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["super_weights"]
    assert [row["channel"] for row in rows] == [item.channel for item in found]
    assert main(["show", str(halves[0]), "--super-weights", "--top", "3"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert str(first.token) in table[1]


def test_ids_that_no_token_has_are_in_no_context():
    ids = np.array([[-5, 3, 4, -5]], dtype=np.int32)
    where = np.array([[0, 0], [1, 3]])
    assert in_context(np.array([2.0, 1.0]), *where, ids) == (
        DrivingToken(2.0, 0, 1, 3, (), (4,)),
        DrivingToken(1.0, 0, 3, None, (3, 4), ()),
    )
