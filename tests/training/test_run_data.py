"""The datasets of a run: a dataset for validation alone, mixtures to pretrain on."""

import json
import shutil
import warnings

import httpx
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import load_file

from datasets_scripts.conversion.column_renaming import rename_columns
from datasets_scripts.storage import dataset_rows
from datasets_scripts.storage.hub import download as hub_download
from datasets_scripts.storage.streaming.file_store import FileStore
from modeling_foresight import ForesightConfig
from tests.ranks import run_ranks
from tests.synthetic import make_dataset
from tests.training.test_train import TINY, log_lines, run
from training import loop
from training.checkpoints import check_run_folder, describe_run_folder, read_known_data
from training.config_reading import load_config
from training.models.starting_model import build_model, starting_config
from training.run_data import RunData, open_datasets
from training.windows import split_episodes

FORM = {"frames": 10, "cameras": ("front", "side"), "size": (32, 40), "use_videos": False, "action_dim": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets of one form."""
    folder = tmp_path_factory.mktemp("run_data")
    make_dataset(folder / "training", episodes=3, **FORM)
    make_dataset(folder / "validation", episodes=2, **FORM, limits=((-9, 9),) * 3)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


def open_run(folder, *flags):
    flags = ["--dataset", str(folder / "training"), "--data.frame_cache", "off", *map(str, flags)]
    config = load_config(folder / "tiny.yaml", flags)
    fields = {name: x for name, x in config.model.items() if not name.endswith("_config")}
    sizes = {"action_dim": 3, "state_dim": 3, "binary_action_indices": (), "binary_state_indices": ()}
    return config, RunData(config, ForesightConfig(**(fields | sizes)))


def test_a_validation_dataset_is_used_in_whole_and_all_others_are_trained_on(folder):
    config, data = open_run(folder, "--data.validation", folder / "validation")
    assert config.data.val_fraction == 0
    (train,), (val,) = data.train.datasets, data.val.datasets
    assert train.episodes.tolist() == [0, 1, 2] and val.episodes.tolist() == [0, 1]
    assert train.config.random_shift > 0 == val.config.random_shift
    _, alone = open_run(folder, "--data.val_fraction", 0)
    for key in ("action", "state"):
        for name, values in data.statistics(key).items():
            assert (values == alone.statistics(key)[name]).all(), "those of the data trained on"
    described = data.describe()
    assert [(d["name"], d["train_episodes"], d["validation_episodes"]) for d in described] == [
        ("training", 3, []),
        ("validation", 0, [0, 1]),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dim": 5}, "differ in state size: 5 and 3"),
        ({"action_dim": 5}, "differ in action size: 5 and 3"),
        ({"size": (32, 32)}, "differ in pictures"),
        ({"fps": 10}, "differ in frames a second: 10 and 20"),
        ({"tracks": False}, "annotate"),
    ],
)
def test_a_validation_dataset_of_another_form_is_refused(folder, tmp_path, changes, message):
    make_dataset(tmp_path / "other", episodes=2, **{**FORM, **changes})
    with pytest.raises(ValueError, match=message):
        open_run(folder, "--data.validation", tmp_path / "other")


def test_validation_on_the_data_trained_on_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is trained on too"):
        open_run(folder, "--data.validation", folder / "training")
    shutil.copytree(folder / "training", tmp_path / "copy")
    with pytest.raises(ValueError, match="copy, which is trained on too"):
        open_run(folder, "--data.validation", tmp_path / "copy")


def test_pretraining_on_five_sources_sees_one_camera_of_each_robot_and_no_actions(folder, tmp_path):
    make_dataset(tmp_path / "other", episodes=2, **{**FORM, "state_dim": 5, "action_dim": 5, "fps": 5})
    named = load_config("training/configs/pretrain_five_sources.yaml", [])
    assert (named.train.epochs, named.train.warmup_epochs, named.data.mixture) == (35, 5, "sqrt")
    sources = {source.path.split("/")[-1]: source for source in named.data.datasets}
    assert [name for name, one in sources.items() if one.frame_stride == 2] == [
        "mutex_annotated",
        "libero_annotated",
    ]
    paths = [str(folder / "training")] * (len(sources) - 1) + [str(tmp_path / "other")]
    datasets = [
        {"path": path, "cameras": {"main": "front"}, "frame_stride": one.frame_stride}
        for path, one in zip(paths, sources.values(), strict=True)
    ]
    flags = ["--data.datasets", json.dumps(datasets), "--data.frame_cache", "off"]
    config = load_config("training/configs/pretrain_five_sources.yaml", [*flags, "--model.history_length=4"])
    model = ForesightConfig(**config.model)
    with pytest.warns(UserWarning, match="differ in steps per second"):
        windows = RunData(config, model).train
    assert (windows.state_dim, windows.action_dim) == (0, 0) and model.goal_image
    for window in (windows[0], windows[len(windows) - 1]):
        assert set(window["images"]) == set(window["depth"]) == {"main"}
        assert window["track_weight"].any() and not {"state", "actions"} & set(window)


def test_the_small_pretraining_has_the_architecture_that_it_is_finetuned_with():
    small, policy = (
        load_config(f"training/configs/{n}.yaml", []).model for n in ("pretrain_small", "quickstart")
    )
    changed = {"views", "objectives", "state_dim", "binary_state_indices", "flow_loss_weight"}
    assert {name for name in small.keys() | policy.keys() if small.get(name) != policy.get(name)} == changed


def test_a_run_whose_held_out_episodes_are_shorter_than_a_window_has_no_validation(folder, tmp_path):
    held_out = split_episodes(6, 0.25, 0)[1]
    frames = [3 if episode in held_out else 10 for episode in range(6)]
    short = make_dataset(tmp_path / "short", **{**FORM, "episodes": 6, "frames": frames}).root
    config = load_config(folder / "tiny.yaml", ["--dataset", str(short), "--data.frame_cache", "off"])
    with pytest.warns(UserWarning, match="has no validation: the 2 episodes held out have at most 3 frames"):
        data = RunData(config, starting_config(config))
    assert data.val is None and len(data.train.datasets[0].episodes) == 4


def test_episodes_held_out_are_told_of_their_own_dataset(folder, tmp_path):
    held_out = split_episodes(6, 0.25, 0)[1]
    frames = [3 if episode in held_out else 10 for episode in range(6)]
    short = make_dataset(tmp_path / "short", **{**FORM, "episodes": 6, "frames": frames}).root
    long = make_dataset(tmp_path / "long", **{**FORM, "episodes": 6, "frames": 10}).root
    datasets = f"--data.datasets=[{{path: {short}}}, {{path: {long}}}]"
    config = load_config(folder / "tiny.yaml", [datasets, "--data.frame_cache", "off"])
    with pytest.warns(UserWarning, match="short has no validation"):
        described = RunData(config, starting_config(config)).describe()
    told = [(one["name"], one["train_episodes"], one["validation_episodes"]) for one in described]
    assert told == [("short", 4, []), ("long", 4, sorted(held_out))]


def test_control_has_the_rate_of_the_actions_wherever_they_stand_in_a_mixture(folder, tmp_path):
    rename_columns(folder / "training", tmp_path / "video", {"action": "other"})
    sources = f"[{{path: {tmp_path / 'video'}, frame_stride: 2}}, {{path: {folder / 'training'}}}]"
    flags = [f"--data.datasets={sources}", "--data.frame_cache", "off", "--data.missing_targets", "true"]
    config = load_config(folder / "tiny.yaml", flags)
    with pytest.warns(UserWarning, match="One model has one rate, here 20"):
        assert RunData(config, starting_config(config)).fps == 20


@pytest.mark.parametrize("setting", ["towers.tokenizer", "towers.text"])
def test_a_tower_that_cannot_be_loaded_is_named_by_its_setting(folder, tmp_path, setting):
    flags = [
        "--dataset",
        str(folder / "training"),
        "--data.frame_cache",
        "off",
        f"--{setting}",
        str(tmp_path),
    ]
    config = load_config(folder / "tiny.yaml", flags)
    with pytest.raises(ValueError, match=f"{setting}={tmp_path} cannot be loaded: "):
        build_model(config, RunData(config, starting_config(config)))


def test_a_future_beyond_every_episode_is_told(folder):
    flags = ["--dataset", str(folder / "training"), "--data.frame_cache", "off", "--model.future_shift"]
    for shift, told in ((30, 1), (3, 0)):
        config = load_config(folder / "tiny.yaml", [*flags, str(shift)])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            RunData(config, starting_config(config))
        assert sum("the objective future has no target" in str(one.message) for one in seen) == told


def test_many_values_of_an_entry_that_is_named_binary_are_told(folder):
    flags = ["--dataset", str(folder / "training"), "--data.frame_cache", "off"]
    config = load_config(folder / "tiny.yaml", [*flags, "--model.binary_action_indices", "[0]"])
    with pytest.warns(UserWarning, match="entry 0 of the action has more than two values"):
        build_model(config, RunData(config, starting_config(config)))


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("state_key", "observation.images.front"),
        ("action_key", "observation.points.front"),
        ("state_key", "observation.depth.front"),
    ],
)
def test_a_state_or_an_action_is_one_row_of_numbers(folder, option, key):
    flags = ["--dataset", str(folder / "training"), "--data.frame_cache", "off", f"--data.{option}", key]
    config = load_config(folder / "tiny.yaml", flags)
    with pytest.raises(
        ValueError, match=f"training: {option} is '{key}', a column of .*is one row of numbers"
    ):
        RunData(config, starting_config(config))


def test_a_state_column_of_another_name_must_be_there(folder):
    flags = ["--dataset", str(folder / "training"), "--data.frame_cache", "off"]
    config = load_config(folder / "tiny.yaml", [*flags, "--data.state_key", "observation.stat"])
    with pytest.raises(ValueError, match="training has no column 'observation.stat'; set state_key"):
        RunData(config, starting_config(config))


def test_actions_of_one_dataset_at_two_rates_are_refused(folder):
    sources = ", ".join(
        f"{{path: {folder / 'training'}, frame_stride: {stride}, strided_commands: last}}"
        for stride in (1, 2)
    )
    config = load_config(folder / "tiny.yaml", [f"--data.datasets=[{sources}]", "--data.frame_cache", "off"])
    with pytest.raises(ValueError, match="differ in steps per second: .*training 20, .*training 10"):
        RunData(config, starting_config(config))


def test_datasets_of_one_name_have_metrics_of_their_own(folder, tmp_path):
    for place in ("a/arm", "b/arm", "c/arm-1"):
        shutil.copytree(folder / "training", tmp_path / place)
    paths = [str(tmp_path / place) for place in ("a/arm", "b/arm", "c/arm-1")]
    sources = json.dumps([{"path": path} for path in paths])
    config = load_config(folder / "tiny.yaml", ["--data.datasets", sources, "--data.frame_cache", "off"])
    assert RunData(config, starting_config(config)).names == ["arm-0", "arm-1-1", "arm-1"]


def test_a_validation_dataset_that_changed_between_sessions_is_refused(folder, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    held_out = shutil.copytree(folder / "validation", tmp_path / "held_out")
    flags = ["--dataset", str(folder / "training"), "--data.validation", str(held_out)]
    config = load_config(folder / "tiny.yaml", [*flags, "--output", str(tmp_path / "run")])
    describe_run_folder(config, open_datasets(config))
    assert check_run_folder(config, open_datasets(config), resume=True) is None
    assert [bool(one.get("validation")) for one in read_known_data(tmp_path / "run")] == [False, True]
    statistics = held_out / "meta" / "stats.json"
    statistics.write_text(statistics.read_text().replace("1", "2"))
    with pytest.raises(ValueError, match="trained on other data than .*held_out has now"):
        check_run_folder(config, open_datasets(config), resume=True)
    (known, _) = read_known_data(tmp_path / "run")
    (tmp_path / "run" / "datasets.json").write_text(json.dumps([known]))  # as older versions wrote it
    assert check_run_folder(config, open_datasets(config), resume=True) is None


# Datasets of the Hub


@pytest.fixture
def branch(folder, tmp_path, monkeypatch):
    """A Hub with one dataset `you/demos`, of two commits; the branch `main` is at the first of the list."""
    commits = [letter * 40 for letter in "ab"]
    for commit, name in zip(commits, ("training", "validation"), strict=True):
        shutil.copytree(folder / name, tmp_path / "hub" / commit)

    def snapshot_download(repo_id, allow_patterns, revision, **_):
        commit = commits[0] if revision == "main" else revision
        if not (tmp_path / "hub" / commit).is_dir():
            response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
            raise RevisionNotFoundError("no such revision", response=response)
        return str(tmp_path / "hub" / commit)

    monkeypatch.setattr(hub_download, "snapshot_download", snapshot_download)
    monkeypatch.setattr(dataset_rows, "HF_LEROBOT_HOME", tmp_path / "lerobot")
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    return commits


def test_a_run_continues_at_the_commit_of_its_data_when_their_branch_has_moved(
    folder, tmp_path, branch, monkeypatch
):
    begun, moved = branch
    flags = ["--model.objectives", "[progress]", "--train.steps", "2", "--train.warmup_steps", "0"]
    flags += ["--data.val_fraction", "0"]
    config, output = folder / "tiny.yaml", tmp_path / "run"
    assert run(config, "you/demos", output, *flags, "--train.max_hours", "0") == 0
    branch.reverse()
    with pytest.raises(ValueError, match=f"demos was at commit {begun}: give OWNER/NAME@COMMIT"):
        run(config, f"you/demos@{moved}", output, *flags, resume=True)
    for name in ("you/demos", f"you/demos@{begun}"):
        (output / "summary.json").unlink(missing_ok=True)
        assert run(config, name, output, *flags, resume=True) == 0
        (described,) = json.loads((output / "summary.json").read_text())["datasets"]
        assert (described["name"], described["commit"]) == ("you/demos", begun)


# Streamed runs

IN_FILES = {"episodes": 12, "frames": 6, "cameras": ("front", "side"), "size": (32, 40), "depth": False}
STREAMED = ("--data.streaming", "true", "--data.streaming_disk_gb", "0.0006", "--data.val_fraction", "0.1")
STREAMED += ("--model.objectives", "[action, flow, progress]", "--train.val_every", "8")
STREAMED += ("--train.steps", "20")


@pytest.fixture
def in_files(tmp_path, monkeypatch):
    """A folder with a dataset of files of each episode, and what `train.py` takes."""
    monkeypatch.setenv("FORESIGHT_CACHE", str(tmp_path / "cache"))
    make_dataset(tmp_path / "source", **IN_FILES, file_per_episode=True)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def run_streamed(folder, output, *flags, resume=False):
    return run(folder / "tiny.yaml", folder / "source", folder / output, *STREAMED, *flags, resume=resume)


def assert_same_weights(folder, *outputs):
    one, other = (load_file(folder / output / "model" / "model.safetensors") for output in outputs)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow  # two trainings
def test_a_streamed_run_that_loses_a_file_saves_and_continues_as_if_it_never_had(in_files, monkeypatch):
    assert run_streamed(in_files, "whole") == 0
    shutil.rmtree(in_files / "cache")
    videos, read_step = in_files / "source" / "videos", loop.read_step

    def lose_the_source(run, batches, step):
        if step == 3:
            videos.rename(in_files / "lost")
        return read_step(run, batches, step)

    monkeypatch.setattr(loop, "read_step", lose_the_source)
    with pytest.raises(ValueError, match=r"videos/.* has vanished from .* checkpoint of step \d+ is saved"):
        run_streamed(in_files, "broken")
    monkeypatch.undo()
    monkeypatch.setenv("FORESIGHT_CACHE", str(in_files / "cache"))
    (in_files / "lost").rename(videos)
    (step,) = [path.name for path in (in_files / "broken" / "checkpoints").iterdir()][-1:]
    assert step > "step-0000003"
    assert run_streamed(in_files, "broken", resume=True) == 0
    assert_same_weights(in_files, "whole", "broken")
    streamed = in_files / "cache" / "streams"
    assert 0 < sum(size for _, size, _ in FileStore(streamed, 1)._scan()) <= 600_000
    with pytest.raises(ValueError, match="streaming_disk_gb"):
        run_streamed(in_files, "broken", "--data.streaming_disk_gb", "0.001", resume=True)


@pytest.mark.slow  # two processes, and two more that load data
def test_ranks_and_loader_processes_share_the_files_of_a_machine(in_files):
    calm = ["--model.objectives", "[progress]"]
    for dropout in ("embd_pdrop", "attention_dropout", "resid_pdrop"):  # its draws differ between processes
        calm += [f"--model.{dropout}", "0.0"]
    assert run_streamed(in_files, "one", *calm) == 0
    assert run_streamed(in_files, "loaders", *calm, "--data.num_workers", "2") == 0
    assert_same_weights(in_files, "one", "loaders")
    run_ranks(run_two, in_files, calm)
    one, two = (
        [line["progress"] for line in log_lines(in_files / output) if "step_s" in line]
        for output in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)


def run_two(rank, folder, flags):
    assert run_streamed(folder, "two", *flags) == 0
