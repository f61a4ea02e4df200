"""Every shipped study can be run, and every number of its findings is in its results."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from ctxlab.cli.main import COMMANDS
from ctxlab.study.claims import check, claims
from ctxlab.study.readme import Study

STUDIES = sorted(path.parent for path in (Path(__file__).parents[2] / "experiments").glob("*/README.md"))
pytestmark = pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)


def test_it_has_a_question_lines_and_findings(folder: Path) -> None:
    study = Study(folder)
    assert study.question.endswith("?")
    assert study.lines([command.name for command in COMMANDS])
    assert study.takes
    findings = study.section("Findings")
    assert findings is not None
    assert "".join(findings.lines).strip()


def test_its_numbers_are_in_its_results(folder: Path) -> None:
    found, wrong = check(Study(folder))
    assert wrong == []
    assert found > 0


@pytest.mark.parametrize("most", [10, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_changed_digit_of_its_findings_is_noticed(folder: Path, most: int, tmp_path: Path) -> None:
    """Numbers of the findings in turn, one more in the last digit: so many of them, drawn at random."""
    study = Study(Path(shutil.copytree(folder, tmp_path / folder.name)))
    text = study.readme.read_text(encoding="utf-8")
    above, findings = text[: text.index("## Findings")], text[text.index("## Findings") :]
    places = [
        (printed, match.start())
        for printed in dict.fromkeys(claim.number.text for claim in claims(study))
        for match in re.finditer(
            rf"(?<=[|\[] ){re.escape(printed)}(?= [|±])|(?<=\[){re.escape(printed)}(?=\])", findings
        )
    ]
    unnoticed = []
    for printed, start in random.Random(0).sample(places, min(most, len(places))):
        last = start + max(n for n, c in enumerate(printed) if c.isdigit())
        other = findings[:last] + str((int(findings[last]) + 1) % 10) + findings[last + 1 :]
        study.readme.write_text(above + other, encoding="utf-8")
        if not check(Study(study.folder))[1]:
            unnoticed.append(f"{printed} at {start}: {findings[start - 40 : start + len(printed) + 20]!r}")
    assert unnoticed == []
