"""The page of the Space: its layout, its handlers, and what connects the two."""

import contextlib
import dataclasses
import functools
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import plotly
from huggingface_hub import HfApi, constants, hf_hub_download
from lerobot.utils.constants import HF_LEROBOT_HOME

from datasets_scripts.storage.atomic import read_json
from datasets_scripts.storage.hub.download import HubError, explain_hub_errors
from hub_cards.space.episode_predictions import (
    Choice,
    EpisodeView,
    name_episodes,
    open_dataset,
    predict_episode,
)
from hub_cards.space.moment_pictures import render_moment
from hub_cards.space.plots import CLOUDS, draw_actions, draw_scene

__all__ = ["Sample", "build_page", "launch_options"]

TITLE = """# 3D Foresight
What a robot policy sees, the depth it estimates, what it expects to happen and what it does, beside what was
recorded."""
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
# Gradio's own Plot makes a new plot for every update, which would turn the scene back while scrubbing.
DRAW = """
const target = element.querySelector('.plot');
const draw = () => {
  if (!props.value) return;
  const figure = JSON.parse(props.value);
  Plotly.react(target, figure.data, figure.layout, {responsive: true, displayModeBar: false});
};
watch('value', draw);
draw();
"""
PUBLIC_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@[\w./-]+)?", re.ASCII)
LARGEST_DOWNLOAD = 8 * 10**9  # bytes of a repository that a visitor names
PLAY_PAUSE_S = 0.4
PROGRESS = gr.Progress()  # gradio shows it for the handlers that take it


class Sample(NamedTuple):
    """Episodes that the page offers for a choice.

    Attributes:
        title, dataset (`str`): What the choice says and opens.
        checkpoint (`str`, *optional*): Opened with it; otherwise the one that is shown stays.
    """

    title: str
    dataset: str
    checkpoint: str | None = None


def build_page(
    checkpoint: str,
    dataset: str,
    folders: Mapping[str, str] | None = None,
    samples: Sequence[Sample] = (),
) -> gr.Blocks:
    """The page, which opens with this checkpoint and this dataset (folders or Hub ids).

    With `folders`, name -> folder, visitors may open only these of this machine, and what is on the Hub.
    `samples` are offered for a choice.
    """
    return _Page(checkpoint, dataset, folders, samples).blocks


def launch_options() -> dict:
    """How the page looks, and the one file of this machine that it may read: plotly's script."""
    gr.set_static_paths([PLOTLY])
    return {
        "theme": gr.themes.Soft(primary_hue="orange", secondary_hue="blue").set(
            block_title_background_fill="none",
            block_title_text_color="*body_text_color",
            block_title_padding="0",
            block_title_text_size="*text_sm",
        ),
        "css_paths": Path(__file__).with_name("style.css"),
        "footer_links": [],
        "show_error": True,
        "ssr_mode": False,
    }


class _Page:
    """Parts of the page as attributes, and a method for every event."""

    def __init__(
        self, checkpoint: str, dataset: str, folders: Mapping[str, str] | None, samples: Sequence[Sample]
    ):
        self.folders, self.samples = folders, {sample.title: sample for sample in samples}
        with gr.Blocks(title="3D Foresight", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.Markdown(TITLE, elem_id="title")
            self._add_controls(checkpoint, dataset)
            self._add_screen()
            self._connect_events()
            gr.api(self.list_episodes, api_name="list_episodes")
            gr.api(self.predict, api_name="predict")

    def _add_controls(self, checkpoint: str, dataset: str) -> None:
        with gr.Row(equal_height=True):
            textbox = functools.partial(gr.Textbox, scale=3)
            self.checkpoint = textbox(checkpoint, label="Checkpoint: folder or Hub id", elem_id="checkpoint")
            self.dataset = textbox(dataset, label="LeRobot dataset: folder or Hub id", elem_id="dataset")
            example = "view=camera, ..."
            self.cameras = gr.Textbox(label="Cameras", placeholder=example, elem_id="cameras", scale=2)
            self.open = gr.Button("Open", variant="primary", elem_id="open", scale=1, min_width=90)
        shown = next((title for title, sample in self.samples.items() if sample.dataset == dataset), None)
        many = len(self.samples) > 1
        self.sample = gr.Radio(
            list(self.samples), value=shown, label="Shipped episodes", elem_id="sample", visible=many
        )
        self.banner = gr.HTML(elem_id="banner")
        with gr.Row(equal_height=True):
            self.episode = gr.Dropdown([], label="Episode", elem_id="episode", scale=2)
            label = "Instruction: choose, or write and press Enter"
            self.words = gr.Dropdown([], label=label, allow_custom_value=True, elem_id="words", scale=3)
            self.moment = gr.Slider(0, 1, 0, step=1, label="Moment", elem_id="moment", scale=4)
            self.play = gr.Button("▶ Play", elem_id="play", scale=1, min_width=90)

    def _add_screen(self) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=620):
                self.pictures = gr.HTML(elem_id="pictures")
            with gr.Column(scale=2, min_width=400):
                label = "Scene in 3D (drag to turn)"
                self.cloud = gr.Radio(list(CLOUDS), value=next(iter(CLOUDS)), label=label, elem_id="cloud")
                self.scene, self.actions = _add_plot("scene"), _add_plot("actions")
        self.shown = gr.State()
        self.timer = gr.Timer(PLAY_PAUSE_S, active=False)
        self.playing = gr.State(False)

    def _connect_events(self) -> None:
        screen = [self.pictures, self.scene, self.actions]
        page = [self.banner, self.shown, self.cameras, self.episode, self.words, self.moment, *screen]
        busy = {"show_progress": "minimal", "show_progress_on": self.banner}
        inputs = [self.checkpoint, self.dataset, self.cameras, self.cloud]
        opening = {"fn": self.on_open, "inputs": inputs, "outputs": page, **busy}
        submits = [box.submit for box in (self.checkpoint, self.dataset, self.cameras)]
        gr.on([self.open.click, *submits], **opening)
        self.blocks.load(**opening)
        chosen = [self.sample, [self.checkpoint, self.dataset, self.cameras]]
        self.sample.input(self.on_sample, *chosen, show_progress="hidden").then(**opening)
        # Another dataset has other cameras.
        typed = [self.checkpoint.input, self.dataset.input]
        gr.on(typed, lambda: "", None, self.cameras, show_progress="hidden")
        self.episode.input(self.on_episode, [self.shown, self.episode, self.cloud], page, **busy)
        self.words.input(self.on_words, [self.shown, self.words, self.moment, self.cloud], page, **busy)
        gr.on(
            [self.moment.change, self.cloud.change],
            self.on_scrub,
            [self.shown, self.moment, self.cloud],
            screen,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        pressed = [self.playing, self.play, self.timer]
        self.play.click(self.on_play, self.playing, pressed, show_progress="hidden")
        self.timer.tick(self.on_tick, [self.shown, self.moment], self.moment, show_progress="hidden")

    def on_open(self, checkpoint, dataset, cameras, cloud, progress=PROGRESS):
        try:
            names = self._find(checkpoint, "model"), self._find(dataset, "dataset")
            choice = Choice(*names, cameras=cameras.strip())
        except (ValueError, HubError) as error:
            return {self.banner: _format_message(str(error), error=True)}
        return self._show(choice, cloud, progress)

    def on_sample(self, title):
        sample = self.samples[title]
        return sample.checkpoint or gr.skip(), sample.dataset, ""  # another dataset has other cameras

    def list_episodes(self, dataset: str) -> list[str]:
        """Titles of a dataset's episodes, in order; the first has number 0."""
        with _told_to_clients():
            return [title for title, _ in name_episodes(open_dataset(self._find(dataset, "dataset")))]

    def predict(
        self, checkpoint: str, dataset: str, episode: int = 0, instruction: str = "", cameras: str = ""
    ) -> dict:
        """What a checkpoint predicts in an episode, moment by moment, beside what was recorded.

        Gives `task`, `notes`, `views`, `frames` `(M,)`, `action_names`; `actions` and `progress`, each with
        `recorded` and `predicted`: the next action of every moment in the dataset's units `(M, A)`, and the
        share that is done `(M,)`. What does not exist is null.
        """
        with _told_to_clients():
            names = self._find(checkpoint, "model"), self._find(dataset, "dataset")
            view = predict_episode(Choice(*names, int(episode), instruction.strip(), cameras.strip()))
        return {
            "task": view.task,
            "notes": view.notes,
            "views": list(view.predictions[0].views),
            "frames": [prediction.frame for prediction in view.predictions],
            "action_names": view.action_names if view.config.has("action") else [],
            "actions": _list_pairs([p.actions for p in view.predictions], lambda chunk: chunk[0].tolist()),
            "progress": _list_pairs([p.progress for p in view.predictions], float),
        }

    def _find(self, name: str, kind: str) -> str:
        """The folder or Hub id of what a visitor names.

        Raises:
            ValueError: If the page has visitors, and it is another folder of the machine, or too large.
            HubError: If the Hub cannot be reached.
        """
        name = name.strip()
        if self.folders is None:
            return name
        if name in self.folders:
            return self.folders[name]
        here = Path(name).expanduser().exists() or (HF_LEROBOT_HOME / name).exists()
        if here or not PUBLIC_ID.fullmatch(name):
            raise ValueError(f"{name[:80]} is not an id of the Hub: give owner/name, of a public repository")
        if not constants.HF_HUB_OFFLINE:
            _check_download(name, kind)
        return name

    def on_episode(self, shown, episode, cloud, progress=PROGRESS):
        if shown is not None and episode is not None:
            shown = dataclasses.replace(shown, episode=int(episode), instruction="")
        return self._show(shown, cloud, progress)

    def on_words(self, shown, words, moment, cloud, progress=PROGRESS):
        if shown is not None:
            shown = dataclasses.replace(shown, instruction=(words or "").strip())
        return self._show(shown, cloud, progress, moment)

    def on_scrub(self, shown, moment, cloud):
        return [gr.skip()] * 3 if shown is None else _draw(predict_episode(shown), moment, cloud)

    def on_play(self, playing):
        return not playing, gr.Button("▶ Play" if playing else "⏸ Pause"), gr.Timer(active=not playing)

    def on_tick(self, shown, moment):
        return 0 if shown is None else (int(moment) + 1) % len(predict_episode(shown).predictions)

    def _show(self, choice: Choice | None, cloud: str, progress: gr.Progress, moment: int | None = None):
        """The whole page for a choice; if that fails, the reason, above what is already shown."""
        if choice is None:
            return {self.banner: _format_message("Open a checkpoint and a dataset first.", error=True)}
        try:
            view = predict_episode(choice, lambda share: progress(share, desc="predicting the episode"))
            rows = open_dataset(choice.dataset)
        except (ValueError, RuntimeError, OSError) as error:
            return {self.banner: _format_message(str(error), error=True)}
        last = len(view.predictions) - 1
        moment = last // 2 if moment is None else min(int(moment), last)
        words = choice.instruction or view.task
        pictures, scene, actions = _draw(view, moment, cloud)
        return {
            self.banner: _format_message(_describe_episode(view)),
            self.shown: choice,
            self.cameras: ", ".join(f"{name}={camera or 'none'}" for name, camera in view.cameras.items()),
            self.episode: gr.Dropdown(name_episodes(rows), value=choice.episode),
            self.words: gr.Dropdown(list(dict.fromkeys([view.task, *rows.tasks, words])), value=words),
            self.moment: gr.Slider(0, max(1, last), moment, step=1),
            self.pictures: pictures,
            self.scene: scene,
            self.actions: actions,
        }


def _check_download(name: str, kind: str, is_base: bool = False) -> None:
    """Refuses a repository whose files, or those of an adapter's base, would fill the machine's disk.

    Raises:
        ValueError: Names both sizes, or the base that is not a model of the Hub.
        HubError: If the Hub cannot be reached.
    """
    repo_id, _, revision = name.partition("@")
    with explain_hub_errors(repo_id, kind):
        info = HfApi().repo_info(repo_id, repo_type=kind, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        videos = [size for file, size in sizes.items() if file.startswith("videos/")]  # one at a time
        if (size := sum(sizes.values()) - sum(videos) + max(videos, default=0)) > LARGEST_DOWNLOAD:
            raise ValueError(
                f"{name} has {size / 1e9:.1f} GB; this page opens up to {LARGEST_DOWNLOAD / 1e9:g} GB: run "
                "it on your machine (python hub_cards/space/app.py)"
            )
        if kind == "dataset" or "adapter_config.json" not in sizes:
            return
        config = read_json(Path(hf_hub_download(repo_id, "adapter_config.json", revision=info.sha)))
    config = config if isinstance(config, dict) else {}
    base = str(config.get("base_model_name_or_path"))
    if is_base or not PUBLIC_ID.fullmatch(base):
        raise ValueError(f"the base of the adapter {name} is not a model of the Hub: {base[:80]}")
    _check_download(base + (f"@{config['revision']}" if config.get("revision") else ""), kind, is_base=True)


def _draw(view: EpisodeView, moment: int, cloud: str) -> list[str]:
    """Pictures, scene and actions of a moment."""
    moment = min(int(moment), len(view.predictions) - 1)
    return [
        _render_moment(view.choice, moment),
        draw_scene(view, moment, cloud).to_json(),
        draw_actions(view, moment, _recorded_instruction(view)).to_json(),
    ]


@functools.lru_cache(maxsize=512)
def _render_moment(choice: Choice, moment: int) -> str:
    return render_moment(predict_episode(choice), moment)


def _add_plot(name: str) -> gr.HTML:
    """A place for a plotly figure, given as JSON."""
    return gr.HTML(
        html_template='<div class="plot"></div>',
        js_on_load=DRAW,
        head=f'<script src="gradio_api/file={PLOTLY}"></script>',
        elem_id=name,
    )


@contextlib.contextmanager
def _told_to_clients() -> Iterator[None]:
    """Sends what is wrong with a request to the client, in place of a traceback here."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, HubError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _list_pairs(pairs: Sequence[tuple | None], convert: Callable) -> dict[str, list | None]:
    """`recorded` and `predicted` values of all moments; `None` for a side that does not exist."""
    sides = {}
    for which, side in enumerate(("recorded", "predicted")):
        values = [None if pair is None or pair[which] is None else convert(pair[which]) for pair in pairs]
        sides[side] = None if None in values else values
    return sides


def _recorded_instruction(view: EpisodeView) -> EpisodeView | None:
    """The same episode with the recorded instruction; `None` if this one has it."""
    if view.choice.instruction in ("", view.task):
        return None
    return predict_episode(dataclasses.replace(view.choice, instruction=""))


def _describe_episode(view: EpisodeView) -> str:
    """What is shown, what is missing, and what another instruction changes."""
    frames = [prediction.frame for prediction in view.predictions]
    objectives = ", ".join(view.config.objectives)
    parts = [f"{len(frames)} moments, frames {frames[0]} to {frames[-1]}. Predicted: {objectives}."]
    usual = _recorded_instruction(view)
    if usual is not None and view.config.has("action"):
        ours, theirs = ([p.actions[1][0] for p in each.predictions] for each in (view, usual))
        change = sum(abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)) / len(ours)
        parts.append(
            f"Told “{view.choice.instruction}” rather than “{view.task}”, its next actions differ by "
            f"{change:.3g} on average over entries and moments."
        )
    return " ".join([*parts, *view.notes])


def _format_message(text: str, error: bool = False) -> str:
    kind, role = ("banner error", "alert") if error else ("banner", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'
