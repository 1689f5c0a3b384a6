"""The main commands on a device that is not the CPU: nothing mixes devices, and the numbers are those of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import chanfmt
from tests.support.builds import SETTINGS, request, stop_after
from tests.support.measured import make_tiny
from tests.support.pretend_device import NAME, pretending
from tests.support.repeated import repeated
from tests.support.tiny import random_tokens, tiny_model, tiny_tokenizer
from tests.support.zoo import tiny

MIXES = """
import torch
from tests.support import pretend_device
kept = pretend_device.register()
here, there = torch.ones(3), torch.ones(3, device="pretend")
assert (there + there).tolist() == [2, 2, 2] and there[torch.tensor([0])].cpu().tolist() == [1]
for wrong in (
    lambda: here + there,
    lambda: there + torch.ones(3, device="pretend:1"),
    lambda: there.copy_(here).numpy(),
    lambda: torch.cat([here, there]),
    lambda: here.index_add_(0, torch.zeros(3, dtype=torch.int64), there),
):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("two devices were mixed")
"""
LOADS = """
import gc, sys, torch
from tests.support import pretend_device
kept = pretend_device.register()
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
made, largest = pretend_device.PretendTensor.__new__, 0

def arrived(cls, held, device):
    global largest
    if not largest and held.ndim > 1:
        beside = {item.untyped_storage().data_ptr(): item.nbytes for item in gc.get_objects() if type(item) is torch.nn.Parameter
                  and item.device.type == "cpu"}
        largest = sum(beside.values()) + 1
    return made(cls, held, device)

source = ModelSource(sys.argv[1])
pretend_device.PretendTensor.__new__ = staticmethod(arrived)
model = load_model(source, device="pretend")
assert {item.device.type for item in (*model.parameters(), *model.buffers())} == {"pretend"}
assert 0 < largest < source.index.nbytes / 4, (largest, source.index.nbytes)
"""
BUILD = ("--sequences", 16, "--seq-len", 32, "--rho", 0.1, "--support", 8, "--quiet")


@pytest.fixture(scope="module")
def device():
    with pretending() as process:
        yield process


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts")
    tiny("mixtral").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def succeed(done):
    assert done.code == 0, done.errors
    assert done.operations > 100, "the command did not run on the device"
    return done


def assert_close(path, expected):
    """Two atlases of the same text agree up to rounding."""
    with chanfmt.open(path) as found, chanfmt.open(expected) as other:
        assert found.calibration.mean_loss == pytest.approx(other.calibration.mean_loss, rel=1e-5)
        for name, stack in found.stacks.items():
            for metric in ("lp", "taylor", "activation_power", "write_norm", "redundancy", "connectivity", "wanda_group"):
                theirs = other.stacks[name][metric]
                np.testing.assert_allclose(stack[metric], theirs, rtol=1e-3, atol=1e-4 * float(np.nanmax(np.abs(theirs))))


def test_devices_do_not_mix():
    done = subprocess.run([sys.executable, "-c", MIXES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_go_straight_to_their_device(tiny_checkpoint):
    """When the first weight arrives, the memory of the CPU does not hold the others."""
    done = subprocess.run([sys.executable, "-c", LOADS, tiny_checkpoint("llama")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", ["llama", "experts", *repeated("gpt2")])
@pytest.mark.parametrize("how", ["whole", "recompute", "stream"])
def test_builds(model_type, how, device, experts, tiny_checkpoint, tmp_path):
    model = experts if model_type == "experts" else tiny_checkpoint(model_type)
    for place in (NAME, "cpu"):
        output = tmp_path / f"{place}.h5"
        done = device.run(
            "atlas",
            "build",
            model,
            "-o",
            output,
            "--calib",
            "pydoc",
            *BUILD,
            "--device",
            place,
            "--dtype",
            "float32",
            "--memory",
            how,
        )
        if place == NAME:
            succeed(done)
    assert_close(tmp_path / f"{NAME}.h5", tmp_path / "cpu.h5")
    with chanfmt.open(tmp_path / f"{NAME}.h5") as found, chanfmt.open(tmp_path / "cpu.h5") as other:
        assert found.producer.device_peak_memory_bytes > 0
        assert other.producer.device_peak_memory_bytes is None
        assert [set(line) for line in other.producer.history] == [{"memory_prediction"}]
        (prediction, _) = found.producer.history
        assert prediction["memory_prediction"]["device"].startswith(NAME)
        assert prediction["memory_prediction"]["activations"] > 0


def test_a_build_continues(device, tiny_checkpoint, tmp_path, monkeypatch):
    """The state of a pass goes from the file to the device."""
    output = tmp_path / "atlas.h5"
    stop_after(request(tiny_checkpoint("llama"), output, sequences=16, checkpoint_every=0), 5, monkeypatch)
    found = succeed(device.run("atlas", "build", tiny_checkpoint("llama"), "-o", output, "--calib", "pydoc", "--sequences", 16, "--seq-len", 32,
                               "--batch-size", 2, "--rho", SETTINGS.rho, "--support", SETTINGS.support_size, "--device", NAME, "--dtype",
                               "float32", "--columns", "all", "--resume"))  # fmt: skip
    assert "continuing" in found.errors
    with chanfmt.open(output) as atlas:
        (prediction, continued, peak), producer = atlas.producer.history, atlas.producer
        assert set(prediction) == {"memory_prediction"}
        assert "resumed_at_sequence" in continued
        assert set(peak) == {"device_peak_memory_bytes"}
        assert 0 < producer.device_peak_memory_bytes < producer.peak_memory_bytes


def test_a_build_on_arrays(device, tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=36,
        intermediate_size=87,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=16,
        patch_size=4,
        num_labels=7,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        pixel_values=random.standard_normal((16, 3, 16, 16)).astype(np.float32),
        labels=random.integers(0, 7, 16),
    )
    for place in (NAME, "cpu"):
        done = device.run(
            "atlas", "build", tmp_path / "vit", "-o", tmp_path / f"{place}.h5", "--calib", tmp_path / "images.npz",
            "--sequences", 16, "--quiet", "--device", place,
        )  # fmt: skip
        assert done.code == 0, done.errors
    assert_close(tmp_path / f"{NAME}.h5", tmp_path / "cpu.h5")


def test_a_build_on_tokens(device, tiny_checkpoint, tmp_path):
    np.savez(tmp_path / "tokens.npz", input_ids=random_tokens(16, 32).numpy())
    succeed(device.run("atlas", "build", tiny_checkpoint("llama"), "-o", tmp_path / "atlas.h5", "--calib", tmp_path / "tokens.npz",
                       *BUILD, "--device", NAME))  # fmt: skip


def test_a_build_on_text_of_the_model(device, tiny_checkpoint, tmp_path):
    succeed(
        device.run(
            "atlas", "build", tiny_checkpoint("llama"), "-o", tmp_path / "atlas.h5", "--calib", "self", *BUILD, "--device", NAME
        )
    )


@pytest.mark.parametrize("method", ["none", "bias"])
def test_prunes(method, device, llama, tmp_path):
    done = device.run(
        "surgery", "prune", llama.atlas, "--model", llama.model, "--sparsity", 0.5, "--recover", method, "-o", tmp_path / "cut",
        "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.errors


@pytest.mark.parametrize("method", ["lstsq", "block", "distill"])
def test_prunes_and_refits(method, device, llama, tmp_path):
    succeed(
        device.run(
            "surgery", "prune", llama.atlas, "--model", llama.model, "--sparsity", 0.5, "--recover", method, "--recover-device",
            NAME, *(("--recover-steps", 3) if method == "distill" else ()), "-o", tmp_path / "cut", "--quiet",
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "method"),
    [("llama", "bias"), ("llama", "lstsq"), ("llama", "block"), ("llama", "distill"), ("gpt2", "lstsq"), ("olmo2", "distill")],
)
def test_recovers_a_bfloat16_checkpoint(model_type, method, device, tmp_path):
    """On a device, a checkpoint in 16 bits is loaded in 16 bits. The refit ends with what the file computes in float32."""
    (tiny_model("llama") if model_type == "llama" else tiny(model_type)).bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    atlas, output = tmp_path / "atlas.h5", tmp_path / "cut"
    assert device.run("atlas", "build", tmp_path / "model", "-o", atlas, "--calib", "pydoc", *BUILD, "--device", "cpu").code == 0
    done = device.run(
        "surgery", "prune", atlas, "--model", tmp_path / "model", "--sparsity", 0.5, "--recover", method, "--recover-device", NAME,
        *(("--recover-steps", 3) if method == "distill" else ()), "-o", output, "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.errors
    assert json.loads((output / "surgery.json").read_text())["recovery"]["logit_error"] < 1e-4


def test_refits_experts(device, experts, tmp_path):
    succeed(device.run("atlas", "build", experts, "-o", tmp_path / "atlas.h5", "--calib", "pydoc", *BUILD, "--device", NAME))
    for method in ("lstsq", "block"):
        succeed(device.run("surgery", "prune", tmp_path / "atlas.h5", "--model", experts, "--sparsity", 0.5, "--recover", method,
                           "--recover-device", NAME, "-o", tmp_path / method, "--quiet"))  # fmt: skip


def test_evaluates(device, llama):
    common = (
        llama.model,
        llama.model,
        "--data",
        llama.text,
        "--seq-len",
        48,
        "--max-tokens",
        200,
        "--prompt",
        "The quick",
        "--answer-tokens",
        4,
        "--json",
        "--quiet",
    )
    found = succeed(device.run("surgery", "eval", *common, "--device", NAME, "--dtype", "float32"))
    expected = device.run("surgery", "eval", *common, "--device", "cpu")
    ours, theirs = (json.loads(done.output)["models"][0] for done in (found, expected))
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-4)
    # Both memories are recorded: that of the device, and that of the process.
    assert (ours["memory"], theirs["memory"]) == (NAME, "rss")
    assert 0 < ours["peak_memory_bytes"] < ours["host_peak_memory_bytes"]
    assert theirs["peak_memory_bytes"] == theirs["host_peak_memory_bytes"]


def test_sweeps(device, llama, tmp_path):
    succeed(device.run("surgery", "sweep", *llama.arguments(tmp_path / "sweep", "--methods", "scar-lp,wanda", "--sparsity", "0.5",
                                                            "--recover", "none,bias,lstsq", "--device", NAME)))  # fmt: skip


@pytest.mark.parametrize("experiment", ["mean-replace", "halo", "channels", *repeated("remove", "dose")])
def test_ablates(experiment, device, llama, tmp_path):
    more = ("--channels", 4) if experiment == "channels" else ()
    succeed(device.run("surgery", "ablate", experiment, *llama.arguments(tmp_path / experiment, "--device", NAME), *more))
