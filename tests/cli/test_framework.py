"""The framework of the command lines: groups, suggestions, bare commands, recorded commands, imports at start-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest

from chanfmt.base.choices import did_you_mean, unknown
from chanfmt.base.command_line import recorded_command
from chanfmt.cli.framework import add_command, add_group, make_parser, parse_options, run_command
from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support.hygiene import modules_after


@dataclass(frozen=True)
class SampleOptions:
    """What the sample does.

    The rest of the docstring is not a title.
    """

    size: int = field(metadata={"help": "a size"})
    mode: str = field(default="fast", metadata={"help": "a mode", "choices": ("fast", "slow"), "noun": "mode"})
    kind: str = field(default="a", metadata={"help": "a kind", "choices": ("a", "b")})


def sample(run):
    """A program with the command ``do``, which calls ``run`` with its arguments."""
    parser, commands = make_parser("sample", "A sample.")
    add_command(commands, "do", "do it", run=run, options=lambda: (SampleOptions,), examples=("sample do --size 3",))
    return parser


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (atlas, ["biuld", "x"], ["atlas: error: unknown command 'biuld'; did you mean build?", "  see: atlas --help"]),
        (atlas, ["zzz"], ["atlas: error: unknown command 'zzz'", "  see: atlas --help"]),
        (
            surgery,
            ["prune", "a.h5", "--sparcity", "0.5"],
            ["surgery: error: unknown option --sparcity; did you mean --sparsity?", "  see: surgery prune --help"],
        ),
        (
            surgery,
            ["prune", "a.h5", "--sparsity", "0.5", "--recov=lstsq"],
            [
                "surgery: error: unknown option --recov; did you mean --recover?",
                "  see: surgery prune --help",
            ],
        ),
        (
            surgery,
            ["ablate", "halos"],
            ["surgery: error: unknown experiment 'halos'; did you mean halo?", "  see: surgery ablate --help"],
        ),
        (
            atlas,
            ["build", "m", "-o", "a.h5", "--loss", "nexttoken"],
            [
                "atlas: error: unknown loss 'nexttoken'; choose from auto, next-token, masked-token, reconstruction, "
                "embedding, labels; did you mean next-token?",
                "  see: atlas build --help",
            ],
        ),
        (atlas, ["info", "a", "b"], ["atlas: error: unexpected argument 'b'", "  see: atlas info --help"]),
    ],
)
def test_a_misspelt_word_is_named_with_what_it_may_have_been(main, arguments, said, capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == said


def test_an_unknown_option_is_told_before_a_missing_one(capsys) -> None:
    assert run_command(sample(print), ["do", "--sise", "3"]) == 2
    assert "unknown option --sise; did you mean --size?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["do", "--size", "-3"], ["do", "--size=3", "--mode", "slow"]])
def test_negative_numbers_and_joined_values_are_no_unknown_options(words) -> None:
    found = []
    assert run_command(sample(lambda arguments: found.append(parse_options(arguments, SampleOptions).size)), words) == 0
    assert found in ([-3], [3])


def test_the_help_lists_arguments_without_a_flag_first(capsys) -> None:
    with pytest.raises(SystemExit):
        surgery(["eval", "--help"])
    said = capsys.readouterr().out
    assert said.index("\n  MODEL ") < said.index("\n  --data ")


def test_long_options_are_not_abbreviated(capsys) -> None:
    assert run_command(sample(print), ["do", "--siz", "3"]) == 2
    assert "unknown option --siz; did you mean --size?" in capsys.readouterr().err


def test_a_choice_without_a_noun_is_called_by_its_flag(capsys) -> None:
    assert run_command(sample(print), ["do", "--size", "3", "--kind", "c"]) == 2
    assert "unknown value of --kind 'c'; choose from a, b\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("lsq", ("none", "bias", "lstsq"), "; did you mean lstsq?"),
        ("LSTSQ", ("none", "bias", "lstsq"), "; did you mean lstsq?"),
        ("magn", ("magnitude", "random"), "; did you mean magnitude?"),
        ("s", ("sum", "size"), ""),
        ("scar", ("scar-lp", "scar-prot", "scar-conn", "wanda"), "; did you mean scar-lp, scar-prot or scar-conn?"),
        ("scar", ("scar-a", "scar-b", "scar-c", "scar-d"), "; did you mean scar-d?"),
        ("", ("sum",), ""),
    ],
)
def test_did_you_mean(word, known, said) -> None:
    assert did_you_mean(word, known) == said


def test_unknown() -> None:
    error = unknown("recovery", "lsq", ("none", "bias", "lstsq"))
    assert error.message == "unknown recovery 'lsq'; choose from none, bias, lstsq; did you mean lstsq?"
    assert error.exit_code == 2


def test_a_dataclass_is_a_group_titled_by_its_docstring(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(sample(print), ["do", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: sample do --size N [options]\n\nDo it.\n\nwhat the sample does:\n  --size N ")
    assert "\nwhat is printed:\n  --json " in text
    assert "\n  --quiet " in text
    assert text.endswith("\n\nexamples:\n  sample do --size 3\n")


@pytest.mark.parametrize(
    ("main", "arguments", "usage"),
    [
        (atlas, [], "usage: atlas COMMAND ...\n"),
        (surgery, [], "usage: surgery COMMAND ...\n"),
        (surgery, ["ablate"], "usage: surgery ablate EXPERIMENT ...\n"),
    ],
)
def test_a_bare_command_prints_its_help(main, arguments, usage, capsys) -> None:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(usage)
    assert captured.err == ""


@pytest.mark.parametrize(("module", "program"), [("chanfmt", "atlas"), ("surgery", "surgery")])
def test_modules_run_under_the_name_of_the_command(module, program) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)

    assert run("--help").stdout == run().stdout
    assert run().stdout.startswith(f"usage: {program} COMMAND ...\n")
    wrong = run("no-such")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"{program}: error: unknown command 'no-such'")


@pytest.mark.parametrize("main", ["chanfmt.cli.main", "surgery.cli.main", "tui.cli"])
def test_help_imports_nothing_heavy(main) -> None:
    heavy = {"torch", "transformers", "h5py", "numpy", "scipy", "huggingface_hub", "safetensors", "textual", "rich", "tqdm"}
    assert not heavy & modules_after(main, ["--help"])


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        ("chanfmt.cli.main", ["build", "--help"]),
        ("surgery.cli.main", ["prune", "--help"]),
        ("surgery.cli.main", ["eval", "--help"]),
        ("surgery.cli.main", ["ablate", "halo", "--help"]),
    ],
)
def test_help_of_a_command_imports_no_torch(main, arguments) -> None:
    assert not {"torch", "transformers", "scipy", "huggingface_hub"} & modules_after(main, arguments)


def test_a_command_is_recorded_while_it_runs(monkeypatch) -> None:
    found = []
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/run/kernel.json"])
    assert recorded_command() == ""
    assert run_command(sample(lambda arguments: found.append(recorded_command())), ["do", "--size", "3"]) == 0
    assert found == ["sample do --size 3"]
    assert recorded_command() == ""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sample", "do", "--size", "4"])
    assert run_command(sample(lambda arguments: found.append(recorded_command())), None) == 0
    assert found[1:] == ["sample do --size 4"]


def test_a_command_runs_off_the_main_thread() -> None:
    codes = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: codes.append(run_command(sample(lambda arguments: 0), ["do", "--size", "3"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_interrupts_a_command_and_is_given_back(capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(sample(lambda arguments: os.kill(os.getpid(), signal.SIGTERM)), ["do", "--size", "3"]) == 130
    assert capsys.readouterr().err == "sample: interrupted; nothing was left behind\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_groups_nest() -> None:
    parser, commands = make_parser("sample", "A sample.")
    inner = commands.add_parser("inner", help="inner commands", printing=False)
    found = []
    add_command(
        add_group(inner, "THING"),
        "one",
        "do one",
        run=lambda arguments: found.append(arguments.extra),
        options=lambda: (),
        examples=("sample inner one",),
        extra=7,
    )
    assert run_command(parser, ["inner", "one", "--quiet"]) == 0
    assert found == [7]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recover", "lsq"], "unknown recovery 'lsq'; choose from none, bias, lstsq, block, distill; did you mean lstsq?"),
        (["--method", "scar-pro"], "; did you mean scar-prot?"),
        (["--allocation", "globl"], "unknown value of --allocation 'globl'; choose from uniform, global; did you mean global?"),
    ],
)
def test_values_that_the_library_checks_are_suggested_too(words, said, capsys) -> None:
    assert surgery(["prune", "a.h5", "--sparsity", "0.5", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_table_of_programs_is_that_of_the_programs() -> None:
    from chanfmt.cli import main as atlas_main
    from chanfmt.cli.framework import programs
    from surgery.cli import main as surgery_main

    parsers = {}
    for module, name in ((atlas_main, "atlas"), (surgery_main, "surgery")):
        parser, commands = make_parser(name, "")
        for command in module.COMMANDS:
            command.add(commands)
        parsers[name] = parser
    for name, parser in parsers.items():
        assert set(programs.COMMANDS[name]) == set(parser.commands)
    for option, place in programs.OPTIONS.items():
        program, command = place.split()
        assert option in parsers[program].commands[command].known_options


def test_help_is_a_command_too(capsys) -> None:
    texts = []
    for words in (["help"], ["--help"], ["help", "plan"], ["plan", "--help"]):
        with pytest.raises(SystemExit):
            surgery(words)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] == texts[3]
