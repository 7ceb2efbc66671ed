"""Every door to another library: it is as it was when it was wrapped, and it is needed.

`BEHAVIOUR` has what each door is there for. It holds with the door open, and must fail with it
shut, so a door that upstream made useless is seen too.
"""

import ast
import copyreg
import importlib
import inspect
import pkgutil
import sys
import warnings
from contextlib import contextmanager
from unittest import mock

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import hotswap, register_peft_method
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

import pemn_surgery
from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters import adding, doors, guard
from pemn_surgery.adapters.files.atomic import replace_file
from pemn_surgery.adapters.state import are_scores_kept
from pemn_surgery.adapters.whole_modules import choosing_layers
from pemn_surgery.errors import (
    AdapterError,
    AdapterFileError,
    AlreadyPemnifiedError,
    PemnWarning,
    VersionsError,
    VersionsWarning,
)
from pemn_surgery.masks import in_force
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

BY_LABEL = {door.label: door for door in doors.DOORS}
LIBRARIES = ("peft", "transformers", "safetensors", "accelerate", "timm", "torch")
BEHAVIOUR = {}


def behaves(*labels):
    def note(check):
        BEHAVIOUR.update(dict.fromkeys(labels, check))
        return check

    return note


# What each door is there for: check(folder, door).


@behaves("PEFT_TYPE_TO_CONFIG_MAPPING.PEMN", "PEFT_TYPE_TO_TUNER_MAPPING.PEMN")
def peft_knows_the_method(folder, door):
    model, path = saved(folder, "a")
    assert type(PeftConfig.from_pretrained(path)) is PemnConfig
    models.assert_equal(models.logits(load(path)), models.logits(model))


@behaves(*(label for label in BY_LABEL if label.startswith("PeftModel") and "__" in label))
def a_model_that_fails_to_begin_leaves_its_base(folder, door):
    base = models.bert()
    base.prepare_inputs_for_generation = None  # some of PEFT's models ask for it
    kind = pkgutil.resolve_name(door.owner)
    unchanged_by(base, door, lambda: kind(base, PemnConfig(bank="mp")))


@behaves(*(label for label in BY_LABEL if label.startswith("PeftModel") and "add_" in label))
def a_second_adapter_that_fails_leaves_the_model(folder, door):
    kind = pkgutil.resolve_name(door.owner)
    tasks = {kind: task for task, kind in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}
    options = {"bank": "own", "selector": "topk", "task_type": tasks.get(kind)}
    model = kind(models.bert(), PemnConfig(**options))
    unchanged_by(model, door, lambda: model.add_adapter("b", PemnConfig(**options)))


@behaves("PeftModel.from_pretrained")
def a_load_that_fails_leaves_the_base(folder, door):
    _, path = saved(folder, "a", models.bert)
    base = models.bert()
    unchanged_by(base, door, lambda: PeftModel.from_pretrained(base, path))


@behaves("PeftModel.load_adapter")
def an_adapter_keeps_its_configuration(folder, door):
    model, _ = saved(folder, "a")
    _, other = saved(folder, "b", density=0.25)
    with pytest.raises(AdapterError, match="density"):
        model.load_adapter(other, "default")


@behaves("PeftModel.save_pretrained")
def a_save_that_fails_leaves_the_old_adapter(folder, door):
    model, path = saved(folder, "a")
    before = load_file(f"{path}/{models.WEIGHTS_FILE}")
    with torch.no_grad():
        model.base_model.model.bn1.task_tensors.pemn_tensors["default"].weight.add_(1)
    with pytest.raises(Fault), failing_at_its_end(door):
        model.save_pretrained(path)
    models.assert_same_tensors(load_file(f"{path}/{models.WEIGHTS_FILE}"), before)
    assert "pemn_surgery" in (folder / "a" / "README.md").read_text()


@behaves("PeftModel.create_or_update_model_card")
def the_trainers_card_says_how_masks_are_loaded(folder, door):
    model, path = saved(folder, "a")
    (folder / "a" / "README.md").unlink()
    model.create_or_update_model_card(path)
    assert "pemn_surgery" in (folder / "a" / "README.md").read_text()


@behaves("BaseTuner.__init__")
def other_methods_refuse_masks(folder, door):
    model = pemnify(models.net(), bank="own", selector="topk").get_base_model()
    with pytest.raises(AlreadyPemnifiedError, match="LORA"):
        get_peft_model(model, LoraConfig(target_modules=["head"]))


@behaves("save_and_load.safe_load_file")
def what_was_checked_is_what_is_loaded(folder, door):
    first, path = saved(folder, "a", seed=1)
    _, other = saved(folder, "b", seed=2)
    with saved_anew_after(guard, "check_adapter", path, other):
        models.assert_equal(models.logits(load(path)), models.logits(first))


@behaves("save_and_load._filter_state_dict_for_adapter_name")
def an_adapter_may_be_called_like_a_part(folder, door):
    model, _ = saved(folder, "a")
    keys = set(get_peft_model_state_dict(model))
    model.add_adapter("pemn_masks", PemnConfig(bank="rp"))
    assert set(get_peft_model_state_dict(model, adapter_name="default")) == keys


@behaves(
    "PEFT_TYPE_TO_PREFIX_MAPPING.PEMN",
    "CONFIG_KEYS_TO_CHECK.PEMN",
    "hotswap.hotswap_adapter_from_state_dict",
)
def masks_are_swapped(folder, door):
    model, path = saved(folder, "a")
    second, other = saved(folder, "b", task=2)
    swapped = load(path)
    models.assert_equal(models.logits(swapped), models.logits(model))
    hotswap.hotswap_adapter(swapped, other, "default", torch_device="cpu")
    models.assert_equal(models.logits(swapped), models.logits(second))


@behaves("hotswap.load_peft_weights", "hotswap._insert_adapter_name_into_state_dict")
def what_is_swapped_is_of_one_save(folder, door):
    _, path = saved(folder, "a", seed=1)
    _, other = saved(folder, "b", seed=1, task=2)
    model = load(path)
    with (
        saved_anew_after(hotswap, "check_hotswap_configs_compatible", path, other),
        pytest.raises(AdapterFileError, match="saved anew"),
    ):
        hotswap.hotswap_adapter(model, path, "default", torch_device="cpu")


@behaves("hotswap._convert_scalings_to_tensor")
def a_model_with_masks_is_prepared_for_swapping(folder, door):
    hotswap.prepare_model_for_compiled_hotswap(pemnify(models.net(), bank="own", selector="topk"))


@behaves(
    "AuxiliaryTrainingWrapper.disable_adapters",
    "AuxiliaryTrainingWrapper.active_adapters",
    "AuxiliaryTrainingWrapper.active_adapter",
)
def modules_saved_whole_answer_for_the_call(folder, door):
    model = pemnify(models.net(), bank="own", selector="topk", modules_to_save=["head"])
    model.add_adapter("b", PemnConfig(bank="own", selector="topk", modules_to_save=["head"]))
    head, layers = model.base_model.model.head, frozenset(choosing_layers(model))
    for names in (("b",), ()):
        with in_force.use(in_force.Chosen(names, layers)):
            assert head.disable_adapters is not bool(names)
            assert head.active_adapters == list(names)
            assert head.active_adapter == (names[0] if names else [])


@behaves("PeftAdapterMixin.add_adapter")
def a_failure_in_transformers_leaves_the_model(folder, door):
    model = models.bert()
    unchanged_by(model, door, lambda: model.add_adapter(PemnConfig(bank="mp")))
    with (
        mock.patch("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0"),
        pytest.raises(VersionsError, match=r"needs peft >= 99\.0"),
    ):
        model.add_adapter(PemnConfig(bank="mp"))


@behaves("PeftAdapterMixin.load_adapter")
def transformers_checks_what_it_loads(folder, door):
    _, path = saved(folder, "a", models.bert)
    weights = folder / "a" / models.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(AdapterFileError):
        models.bert().load_adapter(path)


@behaves("PushToHubMixin._upload_modified_files")
def a_pushed_card_says_how_masks_are_loaded(folder, door):
    model = models.bert()
    model.add_adapter(PemnConfig(bank="own", selector="topk"))
    model.save_pretrained(folder)
    with mock.patch("transformers.utils.hub.hf_api"):
        model._upload_modified_files(str(folder), "me/masks", {})
    assert "pemn_surgery" in (folder / "README.md").read_text()


@behaves("Trainer._save_checkpoint")
def checkpoints_hold_scores(folder, door):
    class State:
        def __getattr__(self, name):  # asked for first, so that nothing is written
            raise Fault(are_scores_kept(PemnConfig()))

    trainer = object.__new__(Trainer)
    trainer.state = State()
    with pytest.raises(Fault, match="True"):
        trainer._save_checkpoint(None, None)


@behaves(
    "checkpoint._checkpoint_without_reentrant_generator_impl",
    "CheckpointFunction.forward",
)
def both_runs_of_a_forward_read_the_same(folder, door):
    model = pemnify(models.net(), adapter_name="a", bank="mp")
    model.add_adapter("b", PemnConfig(bank="mp", density=0.25))
    x = models.images().requires_grad_()
    base, reentrant = model.get_base_model(), door.label.startswith("CheckpointFunction")
    (expected,) = torch.autograd.grad(base(x).sum(), x)
    loss = checkpoint(base, x, use_reentrant=reentrant).sum()
    model.set_adapter("b")
    loss.backward()
    models.assert_equal(x.grad, expected)


# The oracle's tools.


class Fault(Exception):
    """What goes wrong."""


@contextmanager
def failing_at_its_end(door):
    """Let the library's own function raise when it has done all that it does."""
    theirs = door.found()[2]
    code = inspect.unwrap(getattr(theirs, "__func__", theirs)).__code__

    failed = False

    def at_the_end(frame, event, _):
        nonlocal failed
        if event == "return" and not failed:
            raise Fault
        failed = event == "exception"
        return at_the_end

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: at_the_end if frame.f_code is code else None)
    try:
        yield
    finally:
        sys.settrace(before)


def unchanged_by(model, door, attempt):
    """A method of PEFT's or transformers' that fails has changed nothing."""
    picture = models.Snapshot(model, lambda m: m(input_ids=models.tokens()).logits.detach())
    with failing_at_its_end(door), pytest.raises(Fault):
        attempt()
    picture.assert_unchanged()


@contextmanager
def saved_anew_after(module, name, path, other):
    """Put another adapter's files in an adapter's place as soon as a function has run."""
    called = getattr(module, name)

    def and_save(*args, **kwargs):
        result = called(*args, **kwargs)
        for file in (models.WEIGHTS_FILE, "adapter_config.json"):
            content = (models.Path(other) / file).read_bytes()
            replace_file(models.Path(path) / file, content)
        return result

    with mock.patch.object(module, name, and_save):
        yield


def saved(folder, name, make=models.net, task=1, **options):
    """A model with trained masks, and the folder that it is saved to."""
    options = {"bank": "rp" if make is models.net else "own", **options}
    model = pemnify(make(), **options)
    if make is models.net:
        models.train(model, task)
    model.eval().save_pretrained(str(folder / name))
    return model, str(folder / name)


def load(path):
    return PeftModel.from_pretrained(models.net(), path).eval()


@contextmanager
def shut(door):
    door.shut()
    try:
        yield
    finally:
        door.open()


def without_annotations(function):
    signature = inspect.signature(function)
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))[1:-1]


def takes(door):
    """What a library's function takes now, as the table writes it."""
    owner, _, theirs = door.found()
    if isinstance(owner, dict):
        others = owner[peft.PeftType.LORA]
        return "type" if isinstance(others, type) else type(others).__name__
    if isinstance(theirs, property):
        return ""
    return without_annotations(getattr(theirs, "__func__", theirs))


def has_arguments(door):
    now, wanted = takes(door), door.takes
    return now.startswith(wanted[:-3]) if wanted.endswith("...") else now == wanted


each = pytest.mark.parametrize("door", doors.DOORS, ids=lambda door: door.label)


def test_there_are_doors_and_each_has_a_behaviour():
    assert len(doors.DOORS) > 30
    assert len(BY_LABEL) == len(doors.DOORS)
    assert set(BEHAVIOUR) == set(BY_LABEL)


@each
def test_it_takes_what_it_took(door):
    assert has_arguments(door), f"{door.said()} It takes {takes(door)!r}, and took {door.takes!r}."


@each
def test_it_does_what_it_is_for(door, tmp_path):
    try:
        BEHAVIOUR[door.label](tmp_path, door)
    except Exception as error:
        pytest.fail(f"{door.said()} It acts otherwise: {type(error).__name__}: {error}")


@each
def test_that_is_lost_without_it(door, tmp_path):
    with shut(door), pytest.raises((Exception, pytest.fail.Exception)):
        BEHAVIOUR[door.label](tmp_path, door)


def test_peft_still_registers_no_method_from_outside():
    """Should it ever, that replaces the three entries in its tables."""
    with pytest.raises(ValueError, match="PEMN"):
        register_peft_method(
            name="pemn", config_cls=PemnConfig, model_cls=pemn_surgery.adapters.PemnModel
        )


# The table is complete.


def namespaces():
    """(path, owner, attributes) of the other libraries' modules, classes and tables."""
    seen = {id(copyreg.dispatch_table)}  # Python's, for pickle; torch imports it
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in LIBRARIES or not hasattr(module, "__dict__"):
            continue
        yield module_name, vars(module)
        for name, value in list(vars(module).items()):
            if id(value) in seen or (type(value) is not dict and not isinstance(value, type)):
                continue
            seen.add(id(value))
            if type(value) is dict:
                yield f"{module_name}:{name}", value
            elif value.__module__.partition(".")[0] in LIBRARIES:
                yield f"{module_name}:{name}", vars(value)


def is_ours(value):
    if isinstance(value, (property, classmethod, staticmethod)):
        value = value.fget if isinstance(value, property) else value.__func__
    code = getattr(value, "__code__", None) if inspect.isfunction(value) else None
    home = str(models.ROOT)
    ours = (f"{home}/adapters/", f"{home}/pemn_surgery/")
    if code is not None:
        return code.co_filename.startswith(ours)
    return isinstance(value, type) and value.__module__.startswith("pemn_surgery")


@pytest.mark.filterwarnings("ignore")  # some names warn of themselves when they are looked at
def test_nothing_else_of_the_libraries_is_replaced():
    for module in pkgutil.walk_packages(pemn_surgery.__path__, "pemn_surgery."):
        if not module.name.endswith(("__main__", "._kernels")):  # that one has no Python in it
            importlib.import_module(module.name)
    found = {
        (id(attributes[name]), str(getattr(name, "value", name))): f"{path} {name}"
        for path, attributes in namespaces()
        for name in list(attributes)
        if is_ours(attributes[name])
    }
    listed = set()
    for door in doors.DOORS:
        owner, name, _ = door.found()
        held = owner[name] if isinstance(owner, dict) else vars(owner)[name]
        listed.add((id(held), str(getattr(name, "value", name))))
    assert len(found) > 25
    assert [said for key, said in found.items() if key not in listed] == []


def replaced_in(tree):
    """Lines of a module that assign to, or delete from, something that other libraries hold."""
    theirs = {
        (name.asname or name.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
        if not (getattr(node, "module", None) or name.name).startswith("pemn_surgery")
    }

    def is_theirs(node):
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            return is_theirs(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in ("cast", "getattr", "vars") and any(map(is_theirs, node.args))
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(map(is_theirs, node.elts))
        return isinstance(node, ast.Name) and node.id in theirs

    def names(target):
        return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}

    for _ in range(3):  # names for names of theirs
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and is_theirs(node.value):
                for target in node.targets:
                    if isinstance(target, (ast.Name, ast.Tuple)):
                        theirs |= names(target)
            elif isinstance(node, (ast.For, ast.comprehension)) and is_theirs(node.iter):
                theirs |= names(node.target)
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            if "sys.modules[" in ast.unparse(node):  # a module of one's own may be put there
                continue
            held = [one.value for one in targets if isinstance(one, (ast.Attribute, ast.Subscript))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "delattr")):
            held = node.args[:1]
        else:
            continue
        if any(map(is_theirs, held)):
            yield node.lineno


def test_no_other_file_replaces_anything():
    """What is replaced later than at import too."""
    folders = (models.ROOT / "adapters", models.ROOT / "pemn_surgery")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.name}:{line}"
        for path in files
        for line in replaced_in(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "from peft import PeftModel\nPeftModel.save_pretrained = 1",
        "from peft.utils import hotswap\nmodule = cast('Any', hotswap)\nmodule.TABLE['a'] = 1",
        "import a.b\nfor kind in (a.b.C, own):\n    setattr(kind, 'name', 1)",
        "import torch\none, two = torch, 1\ndel one.compile",
        "import torch\nvars(torch.nn)['Linear'] = 1",
    ],
)
def test_what_replaces_is_seen(code):
    assert list(replaced_in(ast.parse(code)))


def test_what_replaces_nothing_is_not():
    code = "import torch\nx = torch.zeros(2)\nx[0] = 1\nself.x = torch\nmodel.name = x"
    assert list(replaced_in(ast.parse(code))) == []


# Opening them.


def test_opening_again_changes_nothing():
    before = {door: door.found() for door in doors.DOORS}
    for late in (False, True):
        doors.install(late=late)
    assert {door: door.found() for door in doors.DOORS} == before
    assert PeftModel.save_pretrained.__wrapped__ is before[BY_LABEL["PeftModel.save_pretrained"]][2]


def test_all_or_none_are_opened(monkeypatch):
    first, gone = BY_LABEL["PeftModel.save_pretrained"], doors.Door(
        "peft.peft_model:PeftModel", "no_such_method", "self", lambda theirs: theirs, "it runs",
        "it does not"
    )  # fmt: skip
    monkeypatch.setattr(doors, "DOORS", (first, gone))
    with shut(first):
        theirs = PeftModel.save_pretrained
        with pytest.raises(VersionsError) as error:
            doors.install()
        assert PeftModel.save_pretrained is theirs
    models.says(
        error, f"PeftModel.no_such_method of peft {peft.__version__} is not what pemn_surgery",
        "so that it runs. Without that, it does not. Install versions",
    )  # fmt: skip


def test_an_owner_that_has_gone_is_named():
    gone = doors.Door("peft.utils.gone:Gone", "it", "self", lambda theirs: theirs, "a", "b")
    with pytest.raises(VersionsError, match=r"Gone\.it of peft"):
        gone.open()


def test_what_masks_can_do_without_is_a_warning(monkeypatch):
    door = BY_LABEL["checkpoint._checkpoint_without_reentrant_generator_impl"]
    with shut(door), monkeypatch.context() as patched:
        for name in (door.name, door.earlier):
            patched.delattr(torch.utils.checkpoint, name, raising=False)
        with pytest.warns(PemnWarning, match="switch no adapter between a forward under"):
            doors.install()


def test_an_earlier_name_is_found(monkeypatch):
    door = BY_LABEL["checkpoint._checkpoint_without_reentrant_generator_impl"]
    if not hasattr(torch.utils.checkpoint, door.name):
        pytest.skip("this torch has the earlier name")
    with shut(door), monkeypatch.context() as patched:
        patched.delattr(torch.utils.checkpoint, door.name)
        assert door.found()[1] == door.earlier


# Versions.


def project_ranges():
    text = (models.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return [line.strip().partition('",')[0].strip('"') for line in text.splitlines()]


def test_the_tested_ranges_are_the_projects():
    for library, (least, below) in adding.TESTED.items():
        assert f"{library}>={least}" + (f",<{below}" if below else "") in project_ranges()


@pytest.mark.parametrize(
    ("library", "version", "is_tested"),
    [
        (peft, "0.21.0", True), (peft, "0.21.9.post1", True), (peft, "0.22.0.dev0", False),
        (peft, "0.22rc1", False), (peft, "1.0", False), (peft, "0.20.3", False),
        (transformers, "5.18.0", True), (transformers, "5.23.4", True),
        (transformers, "5.24.0", False), (transformers, "6.0", False),
    ],
)  # fmt: skip
def test_an_untested_version_warns_once(library, version, is_tested, monkeypatch):
    monkeypatch.setattr(library, "__version__", version)
    adding.warn_of_untested.cache_clear()
    if is_tested:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adding.warn_of_untested()
        return
    least, below = adding.TESTED[library.__name__]
    said = f"{library.__name__} {version} is untested: .* was tested with >={least},<{below}"
    with pytest.warns(VersionsWarning, match=said):
        doors.install()
    doors.install()  # a second warning would be an error


# The page.


def table():
    """The doors as a table in Markdown; doors of one purpose share a row."""
    rows = {}
    for door in doors.DOORS:
        key = (f"{door.library} {door.since}", door.why, door.breaks)
        rows.setdefault(key, []).append(f"`{door.label}`")
    lines = ["| since | what is wrapped | so that | without it |", "|---|---|---|---|"]
    for (library, why, breaks), labels in rows.items():
        lines.append(f"| {library} | {', '.join(labels)} | {why} | {breaks} |")
    return "\n".join(lines)


def test_the_page_has_the_table():
    page = (models.ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert table() in page, f"docs/versions.md is to hold:\n{table()}"
