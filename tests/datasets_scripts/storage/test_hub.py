"""Datasets of the Hub are read file by file, and finished ones are pushed: with a stand-in, and over HTTP.

The tests over HTTP are skipped without the server of `tests/hub_server.py`.
"""

import pickle
import shutil
import sys

import httpx
import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import get_session
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from datasets_scripts.annotate import main as annotate
from datasets_scripts.annotation.job import AnnotationJob, make_shards, merge, open_job
from datasets_scripts.annotation.push import check_push, push_dataset
from datasets_scripts.annotation.settings import Annotation
from datasets_scripts.inspect_dataset import main
from datasets_scripts.storage import dataset_rows as dataset_rows
from datasets_scripts.storage.dataset_rows import DatasetRows
from datasets_scripts.storage.hub import download as hub_source
from datasets_scripts.storage.hub import upload as hub_upload
from datasets_scripts.storage.hub.download import HubError, explain_hub_errors, is_hub_id
from datasets_scripts.storage.provenance import read_provenance
from datasets_scripts.storage.videos.frame_decoding import FrameDecoder
from tests.hub_server import running_hub
from tests.synthetic import make_dataset

MAIN = "videos/observation.images.main/chunk-000/file-000.mp4"
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("hub") / "data", frames=[3, 4], size=(48, 64), tracks=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """LeRobot's cache, empty."""
    monkeypatch.setattr(hub_source, "HF_LEROBOT_HUB_CACHE", tmp_path / "cache")
    monkeypatch.setattr(dataset_rows, "HF_LEROBOT_HOME", tmp_path / "lerobot")
    return tmp_path / "cache"


@pytest.fixture
def stand_in(recorded, cache, monkeypatch):
    """A Hub with one dataset `you/data`, on its main branch only; gives the list of files it handed out."""
    handed_out = []

    def copy(path):
        target = cache / COMMIT / path.relative_to(recorded.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        handed_out.append(path.relative_to(recorded.root).as_posix())

    def snapshot_download(repo_id, allow_patterns, revision, **_):
        if revision not in ("main", COMMIT):
            response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
            raise RevisionNotFoundError("no such revision", response=response)
        folders = {pattern.split("/")[0] for pattern in allow_patterns}
        for path in sorted(recorded.root.rglob("*.*")):
            if path.is_file() and path.relative_to(recorded.root).parts[0] in folders:
                copy(path)
        return str(cache / COMMIT)

    monkeypatch.setattr(hub_source, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        hub_source, "hf_hub_download", lambda repo_id, place, **_: copy(recorded.root / place)
    )
    return handed_out


@pytest.fixture
def server(cache, monkeypatch):
    """A Hub on this machine, as its client sees it."""
    with running_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def published(recorded, server):
    """The dataset on the server."""
    check_push("tester/data", recorded.root)
    push_dataset(recorded.root, "tester/data")
    return "tester/data"


def videos(rows) -> list[str]:
    return sorted(path.relative_to(rows.root).as_posix() for path in rows.root.rglob("*.mp4"))


def test_a_dataset_of_the_hub_is_inspected_and_not_changed(recorded, stand_in, capsys):
    assert main(["you/data", "--episode", "0"]) == 0
    assert "camera main: 64 x 48" in capsys.readouterr().out
    assert main(["you/data", "--write-flags"]) == 1
    assert "you/data is on the Hub: download it first" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--public"]])
def test_an_annotated_dataset_is_private_on_the_hub_unless_told_otherwise(
    recorded, server, tmp_path, capsys, options
):
    work = [f"--dataset={recorded.root}", f"--output={tmp_path / 'data'}", "--n-points=8", "--workers=1"]
    assert annotate([*work, "--push-to-hub=tester/data", *options]) == 0
    assert HfApi().dataset_info("tester/data").private is not bool(options)
    HfApi().create_repo("tester/open", repo_type="dataset", private=False)
    again = annotate([*work, "--push-to-hub=tester/open", *options])
    if options:
        assert again == 0 and not HfApi().dataset_info("tester/open").private
    else:
        assert again == 1 and "tester/open is public: add --public" in capsys.readouterr().err
        assert not [
            file for file in HfApi().list_repo_files("tester/open", repo_type="dataset") if "/" in file
        ]


def test_a_streamed_dataset_downloads_the_video_that_is_decoded_and_no_other(recorded, stand_in):
    rows = DatasetRows("you/data", stream=True)
    assert len(rows) == 7 and not videos(rows)
    ours, theirs = (
        FrameDecoder(opened, "observation.images.main").decode(range(3, 5))
        for opened in (rows, DatasetRows(recorded.root))
    )
    assert np.array_equal(ours, theirs)
    assert videos(rows) == [MAIN]


@pytest.mark.parametrize(
    "name",
    ["name", "./owner/name", "../name", "~/name", "/name", "owner/name/", "a/b/c", "my data/set", ""],
)
def test_only_owner_and_name_are_asked_of_the_hub(name):
    assert is_hub_id("owner/na-me_1.0")
    assert not is_hub_id(name)


def test_errors_of_the_http_library_that_the_client_uses_are_explained():
    """It is httpx in huggingface_hub 1, httpx2 in huggingface_hub 2."""
    library = sys.modules[type(get_session()).__mro__[-2].__module__.partition(".")[0]]
    with pytest.raises(HubError, match="cannot be reached"), explain_hub_errors("you/data"):
        raise library.ConnectError("no route to host")


def test_a_worker_process_continues_with_the_same_commit(stand_in):
    rows = pickle.loads(pickle.dumps(DatasetRows("you/data", stream=True)))
    assert rows.hub == hub_source.HubFiles("you/data", COMMIT)
    rows.fetch_videos([1])
    assert len(videos(rows)) == 4
    before = len(stand_in)
    rows.fetch_videos(range(rows.n_episodes))
    assert len(stand_in) == before  # what is there is not asked for again


def test_shards_need_the_videos_of_their_cameras_and_the_merge_all(stand_in, tmp_path):
    job = AnnotationJob("you/data", tmp_path / "output", Annotation(("main",), n_points=40))
    make_shards(job)
    wanted = ("videos/observation.depth.main", "videos/observation.images.main")
    assert all(place.startswith(wanted) for place in stand_in if place.endswith("mp4"))
    merge(job)
    assert len(list(job.output.rglob("*.mp4"))) == 4
    assert read_provenance(job.output)["annotation"]["parameters"]["revision"] == COMMIT


def test_an_unfinished_run_continues_when_its_commit_is_named(stand_in, tmp_path):
    """As is needed when the branch has moved on since."""
    first, later = (
        open_job(AnnotationJob(name, tmp_path / "output", Annotation(("main",)))).shards.parameters
        for name in ("you/data", f"you/data@{COMMIT}")
    )
    assert first == later and first["revision"] == COMMIT


def test_an_older_dataset_of_the_hub_is_named_with_what_converts_it(stand_in, cache, monkeypatch):
    download = hub_source.snapshot_download

    def older(*args, **options):
        root = download(*args, **options)
        info = cache / COMMIT / "meta" / "info.json"
        info.write_text(info.read_text().replace('"v3.0"', '"v2.1"'))
        return root

    monkeypatch.setattr(hub_source, "snapshot_download", older)
    with pytest.raises(ValueError, match="dataset you/data is .* 2.1, .* --repo-id=you/data") as caught:
        DatasetRows("you/data", stream=True)
    assert str(cache) not in str(caught.value)


def test_without_streaming_everything_is_there_at_once(stand_in):
    rows = DatasetRows("you/data")
    assert rows.hub is None and len(videos(rows)) == 4


def test_a_revision_that_is_asked_for_is_not_replaced_by_another(stand_in):
    with pytest.raises(ValueError, match="you/data has no such revision"):
        DatasetRows("you/data@v3.0", stream=True)


def test_what_is_recorded_on_this_machine_is_used_as_it_is(recorded, stand_in, tmp_path):
    shutil.copytree(recorded.root, tmp_path / "lerobot" / "you" / "data")
    assert DatasetRows("you/data", stream=True).root == tmp_path / "lerobot" / "you" / "data"
    assert not stand_in


def test_offline_without_the_dataset_says_what_forbids_it(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="you/data is not in the cache.*HF_HUB_OFFLINE forbids"):
        DatasetRows("you/data", stream=True)


def test_a_hub_that_does_not_answer_is_named_so(cache, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="cannot be reached for dataset you/data .*refused"):
        DatasetRows("you/data", stream=True)


def test_a_push_without_a_token_ends_before_the_work(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="needs a token that may write"):
        check_push("you/data", tmp_path)


def test_a_published_dataset_is_streamed_over_http(recorded, published, server):
    rows = DatasetRows(published, stream=True)
    assert not videos(rows)
    server.add_fault(kind="drop", match="GET /__cdn__/", bytes=1000)  # the connection breaks once
    FrameDecoder(rows, "observation.images.main").decode(range(0, 2))
    assert videos(rows) == [MAIN]
    rows.fetch_videos(range(rows.n_episodes))
    for path in recorded.root.rglob("*.mp4"):
        assert (rows.root / path.relative_to(recorded.root)).read_bytes() == path.read_bytes()


def test_the_stock_reader_finds_the_tag_of_what_was_pushed(recorded, published, cache, monkeypatch, tmp_path):
    push_dataset(recorded.root, published)  # once more: nothing to do, the tag stays
    tags = HfApi().list_repo_refs(published, repo_type="dataset").tags
    assert [tag.name for tag in tags] == ["v3.0"]
    assert len(LeRobotDataset(published, root=tmp_path / "again")) == 7


def test_a_finished_push_that_is_repeated_reads_its_files_once(recorded, published, monkeypatch):
    read, has_content = [], hub_upload._has_content

    def noted(known, path):
        read.append(path)
        return has_content(known, path)

    monkeypatch.setattr(hub_upload, "_has_content", noted)
    push_dataset(recorded.root, published)
    assert read and len(read) == len(set(read))


def test_files_of_another_dataset_are_not_mixed_with_ours(published, tmp_path):
    with pytest.raises(ValueError, match=r"holds files that are not of this dataset \(data/chunk-000"):
        check_push(published, tmp_path / "not-made-yet")


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_read", "HTTP 403"), ("hf_other", "HTTP 403"), ("hf_wrong", r"refuses the token .*HTTP 401")],
)
def test_rights_are_checked_before_the_work(token, message, published, recorded, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as caught:
        check_push(published, recorded.root)
    assert token not in str(caught.value)


def test_a_dataset_that_is_missing_on_the_hub_is_named(server):
    with pytest.raises(ValueError, match="has no dataset tester/none, or it is private"):
        DatasetRows("tester/none", stream=True)


def test_a_video_that_is_missing_on_the_hub_is_named(published):
    HfApi().delete_file(MAIN, published, repo_type="dataset")
    rows = DatasetRows(f"{published}@main", stream=True)
    with pytest.raises(ValueError, match=f"tester/data lacks the file {MAIN}"):
        FrameDecoder(rows, "observation.images.main").decode(range(0, 1))
