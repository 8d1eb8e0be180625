"""Reading, checking, deduplicating and splitting the rows. Nothing here needs torch."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, rows
from rapidfuzz import fuzz, process

import finetune
from finetune import BadInput, Config, load_data

QUESTION, ANSWER = "What is a deductible?", "The part of a claim that you pay yourself."
LAYOUTS = {
    "question-answer": {"question": QUESTION, "answer": ANSWER},
    "prompt-completion": {"prompt": QUESTION, "completion": ANSWER},
    "conversational": {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "capitals": {"Question": QUESTION, "Answer": ANSWER},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_every_layout_gives_the_same_row(layout, ending, tmp_path):
    path = tmp_path / f"data{ending}"
    record = LAYOUTS[layout]
    path.write_text(json.dumps([record] if ending == ".json" else record), encoding="utf-8")
    found = finetune.Findings()
    [row] = finetune.read_rows(path, findings=found)
    assert (row.question, row.answer, found.note_lines(), found.problems) == (QUESTION, ANSWER, [], {})
    assert row.id == hashlib.sha256(f"{QUESTION}\n{ANSWER}".encode()).hexdigest()[:10]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_as_spreadsheets_write_it(delimiter, tmp_path):
    path = tmp_path / "data.csv"
    cells = [["question", "answer", "topic"], [QUESTION, 'Two lines,\n"quoted"; yes', "x"]]
    lines = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    found = finetune.Findings()
    [row] = finetune.read_rows(path, findings=found)
    assert row.answer == 'Two lines,\n"quoted"; yes' and not found.problems
    notes = found.note_lines()
    assert "byte order mark" in notes[0] and "columns not used: topic" in notes[1]


def test_named_fields_and_unused_columns(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"q": QUESTION, "a": ANSWER, "question": "not this", "fold": 1}), encoding="utf-8")
    found = finetune.Findings()
    [row] = finetune.read_rows(path, "q", "a", findings=found)
    assert (row.question, row.answer) == (QUESTION, ANSWER)
    assert found.note_lines() == [f"{path}: columns not used: question, fold"]


def test_alpaca_input_and_earlier_turns_belong_to_the_prompt(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", QUESTION),
        ("assistant", ANSWER),
    ]
    records = [
        {"instruction": "Explain.", "input": "deductible", "output": ANSWER},
        {"messages": [{"role": role, "content": text} for role, text in turns]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    alpaca, chat = finetune.read_rows(path)
    assert alpaca.question == "Explain.\n\ndeductible"
    assert [turn["role"] for turn in chat.prompt] == ["system", "user", "assistant", "user"] and chat.answer == ANSWER


def test_windows_quotes_read_as_latin1_are_mended_and_said(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"question": QUESTION, "answer": "You\x92ll pay \x93it\x94."}]), encoding="utf-8")
    found = finetune.Findings()
    [row] = finetune.read_rows(path, findings=found)
    assert row.answer == "You’ll pay “it”." and f"mended in 1 row, the first: {path}, row 1" in found.note_lines()[0]


def asked(question: str, answer: str) -> finetune.Row:
    return finetune.Row(({"role": "user", "content": question},), answer, "here")


def test_near_duplicates_are_found_and_templates_are_not():
    alike = [
        "What if I would rather buy them a plan in the Marketplace?",
        "What if I would rather buy a Marketplace plan?",
    ]
    glossary = [
        f'What does "{word}" mean in health insurance?' for word in ("coinsurance", "premium", "network", "HMO")
    ]
    other = [f"Question about {subject} number one?" for subject in ("hail", "floods", "pets", "tenants", "drones")]
    answers = [f"{n}: you may, but then no help with the premium is given to you." for n in range(11)]
    everything = [asked(q, a) for q, a in zip([*alike, *glossary, *other], answers, strict=True)]
    groups = finetune.near_duplicate_groups([*everything, asked("Something else entirely, is it so?", answers[0])])
    assert sorted(len(group) for group in groups)[-1] == 3 and len(groups) == len(everything) - 1
    assert {r.question for r in max(groups, key=len)} == {*alike, "Something else entirely, is it so?"}  # same answer


def test_what_does_not_tie_questions_together():
    """Numbers that differ, and answers that are short or frequent: labels, "Please ask us."."""
    numbered = [asked(f"What is written under item {n} of the contract?", f"It is {n}.") for n in range(7, 12)]
    subjects = ("hail", "flood", "drone", "tenant", "puppy", "marble", "violin", "glacier", "pepper", "saddle")
    questions = [f"{one} {two}?" for one in subjects for two in subjects if one < two]
    labels = [asked(question, "Yes, it is.") for question in questions[:2]]
    frequent = [asked(q, "Please ask us, for this depends on where you live and when.") for q in questions[2:5]]
    rare = [asked(q, "That is paid by whoever had the key on that very day.") for q in questions[5:7]]
    groups = finetune.near_duplicate_groups([*numbered, *labels, *frequent, *rare])
    assert [group for group in groups if len(group) > 1] == [rare]


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_groups_whole_and_does_not_depend_on_the_order_of_the_file(seed, tmp_path):
    table = rows(60)
    table += [{"question": "Please tell me: " + r["question"], "answer": r["answer"] + " Ask us."} for r in table[:20]]
    splits = []
    for number, order in enumerate((table, table[::-1])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(order), encoding="utf-8")
        data = load_data(Config(data=(path,), seed=seed, eval_fraction=0.2))
        splits.append([row.id for row in data.eval])
        groups = finetune.near_duplicate_groups(data.train + data.eval)
        held_out = {row.id for row in data.eval}
        assert all(len({row.id in held_out for row in group}) == 1 for group in groups)
        assert data.groups >= 15 and 14 <= len(data.eval) <= 16
    assert splits[0] == splits[1]


def test_another_seed_holds_out_other_rows(faq):
    first, second = ({row.id for row in load_data(Config(data=(faq,), seed=seed)).eval} for seed in (1, 2))
    assert first != second


def test_repeated_rows_are_dropped_and_recorded(tmp_path):
    path = tmp_path / "faq.json"
    path.write_text(json.dumps(rows(30) + rows(2)), encoding="utf-8")
    data = load_data(Config(data=(path,)))
    assert len(data.train) + len(data.eval) == 30 and len(data.dropped) == 2
    assert data.dropped[0]["reason"].endswith("row 1") and data.files[0]["rows"] == 32


def test_sample_data_is_what_its_readme_says():
    table = json.loads((ROOT / "data/faq_sample.json").read_text(encoding="utf-8"))
    assert len(table) >= 200 and all(set(row) == {"question", "answer"} for row in table)
    lengths = [len(row["answer"].split()) for row in table]
    assert min(lengths) >= 25 and max(lengths) <= 80
    found = finetune.read_rows(ROOT / "data/faq_sample.json")
    assert max(map(len, finetune.near_duplicate_groups(found))) == 1
    assert "What is comprehensive auto insurance?" in {row["question"] for row in table}  # the seed's example


def test_general_prompts_are_about_other_things():
    """Those that are measured and those that are replayed together: no two alike, so no replay teaches to the test."""
    measured, replayed = (
        json.loads((ROOT / "data" / name).read_text(encoding="utf-8"))
        for name in ("general_prompts.json", "replay_prompts.json")
    )
    assert 50 <= len(measured) <= 80 and len(replayed) >= 50
    prompts = measured + replayed
    assert all(isinstance(text, str) and 20 < len(text) < 300 and not finetune.CONTROL.search(text) for text in prompts)
    of_the_data = re.compile("insur|premium|deductib|coverage|policy|liabilit|claims|mortgage|annuit", re.I)
    assert not [text for text in prompts if of_the_data.search(text)]
    questions = [row["question"] for row in rows(1000)]
    assert len([q for q in questions if of_the_data.search(q)]) > len(questions) / 2  # the words do tell them apart
    alike = process.cdist(prompts, prompts, scorer=fuzz.token_sort_ratio)
    assert (alike >= finetune.ALIKE_WHOLE).sum() == len(prompts)  # each like itself only


def good(count=30) -> str:
    return json.dumps(rows(count))


# name of the file, its bytes, further flags, what the message must hold
BAD_DATA = {
    "broken JSON": ("faq.json", '[{"question": "a",\n "answer" "b"}]', [], ["faq.json", "line 2", "column 11"]),
    "cut JSON": ("faq.json", good()[:-30], [], ["faq.json", "line 1"]),
    "JSON Lines named .json": ("faq.json", '{"question": "a"}\n{"question": "b"}', [], ["name it .jsonl"]),
    "broken JSON line": ("faq.jsonl", '{"question": "a", "answer": "b"}\n{"question":', [], ["faq.jsonl, line 2"]),
    "top level": ("faq.json", '{"rows": []}', [], ["an object", "a list of rows"]),
    "row is no object": ("faq.json", '["why?"]', [], ["row 1", "a text"]),
    "missing field": ("faq.json", '[{"question": "a", "b": "x"}]', [], ["row 1", "question, b", "--question-field"]),
    "empty field": ("faq.json", '[{"question": "  ", "answer": "b"}]', [], ["row 1", "'question' is empty"]),
    "number for text": ("faq.json", '[{"question": "a", "answer": 3}]', [], ["row 1", "'answer' is a number"]),
    "null for text": ("faq.json", '[{"question": null, "answer": "b"}]', [], ["row 1", "'question' is null"]),
    "named field is not there": (
        "faq.json", good(), ["--question-field", "q", "--answer-field", "a"], ["row 1", "no column 'q'"],
    ),
    "UTF-16": ("faq.json", good().encode("utf-16"), [], ["UTF-16", "UTF-8"]),
    "Windows-1252": ("faq.json", b'[\n{"question": "caf\xe9", "answer": "b"}]', [], ["line 2", "0xe9", "UTF-8"]),
    "control character": ("faq.json", '[{"question": "a\\u001b[31m", "answer": "b"}]', [], ["row 1", "U+001B"]),
    "lone surrogate": ("faq.json", '[{"question": "a\\ud800", "answer": "b"}]', [], ["row 1", "U+D800"]),
    "too few rows": ("faq.json", good(5), [], ["faq.json", "5 different rows", "20"]),
    "one question over and over": (
        "faq.json", json.dumps([{"question": "Why so?", "answer": f"It is {n}."} for n in range(40)]), [], ["near-dup"],
    ),
    "no rows": ("faq.json", "[]", [], ["holds no rows"]),
    "empty file": ("faq.jsonl", "", [], ["holds no rows"]),
    "unknown ending": ("faq.ods", "PK", [], ["'.ods'", ".xlsx", ".csv"]),
    "no workbook": ("faq.xlsx", "PK", [], ["faq.xlsx", "no workbook", "save it again"]),
    "no Parquet": ("faq.parquet", "PAR1", [], ["faq.parquet", "no Parquet file"]),
    "no such file": (None, "", ["--data", "nowhere.json"], ["nowhere.json", "No such file"]),
    "a folder": (None, "", ["--data", "."], ["directory"]),
    "cells too many": ("faq.csv", "question,answer\na,b,c\n", [], ["row 1", "3 cells", "quotes"]),
    "open quote": ("faq.csv", 'question,answer\na,"b\n', [], ["broken CSV", "quote"]),
    "header twice": ("faq.csv", "question,answer,answer\na,b,c\n", [], ["'answer' twice"]),
    "empty turns": ("faq.json", '[{"messages": []}]', [], ["row 1", "an empty list"]),
    "ends with user": ("faq.json", '[{"messages": [{"role": "user", "content": "a"}]}]', [], ["row 1", "assistant"]),
    "unknown role": ("faq.json", '[{"messages": [{"role": "bot9", "content": "a"}]}]', [], ["turn 1", "bot9"]),
    "turn without text": ("faq.json", '[{"conversations": [{"from": "human"}]}]', [], ["turn 1", "'value'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, run, tmp_path):
    name, content, flags, expected = BAD_DATA[case]
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        flags = ["--data", name, *flags]
    before = set(tmp_path.rglob("*"))
    done = run(*flags)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in expected), done.stderr
    assert "Traceback" not in done.stderr + done.stdout and set(tmp_path.rglob("*")) == before


def test_problems_are_shown_together_at_most_twenty(run, tmp_path):
    turns = [[{"role": "bot" + letter, "content": "a"}] for letter in "abcdefghijklmnopqrstuvwxy"]
    (tmp_path / "one.json").write_text(json.dumps([{"messages": turn} for turn in turns]), encoding="utf-8")
    (tmp_path / "two.jsonl").write_text("[]\n", encoding="utf-8")
    done = run("--data", "one.json", "two.jsonl")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 21 and lines[-1] == "... and 6 more"


def test_one_problem_of_many_rows_is_one_line(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"question": "a", "answer": ""}] * 25), encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        finetune.read_rows(path)
    assert str(caught.value) == (f"{path}, row 1 and 24 more (row 2, row 3, row 4, row 5, ...): 'answer' is empty")


@pytest.mark.parametrize("ending", [".xlsx", ".parquet"])
def test_workbooks_and_parquet_are_read(ending, tmp_path):
    import pandas

    path = tmp_path / f"faq{ending}"
    table = pandas.DataFrame([*rows(30), {"question": "How many?", "answer": 'Two,\n"quoted"; or more'}])
    if ending == ".xlsx":
        with pandas.ExcelWriter(path) as book:
            table.to_excel(book, sheet_name="faq", index=False)
            table.to_excel(book, sheet_name="old", index=False)
    else:
        table.to_parquet(path)
    found = finetune.Findings()
    read = finetune.read_rows(path, findings=found)
    assert [{"question": row.question, "answer": row.answer} for row in read] == table.to_dict("records")
    assert read[30].place == f"{path}, row 31" and not found.problems
    sheets = [f"{path}: only the first of 2 sheets is read: faq"] if ending == ".xlsx" else []
    assert found.note_lines() == sheets


def test_message_shows_no_raw_escape_sequence(run, tmp_path):
    (tmp_path / "faq.json").write_text(json.dumps([{"\x1b[2Jq": "a"}]), encoding="utf-8")
    done = run("--data", "faq.json")
    assert done.returncode == 2 and "\x1b" not in done.stderr


def test_home_is_not_named():
    assert finetune.without_home(Path.home() / "secret" / "faq.json") == str(Path("~/secret/faq.json"))


def test_bad_input_is_an_exception_for_callers(tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        finetune.run_evaluation(Config(data=(tmp_path / "nowhere.json",)))
