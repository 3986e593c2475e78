"""Finetuning of an InstructPix2Pix U-Net into a goal generator, with GR-MG's settings.

The batch of a step and its randomness are functions of (seed, step) alone, so an interrupted run resumes
exactly. Autoencoder and text encoder are frozen.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_constant_schedule_with_warmup

from datasets_scripts.storage.atomic import read_json, write_json, write_whole_folder
from datasets_scripts.storage.dataset_rows import pin_commit
from goal_images.generator import SAMPLING_FILE, Sampling, load_pipeline, pipeline_digest
from modeling_foresight.step_seed import step_seed
from training.checkpoints import (
    FINISHED,
    find_progress,
    lock_run_folder,
    restore_checkpoint,
    save_checkpoint,
)
from training.engines.clipping import clip_gradients
from training.engines.machines import agree_on_run, find_writers, is_writer
from training.engines.reading import iterate, read_everywhere
from training.engines.selection import check_engine, join_processes
from training.engines.stopping import StopRequest
from training.evaluation.simulated.options import option
from training.goal_generator.pairs import GoalPairs, collate_pairs
from training.models.own_exports import check_export, note_export
from training.monitoring.run_log import RunLog
from training.run_data import dataset_identity, is_same_dataset, leave_signals_to_parent
from training.run_record import describe_run
from training.windows import WindowSampler

__all__ = ["GoalRun", "GoalTraining", "finetune"]

# Settings that may change between sessions of a run, because they do not change what is computed; base and
# dataset may move, and are told apart by their content.
MAY_DIFFER = (
    "base",
    "dataset",
    "output",
    "export",
    "num_workers",
    "frame_cache",
    "log_every",
    "checkpoint_every",
)


@dataclasses.dataclass
class GoalTraining:
    """Settings of a run; the defaults are GR-MG's.

    Raises:
        ValueError: If a value makes no sense; names it.
    """

    base: str = option("InstructPix2Pix pipeline to start from, folder or Hub id")
    dataset: str = option("LeRobot v3 dataset, folder or Hub id")
    output: str = option("run folder")
    export: str | None = option("folder of the finished pipeline (default: OUTPUT/pipeline)", None)
    camera: str = option("camera of the pictures, the policy's first view (default: %(default)s)", "main")
    least_ahead: int = option("least frames from a picture to its goal (default: %(default)s)", 20)
    most_ahead: int = option("most frames from a picture to its goal (default: %(default)s)", 22)
    image_size: int = option("pixels per side (default: %(default)s)", 256)
    augment: bool = option("random crops and colors (default: %(default)s)", True)
    steps: int = option("optimizer steps (default: %(default)s, GR-MG's 50 epochs of CALVIN)", 102_900)
    batch_size: int = option("pairs per step, of all processes together (default: %(default)s)", 64)
    gradient_accumulation_steps: int = option("parts that a step is computed in (default: %(default)s)", 1)
    learning_rate: float = option("peak of the constant schedule (default: %(default)s)", 8e-5)
    warmup_steps: int = option("steps of linear warm-up (default: %(default)s)", 800)
    max_grad_norm: float = option("largest norm of the gradient, 0 for any (default: %(default)s)", 0.7)
    dropout: float = option(
        "share of pairs without prompt, as many without picture, as many without both (default: %(default)s)",
        0.05,
    )
    ema_decay: float = option(
        "decay of the average of the weights, which is exported (default: %(default)s)", 0.999
    )
    mixed_precision: str = option(
        "precision of computation (default: %(default)s)", "no", choices=["no", "fp16", "bf16"]
    )
    gradient_checkpointing: bool = option(
        "compute activations again: less memory, more time (default: %(default)s)", False
    )
    seed: int = option("seed of everything random (default: %(default)s)", 0)
    num_workers: int = option("processes that read data (default: %(default)s)", 2)
    frame_cache: str = option(
        "where decoded frames are kept: auto, off, or a folder (default: %(default)s)", "auto"
    )
    log_every: int = option("steps between lines of the log (default: %(default)s)", 50)
    checkpoint_every: int = option("steps between checkpoints (default: %(default)s)", 1000)
    resume: bool = option("continue the run in --output, if there is one", False)

    def __post_init__(self):
        positive = ("least_ahead", "image_size", "steps", "batch_size", "gradient_accumulation_steps")
        least = dict.fromkeys((*positive, "log_every", "checkpoint_every"), 1)
        least |= dict.fromkeys(("learning_rate", "warmup_steps", "max_grad_norm", "num_workers"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value < math.inf:  # nan is not at least anything
                raise ValueError(f"--{name} is {value}; it must be a finite number, at least {bound}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"--batch_size {self.batch_size} cannot be cut into --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} equal parts"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; it must be from 0 to below 1, such as 0.999")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be from 0 to 2**63 - 1")
        if self.most_ahead < self.least_ahead:
            raise ValueError(f"--most_ahead is {self.most_ahead}, less than --least_ahead {self.least_ahead}")
        if not 0 <= self.dropout <= 1 / 3:
            raise ValueError(f"--dropout is {self.dropout}; it must be between 0 and 1/3")
        self.export = self.export or str(Path(self.output) / "pipeline")


@dataclasses.dataclass
class GoalRun:
    """What the loop works with.

    Attributes:
        pipeline: Autoencoder, text encoder and schedule, frozen; its U-Net is the one that is trained.
        unet: As Accelerate prepared it.
        noise: The noise schedule of training.
        average: The `EMAModel` of the U-Net.
        facts (`dict`): What decides the result, see [`describe_settings`].
        start (`int`): First step; above 0 in a resumed run.
    """

    options: GoalTraining
    accelerator: Accelerator
    pairs: GoalPairs
    pipeline: object
    unet: torch.nn.Module
    noise: object
    average: object
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    facts: dict
    start: int = 0


def finetune(options: GoalTraining) -> int:
    """Trains and exports.

    Returns:
        `int`: Exit code: 0 when finished, 128 + signal when stopped by one.

    Raises:
        ValueError: If base, data and run folder do not fit together, or a loss is not finite.
        RuntimeError: If diffusers is not installed.
    """
    join_processes()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        project_config=ProjectConfiguration(project_dir=options.output),
    )
    output = Path(options.output)
    check_engine(accelerator, options, shards=False)
    find_writers(accelerator, output)
    with lock_run_folder(accelerator, output):
        with accelerator.local_main_process_first():  # one process per machine downloads and fills caches
            pairs = open_pairs(options)
            facts = describe_settings(options, pairs)
        found = check_folder(options, facts)
        if found == FINISHED:
            accelerator.print(f"{output} holds this finished run; its pipeline is in {options.export}")
            return 0
        check_export(output, [Path(options.export)])
        run = build_run(accelerator, options, pairs, facts)
        if found:
            restore_checkpoint(accelerator, found[0])
            run.start = found[1]
            run.average.to(accelerator.device)
        elif is_writer(accelerator):
            write_json(output / "config.json", facts)
        accelerator.wait_for_everyone()
        log = RunLog(accelerator, output, run.start, options.steps)
        with contextlib.closing(log.bar), contextlib.closing(StopRequest(accelerator)) as stop:
            if not run_steps(run, log, stop):
                return stop.exit_code
        check_export(output, [Path(options.export)])  # another run may have ended meanwhile
        export(run, log.seconds)
        accelerator.print(f"done: pipeline in {options.export}, log and checkpoints in {output}")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return 0


def open_pairs(options: GoalTraining) -> GoalPairs:
    """The run's data; of a run that resumes, at the commit of the Hub at which it began."""
    path = Path(options.output) / "config.json"
    known = read_json(path).get("data", {}) if options.resume and path.is_file() else {}
    return GoalPairs(
        pin_commit(options.dataset, known.get("commit")),
        camera=options.camera,
        ahead=(options.least_ahead, options.most_ahead),
        image_size=options.image_size,
        augment=options.augment,
        seed=options.seed,
        frame_cache=options.frame_cache,
    )


def describe_settings(options: GoalTraining, pairs: GoalPairs) -> dict:
    """What decides the result of a run: its settings, and what its dataset and its base are."""
    settings = dataclasses.asdict(options)
    del settings["resume"]
    return {
        "settings": settings,
        "data": dataset_identity(pairs.rows) | {"commit": pairs.rows.commit},
        "base_sha256": pipeline_digest(options.base),
    }


def check_folder(options: GoalTraining, now: dict) -> str | tuple[Path, int] | None:
    """How far the run in the run folder is, see `find_progress`; `None` if it begins.

    `now` is what [`describe_settings`] says of this run.

    Raises:
        ValueError: If it holds another run, or this one and `resume` is false.
    """
    path = Path(options.output) / "config.json"
    if not agree_on_run(path):
        return None
    if not options.resume:
        raise ValueError(
            f"{path.parent} already holds a run: continue it with --resume, or choose another --output"
        )
    found = find_progress(path.parent, Path(options.export))
    if found is None:  # it ended before its first checkpoint, so its settings have decided nothing
        return None
    before = read_json(path)
    there, here = before.get("settings", {}), now["settings"]
    differ = [name for name in here if name not in MAY_DIFFER and there.get(name) != here[name]]
    changed = [f"{name}: {there.get(name)} there, {here[name]} here" for name in differ]
    changed += ["another dataset"] * (not is_same_dataset(before.get("data", now["data"]), now["data"]))
    # Runs of earlier versions have no digest of the base.
    changed += ["another base"] * (before.get("base_sha256", now["base_sha256"]) != now["base_sha256"])
    if changed:
        told = "; ".join(changed)
        raise ValueError(f"{path.parent} holds a run with other settings ({told}): choose another --output")
    return found


def build_run(accelerator: Accelerator, options: GoalTraining, pairs: GoalPairs, facts: dict) -> GoalRun:
    """Models, optimizer and schedule, prepared by Accelerate.

    Raises:
        ValueError: If there is no such base, or it does not take pictures of this size; names it.
    """
    pipeline = load_pipeline(options.base)
    if odd := options.image_size % (factor := pipeline.vae_scale_factor):
        size = max(options.image_size - odd, factor)
        raise ValueError(
            f"--image_size is {options.image_size}; the autoencoder of {options.base} takes multiples of "
            f"{factor}, such as {size}"
        )
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    frozen = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().to(accelerator.device, frozen)
    unet = pipeline.unet.requires_grad_(True).train()
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    # Near the start the average follows the weights faster (diffusers), so that short runs are averages too.
    average = EMAModel(unet.parameters(), decay=options.ema_decay)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=options.learning_rate, betas=(0.95, 0.999), weight_decay=1e-2, fused=True
    )
    scheduler = get_constant_schedule_with_warmup(optimizer, options.warmup_steps)
    prepared, optimizer, scheduler = accelerator.prepare(unet, optimizer, scheduler)
    average.to(accelerator.device)
    accelerator.register_for_checkpointing(average)
    noise = DDPMScheduler.from_config(pipeline.scheduler.config)
    return GoalRun(
        options, accelerator, pairs, pipeline, prepared, noise, average, optimizer, scheduler, facts
    )


def run_steps(run: GoalRun, log: RunLog, stop: StopRequest) -> bool:
    """The optimization, up to the last step or a signal; whether the last step is done."""
    options, accelerator = run.options, run.accelerator
    parts = options.gradient_accumulation_steps
    batches = iterate(make_loader(run))
    for step in range(run.start, options.steps):
        save = functools.partial(save_checkpoint, accelerator, Path(options.output), step, keep=2)
        with log.reading():
            taken = read_everywhere(accelerator, batches, parts, step, save if step > run.start else None)
        losses = []
        for part, batch in enumerate(taken):
            torch.manual_seed(step_seed(options.seed, step * parts + part, accelerator.process_index))
            with accelerator.accumulate(run.unet):
                loss = measure_loss(run, batch)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = clip_gradients(accelerator, run.unet.parameters(), options.max_grad_norm)
                    check_step(run, step, losses, norm)
                    log.add({"grad_norm": norm})
                run.optimizer.step()
                run.optimizer.zero_grad()
            log.add({"loss": loss.detach()})
        run.scheduler.step()
        run.average.step(run.unet.parameters())
        log.bar.update()
        done, last = step + 1, step + 1 == options.steps
        if done % options.log_every == 0 or last:
            log.write(done, lr=run.scheduler.get_last_lr()[0], windows=options.batch_size)
        with log.paused():
            stopping = stop.is_agreed()
            if done % options.checkpoint_every == 0 or stopping or last:
                save_checkpoint(accelerator, Path(options.output), done, keep=2)
        if stopping and not last:
            accelerator.print(stop.describe(done))
            return False
    return True


def make_loader(run: GoalRun) -> DataLoader:
    """Batches of the remaining steps, one per part."""
    options, parts = run.options, run.options.gradient_accumulation_steps
    sampler = WindowSampler(
        len(run.pairs),
        options.batch_size // parts,
        seed=options.seed,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        start_step=run.start * parts,
        steps=options.steps * parts,
    )
    return DataLoader(
        run.pairs,
        batch_sampler=sampler,
        collate_fn=collate_pairs,
        num_workers=options.num_workers,
        worker_init_fn=leave_signals_to_parent,
        # Forking a process that decodes video and computes with threads is not safe.
        multiprocessing_context="spawn" if options.num_workers else None,
    )


def measure_loss(run: GoalRun, batch: dict) -> Tensor:
    """Mean squared error of the noise that the U-Net finds in the goals of a batch.

    As InstructPix2Pix: the goal's latents are scaled, those of the picture are not, and parts of the
    conditions are hidden, so that sampling can be guided by each.
    """
    options, pipeline, device = run.options, run.pipeline, run.accelerator.device
    with torch.no_grad():
        dtype = pipeline.vae.dtype
        goal = pipeline.vae.encode(batch["goal"].to(device, dtype)).latent_dist.sample()
        goal = goal.float() * pipeline.vae.config.scaling_factor  # (B, c, h, w)
        picture = pipeline.vae.encode(batch["picture"].to(device, dtype)).latent_dist.mode().float()
        text, empty = (encode_prompts(pipeline, p, device) for p in (batch["prompt"], [""]))  # (B, tokens, C)
    draw = torch.rand(len(goal), device=device)
    hides_text, hides_picture = (
        draw < 2 * options.dropout,
        (draw >= options.dropout) & (draw < 3 * options.dropout),
    )
    text = torch.where(hides_text[:, None, None], empty, text)
    picture = picture * ~hides_picture[:, None, None, None]
    noise = torch.randn_like(goal)
    times = torch.randint(run.noise.config.num_train_timesteps, (len(goal),), device=device)
    noisy = run.noise.add_noise(goal, noise, times)
    found = run.unet(torch.cat([noisy, picture], dim=1), times, text, return_dict=False)[0]
    if run.noise.config.prediction_type == "v_prediction":
        noise = run.noise.get_velocity(goal, noise, times)
    return F.mse_loss(found.float(), noise)


def encode_prompts(pipeline, prompts: list[str], device: torch.device) -> Tensor:
    """Text features as the pipeline computes them in sampling, float32 `(B, tokens, C)`."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(device)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids, attention_mask=mask)[0].float()


def check_step(run: GoalRun, step: int, losses: Sequence[Tensor], norm: Tensor) -> None:
    """Stops all processes before an update with a loss, of any part of the batch, or gradient not finite.

    Raises:
        ValueError: In every process; says what to do.
    """
    found = torch.stack([*losses, torch.as_tensor(norm, device=losses[0].device).to(losses[0])])
    if not run.accelerator.gather(found.isfinite().all()[None]).all():
        raise ValueError(
            f"the loss or its gradient is not finite at step {step + 1} of {run.options.output}; earlier "
            "checkpoints are kept. Lower --learning_rate or choose another --mixed_precision, and another "
            "--output"
        )


def export(run: GoalRun, seconds: float) -> None:
    """Writes the pipeline with the averaged U-Net, and `summary.json`."""
    options, accelerator = run.options, run.accelerator
    if not accelerator.is_main_process:
        return
    pipeline = load_pipeline(options.base)  # the run's may be of lower precision
    run.average.copy_to(pipeline.unet.parameters())
    with write_whole_folder(options.export, replace=True) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_json(folder / SAMPLING_FILE, dataclasses.asdict(Sampling(image_size=options.image_size)))
        note_export(Path(options.output), folder)
    facts = run.facts | {"train_seconds": seconds, **describe_run()}
    write_json(Path(options.output) / "summary.json", facts)
