"""A model's files are read once in a build, however many steps need them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import transformers

from chanfmt.models.source import ModelSource
from tests.support.tiny import CONFIGS, save_tiny, tiny_model, tiny_tokenizer

COUNTED = """
import json, sys
from collections import Counter
from pathlib import Path

import safetensors

directory, output, stream = sys.argv[1:]
read = Counter()


def inside(*functions):
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in functions:
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


def look(event, arguments):
    if event != "open" or not str(arguments[0]).startswith(directory):
        return
    name = Path(str(arguments[0])).name
    # transformers reads what it needs for a tokenizer itself.
    if name == "config.json" and inside("tokenizer"):
        return
    if name.endswith(".json"):
        read[name] += 1
    elif name.endswith(".safetensors"):
        read[f"{inside('read_header', 'fingerprint') or 'weights'} of {name}"] += 1


original = safetensors.safe_open


def counted(file, *arguments, **options):
    read[f"safe_open of {Path(file).name}"] += 1
    return original(file, *arguments, **options)


safetensors.safe_open = counted
sys.addaudithook(look)

from chanfmt.building.options import BuildOptions
from chanfmt.format.records import LabelSettings
from tests.support.builds import build

options = BuildOptions(
    directory, output, calib="pydoc", sequences=8, seq_len=16, batch_size="4", stream=stream == "stream", checkpoint_every=0
)
build(options, LabelSettings(rho=0.03, support_size=8))
print(json.dumps(read))
"""


@pytest.mark.parametrize("way", ["memory", "stream"])
def test_each_file_is_read_once(tmp_path, way):
    directory = tmp_path / "model"
    tiny_model("llama").save_pretrained(directory, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(directory)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) > 2
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(directory), str(tmp_path / "a.h5"), way],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["config.json"] == 1
    for shard in shards:
        assert read[f"read_header of {shard}"] == 1
        assert read[f"fingerprint of {shard}"] == 1
        # transformers opens a shard once to load its weights; a streamed build reads them by the index.
        assert read.get(f"safe_open of {shard}", 0) <= (way == "memory")
    # Ours is one; transformers reads the index too when it loads the weights.
    assert read["model.safetensors.index.json"] <= (2 if way == "memory" else 1)


@pytest.mark.parametrize("model_type", [*CONFIGS, "mistral", "gemma3"])
def test_the_config_is_that_of_transformers(tmp_path, model_type):
    save_tiny(tmp_path / "model", model_type) if model_type in CONFIGS else transformers.AutoConfig.for_model(
        model_type
    ).save_pretrained(tmp_path / "model")
    expected = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    found = ModelSource(tmp_path / "model").config
    assert type(found) is type(expected)
    assert found.to_dict() == expected.to_dict()
    assert found.name_or_path == str(expected.name_or_path)


def test_an_infinite_number_in_a_config_is_read(tmp_path):
    config = transformers.MambaConfig(num_hidden_layers=1, hidden_size=32, time_step_limit=(0.0, float("inf")))
    config.save_pretrained(tmp_path / "model")
    assert "__float__" in (tmp_path / "model" / "config.json").read_text()
    assert ModelSource(tmp_path / "model").config.time_step_limit[1] == float("inf")
