"""3D Foresight beside LeRobot's ACT, Diffusion and SmolVLA: latency, memory, success after equal training.

Latency and memory are those of random weights at each policy's own default size (they do not depend on the
weights), through LeRobot's interface: one observation of a robot with two cameras to one action, pipelines
included. All policies see the same pictures and run in turns in this process. `plan_ms` is a step at which
the policy plans, `step_ms` the mean over the steps of a plan, as many as the policy executes by default;
`plan_cpu_ms` and `step_cpu_ms` are their processor time, which other programs hardly change. Memory is
measured in a process of its own. Nothing is downloaded: the backbone of SmolVLA is built at its published
sizes (`SMOLVLM2_500M`) with a small tokenizer.

With `--train_on` 3D Foresight and ACT also learn one MetaWorld task from the same demonstrations, by their
own trainers and with equal processor time, and both are tried by `lerobot-eval` from the same starts.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from _measure import (
    build_parser,
    describe_machine,
    model_sizes,
    peak_rss_mb,
    print_table,
    start_afresh,
    time_in_turns,
    write_csv,
)

from datasets_scripts.command_line import count_cores, entry_point
from datasets_scripts.storage.atomic import check_place, read_json, write_json
from datasets_scripts.storage.dataset_folder import is_dataset_folder

ROOT = Path(__file__).resolve().parents[1]
CAMERAS, STATE_DIM, ACTION_DIM = ("main", "wrist"), 4, 4
INSTRUCTION = "Open a drawer"
POLICIES = ("foresight-small", "foresight", "act", "diffusion", "diffusion-ddim", "smolvla")
# Module and extra of LeRobot.
NEEDED = {"diffusion": ("diffusers", "diffusion"), "smolvla": ("num2words", "smolvla")}
# SmolVLM2-500M-Video-Instruct, of which SmolVLA takes the first 16 layers of the language model.
SMOLVLM2_500M = {
    "scale_factor": 4,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
}
SMOLVLM2_SMALL = {
    "scale_factor": 2,
    "text_config": SMOLVLM2_500M["text_config"]
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "image_size": 64, "patch_size": 16},
}
# ACT as small as a CPU can train: LeRobot's ResNet-18 from scratch, everything behind it as wide as ours.
SMALL_ACT = {
    "pretrained_backbone_weights": None,
    "dim_model": 128,
    "n_heads": 4,
    "dim_feedforward": 512,
    "n_encoder_layers": 2,
    "n_vae_encoder_layers": 1,
    "latent_dim": 8,
    "chunk_size": 10,
    "n_action_steps": 5,
    "optimizer_lr": 1e-4,
    "optimizer_lr_backbone": 1e-4,
}

EXAMPLE = """examples:
  python benchmarks/compare_policies.py                                          # latency and memory
  python benchmarks/compare_policies.py --policies foresight act --paths outputs/act/pretrained_model
  python benchmarks/compare_policies.py --train_on outputs/quickstart/dataset    # and success, ten minutes
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="(default: all)")
    add("--paths", nargs="+", type=Path, default=[], help="trained policies of LeRobot to compare too")
    add("--history", type=int, default=10, help="frames that a policy may read (default: %(default)s)")
    add("--camera_px", type=int, default=224, help="side of the pictures (default: %(default)s)")
    add("--warmup", type=int, default=1, help="plans of each before the measured ones")
    add("--repeats", type=int, default=5, help="plans of each")
    add("--threads", type=int, default=count_cores(), help="threads of PyTorch (default: %(default)s here)")
    add("--small", action="store_true", help="tiny models, to try the script")
    add("--memory_of", metavar="POLICY", help=argparse.SUPPRESS)  # what each process of its own runs
    add("--train_on", type=Path, help="LeRobot dataset of one MetaWorld task, made by `make quickstart`")
    add("--task", default="drawer-open-v3", help="that task (default: %(default)s)")
    add("--episodes", type=int, default=20, help="starts to try both from (default: %(default)s)")
    add("--seed", type=int, default=10000, help="the first of these starts (default: %(default)s)")
    add("--times", type=float, nargs="+", default=[1.0], help="processor time of ACT beside ours")
    add("--train_flags", default="", help="more options of training/train.py, in quotes")
    add("--output", type=Path, default=Path("outputs/benchmarks/compare_policies.csv"))
    args = parser.parse_args(arguments)
    if min(args.repeats, args.threads, args.episodes, args.camera_px, args.history) < 1 or args.warmup < 0:
        parser.error("--repeats, --threads, --episodes, --camera_px and --history must be at least 1")
    return args


# ------------------------------------------------------------------ the policies


def features(camera_px: int) -> dict:
    """`input_features` and `output_features` of LeRobot's policies."""
    from lerobot.configs import FeatureType, PolicyFeature

    picture = PolicyFeature(FeatureType.VISUAL, (3, camera_px, camera_px))
    inputs = {f"observation.images.{camera}": picture for camera in CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    return {
        "input_features": inputs,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        "device": "cpu",
    }


def require(name: str) -> None:
    """Raise a `ValueError` if a policy of LeRobot lacks a package."""
    module, extra = NEEDED.get(name.partition("-")[0], (None, None))
    if module and importlib.util.find_spec(module) is None:
        rest = " ".join(other for other in POLICIES if other.partition("-")[0] not in NEEDED)
        raise ValueError(
            f"{name} needs the package {module}: pip install 'lerobot[{extra}]', or leave it out with "
            f"--policies {rest}"
        )


def build_policy(name: str, args: argparse.Namespace, scratch: Path):
    """A policy in evaluation mode and its pipelines: one of `POLICIES` with random weights, or a folder."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    torch.manual_seed(0)
    if name not in POLICIES:
        config = PreTrainedConfig.from_pretrained(name, cli_overrides=["--device=cpu"])
        check_inputs(name, config, args)
        policy = get_policy_class(config.type).from_pretrained(name, config=config)
        return policy.eval(), *make_pre_post_processors(config, name)
    require(name)
    if name.startswith("foresight"):
        policy = build_foresight(name, args)
    else:
        kind = name.partition("-")[0]
        fields = {"act": act_fields, "diffusion": diffusion_fields, "smolvla": smolvla_fields}[kind]
        policy_class = get_policy_class(kind)
        policy = policy_class(
            policy_class.config_class(**fields(name, args.small, scratch), **features(args.camera_px))
        )
    check_inputs(name, policy.config, args)
    return policy.eval(), *make_pre_post_processors(policy.config, dataset_stats=statistics())


def build_foresight(name: str, args: argparse.Namespace):
    """Ours: the size of the quickstart, or the paper's with `foresight`."""
    import dataclasses

    import yaml
    from lerobot.policies.factory import get_policy_class

    from modeling_foresight import ForesightConfig, ForesightProcessor, build_small_tokenizer

    tokenizer = build_small_tokenizer([INSTRUCTION])
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if name == "foresight-small":
        fields = yaml.safe_load((ROOT / "training" / "configs" / "quickstart.yaml").read_text())["model"]
        fields["text_config"] |= ids | {"vocab_size": len(tokenizer)}
    else:
        fields = model_sizes(args.small, **ids)
    robot = {"views": list(CAMERAS), "action_dim": ACTION_DIM, "binary_action_indices": []}
    robot |= {"state_dim": STATE_DIM, "binary_state_indices": []}
    model = ForesightConfig(**fields | robot)
    policy_class = get_policy_class("foresight")
    known = {field.name for field in dataclasses.fields(policy_class.config_class)}
    fields = {key: value for key, value in json.loads(model.to_json_string()).items() if key in known}
    for key in ("architectures", "auto_map", "model_type", "transformers_version", "dtype"):
        fields.pop(key, None)
    cameras = {camera: f"observation.images.{camera}" for camera in CAMERAS}
    policy = policy_class(policy_class.config_class(**fields, cameras=cameras, **features(model.image_size)))
    policy.processor = ForesightProcessor.from_config(policy.model.config, tokenizer)
    policy.reset()
    return policy


def act_fields(name: str, small: bool, scratch: Path) -> dict:
    """ACT at LeRobot's default size; its pretrained image encoder would be downloaded."""
    return {**SMALL_ACT, "dim_model": 32} if small else {"pretrained_backbone_weights": None}


def diffusion_fields(name: str, small: bool, scratch: Path) -> dict:
    """Diffusion at LeRobot's default size with its 100 steps of DDPM, or with ten of DDIM."""
    sizes = {"down_dims": (16, 32), "num_inference_steps": 2, "n_groups": 4} if small else {}
    quick = {"noise_scheduler_type": "DDIM", "num_inference_steps": 10} if name == "diffusion-ddim" else {}
    return {"pretrained_backbone_weights": None, **quick, **sizes}


def smolvla_fields(name: str, small: bool, scratch: Path) -> dict:
    """SmolVLA at LeRobot's default size; config, tokenizer and processor of its backbone go to `scratch`."""
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    from modeling_foresight import build_small_tokenizer

    words = build_small_tokenizer([INSTRUCTION]).backend_tokenizer
    special = {
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", extra_special_tokens=special
    )
    config = SmolVLMConfig(**(SMOLVLM2_SMALL if small else SMOLVLM2_500M), image_token_id=5, pad_token_id=2)
    config.save_pretrained(scratch)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(scratch)
    fields = {"vlm_model_name": str(scratch)}
    return fields | (
        {"resize_imgs_with_padding": (64, 64), "num_steps": 2, "num_vlm_layers": 2} if small else {}
    )


def statistics() -> dict:
    """Statistics by which LeRobot's pipelines normalize."""
    sizes = {"observation.state": (STATE_DIM,), "action": (ACTION_DIM,)}
    sizes |= {f"observation.images.{camera}": (3, 1, 1) for camera in CAMERAS}
    values = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    return {
        key: {name: torch.full(shape, value) for name, value in values.items()}
        for key, shape in sizes.items()
    }


def check_inputs(name: str, config, args: argparse.Namespace) -> None:
    """Raise a `ValueError` for a policy that cannot be compared: other cameras or sizes, a longer history."""
    wanted = {f"observation.images.{camera}" for camera in CAMERAS}
    if set(config.image_features) != wanted:
        raise ValueError(
            f"{name} sees the cameras {sorted(config.image_features)}, and the comparison shows "
            f"{sorted(wanted)}: leave it out"
        )
    for what, feature, size in (
        ("state", config.robot_state_feature, STATE_DIM),
        ("action", config.action_feature, ACTION_DIM),
    ):
        if feature and tuple(feature.shape) != (size,):
            raise ValueError(
                f"{name} has {what} entries of shape {tuple(feature.shape)}, and the comparison of "
                f"({size},): leave it out"
            )
    frames = getattr(config, "history_length", None) or config.n_obs_steps
    if frames > args.history:
        raise ValueError(
            f"{name} reads {frames} frames, and the comparison gives {args.history}: --history {frames}, or "
            "leave it out"
        )


# ------------------------------------------------------------------ latency and memory


class Robot:
    """A policy that acts on one random observation; a call is a whole plan.

    Attributes:
        plans_ms (`list`): Of every plan `(E, 2)`: milliseconds of its steps, and those of processor time.
    """

    def __init__(self, name: str, args: argparse.Namespace, scratch: Path):
        self.policy, self.before, self.after = build_policy(name, args, scratch)
        draw = torch.Generator().manual_seed(0)
        side = args.camera_px
        self.seen = {f"observation.images.{c}": torch.rand(1, 3, side, side, generator=draw) for c in CAMERAS}
        self.seen |= {"observation.state": torch.zeros(1, STATE_DIM), "task": [INSTRUCTION]}
        self.policy.reset()
        self.plans_ms: list[np.ndarray] = []
        if history := getattr(self.policy.config, "history_length", None):
            for _ in range(history):  # a full window
                self.act()

    @torch.inference_mode()
    def act(self) -> torch.Tensor:
        """One observation to one action."""
        return self.after(self.policy.select_action(self.before(dict(self.seen))))

    def __call__(self) -> None:
        """A plan, and the steps that execute it."""
        steps_ms = []
        for _ in range(self.policy.config.n_action_steps):
            start = time.perf_counter(), time.process_time()
            self.act()
            steps_ms.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        self.plans_ms.append(np.array(steps_ms) * 1000)

    def count_parameters(self) -> tuple[int, float]:
        """Number of parameters, and their size in MB."""
        parameters = list(self.policy.parameters())
        return sum(p.numel() for p in parameters), sum(
            p.numel() * p.element_size() for p in parameters
        ) / 2**20


def measure_memory(name: str | None, args: argparse.Namespace) -> dict:
    """Peak memory of a process that runs a plan of one policy; without a policy, of the libraries alone."""
    own = ["--camera_px", str(args.camera_px), "--history", str(args.history)] + ["--small"] * args.small
    command = [sys.executable, __file__, "--memory_of", name or "none", "--threads", str(args.threads), *own]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed in a process of its own: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(name: str, args: argparse.Namespace) -> None:
    """What the process of one policy does."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        if name == "none":
            import lerobot.policies.factory  # noqa: F401
            from lerobot.utils.import_utils import register_third_party_plugins

            register_third_party_plugins()
        else:
            robot = Robot(name, args, Path(scratch))
            robot()
            parameters, size = robot.count_parameters()
            found = {"parameters": parameters, "parameters_mb": round(size, 1)}
    print(json.dumps({**found, "peak_rss_mb": peak_rss_mb()}))


def measure_latency(args: argparse.Namespace) -> list[dict]:
    """A row per policy: times in turns, then memory."""
    names = [*args.policies, *map(str, args.paths)]
    with tempfile.TemporaryDirectory() as scratch:
        robots = {name: Robot(name, args, Path(scratch)) for name in names}
        time_in_turns(robots, torch.device("cpu"), args.warmup, args.repeats)
        plans = {name: robot.plans_ms[args.warmup :] for name, robot in robots.items()}
    robots.clear()
    start_afresh(torch.device("cpu"))
    base = measure_memory(None, args)["peak_rss_mb"]
    rows = []
    for name in names:
        planning = np.median([steps[0] for steps in plans[name]], axis=0).round(3)
        step = np.median([steps.mean(0) for steps in plans[name]], axis=0).round(3)
        memory = measure_memory(name, args)
        rows.append(
            {
                "policy": name,
                **{key: memory[key] for key in ("parameters", "parameters_mb", "peak_rss_mb")},
                "libraries_rss_mb": base,
                "actions_per_plan": len(plans[name][0]),
                "plan_ms": float(planning[0]),
                "plan_cpu_ms": float(planning[1]),
                "step_ms": float(step[0]),
                "step_cpu_ms": float(step[1]),
                "repeats": args.repeats,
                "camera_px": args.camera_px,
            }
        )
        print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------ success after equal training


def run_for(
    command: list[str], log: Path, args: argparse.Namespace, budget_s: float | None = None, tidy=None
):
    """Run a command, until it has used `budget_s` of processor time if that is given; gives the time used.

    `tidy` is called meanwhile. Raises a `RuntimeError` if the command fails by itself.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # With a cache of its own, the time of decoding counts.
    cache = str(log.parent / "cache")
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": path}
    environment |= {"FORESIGHT_CACHE": cache}
    used = 0.0
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                used = max(used, processor_time(process.pid))
                if tidy:
                    tidy()
                if budget_s and used >= budget_s:
                    return used
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)] or lines or [""]
        raise RuntimeError(f"{shlex.join(command[1:4])} failed: {told[-1]} (all of it: {log})")
    return used


def processor_time(pid: int) -> float:
    """Seconds of processor time of a process and its children, ended ones included."""
    total = 0.0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    except psutil.NoSuchProcess:
        pass
    return total


def train_ours(dataset: Path, folder: Path, args: argparse.Namespace) -> tuple[Path, float]:
    """The quickstart's training; gives the policy and the processor time."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--dataset", str(dataset)]
    command += [
        "--config",
        str(ROOT / "training" / "configs" / "quickstart.yaml"),
        *shlex.split(args.train_flags),
    ]
    command += ["--output", str(folder / "foresight"), "--export", str(folder / "foresight" / "model")]
    return folder / "foresight" / "model", run_for(command, folder / "foresight.log", args)


def train_act(dataset: Path, folder: Path, budget_s: float, args: argparse.Namespace) -> tuple[Path, float]:
    """ACT by `lerobot-train`, stopped after `budget_s` of processor time; its last checkpoint."""
    output = folder / f"act-{budget_s:.0f}s"
    options = {f"policy.{name}": "null" if value is None else value for name, value in SMALL_ACT.items()}
    options |= {
        "policy.type": "act",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "dataset.repo_id": "local/plain",
        "dataset.root": dataset,
        "output_dir": output,
        "steps": 1_000_000,
        "batch_size": 16,
        "num_workers": 0,
        "save_freq": 20,
        "log_freq": 20,
        "env_eval_freq": 0,
        "seed": 0,
    }
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train"]
    command += [f"--{name}={value}" for name, value in options.items()]
    last = output / "checkpoints" / "last"

    def keep_newest() -> None:
        if last.is_symlink():
            for old in last.parent.iterdir():
                if old.name < last.resolve().name:
                    shutil.rmtree(old, ignore_errors=True)

    used = run_for(command, output.with_suffix(".log"), args, budget_s, keep_newest)
    if not (last / "pretrained_model" / "config.json").is_file():
        raise RuntimeError(f"ACT made no checkpoint in {budget_s:.0f} s of processor time: raise --times")
    return last / "pretrained_model", used


def copy_without_labels(dataset: Path, target: Path) -> Path:
    """The dataset as any policy has it: LeRobot would read depth and tracks for ACT too, slowly."""
    from lerobot.datasets.dataset_tools import remove_feature
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from datasets_scripts.columns import is_label_key

    source = LeRobotDataset(f"local/{dataset.name}", root=dataset)
    labels = [key for key, feature in source.meta.features.items() if is_label_key(key, feature)]
    if not labels:
        return dataset
    remove_feature(source, labels, output_dir=target, repo_id="local/plain")
    return target


def try_policy(policy: Path, folder: Path, args: argparse.Namespace) -> dict:
    """Success by `lerobot-eval`, the same for every policy."""
    info = read_json(args.train_on / "meta" / "info.json")
    side = info["features"][f"observation.images.{CAMERAS[0]}"]["shape"][0]
    options = {
        "policy.path": policy,
        "policy.device": "cpu",
        "env.type": "foresight_metaworld",
        "env.task": args.task,
        "env.image_size": side,
        "env.cameras": ",".join(CAMERAS),
        "seed": args.seed,
        "eval.n_episodes": args.episodes,
        "eval.batch_size": 1,
        "output_dir": folder,
    }
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_eval"]
    used = run_for([*command, *(f"--{k}={v}" for k, v in options.items())], folder.with_suffix(".log"), args)
    outcome = read_json(folder / "eval_info.json")["overall"]
    return {"success": round(outcome["pc_success"] * args.episodes / 100), "eval_cpu_s": round(used, 1)}


def check_training(args: argparse.Namespace) -> None:
    """Refuses `--train_on` where training and trying would fail, before anything is measured."""
    if not is_dataset_folder(args.train_on):
        raise ValueError(f"--train_on {args.train_on} is not a LeRobot dataset: run `make quickstart` first")
    if importlib.util.find_spec("metaworld") is None:
        raise ValueError("trying policies needs MetaWorld: pip install 'lerobot_policy_foresight[sim]'")
    from datasets_scripts.simulation.metaworld import resolve_tasks

    resolve_tasks(args.task)
    features = read_json(args.train_on / "meta" / "info.json")["features"]
    keys = dict.fromkeys([f"observation.images.{camera}" for camera in CAMERAS])
    keys |= {"observation.state": [STATE_DIM], "action": [ACTION_DIM]}
    for key, shape in keys.items():
        if key not in features or shape not in (None, list(features[key]["shape"])):
            raise ValueError(f"--train_on {args.train_on} lacks {key} as MetaWorld has it: choose another")
    folder = args.output.with_suffix("")
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another --output, or move it away")


def measure_success(args: argparse.Namespace) -> list[dict]:
    """Train both, try both; what is measured is written at once."""
    from training.evaluation.metric_loader import load_metric

    metric, rows, folder = load_metric("success_rate"), [], args.output.with_suffix("")
    folder.mkdir(parents=True)
    plain = copy_without_labels(args.train_on, folder / "plain")

    def add(name: str, policy: Path, used: float) -> None:
        tried = try_policy(policy, folder / f"eval-{name}", args)
        outcomes = [1] * tried["success"] + [0] * (args.episodes - tried["success"])
        low, high = metric.compute(predictions=outcomes)["interval"]
        row = {"policy": name, "train_cpu_s": round(used, 1), **tried, "episodes": args.episodes}
        rows.append({**row, "low": round(low, 4), "high": round(high, 4)})
        print(rows[-1], flush=True)
        facts = {"machine": describe_machine(torch.device("cpu")), "rows": rows}
        write_json(args.output.with_suffix(".success.json"), facts)

    ours, used = train_ours(args.train_on, folder, args)
    add("foresight", ours, used)
    for times in args.times:
        policy, act_used = train_act(plain, folder, times * used, args)
        add(f"act, {times:g} x the time", policy, act_used)
    return rows


@entry_point()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables and one line of JSON."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(args.memory_of, args)
        return 0
    check_place(args.output, "--output", ".csv")
    for path in args.paths:
        if not path.is_dir():
            raise ValueError(f"--paths names {path}, which is not a folder: give one of a trained policy")
    for name in args.policies:
        require(name)
    if args.train_on:
        check_training(args)
    rows = measure_latency(args)
    machine = describe_machine(torch.device("cpu"))
    write_csv(args.output, [{**row, "machine": machine} for row in rows])
    success = measure_success(args) if args.train_on else []
    print_table(rows)
    if success:
        print_table(success)
    print(json.dumps({"benchmark": "compare_policies", "latency": rows, "success": success}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
