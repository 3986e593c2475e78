"""What the policy is trained on are windows of `training.windows`; LeRobot's own items stay as they are."""

import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy
from lerobot.transforms.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from datasets_scripts.storage import dataset_rows
from lerobot_policy_foresight import LeRobotForesightConfig, window_reading
from lerobot_policy_foresight.window_reading import WindowReader
from modeling_foresight.lora import lora_config
from tests.lerobot_policy_foresight.miniature import small_model
from tests.ranks import run_ranks
from tests.synthetic import make_dataset
from training.windows import ForesightWindows, WindowConfig, collate_windows

LENGTHS = [6, 5, 8]
T, K, L = 4, 4, 4  # of the miniature
MAIN, WRIST = "observation.images.main", "observation.images.wrist"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One point and a padding one, so that no draw decides which is followed."""
    settings = {"cameras": {"main": (32, 40), "wrist": (16, 24)}, "n_points": 2, "n_padding": 1}
    return make_dataset(tmp_path_factory.mktemp("videos") / "ds", frames=LENGTHS, **settings).root


def config(**options) -> LeRobotForesightConfig:
    return LeRobotForesightConfig(device="cpu", cameras={"main": MAIN}, **small_model(**options))


def opened(root, **settings) -> LeRobotDataset:
    """The dataset as `lerobot-train` opens it."""
    meta = LeRobotDatasetMetadata("local/synthetic", root=root)
    deltas = resolve_delta_timestamps(config(), meta)
    return LeRobotDataset(
        "local/synthetic", root=root, delta_timestamps=deltas, return_uint8=True, **settings
    )


def policy_for(dataset, **options):
    """A policy that sees one of the two cameras."""
    return make_policy(config(**options), ds_meta=dataset.meta)


def loaded(dataset, places, **settings) -> dict:
    return next(iter(DataLoader(dataset, len(places), sampler=places, **settings)))


def windows_of(policy, root) -> ForesightWindows:
    model = policy.model.config
    return ForesightWindows(
        root,
        WindowConfig(
            views=["main"],
            history_length=model.history_length,
            future_shift=model.future_shift,
            lookahead=model.future_targets == "lookahead",
            chunk_size=model.chunk_size,
            flow_length=model.flow_length,
            flow_grid=tuple(model.flow_grid),
            objectives=list(model.objectives),
        ),
    )


def assert_same_windows(given: dict, windows: ForesightWindows, rows: list[tuple[int, int]]) -> None:
    """A raw batch against windows of `training.windows` by episode and first frame."""
    expected = collate_windows([windows.read(*row, np.random.default_rng(0)) for row in rows])
    assert set(given) >= {"images", "depth", "state", "actions", "track", "frame_mask", "progress"}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
        elif isinstance(value, dict):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        else:
            assert value == expected[name]


# Places of frames in the dataset -> episode and first frame of their windows: the first frame of an episode,
# the last of one that holds a single window, the middle and the end of a longer one.
WINDOWS = {0: (0, 0), 10: (1, 6), 16: (2, 13), 18: (2, 14)}


SPAWNED = pytest.param({"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "multiprocessing_context": "fork"}, SPAWNED])
def test_a_data_loader_reads_the_windows_of_the_trainer(videos, workers):
    dataset = opened(videos)
    policy = policy_for(dataset)
    batch = loaded(dataset, list(WINDOWS), **workers)
    assert batch["index"].tolist() == list(WINDOWS) and batch["episode_index"].tolist() == [0, 1, 2, 2]
    assert not {MAIN, WRIST, "action"} & set(batch)
    assert_same_windows(policy.windows.read_batch(batch), windows_of(policy, videos), list(WINDOWS.values()))


def test_a_dataset_that_was_pickled_for_a_worker_is_read_as_windows(videos):
    dataset = opened(videos)
    policy = policy_for(dataset)
    loaded(dataset, [0])  # files are open
    batch = loaded(pickle.loads(pickle.dumps(dataset)), list(WINDOWS))
    assert_same_windows(policy.windows.read_batch(batch), windows_of(policy, videos), list(WINDOWS.values()))


def test_chosen_episodes_are_counted_as_lerobot_does(videos):
    dataset, stock = (opened(videos, episodes=[0, 2]) for _ in range(2))
    policy_for(dataset)
    batch = loaded(dataset, [5, 6, 13])
    for name in ("index", "episode_index", "frame_index", "task_index", "timestamp"):
        theirs = torch.stack([stock[place][name] for place in (5, 6, 13)])
        assert batch[name].dtype == theirs.dtype
        torch.testing.assert_close(batch[name], theirs)
    assert batch["task"] == [stock[place]["task"] for place in (5, 6, 13)]


def test_frames_that_no_loader_read_as_windows_are_read_by_their_number(videos):
    """As those of held-out episodes, whose dataset has other metadata."""
    dataset, held_out = opened(videos), opened(videos)
    policy = policy_for(dataset)
    batch = default_collate([held_out[place] for place in WINDOWS])
    assert MAIN in batch
    assert_same_windows(policy.windows.read_batch(batch), windows_of(policy, videos), list(WINDOWS.values()))


def test_image_transforms_reach_the_pictures_of_a_window_and_nothing_else(videos):
    settings = ImageTransformsConfig(enable=True, max_num_transforms=1)
    settings.tfs = {"invert": ImageTransformConfig(type="RandomInvert", kwargs={"p": 1.0})}
    plain, inverted = opened(videos), opened(videos, image_transforms=ImageTransforms(settings))
    policies = [policy_for(dataset) for dataset in (plain, inverted)]
    one, other = (
        policy.windows.read_batch(loaded(dataset, [4, 16]))
        for policy, dataset in zip(policies, (plain, inverted), strict=True)
    )
    torch.testing.assert_close(other["images"]["main"], 255 - one["images"]["main"])
    assert other["images"]["main"].dtype == torch.uint8 and other["images"]["main"].any()
    torch.testing.assert_close(other["depth"], one["depth"])


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (ImageTransforms(ImageTransformsConfig(enable=True)), "RandomAffine"),  # LeRobot's defaults
        (v2.Compose([v2.ColorJitter(), v2.RandomApply([v2.RandomHorizontalFlip()])]), "RandomHorizontalFlip"),
        (lambda frames: frames.flip(-1), "function"),
    ],
    ids=["defaults", "nested", "unknown"],
)
def test_transforms_that_would_leave_labels_behind_are_refused_by_name(videos, transform, name):
    dataset = opened(videos, image_transforms=transform)
    policy = policy_for(dataset)
    with pytest.raises(ValueError, match=f"{name} may move pictures"):
        loaded(dataset, [4])
    policy_for(dataset, objectives=["action"])
    assert policy and loaded(dataset, [4])  # without labels nothing is left behind


def test_only_the_dataset_of_the_policy_is_read_as_windows(videos):
    dataset, other = opened(videos), opened(videos)
    policy_for(dataset)
    assert MAIN in dataset[2] and MAIN in loaded(other, [2])  # somebody looks at frames
    assert set(dataset[2]) == set(other[2])
    assert "observation.foresight.frame_mask" in loaded(dataset, [2])


def test_under_a_rename_map_pictures_travel_under_the_datasets_names(videos):
    dataset = opened(videos)
    model = policy_for(dataset).model.config
    reader = WindowReader(dataset.meta, {"main": "observation.images.front"}, model, "auto")
    reader.attach()
    batch = loaded(dataset, [4, 16])
    assert {MAIN, WRIST} <= set(batch)
    batch["observation.images.front"] = batch.pop(MAIN) / 255  # LeRobot renames, and hands over [0, 1]
    raw = reader.read_batch(batch)
    assert list(raw["images"]) == ["main"] and raw["images"]["main"].dtype == torch.uint8
    expected = windows_of(policy_for(opened(videos)), videos).read(0, 1, np.random.default_rng(0))
    torch.testing.assert_close(raw["images"]["main"][0], expected["images"]["main"])
    torch.testing.assert_close(raw["actions"][0], expected["actions"])
    with pytest.raises(ValueError, match="lacks .'observation.images.front'"):
        reader.read_batch(loaded(dataset, [4]))
    with pytest.raises(ValueError, match="name the cameras with --policy.cameras"):
        reader.read_batch(default_collate([dataset[4]]))


@pytest.fixture
def downloaded(videos, tmp_path):
    """The dataset as LeRobot downloads it for `--dataset.episodes=[0]`."""
    root = shutil.copytree(videos, tmp_path / "ds")
    path = next((root / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, LENGTHS[0]), path)
    return root


def test_a_dataset_of_which_only_some_files_are_here_is_refused_with_the_remedy(downloaded):
    dataset = opened(downloaded, episodes=[0])
    policy_for(dataset)
    with pytest.raises(ValueError, match="incomplete.*hf download local/synthetic"):
        loaded(dataset, [2])


def test_chosen_episodes_of_a_partly_downloaded_dataset_are_read_from_the_hub(
    videos, downloaded, monkeypatch
):
    asked = []

    def from_hub(name, videos_too):
        asked.append((name, videos_too))
        return videos, None

    dataset = opened(downloaded, episodes=[0])
    policy = policy_for(dataset)
    find = dataset_rows.find_dataset
    monkeypatch.setattr(
        dataset_rows, "find_dataset", lambda name, videos: (from_hub if "@" in name else find)(name, videos)
    )
    monkeypatch.setattr(window_reading, "HF_LEROBOT_HUB_CACHE", downloaded.parent)
    batch = loaded(dataset, [0, 5])
    assert_same_windows(policy.windows.read_batch(batch), windows_of(policy, videos), [(0, 0), (0, 1)])
    assert asked == [(f"local/synthetic@{downloaded.name}", False)]  # the folder of a commit


def test_a_dataset_in_which_nothing_can_be_trained_is_refused_before_the_first_step(videos):
    meta = opened(videos).meta
    for key in ("observation.depth.main", "observation.depth.wrist", "observation.points.main"):
        del meta.features[key]
    options = {**small_model(objectives=["depth", "flow"]), "cameras": {"main": MAIN}}
    with pytest.raises(ValueError, match="nothing to train.*depth .*flow .no observation.points.main"):
        make_policy(LeRobotForesightConfig(device="cpu", **options), ds_meta=meta)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_frames(videos):
    dataset = opened(videos)
    policy = policy_for(dataset)
    batch = loaded(dataset, [4, 16])
    batch["observation.foresight.actions"][1, 0, 0] = float("nan")
    policy.eval()
    assert not policy.forward(batch)[0].isfinite()
    policy.train()
    with pytest.raises(ValueError, match="not finite.*action_loss nan.*episode 0 frame 4, episode 2 frame 1"):
        policy.forward(batch)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_weights_that_an_update_broke_are_not_saved_and_the_frames_before_it_named(
    videos, tmp_path, with_adapter
):
    dataset = opened(videos)
    policy = policy_for(dataset).train()
    policy.forward(loaded(dataset, [4, 16]))
    saved = get_peft_model(policy, lora_config(policy.model)) if with_adapter else policy
    with torch.no_grad():
        next(p for p in saved.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite.*after .*episode 0 frame 4.* earlier checkpoints are"):
        saved.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def gradients(root, places: list[int], unsupervised: list[int]) -> dict[str, torch.Tensor]:
    """Of a policy of fixed weights that learns depth, on frames of which some have no depth."""
    dataset = opened(root)
    options = {**small_model(objectives=["action", "depth"]), "cameras": {"main": MAIN}}
    torch.manual_seed(0)
    policy = make_policy(LeRobotForesightConfig(device="cpu", **options), ds_meta=dataset.meta).train()
    batch = loaded(dataset, places)
    batch["observation.foresight.action_mask"][:] = False
    for place in unsupervised:
        batch["observation.foresight.depth.main"][places.index(place)] = 0
    policy.forward(batch)[0].backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None and "depth" in name}


def run_rank(rank: int, root, folder) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    places = [[4, 16], [0, 10]][rank]
    found = gradients(root, places, unsupervised=[16] if rank == 0 else places)
    save_file({name: grad.contiguous() for name, grad in found.items()}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_one_mean_also_if_one_has_nothing_to_supervise(videos, tmp_path):
    run_ranks(run_rank, videos, tmp_path)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    whole = gradients(videos, [4, 16, 0, 10], unsupervised=[16, 0, 10])
    assert set(whole) == set(ranks[0]) and any(grad.any() for grad in whole.values())
    largest = max(float(grad.abs().max()) for grad in whole.values())
    for name, grad in whole.items():
        averaged = (ranks[0][name] + ranks[1].get(name, torch.zeros_like(grad))) / 2
        torch.testing.assert_close(averaged, grad, rtol=1e-4, atol=1e-3 * largest)
