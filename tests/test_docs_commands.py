"""Every command on every page: parsed in any case, and run where the page says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.cli.main import COMMANDS
from phi3_jax.system.compat import option_strings
from tests.helpers.page_commands import PAGES, ROOT, blocks, check, inline, parser_of


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_can_be_parsed_and_the_page_says_what_they_need(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        assert block.mark is not None, f"neither <!-- run --> nor <!-- needs: ... --> is before: {block.text}"
        for words in block.commands:
            check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_in_a_pages_sentences_are_there(page):
    for words in inline(page):
        if words[0] != "phi3-jax":
            check([word for word in words if word != "-e"])
        elif len(words) > 1 and words[1] in COMMANDS and words[2:]:
            parser, rest = parser_of(words[1:])
            known = option_strings(parser)
            for word in rest:
                name = word.partition("=")[0]
                assert not name.startswith("--") or name in known or name.replace("_", "-") in known, words
        else:
            assert words[1:] == [] or words[1] in (*COMMANDS, "COMMAND", "--version"), words


def test_there_are_commands_on_the_pages():
    """Else a page that is written otherwise would pass unread."""
    marks = [block.mark for page in PAGES for block in blocks(page)]
    assert len(marks) > 20
    assert marks.count("run") >= 5
    assert sum(1 for page in PAGES for _ in inline(page)) > 40


WITH_RUNS = [page for page in PAGES if any(block.mark == "run" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_RUNS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path):
    """In their order, in a folder with the repository's `phi3_jax` and `configs`; each block starts in that folder."""
    program = tmp_path / "bin" / "phi3-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m phi3_jax "$@"\n')
    program.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("phi3_jax", "configs"):
        (here / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks(page):
        if block.mark != "run":
            continue
        done = subprocess.run(
            ["bash", "-ec", block.script],
            cwd=here,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
