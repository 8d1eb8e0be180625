"""colab.ipynb: Jupyter really runs it from top to bottom, on the CPU, with stand-ins for what only Colab has; and what
can be seen without running it: a notebook without outputs, whose commands the two programs accept.

A test fills in the forms as a person does, and changes nothing else of a cell.
"""

import ast
import base64
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import openpyxl
import pytest
from conftest import ROOT, rows
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import chat
import finetune

NOTEBOOK = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
COMMANDS = re.findall(r"^\s*!python (\w+)\.py(.*)$", "\n".join(CODE.values()), re.M)
FORMS = dict(re.findall(r"^(\w+) = (.+?)  # @param \{type:", "\n".join(CODE.values()), re.M))
SHORT = "--max-steps 2 --eval-questions 4 --max-new-tokens 8 --replay-fraction 0"

COLAB = '''\
"""What only Colab has: Drive, the button for uploads, downloads. Where files come from and go to, the test says."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace


def upload():
    """As Colab's: a mapping of names to contents, empty if the person cancels."""
    return {Path(path).name: Path(path).read_bytes() for path in os.environ["UPLOAD"].split()}


drive = SimpleNamespace(mount=lambda folder: print("Mounted at", folder))
files = SimpleNamespace(upload=upload, download=lambda path: shutil.copy(path, os.environ["DOWNLOADS"]))
'''


# ----------------------------------------------------------------------------------------------------------------------
# Without running it


def test_is_a_notebook_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] >= 5
    nbformat.validate(nbformat.from_dict(NOTEBOOK))
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", id) for id in ids)
    for cell in NOTEBOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"outputs", "execution_count"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell) == keys and cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1])


@pytest.mark.parametrize("cell", CODE)
def test_cells_are_python(cell):
    ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", CODE[cell], flags=re.M))  # lines of the shell are not


@pytest.mark.parametrize(("program", "line"), COMMANDS)
def test_commands_have_flags_that_exist(program, line):
    """As they are with the forms as they stand; what the cells compute for themselves is put in here."""
    values = {"DATA": "data/faq_sample.json", "OUTPUT": "adapter", "RESUME": "--resume", "ASKED": "'Why?'"}
    values |= {name: str(ast.literal_eval(value)) for name, value in FORMS.items()}
    words = shlex.split(re.sub(r"\$(\w+)|\{(\w+)\}", lambda found: values[found[1] or found[2]], line))
    config = {"finetune": finetune.parse, "chat": chat.parse_options}[program](words)  # an unknown flag exits
    known = vars(config) | (vars(config.parameters) if program == "chat" else {})
    for word in words:
        if word.startswith("--") and word != "--data":  # of which the sample is the default
            name = word[2:].replace("-", "_")
            defaults = type(config)() if hasattr(config, name) else type(config.parameters)()
            assert known[name] != getattr(defaults, name), f"{word} is the default"


def test_both_programs_are_shown():
    assert {program for program, _ in COMMANDS} == {"finetune", "chat"} and len(COMMANDS) >= 3
    with pytest.raises(SystemExit):  # what a flag that is gone would do
        finetune.parse(["--no-such-flag"])


def test_names_every_format_that_is_read():
    text = "".join(line for cell in NOTEBOOK["cells"] for line in cell["source"])
    assert all(f"`.{kind}`" in text for kind in ("csv", "json", "jsonl", "xlsx", "parquet"))
    assert "OWNER" not in text


# ----------------------------------------------------------------------------------------------------------------------
# Running it


def newer_wheels(folder: Path) -> None:
    """What pip would replace this machine's torch and torchvision by. There is nothing in them."""
    for name in ("torch", "torchvision"):
        version = importlib.metadata.version(name).partition("+")[0] + ".post1"
        inside = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{inside}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{inside}/RECORD", "")


@pytest.fixture
def colab(tmp_path):
    """colab(cells, form values, upload=file) -> {cell: all that it printed}. The first working folder is `content`."""
    for name in ("stubs/google", "content", "drive", "downloads", "wheels"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stubs/google/colab.py").write_text(COLAB, encoding="utf-8")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "stubs"),
        "DOWNLOADS": str(tmp_path / "downloads"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        # pip tells what it would install, of what lies in a folder, and installs nothing.
        "PIP_DRY_RUN": "1",
        "PIP_QUIET": "0",  # a CI's own would empty the cell's list of packages
        "PIP_REPORT": str(tmp_path / "pip.json"),
        "PIP_UPGRADE": "1",
        "PIP_UPGRADE_STRATEGY": "eager",
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
    }

    def run(cells=CODE, upload="", **forms) -> dict[str, str]:
        notebook = nbformat.read(ROOT / "colab.ipynb", as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.id in cells]
        for name, value in forms.items():
            filled = [fill_in(cell, name, value) for cell in notebook.cells]
            assert sum(filled) == 1, f"{name} is a field of {sum(filled)} cells"
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "content")}})
        client.execute(env=os.environ | environment | {"UPLOAD": str(upload)})
        return {cell.id: "".join(map(shown, cell.outputs)) for cell in notebook.cells}

    return run


def fill_in(cell, name: str, value: str | int) -> int:
    """As the form does it, which Colab shows beside such a line."""
    field = rf"^{name} = .+?(?=  # @param )"
    cell.source, count = re.subn(field, lambda _: f"{name} = {json.dumps(value)}", cell.source, flags=re.M)
    return count


def shown(output) -> str:
    data = output.get("data", {})
    return output.get("text") or data.get("text/html") or " ".join(data)


def copy_code(folder: Path) -> Path:
    """What a clone of the repository has, as far as the notebook uses it."""
    shutil.copytree(ROOT / "data", folder / "data")
    for name in ("finetune.py", "chat.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def sheet(path: Path, count: int) -> Path:
    """The first rows of the sample as Excel has them."""
    book = openpyxl.Workbook()
    for row in [("question", "answer"), *((row["question"], row["answer"]) for row in rows(count))]:
        book.active.append(row)
    book.save(path)
    return path


def test_installing_keeps_the_torch_that_is_here(colab, tmp_path):
    copy_code(tmp_path / "content")
    newer_wheels(tmp_path / "wheels")
    colab(["code", "install"])
    assert json.loads((tmp_path / "pip.json").read_text())["install"] == []


def test_runs_from_top_to_bottom_with_an_uploaded_sheet(colab, embedded, tmp_path):
    """The model is the default without a GPU."""
    copy_code(tmp_path / "content")
    drive, question = tmp_path / "drive/My FAQ", """What's a "deductible", in $?"""
    fields = {"FOLDER": str(drive), "MORE_FLAGS": SHORT, "RUN": "first try", "QUESTION": question, "LONGEST": 8}
    printed = colab(upload=sheet(tmp_path / "faq.xlsx", 24), **fields)

    [upload] = drive.glob("upload-*")
    assert [path.name for path in upload.iterdir()] == ["faq.xlsx"]
    assert "24 rows -> 19 train, 5 held out" in printed["data"] and "Nothing was written" in printed["data"]
    run = json.loads((drive / "first try/run.json").read_text())
    assert run["training"]["steps"] == 2 and run["data"]["files"][0]["path"] == str(upload / "faq.xlsx")
    assert "\x1b" not in printed["chat"]

    evaluation = run["evaluation"]
    assert f"Did it help? {evaluation['verdict']['sentence']}" in printed["result"]
    assert f"Or should I look answers up? {evaluation['advice']['sentence']}" in printed["result"]
    assert "image/png" in printed["result"]
    [page] = re.findall(r'src="data:text/html;base64,([^"]*)"', printed["result"])
    assert base64.b64decode(page) == (drive / "first try/report.html").read_bytes()

    assert "[base]" in printed["chat"] and "[first try]" in printed["chat"] and "[retrieved]" in printed["chat"]
    with zipfile.ZipFile(tmp_path / "downloads/first try.zip") as archive:
        names = {"adapter_model.safetensors", "report.html", "README.md"}
        assert {f"first try/{name}" for name in names} <= set(archive.namelist()) and not archive.testzip()


def test_goes_on_where_it_was_stopped_and_trains_nothing_twice(colab, tiny_model, tmp_path):
    content, drive = copy_code(tmp_path / "content"), tmp_path / "drive"
    flags = f"--model {tiny_model} --num-train-epochs 8 --lora-r 4 --eval-questions 4 --max-new-tokens 8"
    command = [sys.executable, "finetune.py", "--data", "data/faq_sample.json", "--output-dir", drive / "adapter"]
    process = subprocess.Popen([*command, *flags.split()], cwd=content, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not finetune.last_checkpoint(drive / "adapter.partial") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    done = int(finetune.last_checkpoint(drive / "adapter.partial").name.partition("-")[2])

    fields = {"FOLDER": str(drive), "MORE_FLAGS": flags}
    printed = colab(["code", "drive", "data", "train"], **fields)  # the upload is cancelled
    training = json.loads((drive / "adapter/run.json").read_text())["training"]
    assert 0 < done < training["steps"] and "Saved" in printed["train"]
    assert "\x1b" not in printed["data"] + printed["train"], "a cell cannot repaint what it shows"
    assert not re.search(rf"update +0*{done}/", printed["train"]), "it began from the start"
    saved = (drive / "adapter/run.json").stat().st_mtime_ns

    printed = colab(["code", "drive", "train"], FOLDER=str(drive))
    assert "is finished, so nothing was trained now" in printed["train"]
    assert (drive / "adapter/run.json").stat().st_mtime_ns == saved


def test_data_that_cannot_be_trained_stop_it(colab, tmp_path):
    copy_code(tmp_path / "content")
    (tmp_path / "faq.csv").write_text("question,answer\nWhy?,\n")
    with pytest.raises(CellExecutionError, match="Mend it and run this cell again") as stopped:
        colab(["code", "drive", "data", "train"], upload=tmp_path / "faq.csv", FOLDER=str(tmp_path / "drive"))
    assert "faq.csv, row 1: 'answer' is empty" in str(stopped.value)


def test_the_last_upload_is_used_where_there_is_none_now(colab, tmp_path):
    copy_code(tmp_path / "content")
    for second, text in enumerate(("question,answer\nWhy?,\n", "question,answer\n,Because.\n")):
        (tmp_path / f"drive/upload-2026-11-30-00000{second}").mkdir()
        (tmp_path / f"drive/upload-2026-11-30-00000{second}/faq.csv").write_text(text)
    with pytest.raises(CellExecutionError) as stopped:
        colab(["code", "drive", "data"], FOLDER=str(tmp_path / "drive"))
    assert "000001/faq.csv, row 1: 'question' is empty" in str(stopped.value) and "000000" not in str(stopped.value)


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_fetches_the_code_from_the_address_of_its_page(colab, tmp_path):
    origin, got = tmp_path / "origin", tmp_path / "content/finetune-faq/finetune.py"
    origin.mkdir()
    copy_code(origin)
    author = ("-c", "user.name=A test", "-c", "user.email=test@example.com")
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "All"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    printed = colab(["code"], REPOSITORY=f"{origin}/blob/main/colab.ipynb")
    assert got.read_bytes() == (ROOT / "finetune.py").read_bytes() and str(got.parent) in printed["code"]
    assert str(got.parent) in colab(["code"])["code"]  # a new session: what is there is not fetched again


@pytest.mark.parametrize(
    ("address", "expected"),
    [("", "REPOSITORY is empty: put in the address"), ("/nowhere/at/all", "No finetune.py came from /nowhere/at/all")],
)
def test_an_address_without_the_code_is_told(address, expected, colab, tmp_path):
    with pytest.raises(CellExecutionError, match=expected):
        colab(["code"], REPOSITORY=address)
    assert not list((tmp_path / "content").iterdir())
