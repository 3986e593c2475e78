"""The Space's page: its handlers in this process, and the page itself in a headless Chromium."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_foresight import ForesightForActionPrediction
from tests.tiny import tiny_config, tiny_processor

pytest.importorskip("gradio")
pytest.importorskip("plotly")
pytest.importorskip("matplotlib")
from hub_cards.space import app, episode_predictions
from hub_cards.space import page as page_module
from hub_cards.space.episode_predictions import name_episodes, open_dataset
from hub_cards.space.page import build_page, launch_options

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "hub_cards" / "sample_data" / "metaworld"
OTHER_WORDS = "Push and close a drawer"
# Software rendering of WebGL, for the scene in 3D.
CHROMIUM_FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENCE_MS = 120_000
POINT_OF_VIEW = "document.querySelector('#scene .plot')._fullLayout.scene.camera.eye"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model with every part that fits the sample dataset."""
    folder = tmp_path_factory.mktemp("space") / "model"
    torch.manual_seed(0)
    config = tiny_config(action_dim=4, binary_action_indices=(3,), state_dim=4, binary_state_indices=())
    model = ForesightForActionPrediction(config)
    model.save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def page_app(checkpoint):
    """The page; of every episode three moments are predicted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episode_predictions, "MAX_MOMENTS", 3)
        yield build_page(checkpoint, str(SAMPLE))


@pytest.fixture(scope="module")
def handlers(page_app):
    """The page's Python functions by name; what they give, by the name of its place on the page."""

    def call(name, *arguments):
        function = next(block.fn for block in page_app.fns.values() if block.name == name)
        given = function(*arguments)
        return {part.elem_id or type(part).__name__: value for part, value in given.items()}

    return call


def test_opening_fills_the_page_and_other_words_are_compared_with_the_recorded_ones(handlers, checkpoint):
    page = handlers("on_open", checkpoint, str(SAMPLE), "", "now")
    assert page["cameras"] == "main=main, wrist=wrist"
    assert "moments" in page["banner"] and "error" not in page["banner"]
    assert page["pictures"].count("<img") == 16 and '"data"' in page["scene"]
    assert page["episode"].value == 0 and len(page["episode"].choices) == 10
    shown = page["State"]
    other = handlers("on_words", shown, OTHER_WORDS, 3, "now")
    assert "next actions differ by" in other["banner"] and OTHER_WORDS in other["banner"]
    assert "recorded words" in other["actions"] and "recorded words" not in page["actions"]
    back = handlers("on_episode", other["State"], 1, "now")
    assert back["State"].instruction == ""  # another episode has words of its own
    assert back["words"].value == "Push and close a drawer"


def test_a_name_that_leads_nowhere_changes_nothing_but_the_message(handlers, checkpoint):
    for names, said in (
        (("nobody/<b>nothing</b>", str(SAMPLE)), "nobody/&lt;b&gt;nothing"),
        ((checkpoint, "no/such/thing"), "dataset no/such/thing is neither a folder nor a Hub id"),
    ):
        page = handlers("on_open", *names, "", "now")
        assert list(page) == ["banner"]
        assert 'role="alert"' in page["banner"] and said in page["banner"]


def test_the_command_names_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(app, "HERE", tmp_path / "space")
    assert app.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--checkpoint" in error


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Starts the command with a page that is only noted; what page and server are given."""

    def launch(*arguments):
        noted = {}
        page = SimpleNamespace(launch=lambda **options: noted.update(options))
        monkeypatch.setattr(
            "hub_cards.space.page.build_page",
            lambda *given: noted.update(checkpoint=given[0], folders=given[2]) or page,
        )
        assert app.main(list(arguments)) == 0
        return noted

    for name in ("SPACE_ID", "GRADIO_SERVER_NAME", "GRADIO_SHARE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    return launch


def test_the_page_listens_where_gradio_says_and_is_private_on_this_machine_alone(launched, monkeypatch):
    assert launched()["server_name"] is None and launched()["folders"] is None
    assert launched("--host", "localhost")["folders"] is None
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" not in os.environ
    assert launched("--host", "0.0.0.0")["server_name"] == "0.0.0.0"
    for name, value in {
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "SPACE_ID": "you/space",
        "GRADIO_SHARE": "True",
    }.items():
        with monkeypatch.context() as patch:
            patch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", raising=False)
            patch.setenv(name, value)
            noted = launched()
            assert noted["server_name"] is None and len(noted["folders"]) >= 3  # models, two samples
            assert os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"


def test_the_first_policy_is_one_that_fits_the_shipped_demonstrations(launched):
    assert Path(launched()["checkpoint"]).name == "3d-foresight-metaworld-tiny"  # others are of other robots


def test_the_token_is_for_what_the_owner_named(launched, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *names, **options: asked.append((names, options)) or "here",
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    noted = launched("--host=0.0.0.0", "--checkpoint=you/model", "--dataset=you/data@v1")
    assert noted["folders"] == {"you/model": "here", "you/data@v1": "here"}
    assert [(names[0], options["token"], options["revision"]) for names, options in asked] == [
        ("you/model", "secret", None),
        ("you/data", "secret", "v1"),
    ]


def test_what_the_shipped_policy_did_is_offered_with_its_outcome_and_that_policy(checkpoint):
    models, datasets = (
        app._find_shipped("models", "config.json"),
        app._find_shipped("sample_data", "meta/info.json"),
    )
    samples = [app._describe_sample(name, models) for name in datasets]
    titles = ["metaworld: demonstrations", "metaworld_policy: what the policy did itself"]
    assert [sample.title for sample in samples] == titles and samples[0].checkpoint is None
    page = build_page(checkpoint, datasets[0], None, samples)
    choose = next(block.fn for block in page.fns.values() if block.name == "on_sample")
    policy, dataset, cameras = choose(titles[1])
    assert Path(policy, "config.json").is_file() and policy in models and cameras == ""
    titles = [title for title, _ in name_episodes(open_dataset(dataset))]
    assert "the policy failed at step" in titles[0] and "the policy succeeded" in titles[-1]


@pytest.mark.slow
def test_clients_list_episodes_and_get_predictions_by_name(address, checkpoint):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    titles = client.predict(str(SAMPLE), api_name="/list_episodes")
    assert len(titles) == 10 and titles[1].startswith("1: Push and close a drawer")
    options = {"episode": 1, "instruction": OTHER_WORDS, "cameras": "wrist=none"}
    found = client.predict(checkpoint, str(SAMPLE), **options, api_name="/predict")
    assert (found["task"], found["views"]) == (OTHER_WORDS, ["main"])
    moments = len(found["frames"])
    assert [len(found["actions"][side]) for side in ("recorded", "predicted")] == [moments, moments]
    assert len(found["actions"]["predicted"][0]) == len(found["action_names"]) == 4
    assert len(found["progress"]["recorded"]) == moments
    with pytest.raises(Exception, match="has no episode 99"):
        client.predict(checkpoint, str(SAMPLE), episode=99, api_name="/predict")


def test_visitors_open_no_folder_of_the_machine(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(
        "hub_cards.space.page.predict_episode", lambda choice, *_: opened.append(choice) or 1 / 0
    )
    monkeypatch.setattr("hub_cards.space.page.HF_LEROBOT_HOME", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "you" / "recorded").mkdir(parents=True)
    page = build_page("mine", "you/data", {"mine": "folder", "you/data": "cache"})
    opening = next(block.fn for block in page.fns.values() if block.name == "on_open")
    for name in (
        str(SAMPLE),
        "~",
        "..",
        "you/recorded",
        "folder",
        "/etc/passwd",
        "",
        "a/../b",
        "\\x/y",
        "a/b/c",
    ):
        for names in ((name, "you/data"), ("mine", name)):
            (message,) = opening(*names, "", "now").values()
            assert "not an id of the Hub" in message
    assert not opened
    for names, found in {
        ("mine", "you/data"): ("folder", "cache"),
        ("a/b", "c/d@v1"): ("a/b", "c/d@v1"),
    }.items():
        with pytest.raises(ZeroDivisionError):
            opening(*names, "", "now")
        assert (opened[-1].checkpoint, opened[-1].dataset) == found


@pytest.mark.parametrize(
    ("sizes", "base", "message"),
    [
        ({"model.safetensors": 9_000}, None, "v/model has 0.0 GB; this page opens up to 8e-06 GB"),
        ({"adapter_config.json": 1}, "v/large", "v/large@main has 0.0 GB"),
        ({"adapter_config.json": 1}, "/srv/private", "not a model of the Hub: /srv/private"),
        ({"adapter_config.json": 1}, "v/model", "base of the adapter v/model@main is not a model of the Hub"),
        ({"adapter_config.json": 1}, "v/small", None),
    ],
)
def test_visitors_download_no_more_than_fits(monkeypatch, tmp_path, sizes, base, message):
    repos = {"v/model": sizes, "v/large": {"a": 9_000}, "v/small": {}}
    repos["v/data"] = {f"videos/{number}.mp4": 2_000 for number in range(9)}
    (tmp_path / "config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": "main"}))

    def info(name, **_):
        files = [SimpleNamespace(rfilename=file, size=size) for file, size in repos[name].items()]
        return SimpleNamespace(siblings=files, sha="1" * 40)

    monkeypatch.setattr(page_module, "LARGEST_DOWNLOAD", 8_000)
    monkeypatch.setattr(page_module.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(page_module, "HfApi", lambda: SimpleNamespace(repo_info=info))
    monkeypatch.setattr(page_module, "hf_hub_download", lambda *_, **__: tmp_path / "config.json")
    monkeypatch.setattr(page_module, "predict_episode", lambda *_: 1 / 0)
    opening = next(b.fn for b in build_page("", "", {}).fns.values() if b.name == "on_open")
    if message is None:
        with pytest.raises(ZeroDivisionError):
            opening("v/model", "v/data", "", "now")
    else:
        (said,) = opening("v/model", "v/data", "", "now").values()
        assert message in said


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(page_app):
    _, address, _ = page_app.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield address
    page_app.close()


@pytest.fixture
def page(browser, address):
    """The page with its first episode; fails at the end if it complained or asked another machine."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    complaints, outside = [], []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda answer: answer.status >= 400 and complaints.append(answer.url))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("http", "ws"))
            and not request.url.startswith(address)
            and outside.append(request.url)
        ),
    )
    page.goto(address)
    page.wait_for_selector("#pictures img", state="attached")
    page.wait_for_selector("#scene canvas", state="attached")
    page.wait_for_selector("#actions .main-svg", state="attached")
    yield page
    page.close()
    assert not complaints
    assert not outside


def sources(page) -> list[str]:
    return page.eval_on_selector_all("#pictures img", "images => images.map(image => image.src)")


def point_of_view(page) -> dict:
    return page.evaluate(POINT_OF_VIEW)


def drag(page, target: str) -> None:
    page.locator(target).scroll_into_view_if_needed()
    box = page.locator(target).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 20, steps=4)
    page.mouse.up()


@pytest.mark.slow
def test_scrubbing_changes_pictures_and_plots_and_keeps_the_point_of_view(page):
    before = sources(page)
    widths = page.eval_on_selector_all("#pictures img", "images => images.map(i => i.naturalWidth)")
    assert len(before) == 16 and min(widths) > 0
    frame = page.get_attribute("#pictures .moment", "data-frame")
    at_first = point_of_view(page)
    drag(page, "#scene .plot")
    page.wait_for_function(
        f"JSON.stringify({POINT_OF_VIEW}) !== '{json.dumps(at_first, separators=(',', ':'))}'"
    )
    turned = point_of_view(page)
    assert turned != at_first
    page.evaluate("window.scene_before = document.querySelector('#scene .plot').data")
    page.fill("#moment input[type=number]", "2")
    page.press("#moment input[type=number]", "Enter")
    page.wait_for_function(
        "frame => document.querySelector('#pictures .moment').dataset.frame !== frame", arg=frame
    )
    assert all(a != b for a, b in zip(before, sources(page), strict=True))
    shown = int(page.get_attribute("#pictures .moment", "data-frame"))
    page.wait_for_function(
        "frame => document.querySelector('#actions .plot').layout.shapes[0].x0 === frame", arg=shown
    )
    page.wait_for_function("document.querySelector('#scene .plot').data !== window.scene_before")
    assert point_of_view(page) == turned


@pytest.mark.slow
def test_another_instruction_is_predicted_and_compared(page):
    page.fill("#words input", OTHER_WORDS)
    page.press("#words input", "Enter")
    page.wait_for_selector("#banner >> text=next actions differ by", state="attached")
    names = page.evaluate("() => document.querySelector('#actions .plot').data.map(line => line.name)")
    assert "predicted, recorded words" in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("box", "name", "said"),
    [
        ("#checkpoint", "nobody/nothing", "checkpoint nobody/nothing cannot be loaded"),
        ("#dataset", "no/such/thing", "dataset no/such/thing is neither a folder nor a Hub id"),
    ],
)
def test_bad_ids_give_a_readable_message_and_the_pictures_stay(page, box, name, said):
    before = sources(page)
    page.fill(f"{box} textarea, {box} input", name)
    page.click("#open")
    page.wait_for_selector("#banner [role=alert]", state="attached")
    text = page.inner_text("#banner")
    assert said in text and "Traceback" not in text
    assert sources(page) == before
