"""The house itself: what the folders promise each other, their users and LeRobot."""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import modeling_foresight

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
PRODUCT = ("modeling_foresight", "datasets_scripts", "goal_images", "training", "lerobot_policy_foresight")
PRODUCT += ("hub_cards", "experiments")  # the last: measurements of this repository, not installed

# What each package or room may never import; `!` in front of what it may import in spite of that.
FORBIDDEN = {
    "modeling_foresight": "lerobot datasets_scripts goal_images training lerobot_policy_foresight hub_cards "
    "experiments",
    "datasets_scripts": "modeling_foresight goal_images training lerobot_policy_foresight hub_cards "
    "experiments",
    # One reader of GR-MG's files.
    "goal_images": "modeling_foresight !modeling_foresight.grmg training lerobot_policy_foresight hub_cards "
    "experiments",
    # `train.py --export` writes LeRobot's files beside the model.
    "training": "hub_cards experiments lerobot_policy_foresight !lerobot_policy_foresight.lerobot_files",
    "lerobot_policy_foresight": "training hub_cards experiments !training.windows",
    "hub_cards": "experiments",
    "experiments": "lerobot_policy_foresight hub_cards",
    "training.windows": "training !training.windows goal_images datasets_scripts !datasets_scripts.columns "
    "!datasets_scripts.storage",
}
# From the bottom up: a room imports itself and the rooms before it.
DATASET_ROOMS = (
    "command_line columns extras licenses",
    "storage",
    "depth",
    "tracks",
    "simulation",
    "conversion inspection",
    "annotation",
)

MAX_FILES, MAX_LINES, MAX_PARAMETERS = 13, 60, 8

# Exceptions. Every list may only shrink: a test fails when an entry is no longer needed.
WRONG_IMPORTS: set = set()  # (file, imported module)
IMPORTED_COMMANDS: set = set()  # (file, command)
CIRCLES: set = set()  # (importer, imported)
LONG_FUNCTIONS: set = set()
MANY_PARAMETERS = {
    "modeling_foresight.processing_foresight:ForesightProcessor.__init__",  # saved by name: a public schema
}
DIFFERING_CONSTANTS = {
    "EXAMPLE",  # of every command's --help
}
REPEATED_CLASSES: set = set()
OWN_ERRORS = {  # commands whose `main` is no `entry_point`; the model's may not import datasets_scripts
    "datasets_scripts.depth.workers.depth_anything_3",  # runs in another environment
    "modeling_foresight.__main__",  # reads nothing that could be wrong
    "modeling_foresight.export",
    "modeling_foresight.grmg.convert",
    "experiments.ablation",  # these three call `experiments.driver.run_command`, an entry point
    "experiments.mt50",
    "experiments.robustness",
}
TESTS_OF_SUBJECTS = {  # a subject that no single file holds
    "benchmarks/test_startup_and_memory.py",
    "benchmarks/test_steps.py",
    "datasets_scripts/depth/test_sources.py",
    "datasets_scripts/storage/test_hub.py",
    "datasets_scripts/test_annotate_depth.py",
    "datasets_scripts/tracks/test_sources.py",
    "lerobot_policy_foresight/test_environments.py",
    "lerobot_policy_foresight/test_evaluation.py",
    "lerobot_policy_foresight/test_libero.py",
    "lerobot_policy_foresight/test_other_policies.py",
    "lerobot_policy_foresight/test_peft.py",
    "lerobot_policy_foresight/test_policy.py",
    "lerobot_policy_foresight/test_robots.py",
    "lerobot_policy_foresight/test_rollout.py",
    "lerobot_policy_foresight/test_same_training.py",
    "lerobot_policy_foresight/test_training.py",
    "modeling_foresight/test_configuration.py",
    "modeling_foresight/test_hub_export.py",
    "modeling_foresight/test_library_contract.py",
    "modeling_foresight/test_processing.py",
    "modeling_foresight/test_saving.py",
    "modeling_foresight/test_transformers_common.py",
    "modeling_foresight/test_variants.py",
    "training/evaluation/test_hub_metrics.py",
    "training/test_converted.py",
    "training/test_embodiments.py",
    "training/test_lora.py",
    "training/test_transformers_trainer.py",
    "training/windows/test_calvin_form.py",
}


# What the code says of itself


@functools.cache
def product_files() -> list[Path]:
    return [path for package in PRODUCT for path in sorted((ROOT / package).rglob("*.py"))]


def scripts(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


@functools.cache
def files_of_tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def module_name(file: Path) -> str:
    """`training/windows/__init__.py` -> `training.windows`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imported_modules(file: Path) -> frozenset[str]:
    """Modules that a file imports, inside functions too; `from a import b` counts as `a.b` if that is one."""
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                place = ROOT.joinpath(*base.split("."), alias.name)
                is_module = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
                found.add(f"{base}.{alias.name}" if is_module else base)
    return frozenset(found)


def is_inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@functools.cache
def commands() -> frozenset[str]:
    """Modules that define `main`."""
    return frozenset(
        module_name(file)
        for file in product_files()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in parsed(file).body)
    )


def functions() -> dict[str, ast.FunctionDef]:
    """`module:Class.method` -> function, nested ones included."""
    found = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = name + ("." if name[-1] != ":" else "") + child.name
                if not isinstance(child, ast.ClassDef):
                    found[inner] = child
                visit(child, inner)
            else:
                visit(child, name)

    for file in product_files() + scripts("examples", "benchmarks"):
        visit(parsed(file), module_name(file) + ":")
    return found


def count_lines(function: ast.FunctionDef) -> int:
    """From `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def count_parameters(function: ast.FunctionDef) -> int:
    """Without `self` and `cls`."""
    names = [arg.arg for arg in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]
    return len([name for name in names if name not in ("self", "cls")])


def assert_only(found: set, allowed: set, remedy: str) -> None:
    """The findings are exactly the named exceptions."""
    show = "\n  ".join
    assert not found - allowed, f"{remedy}:\n  {show(map(str, sorted(found - allowed)))}"
    gone = sorted(map(str, allowed - found))
    assert not gone, f"well done, now remove these entries from the list of exceptions:\n  {show(gone)}"


# Who imports whom


def test_imports_point_one_way():
    found = set()
    for package, rules in FORBIDDEN.items():
        wrong = [rule for rule in rules.split() if rule[0] != "!"]
        allowed = [rule[1:] for rule in rules.split() if rule[0] == "!"]
        for file in product_files():
            if is_inside(module_name(file), package):
                found |= {
                    (str(file.relative_to(ROOT)), module)
                    for module in imported_modules(file)
                    if any(is_inside(module, name) for name in wrong)
                    and not any(is_inside(module, name) for name in allowed)
                }
    for file in product_files():
        found |= {(str(file.relative_to(ROOT)), module) for module in _rooms_above(file)}
    assert_only(found, WRONG_IMPORTS, "move what both need down, or turn the import around")


def _rooms_above(file: Path) -> set[str]:
    """What a file in a room of datasets_scripts imports from another room that is not below its own."""
    room = file.relative_to(ROOT).with_suffix("").parts[1]
    rooms = [line.split() for line in DATASET_ROOMS]
    floor = next((i for i, names in enumerate(rooms) if room in names), None)
    if floor is None or not is_inside(module_name(file), "datasets_scripts"):
        return set()
    known = {room, *(name for names in rooms[:floor] for name in names)}
    ours = [module for module in imported_modules(file) if is_inside(module, "datasets_scripts")]
    return {module for module in ours if module.split(".")[1] not in known}


def test_nobody_imports_a_command():
    found = {
        (str(file.relative_to(ROOT)), module)
        for file in product_files() + scripts("examples")
        for module in imported_modules(file) & commands()
        if file.name != "__main__.py"
    }
    assert_only(found, IMPORTED_COMMANDS, "move what the importer needs into a file that defines no `main`")


def test_nothing_flat_in_the_model_imports_its_converter():
    # `save_pretrained` copies the files beside the model's own into a Hub repo, and nothing deeper.
    folders = {path.parent.name for path in (ROOT / "modeling_foresight").glob("*/__init__.py")}
    assert folders <= {"grmg"}, "modeling_foresight is flat: what an export copies lies there, not deeper"
    for file in (ROOT / "modeling_foresight").glob("*.py"):
        wrong = [name for name in imported_modules(file) if is_inside(name, "modeling_foresight.grmg")]
        assert not wrong, f"{file.name} imports {wrong}: an exported model has no such folder"


@pytest.mark.parametrize("by", ["file", "folder"])
def test_imports_form_no_circle(by):
    def unit(module: str) -> str:
        """The module itself, or its room; files beside the rooms are rooms of their own."""
        return module if by == "file" else ".".join(module.split(".")[:2])

    graph = defaultdict(set)
    for file in product_files():
        here = unit(module_name(file))
        ours = {module for module in imported_modules(file) if module.split(".")[0] in PRODUCT}
        graph[here] |= {unit(module) for module in ours} - {here}
    for importer, imported in CIRCLES if by == "file" else ():
        assert imported in graph[importer], f"well done, now remove {importer} from CIRCLES"
        graph[importer].remove(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(
            f"imports form a circle, move what both need into a third file: {' <- '.join(error.args[1])}"
        )


def test_every_command_prints_errors_as_one_line():
    # As docs/troubleshooting.md promises.
    found = set()
    for file in product_files() + scripts("benchmarks"):
        for node in parsed(file).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                names = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
                found |= set() if "entry_point" in names else {module_name(file)}
    assert_only(found, OWN_ERRORS, "decorate `main` with datasets_scripts/command_line.py's `entry_point`")


# What lies where


def test_a_folder_has_at_most_a_dozen_files_or_so():
    counts = Counter(file.parent for file in product_files() if file.name != "__init__.py")
    for folder, count in counts.items():
        name = str(folder.relative_to(ROOT))
        assert count <= MAX_FILES or name == "modeling_foresight", f"{name} has {count} files: make rooms"


def test_no_sub_package_is_called_like_a_library():
    # As a file is run, its folder comes first on the path: `import evaluate` would find ours.
    libraries = {canonicalize_name(Requirement(text).name).replace("-", "_") for text in all_requirements()}
    folders = {folder for package in PACKAGES for folder in package.split(".")[1:]}
    assert not folders & (libraries | sys.stdlib_module_names), "rename the folder"


def test_a_test_lies_where_the_file_that_it_tests_lies():
    found = set()
    for file in files_of_tests():
        place = file.relative_to(ROOT / "tests")
        subject = ROOT / place.parent / place.name.removeprefix("test_")
        if file.name.startswith("test_") and len(place.parts) > 1 and not subject.is_file():
            found.add(place.as_posix())
    assert_only(found, TESTS_OF_SUBJECTS, "name the test after the file that it tests, or list its subject")


# What the code looks like


def test_functions_are_short():
    found = {name for name, function in functions().items() if count_lines(function) > MAX_LINES}
    assert_only(found, LONG_FUNCTIONS, f"split these functions, they have more than {MAX_LINES} lines")


def test_functions_have_few_parameters():
    found = {name for name, function in functions().items() if count_parameters(function) > MAX_PARAMETERS}
    assert_only(found, MANY_PARAMETERS, f"group the parameters, there are more than {MAX_PARAMETERS}")


def test_no_constant_has_two_values():
    values = defaultdict(set)
    for file in product_files():
        for node in parsed(file).body:
            for name, value in assigned_constants(node):
                values[name].add(value)
    found = {name for name, different in values.items() if len(different) > 1}
    assert_only(found, DIFFERING_CONSTANTS, "rename one of them, or import the other")


def assigned_constants(node: ast.stmt):
    """Names and values that a statement of a module assigns, if the names are public and in capitals."""
    if not isinstance(node, ast.Assign):
        return
    names, values = [node.targets[0]], [node.value]
    if isinstance(names[0], ast.Tuple) and isinstance(node.value, ast.Tuple):  # A, B = 1, 2
        names, values = names[0].elts, node.value.elts
    for name, value in zip(names, values, strict=True):
        if isinstance(name, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]+", name.id):
            yield name.id, ast.unparse(value)


def test_no_two_public_classes_have_one_name():
    places = defaultdict(set)
    for file in product_files():
        if "hub_metrics" not in file.parts:  # scripts that must stand alone
            for node in parsed(file).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].add(module_name(file))
    found = {name for name, modules in places.items() if len(modules) > 1}
    assert_only(found, REPEATED_CLASSES, "rename one of the classes")


# What is installed and shipped


def all_requirements() -> list[str]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [text for group in groups for text in group]


def tracked_files() -> list[Path]:
    """Files under version control, or a skip outside of a git checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]


def pinned_versions() -> dict[str, str]:
    """Package name -> version, as constraints.txt pins it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines)


def test_lerobot_finds_the_plugin_by_the_distribution_name():
    # LeRobot imports the module named exactly as a distribution that starts with `lerobot_policy_`.
    name = importlib.metadata.metadata("lerobot_policy_foresight")["Name"]
    assert name == "lerobot_policy_foresight"
    importlib.import_module(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_imports(package):
    importlib.import_module(package)


def test_every_folder_with_modules_is_a_package_that_is_installed():
    folders = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in {package.split(".")[0] for package in PACKAGES}
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert folders == set(PACKAGES), "list the package in [tool.setuptools] packages of pyproject.toml"


def test_every_requirement_is_pinned_inside_its_range():
    pins = pinned_versions()
    for requirement in map(Requirement, all_requirements()):
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(PROJECT["name"]):
            assert name in pins, f"{name} is not in constraints.txt: run `make constraints`"
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow {pins[name]}"


def test_constraints_name_versions_and_no_places():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[^\s;]+( ; .+)?", line), line


def test_no_file_names_a_place_on_the_machine_of_its_author():
    # Spelled in pieces, or this file would find itself.
    places = re.compile(
        "|".join(["/ro" + "ot/", "/wo" + "rk/main", "sha" + "red/reference", "sha" + "red/design"])
    )
    for file in tracked_files():
        if file.suffix not in {".png", ".mp4", ".safetensors", ".parquet"}:
            found = places.search(file.read_text(errors="ignore"))
            assert not found, f"{file.relative_to(ROOT)} names {found.group()}"


def test_tracked_files_have_plain_names():
    # A test that writes to a wrongly quoted place leaves a folder of that name, which `git add` takes along.
    names = [file.relative_to(ROOT).as_posix() for file in tracked_files()]
    odd = [name for name in names if not re.fullmatch(r"[\w./-]+", name, re.ASCII) or "/tmp" in name]
    assert not odd, "git rm --cached these"


def test_no_tracked_file_is_large():
    megabyte, shipped = 1024 * 1024, ROOT / "hub_cards" / "models"  # weights to try everything with at once
    large = [
        file.name
        for file in tracked_files()
        if file.stat().st_size > (20 if shipped in file.parents else 2) * megabyte
    ]
    assert not large, "weights, datasets and videos belong on the Hub"


def test_version_and_license_agree_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["version"] == modeling_foresight.__version__ == importlib.metadata.version(PROJECT["name"])
    )
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Copyright 2026 The 3D Foresight authors" in (ROOT / "LICENSE").read_text()


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split()
    for target in targets:
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), (
            f"`make help` does not explain {target}"
        )


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh"])
def test_shell_scripts_can_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o100, f"chmod +x {script}"
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
