"""Figures of the README and docs/results.md are those of the files that the measurements wrote."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "hub_cards" / "models"
README, RESULTS = ((ROOT / page).read_text() for page in ("README.md", "docs/results.md"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def in_points(figures: dict) -> str:
    low, high = (100 * bound for bound in figures["ci95"])
    return f"{100 * figures['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def test_mt50():
    mt50 = read(ROOT / "results" / "metaworld_mt50.json")
    for figures in (mt50, *mt50["groups"].values()):
        low, high = (100 * bound for bound in figures["ci95"])
        row = f"| {figures['successes']}/{figures['episodes']} | {100 * figures['success_rate']:.1f} "
        row += f"| {low:.1f} to {high:.1f} "
        row += "".join(f"| {100 * figures[f'experts_{kind}']:.0f} " for kind in ("noisy", "clean"))
        assert row in RESULTS
    solved = [figures["successes"] for figures in mt50["tasks"].values()]
    assert f"{solved.count(10)} tasks are solved in all ten starts" in RESULTS
    assert solved.count(0) == 3  # which the page names


@pytest.mark.parametrize(("model", "column"), [("metaworld-tiny", 2), ("metaworld-mt50", 4)])
def test_what_the_shipped_policies_depend_on(model, column):
    figures = read(MODELS / f"3d-foresight-{model}" / "evaluation" / "diagnostics.json")["closed_loop"]
    rows = RESULTS.partition("| changed | ten tasks |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) == len(figures)
    for row, found in zip(rows, figures.values(), strict=True):
        cells = [cell.strip() for cell in row.split("|")]
        difference = in_points(found["difference"]) if "difference" in found else ""
        assert cells[column : column + 2] == [f"{found['successes']}/{found['episodes']}", difference]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("metaworld-tiny", "eval"),
        ("metaworld-tiny", "eval-seed1"),
        ("metaworld-mt50", "eval"),
        ("libero-object", "eval"),
    ],
)
def test_success_of_the_shipped_policies(model, name):
    mean = read(MODELS / f"3d-foresight-{model}" / "evaluation" / f"{name}.json")["mean"]
    assert f"{mean['successes']}/{mean['episodes']}" in README


def test_robustness_so_far():
    scenes = ["camera_2cm", "camera_5cm", "objects_2cm_nearer", "objects_5cm_nearer", "table_color"]
    found = RESULTS.partition("## Robustness, so far")[2].partition("\n\nA moved")[0]
    variants = ("foresight_3d", "foresight_3d_displacement", "foresight_2d", "action_only")
    folder = ROOT / "results" / "ablation"
    for variant in variants:
        cells = [f"{variant}-steps-25demos-seed{seed}" for seed in range(3)]
        counts = []
        for scene in ["unchanged", *scenes]:
            files = [
                folder / "cells" / cell / "eval.json"
                if scene == "unchanged"
                else folder / "robustness" / scene / f"{cell}.json"
                for cell in cells
            ]
            means = [read(file)["mean"] for file in files]
            counts.append(
                "/".join(str(sum(mean[key] for mean in means)) for key in ("successes", "episodes"))
            )
        assert f" | {' | '.join(counts)} |" in found, variant


def test_a_share_of_supervised_images():
    figures = read(ROOT / "results" / "supervised_share.json")
    success, losses, training = (
        figures[kind]["steps"]["20"] for kind in ("success", "validation_losses", "training")
    )
    shares = {"all_images": 1, "half": 0.5, "quarter": 0.25, "tenth": 0.1}
    assert success["variants"].keys() == shares.keys()
    for variant, found in success["variants"].items():
        minutes = training[variant]["cpu_minutes"]
        low, high = (100 * bound for bound in found["ci95"])
        row = f"| {shares[variant]} | {sum(minutes) / len(minutes):.1f} "
        row += f"| {found['successes']}/{found['episodes']} | {100 * found['success_rate']:.1f} "
        row += f"| {low:.1f} to {high:.1f} | "
        kinds = ("action", "depth", "future", "flow")
        row += " | ".join(f"{losses[variant][kind]['mean']:.3f}" for kind in kinds)
        assert row in RESULTS, row


def test_the_ablation_so_far():
    rows = [read(path) for path in (ROOT / "results" / "ablation" / "rows").glob("*-steps-*.json")]
    seeds, solved = defaultdict(int), defaultdict(lambda: [0, 0])
    for row in rows:
        seeds[row["seed"]] += 1
    complete = [seed for seed, count in seeds.items() if count == max(seeds.values())]
    for row in rows:
        if row["seed"] in complete:
            counts = solved[row["variant"], row["demonstrations"]]
            counts[0] += row["successes"]
            counts[1] += row["trials"]
    assert len(solved) == 16  # eight variants, with two numbers of demonstrations
    for variant in {variant for variant, _ in solved}:
        few, many = ("{}/{}".format(*solved[variant, n]) for n in (10, 25))
        assert f"| {few} | {many} |" in RESULTS, variant
