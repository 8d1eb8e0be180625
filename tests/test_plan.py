"""The plan: how an update is cut into forward passes changes its speed and memory, never what is learned. Only AdamW's
moments in 8 bits, the last resort, change that, by rounding."""

import dataclasses
import functools
import json
import signal

import pytest
import torch
from conftest import rows

import finetune

SEVEN_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    faq = tmp_path_factory.mktemp("plan") / "faq.json"
    faq.write_text(json.dumps(rows(40)), encoding="utf-8")
    return finetune.Config(
        model=str(tiny_model), data=(faq,), lora_r=4, lora_dropout=0.0, effective_batch_size=6, max_steps=4,
        learning_rate=1e-2, lr_scheduler_type="constant", max_new_tokens=4, warmup_steps=0, num_train_epochs=3,
        goal="style", early_stopping_patience=1, weight_decay=0.0, loraplus_lr_ratio=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def examples(config, tiny):
    tokenizer, data = finetune.load_tokenizer(tiny.folder), finetune.load_data(config)
    sides = {"train": data.train, "eval": data.eval}
    return {side: finetune.encode(tokenizer, rows, config.max_length) for side, rows in sides.items()}


@pytest.fixture(scope="module")
def trained(config, examples, tiny, tmp_path_factory):
    """trained(rows a forward, checkpointing) -> result of train() and the adapter it left."""
    tokenizer = finetune.load_tokenizer(tiny.folder)
    shape, batch = tiny.config, config.effective_batch_size

    def call(micro, checkpointing=False, callbacks=(), optim=finetune.ADAMW, partial=None, tracked=None, **changes):
        own = dataclasses.replace(config, **changes)
        model = finetune.add_lora(finetune.load_model(tiny, own), own, tiny)
        plan = dataclasses.replace(
            finetune.make_plan(own, shape, examples["train"], None),
            micro_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            gradient_checkpointing=checkpointing,
            optim=optim,
        )
        partial = partial or tmp_path_factory.mktemp("run") / "x.partial"
        partial.mkdir(exist_ok=True)
        trained = finetune.training_rows(tokenizer, examples["train"], [], plan, own)

        def validate() -> dict:
            return {"recall": None, "nll": finetune.answer_nll(model, tokenizer, examples["eval"]), "chrf": []}

        track = [].append if tracked is None else tracked.append
        training, kept = finetune.train(model, tokenizer, trained, validate, plan, own, partial, callbacks, track)
        weights = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" in name}
        return training, kept, weights

    plain = functools.cache(call)  # what several tests compare with is trained once

    def cached(*args, **changes):
        return call(*args, **changes) if "callbacks" in changes or "partial" in changes else plain(*args, **changes)

    return cached


ROUNDING = 1e-4  # what sums in another order become after four updates of up to 0.01 each


def agree(one: dict, other: dict, tolerance: float) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def test_cutting_and_checkpointing_do_not_change_what_is_learned(trained):
    whole, _, adapter = trained(6)
    for micro, checkpointing in ((1, True), (2, False)):
        other, _, reference = trained(micro, checkpointing)
        losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (whole, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert agree(adapter, reference, ROUNDING)


class OutOfMemoryOnce:
    """Raises what PyTorch raises on a full GPU, in the middle of one update."""

    def __init__(self, step: int):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            raised = False

            def on_substep_end(inner, args, state, control, **_):
                if state.global_step == step and not inner.raised:
                    inner.raised = True
                    raise torch.OutOfMemoryError("made up")

        self.callback = Callback()


@pytest.mark.parametrize("step", [0, 2])
def test_out_of_memory_in_mid_run_halves_the_rows_and_loses_no_update(trained, step):
    reference, _, adapter = trained(3)
    once = OutOfMemoryOnce(step).callback
    training, plan, weights = trained(3, callbacks=(once,))
    assert once.raised and (plan.micro_batch_size, plan.gradient_accumulation_steps) == (1, 6)
    assert f"update {step + 1}" in plan.reason
    assert [entry["step"] for entry in training["log"]] == [entry["step"] for entry in reference["log"]]
    assert agree(adapter, weights, ROUNDING)


def test_out_of_memory_at_the_smallest_plan_keeps_the_updates(trained, tmp_path):
    with pytest.raises(finetune.BadInput, match=r"after 2 updates.*--resume"):
        trained(1, True, callbacks=(OutOfMemoryOnce(2).callback,), partial=tmp_path / "x.partial")
    assert finetune.last_checkpoint(tmp_path / "x.partial").name == "checkpoint-2"
    resumed = trained(1, True, partial=tmp_path / "x.partial", resume=True)[2]
    assert agree(trained(1, True)[2], resumed, 1e-5)


def stop_at(step: int, number: int):
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            if state.global_step == step:
                values = [value for moments in optimizer.state.values() for value in moments.values()]
                self.dtypes = {value.dtype for value in values if torch.is_tensor(value)}
                signal.raise_signal(number)

    return Callback()


@pytest.mark.parametrize(
    ("first", "then", "number"),
    [(finetune.ADAMW_8BIT, finetune.ADAMW, signal.SIGINT), (finetune.ADAMW, finetune.ADAMW_8BIT, signal.SIGTERM)],
)
def test_a_resumed_run_keeps_the_optimizer_that_it_began_with(first, then, number, trained, tmp_path):
    """More or less memory is free by then, so the plan may say another."""
    partial, rank = tmp_path / "x.partial", 64  # smaller matrices keep their moments in 32 bits
    stop = stop_at(2, number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trained(1, True, callbacks=(stop,), optim=first, partial=partial, lora_r=rank)
    assert 128 + stopped.value.args[0] == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]  # main() exits so
    assert (torch.uint8 in stop.dtypes) == (first == finetune.ADAMW_8BIT)
    _, plan, resumed = trained(1, True, optim=then, partial=partial, lora_r=rank, resume=True)
    assert plan.optim == first
    assert agree(trained(1, True, optim=first, lora_r=rank)[2], resumed, 1e-6)


def test_a_tracker_hears_all_of_a_resumed_run(trained, tmp_path):
    """It may be another than the one that heard the beginning; updates that ran out of memory are told once."""
    whole, begun, resumed, out_of_memory = [], [], [], []
    trained(1, True, partial=tmp_path / "whole", tracked=whole)
    with pytest.raises(KeyboardInterrupt):
        trained(1, True, callbacks=(stop_at(2, signal.SIGINT),), partial=tmp_path / "x", tracked=begun)
    trained(1, True, partial=tmp_path / "x", resume=True, tracked=resumed)
    trained(3, callbacks=(OutOfMemoryOnce(2).callback,), tracked=out_of_memory)

    def numbers(entries: list[dict]) -> list[dict]:
        names = ("step", *finetune.TRACKED)
        kept = [{name: entry[name] for name in names if entry.get(name) is not None} for entry in entries]
        return [entry for entry in kept if len(entry) > 1]

    assert len(numbers(begun)) < len(numbers(whole))
    for entries, tolerance in ((resumed, 1e-6), (out_of_memory, 1e-3)):
        assert len(numbers(entries)) == len(numbers(whole)) > 5
        for entry, other in zip(numbers(entries), numbers(whole), strict=True):
            assert entry == {key: pytest.approx(value, rel=tolerance, abs=tolerance) for key, value in other.items()}


def test_each_lower_plan_needs_less_and_the_optimizer_changes_last_and_only_at_the_start():
    def downwards(step: int) -> list[tuple]:
        plan = finetune.Plan(4, 1, False, True, finetune.ADAMW, updates_per_epoch=1, updates=1, memory={}, reason="")
        options = []
        with pytest.raises(finetune.BadInput) as stopped:
            while True:
                plan = finetune.lower_plan(plan, step, gpu=True)
                assert plan.micro_batch_size * plan.gradient_accumulation_steps == 4
                assert plan.reason == f"memory ran out at update {step + 1}"
                options.append((plan.micro_batch_size, plan.gradient_checkpointing, plan.optim))
        said.append(str(stopped.value))
        return options

    said: list[str] = []
    smaller = [(rows, True, finetune.ADAMW) for rows in (4, 2, 1)]
    assert downwards(step=0) == [*smaller, (1, True, finetune.ADAMW_8BIT)]
    assert downwards(step=1) == downwards(step=7) == smaller
    assert "not even one row" in said[0] and "after 1 updates" in said[1] and "--resume" in said[1]


def test_no_optimizer_in_8_bits_without_a_gpu():
    plan = finetune.Plan(1, 4, True, False, finetune.ADAMW, updates_per_epoch=1, updates=1, memory={}, reason="")
    with pytest.raises(finetune.BadInput, match="not even one row"):
        finetune.lower_plan(plan, 0, gpu=False)
    assert [option[:2] for option in finetune.batch_options(6, gpu=False)] == [
        (6, False), (3, False), (1, False), (1, True),
    ]  # fmt: skip


def test_a_7b_within_6_gib():
    row = finetune.Row(({"role": "user", "content": "?"},), "!", "")
    train = [finetune.Example(row, [1] * 125, 40)] * 200
    config = finetune.Config(num_train_epochs=1)
    plan = finetune.make_plan(config, SEVEN_B, train, 6.0)
    assert plan.gradient_checkpointing and plan.total < 6
    assert plan.micro_batch_size * plan.gradient_accumulation_steps == 4


def test_a_7b_in_less_than_5_gib_takes_8_bit_moments_last():
    row = finetune.Row(({"role": "user", "content": "?"},), "!", "")
    train = [finetune.Example(row, [1] * 125, 40)] * 200
    plan = finetune.make_plan(finetune.Config(num_train_epochs=1), SEVEN_B, train, 4.7)
    assert (plan.micro_batch_size, plan.gradient_checkpointing, plan.optim) == (1, True, "adamw_8bit")
    assert plan.total < 4.7
    orders = finetune.batch_options(4, gpu=True)
    assert [optim for _, _, optim in orders].count("adamw_8bit") == 1 and orders[-1][2] == "adamw_8bit"
    assert all(optim != "adamw_8bit" for _, _, optim in finetune.batch_options(4, gpu=False))


def test_rows_lengthened_for_a_gpu_give_the_same_loss_and_gradients(config, examples, tiny):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = finetune.load_tokenizer(tiny.folder)
    some = sorted(examples["train"], key=lambda example: -len(example.input_ids))[::10]
    rows = [
        {"input_ids": e.input_ids, "labels": [-100] * e.prompt_length + e.input_ids[e.prompt_length :]} for e in some
    ]
    model = finetune.add_lora(finetune.load_model(tiny, config), config, tiny)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    results = []
    for how in (collate, finetune.like_lengths(collate, tokenizer.pad_token_id)):
        batch = how(rows)
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss  # transformers sees by position_ids where a row begins
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
        results.append((starts, (batch["labels"] != -100).sum().item(), loss.item(), grads))
    alone = finetune.answer_nll(model, tokenizer, some)
    weights = [len(e.input_ids) - e.prompt_length for e in some]
    by_row = sum(loss * weight for loss, weight in zip(alone, weights, strict=True)) / sum(weights)
    assert results[0][2] == pytest.approx(by_row, abs=1e-5)  # no row saw another
    plain, longer = results
    assert any(start % 8 for start in plain[0]) and not any(start % 8 for start in longer[0])
    lengths = [end - start for start, end in zip(longer[0], longer[0][1:], strict=False)]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1  # given longest first
    assert plain[1] == longer[1] and plain[2] == pytest.approx(longer[2], abs=1e-6)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(plain[3], longer[3], strict=True))
    assert all(any(g.abs().max() > 0 for g in result[3]) for result in results)
