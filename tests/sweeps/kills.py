#!/usr/bin/env python3
"""Kills at random moments: the output is the old or the new one, no debris outlives the next run, and no word is false.

    python tests/sweeps/kills.py --kills 200 [--seed 0]

Two models are converted over each other again and again, each into a graph and a file of weights (the product is run
from a copy that writes weights outside the graph from 1 kB on). SIGINT, SIGTERM, SIGHUP and SIGKILL, in two cases of
three followed by a second one within 50 ms, go to the supervisor, to the worker or to both: at any moment, around the
start, around the end, and between the renames, which are slowed down so that they can be hit. Moments are counted from
when the product has begun to listen; before that, it is Python itself that answers Ctrl-C.

Ran on 2 busy cores: 200 kills (100 with seed 0, 100 with seed 1), nothing found. Exit codes: 76 times 0, 24 times 129,
21 times 130, 34 times 143, 4 times 7, and 41 times the supervisor itself was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
RECEIVERS = ("supervisor", "worker", "both")
# Up to how many seconds after which moment: the first is the whole run's own time.
MOMENTS = {"any": 0.0, "start": 0.5, "end": 0.8, "moves": 0.3}
# Read by every Python process of the product: renames and links take 30 ms.
SLOWER = """
import os, time
def slowed(function):
    def call(*arguments, **options):
        time.sleep(0.03)
        return function(*arguments, **options)
    return call
os.replace, os.link = slowed(os.replace), slowed(os.link)
"""
MODELS = """
import sys, torch
for seed in range(2):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(13, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3)
    torch.save(torch.nn.Sequential(*layers).eval(), f"{sys.argv[1]}/{seed}.pt")
"""


class Kill(NamedTuple):
    """A signal, to whom, and how long after the one before."""

    number: signal.Signals
    receiver: str
    delay: float


class Workplace:
    """A folder with the product, two models and what each of them becomes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        text = (ROOT / "convert.py").read_text(encoding="utf-8")
        changed = re.sub(r"^SINGLE_FILE_LIMIT = [\d_]+", "SINGLE_FILE_LIMIT = 1000", text, count=1, flags=re.MULTILINE)
        if changed == text:
            raise RuntimeError("convert.py has no SINGLE_FILE_LIMIT any more")
        (folder / "convert.py").write_text(changed, encoding="utf-8")
        (folder / "slower").mkdir()
        (folder / "slower" / "sitecustomize.py").write_text(SLOWER, encoding="utf-8")
        subprocess.run([sys.executable, "-c", MODELS, str(folder)], check=True)
        self.seconds = 0.0
        self.expected = [self.convert(model) for model in (0, 1)]

    def convert(self, model: int) -> dict[str, bytes]:
        """Convert without a kill; returns the files."""
        start = time.monotonic()
        process = self.start(model)
        wait_until_it_listens(process)
        start = time.monotonic()
        _, err = process.communicate(timeout=300)
        self.seconds = time.monotonic() - start
        if process.returncode or len(self.files()) != 2:
            raise RuntimeError(err)
        return self.files()

    def start(self, model: int) -> subprocess.Popen[str]:
        """Begin a conversion."""
        return subprocess.Popen(
            [sys.executable, str(self.folder / "convert.py"), "-i", f"{model}.pt", "-o", "out/model.onnx", "--json"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder / "slower"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_all,  # noqa: PLW1509
        )

    def files(self) -> dict[str, bytes]:
        """The files in the output folder, without what is staged."""
        return {file.name: file.read_bytes() for file in self.output.iterdir() if not file.name.startswith(".")}

    def debris(self) -> list[str]:
        """What is staged."""
        return sorted(file.name for file in self.output.glob(".pt2onnx.*"))

    def journal(self) -> bool:
        """Whether a run has begun to move its files."""
        return any(self.output.glob(".pt2onnx.*/moves.json"))


def hear_all() -> None:
    """Give signals their usual effect: nohup ignores one, and shells another one for what runs in the background."""
    for number in SIGNALS[:-1]:
        signal.signal(number, signal.SIG_DFL)


def wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    """Wait until the product has blocked SIGTERM or handles it."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        masks = re.findall(r"^Sig(?:Blk|Cgt):\s*(\w+)", status, re.MULTILINE)
        if any(int(mask, 16) & 1 << signal.SIGTERM - 1 for mask in masks):
            return
        time.sleep(0.002)


def send(process: subprocess.Popen[str], kill: Kill) -> None:
    """Send one signal, after its delay, to those who are still there."""
    time.sleep(kill.delay)
    if process.poll() is not None:
        return
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    receivers = {"supervisor": [], "worker": children[:1], "both": children[:1]}[kill.receiver]
    for receiver in [*map(int, receivers), *([] if kill.receiver == "worker" else [process.pid])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(receiver, kill.number)


def choose_kills(dice: random.Random, moment: str, seconds: float) -> list[Kill]:
    """One signal at a random moment, and mostly another one soon after it."""
    longest = MOMENTS[moment] or 1.1 * seconds
    kills = [Kill(dice.choice(SIGNALS), dice.choice(RECEIVERS), dice.uniform(0, longest))]
    if dice.random() < 2 / 3:
        kills.append(Kill(dice.choice(SIGNALS), dice.choice(RECEIVERS), dice.uniform(0, 0.05)))
    return kills


def wait_for_moment(process: subprocess.Popen[str], moment: str, place: Workplace) -> str:
    """Wait until the time of the first kill counts; returns the log that was read."""
    wait_until_it_listens(process)
    if moment == "moves":
        while process.poll() is None and not place.journal():
            time.sleep(0.002)
    log = ""
    while moment == "end" and "verify:" not in log:
        line = process.stderr.readline() if process.stderr else ""
        if not line:
            break
        log += line
    return log


def false_words(code: int, out: str, err: str, kills: list[Kill], *, is_new: bool) -> list[str]:
    """What the product said or returned that does not fit what lies there and what was done to it."""
    ends = [line for line in err.splitlines() if line.startswith(("[ERROR]", "[SUCCESS]"))]
    numbers = {kill.number for kill in kills}
    killed = code == -signal.SIGKILL and signal.SIGKILL in numbers
    if code == 0:
        fits = is_new and "[SUCCESS]" in err and json.loads(out)["status"] == "ok"
    elif code == 7:
        fits = not is_new and "[ERROR] killed" in err and signal.SIGKILL in numbers
    else:
        fits = killed or (not is_new and code - 128 in numbers and "nothing was written" in err)
    found = [] if fits else [f"exit code {code} does not fit"]
    if "Traceback" in err:
        found.append("a traceback")
    if len(ends) != 1 and not killed:
        found.append(f"{len(ends)} last lines")
    if not is_new and "[SUCCESS]" in err:
        found.append("[SUCCESS] without the new files")
    if is_new and "nothing was written" in err:
        found.append("'nothing was written' beside the new files")
    return found


def next_run(place: Workplace, model: int) -> None:
    """Begin another run and interrupt it at once."""
    process = place.start(model)
    wait_until_it_listens(process)
    process.terminate()
    process.communicate(timeout=60)


def attack(place: Workplace, moment: str, kills: list[Kill], old: int) -> tuple[int, list[str], int]:
    """One conversion over the output of `old`, with `kills`; the exit code, what is wrong, whose output is there."""
    process = place.start(1 - old)
    log = wait_for_moment(process, moment, place)
    for kill in kills:
        send(process, kill)
    out, err = process.communicate(timeout=60)
    found = []
    if process.returncode == -signal.SIGKILL:
        next_run(place, old)
    if place.debris():
        found.append(f"debris: {place.debris()}")
    files = place.files()
    if files not in place.expected:
        return process.returncode, [*found, f"neither the old nor the new output: {sorted(files)}"], -1
    now = place.expected.index(files)
    found += false_words(process.returncode, out, log + err, kills, is_new=now != old)
    return process.returncode, [f"{problem}; {(log + err).splitlines()[-3:]}" for problem in found], now


def main() -> int:
    """Run the kills; returns 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice, endings, problems = random.Random(options.seed), Counter(), 0  # noqa: S311  (no secret)
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        now = 1
        for number in range(options.kills):
            moment = dice.choice(list(MOMENTS))
            kills = choose_kills(dice, moment, place.seconds)
            code, found, now = attack(place, moment, kills, now)
            endings[code] += 1
            told = ", ".join(f"{kill.number.name} to {kill.receiver} after {kill.delay:.3f} s" for kill in kills)
            for problem in found:
                problems += 1
                print(f"kill {number} ({moment}: {told}): exit code {code}: {problem}", flush=True)
            if now < 0:
                place.convert(1)
                now = 1
            if number % 20 == 19:
                print(f"{number + 1} kills: exit codes {dict(sorted(endings.items()))}, {problems} found", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
