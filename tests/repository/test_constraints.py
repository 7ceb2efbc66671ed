"""constraints.txt answers to pyproject.toml: for every Python one version of each dependency."""

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.adapters import models
from tests.repository.test_layout import PROJECT

PYTHONS = ["3.10.13", "3.11.7", "3.12.1", "3.13.0", "3.14.0"]
SYSTEMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]


def pins():
    lines = (models.ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len(found) > 100
    return found


def dependencies():
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    found = [Requirement(name) for name in named]
    assert len(found) > 20
    return [item for item in found if item.name != PROJECT["project"]["name"]]


def holds_for(python, system):
    platform, machine = system
    minor = ".".join(python.split(".")[:2])
    environment = {"python_full_version": python, "python_version": minor}
    environment |= {"sys_platform": platform, "platform_machine": machine}
    environment["platform_system"] = {"linux": "Linux", "darwin": "Darwin"}.get(platform, "Windows")
    return lambda item: item.marker is None or item.marker.evaluate(environment)


def test_every_line_is_one_version():
    assert all([pin.operator for pin in item.specifier] == ["=="] for item in pins())
    assert not any(item.extras or item.url for item in pins())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(system))
def test_every_dependency_has_one_version_in_its_range(python, system):
    holds = holds_for(python, system)
    chosen = {}
    for item in filter(holds, pins()):
        name = canonicalize_name(item.name)
        assert name not in chosen, f"{name} has two versions"
        chosen[name] = Version(next(iter(item.specifier)).version)
    wanted = [item for item in dependencies() if holds(item)]
    assert len(wanted) > 20
    outside = {
        item.name for item in wanted if chosen[canonicalize_name(item.name)] not in item.specifier
    }
    assert outside == set()


def test_continuous_integration_runs_the_readme():
    command = 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert command in (models.ROOT / "README.md").read_text().splitlines()
    assert (
        command.replace(".", r"\.").replace("[", r"\[").replace("]", r"\]")
        in (models.ROOT / ".ci" / "run").read_text()
    )
