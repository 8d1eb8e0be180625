"""Verdict, advice, power, crossfit and the kept epoch: both sides of each rule, against plain computations."""

import io
import math
import random
import re
import types
from statistics import fmean, stdev

import pytest
from rich.console import Console

import finetune
from finetune import ARMS, METRICS, WAYS, bootstrap, build_evaluation, choose_epoch, crossfit, judge, power_of

SPREAD = 2.0  # of the noise in the made-up chrF


def test_chrf_and_rouge_by_hand():
    """chrF: F2 of the precision and recall of character n-grams, averaged over n = 1 to 6, spaces left out."""
    answer, reference = "the deductible is paid first", "you pay the deductible first"

    def grams(text, n):
        text = text.replace(" ", "")
        return [text[i : i + n] for i in range(len(text) - n + 1)]

    precision, recall = [], []
    for n in range(1, 7):
        ours, theirs = grams(answer, n), grams(reference, n)
        common = sum(min(ours.count(g), theirs.count(g)) for g in set(ours))
        precision.append(common / len(ours))
        recall.append(common / len(theirs))
    p, r = sum(precision) / 6, sum(recall) / 6
    assert finetune.chrf(answer, reference) == pytest.approx(100 * 5 * p * r / (4 * p + r), abs=0.5)
    assert finetune.rouge_l(answer, reference) == pytest.approx(2 * 3 / 10)  # the, deductible, first


def test_bootstrap_draws_whole_groups():
    values = [1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0]
    middle, low, high = bootstrap(values, [0, 0, 0, 0, 1, 1, 1, 1], seed=0)
    assert (middle, low, high) == (3.0, 1.0, 5.0)  # two groups: a quarter of the draws hold only one of them
    _, low, high = bootstrap(values * 20, list(range(160)), seed=0)
    spread = 1.96 * 2 / math.sqrt(160)
    assert low == pytest.approx(3 - spread, abs=0.05) and high == pytest.approx(3 + spread, abs=0.05)
    assert bootstrap(values, [0] * 4 + [1] * 4, 7) == bootstrap(values, [0] * 4 + [1] * 4, 7)


# ----------------------------------------------------------------------------------------------------------------------
# From records to numbers


def made_up(
    new: int = 40, known: int = 30, answered: int = 30, ranked: int = 20, rows_a_group: int = 1,
    level: dict | None = None, seed: int = 3,
) -> types.SimpleNamespace:  # fmt: skip
    """What the exam gives: `level` is each arm's mean chrF on (new, known) questions."""
    dice = random.Random(seed)
    levels = dict.fromkeys(ARMS, (25.0, 25.0)) | {"lookup": (24.0, 99.0)} | (level or {})

    def answer(arm: str, part: int) -> dict:
        return {"chrf": levels[arm][part] + dice.gauss(0, SPREAD), "answer": f"{arm} {dice.random()}"}

    records, asked = [], []
    for n in range(new):
        ease = dice.gauss(0, 1)  # some questions are harder, for every arm
        arms = {arm: {"nll": 4 + ease - (arm == "after") + dice.gauss(0, 0.2)} for arm in ARMS if arm != "lookup"}
        arms["lookup"] = {}
        for arm in ARMS if n < answered else ():
            arms[arm] |= answer(arm, 0) | {"rouge_l": dice.random(), "mean_words": float(dice.randint(20, 60))}
            arms[arm] |= {} if arm == "lookup" else {"eos_rate": float(dice.random() < 0.9)}
            is_ranked = arm in ("before", "after") and n < ranked
            arms[arm] |= {"ranking_top1": float(dice.random() < 0.8)} if is_ranked else {}
        group = n // rows_a_group
        records.append({"id": f"n{n}", "question": f"new {n}", "reference": "a", "group": group, "arms": arms})
    share = {"before": 0.1, "lookup": 1.0, "after": 0.8}
    for n in range(known):
        arms = {arm: answer(arm, 1) | {"recall": float(dice.random() < share.get(arm, 0.1))} for arm in ARMS}
        trained = {arm: answer(arm, 1) | {"recall": float(dice.random() < share[arm])} for arm in share}
        asked.append(
            {
                "id": f"k{n}", "question": f"known {n} please", "trained_question": f"known {n}?", "rule": "polite",
                "reference": "b", "group": 1000 + n // rows_a_group, "arms": arms, "as_trained": trained,
            }
        )  # fmt: skip
    as_rows = [types.SimpleNamespace(row=types.SimpleNamespace(id=record["id"])) for record in records]
    return types.SimpleNamespace(
        validation=as_rows, records=records, known=asked,
        candidates=[[None] * 10] * ranked, general=[None] * 60, train_answers=["zzz"],
        losses={"before": {"train": 3.0, "general": 0.7}, "after": {"train": 0.2, "general": 0.8}}, seconds=12.34,
    )  # fmt: skip


CONFIG = types.SimpleNamespace(seed=42, split_field=None, goal="knowledge")


@pytest.fixture(scope="module")
def questions() -> types.SimpleNamespace:
    return made_up()


@pytest.fixture(scope="module")
def built(questions) -> dict:
    return build_evaluation(questions, {}, CONFIG)


def test_means_are_those_of_the_questions_that_were_measured(questions, built):
    for arm in ARMS:
        for metric in METRICS:
            values = [r["arms"][arm][metric] for r in questions.records if metric in r["arms"][arm]]
            assert len(values) == {"nll": 40 if arm != "lookup" else 0}.get(metric, len(values))
            assert built[arm].get(metric) == (pytest.approx(fmean(values)) if values else None)
        recalls = [k["arms"][arm]["recall"] for k in questions.known]
        assert built[arm]["reworded"]["recall"] == pytest.approx(sum(recalls) / 30)
    assert "nll" not in built["lookup"] and "ranking_top1" not in built["retrieved"]
    assert built["after"]["as_trained"]["recall"] == fmean(k["as_trained"]["after"]["recall"] for k in questions.known)
    assert built["ranking_chance"] == pytest.approx(0.1)
    assert built["ranking_interval"][0] == built["after"]["ranking_top1"]
    assert built["memorization"]["held_out_nll_after"] == built["after"]["nll"] and built["seconds"] == 12.3
    assert built["retention"]["change_percent"] == pytest.approx(100 / 7) and built["retention"]["prompts"] == 60


def test_changes_are_paired_question_by_question(questions, built):
    def plain(records, metric, arm, other, part="arms"):
        return [r[part][arm][metric] - r[part][other][metric] for r in records if metric in r[part][arm]]

    new, known = questions.records, questions.known
    expected = {metric: plain(new, metric, "after", "before") for metric in METRICS}
    expected |= {f"chrf_vs_{arm}": plain(new, "chrf", "after", arm) for arm in ("prompted", "lookup", "retrieved")}
    expected |= {"recall": plain(known, "recall", "after", "before")}
    expected |= {"chrf_reworded": plain(known, "chrf", "after", "before")}
    expected |= {"recall_as_trained": plain(known, "recall", "after", "before", "as_trained")}
    assert built["delta"].keys() == expected.keys()
    for name, differences in expected.items():
        middle, low, high = built["delta"][name]
        assert middle == pytest.approx(fmean(differences)), name
        error = stdev(differences) / math.sqrt(len(differences))  # every question is a group of its own here
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15), name


def test_groups_are_drawn_whole_in_every_interval():
    """The same questions, five to a group: what is in a group counts less, so intervals are wider."""
    one, five = (made_up(new=80, answered=80, known=80, rows_a_group=n) for n in (1, 5))
    for row in five.records:  # what a group shares
        row["arms"]["after"]["chrf"] += 6 * (row["group"] % 3)
    for row in one.records:
        row["arms"]["after"]["chrf"] += 6 * (row["group"] // 5 % 3)
    narrow, wide = (build_evaluation(some, {}, CONFIG) for some in (one, five))
    low, high = (e["delta"]["chrf"][2] - e["delta"]["chrf"][1] for e in (narrow, wide))
    assert high > 1.5 * low and wide["power"]["chrf"] > 1.5 * narrow["power"]["chrf"]
    assert wide["power"]["groups"] == 16 and narrow["power"]["groups"] == 80


def test_power_is_the_change_that_is_found_80_times_in_100(questions, built):
    power = built["power"]
    assert (power["questions"], power["groups"], power["known_groups"]) == (30, 30, 30)
    dice, found, draws = random.Random(1), 0, 400
    answered = [r["arms"] for r in questions.records if "chrf" in r["arms"]["after"]]
    noise = [a["after"]["chrf"] - a["before"]["chrf"] for a in answered]
    noise = [x - fmean(noise) for x in noise]
    for _ in range(draws):  # other questions of their kind, on which the true change is as large as power says
        drawn = [dice.choice(noise) + power["chrf"] for _ in noise]
        error = stdev(drawn) / math.sqrt(len(drawn))
        found += fmean(drawn) - 1.96 * error > 0
    assert 0.73 < found / draws < 0.87
    losses = [r["arms"]["after"]["nll"] - r["arms"]["before"]["nll"] for r in questions.records]
    assert power["nll"] == pytest.approx(2.8 * stdev(losses) / math.sqrt(40), rel=0.05)


def test_power_before_training():
    chrf, nll = map(float, re.findall(r"\d+\.\d+", power_of(46)))
    assert chrf == pytest.approx(2.8 * finetune.TYPICAL_SPREAD["chrf"] / math.sqrt(46), abs=0.05)
    assert nll == pytest.approx(2.8 * finetune.TYPICAL_SPREAD["nll"] / math.sqrt(46), abs=0.005)
    assert power_of(46).startswith("46 ") and "too few" not in power_of(8)
    assert "too few" in power_of(7) and not re.search(r"\d\.\d", power_of(7))


# ----------------------------------------------------------------------------------------------------------------------
# The verdict


def evaluation(**changes) -> dict:
    """What judge() reads, of a run that helped; then the changes, by "part__key"."""
    recalls = {"reworded": {"recall": 0.84}, "as_trained": {"recall": 0.95}}
    result = {
        "before": {"chrf": 27.3, "nll": 4.24, "reworded": {"recall": 0.12}, "as_trained": {"recall": 0.09}},
        "prompted": {"chrf": 20.8},
        "after": {"chrf": 29.7, "nll": 5.34, "ranking_top1": 0.9} | recalls,
        "delta": {
            "recall": [0.72, 0.6, 0.83],
            "nll": [1.1, 0.9, 1.3],
            "chrf": [2.4, -0.3, 3.9],
            "chrf_vs_prompted": [8.9, 6.0, 11.0],
        },
        "retention": {"before": 0.72, "after": 0.756, "change_percent": 5.0},
        "ranking_interval": [0.9, 0.8, 1.0],
        "ranking_chance": 0.1,
        "power": {"questions": 46, "groups": 46, "known_groups": 40, "chrf": 2.0, "nll": 0.3},
    }
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            result[part][inner] = value
        else:
            result[part] = value
    return result


UNSURE = [0.02, -0.1, 0.2]  # an interval that holds 0
DUMB = {"delta__recall": UNSURE}
STYLE = DUMB | {"delta__nll": [-0.5, -0.6, -0.4]}
NOTHING = DUMB | {"delta__nll": UNSURE, "delta__chrf": [0.1, -1.0, 1.2]}
RULES = {
    # name: (label, at a cost, changes)
    "knows; that the loss rose is no harm": ("helped", False, {}),
    "chrF may be lower by chance": ("helped", False, {"delta__chrf": [-1.0, -2.0, 0.1]}),
    "chrF is lower for sure": ("harmed", False, {"delta__chrf": [-1.0, -2.0, -0.1]}),
    "recall may be chance, loss rose, nothing lost": ("no evidence", False, DUMB),
    "recall just certain": ("helped", False, {"delta__recall": [0.1, 0.001, 0.2]}),
    "recall just not certain": ("no evidence", False, {"delta__recall": [0.1, 0.0, 0.2]}),
    "recall went down": ("no evidence", False, {"delta__recall": [-0.1, -0.2, -0.01]}),
    "answers may not belong": ("no evidence", False, {"ranking_interval": [0.15, 0.1, 0.3]}),
    "answers belong, just": ("helped", False, {"ranking_interval": [0.15, 0.11, 0.3]}),
    "style by loss": ("style only", False, STYLE),
    "style by chrF above both": ("style only", False, DUMB | {"delta__chrf": [2.4, 0.3, 3.9]}),
    "chrF not above the prompted base": (
        "no evidence", False, DUMB | {"delta__chrf": [2.4, 0.3, 3.9], "delta__chrf_vs_prompted": [1.0, -0.1, 2.0]},
    ),
    "style, lost much": ("style only", True, STYLE | {"retention__change_percent": 25.1}),
    "style, lost less": ("style only", False, STYLE | {"retention__change_percent": 25.0}),
    "nothing learned, little lost": ("no evidence", False, NOTHING | {"retention__change_percent": 5.0}),
    "nothing learned, something lost": ("harmed", False, NOTHING | {"retention__change_percent": 5.1}),
    "loss rose alone": ("no evidence", False, NOTHING | {"delta__nll": [1.0, 0.9, 1.1]}),
    "knows, lost much": ("helped", True, {"retention__change_percent": 87.0}),
    "knows, lost less": ("helped", False, {"retention__change_percent": 25.0}),
    "8 groups": ("helped", False, {"power__groups": 8}),
    "7 groups": ("no evidence", False, {"power__groups": 7}),
    "7 known groups": ("no evidence", False, {"power__known_groups": 7}),
    "loss is not a number": ("no evidence", False, {"delta__nll": [math.nan] * 3}),
    "general loss is not a number": ("no evidence", False, {"retention__change_percent": math.nan}),
    "general loss is infinite": ("no evidence", False, {"retention__change_percent": math.inf}),
    "chrF is lower and a loss not a number": (
        "no evidence", False, {"delta__chrf": [-1.0, -2.0, -0.1], "delta__nll": [math.inf] * 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_verdict_follows_its_rules(name):
    label, cost, changes = RULES[name]
    verdict = judge(evaluation(**changes))
    assert (verdict["label"], verdict["cost"]) == (label, cost), verdict
    sentence = verdict["sentence"]
    assert sentence.startswith(label + (", at a cost" if cost else "")) and verdict["why"] in sentence
    assert ("at a cost" in sentence) == cost


def test_verdict_names_its_numbers_and_says_helped_with_what():
    sentence = judge(evaluation())["sentence"]
    start = "helped (knows its FAQ: recall 84%, was 12%, +72 points [+60, +83]; as trained 95%, was 9%; new questions: "
    assert sentence.startswith(start)
    for part in ("chrF 29.7, base 27.3, +2.4 [-0.3, +3.9]", "brief 20.8, +8.9", "first for 90%, chance 10%", "5.34"):
        assert part in sentence
    assert sentence.endswith("loss on general answers +5%)")
    assert judge(evaluation(power__groups=5))["sentence"] == "no evidence: 5 questions are too few"
    odd = judge(evaluation(ranking_interval=[0.15, 0.05, 0.3]))
    assert "the answers may not belong to their questions" in odd["sentence"]
    assert "may not belong" not in sentence


def test_a_measurement_that_is_missing_is_no_evidence():
    for name in ("recall", "nll", "chrf", "chrf_vs_prompted"):
        given = evaluation()
        del given["delta"][name]
        assert judge(given)["label"] == "no evidence"


# ----------------------------------------------------------------------------------------------------------------------
# The advice


def advice_for(level: dict, **how) -> dict:
    return build_evaluation(made_up(level=level, **how), {}, CONFIG)["advice"]


ADVICE = {
    # way: mean chrF of each arm on (new, known) questions that leads to it
    "prompt": {"lookup": (25, 25)},
    "lookup": {},
    "retrieve": {"retrieved": (60, 80)},
    "tuned": {"retrieved": (40, 50), "after": (60, 90)},
    "tuned with retrieval": {"after": (60, 80), "after_retrieved": (65, 90)},
}


@pytest.mark.parametrize("way", ADVICE)
def test_advice_is_the_cheapest_way_that_no_dearer_one_beats(way):
    advice = advice_for(ADVICE[way])
    arm = next(arm for arm, (name, *_) in WAYS.items() if name == way)
    assert advice["way"] == way and advice["sentence"].startswith(WAYS[arm][1] + ": chrF")
    assert advice["sentence"].endswith(WAYS[arm][2] + ".")
    given = build_evaluation(made_up(level=ADVICE[way]), {}, CONFIG)
    for part in (given[arm]["reworded"]["chrf"], given[arm]["chrf"]):
        assert f"{part:.1f}" in advice["sentence"]
    assert f"{given['after']['chrf']:.1f}" in advice["sentence"]  # beside the tuned model
    half = (given[arm]["reworded"]["chrf"] + given[arm]["chrf"]) / 2
    assert advice["scores"][arm] == pytest.approx(half)


@pytest.mark.parametrize(("margin", "way"), [(1.5, "lookup"), (2.5, "tuned"), (-2.5, "lookup")])
def test_a_dearer_way_must_win_with_its_whole_interval(margin, way):
    """The tuned model is above looking up by `margin` standard errors of the half-and-half difference."""
    level = dict.fromkeys(("prompted", "retrieved", "after_retrieved"), (0, 0))
    some = made_up(new=30, known=30, level=level)
    error = SPREAD / math.sqrt(30) / math.sqrt(2)  # of either set SPREAD / sqrt(30), and half the sum of both
    for records in (some.records, some.known):
        for n, record in enumerate(records):
            record["arms"]["after"]["chrf"] = record["arms"]["lookup"]["chrf"] + margin * error + (-1) ** n * SPREAD
    assert build_evaluation(some, {}, CONFIG)["advice"]["way"] == way


def test_each_set_weighs_half():
    """Better by 10 on new questions and worse by 8 on many more known ones: better by 1 in all."""
    level = {"lookup": (20, 90), "after": (30, 82), "retrieved": (0, 0), "after_retrieved": (0, 0), "prompted": (0, 0)}
    assert advice_for(level, new=30, answered=30, known=300)["way"] == "tuned"
    assert advice_for(level | {"after": (30, 78)}, new=300, answered=300, known=30)["way"] == "lookup"


def test_too_few_questions_give_no_advice():
    for few in ({"answered": 7}, {"known": 7}, {"new": 14, "answered": 14, "rows_a_group": 2}):
        advice = advice_for({"after": (90, 90)}, **few)
        assert advice["way"] is None and "7 " in advice["sentence"] and "too few" in advice["sentence"]
    assert advice_for({"after": (90, 90)}, answered=8, known=8)["way"] == "tuned"


def test_ways_that_were_not_measured_are_not_weighed():
    some = made_up(level={"after": (60, 90)})
    for record in some.records + some.known:
        del record["arms"]["retrieved"], record["arms"]["after_retrieved"]
    advice = build_evaluation(some, {}, CONFIG)["advice"]
    assert advice["way"] == "tuned" and advice["scores"].keys() == {"prompted", "lookup", "after"}


# ----------------------------------------------------------------------------------------------------------------------
# The kept epoch


def epoch(step: int, recall: float, chrf: list[float], nll: list[float]) -> dict:
    return {"step": step, "recall": recall, "chrf": chrf, "nll": nll}


BASE = epoch(0, 0.9, [20.0, 20.0], [4.0] * 4)


@pytest.mark.parametrize(
    ("kept", "epochs"),
    [
        (2, [(0.3, 21, 3), (0.8, 20, 5), (0.5, 30, 2)]),  # knows most, no worse than the base
        (3, [(0.3, 21, 3), (0.8, 19.9, 5), (0.5, 20, 2)]),  # the second answers new questions worse
        (1, [(0.3, 19, 3), (0.8, 18, 2), (0.9, 17, 1)]),  # all do: the best chrF
        (2, [(0.5, 21, 3), (0.5, 20, 2), (0.5, 30, 4)]),  # equals: the lower loss
        (2, [(0.5, 19, 3), (0.5, 19, 2), (0.5, 18, 1)]),
        (2, [(0.5, 21, math.nan), (0.5, 21, 9), (math.nan, 21, 1)]),  # what is no number is the worst
        (1, [(0.1, 1, 9)]),  # never the base
    ],
)
def test_knowledge_keeps_what_is_known_while_answers_are_no_worse(kept, epochs):
    made = [BASE] + [epoch(n, recall, [c, c], [loss] * 4) for n, (recall, c, loss) in enumerate(epochs, 1)]
    assert choose_epoch(made, "knowledge") == kept


def test_style_keeps_the_lowest_loss():
    made = [BASE, epoch(5, 0.9, [30] * 2, [3] * 4), epoch(9, 0.1, [1] * 2, [2] * 4), epoch(14, 1, [9] * 2, [2.5] * 4)]
    assert choose_epoch(made, "style") == 2 and choose_epoch(made, "knowledge") == 1
    made[2]["nll"] = [math.nan] * 4
    assert choose_epoch(made, "style") == 3


def test_only_some_rows_choose():
    made = [BASE, epoch(5, 0.5, [25, 15], [1, 9, 1, 9]), epoch(9, 0.5, [15, 25], [9, 1, 9, 1])]
    assert choose_epoch(made, "style", [0, 2]) == 1 and choose_epoch(made, "style", {1, 3}) == 2
    assert choose_epoch(made, "knowledge", [0]) == 1 and choose_epoch(made, "knowledge", [1]) == 2
    made[2]["nll"][2] = 0.5
    assert choose_epoch(made, "knowledge", [2]) == 2  # no answer among these rows: then chrF forbids nothing


def crossfitted(epochs, records, seed) -> float:
    """The same, the long way."""
    groups = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    named = sorted(groups.values(), key=lambda some: finetune.random_key(seed, some[0]["id"]))
    half = {record["id"] for some in named[::2] for record in some}
    total = 0.0
    for place, record in enumerate(records):
        judges = [n for n, r in enumerate(records) if (r["id"] in half) != (record["id"] in half)]
        means = [fmean(epoch["nll"][n] for n in judges) for epoch in epochs[1:]]
        total += epochs[1:][means.index(min(means))]["nll"][place]
    return total / len(records)


def test_crossfit_is_each_half_at_the_epoch_that_the_other_chose():
    dice, records = random.Random(2), made_up(rows_a_group=2).records
    epochs = [epoch(n, 0, [], [4 + dice.gauss(0, 1) for _ in records]) for n in range(21)]
    found = crossfit(epochs, records, "style", 42)
    assert found == pytest.approx(crossfitted(epochs, records, 42))
    best = fmean(epochs[choose_epoch(epochs, "style")]["nll"])
    assert best < 3.85 and abs(found - 4) < abs(best - 4)  # pure noise: the best of twenty looks better than it is
    assert len({crossfit(epochs, records, "style", seed) for seed in range(5)}) > 1


def test_crossfit_where_there_is_nothing_to_cross(questions):
    plain = fmean(r["arms"]["after"]["nll"] for r in questions.records)
    epochs = [epoch(n, 0, [], [float(n)] * 40) for n in range(3)]
    style = types.SimpleNamespace(seed=42, split_field=None, goal="style")
    others = types.SimpleNamespace(**vars(questions) | {"validation": questions.validation[::-1]})  # other rows chose
    assert build_evaluation(questions, {"epochs": epochs}, style)["nll_crossfit"] == 1.0
    assert build_evaluation(others, {"epochs": epochs}, style)["nll_crossfit"] == pytest.approx(plain)
    assert build_evaluation(questions, {}, style)["nll_crossfit"] == pytest.approx(plain)
    short = [epoch(n, 0, [], [float(n)] * 39) for n in range(3)]  # not the rows that are reported on
    assert build_evaluation(questions, {"epochs": short}, style)["nll_crossfit"] == pytest.approx(plain)


# ----------------------------------------------------------------------------------------------------------------------
# The screen


@pytest.mark.parametrize(("terminal", "width", "limit"), [(True, 80, 80), (True, 100, 100), (False, None, 100)])
def test_the_table_fits_the_screen(built, monkeypatch, terminal, width, limit):
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, highlight=False)
    monkeypatch.setattr(finetune, "console", screen)
    wide = built | {"delta": built["delta"] | {"chrf": [-10.4, -10.1, 13.6], "eos_rate": [-0.9, -0.95, 0.7]}}
    finetune.show_evaluation(wide)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= limit and "…" not in screen.file.getvalue()
    text = " ".join(screen.file.getvalue().split())
    assert "-10.4 [-10.1, +13.6]" in text and "New questions" in text and "Known, reworded" in text
    [recall] = [line for line in lines if line.startswith(" recall ") and "as trained" not in line]
    assert recall.split()[1:7] == [f"{built[arm]['reworded']['recall']:.0%}" for arm in ARMS]
    [loss] = [line for line in lines if line.startswith(" loss")]
    assert loss.split()[3] == "–"  # looking up has no loss


def test_the_screen_shows_a_known_and_a_new_question(built, monkeypatch):
    screen = Console(file=io.StringIO(), color_system=None, highlight=False)
    monkeypatch.setattr(finetune, "console", screen)
    seconds = {"seconds": 9, "tokens_per_second": 5, "peak_vram_gib": None, "peak_ram_gib": 1.0}
    finetune.show_result({"training": {"first_loss": 3, "last_loss": 1} | seconds, "evaluation": built})
    text = screen.file.getvalue()
    known, new = built["known"][0], built["questions"][0]
    words = [f"Known     {known['question']}", f"New       {new['question']}"]
    words += [record["arms"][arm]["answer"] for record in (known, new) for arm in ("before", "after")]
    assert all(text.count(some) == 1 for some in words)
