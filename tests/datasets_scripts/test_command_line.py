"""What the commands share."""

import argparse
import errno
import os
import subprocess
import sys

import pytest
import torch

from datasets_scripts.command_line import count_cores, entry_point, pick_device, read_pair, split_names
from datasets_scripts.conversion.job import converter_parser


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_that_of_the_command(result, code):
    assert entry_point()(lambda: result)() == code


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError, NotImplementedError])
def test_an_error_is_one_line_however_long_its_text_is(error, capsys):
    @entry_point()
    def main(argv: list[str] | None = None) -> None:
        raise error(f"{argv} went wrong:\n\n  - here\n  - and there\n")

    assert main(["--it"]) == 1
    assert capsys.readouterr().err == "error: ['--it'] went wrong: - here - and there\n"


def test_a_bug_keeps_its_traceback():
    @entry_point()
    def main() -> None:
        raise KeyError("name")

    with pytest.raises(KeyError):
        main()


def test_a_command_says_which_errors_are_no_bugs():
    @entry_point(errors=(KeyError,))
    def main(error: Exception) -> None:
        raise error

    assert main(KeyError("name")) == 1
    with pytest.raises(RuntimeError, match="inside"):
        main(RuntimeError("inside"))


@pytest.mark.parametrize(
    ("resumes", "text"), [(True, "interrupted; run the same command again to resume"), (False, "interrupted")]
)
def test_only_what_resumes_says_so_after_ctrl_c(resumes, text, capsys):
    @entry_point(resumes=resumes)
    def main() -> None:
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == text + "\n"


def test_a_full_disk_has_a_remedy(capsys):
    @entry_point()
    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "labels")

    assert main() == 1
    expected = (
        "error: [Errno 28] No space left on device: 'labels'; free some space and run the same command again"
    )
    assert capsys.readouterr().err == expected + "\n"


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7}, raising=False)
    assert count_cores() == 2
    assert converter_parser("Convert.", "example", "archive").get_default("workers") == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert count_cores() == 64


@pytest.mark.parametrize(
    ("text", "names"), [("main", ["main"]), (" main, wrist ,", ["main", "wrist"]), ("", []), (" , ", [])]
)
def test_a_list_of_names_may_have_blanks_and_a_comma_too_many(text, names):
    assert split_names(text) == names


def test_the_device_is_a_gpu_if_there_is_one_unless_another_is_named(monkeypatch):
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert {pick_device().type, pick_device(None).type, pick_device("auto").type} == {kind}
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu': use auto, cpu, cuda or cuda:1"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="there is no device 'cuda:99'"):
        pick_device("cuda:99")


def test_what_simulator_processes_import_again_does_not_load_pytorch():
    code = "import sys, datasets_scripts.command_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("text", ["main", "=image", ""])
def test_an_option_of_two_parts_needs_both(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--camera", type=read_pair)
    assert parser.parse_args(["--camera", "main=a=b"]).camera == ("main", "a=b")
    with pytest.raises(SystemExit):
        parser.parse_args(["--camera", text])
    assert f"argument --camera: {text!r} is not of the form NAME=VALUE" in capsys.readouterr().err
