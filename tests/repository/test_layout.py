"""The house rules that a machine can check."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import models

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = models.ROOT
FOLDERS = {"pemn_surgery": "pemn_surgery", "pemn_surgery.adapters": "adapters"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources():
    found = {
        ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]): path
        for package, folder in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT / folder).parts[0] != "adapters"  # the link
    }
    assert len(found) >= 20
    return found


def trees():
    return {name: ast.parse(path.read_text(), str(path)) for name, path in sources().items()}


def test_packages_list_is_complete():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["package-dir"] == FOLDERS
    found = {"pemn_surgery", "pemn_surgery.adapters"}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).parent
            if inside.parts[:1] != ("adapters",):  # the link
                found.add(".".join([package, *inside.parts]))
    assert set(setuptools["packages"]) == found


def test_adapters_is_a_link_to_the_folder_at_the_top():
    link = ROOT / "pemn_surgery" / "adapters"
    assert link.is_symlink()
    assert str(link.readlink()) == "../adapters"
    import pemn_surgery.adapters as package

    assert Path(package.__file__).resolve() == ROOT / "adapters" / "__init__.py"


def test_types_of_the_linked_folder_are_checked():
    """pyright does not follow the link."""
    assert set(PROJECT["tool"]["pyright"]["include"]) == {"pemn_surgery", "adapters", "recipes"}


def test_import_is_light():
    code = """
import sys
import pemn_surgery
heavy = {"transformers", "timm", "peft", "torch"} & set(sys.modules)
print(sorted(heavy), sorted(set(pemn_surgery.__all__) - set(dir(pemn_surgery))))
"""
    assert models.run_python(code).strip() == "[] []"


def test_unknown_name_is_an_attribute_error():
    package = importlib.import_module("pemn_surgery")
    with pytest.raises(AttributeError, match="'pemn_surgery' has no attribute 'pemify'"):
        _ = package.pemify


def test_top_level_adapters_refuses():
    code = "try:\n    import adapters\nexcept ImportError as error:\n    print(error)"
    assert "Import this package as pemn_surgery.adapters" in models.run_python(code)


def test_versions_agree():
    package = importlib.import_module("pemn_surgery")
    assert package.__version__ == PROJECT["project"]["version"]


def lint_imports(folder):
    tool = Path(sys.executable).parent / "lint-imports"
    assert tool.is_file(), "import-linter is not installed"
    return subprocess.run(
        [str(tool), "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_import_contract():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert "1 kept, 0 broken" in done.stdout


def test_import_contract_names_every_module():
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    modules = {".".join(name.split(".")[:2]) for name in sources()}
    assert len(modules) > 10
    assert named == modules - {"pemn_surgery.__init__"}


def test_no_assert_in_the_source():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def public_definitions():
    """(place, node) of every public class, function and method."""
    for name, tree in trees().items():
        yield name, tree
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            yield f"{name}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                        yield f"{name}.{node.name}.{item.name}", item


def test_everything_public_has_a_docstring():
    found = list(public_definitions())
    assert len(found) > 150
    assert [place for place, node in found if not ast.get_docstring(node)] == []


def test_documented_arguments_are_the_real_ones():
    """Where a docstring lists arguments, it lists all of them."""
    checked, wrong = 0, []
    for place, node in public_definitions():
        text = ast.get_docstring(node) or ""
        if not isinstance(node, ast.FunctionDef) or "Args:" not in text:
            continue
        lines = text.split("Args:\n")[1].split("\n\n")[0].split("\n")
        heads = [line for line in lines if line.startswith("    ") and line[4:5] not in (" ", "")]
        named = {line.split(":")[0].strip().lstrip("*") for line in heads}
        given = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        given |= {a.arg for a in (node.args.vararg, node.args.kwarg) if a is not None}
        checked += 1
        if named != given - {"self", "cls"}:
            wrong.append((place, sorted(named ^ (given - {"self", "cls"}))))
    assert checked > 50
    assert wrong == []


def test_every_named_error_has_a_test():
    from pemn_surgery import errors

    names = [
        name for name, thing in vars(errors).items()
        if inspect.isclass(thing) and name not in ("PemnError", "AdapterFileError")
    ]  # fmt: skip
    assert len(names) >= 11
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    raised = "\n".join(
        line for text in texts for line in text.splitlines()
        if "raises(" in line or "warns(" in line
    )  # fmt: skip
    assert [name for name in names if name not in raised] == []


def test_every_named_error_is_raised_somewhere():
    from pemn_surgery import errors

    raised = {
        node.exc.func.id
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }  # fmt: skip
    named = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}
    warned = {name for name in named if issubclass(getattr(errors, name), Warning)}
    assert named - raised == {"PemnError", *warned}


@pytest.mark.slow
def test_a_copy_without_the_link_is_not_needed_by_the_wheel(tmp_path):
    """The wheel's file list: both packages, the type marker, nothing else of the repository."""
    for item in ("adapters", "pemn_surgery", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / item
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / item, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, tmp_path / item)
    pytest.importorskip("setuptools", minversion="77")
    code = """
from setuptools import setup
import sys
sys.argv = ["setup.py", "-q", "build_py", "--build-lib", "out"]
setup()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    built = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    wanted = {
        "/".join([package.replace(".", "/"), *path.relative_to(ROOT / FOLDERS[package]).parts])
        for name, path in sources().items()
        for package in ["pemn_surgery.adapters" if ".adapters." in name else "pemn_surgery"]
    } | {"pemn_surgery/py.typed"}
    assert built == wanted
