#!/usr/bin/env python3
"""Is every model of torchvision and timm told by its bare weights? Writes tests/reports/recognise.md.

    python tests/sweeps/recognise.py

Each model is built twice on the meta device: with 7 classes, and (timm's) without a classifier and with one input
channel. convert.recognise sees names and shapes alone. The right answer is the model itself, or a group of which
generators/architectures.py found that it computes the same; or several, the model among them, which --model-class then
tells.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# tests/ and the folder of convert.py, in place of this one
sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

from generators.architectures import VERSIONS, members, shapes
from sweeps.jobs import REPORTS

import convert

TABLE = REPORTS / "recognise.md"
VERDICTS = ("recognised", "listed", "missed")


class Verdict(NamedTuple):
    """What came out for one model: which of VERDICTS, and the product's own words."""

    verdict: str
    words: str


def judge(member: str, arguments: dict[str, int]) -> Verdict:
    """Build `member` with `arguments`, ask the product, and look whether it is right."""
    try:
        tensors = shapes(member, **arguments)
    except TypeError:  # RAFT has no classes
        tensors = shapes(member)
    found = convert.recognise(tensors)
    right = any(convert.short_name(member) in group for group in found.candidates)
    told = {key: found.arguments.get(key, 3) for key in arguments}
    if not right or (told != arguments and shapes(member, **found.arguments) != tensors):  # encoders have no classes
        return Verdict("missed", found.explanation)
    return Verdict("recognised" if len(found.candidates) == 1 else "listed", found.explanation)


def sweep(names: list[str], arguments: dict[str, int]) -> dict[str, Verdict]:
    """Judge all of them; a line for each that is missed."""
    results = {}
    for name in names:
        results[name] = judge(name, arguments)
        if results[name].verdict == "missed":
            print(f"{name} {arguments}: {results[name].words}", flush=True)
    return results


def row(title: str, results: dict[str, Verdict]) -> str:
    """One row of the table."""
    counts = Counter(result.verdict for result in results.values())
    share = 100 * (len(results) - counts["missed"]) / len(results)
    numbers = " | ".join(str(counts[verdict]) for verdict in VERDICTS)
    return f"| {title} | {len(results)} | {numbers} | {share:.1f} % |"


def main() -> None:
    """Sweep and write the table."""
    start = time.monotonic()
    own = [name for name in members() if name.startswith("torchvision.")]
    others = [name for name in members() if name.startswith("timm.")]
    parts = {
        "torchvision, 7 classes": sweep(own, {"num_classes": 7}),
        "timm, 7 classes": sweep(others, {"num_classes": 7}),
        "timm, no classifier, 1 channel": sweep(others, {"num_classes": 0, "in_chans": 1}),
    }
    versions = ", ".join(f"{name} {version}" for name, version in sorted(VERSIONS.items()))
    lines = [
        f"# Whose weights these are: `python tests/sweeps/recognise.py` ({versions})",
        "",
        "recognised: one answer, the right one. listed: several models have these tensors, the right one among",
        "them. torchvision's rows count its models and their variants with auxiliary heads.",
        "",
        "| weights | models | recognised | listed | missed | answered |",
        "|---|---|---|---|---|---|",
        *(row(title, results) for title, results in parts.items()),
    ]
    for verdict, title in (("missed", "Missed"), ("listed", "Listed")):
        lines += ["", f"## {title}", ""]
        lines += sorted(
            {
                f"- {part}: {name}: {result.words}" if verdict == "missed" else f"- {result.words}"
                for part, results in parts.items()
                for name, result in results.items()
                if result.verdict == verdict and (verdict == "missed" or "7 classes" in part)
            }
        ) or ["None."]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
