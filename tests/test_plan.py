"""The plan: how an update is cut into forward passes changes its speed and memory, never what is learned. Only AdamW's
moments in 8 bits, the last resort, change that, by rounding."""

import dataclasses
import signal

import pytest
import torch

import finetune

SEVEN_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(faq, tiny_model):
    return finetune.Config(
        model=str(tiny_model), data=(faq,), lora_r=4, lora_dropout=0.0, effective_batch_size=6, max_steps=4,
        learning_rate=1e-2, lr_scheduler_type="constant", max_new_tokens=4, warmup_steps=0, num_train_epochs=3,
    )  # fmt: skip


@pytest.fixture
def trained(config, tiny_model, tmp_path):
    """trained(rows a forward, checkpointing) -> result of train() and the adapter it left."""
    from transformers import set_seed

    source = finetune.find_model(str(tiny_model), gpu=False)
    tokenizer = finetune.load_tokenizer(source.folder)
    examples = finetune.encode_split(tokenizer, finetune.load_data(config), config)

    def call(micro, checkpointing=False, callbacks=(), optim=finetune.ADAMW, partial=None, **changes):
        own = dataclasses.replace(config, **changes)
        set_seed(own.seed)
        model = finetune.add_lora(finetune.load_for_training(source, own), own, source, checkpointing=True)
        plan = finetune.make_plan(own, source.config, examples["train"], None)
        batch = own.effective_batch_size
        plan = dataclasses.replace(
            plan,
            micro_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            gradient_checkpointing=checkpointing,
            optim=optim,
        )
        partial = partial or tmp_path / f"{len(list(tmp_path.iterdir()))}.partial"
        partial.mkdir(exist_ok=True)
        training, kept = finetune.train(model, tokenizer, examples, plan, own, partial, callbacks)
        weights = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" in name}
        return training, kept, weights

    return call


def agree(one: dict, other: dict, tolerance: float) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def test_cutting_and_checkpointing_do_not_change_what_is_learned(trained):
    whole, _, adapter = trained(6)
    for micro, checkpointing in ((1, True), (2, False)):
        other, _, reference = trained(micro, checkpointing)
        losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (whole, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert agree(adapter, reference, 1e-5)


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
    assert agree(adapter, weights, 1e-5)


def test_out_of_memory_at_the_smallest_plan_keeps_the_updates(trained, tmp_path):
    with pytest.raises(finetune.BadInput, match=r"after 2 updates.*--resume"):
        trained(1, True, (OutOfMemoryOnce(2).callback,), partial=tmp_path / "x.partial")
    assert finetune.last_checkpoint(tmp_path / "x.partial").name == "checkpoint-2"
    resumed = trained(1, True, partial=tmp_path / "x.partial", resume=True)[2]
    assert agree(trained(1, True)[2], resumed, 1e-5)


def stop_at(step: int):
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            if state.global_step == step:
                values = [value for moments in optimizer.state.values() for value in moments.values()]
                self.dtypes = {value.dtype for value in values if torch.is_tensor(value)}
                signal.raise_signal(signal.SIGINT)

    return Callback()


@pytest.mark.parametrize(
    ("first", "then"), [(finetune.ADAMW_8BIT, finetune.ADAMW), (finetune.ADAMW, finetune.ADAMW_8BIT)]
)
def test_a_resumed_run_keeps_the_optimizer_that_it_began_with(first, then, trained, tmp_path):
    """More or less memory is free by then, so the plan may say another."""
    partial, rank = tmp_path / "x.partial", 64  # smaller matrices keep their moments in 32 bits
    stop = stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        trained(1, True, (stop,), first, partial, lora_r=rank)
    assert (torch.uint8 in stop.dtypes) == (first == finetune.ADAMW_8BIT)
    _, plan, resumed = trained(1, True, (), then, partial, lora_r=rank, resume=True)
    assert plan.optim == first
    assert agree(trained(1, True, (), first, lora_r=rank)[2], resumed, 1e-6)


def test_the_first_plan_that_is_measured_to_fit_is_taken(monkeypatch):
    row = finetune.Row(({"role": "user", "content": "?"},), "!", "")
    train = [finetune.Example(row, [1] * 125, 40)] * 8
    start = finetune.Plan(4, 1, False, True, 1, 1, {"all": 7.0}, "")

    def measured(gib: dict, memory: float, optim: str | None = None):
        def probe(trainer, rows, plan):
            return gib[plan.micro_batch_size, plan.gradient_checkpointing, plan.optim == finetune.ADAMW_8BIT]

        monkeypatch.setattr(finetune, "probe", probe)
        plan, trainer = finetune.measured_plan(lambda plan: plan, start, train, memory, optim)
        assert trainer.optim == plan.optim
        return plan.micro_batch_size, plan.gradient_checkpointing, plan.optim == finetune.ADAMW_8BIT

    gib = {(4, False, False): 6.4, (4, True, False): 4.9, (2, True, False): 4.85}
    gib |= {(1, True, False): 4.8, (1, True, True): 4.6}
    assert measured(gib, 8) == (4, False, False) and measured(gib, 6) == (4, True, False)
    assert measured(gib, 5.08) == (1, True, False)  # 5% are left free
    assert measured(gib, 4.7) == (1, True, True)  # but for the last choice
    with pytest.raises(finetune.BadInput, match="not even one row"):
        measured(gib, 4.5)
    in_8_bits = {(rows, checkpointing, True): value for (rows, checkpointing, _), value in gib.items()}
    assert measured(in_8_bits, 8, finetune.ADAMW_8BIT) == (4, False, True)  # so was the run that is resumed


def test_when_nothing_is_left_to_halve_it_says_so():
    plan = finetune.Plan(1, 4, True, True, 1, 1, {}, "")
    assert finetune.smaller(plan, "") is None
    with pytest.raises(finetune.BadInput, match="not even one row"):
        finetune.stop_out_of_memory()


def test_a_probe_leaves_nothing_behind(trained, monkeypatch):
    """No gradient, no random number drawn, weights and mode as they were."""
    from transformers import TrainerCallback

    seen = []

    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            trainer = next(c for c in self.handler.callbacks if hasattr(c, "trainer")).trainer
            before = [torch.get_rng_state(), *(p.clone() for p in model.parameters() if p.requires_grad)]
            rows = [finetune.Example(None, row["input_ids"], 1) for row in trainer.train_dataset]
            finetune.probe(trainer, rows, finetune.Plan(2, 3, False, True, 1, 1, {}, ""))
            after = [torch.get_rng_state(), *(p for p in model.parameters() if p.requires_grad)]
            seen.append(all(map(torch.equal, before, after)) and all(p.grad is None for p in model.parameters()))

        def on_init_end(self, args, state, control, **_):
            pass

    callback = Callback()
    original = finetune.make_monitor

    def monitor(*args):
        made = original(*args)
        callback.handler = type("Handler", (), {"callbacks": [made]})
        return made

    monkeypatch.setattr(finetune, "make_monitor", monitor)
    trained(3, callbacks=(callback,), lora_dropout=0.1)
    assert seen == [True]


def test_dropout_drops_as_often_as_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 501)
    module = torch.nn.Dropout(0.1)
    y = finetune.dropout(x, module)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=2e-3) and len(y.unique()) == 2
    assert finetune.dropout(x, module.eval()) is x


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
    assert plan.total < 4.7 and plan.close
    orders = list(finetune.choices(4, gpu=True))
    assert [optim for _, _, optim in orders].count("adamw_8bit") == 1 and orders[-1][2] == "adamw_8bit"
    assert all(optim != "adamw_8bit" for _, _, optim in finetune.choices(4, gpu=False))


def test_rows_lengthened_for_a_gpu_give_the_same_loss_and_gradients(config, tiny_model):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    source = finetune.find_model(str(tiny_model), gpu=False)
    tokenizer = finetune.load_tokenizer(source.folder)

    def size(example: finetune.Example) -> int:
        return -len(example.input_ids)

    examples = sorted(finetune.encode_split(tokenizer, finetune.load_data(config), config)["train"], key=size)[::10]
    rows = [
        {"input_ids": e.input_ids, "labels": [-100] * e.prompt_length + e.input_ids[e.prompt_length :]}
        for e in examples
    ]

    model = finetune.add_lora(finetune.load_for_training(source, config), config, source, checkpointing=False)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    results = []
    for how in (collate, finetune.like_lengths(collate, tokenizer.pad_token_id)):
        batch = how(rows)
        model.zero_grad()
        loss = finetune.packed_loss(model, batch, None)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
        results.append((starts, (batch["labels"] != -100).sum().item(), loss.item(), grads))
    plain, longer = results
    assert any(start % 8 for start in plain[0]) and not any(start % 8 for start in longer[0])
    lengths = [end - start for start, end in zip(longer[0], longer[0][1:], strict=False)]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1  # given longest first
    assert plain[1] == longer[1] and plain[2] == pytest.approx(longer[2], abs=1e-6)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(plain[3], longer[3], strict=True))
    assert all(any(g.abs().max() > 0 for g in result[3]) for result in results)
