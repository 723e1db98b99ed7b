import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_gptdata.model.gpt import GPT, IGNORE_INDEX
from lit_gptdata.model.stem import EmbeddingStem
from tests.model.small_gpt import MAX_LENGTH, D, SmallData, V, batch_of, make_gpt, random_windows
from tests.runs import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def expected_scores(model: GPT, windows) -> dict[str, float]:
    """Loss, perplexity and bits per byte, target by target in plain Python."""
    nats, n, n_bytes = 0.0, 0, 0
    model.eval()
    for inputs, targets in windows:
        log_probs = model(inputs[None])[0].double().log_softmax(-1)
        for t, target in enumerate(targets.tolist()):
            if target != IGNORE_INDEX:
                nats -= log_probs[t, target].item()
                n += 1
                n_bytes += target % 5
    bits_per_byte = nats / math.log(2) / n_bytes
    return {"loss": nats / n, "perplexity": math.exp(nats / n), "bits_per_byte": bits_per_byte}


# Architecture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("n_layers", [0, 2])
def test_logits_have_one_row_per_token_and_start_near_uniform(n_layers, position):
    model = make_gpt(n_layers, position=position)
    batch = batch_of(random_windows(32))
    logits = model(batch[0])
    assert logits.shape == (32, MAX_LENGTH, V)
    assert logits.dtype == torch.float32
    assert model.losses(batch).mean().item() == pytest.approx(math.log(V), abs=0.1)


@pytest.mark.parametrize("n_layers", [0, 3])
def test_an_id_does_not_change_earlier_logits(n_layers):
    model = make_gpt(n_layers).eval()
    ids = batch_of(random_windows(2))[0]
    before = model(ids)
    for t in range(MAX_LENGTH):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, t], before[:, t], rtol=0, atol=1e-6)


def test_the_head_shares_the_token_table():
    model = make_gpt()
    table = model.stem.token_embedding.weight
    ids = batch_of(random_windows(2))[0]
    features = model._features(ids)
    assert torch.equal(model(ids), features @ table.T)
    assert [p.shape for p in model.parameters() if p.shape[0] == V] == [table.shape]
    unused = next(i for i in range(V) if i not in ids)
    model(ids)[0, 0, unused].backward()
    assert torch.equal(table.grad[unused], features[0, 0])  # from the head: no input used this row


def test_gpt2_sizes_give_the_parameter_count_of_gpt2():
    with torch.device("meta"):
        model = GPT(EmbeddingStem(50257, 1024, 768), n_layers=12, n_heads=12)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_the_bigram_model_has_only_stem_and_head():
    model = make_gpt(n_layers=0, n_heads=3)  # n_heads has no effect without layers
    tables = {"stem.token_embedding.weight", "stem.position_embedding.weight"}
    assert {name for name, _ in model.named_parameters()} == tables
    ids = batch_of(random_windows(2))[0]
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


def test_dropout_acts_only_during_training():
    model = make_gpt(dropout=0.5)
    ids = batch_of(random_windows(2))[0]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_it_works_compiled_and_in_bfloat16():
    torch.compiler.reset()
    model = make_gpt()
    batch = batch_of(random_windows(4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch[0]), model(batch[0]), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch[0]).dtype == torch.bfloat16
        nats = model.losses(batch)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, model.losses(batch), rtol=0, atol=0.05)
    nats.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Losses and metrics ----------------------------------------------------------------------------


def test_losses_equal_cross_entropy_also_for_views():
    model = make_gpt()
    ids = torch.randint(V, (3, MAX_LENGTH + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    assert not targets.is_contiguous()
    losses = model.losses((inputs, targets))
    expected = F.cross_entropy(model(inputs).reshape(-1, V), targets.reshape(-1))
    assert losses.mean().item() == pytest.approx(expected.item())
    assert torch.equal(losses, model.losses((inputs.clone(), targets.clone())))


def test_ignored_targets_do_not_affect_the_loss():
    model = make_gpt()
    inputs, targets = batch_of(random_windows(3))
    all_losses = model.losses((inputs, targets))
    targets = targets.clone()
    targets[0, 2:] = IGNORE_INDEX
    scored = targets != IGNORE_INDEX
    assert torch.equal(model.losses((inputs, targets)), all_losses * scored)
    model.log = lambda *args, **kwargs: None
    loss = model.training_step((inputs, targets), 0)
    assert loss.item() == pytest.approx(all_losses[scored].mean().item(), rel=1e-6)
    assert model.training_step((inputs, torch.full_like(targets, IGNORE_INDEX)), 0).item() == 0


def test_it_memorizes_a_batch():
    model = make_gpt(learning_rate=1e-2, warmup_steps=5)
    loader = DataLoader(random_windows(4), batch_size=4)
    trainer = make_trainer(max_steps=120, check_val_every_n_epoch=120)  # an epoch is one batch
    trainer.fit(model, loader, loader)
    assert trainer.callback_metrics["val_loss"] < 0.1


@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_are_exact_over_batches_of_different_sizes(split):
    model, data, trainer = make_gpt(), SmallData(), make_trainer()
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    (trainer.validate if split == "val" else trainer.test)(model, data, verbose=False)
    expected = expected_scores(model, loader.dataset)
    named = {f"{split}_{name}": value for name, value in expected.items()}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx(named, rel=1e-6)
    means = [model.losses(batch).mean().item() for batch in loader]
    assert abs(sum(means) / len(means) - expected["loss"]) > 0.01  # a mean of means would differ


def test_metrics_during_a_fit_cover_only_the_last_validation():
    model, data = make_gpt(), SmallData()
    trainer = make_trainer(max_steps=4, val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(model, data)
    for name, value in expected_scores(model, data.val_dataloader().dataset).items():
        assert trainer.callback_metrics[f"val_{name}"].item() == pytest.approx(value, rel=1e-6)
    val_loss = trainer.callback_metrics["val_loss"].item()
    assert trainer.validate(model, data, verbose=False)[0]["val_loss"] == val_loss


def test_bits_per_byte_need_token_bytes_from_the_data_module():
    model = make_gpt()
    loader = SmallData().val_dataloader()
    numpy_data = SmallData()
    numpy_data.token_bytes = SmallData.token_bytes.numpy()
    with_bytes = make_trainer().validate(model, numpy_data, verbose=False)[0]
    assert with_bytes["val_bits_per_byte"] > 0
    assert "token_bytes" not in model.state_dict()
    without_bytes = make_trainer().validate(model, loader, verbose=False)[0]
    assert set(without_bytes) == {"val_loss", "val_perplexity"}


def test_a_split_without_scored_targets_logs_a_warning_instead_of_metrics():
    windows = [(inputs, torch.full_like(inputs, IGNORE_INDEX)) for inputs, _ in random_windows(2)]
    with pytest.warns(UserWarning, match="val_loss is not logged: every target was -100"):
        metrics = make_trainer().validate(make_gpt(), DataLoader(windows), verbose=False)
    assert metrics == [{}]


def test_predict_returns_the_loss_of_each_target():
    model, data = make_gpt(), SmallData()
    windows = data.val_dataloader().dataset
    losses = torch.cat(make_trainer().predict(model, data))
    assert losses.shape == (7, MAX_LENGTH)
    mean = (losses.sum() / (batch_of(windows)[1] != IGNORE_INDEX).sum()).item()
    assert mean == pytest.approx(expected_scores(model, windows)["loss"])


# Training --------------------------------------------------------------------------------------


def test_a_fit_logs_its_metrics(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(logger=logger, max_steps=6, log_every_n_steps=2, val_check_interval=3)
    trainer.fit(make_gpt(dropout=0.1), SmallData())
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    metrics = {"train_loss", "val_loss", "val_perplexity", "val_bits_per_byte"}
    assert set(columns) == {"epoch", "step"} | metrics
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "3", "5"]
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "5"]


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # torch warns while it traces
def test_a_compiled_model_trains_to_the_same_weights():
    torch.compiler.reset()
    models = make_gpt(), make_gpt()
    compiled = torch.compile(models[1], backend="aot_eager")
    for model, module in ((models[0], models[0]), (models[1], compiled)):
        trainer = make_trainer(max_steps=4, val_check_interval=4, num_sanity_val_steps=0)
        trainer.fit(module, SmallData())
        scores = expected_scores(model, SmallData().val_dataloader().dataset)
        val_loss = trainer.callback_metrics["val_loss"].item()
        assert val_loss == pytest.approx(scores["loss"], rel=1e-6)
    for eager, traced in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=1e-5)


def test_only_matrices_get_weight_decay():
    model = make_gpt(weight_decay=0.3, betas=(0.8, 0.9))
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, SmallData())
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == others["betas"] == (0.8, 0.9)
    matrices = {p for p in model.parameters() if p.ndim == 2}
    assert model.stem.token_embedding.weight in matrices
    assert set(decayed["params"]) == matrices
    assert set(others["params"]) == set(model.parameters()) - matrices


# Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_checkpoint_rebuilds_the_model_without_arguments(tmp_path, position):
    model = make_gpt(position=position, dropout=0.25, learning_rate=0.01)
    trainer = make_trainer(max_steps=4)
    trainer.fit(model, SmallData())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    stem = {"vocab_size": V, "max_length": MAX_LENGTH, "embedding_dim": D, "position": position}
    arguments = {"n_layers": 2, "n_heads": 4, "dropout": 0.25, "learning_rate": 0.01}
    defaults = {"min_learning_rate_ratio": 0.1, "warmup_steps": 100, "weight_decay": 0.1}
    defaults |= {"warmup_tokens": None, "schedule": "cosine", "decay_tokens": 0.2}
    expected = {"stem": stem | {"dropout": 0.25}, "betas": [0.9, 0.95]} | arguments | defaults
    assert saved["hyper_parameters"] == expected
    loaded = GPT.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams == model.hparams
    ids = batch_of(random_windows(3))[0]
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))
    resumed = make_trainer(max_steps=6)
    resumed.fit(loaded.train(), SmallData(), ckpt_path=path, weights_only=True)
    assert resumed.global_step == 6


def test_the_parameter_names_in_checkpoints_do_not_change():
    names = {name.replace("blocks.0.", "", 1) for name in make_gpt(n_layers=1).state_dict()}
    layers = ["attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.expand"]
    layers += ["mlp.contract", "final_norm"]
    tables = {"stem.token_embedding.weight", "stem.position_embedding.weight"}
    assert names == tables | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_the_stem_keeps_its_own_dropout_in_hparams():
    stem = {"vocab_size": V, "max_length": MAX_LENGTH, "embedding_dim": D, "dropout": 0.5}
    model = GPT(stem, dropout=0.125)
    assert model.hparams["stem"]["dropout"] == model.stem.dropout.p == 0.5
    assert model.hparams["dropout"] == 0.125


# Bad arguments ---------------------------------------------------------------------------------


def test_n_heads_must_divide_embedding_dim():
    message = "n_heads must divide embedding_dim, got n_heads=3 and embedding_dim=16; allowed: 1, 2, 4"
    with pytest.raises(ValueError, match=message):
        make_gpt(n_heads=3)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n_layers", -1, "an integer ≥ 0"),
        ("n_layers", 1.5, "an integer ≥ 0"),
        ("n_heads", 0, "an integer ≥ 1"),
        ("warmup_steps", -5, "an integer ≥ 0"),
        ("warmup_steps", 1.5, "or a fraction of all steps in (0, 1)"),
        ("warmup_tokens", 1.5, "or a fraction of all tokens in (0, 1)"),
        ("decay_tokens", -1, "an integer ≥ 0 or a fraction of all tokens in (0, 1)"),
        ("schedule", "trapezoid", "('cosine', 'warmup-stable-decay')"),
        ("learning_rate", "1e-3", "a number"),
        ("learning_rate", -1e-3, "[0, inf)"),
        ("learning_rate", math.inf, "[0, inf)"),
        ("weight_decay", math.nan, "[0, inf)"),
        ("min_learning_rate_ratio", 1.5, "[0, 1]"),
        ("betas", (0.9,), "two numbers"),
        ("betas", 0.9, "two numbers"),
        ("betas", (0.9, 1.0), "a number in [0, 1)"),
        ("dropout", 1, "a number in [0, 1)"),
    ],
)
def test_options_out_of_range_are_rejected(name, value, allowed):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}.* must be .*, got ") as error:
        GPT(EmbeddingStem(V, MAX_LENGTH, D), **{name: value})
    wrong = value[1] if value == (0.9, 1.0) else value
    assert str(error.value).endswith(f"got {wrong!r}")
    assert allowed in str(error.value)


def test_a_stem_of_another_class_is_rejected():
    with pytest.raises(
        TypeError, match=r"stem must be an EmbeddingStem or its arguments, .* got Embedding"
    ):
        GPT(torch.nn.Embedding(V, D))
