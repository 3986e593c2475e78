"""Publishing: what arrives, what is refused before anything is sent, and what a bad connection may not do.

The tests over HTTP are skipped without the server of `tests/hub_server.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import _http
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from peft import get_peft_model
from transformers import AutoModel

from datasets_scripts.storage.hub import upload as hub_upload
from hub_cards.build import main as build
from hub_cards.checks.sample import SAMPLE_FILE, write_sample
from hub_cards.publish import main
from modeling_foresight import ForesightForActionPrediction
from modeling_foresight.lora import lora_config
from tests.hub_cards.finished_run import latency, summary
from tests.hub_server import running_hub
from tests.modeling_foresight.test_hub_export import site_packages_without_this_project
from training.config import RunConfig
from training.config_reading import save_config
from training.models.adapters import describe_base, write_adapter
from training.models.model_folder import load_checkpoint

SAMPLE_DATA = Path(__file__).resolve().parents[3] / "hub_cards" / "sample_data" / "metaworld"
REPO = "org/policy"
COMMIT = f"POST /api/models/{REPO}/commit/"


@pytest.fixture(scope="module")
def built(built, tmp_path_factory):
    """A model's folder with its card and its sample; read only."""
    model = shutil.copytree(built, tmp_path_factory.mktemp("sampled") / "model")
    write_sample(model)
    return model


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, an empty cache, and a client that does not wait before it tries again."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_upload, "PAUSES_S", (0, 0, 0))
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", impatient)
    with running_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def unchecked(monkeypatch):
    """Folders are taken to be fit, for what concerns the connection alone."""
    monkeypatch.setattr("hub_cards.hub.publishing.check_folder", lambda folder: [])


def publish(folder, *options, repo_id=REPO):
    return main([str(folder), "--repo-id", repo_id, *options])


def commits(repo_id=REPO, repo_type="model"):
    """Of the main branch, newest first, without the one that makes the repository."""
    return HfApi().list_repo_commits(repo_id, repo_type=repo_type)[:-1]


def there(repo_id=REPO, **options):
    return set(HfApi().list_repo_files(repo_id, **options)) - {".gitattributes"}


def requests(hub, method, part):
    return [row for row in hub.log() if row["method"] == method and part in row["path"]]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Without a Hub


def test_a_dry_run_lists_what_would_be_sent_and_needs_no_hub(folder, capsys):
    (folder / SAMPLE_FILE).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert publish(folder, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "model org/policy, branch main: 13 files, " in out
    for name in ("model.safetensors", SAMPLE_FILE, "evaluation/eval.json", ".eval_results/metaworld.yaml"):
        assert f"B  {name}\n" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in folder.parent.glob(".*")] == []  # nothing is left beside it


def test_what_a_killed_run_left_is_removed_but_not_what_another_run_is_making(folder, unchecked):
    for name in (".publish-killed", ".publish-running"):
        (folder.parent / name / "evaluation").mkdir(parents=True)
    with FileLock(folder.parent / ".publish-running" / ".lock"):
        assert publish(folder, "--dry-run") == 0
        assert [path.name for path in folder.parent.glob(".*")] == [".publish-running"]


@pytest.mark.parametrize("place", ["notes.txt", "weights", ".eval_results/more.yaml"])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_listed(folder, tmp_path, capsys, place):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (folder / place).symlink_to(tmp_path / "private" / ("" if place == "weights" else "key"))
    assert publish(folder, "--dry-run") == 1
    captured = capsys.readouterr()
    assert f"error: {folder / place} leads out of its folder" in captured.err and not captured.out


def test_links_to_the_folder_itself_are_not_walked(folder, unchecked, capsys):
    for name in ("a", "b"):
        (folder / name).symlink_to(".")
    assert publish(folder, "--dry-run") == 0
    assert "13 files, " in capsys.readouterr().out


def test_a_folder_without_weights_is_refused_with_every_problem_on_a_line(folder, capsys):
    (folder / "model.safetensors").unlink()
    (folder / "notes.pkl").write_bytes(b"\x80\x04N.")
    assert publish(folder) == 1
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error: notes.pkl may run code when it is loaded (a pickle): save it as safetensors or JSON"
    ]
    (folder / "notes.pkl").unlink()
    assert publish(folder) == 1
    assert "error: model.safetensors is missing, the weights: export" in capsys.readouterr().err


def test_a_folder_that_cannot_take_the_code_is_refused_for_what_it_lacks(folder, capsys):
    (folder / "processor_config.json").unlink()
    assert publish(folder, "--code") == 1
    assert "error: processor_config.json is missing; nobody" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repo-id", "policy"], "--repo-id must be owner/name"),
        (["--repo-id", "org/a policy"], "--repo-id must be owner/name"),
        (["--repo-id", REPO], "HF_HUB_OFFLINE forbids publishing"),
        (["--repo-id", REPO, "--tag", "v 1"], "--tag 'v 1' is not a valid git name"),
        (["--repo-id", REPO, "--revision", "next.lock"], "--revision 'next.lock' is not a valid git name"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(built, capsys, options, message):
    assert main([str(built), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_named(tmp_path, capsys):
    assert publish(tmp_path) == 1
    assert f"{tmp_path} holds no adapter_config.json, config.json, meta/info.json" in capsys.readouterr().err


# Over HTTP


def test_everything_arrives_in_one_commit_in_a_private_repository(built, hub, capsys):
    assert publish(built, "--tag", "v1", "--pull") == 0
    (commit,) = commits()
    assert commit.title == "3D Foresight: Open a drawer"
    info = HfApi().model_info(REPO, revision="v1")
    assert (info.private, info.sha) == (True, commit.commit_id)
    ours = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert there() == ours
    card = ModelCard.load(REPO)
    assert (
        f'AutoModel.from_pretrained("{REPO}")' in card.text and card.data.eval_results[0].metric_value == 0.95
    )
    assert type(AutoModel.from_pretrained(REPO)) is ForesightForActionPrediction
    out = capsys.readouterr()
    assert f"published: {hub.endpoint}/{REPO}/commit/{commit.commit_id}" in out.out
    assert "downloaded and compared: 13 files" in out.out
    assert "hf_test" not in out.out + out.err


@pytest.mark.parametrize("written_for", ["hub_cards/models/tiny", "somebody/else"])
def test_every_example_of_the_card_loads_from_where_it_is_published(folder, hub, unchecked, written_for):
    assert build([str(folder), "--repo-id", written_for]) == 0
    assert publish(folder, "--code") == 0
    text = ModelCard.load(REPO).text
    assert written_for not in text and f"lora_custom.yaml --init_from {REPO} " in text
    assert text.count(f'from_pretrained("{REPO}", trust_remote_code=True)') == 2


def test_publishing_the_same_again_makes_no_commit(built, hub, unchecked):
    assert publish(built, "--tag", "v1") == 0 == publish(built, "--tag", "v1")
    assert len(commits()) == 1


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("lose_response", COMMIT),  # it was carried out, but nobody was told
        ("drop_before", COMMIT),
        ("short", COMMIT),  # half an answer
        ("lose_response", "POST /api/repos/create"),
        ("drop_upload", "PUT /__s3__/"),
        ("drop_before", "POST /api/validate-yaml"),
        ("drop_before", "/preupload/"),
        ("drop_before", "/tree/"),
        ("lose_response", "/tag/"),
    ],
)
def test_a_connection_that_fails_once_leaves_one_whole_commit(built, hub, unchecked, kind, match):
    hub.add_fault(kind=kind, match=match, bytes=10)
    assert publish(built, "--tag", "v1") == 0
    assert any(row.get("fault") for row in hub.log())
    (commit,) = commits()
    assert len(there()) == 13
    assert HfApi().model_info(REPO, revision="v1").sha == commit.commit_id


def test_a_hub_that_is_busy_is_given_the_time_that_it_asks_for(built, hub, unchecked, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(hub_upload, "time", SimpleNamespace(sleep=waited.append))
    hub.add_fault(kind="status", status=429, match=COMMIT, retry_after=7)
    hub.add_fault(kind="status", status=503, match=COMMIT, skip=1)
    assert publish(built) == 0
    assert waited == [7, 0]
    assert "the Hub answered HTTP 429; trying again in 7 s" in capsys.readouterr().err


def test_a_connection_that_stays_away_leaves_nothing_and_the_next_run_goes_on(built, hub, unchecked, capsys):
    hub.add_fault(kind="drop_before", match=COMMIT, times=-1)
    assert publish(built) == 1
    assert "check the connection and run the same command again" in capsys.readouterr().err
    assert commits() == [] and there() == set()
    hub.clear_faults()
    hub.clear_log()
    assert publish(built) == 0
    assert len(commits()) == 1
    assert requests(hub, "PUT", "/__s3__/") == []  # what had arrived is not sent again


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(built, hub, unchecked, monkeypatch, capsys):
    def somebody_commits(pause_s, error):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)

    monkeypatch.setattr(hub_upload, "_wait", somebody_commits)
    hub.add_fault(kind="drop_before", match=COMMIT)
    assert publish(built) == 1
    assert "somebody else committed to model org/policy meanwhile" in capsys.readouterr().err
    assert there() == {"notes.txt"}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "publishing needs a token that may write: log in"),
        ("hf_read", "may not do that with model org/policy (HTTP 403)"),
        ("hf_other", "may not do that with model org/policy (HTTP 403)"),
        ("hf_wrong", "(HTTP 401)"),
        ("hf_wr\xf6ng", "has characters that no token has"),
    ],
)
def test_without_rights_nothing_is_made(built, hub, unchecked, monkeypatch, tmp_path, capsys, token, message):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", token)
    assert publish(built) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert not token or token not in printed.out + printed.err
    assert hub.state() == [] and requests(hub, "PUT", "/__s3__/") == []


def test_the_name_of_a_dataset_is_not_taken_for_a_model(built, hub, unchecked, capsys):
    HfApi().create_repo(REPO, repo_type="dataset")
    assert publish(built) == 1
    assert "org/policy exists and is not a model" in capsys.readouterr().err


def test_metadata_that_the_hub_rejects_stops_before_there_is_a_repository(folder, hub, capsys):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlanguage: klingonese\n", 1))
    assert publish(folder) == 1
    assert "the Hub rejects the card's metadata: " in capsys.readouterr().err
    assert hub.state() == []


def test_what_is_private_becomes_public_only_on_demand_and_only_as_a_whole(built, hub, unchecked, capsys):
    hub.add_fault(kind="status", status=400, match=COMMIT)
    assert publish(built, "--public") == 1
    assert "refuses that with model org/policy (HTTP 400" in capsys.readouterr().err
    assert HfApi().model_info(REPO).private
    assert publish(built, "--public") == 0
    assert not HfApi().model_info(REPO).private
    assert publish(built) == 1
    assert "org/policy is public: add --public" in capsys.readouterr().err


def test_files_that_the_folder_does_not_hold_are_removed_on_demand_in_the_same_commit(
    folder, hub, unchecked, capsys
):
    assert publish(folder) == 0
    (folder / "rollout.mp4").unlink()
    card = folder / "README.md"
    card.write_text("\n".join(line for line in card.read_text().splitlines() if "rollout.mp4" not in line))
    assert publish(folder) == 1
    assert "org/policy holds files that this folder does not (rollout.mp4)" in capsys.readouterr().err
    assert publish(folder, "--replace") == 0
    assert "rollout.mp4" not in there() and len(commits()) == 2


def test_a_branch_and_a_tag_that_is_taken(folder, hub, unchecked, capsys):
    assert publish(folder, "--tag", "v1") == 0
    edit_json(folder / "evaluation" / "training.json", note="again")
    assert publish(folder, "--tag", "v1") == 1
    assert "tag v1 of org/policy names another commit" in capsys.readouterr().err
    assert publish(folder, "--revision", "next", "--tag", "v2") == 0
    refs = HfApi().list_repo_refs(REPO)
    branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
    assert tags["v1"] == branches["main"] != branches["next"] == tags["v2"]


def test_a_download_that_differs_by_a_bit_is_found(built, hub, capsys):
    hub.add_fault(kind="corrupt", match="GET /__cdn__/", offset=5000, skip=0)
    assert publish(built, "--pull") == 1
    assert ".safetensors does not come back from org/policy as it was sent" in capsys.readouterr().err


@pytest.fixture
def adapter(built, tmp_path):
    """A function: a finished run that adapted a base of that name."""

    def make(base):
        run, model = tmp_path / "lora", ForesightForActionPrediction.from_pretrained(built)
        facts, model.name_or_path = describe_base(model), base
        write_adapter(get_peft_model(model, lora_config(model, r=2)), run / "model", facts)
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(built / name, run / "model" / name)
        (run / "model" / "evaluation").mkdir()
        (run / "model" / "evaluation" / "latency.json").write_text(json.dumps(latency()))
        (run / "training").mkdir()
        save_config(RunConfig(init_from=str(built)), run / "training" / "config.yaml")
        facts = {"lora": {"r": 2}, "licenses": [{"part": "base", "name": base, "license": "apache-2.0"}]}
        (run / "training" / "summary.json").write_text(json.dumps(summary() | facts))
        (run / "foresight.png").write_bytes(b"a picture")
        assert build([str(run), "--open-loop"]) == 0
        return run / "model"

    return make


def test_an_adapter_of_a_folder_is_refused_with_what_to_do(adapter, built, capsys):
    assert publish(adapter(str(built))) == 1
    error = capsys.readouterr().err
    assert f"error: its base '{built}' is a folder of this machine: publish it (python hub_cards/" in error


def test_an_adapter_keeps_the_commit_of_its_base(adapter, built, hub):
    folder = adapter(str(built))
    assert publish(built, repo_id="org/base") == 0
    base = HfApi().model_info("org/base").sha
    edit_json(
        folder / "adapter_config.json", base_model_name_or_path="org/base"
    )  # as docs/publishing.md says
    assert build([str(folder)]) == 0
    assert publish(folder, "--pull") == 0
    HfApi().delete_file("model.safetensors", "org/base")  # the base moves on
    config = json.loads(Path(HfApi().hf_hub_download(REPO, "adapter_config.json")).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", base)
    card = ModelCard.load(REPO)
    assert f'AutoModel.from_pretrained("org/base", revision="{base}")' in card.text
    assert card.data.base_model == "org/base"
    model, _ = load_checkpoint(REPO)
    assert type(model) is ForesightForActionPrediction


def test_a_public_adapter_of_a_private_base_is_refused(adapter, built, hub, capsys):
    assert publish(built, repo_id="org/base") == 0
    assert publish(adapter("org/base"), "--public") == 1
    assert "base org/base is private: nobody could load the adapter" in capsys.readouterr().err


def test_a_dataset_arrives_with_the_tag_that_lerobot_opens(hub, tmp_path):
    assert publish(SAMPLE_DATA, "--pull", repo_id="org/data") == 0
    (commit,) = commits("org/data", "dataset")
    (tag,) = HfApi().list_repo_refs("org/data", repo_type="dataset").tags
    assert (tag.name, tag.target_commit) == ("v3.0", commit.commit_id)
    assert "org/data" in ModelCard.load("org/data", repo_type="dataset").text
    assert LeRobotDataset("org/data", root=tmp_path / "data").meta.total_episodes == 10


def test_code_is_for_models(capsys):
    assert publish(SAMPLE_DATA, "--code") == 1
    assert "--code is for models" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_with_its_code_acts_where_this_project_cannot_be_imported(built, hub, tmp_path):
    assert publish(built, "--code", "--pull", "--public") == 0
    (code,) = ModelCard.load(REPO).text.split("```python\n")[1].split("```")[:1]
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in code
    packages = site_packages_without_this_project(tmp_path / "packages")
    start = f"import sys; sys.path.append({str(packages)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{start}{code}\nassert actions.shape == (1, 4, 4)"],
        cwd=tmp_path,
        env=hub.env(home=tmp_path / "home", base={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
