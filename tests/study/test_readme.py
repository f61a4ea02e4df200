"""What a study's README may say, and what is refused before anything of it runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.errors import ConfigError
from ctxlab.study.readme import Line, asks_for_several, find, selected, studies, with_overrides, with_runs
from tests.study.builders import COMMANDS, make_study

SCRIPT = {"look.py": "print(1)\n"}


def words(root: Path, run: str) -> list[tuple[str, ...]]:
    return [(line.program, *line.words) for line in make_study(root, run, files=SCRIPT).lines(COMMANDS)]


def test_lines_are_read_as_a_shell_would_read_them(tmp_path: Path) -> None:
    run = """
# a comment
ctxlab train -m position=rope,alibi \\
    seed=1,2      # two of each
ctxlab train note='a; b & $c' data.path="x y" eval.perplexity.lengths=[256,1k]
python experiments/mine/look.py a 'b c'
"""
    assert words(tmp_path, run) == [
        ("ctxlab", "train", "-m", "position=rope,alibi", "seed=1,2"),
        ("ctxlab", "train", "note=a; b & $c", "data.path=x y", "eval.perplexity.lengths=[256,1k]"),
        ("python", "experiments/mine/look.py", "a", "b c"),
    ]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Cs")), max_size=12)))
def test_quoted_words_arrive_as_they_are(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    line = shlex.join(["ctxlab", "train", *(f"note={value}" for value in values)])
    assert words(tmp_path_factory.mktemp("study"), line) == [("ctxlab", "train", *(f"note={v}" for v in values))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rm -rf results", "expected `ctxlab ...` or `python experiments/mine/FILE.py ...`, got 'rm -rf results'"),
        ("OMP_NUM_THREADS=1 ctxlab train", "expected `ctxlab ...`"),
        ("ctxlab", "expected `ctxlab ...`"),
        ("/usr/bin/ctxlab train", "expected `ctxlab ...`"),
        ("ctxlab train; rm x", "';' is for a shell, and a study has none"),
        ("ctxlab train && rm x", "'&' is for a shell"),
        ("ctxlab train | tee x", "'|' is for a shell"),
        ("ctxlab train > x", "'>' is for a shell"),
        ("ctxlab train seed=$SEED", "'$' is for a shell"),
        ('ctxlab train note="$(rm x)"', "'$' is for a shell"),
        ("ctxlab train note=`rm x`", "'`' is for a shell"),
        ("ctxlab train data.path=*.txt", "'*' is for a shell"),
        ("ctxlab train seed={1,2}", "'{' is for a shell"),
        ("ctxlab train note='open", "No closing quotation"),
        ("ctxlab trian", "ctxlab trian is no command for a study; did you mean 'train'?"),
        ("ctxlab experiment run mine", "ctxlab experiment is no command for a study"),
        ("ctxlab runs rm last", "ctxlab runs is no command for a study"),
        ("ctxlab _run runs/x", "ctxlab _run is no command for a study"),
        ("ctxlab train paths.runs=/tmp/x", "paths.runs: is for whoever runs the study"),
        ("ctxlab train --plugin /tmp/evil.py", "--plugin: expected a script of the study"),
        ("ctxlab train --plugin=/tmp/evil.py", "--plugin: expected a script of the study"),
        ("python", "expected `ctxlab ...`"),
        ("python -c 'import os'", "python: expected a script of the study, experiments/mine/FILE.py, got '-c'"),
        ("python look.py", "python: expected a script of the study"),
        ("python /tmp/evil.py", "python: expected a script of the study"),
        ("python experiments/other/look.py", "python: expected a script of the study"),
        ("python experiments/mine/../other/look.py", "python: expected a script of the study"),
        ("python experiments/mine/link.py", "python: expected a script of the study"),
        ("python experiments/mine/README.md", "python: expected a script of the study"),
        ("python experiments/mine/gone.py", "python: there is no file"),
    ],
)
def test_what_is_no_line_is_refused_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    outside = tmp_path / "evil.py"
    outside.write_text("")
    study = make_study(tmp_path, f"ctxlab train\n{line}\nctxlab train seed=2", files=SCRIPT)
    (study.folder / "link.py").symlink_to(outside)
    with pytest.raises(ConfigError) as refused:
        study.lines(COMMANDS)
    (only,) = str(refused.value).splitlines()
    assert only.startswith(f"{study.readme}:9: ")
    assert said in only


def test_every_wrong_line_is_named_and_a_line_stands_there_once(tmp_path: Path) -> None:
    study = make_study(tmp_path, "rm a\nctxlab train seed=1\nctxlab train  'seed=1'\nrm b")
    with pytest.raises(ConfigError) as refused:
        study.lines(COMMANDS)
    assert [text.partition(": ")[0].rpartition(":")[2] for text in str(refused.value).splitlines()] == ["8", "10", "11"]
    assert "stands there twice" in str(refused.value)


@pytest.mark.parametrize(
    "text", ["# Does it?\n", "# Does it?\n\n## Run\n\nSoon.\n", "# Does it?\n\n## Run\n\n```sh\nctxlab\n"]
)
def test_a_study_without_a_block_says_so(tmp_path: Path, text: str) -> None:
    study = make_study(tmp_path)
    study.readme.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="has no fenced block under '## Run'"):
        type(study)(study.folder).lines(COMMANDS)


def test_a_heading_inside_a_block_is_no_heading(tmp_path: Path) -> None:
    study = make_study(tmp_path, "## a comment\nctxlab train")
    assert [line.text for line in study.lines(COMMANDS)] == ["ctxlab train"]
    assert (study.question, study.takes) == ("Does it?", "a second")


@pytest.mark.parametrize(
    ("sentence", "takes"),
    [
        ("Takes 1.5 hours on a GPU. More elsewhere.", "1.5 hours on a GPU"),
        ("Takes ten minutes (two cores)", "ten minutes"),
        ("Takes ten minutes: six runs", "ten minutes"),
        ("It takes long.", ""),
    ],
)
def test_how_long_it_takes(tmp_path: Path, sentence: str, takes: str) -> None:
    study = make_study(tmp_path)
    study.readme.write_text(f"# Q\n\n## Run\n\n```sh\nctxlab train\n```\n\n{sentence}\n", encoding="utf-8")
    assert type(study)(study.folder).takes == takes


def test_own_studies_stand_before_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = set(studies())
    assert {"extrapolation", "overhead", "position_cost"} <= shipped
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, name="mine")
    make_study(tmp_path, name="overhead")
    assert set(studies()) == shipped | {"mine"}
    assert find("overhead").folder == Path("experiments/overhead")
    assert find("position_cost").folder.is_absolute()
    with pytest.raises(ConfigError, match="there is no study 'overhaed'; did you mean 'overhead'"):
        find("overhaed")


def test_files_of_the_study_are_found_where_they_are(tmp_path: Path) -> None:
    study = make_study(tmp_path, files=SCRIPT)
    assert study.located("experiments/mine/look.py") == str(study.folder / "look.py")
    assert study.located("tokenizer.path=experiments/mine/t.model") == f"tokenizer.path={study.folder / 't.model'}"
    assert study.located("note=see experiments/mine/x") == "note=see experiments/mine/x"
    assert study.located("experiments/mines/look.py") == "experiments/mines/look.py"


class TestOverrides:
    def lines(self, root: Path) -> list[Line]:
        run = "ctxlab train seed=1 context=64\nctxlab eval last\npython experiments/mine/look.py"
        return make_study(root, run, files=SCRIPT).lines(COMMANDS)

    def test_each_line_gets_what_its_command_knows(self, tmp_path: Path) -> None:
        changed = with_overrides(self.lines(tmp_path), ["trainer.max_steps=2", "seed=3"])
        assert [line.words for line in changed] == [
            ("train", "context=64", "trainer.max_steps=2", "seed=3"),
            ("eval", "last", "seed=3"),
            ("experiments/mine/look.py",),
        ]
        assert changed[0].text == "ctxlab train context=64 trainer.max_steps=2 seed=3"

    def test_how_it_is_run_is_no_part_of_what_a_line_is(self, tmp_path: Path) -> None:
        before = self.lines(tmp_path)
        changed = with_overrides(before, ["sweep.jobs=4", "logger.mode=disabled"])
        assert [line.text for line in changed] == [line.text for line in before]
        assert [line.how for line in changed] == [("sweep.jobs=4", "logger.mode=disabled")] * 2 + [()]

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("traner.max_steps=2", "traner.max_steps: no line of the study has it; did you mean 'trainer.max_steps'"),
            ("fast", "expected key=value, got 'fast'"),
            ("paths.runs=x", "paths.runs: of a whole study: --runs DIR"),
        ],
    )
    def test_what_no_line_has_is_refused(self, tmp_path: Path, override: str, said: str) -> None:
        with pytest.raises(ConfigError) as refused:
            with_overrides(self.lines(tmp_path), [override])
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("words", "names", "written"),
    [
        (("eval", "last", "seed=2"), ("last",), ("eval", "run=a-1", "seed=2")),
        (("eval", "seed=2", "run=[x,y]"), ("x", "y"), ("eval", "seed=2", "run=[a-1,b-2]")),
        (("eval", "[x,y]"), ("x", "y"), ("eval", "run=[a-1,b-2]")),
    ],
)
def test_runs_are_written_out_in_their_place(
    words: tuple[str, ...], names: tuple[str, ...], written: tuple[str, ...]
) -> None:
    line = Line("", "ctxlab", words)
    assert asks_for_several(line, "run") == any("[" in word for word in words)
    assert selected(line) == {"run": names}
    assert with_runs(line, {"run": ("a-1", "b-2")[: len(names)]}) == written


def test_a_sweep_starts_from_a_run_of_the_lines_before_it_too() -> None:
    line = Line("", "ctxlab", ("train", "-m", "init=reader", "data=squad", "seed=1,2"))
    assert selected(line) == {"init": ("reader",)}
    assert with_runs(line, {"init": ("reader-a1",)}) == ("train", "-m", "init=reader-a1", "data=squad", "seed=1,2")


def test_where_a_script_leaves_its_output() -> None:
    assert Line("", "python", ("experiments/mine/look.py",)).output == "look.txt"
    assert Line("", "python", ("experiments/mine/look.py", "long", "a/../b c")).output == "look-long-a-..-b-c.txt"
