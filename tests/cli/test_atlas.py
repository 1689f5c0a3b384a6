"""`atlas` as a user types it: results, errors, exit codes, and files that are left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import chanfmt
from chanfmt.cli.main import main
from chanfmt.hub.atlases import atlas_card
from chanfmt.hub.names import HubFile
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from tests.support.builds import SETTINGS, build, request
from tests.support.factory import random_atlas
from tests.support.hygiene import heavy_imports
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

SMALL = ["--calib", "pydoc", "--sequences", "4", "--seq-len", "32"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "chanfmt", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def refusal(capsys, *arguments):
    """Exit code and error text of a command that must fail with one line and a hint."""
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len([line for line in lines if line.startswith("atlas")]) == 1
    assert "Traceback" not in captured.err
    return code, captured.err


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_build_info_show(tiny_atlas, capsys):
    path = tiny_atlas("llama")
    assert main(["info", str(path), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["model"]["model_type"] == "llama"
    assert info["stacks"]["decoder"] == {
        "kind": "dense",
        "gated": True,
        "activation": "silu",
        "layers": 3,
        "channels": 87,
        "experts": 0,
    }
    assert [row["supernodes"] for row in info["layers"]] == [2, 2, 2]
    assert main(["info", str(path)]) == 0
    assert "87" in capsys.readouterr().out
    assert main(["show", str(path), "--layer", "1", "--top", "5", "--sort", "activation_power", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["channels"]
    with chanfmt.open(path) as atlas:
        power = atlas.stacks["decoder"]["activation_power"][1]
    assert [row["channel"] for row in rows] == np.argsort(-power)[:5].tolist()


def test_build_writes_what_the_api_measures(tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "a.h5"
    assert main(["build", str(tiny_checkpoint("gpt2")), "-o", str(path), *SMALL]) == 0
    captured = capsys.readouterr()
    assert "wrote" in captured.err
    assert "layer" in captured.out
    with chanfmt.open(path, verify=True) as atlas:
        assert atlas.calibration.token_ids.shape == (4, 32)
        assert not atlas.stacks["decoder"].gated
        assert "gate_norm" not in atlas.stacks["decoder"]
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]


def test_a_build_that_python_starts_records_no_command(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "/home/me/.local/kernel.json"])
    path = build(request(tiny_checkpoint("llama"), tmp_path / "a.h5"), SETTINGS)
    assert b"ipykernel" not in path.read_bytes()
    with chanfmt.open(path, verify=True) as atlas:
        assert atlas.producer.command == ""
        card = atlas_card(atlas, HubFile("ann/a", file="a.h5"), (("layer",), [("0",)]))
    assert "| command |" not in card
    assert "| made by |" in card
    assert main(["validate", str(path)]) == 0
    assert main(["info", str(path), "--json"]) == 0
    assert '"command": ""' in capsys.readouterr().out
    # A command line that Python passes to main is recorded as it was passed.
    assert main(["build", str(tiny_checkpoint("llama")), "-o", str(tmp_path / "b.h5"), *SMALL]) == 0
    with chanfmt.open(tmp_path / "b.h5") as atlas:
        assert atlas.producer.command == "atlas build llama -o b.h5 --calib pydoc --sequences 4 --seq-len 32"
        assert "| command | atlas build " in atlas_card(atlas, HubFile("ann/a", file="a.h5"), (("layer",), [("0",)]))


def test_a_plan_that_python_applies_records_no_command(tiny_atlas, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "/home/me/.local/kernel.json"])
    with chanfmt.open(tiny_atlas("llama")) as atlas:
        plan = make_plan(atlas, PlanOptions(sparsity=0.5))
    apply_plan(plan, ModelSource(tiny_checkpoint("llama")), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ipykernel" not in card
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["command"] == ""


def test_dry_run_measures_nothing(tiny_checkpoint, tmp_path, capsys):
    assert main(["build", str(tiny_checkpoint("phi3")), "-o", str(tmp_path / "a.h5"), *SMALL, "--dry-run", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["ffns"], summary["channels"], summary["tokens"]) == (3, 261, 128)
    assert summary["prune"] == "every FFN can be narrowed"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sequences", "0"], "--sequences must be at least 1"),
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--seq-len", "4096"], "longer than the context of"),
        (["--rho", "1.5"], "--rho must lie in"),
        (["--gamma", "0"], "--gamma must be positive"),
        (["--support", "0"], "--support must be at least 1"),
        (["--batch-size", "many"], "--batch-size must be"),
        (["--checkpoint-every", "-1"], "--checkpoint-every must be 0 or more"),
        (["--checkpoint-every", "nan"], "--checkpoint-every must be 0 or more"),
        (["--dtype", "int3"], "unknown dtype 'int3'; choose from"),
        (["--device", "abacus"], "cannot be used"),
        (["--calib", "nowhere.txt"], "does not exist"),
        (["--sequences", "four"], "invalid int value"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
        (["--support", str(2**40)], "--support"),
        (["--revision", "main"], "local model"),
        (["--batch-size", "²"], "--batch-size"),
        (["--device", "meta"], "cannot be used"),
    ],
)
def test_wrong_options(tiny_checkpoint, tmp_path, capsys, extra, message):
    code, error = refusal(capsys, "build", tiny_checkpoint("llama"), "-o", tmp_path / "a.h5", *SMALL, *extra)
    assert code == 2
    assert message in error
    assert not list(tmp_path.iterdir())


def test_missing_model(tmp_path, capsys):
    code, error = refusal(capsys, "build", "no/such-model", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "no/such-model" in error
    (tmp_path / "empty").mkdir()
    code, error = refusal(capsys, "build", tmp_path / "empty", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "config.json" in error


def test_output_exists(tiny_checkpoint, tmp_path, capsys):
    path = random_atlas(tmp_path / "a.h5")
    before = path.read_bytes()
    code, error = refusal(capsys, "build", tiny_checkpoint("llama"), "-o", path, *SMALL)
    assert code == 2
    assert "--overwrite" in error
    assert path.read_bytes() == before
    assert main(["build", str(tiny_checkpoint("llama")), "-o", str(path), *SMALL, "--overwrite"]) == 0
    with chanfmt.open(path) as atlas:
        assert atlas.model.id == "llama"


def test_no_such_output_directory(tiny_checkpoint, tmp_path, capsys):
    code, error = refusal(capsys, "build", tiny_checkpoint("llama"), "-o", tmp_path / "no" / "a.h5", *SMALL)
    assert code == 2
    assert "mkdir" in error


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/usr/bin/setpriv"), reason="root writes anywhere")
def test_no_write_permission(tiny_checkpoint, tmp_path):
    # Without this capability root must obey permissions, as a user does.
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    command = [sys.executable, "-m", "chanfmt", "build", str(tiny_checkpoint("llama")), "-o", str(closed / "a.h5"), *SMALL]
    if os.geteuid() == 0:
        command = ["/usr/bin/setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot write in" in done.stderr
    assert not list(closed.iterdir())


def test_nan_weights_are_named(tmp_path, capsys):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    capsys.readouterr()
    code, error = refusal(capsys, "build", tmp_path / "m", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "model.layers.1.self_attn.q_proj.weight holds NaN" in error
    assert [item.name for item in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("latin.txt", b"caf\xe9 " * 999, "not UTF-8"),
        ("short.txt", b"hello", "fewer than one sequence"),
        ("bad.jsonl", b"{nope", "not JSON"),
        ("field.jsonl", b'{"body": "x"}', "'text'"),
        ("bad.parquet", b"PAR1 no", "parquet"),
        ("book.pdf", b"%PDF", "not a text source"),
    ],
)
def test_bad_calibration_files(tiny_checkpoint, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    code, error = refusal(capsys, "build", tiny_checkpoint("llama"), "-o", tmp_path / "a.h5", "--calib", path, "--seq-len", "32")
    assert code == 2
    assert message in error
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_weights_missing_from_the_checkpoint(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "m", "llama")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    code, error = refusal(capsys, "build", tmp_path / "m", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "model.layers.1.mlp.up_proj.weight" in error


def test_quantised_model_is_refused(tmp_path, capsys):
    edit_config(save_tiny(tmp_path / "m", "llama"), quantization_config={"quant_method": "gptq", "bits": 4})
    capsys.readouterr()
    code, error = refusal(capsys, "build", tmp_path / "m", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "quantised (config.json has quantization_config: gptq)" in error


@pytest.mark.parametrize("command", [["info"], ["show", "--layer", "0"]])
def test_not_an_atlas(tmp_path, capsys, command):
    (tmp_path / "x.h5").write_text("hello")
    code, error = refusal(capsys, command[0], tmp_path / "x.h5", *command[1:])
    assert code == 2
    assert "not an importance atlas" in error


def test_show_refuses_what_is_not_there(tmp_path, capsys):
    path = random_atlas(tmp_path / "a.h5")
    assert "layers: 0 to 3" in refusal(capsys, "show", path, "--layer", "9")[1]
    assert "has no beauty" in refusal(capsys, "show", path, "--layer", "0", "--sort", "beauty")[1]
    assert "--top" in refusal(capsys, "show", path, "--layer", "0", "--top", "-1")[1]


def test_names_from_a_file_do_not_reach_the_terminal_raw(tmp_path, capsys):
    import dataclasses

    from chanfmt.format.writer import write_atlas
    from tests.support.factory import random_content

    content = random_content()
    content = dataclasses.replace(content, model=dataclasses.replace(content.model, id="evil\x1b]0;owned\x07"))
    write_atlas(content, tmp_path / "a.h5")
    assert main(["info", str(tmp_path / "a.h5")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_and_says_how_to_continue(tiny_checkpoint, tmp_path, number):
    command = [
        sys.executable,
        "-m",
        "chanfmt",
        "build",
        str(tiny_checkpoint("llama")),
        "-o",
        str(tmp_path / "a.h5"),
        "--calib",
        "pydoc",
        "--sequences",
        "1200",
        "--seq-len",
        "64",
        "--batch-size",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert "FFNs" in process.stderr.readline()
            time.sleep(0.5)  # well inside the pass, which takes many times longer
            process.send_signal(number)
            error = process.stderr.read()
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert "interrupted; " in error
    assert "--resume" in error
    assert "Traceback" not in error
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5.partial"]
    with chanfmt.open(tmp_path / "a.h5.partial", verify=True) as atlas:
        assert atlas.status == "partial"
        assert 0 < atlas.calibration.sequences < 1200


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["--version"], ["info"], ["show", "--layer", "1"]])
def test_quick_commands_do_not_import_torch(tmp_path, arguments):
    path = random_atlas(tmp_path / "a.h5")
    if arguments[0] in ("info", "show"):
        arguments = [arguments[0], str(path), *arguments[1:]]
    assert not heavy_imports("chanfmt.cli.main", arguments)


def test_usage_errors_exit_2():
    assert run("--quiet").returncode == 2
    assert run("frobnicate").returncode == 2
    assert run("build").returncode == 2


def test_a_closed_pipe_is_no_error(tmp_path):
    path = random_atlas(tmp_path / "a.h5", channels=4000)
    command = f"{sys.executable} -m chanfmt show {path} --layer 0 --top 0 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_an_encoder_has_no_next_token_loss(tmp_path, capsys):
    save_tiny(tmp_path / "m", "bert", is_decoder=False)
    capsys.readouterr()
    code, error = refusal(capsys, "build", tmp_path / "m", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "is an encoder as configured" in error


def test_layers_beyond_the_config_are_not_ignored(tmp_path, capsys):
    edit_config(save_tiny(tmp_path / "m", "llama"), num_hidden_layers=2)
    capsys.readouterr()
    code, error = refusal(capsys, "build", tmp_path / "m", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "model.layers.2." in error


@pytest.mark.parametrize(
    "content",
    [
        "3",
        "[]",
        '{"model_type": "llama", "hidden_size": "abc"}',
        '{"model_type": "nope"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        "{",
        "",
    ],
)
def test_bad_configs_are_one_line(tiny_checkpoint, tmp_path, capsys, content):
    import shutil

    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(content)
    code, error = refusal(capsys, "build", tmp_path / "m", "-o", tmp_path / "a.h5", *SMALL)
    assert code == 2
    assert "config" in error or "load" in error


def test_output_names_that_cannot_be(tiny_checkpoint, tmp_path, capsys):
    code, _ = refusal(capsys, "build", tiny_checkpoint("llama"), "-o", tmp_path / ("x" * 300), *SMALL)
    assert code == 2
    (tmp_path / "d").mkdir()
    code, error = refusal(capsys, "build", tiny_checkpoint("llama"), "-o", tmp_path / "d", *SMALL, "--overwrite")
    assert code == 2
    assert "is not a file" in error


def test_half_a_surrogate_pair_is_no_obstacle(tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "' + "abc \\ud800 def " * 60 + '"}')
    assert (
        main(["build", str(tiny_checkpoint("llama")), "-o", str(tmp_path / "a.h5"), "--calib", str(path), "--seq-len", "32"]) == 0
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_standard_output_is_a_failure(tmp_path):
    path = random_atlas(tmp_path / "a.h5")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "chanfmt", "info", str(path)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_json_holds_no_control_characters(tmp_path, capsys):
    import dataclasses

    from chanfmt.format.writer import write_atlas
    from tests.support.factory import random_content

    content = random_content()
    content = dataclasses.replace(content, model=dataclasses.replace(content.model, id="evil\x9b2J"))
    write_atlas(content, tmp_path / "a.h5")
    assert main(["info", str(tmp_path / "a.h5"), "--json"]) == 0
    text = capsys.readouterr().out
    assert "\x9b" not in text
    assert json.loads(text)["model"]["id"] == "evil\x9b2J"
