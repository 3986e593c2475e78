"""One policy for several robots: places of their entries, statistics of each, and losses without padding."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_foresight import ForesightForActionPrediction, ForesightProcessor, ForesightStream
from tests.tiny import TASKS, tiny_batch, tiny_config, tiny_processor

# The arm has fewer entries of both, in an order of its own; place 2 of the action and 4 and 9 of the state
# are binary.
EMBODIMENTS = {
    "humanoid": {"action": [0, 1, 2, 3, 4, 5, 6], "state": list(range(11))},
    "arm": {"action": [3, 0, 2], "state": [1, 0, 4, 10]},
}
ARM, HUMANOID = 0, 1  # in the order of their names
ROBOTS = torch.tensor([ARM, HUMANOID, ARM])


def draw_statistics(size: int, scale: float) -> dict:
    mean = scale * np.arange(1, size + 1)
    return {"mean": mean, "std": np.full(size, scale), "min": mean - 2 * scale, "max": mean + 2 * scale}


STATISTICS = {
    name: {kind: draw_statistics(len(places), scale) for kind, places in robot.items()}
    for scale, (name, robot) in zip((1.0, 100.0), EMBODIMENTS.items(), strict=True)
}


@pytest.fixture(scope="module")
def policy():
    config = tiny_config(embodiments=EMBODIMENTS, objectives=["action"])
    torch.manual_seed(0)
    return ForesightForActionPrediction(config).eval(), tiny_processor(config, statistics=STATISTICS)


def robot_batch(config, seed=0):
    return tiny_batch(config, seed=seed) | {"embodiment": ROBOTS}


def test_losses_are_means_over_the_entries_that_each_robot_has(policy):
    model, _ = policy
    batch = robot_batch(model.config)
    batch["action_mask"][0, 1:, 2:] = False
    output = model(**batch)
    errors, gripper = [], []
    for sample, name in enumerate(("arm", "humanoid", "arm")):
        shown = batch["action_mask"][sample]
        predicted, actions = output.actions[sample][shown], batch["actions"][sample][shown]
        for place in EMBODIMENTS[name]["action"]:
            pair = predicted[:, place], actions[:, place]
            if place == 2:
                gripper.append(torch.nn.functional.binary_cross_entropy_with_logits(*pair, reduction="none"))
            else:
                errors.append(torch.nn.functional.smooth_l1_loss(*pair, reduction="none"))
    for name, parts in (("action", errors), ("gripper", gripper)):
        torch.testing.assert_close(output.losses[name], torch.cat(parts).mean())
        assert model.count_targets(batch)[name] == len(torch.cat(parts))


def test_what_stands_at_places_that_a_robot_lacks_changes_no_loss_and_has_no_gradient(policy):
    model, _ = policy
    batch = robot_batch(model.config)
    model.zero_grad()
    loss = model(**batch).losses
    absent = [place for place in range(7) if place not in EMBODIMENTS["arm"]["action"]]
    actions = batch["actions"].clone()
    actions[ROBOTS == ARM] = actions[ROBOTS == ARM].index_fill(-1, torch.tensor(absent), torch.nan)
    outputs = model(**batch | {"actions": actions})
    # Not of the style: for its encoder a place without entry is zero.
    assert all(torch.equal(outputs.losses[name], loss[name]) for name in ("action", "gripper"))
    assert outputs.losses["kl"].isfinite()
    arms = {name: value[ROBOTS == ARM] for name, value in batch.items()}
    model(**arms).loss.backward()
    rows = [model.config.continuous_action_indices.index(place) for place in absent]
    gradient = model.action_decoder.predict_continuous.weight.grad
    assert not gradient[rows].any() and gradient.any()


def test_every_robot_is_normalized_by_its_own_statistics_and_gets_its_own_units_back(policy):
    model, processor = policy
    raw = {
        "images": {"main": torch.zeros(3, 1, 3, 40, 40, dtype=torch.uint8)},
        "task": list(TASKS),
        "embodiment": ["arm", "humanoid", "arm"],
        "state": torch.zeros(3, 1, 11),
        "actions": torch.zeros(3, 1, 4, 7),
    }
    for sample, name in enumerate(raw["embodiment"]):
        for key, kind in (("state", "state"), ("actions", "action")):
            stats, places = STATISTICS[name][kind], EMBODIMENTS[name][kind]
            raw[key][sample, ..., places] = torch.tensor(stats["mean"] + stats["std"]).float()
    batch = processor.prepare_batch(raw)
    assert batch["embodiment"].tolist() == ROBOTS.tolist()
    for sample, name in enumerate(raw["embodiment"]):
        for key, kind in (("state", "state"), ("actions", "action")):
            held = torch.zeros(batch[key].shape[-1], dtype=torch.bool)
            held[EMBODIMENTS[name][kind]] = True
            values = batch[key][sample]
            torch.testing.assert_close(values[..., held], torch.ones_like(values[..., held]))
            assert not values[..., ~held].any()
    again = processor.denormalize_actions(batch["actions"], raw["embodiment"])
    binary = torch.tensor([place == 2 for place in range(7)])
    torch.testing.assert_close(again[..., ~binary], raw["actions"][..., ~binary])
    decoded = processor.decode_actions(batch["actions"][:1], embodiment="arm")
    mean, std, high = (
        torch.tensor(STATISTICS["arm"]["action"][key]).float() for key in ("mean", "std", "max")
    )
    torch.testing.assert_close(decoded[0, 0, 0], torch.where(binary[[3, 0, 2]], high, mean + std))


def test_a_saved_processor_keeps_the_statistics_of_all_robots_and_may_be_opened_for_one(policy, tmp_path):
    model, processor = policy
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ForesightProcessor.from_pretrained(tmp_path)
    assert (loaded.embodiments, loaded.statistics) == (processor.embodiments, processor.statistics)
    assert ForesightForActionPrediction.from_pretrained(tmp_path).config.embodiments == EMBODIMENTS
    chosen = ForesightProcessor.from_pretrained(tmp_path, embodiment="arm")
    assert chosen.embodiment == "arm" and loaded.embodiment is None
    assert chosen.decode_actions(torch.zeros(4, 7)).shape == (4, 3)


def test_a_stream_controls_each_robot_with_its_own_sizes_as_whole_windows_do(policy):
    model, processor = policy
    images = {view: np.full((40, 40, 3), 90, np.uint8) for view in model.config.views}
    for name, robot in EMBODIMENTS.items():
        stream = ForesightStream(model, processor, embodiment=name)
        stream.reset(TASKS[0])
        state = STATISTICS[name]["state"]["mean"].astype(np.float32)
        action = stream.step(images, state)
        assert action.shape == (len(robot["action"]),)
        inputs = processor(images, TASKS[0], state, embodiment=name)
        whole = processor.decode_actions(model.predict_action(**inputs), embodiment=name)[0, 0]
        torch.testing.assert_close(action, whole, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="state has shape"):
            stream.step(images, np.zeros(7, np.float32))


@pytest.mark.parametrize("use", ["stream", "decode", "call"])
def test_a_robot_that_is_not_named_or_unknown_is_refused_with_the_names_that_there_are(policy, use):
    model, processor = policy
    images = {"main": np.zeros((40, 40, 3), np.uint8)}
    uses = {
        "stream": lambda name: model.stream(processor, embodiment=name),
        "decode": lambda name: processor.decode_actions(torch.zeros(4, 7), embodiment=name),
        "call": lambda name: processor(images, TASKS[0], embodiment=name),
    }
    with pytest.raises(ValueError, match="has the embodiments arm, humanoid, and none is chosen"):
        uses[use](None)
    with pytest.raises(ValueError, match="arm, humanoid, and embodiment='ur5e' is not one of them"):
        uses[use]("ur5e")


def test_a_policy_of_one_unnamed_robot_takes_no_name():
    config = tiny_config()
    with pytest.raises(ValueError, match="one robot without a name"):
        tiny_processor(config).for_embodiment("arm")


def test_actions_without_their_robots_are_refused(policy):
    model, _ = policy
    batch = tiny_batch(model.config)
    for use in (model, model.count_targets):
        call = (lambda given: model(**given)) if use is model else use
        with pytest.raises(ValueError, match=r"Give embodiment with actions.*\['arm', 'humanoid'\]"):
            call(batch)
        for robots in (torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 0]), torch.ones(3)):
            with pytest.raises(ValueError, match="embodiment must hold whole numbers from 0 to 1"):
                call(batch | {"embodiment": robots})
    with pytest.raises(ValueError, match=r"embodiment=None is not one of \['arm', 'humanoid'\]"):
        model.config.for_robot(None)


def test_a_robots_own_entries_are_put_at_its_places_or_refused(policy):
    _, processor = policy
    images = {"main": np.zeros((1, 40, 40, 3), np.uint8)}
    own = torch.tensor([1.0, 2.0, 3.0]).expand(1, 1, 4, 3)
    state = STATISTICS["arm"]["state"]["mean"].astype(np.float32)
    batch = processor(images, [TASKS[0]], state[None, None], embodiment="arm", actions=own)
    placed = {"images": {"main": torch.zeros(1, 1, 3, 40, 40, dtype=torch.uint8)}, "task": [TASKS[0]]}
    placed |= {"actions": own, "state": torch.from_numpy(state)[None, None]}
    expected = processor.prepare_batch(processor.place_batch(placed, "arm"))
    for name in ("actions", "state"):
        torch.testing.assert_close(batch[name], expected[name])
    for name in ("actions", "state"):
        alone = {key: value for key, value in placed.items() if key in ("images", "task", name)}
        with pytest.raises(ValueError, match="place_batch puts those of one robot at their places"):
            processor.prepare_batch(alone | {"embodiment": ["arm"]})


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ({"action": [7], "state": []}, "places from 0 to 6, each once"),
        ({"action": [1, 1], "state": []}, "places from 0 to 6, each once"),
        ({"action": [1]}, "must have action and state"),
    ],
)
def test_places_that_no_model_has_are_refused(robot, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(embodiments={"arm": robot})


def test_statistics_of_another_size_are_refused():
    config = tiny_config(embodiments={"arm": {"action": [0, 1], "state": [0]}})
    with pytest.raises(ValueError, match="The action of arm has 3 entries, but embodiments.arm.action 2"):
        tiny_processor(config, statistics={"arm": {"action": draw_statistics(3, 1)}})
