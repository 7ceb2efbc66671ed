"""Which warnings make these tests fail: ours, and those that point at our lines, but no others."""

import re
import subprocess
import sys

from tests.adapters import models

# What warns: the category, the module that the warning points at, whether its test passes.
CASES = [
    ("FutureWarning", "transformers.modeling_utils", True),
    ("FutureWarning", "testsuite_of_others", True),
    ("FutureWarning", "adapters_of_others.model", True),
    ("FutureWarning", "pemn_surgery", False),
    ("FutureWarning", "pemn_surgery.adapters.model", False),
    ("FutureWarning", "tests.numbers.test_bank", False),
    ("FutureWarning", "recipes.pemn.run", False),
    ("LowCoverageWarning", "peft.tuners.tuners_utils", False),
]


def test_who_fails(tmp_path):
    tests = "\n".join(
        f"def test_{place}():\n"
        f"    warnings.warn_explicit('moved {place}', {category}, 'x.py', 1, module={module!r})"
        for place, (category, module, _) in enumerate(CASES)
    )
    head = "import warnings\nfrom pemn_surgery.errors import LowCoverageWarning\n"
    (tmp_path / "test_it.py").write_text(head + tests)
    command = [sys.executable, "-m", "pytest", "-c", str(models.ROOT / "pyproject.toml")]
    options = [f"--rootdir={models.ROOT}", "-n", "0", "-p", "no:cacheprovider", "-rA"]
    done = subprocess.run(
        [*command, *options, str(tmp_path)],
        cwd=models.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {int(n): word for word, n in re.findall(r"(PASSED|FAILED) \S+::test_(\d)", done.stdout)}
    passing = {place for place, (*_, passes) in enumerate(CASES) if passes}
    assert found == {n: "PASSED" if n in passing else "FAILED" for n in range(len(CASES))}
    assert set(re.findall(r"x\.py:1: FutureWarning: moved (\d)", done.stdout)) == set("012")
