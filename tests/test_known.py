"""Other words, looking up, recall, and what is trained: by rules and arithmetic; the tiny model where one is needed."""

import dataclasses
import json
import math
import random
from collections import Counter
from itertools import groupby

import pytest
import sacrebleu
from conftest import rows
from rapidfuzz import fuzz

import finetune
from finetune import TEST_RULES, TRAIN_RULES, Config, normalize

QUESTIONS = {
    "en": "What happens if I do not pay the premium for my home insurance on time?",
    "de": "Was passiert, wenn ich die Prämie für meine Versicherung nicht rechtzeitig zahle?",
    "fr": "Que se passe-t-il si je ne paie pas la prime de mon assurance à temps ?",
    "es": "¿Qué pasa si no pago la prima de mi seguro de hogar a tiempo?",
    "it": "Cosa succede se non pago il premio della mia assicurazione in tempo?",
    "pt": "O que acontece se eu não pagar o prêmio do meu seguro a tempo?",
    "nl": "Wat gebeurt er als ik de premie van mijn verzekering niet op tijd betaal?",
}
ODD = ("如果我不按时支付保险费会怎样？", "🙂", "🙂🙂 ok?", "Deductible?", "?", "...", "{}", "{0} {name}", "%s", "’")


def asked(question: str, answer: str = "Yes.", **turns) -> finetune.Row:
    return finetune.Row(({"role": "user", "content": question},), answer, "here", **turns)


def sample(count: int) -> list[finetune.Row]:
    return [asked(row["question"], row["answer"]) for row in rows(count)]


def dice(*seed) -> random.Random:
    return random.Random(":".join(map(str, seed)))


# ----------------------------------------------------------------------------------------------------------------------
# Other words


def test_a_rule_gives_the_same_words_for_the_same_seed_and_others_for_another():
    questions = [row.question for row in sample(40)]
    for rule in (*TEST_RULES, *TRAIN_RULES):
        first, again = ([finetune.reword(q, rule, dice(0, q)) for q in questions] for _ in range(2))
        assert first == again
        others = [finetune.reword(q, rule, dice(1, q)) for q in questions]
        drawn = rule not in ("keywords", "polite", "need")  # these have nothing to draw
        assert (first != others) == drawn, rule


def test_rules_of_the_test_are_not_those_of_the_training():
    """Neither by name nor by what they write, but for keywords, which dropped words may leave by chance."""
    assert not set(TEST_RULES) & set(TRAIN_RULES)
    for row in sample(40):
        test = {finetune.reword(row.question, rule, dice(n)) for rule in TEST_RULES[1:] for n in range(5)}
        train = {finetune.reword(row.question, rule, dice(n)) for rule in TRAIN_RULES for n in range(20)}
        test.discard(row.question)  # no typing error in words of four letters
        assert len(test) >= 2 and len(train) > 10 and not test & train
    for own in finetune.rewording_words().values():
        frames = {normalize(frame) for frame in own["train"]}
        assert len(frames) == len(own["train"]) and not frames & set(map(normalize, own["test"].values()))


@pytest.mark.parametrize("language", QUESTIONS)
def test_rules_know_seven_languages(language):
    question, own = QUESTIONS[language], finetune.rewording_words()[language]
    assert finetune.language_of(question) is own
    worded = {rule: finetune.reword(question, rule, dice(1)) for rule in (*TEST_RULES, *TRAIN_RULES)}
    keywords = worded["keywords"]
    assert len(keywords) < 0.8 * len(question) and not set(keywords.split()) & own["function_words"]
    for rule in ("polite", "need"):
        assert worded[rule] == own["test"][rule].format(keywords)
    framed = {finetune.reword(question, "frame", dice(n)) for n in range(60)}
    assert {frame.format(question) for frame in own["train"]} <= framed
    assert all(normalize(text) not in ("", normalize(question)) for text in worded.values())


@pytest.mark.parametrize("question", ODD)
def test_odd_questions_are_never_lost(question):
    """Where a rule finds nothing to do, the question stays as it is; it never becomes empty."""
    for rule in (*TEST_RULES, *TRAIN_RULES):
        for n in range(20):
            assert finetune.reword(question, rule, dice(n)).strip(), rule


def test_typing_errors_are_two_and_leave_the_rest_of_the_text():
    question = QUESTIONS["en"]
    for n in range(20):
        worded = finetune.reword(question, "typos", dice(n))
        differ = [(a, b) for a, b in zip(question.split(), worded.split(), strict=True) if a != b]
        assert 1 <= len(differ) <= 2 and all(sorted(a) == sorted(b) for a, b in differ)
        slipped = zip(question.split(), finetune.reword(question, "slips", dice(n)).split(), strict=True)
        assert [abs(len(a) - len(b)) for a, b in slipped if a != b] == [1, 1]


@pytest.mark.parametrize("rule", [*TEST_RULES, *TRAIN_RULES])
def test_earlier_turns_keep_their_words(rule):
    earlier = tuple(
        {"role": role, "content": text}
        for role, text in (("system", "Be brief."), ("user", QUESTIONS["en"]), ("assistant", "That depends."))
    )
    last = {"role": "user", "content": "And what happens if somebody else pays it for me?"}
    row = finetune.Row((*earlier, last), "Then it counts as paid.", "here", untrained=(2,))
    other = finetune.in_other_words(row, rule, dice(2))
    assert other.prompt[:-1] == earlier and other.prompt[-1]["role"] == "user"
    assert other.prompt[-1]["content"] == finetune.reword(last["content"], rule, dice(2)) != last["content"]
    assert (other.answer, other.untrained) == (row.answer, row.untrained)


# ----------------------------------------------------------------------------------------------------------------------
# Known questions


def test_known_questions_are_no_trained_question_and_come_from_every_rule():
    table = sample(120)
    known = finetune.known_questions(table, seed=42)
    trained = {normalize(row.question) for row in table}
    assert len(known) == finetune.KNOWN_QUESTIONS == len({row.id for row, *_ in known})
    for row, other, _ in known:
        assert row in table and other.answer == row.answer and normalize(other.question) not in trained
    assert set(Counter(rule for *_, rule in known)) == set(TEST_RULES)
    assert finetune.known_questions(table[::-1], seed=42) == known  # the order of the file is nothing
    assert {row.id for row, *_ in finetune.known_questions(table, seed=1)} != {row.id for row, *_ in known}


def test_a_question_that_no_rule_can_change_is_left_out():
    """A question of one word in keywords is itself; another row's question may not be asked either."""
    assert finetune.known_questions([asked("Fire?")], seed=0) == []
    [(_, other, rule)] = finetune.known_questions([asked("Deductible?")], seed=0)
    assert rule == "typos" and sorted(other.question) == sorted("Deductible?")
    chinese = [asked(f"保险{n}？", f"{n}") for n in range(9)]
    assert finetune.known_questions(chinese, seed=0) == []
    whole, keywords = asked("What is a deductible?"), asked("Deductible?", "No.")
    for seed in range(8):
        worded = {normalize(other.question) for _, other, _ in finetune.known_questions([whole, keywords], seed)}
        assert worded and "deductible" not in worded


@pytest.fixture
def exam(tiny, tmp_path):
    """exam(table, **settings) -> (data, EvalSet) as the job makes them."""

    def call(table: list[dict], **settings):
        path = tmp_path / "faq.json"
        path.write_text(json.dumps(table), encoding="utf-8")
        config = finetune.fill_defaults(Config(data=(path,), model=str(tiny.folder), **settings), tiny)
        tokenizer, data = finetune.load_tokenizer(tiny.folder), finetune.load_data(config)
        sides = {"train": data.train, "eval": data.eval, "test": data.test}
        examples = {side: finetune.encode(tokenizer, own, config.max_length) for side, own in sides.items()}
        return data, finetune.make_eval_set(tokenizer, data, examples, config)

    return call


@pytest.mark.parametrize("count", [24, 40, 200])
def test_the_questions_that_choose_the_epoch_are_not_those_of_the_exam(count, exam):
    data, questions = exam(rows(count))
    known = {record["id"]: record for record in questions.known}
    by_answer = {row.answer: row for row in data.train}
    checked = [by_answer[example.row.answer] for example in questions.checked]
    assert known and checked and not {row.id for row in checked} & set(known)
    assert len(known) <= finetune.KNOWN_QUESTIONS and len(checked) <= finetune.VALIDATION_QUESTIONS
    assert {row.id for row in checked} | set(known) <= {row.id for row in data.train}
    assert len({row.id for row in checked}) == len(checked)
    for record, example, plain in zip(questions.known, questions.reworded["plain"], questions.as_trained, strict=True):
        assert example.row.question == record["question"] != plain.row.question == record["trained_question"]


# ----------------------------------------------------------------------------------------------------------------------
# Looking up


def test_nearest_rows_are_those_of_a_plain_sort():
    table = sample(60)
    for row in sample(80)[55:]:
        question = finetune.reword(row.question, "typos", dice(row.id))

        def likeness(other: finetune.Row, question: str = question) -> float:
            pair = normalize(question), normalize(other.question)
            return fuzz.ratio(*pair) + fuzz.token_set_ratio(*pair)

        plain = sorted(table, key=likeness, reverse=True)
        found = finetune.nearest_rows(question, table, 5)
        assert list(map(likeness, found)) == pytest.approx(list(map(likeness, plain[:5])), abs=1e-4)
        clear = [len(list(same)) for _, same in groupby(plain[:6], likeness)]
        assert found == plain[:5] or max(clear) > 1  # only equals may stand in another order
    assert finetune.nearest_rows(table[7].question, table)[0] is table[7]
    assert len(finetune.nearest_rows("fire", table)) == finetune.LOOKED_UP
    assert len(finetune.nearest_rows("fire", table[:2])) == 2


def test_rows_stand_before_the_last_question_and_nothing_else_changes():
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    reply, last = {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"}
    found = finetune.with_rows([system, first, reply, last], [asked("What is it?", "That."), asked("Who?", "They.")])
    assert found[:-1] == (system, first, reply) and last["content"] == "Why?"
    assert found[-1] == {
        "role": "user",
        "content": "Here are questions and answers that may help:\n\nQuestion: What is it?\nAnswer: That.\n\n"
        "Question: Who?\nAnswer: They.\n\nQuestion: Why?",
    }


def test_no_row_of_the_questions_own_group_stands_in_its_prompt(exam):
    """An owner's split may train a near-duplicate of a held-out question. `lookup` may return it, as a search would."""
    table = [row | {"split": "train"} for row in rows(60)]
    table += [
        {"question": f"Please tell me: {row['question']}", "answer": f"{row['answer']} Ask us.", "split": "test"}
        for row in rows(12)
    ]
    data, questions = exam(table, split_field="split")
    by_id = {row.id: row for row in data.train}
    assert len(questions.records) == 12
    for record, example in zip(questions.records, questions.new["rows"], strict=True):
        [found] = record["arms"]["lookup"]["rows"]
        assert data.group_of[found] == record["group"]  # the near-duplicate, so there was something to leave out
        shown = record["arms"]["retrieved"]["rows"]
        assert len(shown) == finetune.LOOKED_UP and all(data.group_of[row] != record["group"] for row in shown)
        prompt = example.row.prompt[-1]["content"]
        assert example.row.prompt == finetune.with_rows(
            [{"role": "user", "content": record["question"]}], [by_id[row] for row in shown]
        )
        assert by_id[found].answer not in prompt and record["reference"] not in prompt
        assert record["arms"]["after_retrieved"]["rows"] == shown


def test_known_questions_are_looked_up_among_all_rows(exam):
    data, questions = exam(rows(120))
    by_id = {row.id: row for row in data.train}
    for record, example in zip(questions.known, questions.reworded["rows"], strict=True):
        near = finetune.nearest_rows(record["question"], data.train)
        assert record["arms"]["retrieved"]["rows"] == [row.id for row in near]
        turn = {"role": "user", "content": record["question"]}
        assert example.row.prompt == finetune.with_rows([turn], near)
        own = record["arms"]["lookup"]
        assert own["answer"] == by_id[own["rows"][0]].answer == near[0].answer
        assert own["recall"] == (near[0].answer == record["reference"])
        assert own["chrf"] == pytest.approx(finetune.chrf(near[0].answer, record["reference"]))
        assert record["as_trained"]["lookup"]["recall"] == 1
    right = finetune.mean([record["arms"]["lookup"]["recall"] for record in questions.known])
    assert right >= 0.9  # a search finds the row, whatever the words
    for record in questions.records[: questions.asked]:
        best = finetune.nearest_rows(record["question"], data.train, 1)[0]
        own = record["arms"]["lookup"]
        assert (own["answer"], own["rows"]) == (best.answer, [best.id]) and "recall" not in own


# ----------------------------------------------------------------------------------------------------------------------
# Recall


def plain_recall(answer: str, reference: str, answers: list[str]) -> float:
    scores = [(sacrebleu.sentence_chrf(answer, [other]).score, other == reference) for other in answers]
    right = max(score for score, is_right in scores if is_right)
    return float(right > 0 and right >= max(score for score, _ in scores))


def test_recall_is_that_of_a_plain_computation_over_all_answers():
    answers, lot = [row["answer"] for row in rows(80)], random.Random(4)
    given = ["", "?", "I do not know."]
    for _ in range(12):
        one, other = lot.sample(answers, 2)
        words, others = one.split(), other.split()
        given += [one, " ".join(words[: len(words) // 2]), " ".join(lot.sample(words, len(words)))]
        given += [" ".join(words[: len(words) // 3] + others[len(others) // 3 :]), f"{one} {other}"]
    found = Counter()
    for n, answer in enumerate(given):
        like = [text for text in answers if text and answer and fuzz.ratio(text, answer) > 60]
        reference = like[0] if like and n % 4 else lot.choice(answers)
        own = finetune.recall(answer, reference, answers)
        assert own["recall"] == plain_recall(answer, reference, answers), answer
        assert own["chrf"] == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score)
        found[own["recall"]] += 1
    assert min(found[0.0], found[1.0]) > 10


def test_an_answer_that_two_rows_share_is_right_for_both():
    shared = "It is paid within thirty days of the claim."
    assert finetune.recall(shared, shared, [shared, shared, "Another thing."])["recall"] == 1
    assert finetune.recall("", shared, [shared, "Another thing."])["recall"] == 0  # nothing said is nothing known


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.fixture(scope="module")
def laid_out(tiny):
    """laid_out(rows, replayed, **settings) -> (examples, replayed ones, plan, config, training_rows())."""
    tokenizer = finetune.load_tokenizer(tiny.folder)

    def call(count: int, replayed: int = 0, table: list | None = None, **settings):
        plain = {"effective_batch_size": 4, "num_train_epochs": 6, "replay_fraction": 0.25}
        config = finetune.fill_defaults(Config(**plain | settings), tiny)
        examples = finetune.encode(tokenizer, table or sample(count), config.max_length)
        made = [finetune.Example(finetune.Row((), "", f"replay {n}"), [1, 300 + n, 2], 1) for n in range(replayed)]
        first = finetune.one_epoch(examples, made, config)
        plan = finetune.make_plan(config, tiny.config, first, None)
        return examples, made, plan, config, finetune.training_rows(tokenizer, examples, made, plan, config)

    return call


def in_epochs(trained: list, size: int) -> list[list]:
    return [trained[start : start + size] for start in range(0, len(trained), size)]


def test_every_row_is_trained_once_an_epoch(laid_out):
    """64 rows make two times eight updates, within which they are put in order: an epoch begins where one ends."""
    examples, _, _, _, trained = laid_out(64)
    epochs = in_epochs(trained, 64)
    assert len(epochs) == 6
    for epoch in epochs:
        assert Counter(example.row.answer for example in epoch) == Counter(e.row.answer for e in examples)
    assert len({tuple(e.row.answer for e in epoch) for epoch in epochs}) == 6  # each in an order of its own


def test_an_epoch_that_no_update_ends_with_loses_no_row(laid_out):
    examples, _, plan, _, trained = laid_out(50, num_train_epochs=5)
    assert len(trained) == plan.updates * 4 == 5 * 13 * 4
    counts = Counter(example.row.answer for example in trained)
    assert set(counts) == {e.row.answer for e in examples} and set(counts.values()) == {5, 6}


def test_three_quarters_are_asked_in_other_words_and_the_answer_stays(laid_out, tiny):
    examples, _, _, config, trained = laid_out(64, num_train_epochs=20)
    tokenizer = finetune.load_tokenizer(tiny.folder)
    own = {example.row.answer: example for example in examples}
    reworded = [e for e in trained if e.row.question != own[e.row.answer].row.question]
    assert len(reworded) / len(trained) == pytest.approx(config.reworded_fraction, abs=0.04)
    answers = {answer: example.input_ids[example.prompt_length :] for answer, example in own.items()}
    for example in trained:
        trained_ids = [t for t, one in zip(example.input_ids, example.completion_mask, strict=True) if one]
        assert trained_ids == answers[example.row.answer] and trained_ids[-1] == tokenizer.eos_token_id
        turns = list(example.row.prompt)
        assert example.input_ids[: example.prompt_length] == finetune.chat_ids(tokenizer, turns, True)
    several = Counter((e.row.answer, e.row.question) for e in reworded)
    assert max(several.values()) < 10 and len(several) > 0.8 * len(reworded)  # other words each time


def test_what_the_exam_asks_is_never_trained(laid_out):
    """Though a rule of the training may by chance leave the keywords alone."""
    _, _, _, config, trained = laid_out(64, num_train_epochs=30)
    known = finetune.known_questions(sample(64), config.seed)
    assert len(known) >= 30 and {rule for *_, rule in known} == set(TEST_RULES)
    assert not {normalize(o.question) for _, o, _ in known} & {normalize(e.row.question) for e in trained}


@pytest.mark.parametrize("count", [16, 32])
def test_no_update_holds_a_row_twice_where_an_epoch_is_short(count, laid_out):
    _, _, plan, _, trained = laid_out(count, num_train_epochs=10, reworded_fraction=0.0)
    updates = [[e.row.answer for e in trained[n : n + 4]] for n in range(0, len(trained), 4)]
    assert len(updates) == plan.updates and all(len(set(update)) == len(update) == 4 for update in updates)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_share_in_other_words_can_be_none_or_all(fraction, laid_out):
    examples, _, _, _, trained = laid_out(32, reworded_fraction=fraction)
    own = {example.row.answer: example.row.question for example in examples}
    same = [example.row.question == own[example.row.answer] for example in trained]
    assert all(same) if fraction == 0 else sum(same) < 0.1 * len(same)


def test_what_is_trained_depends_on_seed_and_rows_alone(laid_out):
    once, again, other = (laid_out(32, 40, seed=seed)[-1] for seed in (1, 1, 2))
    random.random()  # nobody else's dice
    assert [e.input_ids for e in once] == [e.input_ids for e in again] != [e.input_ids for e in other]


def test_a_longer_training_begins_like_a_shorter_one(laid_out):
    """Or it could not go on with --max-steps raised, and two numbers of epochs would differ by more than that."""
    short, long = (laid_out(64, num_train_epochs=epochs)[-1] for epochs in (2, 4))
    assert [e.input_ids for e in long[: len(short)]] == [e.input_ids for e in short]


def test_replayed_answers_are_not_repeated_while_there_are_enough(laid_out):
    def times(replayed: int) -> list[int]:
        _, made, _, config, trained = laid_out(32, replayed, num_train_epochs=6)
        counts = Counter(example.row.place for example in trained if not example.row.prompt)
        assert sum(counts.values()) <= 6 * round(config.replay_fraction * 32) and len(counts) <= len(made)
        return sorted(counts.values())

    assert times(48) == [1] * 48  # 8 of them an epoch, 6 epochs
    assert times(100) == [1] * 48  # more than are needed
    assert times(20) == [1] * 16 + [2] * 4 or max(times(20)) <= 2  # too few: fewer an epoch, and hardly a second time
    assert times(0) == []


def test_replayed_answers_stay_as_they_are(laid_out):
    _, made, _, _, trained = laid_out(32, 48, reworded_fraction=1.0)
    found = [example for example in trained if not example.row.prompt]
    assert {tuple(e.input_ids) for e in found} == {tuple(e.input_ids) for e in made}


def test_rows_that_other_words_make_too_long_are_asked_in_their_own(laid_out):
    table = sample(32)
    longest = max(len(e.input_ids) for e in laid_out(32)[0])
    examples, _, _, _, trained = laid_out(32, table=table, max_length=longest, reworded_fraction=1.0)
    assert max(len(example.input_ids) for example in trained) == longest
    own = {example.row.answer: example for example in examples}
    [*most, (length, answer)] = sorted((len(e.input_ids), answer) for answer, e in own.items())
    assert most[-1][0] < length == longest  # the longest of all falls back wherever other words are longer
    kept = [e.row.question == own[answer].row.question for e in trained if e.row.answer == answer]
    free = laid_out(32, table=table, reworded_fraction=1.0)[-1]
    over = [len(e.input_ids) > longest for e in free if e.row.answer == answer]
    assert any(over) and kept.count(True) >= over.count(True)


@pytest.mark.parametrize("steps", [3, 40])
def test_max_steps_may_be_fewer_or_more_than_the_epochs(steps, laid_out):
    _, made, plan, _, trained = laid_out(32, 60, num_train_epochs=2, max_steps=steps)
    assert plan.updates == steps and len(trained) == 4 * steps
    counts = Counter(example.row.place for example in trained if not example.row.prompt)
    assert max(counts.values(), default=0) <= math.ceil(4 * steps / 36 * 8 / len(made))


# ----------------------------------------------------------------------------------------------------------------------
# How it is trained: the tiny model


def test_rows_are_dealt_out_to_the_ranks_by_length(laid_out, monkeypatch):
    *_, plan, _, alone = laid_out(32, effective_batch_size=8)
    monkeypatch.setattr(finetune, "WORLD_SIZE", 2)
    micro = plan.micro_batch_size // 2
    half = dataclasses.replace(plan, micro_batch_size=micro, world_size=2)
    monkeypatch.setattr(finetune, "make_plan", lambda *_: half)
    shared = laid_out(32, effective_batch_size=8)[-1]
    apart = 0
    for update, same in zip(in_epochs(shared, 8), in_epochs(alone, 8), strict=True):
        assert sorted(e.input_ids for e in update) == sorted(e.input_ids for e in same)
        lengths = [len(example.input_ids) for example in update]
        first, second = (sum(lengths[n] for n in range(8) if n // micro % 2 == rank) for rank in (0, 1))
        assert abs(first - second) <= (max(lengths) - min(lengths)) * (4 // micro)
        apart += abs(sum(sorted(lengths)[:4]) - sum(sorted(lengths)[4:]))
    assert apart > 100  # in order of length one of them would have had all the long ones


@pytest.fixture
def trainable(tiny, tmp_path, monkeypatch):
    """trainable(validate, **settings) -> (training, plan, folder of the checkpoints) of a short training."""
    monkeypatch.setattr(finetune, "CHECKS", 6)  # so that each of six epochs ends with one

    def call(validate, **settings):
        plain = {"lora_r": 4, "num_train_epochs": 6, "effective_batch_size": 8, "replay_fraction": 0.0}
        config = finetune.fill_defaults(Config(**plain | settings), tiny)
        tokenizer = finetune.load_tokenizer(tiny.folder)
        examples = finetune.encode(tokenizer, sample(16), config.max_length)
        plan = finetune.make_plan(config, tiny.config, examples, None)
        model = finetune.add_lora(finetune.load_model(tiny, config), config, tiny)
        trained = finetune.training_rows(tokenizer, examples, [], plan, config)
        partial = tmp_path / "x.partial"
        partial.mkdir(exist_ok=True)
        found = finetune.train(model, tokenizer, trained, lambda: validate(model), plan, config, partial)
        return model, *found, partial

    return call


def b_weights(model) -> dict:
    return {name: weight.clone() for name, weight in model.named_parameters() if "lora_B" in name}


# What was measured of the base and after each check; the place that is kept.
COURSES = {
    "recall peaks in the middle": ("knowledge", [0.1, 0.2, 0.5, 0.9, 0.8, 0.7, 0.6], [20.0] * 7, 3),
    "the best of all answers worse": ("knowledge", [0.1, 0.2, 0.5, 0.9, 0.8, 0.7, 0.6], [20, 21, 21, 9, 9, 9, 9], 2),
    "the last": ("knowledge", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [20.0] * 7, 6),
    "by loss": ("style", [None] * 7, [], 2),
}


@pytest.mark.parametrize("course", COURSES)
def test_the_epoch_that_is_kept_is_the_one_that_was_chosen(course, trainable):
    """Two checkpoints are kept at a time, and the best is one of them to the end."""
    goal, recalls, chrfs, best = COURSES[course]
    losses, seen = [5.0, 4.0, 3.0, 3.1, 3.2, 3.3, 3.4], []

    def validate(model) -> dict:
        n = len(seen)
        seen.append(b_weights(model))
        return {"recall": recalls[n], "nll": [losses[n]], "chrf": chrfs[n : n + 1]}

    model, training, plan, partial = trainable(validate, goal=goal, early_stopping_patience=0)
    assert plan.updates_per_epoch == 2 and [epoch["step"] for epoch in training["epochs"]] == [0, 2, 4, 6, 8, 10, 12]
    assert finetune.choose_epoch(training["epochs"], goal) == best and training["best_step"] == 2 * best
    names = {path.name for path in partial.glob("checkpoint-*")}
    assert f"checkpoint-{2 * best}" in names and "checkpoint-12" in names and len(names) <= 2
    kept = b_weights(model)
    assert all(kept[name].equal(weight) for name, weight in seen[best].items())
    assert best == 6 or not all(kept[name].equal(weight) for name, weight in seen[6].items())
    assert [entry["eval_loss"] for entry in training["log"] if "eval_loss" in entry] == losses[1:]


def test_patience_ends_a_training_for_knowledge_too(trainable):
    recalls, asked_for = iter([0.1, 0.5, 0.4, 0.3, 0.9, 0.9, 0.9]), []

    def validate(model) -> dict:
        asked_for.append(1)
        return {"recall": next(recalls), "nll": [3.0], "chrf": [20.0]}

    _, training, _, _ = trainable(validate, early_stopping_patience=2)
    assert training["stopped_early"] and (training["steps"], training["best_step"], len(asked_for)) == (6, 2, 4)


def test_a_long_training_is_checked_at_intervals_and_at_its_end(trainable):
    def validate(model) -> dict:
        return {"recall": 0.5, "nll": [3.0], "chrf": [20.0]}

    _, training, plan, _ = trainable(validate, num_train_epochs=13)
    steps = [epoch["step"] for epoch in training["epochs"]]
    assert steps == [0, 6, 12, 18, 24, 26] and plan.updates == 26  # every third epoch, and the end


@pytest.mark.parametrize("ratio", [1, 8])
def test_lora_plus_lets_b_learn_faster(ratio, tiny, tmp_path):
    config = finetune.fill_defaults(Config(lora_r=4, loraplus_lr_ratio=ratio, learning_rate=1e-3), tiny)
    tokenizer = finetune.load_tokenizer(tiny.folder)
    examples = finetune.encode(tokenizer, sample(8), config.max_length)
    plan = finetune.make_plan(config, tiny.config, examples, None)
    model = finetune.add_lora(finetune.load_model(tiny, config), config, tiny)
    trainer = finetune.make_trainer(model, tokenizer, examples, dict, plan, config, tmp_path, ())
    groups = trainer.create_optimizer().param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates = {"lora_A": set(), "lora_B": set()}
    for group in groups:
        for weight in group["params"]:
            kind = next(kind for kind in rates if kind in names[id(weight)])
            rates[kind].add((group["lr"], group["weight_decay"]))
    assert rates == {"lora_A": {(1e-3, 0.5)}, "lora_B": {(ratio * 1e-3, 0.5)}}
    assert sum(len(group["params"]) for group in groups) == sum(w.requires_grad for w in model.parameters())
