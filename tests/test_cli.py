"""The command line: speed, usage errors, what is printed where, and the README that describes it."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import CONVERT, check_error, lines, run_cli

ENGLISH, _, CHINESE = CONVERT.with_name("README.md").read_text(encoding="utf-8").partition("# PT2ONNX 中文说明\n")
CJK = re.compile("[\u4e00-\u9fff]")
SECONDS = 0.3  # for an answer that needs no model, ...
SLOWER = 1.5  # ... or on a slow machine so many times what Python needs to read the file
READING = "import argparse, sys, zipfile; compile(open(sys.argv[1], encoding='utf-8').read(), 'x', 'exec')"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("-i/--input",)),
        (("-i", "x.pt"), ("-o/--output",)),
        (("-i", "x.pt", "-o", "y.onnx", "--opset", "6"), ("'6' is not an opset from 7 to 25",)),
        (("-i", "x.pt", "-o", "y.onnx", "--opset", "26"), ("'26' is not an opset from 7 to 25",)),
        (("-i", "x.pt", "-o", "y.onnx", "--opset", "new"), ("'new' is not an opset",)),
        (("-i", "x.pt", "-o", "y.onnx", "--input-shape", "1,3,"), ("'1,3,' is not a shape",)),
        (("-i", "x.pt", "-o", "y.onnx", "--input-shape", "1,0,4"), ("dimension of 0",)),
        (("-i", "x.pt", "-o", "y.onnx", "--input-shape", "1,3:float"), ("names no dtype",)),
        (("-i", "x.pt", "-o", "y.onnx", "--dynamic-axes", "height"), ("'height' is not a list of axes",)),
        (("-i", "x.pt", "-o", "y.onnx", "--dynamic-axes", "2", "--static"), ("not allowed with",)),
        (("-i", "x.pt", "-o", "y.onnx", "--model-args", "{"), ("is not JSON",)),
        (("-i", "x.pt", "-o", "y.onnx", "--model-args", "[1]"), ("is not a JSON object",)),
        (("-i", "x.pt", "-o", "y.onnx", "--atol", "-1"), ("'-1' is not a number of zero or more",)),
        (("-i", "x.pt", "-o", "y.onnx", "--rtol", "nan"), ("'nan' is not a number",)),
        (("-i", "x.pt", "-o", "y.onnx", "--no-verify", "--atol", "1"), ("--no-verify",)),
        (("-i", "x.pt", "-o", "y.onnx", "--mode", "magic"), ("invalid choice: 'magic'",)),
        (("-i", "x.pt", "-o", "y.onnx", "--device", "tpu"), ("invalid choice: 'tpu'",)),
        (("-i", "x.pt", "-o", "y.onnx", "--exporter", "own"), ("invalid choice: 'own'",)),
        (("-i", "x.pt", "-o", "y.txt"), ("name a .onnx file or a directory",)),
        (("-i", "x.pt", "-o", ""), ("argument -o/--output: an empty path",)),
        (("-i", "", "-o", "y.onnx"), ("argument -i/--input: an empty path",)),
        (("-i", "x.pt", "-o", "y" * 300 + ".onnx"), ("File name too long", "check -i and -o")),
        (("-i", "x.pt", "-o", "y.onnx", "--ops", "14"), ("unrecognized arguments: --ops",)),
    ],
    ids=lambda value: " ".join(value[4:]) or "few" if isinstance(value, tuple) else "",
)
def test_usage_errors(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    """One [ERROR] line, exit code 2, nothing written."""
    check_error(run_cli(*arguments, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("-i", "x.pt"), ("-i", "no.pt", "-o", "y.onnx")])
def test_quick_answers(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Without a model to convert the answer comes at once: the least processor time of some tries on a busy machine."""

    def seconds(run: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def limit() -> float:
        reading = [sys.executable, "-c", READING, str(CONVERT)]
        return max(SECONDS, SLOWER * seconds(lambda: subprocess.run(reading, check=True)))

    assert any(seconds(lambda: run_cli(*arguments, cwd=tmp_path)) < limit() for _ in range(20))


def test_nothing_heavy_is_imported_before_the_input_is_known(tmp_path: Path) -> None:
    """Neither --help nor a missing input imports torch, numpy or onnx."""
    for arguments in (["--help"], ["-i", str(tmp_path / "none.pt"), "-o", "y.onnx"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(CONVERT), *arguments], capture_output=True, text=True, check=False
        )
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time" in line}
        assert "argparse" in imported
        assert not imported & {"torch", "numpy", "onnx", "onnxruntime", "onnx_ir", "rich"}


def test_quiet_success_and_json(models: Path, tmp_path: Path) -> None:
    """Log lines alone on standard error; with --json one object on standard output, without it nothing."""
    target = tmp_path / "model.onnx"
    result = run_cli("-i", str(models / "flat.pt"), "-o", str(target), "--json")
    assert result.code == 0
    assert all(re.match(r"\[(INFO|WARN|SUCCESS)\] ", line) for line in result.err.splitlines())
    report = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert report["status"] == "ok"
    assert report["opset"] == 14
    assert report["files"] == {str(target): target.stat().st_size}
    assert {"load", "export", "verify"} <= report["steps"].keys()
    assert 0 < sum(report["steps"].values()) <= report["seconds"] + 1
    assert report["inputs"] == {"input": ["batch_size", 13]}
    usual = {item["case"] for item in report["verified"] if "(" not in item["case"]}
    assert usual == {"input:1x13", "input:2x13", "input:3x13"}
    assert "input:1x13 (negative values)" in {item["case"] for item in report["verified"]}
    assert lines(result, "SUCCESS")[0].startswith(f"{target} (")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-i", "none.pt", "-o", "x.onnx"), 3, "none.pt"),
        (("-i", "none.pt", "-o", "x.onnx", "--opset", "3"), 2, "--opset"),
        (("-o", "x.onnx"), 2, "-i/--input"),
    ],
)
def test_json_of_a_failure(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    """A machine learns the exit code and the message, of usage errors too."""
    result = run_cli(*arguments, "--json", cwd=tmp_path)
    report = json.loads(result.out)
    assert report["status"] == "error"
    assert report["exit_code"] == result.code == code
    assert words in report["message"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "2>/dev/full >/dev/full"])
def test_streams_that_are_closed_or_full(closed: str, models: Path, tmp_path: Path) -> None:
    """The conversion does not depend on somebody listening, and no file of ours takes a closed stream's number."""
    target = tmp_path / "m.onnx"
    command = f"{sys.executable} {CONVERT} -i {models / 'flat.pt'} -o {target} --json {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout or '{"status": "ok"}')["status"] == "ok"
    assert target.stat().st_size > 500


def test_torchvision_without_torchs_compiler(tmp_path: Path) -> None:
    """The TorchScript rung never imports torch._dynamo, which takes as long as all the rest of torch."""
    import torch
    import torchvision

    torch.save(torchvision.models.squeezenet1_1(), tmp_path / "net.pt")
    arguments = ("-i", "net.pt", "-o", "m.onnx", "--input-shape", "1,3,64,64", "--verbose")
    result = run_cli(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert result.code == 0, result.err
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines() if "import time" in line}
    assert {"torchvision.ops.roi_align", "onnxruntime"} <= imported
    assert "torch._dynamo" not in imported


def test_verbose_shows_what_the_libraries_say(models: Path, tmp_path: Path) -> None:
    """The exporter's deprecation warning and tracebacks appear with --verbose only."""
    arguments = ("-i", str(models / "flat.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,14")
    quiet, loud = run_cli(*arguments), run_cli(*arguments, "--verbose")
    assert quiet.code == loud.code == 2
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert "mat1 and mat2" in loud.err
    loud = run_cli("-i", str(models / "flat.pt"), "-o", str(tmp_path / "m.onnx"), "--verbose")
    assert loud.code == 0
    assert "DeprecationWarning" in loud.err
    assert loud.out == ""


def test_a_terminal_sees_progress_and_no_third_party_line(models: Path, tmp_path: Path) -> None:
    """On a terminal there is a spinner; what the libraries print stays away from it."""
    command = f"{sys.executable} {CONVERT} -i {models / 'flat.pt'} -o {tmp_path / 'm.onnx'}"
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, check=True)
    assert "\x1b[" in done.stdout
    assert re.search(r"\[INFO\] export: torchscript, opset 14: \d+\.\d s", done.stdout)
    assert "Warning" not in done.stdout


@pytest.mark.parametrize("half", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_readme_has_every_option_and_exit_code(half: str) -> None:
    """Each option of --help is a row of the table in both halves of the README, and so is each exit code."""
    text = run_cli("--help").out
    rows = [line.split("|") for line in half.splitlines() if line.startswith("| `-")]
    options = set(re.findall(r"--[a-z-]+", text.partition("options:")[2].partition("exit codes:")[0]))
    assert options == set(re.findall(r"--[a-z-]+", " ".join(row[1] for row in rows)))
    words = CJK if half is CHINESE else re.compile("[A-Za-z]{3}")
    for row in rows:
        assert words.search(row[3]), row
    for code in re.findall(r"^  (\d+(?:/\d+)?) ", text, re.MULTILINE):
        (row,) = re.findall(rf"^\| {code.replace('/', ', ')} \|(.*)\|(.*)\|$", half, re.MULTILINE)
        assert all(words.search(cell) for cell in row if cell.strip()), code


def test_readme_is_whole_in_both_languages() -> None:
    """Neither half mixes languages, and both have the same sections, commands, links and first columns of tables."""
    assert not CJK.search(ENGLISH.replace("[中文说明](#pt2onnx-中文说明)", ""))
    found = []
    for half in (ENGLISH, CHINESE):
        blocks = re.findall(r"^```sh\n(.*?)^```", half, re.MULTILINE | re.DOTALL)
        commands = [line for block in blocks for line in block.splitlines() if not line.startswith("# ")]
        names = re.findall(r"^\| (`-.*?|\d.*?) \|", half, re.MULTILINE)
        files = sorted(re.findall(r"\]\(([^)#]+)", half))
        found.append((len(re.findall("^## ", half, re.MULTILINE)), commands, names, files))
        assert all(CJK.search(line) for line in half.splitlines() if line.startswith("## ")) == (half is CHINESE)
    assert found[0] == found[1]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    """In the README and what it leads to: every file is there, and has the section."""
    pages = [CONVERT.with_name("README.md"), *CONVERT.parent.glob("tests/*/*.md")]
    for page in pages:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.is_file(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(slug, headings), f"{page}: {target}#{anchor}"


def test_messages_that_are_explained_exist() -> None:
    """What guides/errors.md quotes is in the product's text."""
    guide = (CONVERT.parent / "tests" / "guides" / "errors.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]*)` \|", guide, re.MULTILINE)
    assert len(quoted) > 20
    text = CONVERT.read_text(encoding="utf-8")
    for message in quoted:
        parts = [part.strip(" ,") for part in re.split(r"\.\.\.|\bN\b", message)]
        assert all(part in text for part in parts), message


def test_readme_has_exactly_two_commands_for_a_fresh_machine() -> None:
    """One converts a model that is in the repository, the other runs the tests; the same ones in both languages."""
    commands = re.findall(r"^python3\.11 -m venv .*$", ENGLISH, re.MULTILINE)
    assert commands == re.findall(r"^python3\.11 -m venv .*$", CHINESE, re.MULTILINE)
    assert len(commands) == 2
    assert "convert.py -i tests/data/digits.pt" in commands[0]
    assert commands[1].endswith("-m pytest -n 2")


def test_constants_match_the_libraries() -> None:
    """The opset limits that are written down, so that torch need not be imported, are torch's own."""
    import torch.onnx._constants as constants

    text = CONVERT.read_text(encoding="utf-8")
    assert f"MIN_OPSET = {constants.ONNX_MIN_OPSET} " in text
    assert f"TORCHSCRIPT_MAX_OPSET = {constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET} " in text
