"""Trains 3D Foresight: `accelerate launch training/train.py --config training/configs/quickstart.yaml`.

The loop is `train()`; what it is made of is built by the functions above it. The batch of a step and its randomness are
functions of (seed, step) alone, so an interrupted run continues exactly where it stopped.
"""

import sys

if __package__ in (None, ""):  # run as a script: this folder would shadow the library `evaluate`
    sys.path.pop(0)

import argparse
import dataclasses
import json
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, AutoTokenizer, get_cosine_with_min_lr_schedule_with_warmup

from modeling_foresight import (
    ForesightConfig,
    ForesightForActionPrediction,
    ForesightProcessor,
    build_small_tokenizer,
)
from training.checkpoints import StopRequest, latest_checkpoint, replace_folder, save_checkpoint
from training.config import RunConfig, load_config, save_config
from training.metrics import evaluate_open_loop, fit_baselines, flow_errors
from training.run_facts import describe_run
from training.windows import (
    ConcatWindows,
    ForesightWindows,
    WindowConfig,
    WindowSampler,
    collate_windows,
    split_episodes,
)

logger = logging.getLogger("foresight")


def build_windows(config: RunConfig) -> tuple[ConcatWindows, ConcatWindows | None]:
    """Training and validation windows of all datasets of the run; the second is `None` without validation.

    Raises:
        ValueError: If no dataset is named or one does not serve the model; names it.
    """
    data, model = config.data, ForesightConfig(**config.model)
    if not data.datasets:
        raise ValueError("no dataset: give --dataset DIR_OR_REPO, or data.datasets in the config")
    train, val = [], []
    for source in data.datasets:
        window = WindowConfig(
            views=list(model.views),
            cameras=source.cameras,
            history_length=model.history_length,
            future_shift=model.future_shift,
            lookahead=model.future_targets == "lookahead" and model.has("future"),
            chunk_size=model.chunk_size,
            flow_length=model.flow_length,
            flow_grid=tuple(model.flow_grid),
            objectives=list(model.objectives),
            goal_image=model.goal_image,
            frame_stride=source.frame_stride,
            p_moving=data.p_moving,
            occluded_weight=data.occluded_weight,
            random_shift=data.random_shift,
            state_key=data.state_key,
            action_key=data.action_key,
            missing_targets=data.missing_targets,
            frame_cache=data.frame_cache,
            image_size=model.image_size,
            seed=config.seed,
        )
        episodes = ForesightWindows.count_episodes(source.path)
        train_episodes, val_episodes = split_episodes(episodes, data.val_fraction, config.seed)
        train.append(ForesightWindows(source.path, dataclasses.replace(window, episodes=train_episodes)))
        if val_episodes:
            val.append(ForesightWindows(source.path, window.for_evaluation(val_episodes)))
    return ConcatWindows(train), ConcatWindows(val) if val else None


def build_model(
    config: RunConfig, windows: ConcatWindows
) -> tuple[ForesightForActionPrediction, ForesightProcessor]:
    """The policy and its processor: from `init_from`, or fresh on the towers that the config names."""
    if config.init_from:
        processor = AutoProcessor.from_pretrained(config.init_from)
        model = AutoModel.from_pretrained(config.init_from, dtype=torch.float32, **config.model)
        return model, processor
    fields = dict(config.model)
    instructions = windows.instructions()
    if config.towers.tokenizer == "small":
        length = fields.get("text_config", {}).get("max_position_embeddings", 77)
        tokenizer = build_small_tokenizer(instructions, max_length=length)
        special = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
        }
        fields["text_config"] = {**fields.get("text_config", {}), "vocab_size": len(tokenizer), **special}
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.towers.tokenizer)
    # Sizes of a robot that the config leaves open are the dataset's.
    fields.setdefault("action_dim", windows.action_dim)
    fields.setdefault("binary_action_indices", [])
    fields.setdefault("state_dim", windows.state_dim)
    fields.setdefault("binary_state_indices", [])
    model_config = ForesightConfig(**fields, fps=windows.fps)
    if config.towers.text or config.towers.vision:
        model = ForesightForActionPrediction.from_encoder_checkpoints(
            model_config, text=config.towers.text, vision=config.towers.vision
        )
    else:
        model = ForesightForActionPrediction(model_config)
    stats = {
        f"{name}_stats": windows.statistics(name)
        for name in ("action", "state")
        if getattr(windows, f"{name}_dim")
    }
    return model, ForesightProcessor.from_config(model.config, tokenizer, **stats)


def evaluation_loader(windows: ConcatWindows, config: RunConfig, count: int | None = None) -> DataLoader:
    """Windows in order without augmentation; `count` of them, evenly spread."""
    chosen = range(len(windows))
    if count is not None and count < len(windows):
        chosen = [i * len(windows) // count for i in range(count)]
    subset = torch.utils.data.Subset(windows, chosen)
    return DataLoader(subset, batch_size=config.train.batch_size, collate_fn=collate_windows)


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
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=options.tracker,
        project_config=ProjectConfiguration(project_dir=str(output)),
        dataloader_config=DataLoaderConfiguration(),
    )
    say = logger.info if accelerator.is_main_process else logger.debug
    found = check_run_folder(config, output, resume)
    if found == "finished":
        say(f"{output} holds this finished run; its model is in {config.export}")
        return 0
    torch.manual_seed(config.seed)
    # One process decodes frames into the cache, the others find it there.
    with accelerator.main_process_first():
        windows, val_windows = build_windows(config)
    model, processor = build_model(config, windows)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=tuple(options.betas), weight_decay=options.weight_decay
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, options.warmup_steps, options.steps, min_lr_rate=options.min_learning_rate_ratio
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    start = 0
    if found:
        accelerator.load_state(str(found[0]))
        start = found[1]
        say(f"continuing from step {start} of {output}")
    elif accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "config.yaml")
    accelerator.wait_for_everyone()

    accumulation = options.gradient_accumulation_steps
    sampler = WindowSampler(
        windows.sizes,
        options.batch_size // accumulation,
        seed=config.seed,
        mixture=config.data.mixture,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=start * accumulation,
        steps=options.steps * accumulation,
    )
    loader = DataLoader(
        windows,
        batch_sampler=sampler,
        collate_fn=collate_windows,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        # Forking a process that decodes video and computes with threads is not safe.
        multiprocessing_context="spawn" if config.data.num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
    )
    if options.tracker:
        accelerator.init_trackers("3d-foresight", config=dataclasses.asdict(config))
    say(
        f"{len(windows)} windows for training, {len(val_windows) if val_windows else 0} for validation; "
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M of "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters are trained on "
        f"{accelerator.num_processes} x {accelerator.device.type}"
    )
    stop = StopRequest(accelerator)
    log = RunLog(accelerator, output, start, options.steps)
    model.train()
    batches = iter(loader)
    for step in range(start, options.steps):
        for part in range(accumulation):
            # Dropout and noise are a function of (seed, step, process), whatever ran in between.
            torch.manual_seed(hash_seed(config.seed, step * accumulation + part, accelerator.process_index))
            with log.timed("data_s"):
                raw = next(batches)
            with accelerator.accumulate(model):
                batch = processor.prepare_batch(raw, device=accelerator.device)
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                    log.add({"grad_norm": norm})
                optimizer.step()
                optimizer.zero_grad()
            log.add({"loss": outputs.loss.detach(), **outputs.losses})
        scheduler.step()
        done = step + 1
        if done % options.log_every == 0 or done == options.steps:
            extra = flow_errors(outputs.flow.detach(), raw) if outputs.flow is not None else {}
            log.write(done, lr=scheduler.get_last_lr()[0], windows=options.batch_size, **extra)
        if val_windows and options.val_every and done % options.val_every == 0 and done < options.steps:
            subset = evaluation_loader(val_windows, config, options.val_windows)
            log.write_validation(done, validate(accelerator, model, processor, subset))
        stopping = bool(stop)
        due = options.checkpoint_every and done % options.checkpoint_every == 0
        if due or stopping or done == options.steps:
            save_checkpoint(accelerator, output / "checkpoints", done, options.keep_checkpoints)
        if stopping and done < options.steps:
            log.close()
            say(f"stopped after step {done}; continue with --resume")
            return stop.exit_code
    log.close()

    final = {}
    if val_windows and accelerator.is_main_process:
        say("measuring depth, future, flow and actions on the validation episodes, beside trivial predictors")
        baselines = fit_baselines(evaluation_loader(windows.without_augmentation(), config), processor)
        plain = accelerator.unwrap_model(model)
        final = evaluate_open_loop(plain, processor, evaluation_loader(val_windows, config), baselines)
    accelerator.wait_for_everyone()
    export_model(accelerator, model, processor, Path(config.export))
    if accelerator.is_main_process:
        summary = {
            **describe_run(),
            "seed": config.seed,
            "steps": options.steps,
            "train_seconds": log.seconds,
            "datasets": windows.describe(),
            "validation_episodes": val_windows.episode_indices() if val_windows else [],
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in trained),
            "objectives": list(accelerator.unwrap_model(model).config.objectives),
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "mixed_precision": options.mixed_precision,
            "validation": final,
        }
        write_json(output / "summary.json", summary)
    say(f"done: model in {config.export}, log and checkpoints in {output}")
    accelerator.end_training()
    return 0


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
        changed = [key for key in now if before[key] != now[key]]
        raise ValueError(
            f"{output} holds a run with other settings ({', '.join(changed)}): choose another --output, or repeat the "
            "settings of its config.yaml"
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
            losses = plain(**processor.prepare_batch(raw, device=accelerator.device)).losses
        size = len(raw["task"])
        count += size
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + float(value) * size
    model.train()
    return {name: value / count for name, value in totals.items()}


def export_model(accelerator: Accelerator, model, processor: ForesightProcessor, target: Path) -> None:
    """Writes model and processor for `from_pretrained`; the folder appears only when it is whole."""
    partial = target.with_name(f".{target.name}.partial")
    state = accelerator.get_state_dict(model)  # collective under sharding: all processes call it
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(partial, state_dict=state)
        processor.save_pretrained(partial)
        replace_folder(partial, target)
    accelerator.wait_for_everyone()


def hash_seed(seed: int, step: int, process: int) -> int:
    """One 63-bit seed per (seed, step, process); neighbouring ones are unrelated after the generator's mixing."""
    return (seed * 1_000_003 + step) * 4099 + process & (2**63 - 1)


def write_json(path: Path, content: dict) -> None:
    """Writes JSON under a temporary name, then renames it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


class RunLog:
    """Progress bar, `metrics.jsonl` and Accelerate's trackers; values stay on the device until they are written.

    Args:
        accelerator (`Accelerator`): Only its main process writes.
        output (`Path`): Run folder.
        start (`int`): First step of this session; log lines of later steps are from a lost session and removed.
        steps (`int`): Last step.
    """

    def __init__(self, accelerator: Accelerator, output: Path, start: int, steps: int):
        self.accelerator, self.path = accelerator, output / "metrics.jsonl"
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.times = {"data_s": 0.0}
        self.since, self.since_step, self.seconds = time.perf_counter(), start, 0.0
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            self.path.write_text("".join(f"{line}\n" for line in kept))
            training = [json.loads(line) for line in kept if "step_s" in line]
            self.seconds = training[-1]["seconds"] if training else 0.0
        self.bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", disable=not accelerator.is_main_process
        )

    def timed(self, name: str):
        """Context manager that adds its duration to `name`."""
        return _Timer(self.times, name)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one micro-batch's values to the running means."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int, lr: float, windows: int, **extra: float) -> None:
        """Writes the means since the last line; `data_s` and `step_s` are seconds per step."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        now, steps = time.perf_counter(), step - self.since_step
        elapsed = now - self.since
        self.seconds += elapsed
        line = {"step": step, **means, **extra, "lr": lr}
        line["data_s"] = self.times["data_s"] / steps
        line["step_s"] = elapsed / steps - line["data_s"]
        line["samples_per_s"] = windows * steps / elapsed
        line["seconds"] = self.seconds
        self._append(line)
        self.bar.set_postfix(
            {name: f"{value:.3g}" for name, value in {**means, **extra}.items() if name != "grad_norm"}
        )
        self.bar.update(step - self.bar.n)
        self.sums, self.counts, self.times = {}, {}, {"data_s": 0.0}
        self.since, self.since_step = time.perf_counter(), step

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        """Writes validation losses; the time they took does not count as training."""
        self._append({"step": step, **{f"val_{name}": value for name, value in losses.items()}})
        self.since = time.perf_counter()

    def _append(self, line: dict) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log(
            {name: value for name, value in line.items() if name != "step"}, step=line["step"]
        )

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()


class _Timer:
    def __init__(self, times: dict[str, float], name: str):
        self.times, self.name = times, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *exception):
        self.times[self.name] += time.perf_counter() - self.start


def main() -> int:
    """Reads the command line; user mistakes become one line and exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any field of training/config.py can be set: --train.steps 2000 --model.hidden_size 192\n"
        "example: accelerate launch training/train.py --config training/configs/quickstart.yaml "
        "--dataset outputs/quickstart/dataset --output outputs/my-run --resume",
    )
    parser.add_argument("--config", help="YAML file of the run, for example training/configs/quickstart.yaml")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    parser.add_argument("--dataset", help="LeRobot v3 dataset with depth and track columns: folder or Hub id")
    parser.add_argument("--output", help="run folder")
    parser.add_argument("--export", help="folder of the finished model (default: OUTPUT/model)")
    parser.add_argument("--seed", type=int, help="seed of everything random")
    named, overrides = parser.parse_known_args()
    for name in ("dataset", "output", "export", "seed"):
        if getattr(named, name) is not None:
            overrides += [f"--{name}", str(getattr(named, name))]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return train(load_config(named.config, overrides), named.resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
