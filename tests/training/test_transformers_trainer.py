"""Transformers' own `Trainer` trains the model on our windows: the losses are ours, and resuming is exact."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from modeling_foresight.step_seed import sample_seeds
from modeling_foresight.targets import draw_training
from tests.training.test_train import (  # noqa: F401 - fixtures
    BATCH,
    config_file,
    dataset,
    fresh_accelerate,
    log_lines,
    run,
)
from training.config_reading import load_config
from training.evaluation.open_loop import measure_losses
from training.models.model_folder import write_export
from training.models.starting_model import build_model, starting_config
from training.run_data import RunData
from training.windows import WindowSampler, collate_windows

STEPS = 4


@pytest.fixture
def data(config_file, dataset, tmp_path) -> RunData:  # noqa: F811
    """Windows of a run; its starting model, with dropout, is in `base`."""
    config = load_config(config_file, ["--dataset", str(dataset), "--model.resid_pdrop", "0.2"])
    windows = RunData(config, starting_config(config))
    torch.manual_seed(5)
    model, processor = build_model(config, windows)
    write_export(tmp_path / "base", processor, model.save_pretrained)
    return windows


@pytest.fixture
def make_trainer(data, tmp_path):
    def make(train=None, draw=lambda batch, samples: {}, **settings) -> Trainer:
        model = AutoModel.from_pretrained(tmp_path / "base", **settings.pop("fields", {}))
        processor = AutoProcessor.from_pretrained(tmp_path / "base")

        def collate(samples: list[dict]) -> dict:
            batch = processor.prepare_batch(collate_windows(samples), None, model.config.history_length)
            return batch | draw(batch, samples)

        settings = {"remove_unused_columns": False, "label_names": ["progress"]} | settings
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
        settings |= dict.fromkeys(sizes, len(train) if train else BATCH)
        options = {"report_to": "none", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "seed": 3}
        arguments = TrainingArguments(str(tmp_path / "trainer"), **options | settings)
        windows = {"train_dataset": train or data.train, "eval_dataset": data.val}
        return Trainer(model, arguments, collate, processing_class=processor, **windows)

    return make


@pytest.mark.slow
def test_the_first_step_has_the_loss_and_gradient_of_our_trainer(
    make_trainer,
    data,
    config_file,  # noqa: F811
    dataset,  # noqa: F811
    tmp_path,
):
    plain = dict.fromkeys(("embd_pdrop", "attention_dropout", "resid_pdrop"), 0.0)
    flags = [f"--model.{name}=0.0" for name in plain] + [f"--init_from={tmp_path / 'base'}"]
    assert run(config_file, dataset, tmp_path / "ours", *flags, "--train.steps=1") == 0
    ours = log_lines(tmp_path / "ours")[0]

    sampler = WindowSampler(data.train.sizes, BATCH)
    chosen = Subset(data.train, [index for index, _ in sampler.batch_indices(0)])
    places = {int(chosen[i]["index"]): i for i in range(BATCH)}

    def draw(batch, samples):  # the CVAE's noise of a window, as our trainer draws it
        seeds = sample_seeds(0, [places[int(sample["index"])] for sample in samples])
        return draw_training(trainer.model.config, batch, seeds)

    trainer = make_trainer(chosen, draw, max_steps=1, fields=plain)
    trainer.train()
    theirs = trainer.state.log_history[0]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_resuming_gives_the_weights_of_an_uninterrupted_run(make_trainer, tmp_path):
    weights = []
    for start in (None, str(tmp_path / "trainer" / f"checkpoint-{STEPS // 2}")):
        torch.manual_seed(len(weights))
        trainer = make_trainer(max_steps=STEPS, save_steps=STEPS // 2)
        trainer.train(resume_from_checkpoint=start)
        trainer.save_model()
        weights.append(load_file(tmp_path / "trainer" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    model, processor = (kind.from_pretrained(tmp_path / "trainer") for kind in (AutoModel, AutoProcessor))
    assert model.config.history_length == 3 and processor.views == ["front", "side"]


@pytest.mark.slow
def test_evaluation_gives_the_weighted_losses_of_the_held_out_windows(make_trainer, data):
    trainer = make_trainer(data.val)
    loss = trainer.evaluate()["eval_loss"]
    model, processor = trainer.model, trainer.processing_class
    losses = measure_losses(model, processor, [collate_windows([data.val[i] for i in range(len(data.val))])])
    total = sum(getattr(model.config, f"{name}_loss_weight") * value for name, value in losses.items())
    assert loss == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_both_settings_of_the_documentation_are_needed(make_trainer):
    assert "eval_loss" not in make_trainer(label_names=None).evaluate()
    with pytest.raises(ValueError, match="images has no view"):
        make_trainer(remove_unused_columns=True).evaluate()
