"""What users of such programs run into: each kind of trouble with the files in tests/cases/ and others like them."""

import codecs
import csv
import datetime
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from functools import cache
from pathlib import Path

import openpyxl
import pyarrow
import pytest
from conftest import ROOT, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import finetune
from finetune import BadInput, Config, load_data

CASES = Path(__file__).parent / "cases"
PAIR = rows(1)[0]
TURNS = [{"role": "user", "content": "What is hail?"}, {"role": "assistant", "content": "Ice."}]


def load(*paths, **flags) -> finetune.Data:
    return load_data(Config(data=tuple(map(Path, paths)), **flags))


def refused(*paths, **flags) -> str:
    """The message with which the data is refused."""
    with pytest.raises(BadInput) as problem:
        load(*paths, **flags)
    return str(problem.value)


def write(folder: Path, name: str, content) -> Path:
    """A file of bytes, of text, or of records in the format that its ending says."""
    path = folder / name
    if isinstance(content, list):
        lines = path.suffix == ".jsonl"
        content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def workbook(path: Path, *sheets: list[list]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, cells in enumerate(sheets, 1):
        sheet = book.create_sheet(f"Sheet {number}")
        for line in cells:
            sheet.append(line)
    book.save(path)
    return path


def questions(data: finetune.Data) -> set[str]:
    return {row.question for row in data.train + data.eval}


def without(record: dict, *keys: str) -> dict:
    return {key: value for key, value in record.items() if key not in keys}


# ----------------------------------------------------------------------------------------------------------------------
# Files that are read, and what is said of them

READ = {  # file: flags, rows, rows held out, what the notes say
    "five_labels.jsonl": ({}, 120, 24, ["5 different answers", "in 24 of 120 rows"]),
    "catalogue_200.jsonl": ({}, 200, 40, []),
    "yes_no.jsonl": ({}, 60, 12, ["2 different answers"]),
    "same_answer.jsonl": ({}, 24, 5, ["1 different answers", "stands in 24 of 24 rows"]),
    "mt_half_thanks.jsonl": ({}, 60, 12, ["'You are welcome.', stands in 30 of 60 rows"]),
    "header_again.csv": ({}, 34, 7, ["repeated header lines left out in 1 row, the first: ", "row 25"]),
    "mojibake.jsonl": ({}, 24, 5, ["garbled", "in 24 rows, the first: ", "line 1"]),
    "html.jsonl": ({}, 24, 5, ["HTML", "in 24 rows, the first: ", "line 1"]),
    "excel_trailing_cols.csv": ({}, 24, 5, []),
    "header_space.csv": ({"question_field": "Frage", "answer_field": "Antwort"}, 24, 5, []),
    "cr_only.csv": ({}, 24, 5, []),
    "list_named.jsonl": ({}, 24, 5, ["is one JSON list"]),
    "conv_role_content.jsonl": ({}, 24, 5, []),
}


@pytest.mark.parametrize("name", READ)
def test_files_that_are_read(name):
    flags, count, held_out, words = READ[name]
    data = load(CASES / name, **flags)
    assert (len(data.train) + len(data.eval), len(data.eval)) == (count, held_out)
    notes = "\n".join(data.notes)
    assert all(word in notes for word in words), notes
    assert "columns not used" not in notes


REFUSED = {  # file: flags, what the message says
    "dupkeys.jsonl": ({}, ["line 1 and 23 more", "'answer' twice"]),
    "hugeint.jsonl": ({}, ["line 7", "too many digits"]),
    "na_answers.csv": ({}, ["row 1 and 5 more (row 5, row 9,", "'answer'", "#REF!"]),
    "no_header.csv": ({}, ["row 1 and 22 more", "--question-field"]),
    "null_split.jsonl": ({"split_field": "split"}, ["line 3 and 5 more", "'split' is empty"]),
    "sg_same_role.json": ({}, ["row 4", "turn 2", "by the user", "assistant's turn"]),
    "unbalanced_pair.csv": ({}, ["line 11", "4 lines shaped like rows", "How do I store a fence?"]),
    "msgs_weight0.jsonl": ({}, ["0 different rows", '"weight": 0 in 24 rows']),
    "book.xlsx": ({}, ["no workbook that can be read"]),  # its parts are no XML: a damaged one
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name):
    flags, words = REFUSED[name]
    message = refused(CASES / name, **flags)
    assert all(word in message for word in [name, *words]), message
    assert len(message.splitlines()) == 1


def turns(*changes: dict) -> list[dict]:
    """One row of messages; each dict changes a turn."""
    some = [turn | change for turn, change in itertools.zip_longest(TURNS, changes, fillvalue={})]
    return [{"messages": some}]


VARIANTS = {  # kind: name, content, flags, what the message says
    "key twice in a turn": (
        "a.json",
        '[{"question": "a", "answer": "b"}, {"messages": [{"role": "user", "content": "a", "content": "b"}]}]',
        {},
        ["row 2", "'content' twice"],
    ),
    "key twice in what is not used": (
        "a.jsonl",
        '{"question": "a", "answer": "b", "meta": {"x": 1, "x": 2}}',
        {},
        ["'x' twice"],
    ),
    "keys that differ in case": (
        "a.jsonl",
        [{"Answer": "a", "answer": "b", "question": "c"}],
        {},
        ["'Answer' and 'answer'"],
    ),
    "columns that differ in case": ("a.csv", "question,answer,ANSWER\na,b,c\n", {}, ["'answer' twice"]),
    "columns that differ in a space": ("a.tsv", "question\tanswer\tanswer \na\tb\tc\n", {}, ["'answer' twice"]),
    "Excel's error": ("a.csv", "question,answer\na,#VALUE!\n", {}, ["row 1", "'answer'", "empty cell"]),
    "pandas' empty": ("a.jsonl", [{"question": "<NA>", "answer": "b"}], {}, ["line 1", "'question'", "empty cell"]),
    "MySQL's empty": ("a.tsv", "question\tanswer\na\t\\N\n", {}, ["row 1", "empty cell"]),
    "Alpaca's input": ("a.csv", "instruction,input,output\na,NULL,b\n", {}, ["row 1", "'input'", "empty cell"]),
    "Alpaca's input as a number": (
        "a.jsonl",
        [{"instruction": "a", "input": 0, "output": "b"}],
        {},
        ["'input' is a number"],
    ),
    "in a turn": ("a.jsonl", turns({}, {"content": "N/A"}), {}, ["turn 2", "empty cell"]),
    "null": ("a.jsonl", [{"question": "a", "answer": None}], {}, ["'answer' is null"]),
    "a called tool": ("a.jsonl", turns({}, {"tool_calls": [{"id": "x"}]}), {}, ["turn 2", "'tool_calls'"]),
    "reasoning": ("a.jsonl", turns({}, {"reasoning_content": "Hm."}), {}, ["turn 2", "'reasoning_content'"]),
    "a called function": ("a.jsonl", turns({}, {"function_call": {"name": "x"}}), {}, ["turn 2", "'function_call'"]),
    "a name": ("a.jsonl", turns({"name": "Ann"}), {}, ["turn 1", "'name'"]),
    "an image": (
        "a.jsonl",
        turns({"content": [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}]}),
        {},
        ["turn 1", "(image)", "only text"],
    ),
    "a weight that is none": ("a.jsonl", turns({}, {"weight": 0.5}), {}, ["turn 2", "'0.5'", "0 or 1"]),
    "an answer first": ("a.jsonl", [{"messages": TURNS[1:]}], {}, ["turn 1", "user's turn"]),
    "a system turn inside": (
        "a.jsonl",
        [{"messages": [*TURNS, {"role": "system", "content": "x"}, *TURNS]}],
        {},
        ["turn 3", "by the system"],
    ),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00abc", {}, ["is gzip"]),
    "zip": ("a.json", b"PK\x03\x04abc", {}, ["is zip or .xlsx"]),
    "PDF": ("a.csv", b"%PDF-1.7\n", {}, ["is PDF"]),
    "old Excel": ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", {}, ["is old Excel"]),
    "Parquet without ending": ("rows", b"PAR1\x15\x04", {}, ["is Parquet"]),
    "UTF-16": (
        "a.csv",
        codecs.BOM_UTF16_LE + "question,answer\n".encode("utf-16-le"),
        {},
        ["UTF-16", "save it as UTF-8"],
    ),
    "UTF-16 without a mark": ("a.json", '[{"question": "a"}]'.encode("utf-16-le"), {}, ["UTF-16"]),
    "no workbook": ("a.xlsx", "question,answer\na,b\n", {}, ["no workbook"]),
    "no Parquet file": ("a.parquet", "question,answer\na,b\n", {}, ["no Parquet file"]),
    "JSON Lines named .json": ("a.json", '{"question": "a"}\n{"question": "b"}\n', {}, ["line 2", "name it .jsonl"]),
    "a broken list named .jsonl": ("a.jsonl", '[\n {"question": "a"},\n {"question": }\n]', {}, ["line 3, column 15"]),
    "a huge number in a list": (
        "a.json",
        '[{"question": "a", "answer": ' + "9" * 5000 + "}]",
        {},
        ["row 1", "too many digits"],
    ),
    "nested too deeply": ("a.json", "[" * 100_000, {}, ["nested too deeply"]),
    "a stray quote": (
        "a.csv",
        'question;answer\nWhy 0?;So 0.\nWhy 1?;"So 1.\nWhy 2?;So 2.\nWhy 3?;So 3."\nWhy 4?;So 4.\n',
        {},
        ["line 5", "2 lines shaped like rows", "Why 2?"],
    ),
    "a name in another spelling": (
        "a.csv",
        "Frage,Antwort\na,b\nc,d\n",
        {"question_field": "Fragen", "answer_field": "Antwort"},
        ["row 1 and 1 more (row 2)", "'Fragen'", "Frage, Antwort"],
    ),
    "too large groups": (
        "a.jsonl",
        [
            {"question": f"Why is the {word} so?", "answer": str(n)}
            for word in ("sky blue", "grass very green")
            for n in range(15)
        ],
        {},
        ["30 rows are 2 groups of near-duplicates", "add rows", "--split-field"],
    ),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_are_refused(kind, tmp_path):
    name, content, flags, words = VARIANTS[kind]
    message = refused(write(tmp_path, name, content), **flags)
    assert all(word in message for word in [str(tmp_path / name), *words]), message
    assert len(message.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Grouping, split and labels


def test_labels_tie_no_rows_together_and_unbalanced_sides_are_said():
    """Rows with one label are not one group; where groups of questions shift the labels, that is said."""
    data = load(CASES / "five_labels.jsonl")
    assert max(Counter(data.group_of.values()).values()) <= 4  # "How do I ship a stove?", "How do I sell a stove?"
    assert len({row.answer for row in data.train}) == 5 and {row.answer for row in data.eval} <= {
        row.answer for row in data.train
    }
    assert any("unbalanced: 'repair' stands in 10 of 24 rows there, in 24 of 120 in all" in note for note in data.notes)


def test_a_label_that_dominates_or_is_never_trained_is_said(tmp_path):
    table = [{"question": row["question"], "answer": "yes" if n % 10 else f"no {n}"} for n, row in enumerate(rows(60))]
    notes = "\n".join(load(write(tmp_path, "a.jsonl", table)).notes)
    assert "the commonest, 'yes', stands in 54 of 60 rows" in notes and "held-out answers are never trained" in notes


def test_long_and_rare_answers_tie_rows_together_and_frequent_ones_do_not(tmp_path):
    long = "You can find all of this on the second page of your policy."
    first = [row | {"answer": long} if n < 2 else row for n, row in enumerate(rows(80))]
    assert load(write(tmp_path, "a.jsonl", first)).groups == 1
    often = [row | {"answer": long} if n % 2 else row for n, row in enumerate(rows(80))]
    assert load(write(tmp_path, "b.jsonl", often)).groups == 0


@pytest.mark.parametrize(
    "frame", ["What does part {} weigh?", "What changed in release 2.{}.1?", "Wo liegt Zimmer {}?"]
)
def test_numbers_tell_questions_apart(frame, tmp_path):
    table = [{"question": frame.format(n), "answer": f"{7 * n}."} for n in range(50)]
    data = load(write(tmp_path, "a.jsonl", table))
    assert len(data.eval) == 10 and not data.groups


def test_too_few_held_out_rows_are_said_with_the_reason(tmp_path):
    table = rows(30) + [{"question": f"Why is the sky so very {w}?", "answer": w} for w in ["blue", "gray"] * 15]
    table = [row | {"answer": f"{row['answer']} {n}"} for n, row in enumerate(table)]
    data = load(write(tmp_path, "a.jsonl", table), eval_fraction=0.5)
    assert data.groups and len(data.eval) <= 30
    many = [{"question": f"Why is the sky {n * 'so '}blue?", "answer": str(n)} for n in range(40)] + rows(5)
    notes = "\n".join(load(write(tmp_path, "b.jsonl", many)).notes)
    assert "5 rows are held out instead of 9: near-duplicate groups of up to 40 rows" in notes
    assert "only 5 held-out questions that differ" in notes


def test_normalize_keeps_marks_and_the_names_of_languages():
    hindi = "बीमा क्या है"  # vowel signs are marks, not letters
    assert finetune.normalize(f"{hindi}?") == hindi
    assert finetune.normalize("Is C++ faster than C#?") == "is c++ faster than c#"
    assert (
        finetune.normalize("Is C faster?")
        != finetune.normalize("Is C++ faster?")
        != finetune.normalize("Is C# faster?")
    )
    assert finetune.normalize("Thaïs' naïve  café!") == "thaïs naïve café"


def test_hindi_questions_that_differ_in_vowels_are_two(tmp_path):
    table = rows(30) + [{"question": q, "answer": "हाँ।"} for q in ("दिन क्या है?", "दान क्या है?")]
    assert not load(write(tmp_path, "a.jsonl", table)).dropped


def test_split_values_in_another_case_are_the_same(tmp_path):
    values = ["train", "Test", " test ", "TRAIN", "Dev", "validation "]
    table = [row | {"split": values[n % 6]} for n, row in enumerate(rows(60))]
    data = load(write(tmp_path, "a.jsonl", table), split_field="Split")
    assert (len(data.train), len(data.eval), len(data.test)) == (20, 20, 20)
    assert any("Split: train 20, test 20, dev 10, validation 10" in note for note in data.notes), data.notes
    data = load(tmp_path / "a.jsonl", split_field="split", test_values=("DEV ",), eval_values=("TEST",))
    assert (len(data.train), len(data.eval), len(data.test)) == (30, 20, 10)


@pytest.mark.parametrize("value", [None, "", "  ", "nan"])
def test_an_empty_split_is_an_error(value, tmp_path):
    table = [row | {"fold": value if n == 7 else "test"} for n, row in enumerate(rows(30))]
    message = refused(write(tmp_path, "a.jsonl", table), split_field="fold")
    assert message == f"{tmp_path / 'a.jsonl'}, line 8: 'fold' is empty; say in each row which side it is on"


# ----------------------------------------------------------------------------------------------------------------------
# One problem, once


def test_the_same_problem_in_thirty_rows_is_one_line(tmp_path):
    table = [row | {"answer": "" if n < 30 else row["answer"]} for n, row in enumerate(rows(40))]
    message = refused(write(tmp_path, "a.json", table))
    more = "row 1 and 29 more (row 2, row 3, row 4, row 5, ...)"
    assert message == f"{tmp_path / 'a.json'}, {more}: 'answer' is empty"


def test_of_25_kinds_20_are_shown(tmp_path):
    table = [{"question": "a", "messages": [{"role": f"role {chr(97 + n)}", "content": "x"}]} for n in range(25)]
    lines = refused(write(tmp_path, "a.json", table)).splitlines()
    assert len(lines) == 21 and lines[-1] == "... and 5 more"


def test_of_two_files_the_bad_one_is_named(faq, tmp_path):
    bad = write(tmp_path, "bad.csv", "question,answer\na,\n")
    assert refused(faq, bad) == f"{bad}, row 1: 'answer' is empty"
    other = write(tmp_path, "other.csv", "question,answer\na,b\nc,\n")
    assert refused(faq, bad, other) == f"{bad}, row 1: 'answer' is empty\n{other}, row 2: 'answer' is empty"


def test_too_long_rows_are_told_once_with_one_length(embedded, tmp_path):
    table = [row | {"answer": "word " * (100 + 10 * n)} for n, row in enumerate(rows(24))]
    data, tokenizer = load(write(tmp_path, "a.json", table)), finetune.load_tokenizer(embedded.folder)
    both = data.train + data.eval
    lengths = {row.place: len(finetune.to_example(tokenizer, row).input_ids) for row in both}
    with pytest.raises(BadInput) as problem:
        finetune.encode(tokenizer, both, 64)
    message = str(problem.value)
    assert len(message.splitlines()) == 1 and message.startswith(f"{tmp_path / 'a.json'}, row 1 and 23 more")
    assert f"has {lengths[str(tmp_path / 'a.json') + ', row 1']} tokens" in message
    assert f"--max-length {max(lengths.values())}" in message
    finetune.encode(tokenizer, both, max(lengths.values()))


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_a_header_in_the_middle_is_left_out(tmp_path):
    lines = [f'"{row["question"]}";"{row["answer"]}"' for row in rows(30)]
    lines[20:20] = [" Question ;ANSWER", "QUESTION;answer"]
    data = load(write(tmp_path, "a.csv", "\r".join(["question;answer", *lines])))
    assert (
        len(questions(data)) == 30 and "left out in 2 rows, the first: " in data.notes[0] and "row 21" in data.notes[0]
    )
    again = [*rows(30), {"question": "question", "answer": "Answer"}]
    assert len(questions(load(write(tmp_path, "a.jsonl", again)))) == 30


@pytest.mark.parametrize("ends", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
def test_line_ends_and_separators(ends, delimiter, tmp_path):
    cells = [["question", "answer", "", ""], *([row["question"], row["answer"], "", " "] for row in rows(24))]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=ends).writerows(cells)
    data = load(write(tmp_path, "a.csv", text.getvalue()))
    assert questions(data) == {row["question"] for row in rows(24)} and "not used" not in "".join(data.notes)


def test_answers_of_several_lines_are_not_taken_for_rows(tmp_path):
    table = [
        row | {"answer": f'First, read "it".\nThen sign, if {n} is right.\n\n- one\n- two'}
        for n, row in enumerate(rows(24))
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"])
    writer.writeheader()
    writer.writerows(table)
    assert {row.answer for row in load(write(tmp_path, "a.csv", text.getvalue())).train} <= {
        row["answer"] for row in table
    }


def test_a_workbook_as_people_keep_it(tmp_path):
    """Two sheets, empty columns, a number and a date as answers, and a column that nobody asked for."""
    cells = [["Question ", "answer", None, "date", None]]
    cells += [[row["question"], row["answer"], None, datetime.date(2024, 1, 5), None] for row in rows(24)]
    cells[3][1], cells[4][1] = 7, datetime.datetime(2024, 1, 5)
    data = load(workbook(tmp_path / "a.xlsx", [*cells, [None] * 5], [["other"]]))
    answers = {row.answer for row in data.train + data.eval}
    assert len(questions(data)) == 24 and {"7", "2024-01-05 00:00:00"} < answers
    assert data.notes[:2] == [
        f"{tmp_path / 'a.xlsx'}: only the first of 2 sheets is read: Sheet 1",
        f"{tmp_path / 'a.xlsx'}: columns not used: (no name), date",
    ]


BAD_BOOKS = {
    "two answers": ([["question", "answer", "Answer"], ["a", "b", "c"]], "'answer' twice"),
    "an error cell": ([["question", "answer"], ["a", "#REF!"]], "row 1: 'answer' is only a sign for an empty cell"),
    "an empty cell": ([["question", "answer"], ["a", None], ["b", "c"]], "row 1: 'answer' is empty"),
    "empty": ([], "holds no rows"),
    "only a header": ([["question", "answer"]], "holds no rows"),
}


@pytest.mark.parametrize("case", BAD_BOOKS)
def test_bad_workbooks(case, tmp_path):
    cells, expected = BAD_BOOKS[case]
    assert expected in refused(workbook(tmp_path / "a.xlsx", cells))


@pytest.mark.parametrize("cut", [5, 60, -40, None])
def test_damaged_workbooks(cut, tmp_path):
    raw = bytearray(workbook(tmp_path / "a.xlsx", [["question", "answer"]]).read_bytes())
    raw = raw[:cut] if cut else raw.replace(b"xl/workbook.xml", b"xl/workbook.xxx")
    assert "a.xlsx: is no workbook that can be read" in refused(write(tmp_path, "a.xlsx", bytes(raw)))


def test_parquet_of_messages_with_null_fields(tmp_path):
    """Parquet gives each turn all the fields that any turn has."""
    table = [
        {"messages": [t | {"tool_calls": None, "name": None, "weight": None} for t in
                      ({"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]})]}
        for row in rows(24)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    assert questions(load(tmp_path / "a.parquet")) == {row["question"] for row in rows(24)}
    table[3]["messages"][1]["tool_calls"] = [{"id": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    assert "row 4: turn 2 of 'messages' has 'tool_calls'" in refused(tmp_path / "a.parquet")


def test_parquet_of_pairs(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(rows(24)), tmp_path / "a.parquet")
    assert len(questions(load(tmp_path / "a.parquet"))) == 24
    parquet.write_table(
        pyarrow.Table.from_pylist([*rows(24), {"question": "a", "answer": None}]), tmp_path / "b.parquet"
    )
    assert "row 25: 'answer' is null" in refused(tmp_path / "b.parquet")


# ----------------------------------------------------------------------------------------------------------------------
# Text


def test_what_looks_wrong_is_trained_with_a_note(tmp_path):
    def notes(*answers: str) -> str:
        table = [row | {"answer": answer or row["answer"]} for row, answer in itertools.zip_longest(rows(24), answers)]
        return "\n".join(load(write(tmp_path, "a.jsonl", table)).notes)

    assert "garbled" in notes("Das macht fÃ¼nf Euro.") and "garbled" in notes("Itâ€™s free.")
    assert "garbled" not in notes("Das macht fünf Euro – “frei”.", "naïve café", "日本語", "हाँ", "1 < 2 & 3 > 2")
    assert "HTML" in notes("See <b>this</b>.") and "HTML" in notes("This &amp; that") and "HTML" in notes("a<br/>b")
    assert "HTML" not in notes("1 < 2 & 3 > 2", "Q&A at AT&T", "a <- b")


def test_layouts_of_conversations(tmp_path):
    """Each key goes with each pair of names, and text may come in parts."""

    def row(key, role, text, wrap, n):
        pairs = [("user", rows(24)[n]["question"]), ("assistant", rows(24)[n]["answer"])]
        return {key: [{role: who, text: wrap(said)} for who, said in pairs]}

    def parts(text):
        half = len(text) // 2
        return [{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]

    kinds = itertools.product(["messages", "conversations"], [("role", "content"), ("from", "value")], [str, parts])
    for number, (key, names, wrap) in enumerate(kinds):
        data = load(write(tmp_path, f"{number}.json", [row(key, *names, wrap, n) for n in range(24)]))
        assert {(r.question, r.answer) for r in data.train + data.eval} == {tuple(r.values()) for r in rows(24)}


def test_weight_0_leaves_an_answer_out(tmp_path):
    """Of the first of two answers: it stays in the prompt. Of the last: what is behind the last trained one goes."""

    def conversation(n, *weights):
        said = [turn | {"content": f"{turn['content']} {rows(30)[n]['question']}"} for turn in TURNS * 2]
        for turn, weight in zip(said[1::2], weights, strict=True):
            turn |= {} if weight is None else {"weight": weight}
        return {"messages": said}

    kinds = [(0, None), (None, 0), (1, 1), (0, 0), (False, True)]
    table = [conversation(n, *kinds[n % 5]) for n in range(30)]
    found = finetune.Findings()
    first, last, both, flags = finetune.read_rows(write(tmp_path, "a.jsonl", table), findings=found)[:4]
    assert (len(first.prompt), first.untrained) == (3, {1}) and (len(flags.prompt), flags.untrained) == (3, {1})
    assert (len(last.prompt), last.untrained) == (1, set()) and (len(both.prompt), both.untrained) == (3, set())
    [notes] = found.note_lines()
    assert (
        notes == f'left out because every answer has "weight": 0 in 6 rows, the first: {tmp_path / "a.jsonl"}, line 4'
    )


# ----------------------------------------------------------------------------------------------------------------------
# Labels of conversations, token by token

CONVERSATION = [  # (role, text, weight)
    ("user", "What is hail?", 1), ("assistant", "Balls of ice.", 1), ("user", "Is it covered?", 1),
    ("assistant", "I do not know.", 0), ("user", "Why not?", 1), ("assistant", "I have no policy here.", 1),
    ("user", "Thanks!", 1), ("assistant", "You are welcome.", 1), ("user", "Bye", 1), ("assistant", "Bye.", 0),
]  # fmt: skip


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", ["chatml", "mistral"])
def test_every_answer_is_trained_with_its_end_and_nothing_else(template, system, request):
    source = request.getfixturevalue("embedded" if template == "chatml" else "tiny_model")
    tokenizer = finetune.load_tokenizer(getattr(source, "folder", source))
    turns = ([("system", system, 1)] if system else []) + CONVERSATION
    row = finetune.to_row(turns, "here, row 1", None, finetune.Findings())
    [example] = finetune.encode(tokenizer, [row], 512)
    ids, mask = example.input_ids, example.completion_mask
    assert len(ids) == len(mask)
    trained = [
        list(part) for wanted, part in itertools.groupby(zip(mask, ids, strict=True), lambda pair: pair[0]) if wanted
    ]
    said = [[token for _, token in part] for part in trained]
    assert all(part.count(tokenizer.eos_token_id) == 1 and part[-1] == tokenizer.eos_token_id for part in said)
    texts = [tokenizer.decode(part[:-1]).strip() for part in said]
    assert texts == ["Balls of ice.", "I have no policy here.", "You are welcome."]
    asked = tokenizer.decode([token for token, one in zip(ids, mask, strict=True) if not one])
    for text in [
        "What is hail?",
        "Is it covered?",
        "I do not know.",
        "Why not?",
        "Thanks!",
        *([system] if system else []),
    ]:
        assert text in asked
    assert "Bye" not in tokenizer.decode(ids)  # behind the last trained answer
    # The metrics ask the last trained turn: the prompt is what the chat would send for it.
    assert ids[: example.prompt_length] == finetune.chat_ids(tokenizer, list(row.prompt), add_generation_prompt=True)
    assert tokenizer.decode(ids[example.prompt_length : -1]).strip() == row.answer == "You are welcome."


@pytest.mark.parametrize("template", ["chatml", "mistral"])
def test_labels_of_random_conversations(template, request):
    """Trained are exactly the tokens that stand between the prompt of a trained answer and its EOS."""
    source = request.getfixturevalue("embedded" if template == "chatml" else "tiny_model")
    tokenizer = finetune.load_tokenizer(getattr(source, "folder", source))
    draw = random.Random(0)
    words = ["hail", "a", "Ünï", "12,5", "- item", "`code`", "\n\n", "日本", "?", "[x]", "end."]
    for _ in range(30):
        count = draw.randint(1, 4)
        turns = [
            (role, " ".join(["So", *draw.choices(words, k=draw.randint(1, 9)), "it"]), draw.choice([0, 1]) if n else 1)
            for n in range(count) for role in ("user", "assistant")
        ]  # fmt: skip
        row = finetune.to_row(turns, "here, row 1", None, finetune.Findings())
        [example] = finetune.encode(tokenizer, [row], 2048)
        messages = [*row.prompt, {"role": "assistant", "content": row.answer}]
        expected = [0] * len(example.input_ids)
        for number in (n for n in range(1, len(messages), 2) if n not in row.untrained):
            start = len(finetune.chat_ids(tokenizer, messages[:number], add_generation_prompt=True))
            end = example.input_ids.index(tokenizer.eos_token_id, start) + 1
            expected[start:end] = [1] * (end - start)
            assert tokenizer.decode(example.input_ids[start : end - 1]).strip() == messages[number]["content"]
        assert example.completion_mask == expected


def test_the_trainer_is_given_these_labels(tiny, tmp_path):
    """Through TRL's preparation and collator: labels stand where the mask is 1, and nowhere else."""
    from transformers import AutoModelForCausalLM

    tokenizer = finetune.load_tokenizer(tiny.folder)
    row = finetune.to_row(CONVERSATION, "here, row 1", None, finetune.Findings())
    [example] = finetune.encode(tokenizer, [row], 512)
    config = finetune.fill_defaults(Config(), tiny)
    plan = finetune.make_plan(config, tiny.config, [example] * 4, None)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder)
    trainer = finetune.make_trainer(model, tokenizer, [example] * 4, dict, plan, config, tmp_path, ())
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0].tolist()
    wanted = [token if one else -100 for token, one in zip(example.input_ids, example.completion_mask, strict=True)]
    assert labels[: len(wanted)] == wanted and set(labels[len(wanted) :]) <= {-100}


# ----------------------------------------------------------------------------------------------------------------------
# Flags and paths


def parse(*flags) -> Config:
    return finetune.parse(list(map(str, flags)))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(folder: Path, **config) -> Path:
    """The folder of a run, as far as the flags look at it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # no tensor
    run = {"config": config, "model": {"id": "x"}, "data": {"train_ids": [], "eval_ids": [], "files": []}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_a_lone_surrogate_in_a_flag_becomes_a_replacement_character():
    assert (
        parse("--question-field", "caf\udce9", "--answer-field", "a\ud800").question_field
        == "caf\N{REPLACEMENT CHARACTER}"
    )
    assert str(parse("--data", "caf\udce9.json").data[0]) == "caf\N{REPLACEMENT CHARACTER}.json"


def test_odd_characters_in_the_config_file_become_replacement_characters(here):
    (here / "my.json").write_text(json.dumps({"output_dir": "a\0b", "test_values": ["c\ud800"]}))
    config = parse("--config", "my.json")
    assert (str(config.output_dir), config.test_values) == ("a\ufffdb", ("c\ufffd",))


def test_tilde_in_flags_and_in_the_config_file(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "my.yaml").write_text("output_dir: ~/out\ndata: [~/a.json, ~/b.json]\n")
    config = parse("--config", "~/my.yaml")
    assert (config.output_dir, config.data) == (here / "out", (here / "a.json", here / "b.json"))
    assert parse("--output-dir", "~/x").output_dir == here / "x"
    folder = finished(here / "run")
    assert parse("--evaluate", "~/run").evaluate == folder


def test_evaluate_takes_the_runs_flags_and_a_config_over_them(here):
    folder = finished(here / "run", seed=7, lora_r=8, report_to="wandb", require_improvement=True)
    config = parse("--evaluate", folder)
    assert (config.seed, config.lora_r, config.report_to, config.require_improvement) == (7, 8, "none", False)
    (here / "my.yaml").write_text("seed: 9\nmax_new_tokens: 5\n")
    config = parse("--evaluate", folder, "--config", "my.yaml")
    assert (config.seed, config.lora_r, config.max_new_tokens) == (9, 8, 5)
    assert parse("--evaluate", folder, "--config", "my.yaml", "--seed", 1).seed == 1


@pytest.mark.parametrize("flag", ["--dry-run", "--resume"])
def test_evaluate_goes_with_no_plan_of_a_training(flag, here):
    with pytest.raises(BadInput, match=f"--evaluate cannot be combined with {flag}"):
        parse("--evaluate", finished(here / "run"), flag)


SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 800}
SOME_MODEL = types.SimpleNamespace(name="x", config=SHAPE)
BAD_OUTPUTS = {
    "dangling link": (lambda here: (here / "link").symlink_to("nowhere"), "link", "is a link to nothing"),
    "long name": (lambda here: None, "x" * 300, "File name too long"),
    "name that becomes too long": (lambda here: None, "new/" + "x" * 250, "File name too long"),
    "below /proc": (lambda here: None, "/proc/x/y", "cannot be made"),
    "below a file": (lambda here: (here / "file").write_text(""), "file/x/y", "is a file"),
    "a file": (lambda here: (here / "file").write_text(""), "file", "already exists"),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_a_folder_that_cannot_be_made_names_the_flag_and_leaves_nothing(case, here, faq):
    prepare, name, expected = BAD_OUTPUTS[case]
    prepare(here)
    before = set(here.rglob("*"))
    config = Config(data=(faq,), output_dir=Path(name))
    with pytest.raises(BadInput, match=f"(?s)--output-dir.*{expected}"):
        finetune.make_folder(finetune.choose_output(config, SOME_MODEL)[1])
    assert set(here.rglob("*")) == before


def test_a_run_that_ends_early_removes_what_it_made_and_nothing_else(here, faq):
    data = load(faq)

    def start(name):
        config = Config(data=(faq,), output_dir=Path("runs") / name)
        partial = finetune.choose_output(config, SOME_MODEL)[1]
        made, lock = finetune.make_folder(partial)
        finetune.note_run(partial, config, data)
        lock.release()
        return partial, made

    first, second = start("a"), start("b")
    (second[0] / "checkpoint-3").mkdir()
    (second[0] / "checkpoint-3" / "trainer_state.json").write_text("{}")
    finetune.remove_traces(*first, BadInput())
    assert not first[0].exists() and (second[0] / "checkpoint-3" / "trainer_state.json").is_file()
    shutil.rmtree("runs")
    first = start("a")
    (here / "runs" / "mine.txt").write_text("")
    finetune.remove_traces(*first, BadInput())
    assert [path.name for path in Path("runs").iterdir()] == ["mine.txt"]
    shutil.rmtree("runs")
    finetune.remove_traces(*start("a"), BadInput())
    assert not Path("runs").exists()


def test_no_home_path_in_notes_and_reasons(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    table = [row | {"topic": "x"} for row in rows(30)]
    data = load(write(here, "faq.json", [*table, table[0], table[1]]))
    kept = json.dumps([data.notes, data.dropped, data.files])
    assert str(here) not in kept and data.dropped[0]["reason"] == "repeats ~/faq.json, row 1"
    assert "~/faq.json: columns not used: topic" in data.notes


@pytest.mark.parametrize("home", ["/", None])
def test_without_a_home_folder(home, here, monkeypatch, faq):
    """HOME=/, as in containers; and no HOME and no passwd entry."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", nobody)
        monkeypatch.setattr(Path, "expanduser", lambda path: nobody() if str(path).startswith("~") else path)
    assert finetune.without_home("data/faq.json") == "data/faq.json" and finetune.without_home("/data/x") == "/data/x"
    assert load(faq).files[0]["path"] == str(faq) and parse("--data", faq).data == (faq,)
    assert finetune.cache_folder().name == "faq-finetune"
    if not home:
        with pytest.raises(BadInput, match="home folder is not known"):
            parse("--data", "~/faq.json")


def test_default_data_is_found_from_another_folder(here):
    data = load(finetune.SAMPLE)
    assert len(questions(data)) == len(rows(1000)) and not list(here.iterdir())


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + ".json", "a\0b.json", "/proc/self/mem.json", "surr\udcff.json"]
)
def test_odd_names_of_data_files(name):
    assert finetune.clean(refused(name)).startswith(finetune.clean(name))


def test_main_says_it_in_one_line_without_a_traceback(here, capfd):
    assert finetune.main(["--data", "caf\udce9.json"]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "finetune.py: caf\N{REPLACEMENT CHARACTER}.json: No such file or directory\n")


def test_help_into_a_pipe_that_closes():
    command = f"{sys.executable} {ROOT / 'finetune.py'} --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    first, code = done.stdout.splitlines()
    assert first.startswith("usage") and code == "0" and not done.stderr


def test_a_screen_that_is_not_utf8(run, faq, tiny_model, tmp_path):
    """The bar chart's blocks, a file's umlauts: question marks, no traceback."""
    done = run(
        "--data", faq, "--model", tiny_model, "--dry-run", "--learning-rate", "1.5e-4", PYTHONIOENCODING="cp1252"
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "Lengths" in done.stdout and "?" in done.stdout and "at 0.00015" in done.stdout
    assert set(tmp_path.iterdir()) == {faq}


# ----------------------------------------------------------------------------------------------------------------------
# Models and adapters


def model_folder(folder: Path, config: dict | str, *files: str, shards: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (folder / name).write_bytes(b"")
    if shards:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    return folder


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 100,
}  # fmt: skip
GPT2 = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
SHARDS = tuple(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
BAD_MODELS = {
    "GPT-2": ((GPT2, "model.safetensors"), (), "is GPT2LMHeadModel, whose config.json has no 'hidden_size'"),
    "no vocabulary": ((without(LLAMA, "vocab_size"), "model.safetensors"), (), "has no 'vocab_size'"),
    "no causal model": ((LLAMA | {"architectures": ["BertModel"]}, "model.safetensors"), (), "is BertModel, not"),
    "half a config": (('{"architectures":', "model.safetensors"), (), "config.json: broken JSON"),
    "two shards of three": ((LLAMA, *SHARDS[:2]), SHARDS, f"{SHARDS[2]} is missing; copy the folder again"),
    "shards without their index": ((LLAMA, *SHARDS[:1]), (), "model.safetensors is missing"),
    "pickled": ((LLAMA, "pytorch_model.bin"), (), "pickled"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_used(case, tmp_path):
    files, shards, expected = BAD_MODELS[case]
    with pytest.raises(BadInput, match=f"(?s)bad-model.*{re.escape(expected)}"):
        finetune.find_model(str(model_folder(tmp_path / "bad-model", *files, shards=shards)), gpu=False)


@pytest.mark.parametrize("files", [("model.safetensors",), ("consolidated.safetensors",), (*SHARDS, "index")])
def test_models_that_are_whole(files, tmp_path):
    folder = model_folder(tmp_path / "model", LLAMA, *files, shards=SHARDS if "index" in files else ())
    assert finetune.find_model(str(folder), gpu=False).folder == folder


@pytest.mark.parametrize(
    "fewer", [{"target_modules": ["q_proj"]}, {"r": 4}, {"target_modules": ["q_proj", "o_proj", "v_proj"]}]
)
def test_an_adapter_that_does_not_fit_is_refused(fewer, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def adapted(**changes):
        kinds = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**kinds))

    adapted(**fewer).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match=r"other: \d+ tensors are missing, left over or of another shape"):
        finetune.load_adapter(adapted(), tmp_path / "other")
    adapted().save_pretrained(tmp_path / "same")
    finetune.load_adapter(adapted(), tmp_path / "same")
    (tmp_path / "same" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(BadInput, match=r"same: adapter_model.safetensors cannot be read"):
        finetune.load_adapter(adapted(), tmp_path / "same")


# ----------------------------------------------------------------------------------------------------------------------
# Any bytes at all: data or BadInput, whatever the file holds

FORMATS = ("json", "jsonl", "csv", "tsv", "xlsx", "parquet")
odd = st.one_of(
    st.text(max_size=20),
    st.sampled_from([*finetune.EMPTY_SIGNS, "\x1b[31m", "\ud800", "a\nb,c\n", '"', "\u202e", " "]),
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.just([]),
    st.just({}),
    st.just(10**5000),
)
names = st.sampled_from(
    ["question", "answer", "Answer", "prompt", "completion", "instruction", "input", "output", "role", "x\x1b"]
)
turn = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "weight", "tool_calls"]),
    st.one_of(st.sampled_from(["user", "assistant", "system", "gpt", "Hello."]), odd),
)
chat = st.builds(
    lambda key, value: {key: value},
    st.sampled_from(["messages", "conversations", "prompt"]),
    st.lists(turn | odd, max_size=4),
)
text = st.text(min_size=1, max_size=40) | st.sampled_from([row["answer"] for row in rows(30)])
mild = st.fixed_dictionaries({"question": text, "answer": text}, optional={"note": odd})
record = mild | st.one_of(
    st.dictionaries(names, odd, max_size=4), st.fixed_dictionaries({"question": odd, "answer": odd}), chat, odd
)


@cache
def plain(kind: str) -> bytes:
    return encoded(kind, rows(24))


def encoded(kind: str, records: list) -> bytes:
    """The records as a file of this kind; those that it cannot hold become texts."""
    if kind in ("json", "jsonl"):
        sys.set_int_max_str_digits(0)
        try:
            lines = [json.dumps(r, ensure_ascii=len(records) % 2 == 0) for r in records]
        finally:
            sys.set_int_max_str_digits(4300)
        text = "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines)
        return text.encode("utf-8", "surrogatepass")
    keys = list(dict.fromkeys(["question", "answer", *(k for r in records if isinstance(r, dict) for k in r)]))
    cells = [[clipped(r.get(k)) if isinstance(r, dict) else clipped(r) for k in keys] for r in records]
    file = io.BytesIO()
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for line in [keys, *cells]:
            book.active.append(
                [openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub("", c).replace("\ud800", "") for c in line]
            )
        book.save(file)
    elif kind == "parquet":
        columns = {k: [line[n].replace("\ud800", "") for line in cells] for n, k in enumerate(keys)}
        parquet.write_table(pyarrow.table(columns), file)
    else:
        text = io.StringIO()
        csv.writer(text, delimiter="\t" if kind == "tsv" else ";").writerows([keys, *cells])
        return text.getvalue().encode("utf-8", "surrogatepass")
    return file.getvalue()


def clipped(value) -> str:
    if isinstance(value, (list, dict)):
        return "[...]"
    return "1" * 5000 if isinstance(value, int) and abs(value) > 10**20 else str("" if value is None else value)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """(ending, bytes): a valid file, one with odd rows among good ones, or random bytes; and then some damage."""
    kind = draw(st.sampled_from(FORMATS))
    start = draw(st.sampled_from(["odd rows"] * 4 + ["plain", "only odd rows", "bytes"]))
    if start == "bytes":
        raw = draw(st.binary(max_size=300))
    elif start == "plain":
        raw = plain(kind)
    else:
        extra = draw(st.lists(record, max_size=5))
        raw = encoded(kind, [*rows(0 if start == "only odd rows" else 24), *extra])
    for damage in draw(
        st.just([]) | st.lists(st.sampled_from(["cut", "flip", "line twice", "quote", "bytes", "header"]), max_size=3)
    ):
        place = draw(st.integers(0, len(raw)))
        if damage == "cut":
            raw = raw[:place]
        elif damage == "flip":
            raw = raw[:place] + bytes(b ^ draw(st.integers(1, 255)) for b in raw[place : place + 1]) + raw[place + 1 :]
        elif damage == "line twice":
            lines = raw.split(b"\n")
            number = place % len(lines)
            raw = b"\n".join(lines[: number + 1] + lines[number:])
        elif damage == "quote":
            raw = raw[:place] + draw(st.sampled_from([b'"', b"'", b'""', b"\\"])) + raw[place:]
        elif damage == "bytes":
            raw = raw[:place] + draw(st.binary(max_size=8)) + raw[place:]
        else:
            raw = draw(st.sampled_from([codecs.BOM_UTF8, b"\xff\xfe", b"PK\x03\x04", b"[", b"\0"])) + raw
    return draw(st.sampled_from([kind] * 9 + list(FORMATS))), raw


def check_reader(folder: Path, ending: str, raw: bytes) -> None:
    path = folder / f"data.{ending}"
    path.write_bytes(raw)
    try:
        data = load(path)
    except BadInput as problem:
        lines = str(problem).splitlines()
        assert lines and all(line.startswith(str(path)) or re.fullmatch(r"\.\.\. and \d+ more", line) for line in lines)
        assert finetune.clean(str(problem)) == str(problem)
    else:
        assert len(data.train) + len(data.eval) >= finetune.MIN_ROWS and data.eval
        assert all(finetune.clean(note) == note and "\n" not in note for note in data.notes)
        said = "".join(row.question + row.answer for row in data.train + data.eval)
        assert not finetune.CONTROL.search(said)


calm = settings(
    deadline=datetime.timedelta(seconds=10), database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@given(files())
@settings(calm, max_examples=200)
def test_any_file_is_read_or_refused(tmp_path, file):
    check_reader(tmp_path, *file)


@pytest.mark.slow
@given(files())
@settings(calm, max_examples=2000, derandomize=False)
def test_any_file_is_read_or_refused_at_length(tmp_path, file):
    check_reader(tmp_path, *file)


def test_a_head_that_is_trained_too(run, faq, tiny_model, tmp_path):
    """TRL's usual loss refuses a head that LoRA wraps."""
    flags = ("--target-modules", "q_proj", "lm_head", "--max-steps", 2, "--max-new-tokens", 4, "--lora-r", 4)
    done = run("--data", faq, "--model", tiny_model, *flags)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "adapters/faq-tiny-mistral/run.json").read_text())
    assert saved["evaluation"]["after"]["nll"] != saved["evaluation"]["before"]["nll"]
