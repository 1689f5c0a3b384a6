"""``surgery eval`` on tiny models, against plain transformers and the numbers that follow from its losses."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from chanfmt.data.text import read_text
from surgery.cli.main import main as surgery
from surgery.evaluation.perplexity import BlockLosses, paired_bootstrap
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def models(tiny_checkpoint, tmp_path_factory):
    """Two llamas of one tokenizer, and one that begins every text with BOS."""
    from tokenizers.processors import TemplateProcessing

    other = save_tiny(tmp_path_factory.mktemp("other") / "other", "llama", seed=1, intermediate_size=55)
    begins = save_tiny(tmp_path_factory.mktemp("begins") / "begins", "llama", seed=2)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(begins)
    return tiny_checkpoint("llama"), other, begins


@pytest.fixture
def run(capsys):
    """Function from arguments of ``surgery eval`` to exit code, stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        code = surgery(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def losses_of(directory, ids, seq_len, *, whole: bool):
    """NLL sums and counts of every block by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    sums, counts = [], []
    for block in ids.split(seq_len):
        if len(block) > 1 and (len(block) == seq_len or not whole):
            with torch.no_grad():
                sums.append(float(model(block[None], labels=block[None]).loss) * (len(block) - 1))
            counts.append(len(block) - 1)
    return np.array(sums), np.array(counts)


@pytest.mark.parametrize("protocol", ["paper", "common"])
def test_json_holds_what_transformers_computes(models, run, protocol):
    first, second, _ = models
    code, out, err = run(
        first,
        second,
        "--data",
        "pydoc",
        "--seq-len",
        "96",
        "--max-tokens",
        "1000",
        "--protocol",
        protocol,
        "--json",
        "--seed",
        "3",
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["protocol"]["name"] == protocol
    assert ("last partial one included" in result["protocol"]["statement"]) == (protocol == "paper")
    assert (result["seq_len"], result["max_tokens"]) == (96, 1000)

    read = read_text("pydoc", "evaluate", empty_rows=protocol == "common").text
    tokens = transformers.AutoTokenizer.from_pretrained(first)(read)["input_ids"]
    ids = torch.tensor(tokens[:1000])
    expected = [losses_of(directory, ids, 96, whole=protocol == "common") for directory in (first, second)]
    # One token per character: bytes are those of the predicted characters.
    used = 1000 if protocol == "paper" else 960
    size = sum(len(read[start + 1 : min(start + 96, used)].encode()) for start in range(0, used, 96))
    for model, directory, (sums, counts) in zip(result["models"], (first, second), expected, strict=True):
        mean = sums.sum() / counts.sum()
        assert model["model"] == str(directory)
        assert (model["text_tokens"], model["tokens"]) == (len(tokens), used)
        assert (model["blocks"], model["predicted"]) == (len(counts), counts.sum())
        assert model["nll"] == pytest.approx(mean, rel=1e-6)
        assert model["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert model["predicted_bytes"] == size
        assert model["bits_per_byte"] == pytest.approx(sums.sum() / math.log(2) / size, rel=1e-6)
        error = math.sqrt(len(sums) / (len(sums) - 1) * sum((sums - mean * counts) ** 2)) / counts.sum()
        assert model["nll_standard_error"] == pytest.approx(error, rel=1e-3)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
        assert model["parameters"] == loaded.num_parameters()
        assert 0 < (used - 96) / model["tokens_per_second"] <= model["seconds"]
    assert result["models"][0]["against_first"] is None
    against = result["models"][1]["against_first"]
    compared = paired_bootstrap(*(BlockLosses(*each) for each in expected), seed=3)
    assert against["nll_difference"] == pytest.approx(compared.difference, abs=2e-6)
    assert against["nll_difference_interval"] == pytest.approx([compared.low, compared.high], abs=2e-6)
    assert against["perplexity_ratio"] == pytest.approx(compared.ratio[0], rel=1e-5)
    assert against["perplexity_ratio_interval"] == pytest.approx(compared.ratio[1:], rel=1e-5)
    assert (against["blocks"], against["resamples"], against["seed"]) == (len(expected[0][0]), 10_000, 3)


def test_tables_say_what_json_says_in_100_columns(models, run):
    first, second, _ = models
    arguments = [first, second, "--data", "pydoc", "--seq-len", "96", "--max-tokens", "1000"]
    data = json.loads(run(*arguments, "--json")[1])
    code, out, _ = run(*arguments)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    counted = data["models"][0]
    assert lines[0] == (
        f"pydoc, protocol paper: 1,000 of {counted['text_tokens']:,} tokens in 11 blocks of 96, 989 predicted "
        f"({counted['predicted_bytes']:,} bytes)"
    )
    for model, line in zip(data["models"], lines[3:5], strict=True):
        cells = line.split()
        assert cells[:2] == [model["model"].rsplit("/", 1)[1], f"{model['parameters']:,}"]
        assert cells[2:6] == [
            f"{model['perplexity']:.2f}",
            f"{model['nll']:.4f}",
            f"{model['nll_standard_error']:.4f}",
            f"{model['bits_per_byte']:.4f}",
        ]
    against = data["models"][1]["against_first"]
    low, high = against["nll_difference_interval"]
    assert lines[6].startswith("against llama")
    cells = lines[7].split()
    assert cells[0] == "other"
    assert cells[1:5] == [f"{against['nll_difference']:+.4f}", f"{low:+.4f}", "to", f"{high:+.4f}"]
    assert cells[5] == f"x{against['perplexity_ratio']:.3f}"


def test_other_tokens_are_not_compared(models, run):
    first, _, begins = models
    arguments = [first, begins, "--data", "pydoc", "--seq-len", "96", "--json", "--max-tokens"]
    code, out, err = run(*arguments, "300")
    assert code == 0
    one, two = json.loads(out)["models"]
    assert one["tokens_sha256"] != two["tokens_sha256"]
    assert two["against_first"] is None
    assert "tokenizers differ, so their losses per token do not compare" in err
    assert "bits per byte" not in err
    # Without special tokens they are the same.
    one, two = json.loads(run(*arguments, "300", "--protocol", "common")[1])["models"]
    assert one["tokens_sha256"] == two["tokens_sha256"]
    assert two["against_first"]["blocks"] == 3


def test_bits_per_byte_compare_over_a_whole_text(models, run, tmp_path):
    first, _, begins = models
    (tmp_path / "a.txt").write_text("a short text, read to its end\n" * 8)
    code, out, err = run(first, begins, "--data", tmp_path / "a.txt", "--seq-len", "128")
    assert code == 0
    assert "do not compare; bits per byte do" in err
    lines = out.splitlines()
    assert [re.search(r"[\d,]+ of [\d,]+ tokens", line)[0] for line in lines[:2]] == ["240 of 240 tokens", "241 of 241 tokens"]
    assert "against" not in out


def test_a_cut_model_alone_says_what_was_cut(tiny_atlas, tiny_checkpoint, tmp_path, run):
    out = tmp_path / "cut"
    assert (
        surgery(
            [
                "prune",
                str(tiny_atlas("llama")),
                "--model",
                str(tiny_checkpoint("llama")),
                "--sparsity",
                "0.5",
                "--method",
                "magnitude",
                "--protect",
                "halo",
                "-o",
                str(out),
                "--quiet",
            ]
        )
        == 0
    )
    cut = json.loads(run(out, "--data", "pydoc", "--seq-len", "96", "--max-tokens", "200", "--json")[1])["models"][0]["cut"]
    table = run(out, "--data", "pydoc", "--seq-len", "96", "--max-tokens", "200")[1]
    share = cut["supernodes_removed"] / cut["supernodes"]
    assert table.splitlines()[-1].split() == [
        "cut",
        "magnitude",
        "halo",
        str(cut["supernodes_removed"]),
        "of",
        str(cut["supernodes"]),
        f"({share:.1%})",
    ]


def test_models_of_one_name_are_told_apart(models, run, tmp_path):
    from shutil import copytree

    first = models[0]
    copytree(first, tmp_path / first.name)
    lines = run(first, tmp_path / first.name, "--data", "pydoc", "--seq-len", "96", "--max-tokens", "200")[1].splitlines()
    assert lines[3].startswith(str(first))
    assert lines[4].startswith(str(tmp_path / first.name))


def test_an_overflow_is_called_one(tmp_path, run):
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    code, out, err = run(tmp_path / "m", "--data", "pydoc", "--seq-len", "64", "--max-tokens", "200")
    assert code == 2
    assert "the logits of LlamaForCausalLM are NaN: an activation overflowed" in err
    assert out == ""


def test_what_is_wrong_with_the_last_model_shows_before_the_first_runs(models, run, tmp_path):
    short = save_tiny(tmp_path / "short", "llama", max_position_embeddings=64)
    code, out, err = run(models[0], short, "--data", "pydoc", "--seq-len", "96", "--max-tokens", "300")
    assert code == 2
    assert f"--seq-len 96 is longer than the context of {short}, 64" in err
    assert out == ""


def test_a_device_map_needs_no_gpu(models, run):
    pytest.importorskip("accelerate")
    common = (
        models[0],
        "--data",
        "pydoc",
        "--seq-len",
        "96",
        "--max-tokens",
        "200",
        "--prompt",
        "The",
        "--answer-tokens",
        "3",
        "--json",
    )
    (_, out, _), (code, mapped, err) = run(*common), run(*common, "--device-map", "auto")
    assert code == 0, err
    one, two = (json.loads(text)["models"][0] for text in (out, mapped))
    assert (one["perplexity"], one["answers"]) == (two["perplexity"], two["answers"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--device-map", "auto", "--device", "cpu"], "--device-map chooses the devices itself"),
        (["--device-map", "all"], "unknown value of --device-map 'all'"),
        (["--protocol", "common", "--seq-len", "96", "--max-tokens", "90"], "--max-tokens 90 is fewer than one block of 96"),
        (["--protocol", "other"], "unknown value of --protocol 'other'"),
        (["--max-tokens", "-1"], "--max-tokens must be 0 or more"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--task-limit", "5"], "have no effect without --tasks"),
        (["--tasks", "a", "--tasks-from", "nowhere"], "--tasks-from nowhere is not a directory"),
    ],
)
def test_evaluation_refuses(models, run, extra, message):
    code, out, err = run(models[0], "--data", "pydoc", *extra)
    assert code == 2
    assert message in err
    assert out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a peak that begins anew is Linux's")
def test_peak_memory_begins_anew():
    script = (
        "import numpy, torch\n"
        "from surgery.evaluation.memory import PeakMemory\n"
        "model = torch.nn.Linear(1, 1)\n"
        "before = PeakMemory(model).bytes()\n"
        "memory = PeakMemory(model)\n"
        "numpy.ones(50_000_000)\n"
        "large = memory.bytes()\n"
        "memory = PeakMemory(model)\n"
        "numpy.ones(1_250_000)\n"
        "print(before, large, memory.bytes(), memory.kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, large, small, kind = done.stdout.split()
    assert kind == "rss"
    assert 380e6 < int(large) - int(before) < 480e6
    assert int(small) - int(before) < 60e6


def test_peak_memory_is_of_each_model(tmp_path, run):
    large = save_tiny(tmp_path / "large", "llama", intermediate_size=400_000)
    small = save_tiny(tmp_path / "small", "llama")
    arguments = [large, small, "--data", "pydoc", "--seq-len", "96", "--max-tokens", "200", "--json"]
    one, two = json.loads(run(*arguments)[1])["models"]
    assert {one["memory"], two["memory"]} == {"rss"}
    assert one["host_peak_memory_bytes"] == one["peak_memory_bytes"]
    # 3 layers of 3 x 36 x 400,000 float32.
    assert one["peak_memory_bytes"] - two["peak_memory_bytes"] > 400e6


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_tasks_without_lm_eval_name_the_extra(models, run):
    code, out, err = run(models[0], "--data", "pydoc", "--tasks", "arc_easy")
    assert code == 1
    assert "--tasks needs the package 'lm-eval', which is not installed" in err
    assert "pip install lm-eval (it is in chanfmt's extra [eval])" in err
    assert out == ""


@pytest.fixture
def sums(tmp_path):
    """A directory with the task ``tiny_sums``: questions with three answers, the first of which is right."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (12, 3, 4))
    rows = [
        {"question": f"what is {i} plus one?", "choices": ["".join(each) for each in letters[i]], "answer": 0} for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny_sums.yaml").write_text(f"""
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 2.5}}
""")
    return tmp_path, rows


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed: pip install 'chanfmt[eval]'")
def test_a_task_of_lm_eval_is_what_the_model_answers(models, run, sums, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory, rows = sums
    arguments = [
        *models[:2],
        "--data",
        "pydoc",
        "--seq-len",
        "96",
        "--max-tokens",
        "200",
        "--tasks",
        "tiny_*",
        "--tasks-from",
        directory,
        "--task-limit",
        "7",
    ]
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    rows = rows[:7]
    shares = []
    for path, model in zip(models, json.loads(out)["models"], strict=False):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        right = 0
        for row in rows:
            scores = []
            for choice in row["choices"]:
                context = len(tokenizer(row["question"])["input_ids"])
                ids = torch.tensor(tokenizer(f"{row['question']} {choice}")["input_ids"])
                with torch.no_grad():
                    logits = loaded(ids[None]).logits[0].log_softmax(-1)
                scores.append(float(logits[range(context - 1, len(ids) - 1), ids[context:]].sum()))
            right += int(np.argmax(scores) == row["answer"])
        shares.append(right / len(rows))
        (task,) = model["tasks"]
        error = task.pop("standard_error")
        assert task == {
            "task": "tiny_sums",
            "metric": "acc",
            "filter": "none",
            "value": right / len(rows),
            "shots": 0,
            "items": len(rows),
            "higher_is_better": True,
            "version": "2.5",
        }
        assert error == pytest.approx(math.sqrt(shares[-1] * (1 - shares[-1]) / (len(rows) - 1)))
    assert any(0 < share < 1 for share in shares)
    lines = run(*arguments)[1].splitlines()
    assert lines[-3].split() == ["task", "metric", "model", "value", "std", "err", "items", "shots"]
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["tiny_sums", "acc", path.name, f"{share:.4f}"] for path, share in zip(models, shares, strict=False)
    ]


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed: pip install 'chanfmt[eval]'")
def test_an_unknown_task_is_named_before_any_model_is_loaded(run, tmp_path):
    code, _, err = run(tmp_path / "no model", "--data", "pydoc", "--tasks", "no_such_task")
    assert code == 2
    assert "lm-eval has no task called 'no_such_task'" in err


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed: pip install 'chanfmt[eval]'")
def test_a_task_without_its_data_is_refused(models, run, sums):
    (sums[0] / "rows.jsonl").unlink()
    code, _, err = run(models[0], "--data", "pydoc", "--tasks", "tiny_sums", "--tasks-from", sums[0])
    assert code == 2
    assert "the tasks tiny_sums cannot be loaded" in err


def test_the_perplexity_with_bos_stands_beside_the_protocol(models, run):
    first, _, begins = models
    arguments = (begins, first, "--data", "pydoc", "--seq-len", "32", "--max-tokens", "320")
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    own, without = json.loads(out)["models"]
    assert (without["bos_tokens"], without["perplexity_with_bos"], without["nll_with_bos"]) == ([], None, None)
    assert own["bos_tokens"] == [1]
    ids = transformers.AutoTokenizer.from_pretrained(begins)(read_text("pydoc", "evaluate").text)["input_ids"][:320]
    assert ids[0] == 1
    blocks = torch.tensor(ids).clone()
    blocks[::32] = 1
    sums, counts = losses_of(begins, blocks, 32, whole=False)
    assert own["nll_with_bos"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    assert own["perplexity_with_bos"] == pytest.approx(math.exp(own["nll_with_bos"]))
    # Random weights: what one token of the context changes is below or above 2%, and the warning follows.
    differs = abs(own["perplexity_with_bos"] / own["perplexity"] - 1) > 0.02
    assert ("if every block begins with BOS" in err) == differs
    code, out, err = run(*arguments)
    heading, row, other = out.split("\n\n")[1].splitlines()[:3]
    assert "with BOS" in heading
    assert f"{own['perplexity_with_bos']:,.2f}" in row
    assert "-" in other.split()


def test_a_perplexity_that_depends_on_bos_is_pointed_out(monkeypatch, models, run):
    monkeypatch.setattr("surgery.evaluation.evaluate.BOS_DIFFERENCE", 0.0)
    code, _, err = run(models[2], "--data", "pydoc", "--seq-len", "32", "--max-tokens", "64")
    assert code == 0
    assert re.search(r"the perplexity is [\d.,]+ if every block begins with BOS, .*, and [\d.,]+ by the protocol", err)
    code, _, err = run(models[0], "--data", "pydoc", "--seq-len", "32", "--max-tokens", "64")
    assert "BOS" not in err


@pytest.mark.parametrize(("tokens", "narrow"), [(20 * 32, False), (19 * 32, True)])
def test_an_interval_over_few_blocks_is_called_too_narrow(models, run, tokens, narrow):
    arguments = ("--data", "pydoc", "--seq-len", "32", "--max-tokens", str(tokens))
    code, _, err = run(*models[:2], *arguments)
    assert code == 0
    said = f"they resample {tokens // 32} blocks, and need 20; use more text, or a shorter --seq-len than 32"
    assert (said in err) == narrow
    # One model has no interval.
    assert "too narrow" not in run(models[0], *arguments)[2]
