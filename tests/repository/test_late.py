"""PEFT knows masks once it and this package are imported, in either order; neither gets heavy."""

import json

import pytest

from tests.adapters import models

KNOWS = """
import peft
assert "PEMN" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
assert not any(getattr(finder, "awaited", None) == "peft" for finder in sys.meta_path)
print("known")
"""


@pytest.mark.parametrize(
    "first",
    [
        "import sys, pemn_surgery",
        "import sys, peft, pemn_surgery",
        "import sys, pemn_surgery.adapters",
        "import sys, pemn_surgery\nfrom pemn_surgery import PemnConfig",
        "import sys, pemn_surgery\nfrom peft.config import PeftConfig",
    ],
)
def test_either_order(first):
    assert models.run_python(f"{first}\n{KNOWS}") == "known\n"


def test_an_adapter_is_loaded_by_peft_alone(tmp_path):
    from pemn_surgery import pemnify

    model = pemnify(models.net(), bank="rp", seed=3)
    model.save_pretrained(str(tmp_path))
    code = """
import json, sys
import pemn_surgery
from peft import PeftModel
from tests.adapters import models
model = PeftModel.from_pretrained(models.net(seed=5), sys.argv[1])
print(json.dumps(models.logits(model).tolist()))
"""
    found = json.loads(models.run_python(code, tmp_path).splitlines()[-1])
    assert found == models.logits(model).tolist()


def test_looking_for_peft_imports_nothing_and_its_module_is_its_own():
    code = f"""
import importlib.util, inspect, sys
import pemn_surgery
from importlib.machinery import SourceFileLoader
for name in ("json.tool", "peft", "peft", "no_such_package"):
    spec = importlib.util.find_spec(name)
assert spec is None and importlib.util.find_spec("peft").origin.endswith("__init__.py")
assert not {{"peft", "torch", "transformers"}} & set(sys.modules)
{KNOWS}
assert type(peft.__loader__) is SourceFileLoader and "PeftModel" in inspect.getsource(peft)
"""
    assert models.run_python(code) == "known\n"


def test_an_import_of_peft_that_fails_can_be_repeated_and_ours_never_breaks_it(tmp_path):
    """A stand-in for PEFT: it fails once; then masks cannot be registered, which is a warning."""
    package = tmp_path / "peft"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\nif os.environ.pop('FAIL', ''):\n    raise ImportError('half')\nvalue = 7\n"
    )
    code = """
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
os.environ["FAIL"] = "1"
import pemn_surgery
try:
    import peft
except ImportError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
ours = [str(one.message) for one in caught if "masks" in str(one.message)]
print(peft.value, len(ours), "import pemn_surgery.adapters shows where" in ours[0])
"""
    assert models.run_python(code, tmp_path).splitlines() == ["half", "7 1 True"]


@pytest.mark.parametrize(
    "first",
    [
        "import pemn_surgery\nfrom transformers import Trainer",
        "from transformers import Trainer\nimport pemn_surgery",
        "import pemn_surgery.adapters\nfrom transformers import Trainer",
        "import peft, pemn_surgery\nfrom transformers.trainer import Trainer",
    ],
)
def test_the_trainers_checkpoints_hold_scores_in_any_order(first):
    code = f"""
import sys
{first}
from pemn_surgery import PemnConfig
from pemn_surgery.adapters.state import are_scores_kept
assert not any(getattr(finder, "awaited", None) for finder in sys.meta_path)
trainer = object.__new__(Trainer)
trainer.state = None  # asked for first, so that nothing is written
seen = []
class State:
    def __getattr__(self, name):
        seen.append(are_scores_kept(PemnConfig()))
        raise KeyError(name)
trainer.state = State()
try:
    trainer._save_checkpoint(None, None)
except KeyError:
    print(seen, are_scores_kept(PemnConfig()))
"""
    assert models.run_python(code) == "[True] False\n"


def test_a_trainer_that_writes_otherwise_is_imported_with_a_warning():
    code = """
import sys, types, warnings
sys.modules["transformers.trainer"] = types.SimpleNamespace(Trainer=type("Trainer", (), {}))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pemn_surgery
print([str(w.message)[:60] for w in caught if "Trainer" in str(w.message)])
"""
    said = "pemn_surgery could not make transformers.trainer know masks "
    assert models.run_python(code) == f"[{said!r}]\n"
