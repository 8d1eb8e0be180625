"""colab.ipynb: a notebook that Jupyter and Colab open, whose commands the two programs accept."""

import ast
import json
import re
import shlex

import pytest
from conftest import ROOT

import chat
import finetune

NOTEBOOK = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = re.findall(r"^\s*!python (\w+)\.py(.*)$", "\n".join(CODE), re.M)


def test_is_a_notebook_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] >= 5
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", id) for id in ids)
    for cell in NOTEBOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"outputs", "execution_count"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell) == keys and cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1])


@pytest.mark.parametrize("code", CODE)
def test_cells_are_python(code):
    ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", code, flags=re.M))  # lines of the shell are not


@pytest.mark.parametrize(("program", "line"), COMMANDS)
def test_commands_have_flags_that_exist(program, line):
    words = shlex.split(line)
    config = {"finetune": finetune.parse, "chat": chat.parse_options}[program](words)  # an unknown flag exits
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            assert getattr(config, name) != getattr(type(config)(), name), f"{word} is the default"


def test_both_programs_are_shown():
    assert {program for program, _ in COMMANDS} == {"finetune", "chat"} and len(COMMANDS) >= 4
    with pytest.raises(SystemExit):  # what a flag that is gone would do
        finetune.parse(["--no-such-flag"])
