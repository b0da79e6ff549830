"""What gets installed: one import package, its YAML files, and a Hydra plugin that minds its own business."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "plugin": "apportion",
    "callbacks": "apportion.callbacks",
    "conf": "apportion.conf",
    "recipes": "apportion.recipes",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(suffix: str = "") -> list[Path]:
    """Files below the four folders, relative to the root."""
    found = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob(f"*{suffix}")]
    return sorted(path for path in found if (ROOT / path).is_file() and "__pycache__" not in path.parts)


def installed(path: Path) -> str:
    """Where a source file lands in the wheel."""
    if path.parts[:2] == ("plugin", "hydra_plugins_src"):
        return "/".join(("hydra_plugins", "apportion", *path.parts[2:]))
    return "/".join((*FOLDERS[path.parts[0]].split("."), *path.parts[1:]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source") / "apportion"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages that holds the wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def foreign(site: Path, folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` against the wheel and this environment's other packages, without any installed copy of ours.

    ``-S`` leaves out the ``.pth`` files, by which an editable install would come in, ``-I`` the present folder.
    """
    others = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (folder / "app.py").write_text(script)
    start = (
        f"import runpy, sys; sys.path[:0] = {[str(site)]!r}; sys.path += {others!r}; sys.argv[0] = 'app.py'; "
        f"runpy.run_path({str(folder / 'app.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-I", "-S", "-c", start, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


APP = """
import hydra
from hydra.utils import instantiate

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def app(cfg):
    for name, node in cfg.callbacks.items():
        callback = instantiate(node)
        print(name, type(callback).__module__, type(callback).__name__)
    import apportion
    print(apportion.__file__)

app()
"""

MISSING = """
import hydra

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def app(cfg):
    print(cfg)

app()
"""


def app_folder(tmp_path: Path, config: str) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(config)
    return tmp_path


def test_an_app_that_only_names_lisa_gets_it_from_the_wheel(site: Path, tmp_path: Path) -> None:
    folder = app_folder(tmp_path, "defaults:\n  - callbacks: lisa\n")
    done = foreign(site, folder, APP)
    assert done.returncode == 0, done.stderr
    assert "lisa apportion.callbacks.lisa LISA" in done.stdout
    assert str(site) in done.stdout


def test_every_preset_can_be_named_by_another_app(site: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "conf/slots/callbacks").glob("*.yaml") if path.stem != "compose")
    assert len(names) >= 6
    folder = app_folder(tmp_path, f"defaults:\n  - callbacks: [{', '.join(names)}]\n")
    done = foreign(site, folder, APP)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines() if "apportion.callbacks." in line) == names


@pytest.mark.parametrize("group", ["trainer", "model", "data", "logger", "experiment", "optimizer", "peft"])
def test_a_config_that_another_app_misses_stays_missing(site: Path, tmp_path: Path, group: str) -> None:
    ours = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))[0]
    folder = app_folder(tmp_path, f"defaults:\n  - {group}: {ours}\n")
    done = foreign(site, folder, MISSING)
    assert done.returncode != 0
    assert f"Could not find '{group}/{ours}'" in done.stderr


def test_a_file_of_the_app_wins_over_ours_of_the_same_name(site: Path, tmp_path: Path) -> None:
    folder = app_folder(tmp_path, "defaults:\n  - callbacks: lisa\n")
    (folder / "conf" / "callbacks").mkdir()
    (folder / "conf" / "callbacks" / "lisa.yaml").write_text("mine: 1\n")
    done = foreign(site, folder, MISSING)
    assert "'mine': 1" in done.stdout, done.stderr
    assert "apportion" not in done.stdout


def test_the_plugin_imports_nothing_but_hydra(site: Path, tmp_path: Path) -> None:
    script = MISSING.replace("print(cfg)", "import sys; print(sorted({name.split('.')[0] for name in sys.modules}))")
    folder = app_folder(tmp_path, "a: 1\n")
    done = foreign(site, folder, script)
    loaded = set(ast.literal_eval(done.stdout.strip())) if done.returncode == 0 else pytest.fail(done.stderr)
    # Hydra asks every package of the search path whether it is there: so `import apportion` alone must be light as well
    assert {"hydra_plugins", "apportion"} <= loaded
    assert not loaded & {"torch", "pytorch_lightning", "lightning", "transformers", "peft", "numpy"}


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {installed(path) for path in sources()}


def test_every_yaml_is_found_by_importlib_resources(site: Path, tmp_path: Path) -> None:
    expected = sorted(str(path.relative_to("conf")) for path in sources(".yaml") if path.parts[0] == "conf")
    script = """
from importlib.resources import as_file, files
with as_file(files("apportion.conf")) as root:
    print(sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml")))
"""
    done = foreign(site, tmp_path, script)
    assert ast.literal_eval(done.stdout) == expected, done.stderr
    assert len(expected) > 10


def test_no_folder_name_is_importable_from_the_wheel(site: Path) -> None:
    top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"apportion", "hydra_plugins"}
    assert not (site / "hydra_plugins" / "__init__.py").exists()  # a namespace shared with other plugins


def test_the_listed_packages_are_the_folders_with_python_files() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {installed(path).rpartition("/")[0].replace("/", ".") for path in sources(".py")}


def test_the_typing_marker_and_the_entry_points_are_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "apportion/py.typed" in archive.namelist()
        (entries,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    for line in (
        "apportion-train = apportion.recipes.train:main",
        "apportion-estimate = apportion.recipes.estimate:main",
        "apportion-export = apportion.recipes.export:main",
        "apportion = hydra_plugins.apportion.searchpath:ApportionSearchPathPlugin",
    ):
        assert line in entries


def imports(path: Path) -> list[str]:
    """Absolute names that a file imports; relative ones begin with a dot."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("path", [*sources(".py"), *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_no_file_imports_a_second_copy_by_folder_name_or_relatively(path: Path) -> None:
    for name in imports(ROOT / path):
        assert name.split(".")[0] not in {*FOLDERS, "hydra_plugins_src"}, f"{path} imports {name}"
        assert not name.startswith("."), f"{path} imports relatively"


def test_no_second_copy_of_a_module_is_loaded() -> None:
    for name in FOLDERS.values():
        importlib.import_module(name)
    assert not {name.split(".")[0] for name in sys.modules} & {*FOLDERS}


def test_constraints_pin_what_is_installed_here() -> None:
    from importlib.metadata import PackageNotFoundError, version

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    different = {}
    for name, pin in pins.items():
        try:
            here = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
        if here != pin:
            different[name] = (pin, here)
    if different.get("torch"):
        pytest.skip("another torch than the tested one is installed on purpose")
    assert not different


def test_every_requirement_has_a_tested_version() -> None:
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    names = {requirement.split(">")[0].split("<")[0].split("!")[0].strip().lower() for requirement in wanted}
    assert names <= pins
