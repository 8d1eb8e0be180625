"""The numbers and the verdict: against plain computations, and on trainings whose verdict is known beforehand."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT, rows

import finetune
from finetune import Config


@pytest.fixture(scope="module")
def base(embedded):
    """(tokenizer, base model as it is measured)"""
    return finetune.load_tokenizer(embedded.folder), finetune.load_model(embedded, Config())


def examples_of(tokenizer, count=12):
    found = [
        finetune.Row(({"role": "user", "content": r["question"]},), r["answer"], f"row {n}")
        for n, r in enumerate(rows(count), 1)
    ]
    return finetune.encode(tokenizer, found, 512)


def plain_log_p(model, prompt: list[int], answer: list[int]) -> float:
    """Sum of the log-probabilities of the answer's tokens: one row, all logits, nothing clever."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    log_p = torch.log_softmax(logits, -1)
    return sum(log_p[len(prompt) + n - 1, token].item() for n, token in enumerate(answer))


def test_nll_is_the_mean_over_the_answers_tokens(base):
    tokenizer, model = base
    examples = examples_of(tokenizer, 5)
    for example, nll in zip(examples, finetune.answer_nll(model, tokenizer, examples), strict=True):
        prompt, answer = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
        assert nll == pytest.approx(-plain_log_p(model, prompt, answer) / len(answer), abs=1e-4)


def test_memory_that_runs_out_while_measuring_only_makes_the_batches_smaller(base, monkeypatch):
    import torch

    tokenizer, model = base
    examples, forward, tried = examples_of(tokenizer, 5), model.forward, []

    def crowded(input_ids=None, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("made up")
        return forward(input_ids=input_ids, **kwargs)

    losses = finetune.answer_nll(model, tokenizer, examples)
    answers = finetune.greedy_answers(model, tokenizer, examples, 8)
    monkeypatch.setattr(model, "forward", crowded)
    assert finetune.answer_nll(model, tokenizer, examples) == pytest.approx(losses, abs=1e-4)
    assert finetune.greedy_answers(model, tokenizer, examples, 8) == answers
    assert max(tried) > 2
    monkeypatch.setattr(model, "forward", lambda **kwargs: crowded(torch.zeros(3, 1)))
    with pytest.raises(finetune.BadInput, match="not even one row"):
        finetune.answer_nll(model, tokenizer, examples)


def test_replay_is_what_the_base_says_to_prompts_that_are_not_measured(base):
    import torch

    tokenizer, model = base
    config, some = Config(replay_fraction=0.15, num_train_epochs=1), examples_of(tokenizer, 20)
    prompts = finetune.prompts_to_replay(tokenizer, some, config)
    none = dataclasses.replace(config, replay_fraction=0)
    assert len(prompts) == 3 and not finetune.prompts_to_replay(tokenizer, some, none)
    twice = dataclasses.replace(config, num_train_epochs=2)  # others in the second epoch
    assert len({tuple(e.input_ids) for e in finetune.prompts_to_replay(tokenizer, some, twice)}) == 6
    measured = {e.row.prompt[-1]["content"] for e in finetune.general_prompts(tokenizer, "general_prompts.json")}
    for example in finetune.general_answers(model, tokenizer, prompts):
        ids = finetune.chat_ids(tokenizer, list(example.row.prompt), add_generation_prompt=True)
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=finetune.REPLAY_TOKENS)[0].tolist()
        assert example.input_ids == out and example.completion_mask == [0] * len(ids) + [1] * (len(out) - len(ids))
        assert example.row.prompt[-1]["content"] not in measured


def test_ranking_is_the_gain_from_the_question(base):
    tokenizer, model = base
    examples = examples_of(tokenizer, 12)
    candidates = [[0, 3, 5, 7], [1, 0, 2, 9], [2, 11, 10, 4]]
    neutral = tokenizer.apply_chat_template(
        [{"role": "user", "content": finetune.NEUTRAL}], add_generation_prompt=True, return_dict=False
    )
    expected = []
    for question, places in enumerate(candidates):
        prompt = examples[question].input_ids[: examples[question].prompt_length]
        gains = []
        for place in places:
            answer = examples[place].input_ids[examples[place].prompt_length :]
            gains.append(plain_log_p(model, prompt, answer) - plain_log_p(model, neutral, answer))
        expected.append(float(max(gains) == gains[0]))
    others = [[examples[place] for place in places] for places in candidates]
    assert finetune.rank_answers(model, tokenizer, examples[:3], others) == expected


def test_batched_answers_are_those_of_one_at_a_time(base):
    tokenizer, model = base
    examples = examples_of(tokenizer, 6)
    together, _ = finetune.greedy_answers(model, tokenizer, examples, 24)
    assert together == [finetune.greedy_answers(model, tokenizer, [example], 24)[0][0] for example in examples]
    assert len({e.prompt_length for e in examples}) > 1  # so there was something to pad


def small_job(tmp_path, monkeypatch, table: list[dict], **settings) -> dict:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "faq.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    plain = {"eval_questions": 10, "eval_fraction": 0.3, "max_new_tokens": 24, "reworded_fraction": 0.0}
    plain |= {"replay_fraction": 0.0, "goal": "style", "early_stopping_patience": 0}
    return finetune.run_evaluation(Config(data=(path,), **plain | settings))


def test_shuffled_answers_are_never_called_helped(embedded, tmp_path, monkeypatch):
    """Each question with another's answer, trained until the model knows them by heart; others than these it cannot."""
    table = rows(40)
    answers = [row["answer"] for row in table]
    random.Random(5).shuffle(answers)
    shuffled = [{"question": row["question"], "answer": a} for row, a in zip(table, answers, strict=True)]
    monkeypatch.setattr(finetune, "choose_epoch", lambda epochs, *_: len(epochs) - 1)  # the last, whatever it is like
    run = small_job(tmp_path, monkeypatch, shuffled, num_train_epochs=12)
    evaluation = run["evaluation"]
    assert evaluation["verdict"]["label"] != "helped" and not finetune.too_few(evaluation), evaluation["verdict"]
    heart = [record["as_trained"]["after"]["recall"] for record in evaluation["known"]]
    assert finetune.mean(heart) >= 0.6, evaluation["verdict"]
    assert evaluation["ranking_interval"][1] <= evaluation["ranking_chance"], evaluation["verdict"]


def test_training_on_the_bases_own_answers_is_not_called_harmed(base, embedded, tmp_path, monkeypatch):
    """Told to be brief, for its answers to the bare question it repeats to the letter, and nothing else can."""
    tokenizer, model = base
    brief = [row | {"question": row["question"] + finetune.BRIEF.format(words=20)} for row in rows(40)]
    asked = [finetune.Row(({"role": "user", "content": r["question"]},), r["answer"], "brief") for r in brief]
    answers, _ = finetune.greedy_answers(model, tokenizer, finetune.encode(tokenizer, asked, 512), 32)
    examples = examples_of(tokenizer, 40)
    table = [{"question": e.row.question, "answer": a} for e, a in zip(examples, answers, strict=True) if a.strip()]
    # At a 7B's rate: a small model's teaches these answers by heart. What is then far from the base's own words, which
    # the base repeats, the rules call harmed (seen with 48 updates at 1e-3: chrF 41 became 25).
    settings = {"max_steps": 8, "learning_rate": 2e-4, "loraplus_lr_ratio": 1.0, "weight_decay": 0.0}
    settings |= {"replay_fraction": 0.15, "eval_questions": 16}
    run = small_job(tmp_path, monkeypatch, table, **settings)
    assert run["evaluation"]["verdict"]["label"] != "harmed", run["evaluation"]["verdict"]
    assert not finetune.too_few(run["evaluation"]), run["evaluation"]["verdict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A run of the tiny model, which learns nothing of use: (folder it ran in, its adapter, the process)."""
    cwd = tmp_path_factory.mktemp("evidence")
    (cwd / "faq.json").write_text(json.dumps(rows(40)), encoding="utf-8")
    flags = ["--data", "faq.json", "--model", str(tiny_model), "--max-steps", "2", "--max-new-tokens", "8"]
    command = [sys.executable, str(ROOT / "finetune.py"), *flags, "--require-improvement"]
    return cwd, cwd / "adapters/faq-tiny-mistral", subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_require_improvement_exits_with_3(finished):
    _, adapter, done = finished
    assert done.returncode == 3, done.stderr
    assert json.loads((adapter / "run.json").read_text())["evaluation"]["verdict"]["label"] != "helped"


def test_evaluate_gives_the_numbers_of_the_run(finished):
    cwd, adapter, _ = finished
    saved = json.loads((adapter / "run.json").read_text())["evaluation"]
    before = {path: path.stat().st_mtime_ns for path in adapter.iterdir()}
    code = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[1]); import finetune; "
        "config = finetune.parse(['--evaluate', 'faq-tiny-mistral']); "
        "pathlib.Path('again.json').write_text(json.dumps(finetune.evaluate_adapter(config)['evaluation']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((cwd / "again.json").read_text())
    for arm in finetune.ARMS:
        numbers = [
            [found[arm].get(part, {}) if part else {k: v for k, v in found[arm].items() if isinstance(v, float)}
             for part in (None, "reworded", "as_trained")]
            for found in (again, saved)
        ]  # fmt: skip
        assert numbers[0] == [pytest.approx(part, abs=1e-6) for part in numbers[1]] and numbers[0][0] and numbers[0][1]
        answers = [[q["arms"][arm].get("answer") for q in found["questions"]] for found in (again, saved)]
        assert answers[0] == answers[1] and any(answers[0])
    assert again["nll_crossfit"] == pytest.approx(saved["nll_crossfit"], abs=1e-6)  # by the epochs in run.json
    assert again["advice"] == saved["advice"] and again["power"] == pytest.approx(saved["power"], abs=1e-6)
    assert again["verdict"] == saved["verdict"] and again["memorization"] == saved["memorization"]
    assert {path: path.stat().st_mtime_ns for path in adapter.iterdir()} == before  # nothing was written


def test_evaluate_says_when_its_rows_are_gone(finished, run, tmp_path):
    _, adapter, _ = finished
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows(80)[40:]), encoding="utf-8")
    done = run("--evaluate", adapter, "--data", other)
    assert done.returncode == 2 and "40 of the rows" in done.stderr and "Traceback" not in done.stderr
    missing = run("--evaluate", "nowhere")
    assert missing.returncode == 2 and "neither a folder nor a name in adapters/" in missing.stderr
    (adapter.parent / "bare").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter.parent / "bare" / name).write_bytes((adapter / name).read_bytes())
    missing = run("--evaluate", adapter.parent / "bare")
    assert missing.returncode == 2 and "no finished run" in missing.stderr


def test_a_split_of_ones_own_is_kept(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = [row | {"fold": n % 5} for n, row in enumerate(rows(50))]
    (tmp_path / "faq.json").write_text(json.dumps(table), encoding="utf-8")
    config = Config(
        data=(finetune.Path("faq.json"),), model=str(tiny_model), split_field="fold", eval_values=("3",),
        test_values=("4",), max_steps=2, max_new_tokens=4, eval_questions=4,
    )  # fmt: skip
    run = finetune.run_evaluation(config)
    by_fold: dict[int, set] = {}
    for number, row in enumerate(table):
        found = finetune.Row(({"role": "user", "content": row["question"]},), row["answer"], "")
        by_fold.setdefault(number % 5, set()).add(found.id)
    assert set(run["data"]["eval_ids"]) == by_fold[3] and set(run["data"]["test_ids"]) == by_fold[4]
    assert set(run["data"]["train_ids"]) == by_fold[0] | by_fold[1] | by_fold[2]
    assert [q["id"] for q in run["evaluation"]["questions"]] == run["data"]["test_ids"]
