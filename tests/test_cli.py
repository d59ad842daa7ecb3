"""The command `pmpd` itself: what answers before anything heavy is imported, and how commands end."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import pmpd
from pmpd.cli import main as cli
from pmpd.cli.flags.generate import GenerateJob
from pmpd.cli.helptext import texts_of
from pmpd.cli.main import COMMANDS, Command, main
from pmpd.errors import UserError
from pmpd.evaluation.sweep import DEFAULT_SWEEP
from pmpd.kernels.dispatch import KERNELS
from pmpd.schedulers import SCHEDULERS

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "ray", "transformers", "datasets", "matplotlib", "fastchat")
"""Each takes half a second or more to import."""

PROBE = f"""
import sys
from pmpd.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print("imported:", [name for name in {HEAVY} if name in sys.modules], "code:", code)
"""


def answer(*arguments: str) -> str:
    """What `pmpd ARGUMENTS` prints in a process of its own, and which heavy packages it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    told = answer(name, "--help")
    assert "imported: [] code: 0" in told
    assert f"usage: pmpd {name}" in told


def test_a_mistyped_flag_is_told_before_anything_heavy_is_imported():
    told = answer("label", "--szie", "3")
    assert "imported: [] code: 2" in told
    assert "--size" in told, "the flag that was meant is not named"


def test_the_flags_name_the_default_sweep():
    """The flags import no scheduler, so they spell the default out."""
    assert GenerateJob.schedulers == ",".join(DEFAULT_SWEEP)


@pytest.mark.parametrize("name", ["label", "generate", "chat"])
def test_the_help_names_every_kernel(name):
    """A kernel that the help leaves out is one that nobody asks for."""
    flags = importlib.import_module(f"pmpd.cli.flags.{name}")
    told = texts_of(getattr(flags, COMMANDS[name].flags))["kernel"]
    assert not [kernel for kernel in KERNELS if kernel not in told]


def test_the_help_names_every_scheduler():
    told = texts_of(GenerateJob)["schedulers"] + GenerateJob.schedulers
    assert not [name for name in SCHEDULERS if name not in told and name not in ("naive", "uniform")]


def test_usage_names_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pmpd {pmpd.__version__}\n"


COMPLETE = """
source "$1"
_tyro=$(complete -p pmpd | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=(pmpd lab); COMP_CWORD=1; $_tyro; echo "${COMPREPLY[@]}"
COMP_WORDS=(pmpd label --plug); COMP_CWORD=2; $_tyro; echo "${COMPREPLY[@]}"
"""


def test_a_shell_completes_commands_and_their_flags(capsys, tmp_path):
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "pmpd.bash").write_text(capsys.readouterr().out)
    shell = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "pmpd.bash")]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    command, flag = done.stdout.splitlines()
    assert command == "label"
    assert flag.startswith("--plugins")
    assert main(["--completion", "cmd"]) == 2
    assert "known are bash, zsh" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys):
    assert main(["lable"]) == 2
    assert "label" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch):
    """Makes `pmpd inspect` raise what is given."""

    def install(error: BaseException) -> None:
        def fail(_):
            raise error

        import pmpd.cli.inspect

        monkeypatch.setattr(pmpd.cli.inspect, "main", fail)

    return install


def test_only_a_user_error_loses_its_traceback(failing, capsys):
    failing(UserError("what was given; what is allowed; what to do"))
    assert main(["inspect", "x"]) == 1
    assert capsys.readouterr().err == "error: what was given; what is allowed; what to do\n"
    failing(ValueError("operands could not be broadcast together"))
    with pytest.raises(ValueError, match="broadcast"):
        main(["inspect", "x"])


def test_a_package_of_an_extra_that_is_not_installed_is_named_with_the_extra(failing, capsys):
    failing(ModuleNotFoundError("No module named 'sacrebleu.metrics'", name="sacrebleu.metrics"))
    assert main(["inspect", "x"]) == 1
    told = capsys.readouterr().err
    assert "pmpd inspect: this needs the package sacrebleu; pip install 'pmpd[eval]'" in told
    failing(ModuleNotFoundError("No module named 'pmpd.nothing'", name="pmpd.nothing"))
    with pytest.raises(ModuleNotFoundError, match=r"pmpd\.nothing"):
        main(["inspect", "x"])


def test_a_reader_that_left_is_no_fault_of_the_command_and_another_broken_pipe_is(failing):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pmpd", "kernels"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    failing(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        main(["inspect", "x"])


def test_a_stopped_command_says_what_is_kept(failing, capsys, monkeypatch):
    failing(KeyboardInterrupt())
    command = COMMANDS["inspect"]
    monkeypatch.setitem(
        cli.COMMANDS, "inspect", Command(command.module, command.flags, command.summary, "rows")
    )
    assert main(["inspect", "x"]) == 130
    assert "stopped; rows: run the same command again to go on" in capsys.readouterr().err


def test_sigterm_is_told_from_ctrl_c_behind_code_that_knows_only_the_latter():
    def wait_in_ray() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray's C++ does

    with pytest.raises(cli.Terminated), cli.terminable():
        wait_in_ray()
    with pytest.raises(KeyboardInterrupt) as caught, cli.terminable():
        raise KeyboardInterrupt
    assert not isinstance(caught.value, cli.Terminated)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_paragraph_a_flag_and_names_what_it_takes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    assert "None" not in told, "None is no value that a user can give"
    flags = importlib.import_module(f"pmpd.cli.flags.{COMMANDS[name].module}")
    for field in fields(getattr(flags, COMMANDS[name].flags)):
        if is_dataclass(field.type) or field.name == "training":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        line = next((line for line in told.splitlines() if re.search(rf"{flag}[ ,]", line)), None)
        if line is None:
            assert f" {field.name.upper()} " in told, f"{field.name} has no name in the help"
    assert not [line for line in told.splitlines() if re.match(r"│ {20,}[a-z]", line)], (
        "a flag's text is broken"
    )
