"""Checkpoints on disk: the newest whole one is found, whatever happened to files and lies beside them."""

import json
import os
import shutil
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.checkpoint import CheckpointException

from training.checkpoints import latest_checkpoint, restore_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 3)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def written(accelerator, tmp_path_factory):
    """Checkpoints of steps 1 and 2; read only."""
    output = tmp_path_factory.mktemp("written")
    for step in (1, 2):
        save_checkpoint(accelerator, output, step, keep=2)
    return output / "checkpoints"


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run" / "checkpoints")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "files.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.unlink])
def test_a_damaged_checkpoint_is_left_out_and_its_file_named(folder, name, damage):
    newest = folder / "step-0000002"
    damage(newest / name)
    if (name, damage) == ("files.json", os.unlink):  # as older versions wrote it
        assert latest_checkpoint(folder) == (newest, 2)
        return
    with pytest.warns(UserWarning, match=r"step-0000002 is left out") as caught:
        assert latest_checkpoint(folder) == (folder / "step-0000001", 1)
    # A digest with a flipped bit accuses its file.
    assert name in str(caught[0].message) or name == "files.json"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"model.safetensors": 3}', "\ud800", "[" * 9999]
)
def test_a_manifest_of_any_content_is_no_traceback(folder, content):
    (folder / "step-0000002" / "files.json").write_text(content, errors="surrogatepass")
    with pytest.warns(UserWarning, match="step-0000002 is left out"):
        assert latest_checkpoint(folder)[1] == 1


def test_without_a_whole_checkpoint_there_is_none(folder):
    for checkpoint in folder.iterdir():
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    with pytest.warns(UserWarning, match="files.json cannot be read"):
        assert latest_checkpoint(folder) is None


def test_other_names_beside_checkpoints_are_ignored_and_kept(folder, accelerator):
    others = ["step-foo", "step-", "step-0000009-old", "step-0000009.zip", "notes", "step-٣٣٣٣٣٣٣"]
    for name in others:
        (folder / name).mkdir()
    (folder / "step-0000008").write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(folder)[1] == 2
    save_checkpoint(accelerator, folder.parent, 3, keep=1)
    assert {path.name for path in folder.iterdir()} == {*others, "step-0000008", "step-0000003"}


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(folder, accelerator):
    truncate(folder / "step-0000002" / "model.safetensors")
    shutil.move(folder / "step-0000002", folder / "step-0000009")
    save_checkpoint(accelerator, folder.parent, 2, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000001", "step-0000002"]


def test_a_newer_checkpoint_that_is_whole_is_kept(folder, accelerator):
    shutil.move(folder / "step-0000002", folder / "step-0000009")
    save_checkpoint(accelerator, folder.parent, 2, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000009"]


def test_a_damaged_checkpoint_without_digests_is_named_with_the_remedy(folder, accelerator):
    newest = folder / "step-0000002"
    (newest / "files.json").unlink()
    truncate(newest / "model.safetensors")
    with pytest.raises(ValueError, match="step-0000002 cannot be loaded.*Delete this folder.*--resume"):
        restore_checkpoint(accelerator, latest_checkpoint(folder)[0])


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), CheckpointException("of shards", {})])
def test_a_whole_checkpoint_that_does_not_load_is_to_be_kept(folder, accelerator, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(accelerator, "load_state", fail)
    with pytest.raises(ValueError, match="(?s)step-0000002 cannot be loaded.*keep it") as caught:
        restore_checkpoint(accelerator, folder / "step-0000002")
    assert "Delete" not in str(caught.value)


def test_shards_that_cannot_be_written_are_an_error_with_a_remedy(accelerator, tmp_path, monkeypatch):
    def fail(path):
        raise CheckpointException("no space", {})

    monkeypatch.setattr(accelerator, "save_state", fail)
    with pytest.raises(OSError, match="(?s)step 1 could not be written.*Free space"):
        save_checkpoint(accelerator, tmp_path, 1, keep=1)


def test_all_files_are_on_the_disk_before_the_checkpoint_has_its_name(accelerator, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(str(b)), replace(a, b)))
    save_checkpoint(accelerator, tmp_path, 1, keep=1)
    final = tmp_path / "checkpoints" / "step-0000001"
    before, after = done[: done.index(str(final))], done[done.index(str(final)) + 1 :]
    names = [*json.loads((final / "files.json").read_text()), "files.json"]
    assert "model.safetensors" in names
    assert {os.path.basename(path) for path in before} >= set(names)
    assert any(os.path.basename(path).startswith(".step-0000001.") for path in before)
    assert after == [str(final.parent)]
