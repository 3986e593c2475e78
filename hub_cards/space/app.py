"""Look through a checkpoint's eyes: what it sees, expects and does in an episode, in the browser.

On this machine: `python hub_cards/space/app.py`, then open the address that it prints. As a Space of the Hub:
`README.md` beside this file says how. The page asks for nothing from outside: it works without internet.
"""

import argparse
import functools
import html
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
    import plotly

    from hub_cards.space.plots import CLOUDS, actions_figure, scene_figure
except ImportError as error:
    sys.exit(f"error: the Space needs {error.name}: pip install 'lerobot_policy_foresight[space,viz]'")
from hub_cards.space.episode import (
    Choice,
    EpisodeView,
    episode_choices,
    look,
    match_cameras,
    open_dataset,
)
from hub_cards.space.panels import moment_html

HERE = Path(__file__).resolve().parent
EXAMPLE = """examples:
  python hub_cards/space/app.py
  python hub_cards/space/app.py --checkpoint outputs/quickstart/model --dataset outputs/quickstart/dataset"""
TITLE = """# 3D Foresight
Look through a robot policy's eyes: what it sees, how far away it takes that to be, what it expects to happen,
and what it does about it, beside what was recorded."""
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
# Gradio's own Plot makes a new plot for every update, which would turn the scene back while one scrubs.
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
PLAY_PAUSE_S = 0.4
PROGRESS = gr.Progress()  # gradio shows it for the handlers that take it


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parse(arguments)
    try:
        checkpoint = args.checkpoint or _shipped("models", "config.json")
        dataset = args.dataset or _shipped("sample_data", "meta/info.json")
        app = build_app(checkpoint, dataset)
        app.launch(server_name=args.host, server_port=args.port, **launch_options())
    except (ValueError, RuntimeError, OSError, OverflowError) as error:  # the last for a port beyond 65535
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def launch_options() -> dict:
    """How the page looks, and what of this machine it may read: one script."""
    gr.set_static_paths([PLOTLY])
    return {
        "theme": gr.themes.Soft(primary_hue="orange", secondary_hue="blue").set(
            block_title_background_fill="none",
            block_title_text_color="*body_text_color",
            block_title_padding="0",
            block_title_text_size="*text_sm",
        ),
        "css_paths": HERE / "style.css",
        "footer_links": [],
        "show_error": True,
        "ssr_mode": False,
    }


def build_app(checkpoint: str, dataset: str) -> gr.Blocks:
    """The page.

    Args:
        checkpoint (`str`): Folder or Hub id that it opens with.
        dataset (`str`): Folder or Hub id that it opens with.
    """
    with gr.Blocks(title="3D Foresight", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown(TITLE, elem_id="title")
        with gr.Row(equal_height=True):
            checkpoint_box = gr.Textbox(
                checkpoint, label="Checkpoint: folder or Hub id", elem_id="checkpoint", scale=3
            )
            dataset_box = gr.Textbox(
                dataset, label="LeRobot dataset: folder or Hub id", elem_id="dataset", scale=3
            )
            cameras_box = gr.Textbox(
                label="Cameras", placeholder="view=camera, ...", elem_id="cameras", scale=2
            )
            open_button = gr.Button("Open", variant="primary", elem_id="open", scale=1, min_width=90)
        banner = gr.HTML(elem_id="banner")
        with gr.Row(equal_height=True):
            episode_box = gr.Dropdown([], label="Episode", elem_id="episode", scale=2)
            words_box = gr.Dropdown(
                [],
                label="Instruction: choose, or write and press Enter",
                allow_custom_value=True,
                elem_id="words",
                scale=3,
            )
            moment_slider = gr.Slider(0, 1, 0, step=1, label="Moment", elem_id="moment", scale=4)
            play_button = gr.Button("▶ Play", elem_id="play", scale=1, min_width=90)
        with gr.Row():
            with gr.Column(scale=3, min_width=620):
                pictures = gr.HTML(elem_id="pictures")
            with gr.Column(scale=2, min_width=400):
                cloud_box = gr.Radio(
                    list(CLOUDS),
                    value=next(iter(CLOUDS)),
                    label="Scene in 3D (drag to turn)",
                    elem_id="cloud",
                )
                scene = _plot("scene")
                actions = _plot("actions")
        shown = gr.State()
        timer = gr.Timer(PLAY_PAUSE_S, active=False)
        playing = gr.State(False)

        screen = [pictures, scene, actions]
        whole = [banner, shown, cameras_box, episode_box, words_box, moment_slider, *screen]

        def on_open(checkpoint, dataset, cameras, cloud, progress=PROGRESS):
            return show(Choice(checkpoint.strip(), dataset.strip(), cameras=cameras.strip()), cloud, progress)

        def on_episode(shown, episode, cloud, progress=PROGRESS):
            if shown is None or episode is None:
                return {banner: _message("Open a checkpoint and a dataset first.", error=True)}
            return show(
                Choice(shown.checkpoint, shown.dataset, int(episode), "", shown.cameras), cloud, progress
            )

        def on_words(shown, words, moment, cloud, progress=PROGRESS):
            if shown is None:
                return {banner: _message("Open a checkpoint and a dataset first.", error=True)}
            choice = Choice(
                shown.checkpoint, shown.dataset, shown.episode, (words or "").strip(), shown.cameras
            )
            return show(choice, cloud, progress, moment)

        def show(choice: Choice, cloud: str, progress: gr.Progress, moment: int | None = None) -> dict:
            """Everything on the page for a choice; if it cannot be had, the reason above what stays there."""
            try:
                view = look(choice, lambda share: progress(share, desc="predicting the episode"))
                rows = open_dataset(choice.dataset)
                cameras = match_cameras(view.config.views, rows.features, choice.cameras)
            except (ValueError, RuntimeError, OSError) as error:
                return {banner: _message(str(error), error=True)}
            last = len(view.predictions) - 1
            moment = last // 2 if moment is None else min(int(moment), last)
            words = choice.instruction or view.task
            return {
                banner: _message(_about(view)),
                shown: choice,
                cameras_box: ", ".join(f"{name}={camera or 'none'}" for name, camera in cameras.items()),
                episode_box: gr.Dropdown(episode_choices(rows), value=choice.episode),
                words_box: gr.Dropdown(list(dict.fromkeys([view.task, *rows.tasks, words])), value=words),
                moment_slider: gr.Slider(0, max(1, last), moment, step=1),
                **dict(zip(screen, draw(view, moment, cloud), strict=True)),
            }

        def draw(view: EpisodeView, moment: int, cloud: str) -> list[str]:
            moment = min(int(moment), len(view.predictions) - 1)
            return [
                _pictures(view.choice, moment),
                scene_figure(view, moment, cloud).to_json(),
                actions_figure(view, moment, _usual(view)).to_json(),
            ]

        def on_scrub(shown, moment, cloud):
            return [gr.skip()] * 3 if shown is None else draw(look(shown), moment, cloud)

        def on_play(playing):
            return not playing, gr.Button("▶ Play" if playing else "⏸ Pause"), gr.Timer(active=not playing)

        def on_tick(shown, moment):
            return 0 if shown is None else (int(moment) + 1) % len(look(shown).predictions)

        opening = {
            "fn": on_open,
            "inputs": [checkpoint_box, dataset_box, cameras_box, cloud_box],
            "outputs": whole,
        }
        busy = {"show_progress": "minimal", "show_progress_on": banner}
        gr.on(
            [open_button.click, checkpoint_box.submit, dataset_box.submit, cameras_box.submit],
            **opening,
            **busy,
        )
        app.load(**opening, **busy)
        # A camera of one dataset is none of the next one's.
        gr.on(
            [checkpoint_box.input, dataset_box.input], lambda: "", None, cameras_box, show_progress="hidden"
        )
        episode_box.input(on_episode, [shown, episode_box, cloud_box], whole, **busy)
        words_box.input(on_words, [shown, words_box, moment_slider, cloud_box], whole, **busy)
        gr.on(
            [moment_slider.change, cloud_box.change],
            on_scrub,
            [shown, moment_slider, cloud_box],
            screen,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        play_button.click(on_play, playing, [playing, play_button, timer], show_progress="hidden")
        timer.tick(on_tick, [shown, moment_slider], moment_slider, show_progress="hidden")
    return app


@functools.lru_cache(maxsize=512)
def _pictures(choice: Choice, moment: int) -> str:
    return moment_html(look(choice), moment)


def _plot(name: str) -> gr.HTML:
    """A place for a plotly figure, given as JSON."""
    return gr.HTML(
        html_template='<div class="plot"></div>',
        js_on_load=DRAW,
        head=f'<script src="gradio_api/file={PLOTLY}"></script>',
        elem_id=name,
    )


def _usual(view: EpisodeView) -> EpisodeView | None:
    """The same episode with the recorded instruction, if this one has another."""
    choice = view.choice
    if not choice.instruction or choice.instruction == view.task:
        return None
    return look(Choice(choice.checkpoint, choice.dataset, choice.episode, "", choice.cameras))


def _about(view: EpisodeView) -> str:
    """What is shown, what is missing, and what other words change."""
    frames = [prediction.frame for prediction in view.predictions]
    objectives = ", ".join(view.config.objectives)
    parts = [f"{len(frames)} moments, frames {frames[0]} to {frames[-1]}. Predicted: {objectives}."]
    usual = _usual(view)
    if usual is not None and view.config.has("action"):
        ours, theirs = ([p.actions[1][0] for p in each.predictions] for each in (view, usual))
        change = sum(abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)) / len(ours)
        parts.append(
            f"Told “{view.choice.instruction}” rather than “{view.task}”, its next actions differ by "
            f"{change:.3g} on average over entries and moments."
        )
    return " ".join([*parts, *view.notes])


def _message(text: str, error: bool = False) -> str:
    kind, role = ("banner error", "alert") if error else ("banner", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def _shipped(folder: str, holds: str) -> str:
    """What lies beside this file in a Space, or beside its folder in the project.

    Raises:
        ValueError: If there is none.
    """
    found = [file for base in (HERE, HERE.parent) for file in sorted((base / folder).glob(f"*/{holds}"))]
    if not found:
        raise ValueError(f"nothing lies in {HERE.parent / folder}: name it with --checkpoint and --dataset")
    root = found[0].parents[len(Path(holds).parts) - 1]
    return str(root.relative_to(Path.cwd())) if root.is_relative_to(Path.cwd()) else str(root)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or Hub id (default: the shipped one)")
    parser.add_argument("--dataset", help="LeRobot dataset: folder or Hub id (default: the shipped sample)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 serves the network too (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
