"""A finished run in a folder: the model is real and tiny, the figures are made up."""

import functools
import json
from pathlib import Path

import torch

from modeling_foresight import ForesightForActionPrediction
from tests.tiny import tiny_config, tiny_processor
from training.config import RunConfig
from training.config_reading import save_config
from training.run_record import describe_run

TASK = "drawer-open-v3"
RUN = {"train.py": ["--seed", "3"], "evaluate.py": ["--episodes", "20"]}


@functools.cache
def facts_of_run(script: str, *arguments: str) -> dict:
    """Versions, hardware and commit as `describe_run` gives them; it asks git."""
    return describe_run(script, list(arguments))


def validation():
    """Errors as `evaluate_open_loop` gives them."""

    def patches(model, mean, **more):
        return {
            view: {"model": {"mse": model}, "mean": {"mse": mean}, **{k: {"mse": v} for k, v in more.items()}}
            for view in ("main", "wrist")
        }

    flow = {"x_px": 0.51, "y_px": 0.62, "xy_px": 0.913, "xy_rmse": 0.01}
    worse = {name: 2 * value for name, value in flow.items()}
    return {
        "windows": 97,
        "losses": {"total": 0.2},
        "depth": patches(0.2101, 0.5),
        "future_rgb": patches(0.3, 0.6, current=0.4),
        "future_depth": patches(0.3, 0.6, current=0.25),
        "flow": {
            "moving": {
                "model": {**flow, "z_m": 0.0123, "z_rmse_m": 0.02},
                "stay_put": worse,
                "mean": {**worse, "z_m": 0.3, "z_rmse_m": 0.4},
            }
        },
        "actions": {
            name: {"model": {"l1": [0.1] * 4, "l1_mean": 0.1}, "mean": {"l1": [0.4] * 4, "l1_mean": 0.4}}
            for name in ("chunk", "first")
        },
        "progress": {"all": {"model": {"mae": 0.05}, "mean": {"mae": 0.25}}},
    }


def summary():
    """What `train.py` writes."""
    return {
        **facts_of_run("training/train.py", *RUN["train.py"]),
        "seed": 3,
        "steps": 1234,
        "train_seconds": 90.0,
        "datasets": [
            {
                "name": "someone/demos",
                "train_episodes": 45,
                "train_windows": 1111,
                "validation_episodes": [4, 9, 11],
                "fps": 20,
                "tasks": ["Open a drawer"],
                "labels": {"main": {"depth": {"source": "mujoco"}, "tracks": {"source": "rigid bodies"}}},
            }
        ],
        "parameters": 987654,
        "trained_parameters": 987000,
        "objectives": ["action", "depth", "future", "flow", "progress"],
        "processes": 1,
        "device": "cpu",
        "mixed_precision": "bf16",
        "validation": validation(),
    }


def evaluation(tasks=(TASK,)):
    """What `evaluate.py` writes."""
    figures = {"success_rate": 0.95, "successes": 19, "episodes": 20, "ci95": [0.7639, 0.9911]}
    return {
        "version": 1,
        "benchmark": "MetaWorld",
        "checkpoint": {"path": "model", "revision": None},
        "tasks": {task: dict(figures) for task in tasks},
        "mean": dict(figures),
        "seeds": {"first": 10000, "last": 10019, "checked_against": "50 demonstrations of dataset"},
        "settings": {
            "control_hz": 20.0,
            "stride": 4,
            "execute_steps": 1,
            "max_steps": 125,
            "max_simulation_steps": 500,
            "render_quality": "fast",
            "image_size": 48,
        },
        "timing": {
            "wall_s": 60.0,
            "parallel_environments": 2,
            "policy_ms": {"median": 12.34, "p90": 20.0, "count": 400},
        },
        "episodes": [],
        **facts_of_run("training/evaluate.py", *RUN["evaluate.py"]),
    }


def stats(size: int) -> dict:
    """Statistics of `size` entries that all move."""
    return {
        name: [value] * size for name, value in {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}.items()
    }


def latency() -> dict:
    """What `measure_latency.py` writes."""
    run = dict(facts_of_run("hub_cards/measure_latency.py", "model"))
    row = {
        "device": "cpu",
        "hardware": run.pop("hardware")["cpu"],
        "cores": 2,
        "threads": 1,
        "dtype": "float32",
    }
    times = {"camera_px": 40, "median_ms": 4.321, "p90_ms": 5.0, "count": 50, "warmup": 12}
    return {"version": 1, "measurements": [{**row, **times, **run}]}


def diagnostics() -> dict:
    """What `diagnose.py` writes."""
    plain = {"success_rate": 0.9, "successes": 9, "episodes": 10, "ci95": [0.5958, 0.9821]}
    plain |= {"tasks": {TASK: 5, "drawer-close-v3": 4}}
    frozen = {**plain, "success_rate": 0.1, "successes": 1, "tasks": {TASK: 1, "drawer-close-v3": 0}}
    frozen |= {"plain_successes": 9, "difference": {"mean": -0.8, "ci95": [-1.0, -0.5], "won": 0, "lost": 8}}
    return {
        "version": 1,
        "benchmark": "MetaWorld",
        "checkpoint": {"path": "model", "revision": None, "weights_sha256": None},
        "seeds": {"first": 10000, "last": 10004},
        "settings": {"max_simulation_steps": 240, "chunk_size": 4},
        "closed_loop": {"plain": plain, "frozen_camera": frozen, "execute_2": frozen, "history_1": frozen},
        "skipped": {"swapped_views": "it has one camera"},
        "demonstrations": {
            "dataset": "others",
            "episodes": 8,
            "windows": 1234,
            "tasks": {
                name: {"next_action_l1": l1} for name, l1 in zip("abcde", (5, 1, 2, 3, 4), strict=True)
            },
            "progress": {"mae": 0.05, "ece": 0.0213, "bins": []},
            "instruction": {"windows": 77, "named_l1": 0.07, "other_l1": 0.45, "change_l1": 0.43},
            "causality": {
                "later_frames": 0.0,
                "labels": 0.0,
                "points": None,
                "stream": 4.77e-7,
                "windows": 64,
            },
        },
        **facts_of_run("training/diagnose.py", "--episodes", "5"),
    }


def make_run(folder: Path, **overrides) -> Path:
    """Writes it; `overrides` are fields of the model's config."""
    fields = {"action_dim": 4, "binary_action_indices": (), "state_dim": 4, "binary_state_indices": ()}
    config = tiny_config(**(fields | overrides))
    torch.manual_seed(0)
    ForesightForActionPrediction(config).save_pretrained(folder / "model")
    numbers = {f"{name}_stats": stats(4) for name in ("action", "state")}
    tiny_processor(config, **numbers).save_pretrained(folder / "model")
    (folder / "model" / "evaluation").mkdir()
    (folder / "model" / "evaluation" / "latency.json").write_text(json.dumps(latency()))
    (folder / "training").mkdir()
    save_config(RunConfig(), folder / "training" / "config.yaml")
    (folder / "training" / "summary.json").write_text(json.dumps(summary()))
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    (folder / "foresight.png").write_bytes(b"a picture")
    (folder / "rollout.mp4").write_bytes(b"a film")
    return folder
