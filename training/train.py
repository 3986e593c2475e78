"""Trains 3D Foresight: `accelerate launch training/train.py --config training/configs/quickstart.yaml`.

The loop is `train()`; what it is made of is built by the functions above it. The batch of a step and its
randomness are functions of (seed, step) alone, so an interrupted run continues exactly where it stopped.
"""

import sys

if __package__ in (None, ""):  # run as a script: this folder would shadow the library `evaluate`
    sys.path.pop(0)

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from datasets_scripts.storage.atomic import write_json
from datasets_scripts.storage.hub_download import HubError
from modeling_foresight import ForesightProcessor
from modeling_foresight.precision import NO_BFLOAT16, has_bfloat16
from modeling_foresight.seeds import step_seed
from training.adapters import adapter_facts, add_lora, keep_checkpoints_small, write_adapter
from training.checkpoints import (
    StopRequest,
    latest_checkpoint,
    own_run_folder,
    save_checkpoint,
    write_export,
)
from training.config import RunConfig, load_config, save_config
from training.evaluation.open_loop import (
    evaluate_open_loop,
    fit_baselines,
    flatten_metrics,
    flow_errors,
    format_open_loop,
)
from training.run_data import RunData, dataset_facts, evaluation_loader
from training.run_facts import describe_run, portable_path
from training.run_log import RunLog
from training.starting_model import build_model, starting_config
from training.windows import WindowSampler, collate_windows

DATASETS = "datasets.json"  # in the run folder: what it was trained on


def train(config: RunConfig, resume: bool) -> int:
    """Runs one training from its config to the exported model.

    Args:
        config (`RunConfig`): The run.
        resume (`bool`): Continue from the newest checkpoint in `config.output`, if there is one.

    Returns:
        `int`: Exit code: 0 when finished, 128 + signal when stopped in good order.

    Raises:
        ValueError: If config, data and run folder do not fit together.
    """
    options, output = config.train, Path(config.output)
    # As Accelerator would make it: one that does not know of the CPU leaves every process on its own there.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    in_vain = options.mixed_precision == "bf16" and not has_bfloat16(state.device)
    accelerator = Accelerator(
        mixed_precision="no" if in_vain else options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=options.tracker,
        project_config=ProjectConfiguration(project_dir=str(output)),
    )
    if in_vain:
        accelerator.print(NO_BFLOAT16)
    with own_run_folder(accelerator, output):
        return run_training(accelerator, config, resume)


def run_training(accelerator: Accelerator, config: RunConfig, resume: bool) -> int:
    """The run itself; see [`train`]."""
    options, output, say = config.train, Path(config.output), accelerator.print
    found = check_run_folder(config, output, resume)
    if found == "finished":
        say(f"{output} holds this finished run; its model is in {config.export}")
        return 0
    torch.manual_seed(config.seed)
    # One process of a machine decodes frames into the cache, the others find it there.
    with accelerator.local_main_process_first():
        data = RunData(config, starting_config(config))
    for dataset in data.describe():
        if left_out := dataset["flagged_episodes"]:
            say(f"{dataset['name']}: {len(left_out)} episodes are left out for their flags")
    model, processor = build_model(config, data)
    facts = None
    if config.lora.r:
        facts = adapter_facts(model)
        model = add_lora(model, config.lora)
        keep_checkpoints_small(accelerator, facts)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=tuple(options.betas), weight_decay=options.weight_decay
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_learning_rate_ratio
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    history = accelerator.unwrap_model(model).config.history_length
    start = 0
    if found:
        accelerator.load_state(str(found[0]))
        start = found[1]
        say(f"continuing from step {start} of {output}")
    elif accelerator.is_main_process:
        write_json(output / DATASETS, [dataset_facts(source.path) for source in config.data.datasets])
        save_config(config, output / "config.yaml")
    accelerator.wait_for_everyone()

    accumulation = options.gradient_accumulation_steps
    sampler = WindowSampler(
        data.train.sizes,
        options.batch_size // accumulation,
        seed=config.seed,
        mixture=config.data.mixture,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=start * accumulation,
        steps=options.steps * accumulation,
    )
    loader = DataLoader(
        data.train,
        batch_sampler=sampler,
        collate_fn=collate_windows,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        # Forking a process that decodes video and computes with threads is not safe.
        multiprocessing_context="spawn" if config.data.num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
    )
    if options.tracker:
        # Trackers take plain values only.
        settings = {name: str(value) for name, value in flatten_metrics(dataclasses.asdict(config)).items()}
        accelerator.init_trackers("3d-foresight", config=settings)
    say(
        f"{len(data.train)} windows for training, {len(data.val) if data.val else 0} for validation; "
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M of "
        f"{parameters / 1e6:.2f} M parameters are trained on "
        f"{accelerator.num_processes} x {accelerator.device.type}"
    )
    stop = StopRequest(accelerator)
    log = RunLog(accelerator, output, start, options.steps)
    model.train()
    batches = iter(loader)
    for step in range(start, options.steps):
        for part in range(accumulation):
            # Dropout and noise are a function of (seed, step, process), whatever ran in between.
            torch.manual_seed(step_seed(config.seed, step * accumulation + part, accelerator.process_index))
            with log.timed("data_s"):
                raw = next(batches)
            with accelerator.accumulate(model):
                batch = processor.prepare_batch(raw, accelerator.device, history)
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                    log.add({"grad_norm": norm})
                optimizer.step()
                optimizer.zero_grad()
            log.add({"loss": outputs.loss.detach(), **outputs.losses})
        scheduler.step()
        log.bar.update()
        done = step + 1
        if done % options.log_every == 0 or done == options.steps:
            extra = flow_errors(outputs.flow.detach(), raw) if outputs.flow is not None else {}
            log.write(done, lr=scheduler.get_last_lr()[0], windows=options.batch_size, **extra)
        if data.val and options.val_every and done % options.val_every == 0 and done < options.steps:
            subset = evaluation_loader(data.val, options.batch_size, options.val_windows)
            with log.paused():
                log.write_validation(done, validate(accelerator, model, processor, subset))
        stopping = bool(stop)
        due = options.checkpoint_every and done % options.checkpoint_every == 0
        if due or stopping or done == options.steps:
            with log.paused():
                save_checkpoint(accelerator, output / "checkpoints", done, options.keep_checkpoints)
        if stopping and done < options.steps:
            log.close()
            stop.close()
            say(f"stopped after step {done}; continue with --resume")
            return stop.exit_code
    log.close()
    stop.close()

    final = {}
    # Without mixed precision's wrapper: figures are those of the exported float32 weights.
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if facts:
        plain = plain.get_base_model()  # with the adapter in its layers
    if data.val and accelerator.is_main_process:
        say("measuring depth, future, flow and actions on the validation episodes, beside trivial predictors")
        training = evaluation_loader(data.train_plain, options.batch_size)
        baselines = fit_baselines(training, processor, plain.config, accelerator.device)
        validation = evaluation_loader(data.val, options.batch_size)
        final = evaluate_open_loop(plain, processor, validation, baselines)
        say(format_open_loop(final))
    accelerator.wait_for_everyone()
    export_model(accelerator, model, processor, config, data, facts)
    if accelerator.is_main_process:
        summary = {
            **describe_run(),
            "seed": config.seed,
            "steps": options.steps,
            "train_seconds": log.seconds,
            "datasets": data.describe(),
            "parameters": parameters,
            "trained_parameters": sum(p.numel() for p in trained),
            "objectives": list(plain.config.objectives),
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "mixed_precision": accelerator.mixed_precision,
            **describe_start(config, facts),
            "validation": final,
        }
        write_json(output / "summary.json", summary)
    say(f"done: model in {config.export}, log and checkpoints in {output}")
    accelerator.end_training()
    return 0


def describe_start(config: RunConfig, facts: dict | None) -> dict:
    """For the summary: what the run started from, as it may be published, and what was adapted."""
    if not config.init_from:
        return {}
    described = {"init_from": portable_path(config.init_from), "init_revision": config.init_revision}
    if facts:
        described |= {"init_revision": facts["base_revision"], "lora": dataclasses.asdict(config.lora)}
    return described


def check_run_folder(config: RunConfig, output: Path, resume: bool):
    """What `output` holds: `None` (nothing), `"finished"`, or the newest checkpoint and its step.

    Raises:
        ValueError: If it holds a run that must not be touched: another one, or this one without `--resume`.
    """
    saved = output / "config.yaml"
    if not saved.exists():
        return None
    if not resume:
        raise ValueError(
            f"{output} already holds a run: continue it with --resume, or choose another --output"
        )
    facts = [dataset_facts(source.path) for source in config.data.datasets]
    if (output / DATASETS).exists() and json.loads((output / DATASETS).read_text()) != facts:
        raise ValueError(
            f"{output} was trained on other data than {', '.join(s.path for s in config.data.datasets)} has "
            f"now (see its {DATASETS}): choose another --output, or bring the data back"
        )
    before, now = dataclasses.asdict(load_config(saved, [])), dataclasses.asdict(config)
    # Where things lie may change between sessions; what is computed may not.
    for run in (before, now):
        run.pop("output"), run.pop("export")
        run["data"].pop("num_workers"), run["data"].pop("frame_cache")
        run["data"]["datasets"] = [
            {**source, "path": Path(source["path"]).name} for source in run["data"]["datasets"]
        ]
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "tracker"):
            run["train"].pop(name)
    if before != now:
        before, now = flatten_metrics(before, ""), flatten_metrics(now, "")
        changed = [
            f"{key.replace('/', '.')}: {before.get(key)} there, {now.get(key)} here"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        raise ValueError(
            f"{output} holds a run with other settings ({'; '.join(changed)}): choose another --output, or "
            "repeat the settings of its config.yaml"
        )
    if (output / "summary.json").exists() and Path(config.export).exists():
        return "finished"
    return latest_checkpoint(output / "checkpoints")


@torch.no_grad()
def validate(
    accelerator: Accelerator, model, processor: ForesightProcessor, loader: DataLoader
) -> dict[str, float]:
    """Mean validation losses; every process looks at all windows, so that none waits for a share."""
    model.eval()
    plain = accelerator.unwrap_model(model)
    totals, count = {}, 0
    for raw in loader:
        with accelerator.autocast():
            batch = processor.prepare_batch(raw, accelerator.device, plain.config.history_length)
            losses = plain(**batch).losses
        size = len(raw["task"])
        count += size
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + float(value) * size
    model.train()
    return {name: value / count for name, value in totals.items()}


def export_model(
    accelerator: Accelerator,
    model,
    processor: ForesightProcessor,
    config: RunConfig,
    data: RunData,
    facts: dict | None,
) -> None:
    """Writes the processor and the model, or the adapter with the `facts` of its base."""
    target = Path(config.export)

    def write_model(target: Path, write) -> None:
        write_export(target, processor, write, lambda folder: add_lerobot_files(folder, target, data))

    state = accelerator.get_state_dict(model)  # collective under sharding: all processes call it
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(model)
        if facts is None:
            write_model(target, lambda folder: plain.save_pretrained(folder, state_dict=state))
        else:
            write_export(target, processor, lambda folder: write_adapter(plain, folder, facts, state))
            if config.lora.merge:
                merged = plain.merge_and_unload()
                write_model(target.with_name(f"{target.name}-merged"), merged.save_pretrained)
            else:
                accelerator.print(
                    f"{target} is no policy for LeRobot's commands; --lora.merge true makes one"
                )
            if Path(config.init_from).exists():
                accelerator.print(
                    f"{target} names its base as {config.init_from!r}, a folder that other machines lack: "
                    "before publishing, push the base to the Hub and put its id into adapter_config.json "
                    "(docs/lora.md)"
                )
    accelerator.wait_for_everyone()


def add_lerobot_files(folder: Path, target: Path, data: RunData) -> None:
    """Makes an exported model a policy of LeRobot too, with the cameras that it was trained on.

    LeRobot's side may be unable to use it; the model is none the worse for that.
    """
    # Here, because no other part of training needs the policy.
    from lerobot_policy_foresight.checkpoint_files import write_lerobot_files

    try:
        write_lerobot_files(folder, data.image_keys)
    except (ValueError, ImportError, StrictDataclassError) as error:
        print(f"{target} is no policy for LeRobot's commands: {str(error).replace(str(folder), str(target))}")


def main() -> int:
    """Reads the command line; user mistakes become one line and exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any field of training/config.py can be set: --train.steps 2000 --model.hidden_size 192\n"
        "example: accelerate launch training/train.py --config training/configs/quickstart.yaml "
        "--dataset outputs/quickstart/dataset --output outputs/my-run --resume\n"
        "LoRA: accelerate launch training/train.py --config training/configs/lora_custom.yaml "
        "--init_from outputs/quickstart/model --lora.r 16 --dataset DIR --output outputs/my-adapter",
    )
    parser.add_argument("--config", help="YAML file of the run, for example training/configs/quickstart.yaml")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    parser.add_argument("--dataset", help="LeRobot v3 dataset with depth and track columns: folder or Hub id")
    parser.add_argument(
        "--skip-flagged", action="store_true", help="leave out episodes whose labels have a flag"
    )
    parser.add_argument("--output", help="run folder")
    parser.add_argument("--export", help="folder of the finished model (default: OUTPUT/model)")
    parser.add_argument("--seed", type=int, help="seed of everything random")
    named, overrides = parser.parse_known_args()
    for name in ("dataset", "output", "export", "seed"):
        if getattr(named, name) is not None:
            overrides += [f"--{name}", str(getattr(named, name))]
    if named.skip_flagged:
        overrides += ["--data.skip_flagged", "true"]
    try:
        return train(load_config(named.config, overrides), named.resume)
    except (ValueError, OSError, HubError, StrictDataclassError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
