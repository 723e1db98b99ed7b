import json
import math
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_gptdata.model.gpt import GPT, IGNORE_INDEX, learning_rate_scale
from lit_gptdata.model.stem import EmbeddingStem

pytestmark = pytest.mark.usefixtures("one_thread")

V, MAX_LENGTH, D = 50, 8, 16


def make(n_layers: int = 2, n_heads: int = 4, position: str = "learned", **options) -> GPT:
    torch.manual_seed(0)
    stem = EmbeddingStem(V, MAX_LENGTH, D, position, dropout=options.get("dropout", 0.0))
    return GPT(stem, n_layers=n_layers, n_heads=n_heads, **options)


def pairs(n: int, tokens: int = MAX_LENGTH, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """n windows (inputs, targets) of random ids, targets one token later."""
    ids = torch.randint(V, (n, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return [(row[:-1], row[1:]) for row in ids]


def masked(windows, n_masked: int):
    """The same windows; every second one loses its last n_masked targets."""
    windows = [(inputs, targets.clone()) for inputs, targets in windows]  # they share memory
    for _, targets in windows[1::2]:
        targets[-n_masked:] = IGNORE_INDEX
    return windows


def batch_of(windows):
    inputs, targets = zip(*windows, strict=True)
    return torch.stack(inputs), torch.stack(targets)


class Data(L.LightningDataModule):
    """40 training windows in batches of 4; 7 validation and test windows in batches of 3, 3, 1."""

    token_bytes = torch.arange(V) % 5  # some tokens have no bytes, as special ones do

    def train_dataloader(self):
        return DataLoader(pairs(40), batch_size=4)

    def val_dataloader(self):
        return DataLoader(masked(pairs(7, seed=1), 5), batch_size=3)

    def test_dataloader(self):
        return DataLoader(masked(pairs(7, seed=2), 3), batch_size=3)

    predict_dataloader = val_dataloader


def trainer(tmp_path, **options) -> L.Trainer:
    options = {"logger": False, "enable_checkpointing": False, "max_steps": 4, **options}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def expected_scores(model: GPT, windows) -> dict[str, float]:
    """Loss, perplexity and bits per byte, target by target in plain Python."""
    nats, n, n_bytes = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in windows:
            logs = model(inputs[None])[0].double().log_softmax(-1)
            for t, target in enumerate(targets.tolist()):
                if target != IGNORE_INDEX:
                    nats -= logs[t, target].item()
                    n += 1
                    n_bytes += target % 5
    return {
        "loss": nats / n,
        "perplexity": math.exp(nats / n),
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


# The network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("n_layers", [0, 2])
def test_logits_have_a_row_for_each_token_and_start_near_uniform(n_layers, position):
    model = make(n_layers, position=position)
    batch = batch_of(pairs(32))
    logits = model(batch[0])
    assert logits.shape == (32, MAX_LENGTH, V)
    assert logits.dtype == torch.float32
    assert model.losses(batch).mean().item() == pytest.approx(math.log(V), abs=0.1)


@pytest.mark.parametrize("n_layers", [0, 3])
def test_a_later_id_changes_no_earlier_logits(n_layers):
    model = make(n_layers).eval()
    ids = batch_of(pairs(2))[0]
    before = model(ids)
    for t in range(MAX_LENGTH):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t], before[:, t], rtol=0, atol=1e-6)


def test_the_head_is_the_token_table():
    model = make()
    table = model.stem.token_embedding.weight
    ids = batch_of(pairs(2))[0]
    features = model._features(ids)
    assert torch.equal(model(ids), features @ table.T)
    assert [p.shape for p in model.parameters() if p.shape[0] == V] == [table.shape]
    absent = next(i for i in range(V) if i not in ids)
    model(ids)[0, 0, absent].backward()
    assert torch.equal(table.grad[absent], features[0, 0])  # the head's: no input used this row


def test_it_has_as_many_parameters_as_gpt2():
    with torch.device("meta"):
        model = GPT(EmbeddingStem(50257, 1024, 768), n_layers=12, n_heads=12)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_the_bigram_model_is_stem_and_head_alone():
    model = make(n_layers=0, n_heads=3)  # heads do not matter where there are none
    assert {name for name, _ in model.named_parameters()} == {
        "stem.token_embedding.weight",
        "stem.position_embedding.weight",
    }
    ids = batch_of(pairs(2))[0]
    assert torch.equal(model(ids), model.stem(ids) @ model.stem.token_embedding.weight.T)


def test_residual_projections_start_smaller():
    model = GPT(EmbeddingStem(V, MAX_LENGTH, 128), n_layers=8, n_heads=4)
    for name, parameter in model.blocks.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            residual = name.endswith(("out.weight", "contract.weight"))
            std = 0.02 / 4 if residual else 0.02  # 4 = √(2 · 8 layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


def test_dropout_only_while_training():
    model = make(dropout=0.5)
    ids = batch_of(pairs(2))[0]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_it_works_compiled_and_in_bfloat16():
    torch.compiler.reset()
    model = make()
    batch = batch_of(pairs(4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch[0]), model(batch[0]), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch[0]).dtype == torch.bfloat16
        nats = model.losses(batch)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, model.losses(batch), rtol=0, atol=0.05)
    nats.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Losses ----------------------------------------------------------------------------------------


def test_masked_targets_do_not_count():
    model = make()
    inputs, targets = batch_of(pairs(3))
    everything = model.losses((inputs, targets))
    targets = targets.clone()
    targets[0, 2:] = IGNORE_INDEX
    nats = model.losses((inputs, targets))
    counted = targets != IGNORE_INDEX
    assert torch.equal(nats, everything * counted)
    model.log = lambda *args, **kwargs: None
    loss = model.training_step((inputs, targets), 0)
    assert loss.item() == pytest.approx(everything[counted].mean().item(), rel=1e-6)
    nothing = model.training_step((inputs, torch.full_like(targets, IGNORE_INDEX)), 0)
    assert nothing.item() == 0


def test_views_are_as_good_as_contiguous_tensors():
    model = make()
    ids = torch.randint(V, (3, MAX_LENGTH + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    assert not targets.is_contiguous()
    assert torch.equal(model.losses((inputs, targets)), model.losses((inputs.clone(), targets.clone())))


def test_it_learns_a_batch_by_heart(tmp_path):
    model = make(learning_rate=1e-2, warmup_steps=5)
    windows = pairs(4)
    loader = DataLoader(windows, batch_size=4)
    run = trainer(tmp_path, max_steps=120, check_val_every_n_epoch=120)  # an epoch is one batch
    run.fit(model, loader, loader)
    assert run.callback_metrics["val_loss"] < 0.1


@pytest.mark.parametrize("split", ["val", "test"])
def test_scores_are_exact_over_uneven_batches(tmp_path, split):
    model, data = make(), Data()
    run = trainer(tmp_path)
    run.validate(model, data, verbose=False) if split == "val" else run.test(model, data, verbose=False)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    expected = expected_scores(model, loader.dataset)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    assert logged == {
        f"{split}_{name}": pytest.approx(value, rel=1e-6) for name, value in expected.items()
    }
    means = [model.losses(batch).mean().item() for batch in loader]
    assert abs(sum(means) / len(means) - expected["loss"]) > 0.01  # a mean of means is not this


def test_scores_in_a_fit_are_those_of_the_last_validation_alone(tmp_path):
    model, data = make(), Data()
    run = trainer(tmp_path, val_check_interval=2, num_sanity_val_steps=2)
    run.fit(model, data)
    expected = expected_scores(model, data.val_dataloader().dataset)
    for name, value in expected.items():
        assert run.callback_metrics[f"val_{name}"].item() == pytest.approx(value, rel=1e-6)
    again = run.validate(model, data, verbose=False)[0]
    assert again["val_loss"] == run.callback_metrics["val_loss"].item()


def test_without_token_bytes_there_are_no_bits_per_byte(tmp_path):
    model = make()
    loader = Data().val_dataloader()
    metrics = trainer(tmp_path).validate(model, loader, verbose=False)[0]
    assert set(metrics) == {"val_loss", "val_perplexity"}

    numpy_data = Data()
    numpy_data.token_bytes = Data.token_bytes.numpy()
    with_bytes = trainer(tmp_path).validate(model, numpy_data, verbose=False)[0]
    assert with_bytes["val_bits_per_byte"] > 0
    assert "token_bytes" not in model.state_dict()

    assert set(trainer(tmp_path).validate(model, loader, verbose=False)[0]) == set(metrics)


def test_a_split_without_counted_targets_logs_nothing_and_says_so(tmp_path):
    windows = [(inputs, torch.full_like(inputs, IGNORE_INDEX)) for inputs, _ in pairs(2)]
    with pytest.warns(UserWarning, match="val_loss is not logged: every target was -100"):
        metrics = trainer(tmp_path).validate(make(), DataLoader(windows), verbose=False)
    assert metrics == [{}]


def test_predict_gives_the_nats_of_each_target(tmp_path):
    model, data = make(), Data()
    rows = torch.cat(trainer(tmp_path).predict(model, data))
    assert rows.shape == (7, MAX_LENGTH)
    targets = batch_of(data.val_dataloader().dataset)[1]
    mean = (rows.sum() / (targets != IGNORE_INDEX).sum()).item()
    assert mean == pytest.approx(expected_scores(model, data.val_dataloader().dataset)["loss"])


# Training --------------------------------------------------------------------------------------


def test_a_fit_logs_its_metrics(tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, logger=logger, max_steps=6, log_every_n_steps=2, val_check_interval=3)
    run.fit(make(dropout=0.1), Data())
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    assert set(columns) == {
        "epoch",
        "step",
        "train_loss",
        "val_loss",
        "val_perplexity",
        "val_bits_per_byte",
    }
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "3", "5"]
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "5"]


@pytest.mark.filterwarnings("ignore")  # torch's own, from tracing
def test_a_compiled_model_trains_to_the_same_weights(tmp_path):
    torch.compiler.reset()
    models = make(), make()
    compiled = torch.compile(models[1], backend="aot_eager")
    for model, module in ((models[0], models[0]), (models[1], compiled)):
        run = trainer(tmp_path, val_check_interval=4, num_sanity_val_steps=0)
        run.fit(module, Data())
        scores = expected_scores(model, Data().val_dataloader().dataset)
        assert run.callback_metrics["val_loss"].item() == pytest.approx(scores["loss"], rel=1e-6)
    for eager, traced in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=1e-5)


def test_only_matrices_decay(tmp_path):
    model = make(weight_decay=0.3, betas=(0.8, 0.9))
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, Data())
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == plain["betas"] == (0.8, 0.9)
    matrices = {p for p in model.parameters() if p.ndim == 2}
    assert model.stem.token_embedding.weight in matrices
    assert set(decayed["params"]) == matrices
    assert set(plain["params"]) == set(model.parameters()) - matrices


def test_the_learning_rate_warms_up_and_falls():
    steps = [learning_rate_scale(step, 104, 4, 0.1) for step in range(110)]
    assert steps[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert steps[54] == pytest.approx((1 + 0.1) / 2)  # half of the cosine
    assert steps[29] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter of it
    assert steps[104:] == pytest.approx([0.1] * 6)
    assert steps[4:105] == sorted(steps[4:105], reverse=True)
    for endless in (math.inf, -1, 0):
        assert learning_rate_scale(3, endless, 4, 0.1) == 0.8
        assert learning_rate_scale(10**6, endless, 4, 0.1) == 1
    assert learning_rate_scale(0, 10, 0, 0.1) == 1
    assert learning_rate_scale(5, 10, 20, 0.1) == 6 / 21  # the run ends within the warm-up
    assert learning_rate_scale(20, 10, 20, 0.1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "total"),
    [(4, None, 4), (-1, 1, 10), (5, -1, 5), (30, 1, 10)],
)
def test_every_step_is_taken_at_the_scheduled_rate(tmp_path, max_steps, max_epochs, total):
    class Watch(L.Callback):
        rates: list = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.rates.append(optimizer.param_groups[0]["lr"])

    watch = Watch()
    watch.rates = []
    model = make(learning_rate=0.5, warmup_steps=3, min_learning_rate_ratio=0.2)
    trainer(
        tmp_path,
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=[watch],
        limit_val_batches=0,
    ).fit(model, Data())
    assert watch.rates == [0.5 * learning_rate_scale(i, total, 3, 0.2) for i in range(total)]


# Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_checkpoint_rebuilds_the_model_without_arguments(tmp_path, position):
    model = make(position=position, dropout=0.25, learning_rate=0.01)
    run = trainer(tmp_path)
    run.fit(model, Data())
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"] == {
        "stem": {
            "vocab_size": V,
            "max_length": MAX_LENGTH,
            "embedding_dim": D,
            "position": position,
            "dropout": 0.25,
        },
        "n_layers": 2,
        "n_heads": 4,
        "dropout": 0.25,
        "learning_rate": 0.01,
        "min_learning_rate_ratio": 0.1,
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
    }
    loaded = GPT.load_from_checkpoint(path)
    assert loaded.hparams == model.hparams
    ids = batch_of(pairs(3))[0]
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))
    resumed = trainer(tmp_path, max_steps=6)
    resumed.fit(loaded.train(), Data(), ckpt_path=path, weights_only=True)
    assert resumed.global_step == 6


def test_the_stem_keeps_its_own_dropout_in_hparams():
    stem = {"vocab_size": V, "max_length": MAX_LENGTH, "embedding_dim": D, "dropout": 0.5}
    model = GPT(stem, dropout=0.125)
    assert model.hparams["stem"]["dropout"] == model.stem.dropout.p == 0.5
    assert model.hparams["dropout"] == 0.125


@pytest.mark.parametrize(("share", "steps"), [(0.25, 3), (3, 3), (0.0, 0)])
def test_warmup_is_a_number_of_steps_or_a_share_of_them(tmp_path, share, steps):
    run = trainer(tmp_path, max_steps=12)
    model = make(warmup_steps=share)
    run.fit(model, Data())
    (scheduler,) = run.lr_scheduler_configs
    scale = scheduler.scheduler.lr_lambdas[0]
    expected = [learning_rate_scale(step, 12, steps, 0.1) for step in range(12)]
    assert [scale(step) for step in range(12)] == expected


def test_a_share_of_a_run_without_end_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"warmup_steps=0\.1 is a share .* give a whole number"):
        run.fit(make(warmup_steps=0.1), Data())


# Bad arguments ---------------------------------------------------------------------------------


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"n_heads is 3, .* 16 .*n_heads=1, 2, 4, 8, 16"):
        make(n_heads=3)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n_layers", -1, "at least 0"),
        ("n_layers", 1.5, "whole number"),
        ("n_heads", 0, "at least 1"),
        ("warmup_steps", -5, "at least 0"),
        ("warmup_steps", 1.5, "a share of all steps in (0, 1)"),
        ("learning_rate", "1e-3", "a number"),
        ("learning_rate", -1e-3, "[0, inf)"),
        ("weight_decay", math.nan, "[0, inf)"),
        ("min_learning_rate_ratio", 1.5, "[0, 1]"),
        ("betas", (0.9,), "two numbers"),
        ("betas", (0.9, 1.0), "[0, 1)"),
    ],
)
def test_options_out_of_range_are_refused(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        make(**{name: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


def test_dropout_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"^dropout is 1; it must be a number in \[0, 1\)"):
        GPT(EmbeddingStem(V, MAX_LENGTH, D), dropout=1)


def test_a_stem_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="stem is a Embedding; allowed are an EmbeddingStem and a m"):
        GPT(torch.nn.Embedding(V, D))


# Sampling --------------------------------------------------------------------------------------


def test_greedy_takes_the_most_likely_and_crops_the_context():
    model = make()
    prompt = batch_of(pairs(2, tokens=3))[0]
    out = model.generate(prompt, max_new_tokens=12, temperature=0)
    assert out.shape == (2, 15)
    assert torch.equal(out[:, :3], prompt)
    for t in range(3, 15):
        logits = model(out[:, max(0, t - MAX_LENGTH) : t])[:, -1]
        assert torch.equal(out[:, t], logits.argmax(-1))
    assert torch.equal(model.generate(prompt, 12, temperature=0), out)
    assert torch.equal(model.generate(prompt, 12, temperature=1e-30), out)
    assert torch.equal(model.generate(prompt, 12, top_k=1), out)
    assert torch.equal(model.generate(prompt.to(torch.uint16), 12, temperature=0), out)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_top_k_draws_from_the_k_most_likely_as_often_as_they_are_likely():
    model = make()
    with torch.no_grad():
        model.stem.token_embedding.weight.mul_(20)  # unlike chances
    prompt = torch.full((4000, 1), 7)
    drawn = model.generate(
        prompt, 1, temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(0)
    )[:, 1]
    best, tokens = model(prompt[:1])[0, -1].topk(3)
    chances = (best / 2.0).softmax(0)
    assert set(drawn.tolist()) <= set(tokens.tolist())
    for token, chance in zip(tokens.tolist(), chances.tolist(), strict=True):
        assert (drawn == token).float().mean().item() == pytest.approx(chance, abs=0.04)


def test_a_generator_makes_samples_repeatable():
    model = make()
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    def sample(seed: int) -> torch.Tensor:
        return model.generate(prompt, 30, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(
        model.generate(prompt, 9, top_k=10**6, generator=torch.Generator().manual_seed(1)),
        sample(1)[:, :10],
    )


def test_generating_is_without_dropout_and_leaves_every_mode_as_it_was():
    model = make(dropout=0.5)
    model.blocks[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    out = model.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0), out)
    assert not out.requires_grad
    assert {name: m.training for name, m in model.named_modules()} == modes
    with pytest.raises(IndexError, match="vocab_size=50"):
        model.generate(torch.tensor([[99]]), 1)
    assert {name: m.training for name, m in model.named_modules()} == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature is -1; .* \[0, inf\)"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; .* at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; .* at least 0"),
        (
            {"ids": torch.zeros(1, 0, dtype=torch.int64)},
            r"at least one token; seen: shape \(1, 0\)",
        ),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"\(batch, tokens\) .* shape \(3,\)"),
        ({"ids": [[1]]}, "seen: list"),
    ],
)
def test_generate_refuses(options, message):
    arguments = {"ids": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 1, **options}
    with pytest.raises(ValueError, match=message):
        make().generate(**arguments)


# Hugging Face's GPT-2 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reference(transformers):
    """A small GPT-2 whose every tensor is random: norms and biases too."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=12,
        n_embd=24,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def folder(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_from_gpt2_gives_hugging_faces_logits(reference, tmp_path, prefix):
    (reference if prefix else reference.transformer).save_pretrained(tmp_path)

    def check(tensors):
        assert all(name.startswith(f"{prefix}{name[len(prefix)]}") for name in tensors)

    edit_tensors(tmp_path, check)
    ids = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
    assert expected.std() > 1
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        model = GPT.from_gpt2(path, learning_rate=3e-4).eval()
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    assert model.hparams["n_layers"] == 3
    assert model.hparams["learning_rate"] == 3e-4
    assert GPT.from_gpt2(tmp_path, dropout=0.5).stem.dropout.p == 0.5


def test_from_gpt2_takes_half_precision_masks_and_a_tied_head(folder, reference):
    def dress_as_an_old_file(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].half()
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, dress_as_an_old_file)
    model = GPT.from_gpt2(folder).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids), reference(ids).logits, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_inner": 7},
        {"model_type": "gpt_neo"},
    ],
)
def test_from_gpt2_refuses_options_by_name(folder, change):
    edit_config(folder, **change)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"config.json asks for .*: {name}={value!r} \\(only "):
        GPT.from_gpt2(folder)


def test_from_gpt2_refuses_tensors_by_name(folder):
    def change(tensors):
        del tensors["transformer.h.1.ln_1.bias"]
        tensors["transformer.h.1.extra"] = torch.zeros(1)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(72, 24)

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match="does not hold this GPT-2") as error:
        GPT.from_gpt2(folder)
    message = str(error.value)
    assert "missing: h.1.ln_1.bias;" in message
    assert "unexpected: h.1.extra;" in message
    assert "h.0.attn.c_attn.weight (72, 24) (not (24, 72))" in message


def test_from_gpt2_refuses_a_head_of_its_own(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 24)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        GPT.from_gpt2(folder)


def test_from_gpt2_names_what_is_missing(folder, tmp_path):
    edit_config(folder, n_head=None)
    with pytest.raises(ValueError, match="gives no number for n_head"):
        GPT.from_gpt2(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    edit_config(folder, n_head=4)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        GPT.from_gpt2(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"is missing: .*'pytorch_model\.bin'.*hf download"):
        GPT.from_gpt2(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        GPT.from_gpt2(tmp_path / "gpt2")


def test_from_gpt2_without_safetensors_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[hf\]'"):
        GPT.from_gpt2(folder)


def test_losses_agree_with_cross_entropy():
    model = make()
    inputs, targets = batch_of(pairs(3))
    expected = F.cross_entropy(model(inputs).reshape(-1, V), targets.reshape(-1))
    assert model.losses((inputs, targets)).mean().item() == pytest.approx(expected.item())
