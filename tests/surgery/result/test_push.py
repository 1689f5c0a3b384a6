"""``surgery push`` and ``prune --push``: the content of the Hub afterwards, the files that stay here, and the messages."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard

from chanfmt.format.reader import Atlas
from chanfmt.hub.names import check_repo
from chanfmt.models.safetensors import CheckpointIndex, fingerprint
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.result.names import default_repository
from surgery.result.push import PushOptions, push_command
from tests.support.cut_models import save_atlas, save_model
from tests.support.factory import random_atlas
from tests.support.hub.client import PUBLISH, environment, run, script, start
from tests.support.hub.faults import Fault

if TYPE_CHECKING:
    import subprocess

    from tests.support.hub.server import Hub

TOKEN = "hf_SecretTokenOfAnn123"
NAME = "ann/llama-scar-prot-50"
Environment = dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the Hub in several shards, its atlas, and results that were verified and that were not."""
    home = tmp_path_factory.mktemp("made")
    model = save_model("llama", home / "model", max_shard_size="20KB")
    (model / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    atlas = save_atlas("llama", model, home / "atlas.h5", source="hub", revision="c0ffee")
    with Atlas.open(atlas) as opened:
        plan = make_plan(opened, PlanOptions(0.5))
        for name, verify in (("out", True), ("unverified", False)):
            apply_plan(plan, ModelSource(model), home / name, CutOptions(verify=verify), atlas=opened)
    return home


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def ann(hub: Hub, tmp_path: Path) -> Environment:
    hub.add_user(TOKEN, "ann", orgs={"lab": "read"})
    return environment(hub, tmp_path / "home", TOKEN)


def content(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def push(*arguments: object, env: Environment) -> subprocess.CompletedProcess[str]:
    done = run("surgery", "push", *arguments, env=env)
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def check_untold(hub: Hub, *places: Path) -> None:
    """The token is in no file below ``places`` and in nothing that the Hub was given."""
    secret = TOKEN.encode()
    for place in places:
        assert not [name for name, data in content(place).items() if secret in data]
    for repo in hub.store.repos.values():
        for commit in repo.commits.values():
            assert TOKEN not in commit.title
            assert not [path for path, file in commit.files.items() if secret in file.content]


@pytest.mark.parametrize("disable_xet", ["1", "0"])
def test_a_result_on_the_hub(hub: Hub, ann: Environment, out: Path, tmp_path: Path, disable_xet: str) -> None:
    ann["HF_HUB_DISABLE_XET"] = disable_xet
    (out / "secrets.txt").write_text("mine")
    weights = (out / "model-00001-of-00004.safetensors").read_bytes()
    done = push(out, env=ann)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/{NAME}\n"
    assert "secrets.txt is not part of the result, and is not pushed" in done.stderr
    assert "asks for names that begin with 'Llama'" not in done.stderr
    (out / "secrets.txt").unlink()
    repo = hub.repo(NAME)
    assert repo.private
    assert hub.files(NAME) == content(out)
    assert hub.files(NAME)["model-00001-of-00004.safetensors"] == weights
    assert {"atlas.h5", "kept_channels.safetensors", "layers.svg", "surgery.json", "NOTICE"} <= hub.files(NAME).keys()
    assert [commit.title for commit in repo.commits.values()] == [
        "initial commit",
        "12.3K to 8.7K parameters, -29.7%; 63.6 kB to 48.9 kB; intermediate_size 37 to 20; scar-prot: 45.9% of the FFN "
        "channels removed; 3 of 3 supernodes kept",
    ]
    assert f'from_pretrained("{NAME}")' in (out / "README.md").read_text()
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "base_model": "tiny/llama",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "llama3.1",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "structured-pruning", "ffn-pruning", "chanfmt"],
    }
    check_untold(hub, out, tmp_path / "home")
    place = script("import sys, huggingface_hub\nprint(huggingface_hub.snapshot_download(sys.argv[1]))", NAME, env=ann)
    assert content(Path(place.strip())) == content(out) | {".gitattributes": hub.repo(NAME).head.files[".gitattributes"].content}


def test_a_cut_that_is_pushed(hub: Hub, ann: Environment, made: Path, tmp_path: Path) -> None:
    fault = Fault("POST", "/commit/", status=403)
    hub.faults.append(fault)
    out = tmp_path / "cut"
    done = run(
        "surgery",
        "prune",
        made / "atlas.h5",
        "--model",
        made / "model",
        "--sparsity",
        "0.5",
        "--protect",
        "supernodes",
        "-o",
        out,
        "--no-verify",
        "--push",
        "--public",
        env=ann,
    )
    assert done.returncode == 1
    assert fault.met.is_set()
    assert "LP mass kept" in done.stdout
    assert done.stderr.splitlines()[-1] == f"  {out} is whole; continue with: surgery push {out} --public --no-verify"
    assert push(out, "--public", "--no-verify", env=ann).stdout == f"{hub.url}/{NAME}\n"
    assert not hub.repo(NAME).private
    assert hub.files(NAME) == content(out)
    command = "surgery prune atlas.h5 --model model --sparsity 0.5 --protect supernodes -o cut --no-verify --push --public"
    card = (out / "README.md").read_text()
    assert command in card
    assert "**Not verified:**" in card
    for name, data in hub.files(NAME).items():
        assert str(tmp_path).encode() not in data, name
        assert str(made).encode() not in data, name


def test_a_cut_that_cannot_be_pushed_is_not_begun(hub: Hub, ann: Environment, made: Path, tmp_path: Path) -> None:
    arguments = ["prune", made / "atlas.h5", "--model", made / "model", "--sparsity", "0.5", "-o", tmp_path / "cut"]
    for more, code, text in ((["--push", "a--b"], 2, "cannot be the name"), (["--public"], 2, "are for --push")):
        done = run("surgery", *arguments, *more, env=ann)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    done = run("surgery", *arguments, "--push", env=environment(hub, tmp_path / "nobody"))
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "cut").exists()


PASSING = {
    "uploads": [
        ("PUT", "/lfs/whole", {"status": 500}),
        ("PUT", "/lfs/whole", {"cut": 5000}),
        ("PUT", "/lfs/whole", {"pace": 0.02}),
        ("PUT", "/lfs/whole", {"status": 429, "headers": {"Retry-After": "1"}}),
    ],
    "questions": [
        ("POST", "/api/repos/create", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("POST", "/commit/main", {"status": 409}),
        ("POST", "/commit/main", {"cut": 10}),
    ],
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(hub: Hub, ann: Environment, out: Path, name: str) -> None:
    # If several faults are of one kind, each of them meets one request, in turn.
    faults = [Fault(method, path, **how) for method, path, how in PASSING[name]]
    hub.faults += faults
    done = push(out, env=ann)
    assert done.returncode == 0, done.stderr
    assert all(fault.met.is_set() for fault in faults)
    assert hub.files(NAME) == content(out)
    assert set(hub.store.uploaded.values()) == {1}


STAYING = {
    "401": ("GET", "/api/whoami", {"status": 401}, "hf auth login"),
    "403": ("POST", "/commit/", {"status": 403}, "token with write access"),
    "404": ("POST", "/preupload/", {"status": 404, "code": "RepoNotFound"}, "check the name"),
    "429 for long": ("GET", "/api/whoami", {"status": 429, "headers": {"Retry-After": "3000"}}, "in 3000 s"),
    "500": ("POST", "/commit/", {"status": 500}, "run the same command again"),
    "a hash that does not match": (
        "GET",
        "/tree/",
        {"alter": lambda body: body.replace(b'"lfs": {"oid": "', b'"lfs": {"oid": "0')},
        "again with --overwrite",
    ),
}


def test_what_stays_is_one_line_with_the_way_out(hub: Hub, ann: Environment, out: Path) -> None:
    before = {file: data for file, data in content(out).items() if file != "README.md"}
    for name, (method, path, how, way_out) in STAYING.items():
        fault = Fault(method, path, times=99, **how)
        hub.faults[:] = [fault]
        done = push(out, "--public", env=ann)
        assert fault.met.is_set(), name
        assert (done.returncode, done.stdout) == (1, ""), name
        error, hint, resume = done.stderr.splitlines()[-3:]
        assert error.startswith("surgery: error: "), name
        assert way_out in hint, name
        assert resume == f"  {out} is whole; continue with: surgery push {out} --public", name
        assert {file: data for file, data in content(out).items() if file != "README.md"} == before, name
    # Until the last push, no part of the model was visible, and other people saw nothing.
    repo = hub.repo(NAME)
    assert repo.private
    assert [set(commit.files) for commit in repo.commits.values()] == [{".gitattributes"}, {".gitattributes", *content(out)}]
    hub.faults.clear()
    assert push(out, "--public", env=ann).returncode == 0
    assert hub.files(NAME) == content(out)
    assert not repo.private
    assert set(hub.store.uploaded.values()) == {1}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(hub: Hub, ann: Environment, out: Path, tmp_path: Path, end: signal.Signals) -> None:
    # One file at a time, so that some have arrived and some have not.
    fault = Fault("PUT", "/lfs/whole", first=3, times=99, pace=0.5)
    hub.faults.append(fault)
    process = start("-m", "surgery", "push", out, env=ann)
    assert fault.met.wait(60)
    while sum(hub.store.uploaded.values()) < 2:
        assert process.poll() is None
    arrived = set(hub.store.uploaded)
    seen = b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "comm"))
    assert b"surgery" in seen
    assert TOKEN.encode() not in seen
    process.send_signal(end)
    _, err = process.communicate(timeout=60)
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert f"interrupted; {out} is whole; continue with: surgery push {out}" in err
    assert TOKEN not in err
    hub.faults.clear()
    assert not hub.files(NAME)
    done = push(out, env=ann)
    assert done.returncode == 0, done.stderr
    assert hub.files(NAME) == content(out)
    assert arrived < set(hub.store.uploaded)
    assert set(hub.store.uploaded.values()) == {1}
    check_untold(hub, out, tmp_path / "home")


def test_names_and_rights(hub: Hub, ann: Environment, out: Path) -> None:
    for name in ("ann/th ing", "../x"):
        done = push(out, name, env=ann)
        assert (done.returncode, "USER/NAME" in done.stderr) == (2, True)
    done = push(out, "lab/thing", env=ann)
    assert (done.returncode, "write access" in done.stderr) == (1, True)
    assert not hub.store.repos


def test_other_content_and_overwriting(hub: Hub, ann: Environment, out: Path) -> None:
    theirs = {"mine.txt": b"mine", "config.json": b"{1}", "model-00001-of-00004.safetensors": b"old"}
    hub.add_repo("ann/thing", theirs, private=True)
    done = push(out, "thing", env=ann)
    assert done.returncode == 2
    assert "holds other content" in done.stderr
    assert "--overwrite" in done.stderr
    assert "the licence of tiny/llama asks for names that begin with 'Llama'" in done.stderr
    assert hub.files("ann/thing") == theirs
    assert push(out, "thing", "--overwrite", env=ann).returncode == 0
    assert hub.files("ann/thing") == content(out)
    for commit in hub.repo("ann/thing").commits.values():
        assert not {"mine.txt", "surgery.json"} <= commit.files.keys()


def test_a_pull_request(hub: Hub, ann: Environment, out: Path) -> None:
    hub.add_repo("bob/thing", {"theirs.txt": b"theirs"})
    done = push(out, "bob/thing", "--pr", "--public", "--json", env=ann)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/bob/thing/discussions/1"
    assert hub.files("bob/thing") == {"theirs.txt": b"theirs"}
    assert hub.files("bob/thing", revision="refs/pr/1") == {"theirs.txt": b"theirs", **content(out)}


def test_what_was_not_verified(hub: Hub, ann: Environment, made: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made / "unverified", tmp_path / "out"))
    done = push(out, env=ann)
    assert done.returncode == 2
    assert "add --no-verify" in done.stderr
    assert not hub.store.repos
    (out / "README.md").write_text("# Mine\n")
    done = push(out, "--no-verify", env=ann)
    assert (done.returncode, "no longer says" in done.stderr) == (2, True)
    (out / "README.md").unlink()
    assert push(out, "--no-verify", env=ann).returncode == 0
    assert b"**Not verified:** logits were not compared" in hub.files(NAME)["README.md"]


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "config.json", "surgery.json"])
def test_what_changed_is_not_pushed(hub: Hub, ann: Environment, out: Path, name: str) -> None:
    (out / name).write_bytes((out / name).read_bytes()[:-1] + b"\x00")
    done = push(out, env=ann)
    assert done.returncode in (1, 2)
    assert f"{out / name} " in done.stderr
    assert not hub.store.repos


def evaluation(made: Path, out: Path) -> dict[str, Any]:
    """What ``surgery eval MODEL DIR --json`` prints."""

    def model(path: Path, perplexity: float) -> dict[str, Any]:
        return {
            "model": str(path),
            "fingerprint": fingerprint(CheckpointIndex.open(path)),
            "tokens": 100,
            "predicted": 96,
            "blocks": 4,
            "tokens_sha256": "0" * 64,
            "nll": 3.0,
            "nll_standard_error": 0.1,
            "perplexity": perplexity,
            "bits_per_byte": 1.2,
            "tasks": [],
        }

    return {
        "data": str(made / "text.txt"),
        "seq_len": 25,
        "protocol": {"name": "paper", "statement": "as the paper does"},
        "models": [model(made / "model", 20.5), model(out, 33.25)],
    }


def test_numbers_travel(hub: Hub, ann: Environment, made: Path, out: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    numbers.write_text(json.dumps(evaluation(made, out)))
    assert push(out, "--eval", numbers, env=ann).returncode == 0
    assert hub.files(NAME) == content(out)
    card = hub.files(NAME)["README.md"].decode()
    assert "| dense | 20.50 |" in card
    assert "| pruned | 33.25 |" in card
    assert hub.repo(NAME).head.title.endswith("; perplexity 20.50 to 33.25 (text.txt, paper)")
    assert not [name for name, data in hub.files(NAME).items() if str(made).encode() in data]
    # They stay with the result: a push without them is the same push.
    head = hub.repo(NAME).head.id
    assert push(out, env=ann).returncode == 0
    assert hub.repo(NAME).head.id == head


def test_numbers_on_other_tokens_are_told(hub: Hub, ann: Environment, made: Path, out: Path, tmp_path: Path) -> None:
    value = evaluation(made, out)
    value["models"][0]["tokens_sha256"] = "1" * 64
    numbers = tmp_path / "numbers.json"
    numbers.write_text(json.dumps(value))
    done = push(out, "--eval", numbers, env=ann)
    assert "no perplexity of the dense model on the same tokens" in done.stderr
    # A pipe sees no progress bar.
    assert "%|" not in done.stderr
    card = hub.files(NAME)["README.md"].decode()
    assert "| pruned | 33.25 |" in card
    assert "| dense |" not in card


def test_numbers_of_another_model_and_edited_cards(hub: Hub, ann: Environment, made: Path, out: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    value = evaluation(made, out)
    numbers.write_text(json.dumps(value | {"models": value["models"][:1]}))
    done = push(out, "--eval", numbers, env=ann)
    assert (done.returncode, "holds no evaluation of this result" in done.stderr) == (2, True)
    numbers.write_text(json.dumps(value))
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    done = push(out, "--eval", numbers, env=ann)
    assert (done.returncode, "was edited" in done.stderr) == (2, True)
    assert not hub.store.repos
    assert not (out / "evaluation.json").exists()
    assert push(out, env=ann).returncode == 0
    assert hub.files(NAME)["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"


def test_the_default_name_is_one(tmp_path: Path) -> None:
    with Atlas.open(random_atlas(tmp_path / "a.h5", layers=1, channels=100)) as atlas:
        plan = make_plan(atlas, PlanOptions(0.125, layers="0", allocation="global", invert=True))
    for name in ("x/Odd--name..of", "x/" + "y" * 200, "x/-", "ünï/cödé"):
        check_repo("a" * 42 + "/" + default_repository(dataclasses.replace(plan, model=dataclasses.replace(plan.model, id=name))))
    local = dataclasses.replace(plan, model=dataclasses.replace(plan.model, id="SmolLM2.Q4_1.gguf"))
    assert default_repository(local).startswith("SmolLM2.Q4_1-scar-prot-12.5")


def test_the_command_that_goes_on() -> None:
    options = PushOptions(public=True, create_pr=True, no_verify=True, eval="my numbers.json")
    assert (
        push_command(Path("out"), "ann/x", options) == "surgery push out ann/x --public --pr --no-verify --eval 'my numbers.json'"
    )


def test_however_many_files_are_one_commit(hub: Hub, ann: Environment, tmp_path: Path) -> None:
    """With Xet, the client's `upload_folder` commits 250 files at a time, and nobody should see a part of a model."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.txt").write_text(str(number))
    (folder / "model.safetensors").write_bytes(b"weights")
    done = json.loads(script(PUBLISH, folder, "ann/many", env=ann | {"HF_HUB_DISABLE_XET": "0"}))
    assert "error" not in done
    assert [len(commit.files) for commit in hub.repo("ann/many").commits.values()] == [1, 302]
