"""Saves that die, damaged files: the old adapter, the new one, or a named error."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from safetensors.torch import load_file, save_file

from pemn_surgery import PemnConfig, pemnify
from pemn_surgery.adapters import config, guard
from pemn_surgery.adapters.files import atomic
from pemn_surgery.adapters.files.adapter_file import seal
from pemn_surgery.coding.header import CodingName
from pemn_surgery.errors import AdapterError, AdapterFileError, AdapterWriteError, ConfigError
from tests import fuzz
from tests.adapters import models

WEIGHTS, CONFIG, CARD = models.WEIGHTS_FILE, "adapter_config.json", "README.md"
MEMORY = Path("/dev/shm")  # a second file system, where there is one


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """What `tests.bench.kills` found with real kills; one process for all tests here."""
    result = tmp_path_factory.mktemp("kills") / "kills.json"
    command = ["-m", "tests.bench.kills", "--kills", "200", "--saves", "20", "--json", str(result)]
    if MEMORY.is_dir():  # flushing to a real disk takes most of the time; kills do not see it
        command += ["--on", str(MEMORY)]
    done = subprocess.run(
        [sys.executable, *command], cwd=models.ROOT, capture_output=True, text=True, timeout=900,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text(encoding="utf-8"))


def only(found, *names):
    """The counts are of these outcomes alone; return their sum."""
    assert {name for name, count in found.items() if count} <= set(names), found
    return sum(found.values())


@pytest.mark.slow
def test_killed_at_random_instants(deaths):
    found = deaths["random_kills"]
    assert only(found["found"], "A", "B", "old", "new") == 2 * found["kills"] == 400
    assert min(found["found"][name] for name in ("A", "B", "old", "new")) > 20
    assert found["loaded_whole"] == 10
    assert found["most_leftovers"] <= 1
    assert found["leftovers_at_the_end"] == []


@pytest.mark.slow
def test_killed_at_every_file_operation(deaths):
    """Among them the instant between the two renames, where the files are of two saves."""
    found = deaths["killed_at_every_operation"]
    assert found["operations"] >= 10
    assert found["ended"] == {"-9": found["operations"]}
    assert only(found["found"], "A", "B") == found["operations"] + 1
    assert found["found"]["A"] >= 5
    assert found["found"]["B"] >= 2
    assert found["files_of_two_saves"] == 1


@pytest.mark.slow
def test_no_room_at_every_file_operation(deaths):
    found = deaths["no_room_at_every_operation"]
    assert found["operations"] >= 8
    # 0: making a folder that exists, which needs no room; 40: the named error.
    assert only(found["ended"], "0", "40") == found["operations"]
    assert found["ended"]["40"] >= 10
    assert only(found["found"], "A", "B") == found["operations"] + 1
    assert found["found"]["B"] >= found["ended"]["0"]
    assert found["found"]["A"] >= 4


@pytest.mark.slow
def test_no_file_larger_than_a_limit(deaths):
    """The system refuses to write on: what a full disk does, in the middle of a file."""
    found = deaths["limited_sizes"]
    assert found["ended"] == {"40": found["limits"]}
    assert found["found"] == {"A": found["limits"]}
    assert found["limits"] >= 14


@pytest.mark.slow
def test_read_only_folder(deaths):
    assert deaths["read_only"] == {"found": "A", "ended": 40, "leftovers": []}


@pytest.mark.slow
def test_two_processes_save_to_one_place(deaths):
    found = deaths["two_processes"]
    assert found["ended"] == [0, 0]
    assert only(found["loads"], "A", "B") == 40
    assert found["found"] in {"A", "B"}
    assert found["leftovers_at_the_end"] == []


def trained(seed=0, **options):
    return models.train(pemnify(models.net(seed), bank="rp", **options), task=seed)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two adapters, of one base, with other masks, tensors and configuration."""
    folder = tmp_path_factory.mktemp("two")
    made = {"a": trained(0), "b": trained(1, density=0.25, scale="sqrt_density")}
    for name, model in made.items():
        model.save_pretrained(str(folder / name))
    return folder, {name: models.logits(model) for name, model in made.items()}


def mixed(two, folder):
    """The files as they lie after a kill between the two renames."""
    shutil.copytree(two[0] / "a", folder)
    shutil.copyfile(two[0] / "b" / WEIGHTS, folder / WEIGHTS)
    return folder


def test_weights_of_another_save_bring_their_configuration(two, tmp_path):
    folder = mixed(two, tmp_path / "mixed")
    assert PemnConfig.from_pretrained(str(folder)).scale == "sqrt_density"
    loaded = PeftModel.from_pretrained(models.net(2), str(folder))
    models.assert_equal(models.logits(loaded), two[1]["b"])
    models.assert_differs(two[1]["a"], two[1]["b"])
    other = PeftModel.from_pretrained(models.net(2), str(two[0] / "a"))
    other.load_adapter(str(folder), "late")
    other.set_adapter("late")
    models.assert_equal(models.logits(other), two[1]["b"])


def test_what_peft_adds_to_a_configuration_is_not_added_to_the_seal(two, tmp_path):
    trained(0, modules_to_save=["head"]).save_pretrained(str(tmp_path / "c"))
    shutil.copyfile(two[0] / "a" / CONFIG, tmp_path / "c" / CONFIG)
    config = PemnConfig.from_pretrained(str(tmp_path / "c"))
    config.modules_to_save.append("classifier")
    assert config.origin.file.sealed["modules_to_save"] == ["head"]


def test_the_next_save_mends_the_folder(two, tmp_path):
    folder = mixed(two, tmp_path / "mixed")
    loaded = PeftModel.from_pretrained(models.net(2), str(folder))
    loaded.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert written["scale"] == "sqrt_density"
    assert written["digest"] == PemnConfig.from_pretrained(str(folder)).origin.file.sealed["digest"]


def test_masks_saved_over_another_method(two, tmp_path):
    """A kill leaves the other method's configuration, whose type PEFT would go by."""
    folder = mixed(two, tmp_path / "mixed")
    lora = get_peft_model(models.net(), LoraConfig(target_modules=["head"], r=2))
    lora.peft_config["default"].save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(models.net(2), str(folder))
    models.assert_equal(models.logits(loaded), two[1]["b"])
    with pytest.raises(AdapterFileError, match=r"'LORA'.*weights beside it are masks") as error:
        loaded.load_adapter(str(folder), "late")
    models.says(error, "Nothing was loaded", "PeftModel.from_pretrained")
    assert list(loaded.peft_config) == ["default"]


def test_what_is_not_of_the_masks_may_be_edited(two, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(two[0] / "a", folder)
    edit(folder, base_model_name_or_path="somewhere/else", task_type="SEQ_CLS")
    config = PemnConfig.from_pretrained(str(folder))
    assert (config.base_model_name_or_path, config.task_type) == ("somewhere/else", "SEQ_CLS")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": "sqrt_density"}, ("scale='sqrt_density'", "saved with None", "(1 such fields)")),
        ({"seed": 1, "density": 0.1}, ("density=0.1", "with 0.5", "(2 such fields)")),
        ({"peft_type": "LORA"}, ("peft_type='LORA'", "'PEMN'")),
        ({"task_type": "SEQ_CLZ"}, ("is no configuration", "SEQ_CLZ")),
    ],
)
def test_what_decides_the_masks_may_not(two, tmp_path, changes, said):
    folder = tmp_path / "a"
    shutil.copytree(two[0] / "a", folder)
    edit(folder, **changes)
    with pytest.raises(AdapterFileError) as error:
        PemnConfig.from_pretrained(str(folder))
    models.says(error, CONFIG, "truncated or altered", "Nothing was loaded", *said)
    base = models.net(2)
    before = models.Snapshot(base)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, str(folder))
    before.assert_unchanged()


def edit(folder, **changes):
    path = folder / CONFIG
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, **changes}), encoding="utf-8")


def test_weights_written_by_a_tool_that_drops_the_seal(two, tmp_path):
    """The same tensors are the same adapter; others are refused until the digest is removed."""
    folder = tmp_path / "a"
    shutil.copytree(two[0] / "a", folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS)
    loaded = PeftModel.from_pretrained(models.net(2), str(folder))
    models.assert_equal(models.logits(loaded), two[1]["a"])
    key = next(key for key in tensors if key.endswith("running_mean"))
    tensors[key] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterFileError) as error:
        PeftModel.from_pretrained(models.net(2), str(folder))
    models.says(error, CONFIG, "other weights", 'remove "digest"')
    models.forget_digest(folder)
    changed = PeftModel.from_pretrained(models.net(2), str(folder))
    models.assert_differs(models.logits(changed), two[1]["a"])


def test_equal_adapters_are_equal_files(two, tmp_path):
    for name in ("once", "again"):
        trained(0).save_pretrained(str(tmp_path / name))
    for name in (WEIGHTS, CONFIG, CARD):
        first, second = ((tmp_path / place / name).read_bytes() for place in ("once", "again"))
        assert first == second, name


def test_what_else_lies_there_stays(two, tmp_path):
    """Tokenizers, checkpoints, other adapters, and what people wrote into the card."""
    model = trained(0)
    model.save_pretrained(str(tmp_path))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "tokenizer.json").write_text("{}")
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    (tmp_path / CARD).write_text(f"{card}\nOur own words.\n", encoding="utf-8")
    shutil.copytree(two[0] / "b", tmp_path / "other")
    model.save_pretrained(str(tmp_path))
    assert "Our own words." in (tmp_path / CARD).read_text(encoding="utf-8")
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").read_bytes() == b"state"
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    other = {f"other/{name}" for name in (WEIGHTS, CONFIG, CARD)}
    assert names == {WEIGHTS, CONFIG, CARD, "tokenizer.json", "checkpoint-1/optimizer.pt", *other}


def test_adapters_by_name(tmp_path):
    model = trained(0)
    model.add_adapter("late", PemnConfig(bank="rp", density=0.25))
    model.save_pretrained(str(tmp_path), selected_adapters=["late"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, "late"]
    model.save_pretrained(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "late").iterdir()) == [CONFIG, WEIGHTS]
    both = PeftModel.from_pretrained(models.net(2), str(tmp_path))
    both.load_adapter(str(tmp_path / "late"), "late")
    for name in ("default", "late"):
        model.set_adapter(name)
        both.set_adapter(name)
        models.assert_equal(models.logits(both), models.logits(model))


def test_adapter_on_another_disk(tmp_path):
    """An adapter's folder that is a link elsewhere: nothing can be renamed into it from here."""
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    model = trained(0)
    model.add_adapter("late", PemnConfig(bank="rp"))
    elsewhere = MEMORY / f"pemn_{os.getpid()}"
    elsewhere.mkdir()
    try:
        (tmp_path / "late").symlink_to(elsewhere)
        model.save_pretrained(str(tmp_path))
        assert sorted(path.name for path in elsewhere.iterdir()) == [CONFIG, WEIGHTS]
        PemnConfig.from_pretrained(str(tmp_path / "late"))
    finally:
        shutil.rmtree(elsewhere)


def test_a_state_dict_that_is_passed_in(two, tmp_path):
    model = trained(0)
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict())
    assert (tmp_path / WEIGHTS).read_bytes() == (two[0] / "a" / WEIGHTS).read_bytes()


def test_other_ranks_write_nothing(tmp_path):
    trained(0).save_pretrained(str(tmp_path), is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_a_checkpoint_are_sealed(tmp_path):
    model = trained(0)
    model.peft_config["default"].keep_scores = True
    model.save_pretrained(str(tmp_path))
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterFileError, match="says digest"):
        PemnConfig.from_pretrained(str(tmp_path))


def test_pickle_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"safe_serialization=False.*Nothing was written"):
        trained(0).save_pretrained(str(tmp_path / "new"), safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "_put_adapter", no_room)
    with pytest.raises(AdapterWriteError) as error:
        trained(0).save_pretrained(str(tmp_path / "new"))
    models.says(error, tmp_path / "new", "cannot be written", "No space left", "Make room")
    assert error.value.errno == errno.ENOSPC
    assert isinstance(error.value, OSError)
    assert list(tmp_path.iterdir()) == []


def test_what_peft_refuses_it_still_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        trained(0).save_pretrained(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        trained(0).save_pretrained(str(tmp_path / "new"), selected_adapters=["none"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def doors(folder):
    """Every way to load a local adapter: a model that must stay as it is, and what loads."""
    peft = trained(2)
    bert = models.bert()
    return {
        "from_pretrained": (models.net(2), lambda m: PeftModel.from_pretrained(m, folder), None),
        "under a new name": (peft, lambda m: m.load_adapter(folder, "late"), None),
        "under its own name": (peft, lambda m: m.load_adapter(folder, "default"), None),
        "transformers": (bert, lambda m: m.load_adapter(folder), run_bert),
    }


def run_bert(model):
    model.eval()
    with torch.no_grad():
        return model(models.tokens()).logits


@models.ignore_peft_on_transformers
@pytest.mark.parametrize("damage", ["truncated", "a float altered", "no weights", "pickle alone"])
@pytest.mark.parametrize(
    "door", ["from_pretrained", "under a new name", "under its own name", "transformers"]
)
def test_every_door_names_the_damage(tmp_path, door, damage):
    made = models.bert() if door == "transformers" else models.net()
    pemnify(made, bank="rp", rest="train").save_pretrained(str(tmp_path))
    path = tmp_path / WEIGHTS
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    elif damage == "a float altered":
        path.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    else:
        path.unlink()
        if damage == "pickle alone":
            torch.save({}, tmp_path / "adapter_model.bin")
    model, load, run = doors(str(tmp_path))[door]
    before = models.Snapshot(model, run)
    with pytest.raises(
        AdapterFileError, match="pickle" if damage.startswith("p") else "othing was"
    ):
        load(model)
    before.assert_unchanged()


@models.ignore_peft_on_transformers
def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Also where a pickled file lies beside the whole one and transformers is told to prefer it."""
    made = pemnify(models.bert(), bank="rp")
    made.save_pretrained(str(tmp_path / "bert"))
    torch.save({}, tmp_path / "bert" / "adapter_model.bin")
    trained(0).save_pretrained(str(tmp_path / "net"))

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for place, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(place, name, refuse)
    folder = str(tmp_path / "net")
    model = PeftModel.from_pretrained(models.net(1), folder)
    model.load_adapter(folder, "late")
    model.load_adapter(folder, "default")
    models.assert_equal(models.logits(model), models.logits(trained(0)))
    bert = models.bert(1)
    bert.load_adapter(str(tmp_path / "bert"), use_safetensors=False)
    models.assert_equal(run_bert(bert), run_bert(made))


@models.ignore_peft_on_transformers
def test_transformers_loads_what_a_kill_left(tmp_path):
    made = pemnify(models.bert(), bank="rp", scale="sqrt_density", density=0.3)
    pemnify(models.bert(), bank="rp").save_pretrained(str(tmp_path / "sub"))
    made.save_pretrained(str(tmp_path / "new"))
    shutil.copyfile(tmp_path / "new" / WEIGHTS, tmp_path / "sub" / WEIGHTS)
    loaded = models.bert(1)
    loaded.load_adapter(str(tmp_path), adapter_kwargs={"subfolder": "sub"})
    models.assert_equal(run_bert(loaded), run_bert(made))


@models.ignore_peft_on_transformers
def test_transformers_own_save_has_no_seal_and_loads(tmp_path):
    """Its writer takes no metadata of ours; also after a sealed adapter was loaded."""
    made = pemnify(models.bert(), bank="rp")
    made.save_pretrained(str(tmp_path / "sealed"))
    held = models.bert(1)
    held.load_adapter(str(tmp_path / "sealed"))
    held.save_pretrained(str(tmp_path / "own"))
    config = PemnConfig.from_pretrained(str(tmp_path / "own"))
    assert config.digest is None
    assert config.origin.file.sealed is None
    again = models.bert(2)
    again.load_adapter(str(tmp_path / "own"))
    models.assert_equal(run_bert(again), run_bert(made))


def save_b_after(monkeypatch, two, folder, place, name):
    """Let another process's save take the adapter's place as soon as something was called."""
    called = getattr(place, name)

    def and_save(*args, **kwargs):
        result = called(*args, **kwargs)
        for file in (WEIGHTS, CONFIG):
            atomic.replace_file(folder / file, (two[0] / "b" / file).read_bytes())
        return result

    monkeypatch.setattr(place, name, and_save)


@pytest.mark.parametrize(
    ("place", "gets"), [((guard, "check_adapter"), "a"), ((config, "read_json"), "b")]
)
@pytest.mark.parametrize("door", ["from_pretrained", "a new name", "its own name", "mapped keys"])
def test_saved_anew_while_it_is_loaded(two, tmp_path, monkeypatch, door, place, gets):
    """A load gets one of the two adapters whole, whichever of its steps the save comes after."""
    folder = tmp_path / "a"
    shutil.copytree(two[0] / "a", folder)
    if door == "from_pretrained":
        save_b_after(monkeypatch, two, folder, *place)
        model = PeftModel.from_pretrained(models.net(2), str(folder))
    else:
        name = "default" if door == "its own name" else "late"
        options = {"key_mapping": {"^nothing$": ""}} if door == "mapped keys" else {}
        model = PeftModel.from_pretrained(models.net(2), str(two[0] / gets))
        save_b_after(monkeypatch, two, folder, *place)
        model.load_adapter(str(folder), name, **options)
        model.set_adapter(name)
    models.assert_equal(models.logits(model), two[1][gets])


@models.ignore_peft_on_transformers
def test_transformers_loads_what_it_checked(tmp_path, monkeypatch):
    made = {name: pemnify(models.bert(), bank="rp", seed=seed) for seed, name in enumerate("ab")}
    for name, model in made.items():
        model.save_pretrained(str(tmp_path / name))
    folder = tmp_path / "place"
    shutil.copytree(tmp_path / "a", folder)
    save_b_after(monkeypatch, (tmp_path,), folder, guard, "check_adapter")
    loaded = models.bert(1)
    loaded.load_adapter(str(folder))
    models.assert_equal(run_bert(loaded), run_bert(made["a"]))
    models.assert_differs(run_bert(made["b"]), run_bert(made["a"]))


def test_swapped_while_saved_anew(two, tmp_path, monkeypatch):
    """PEFT compares the configuration first, and reads the weights after that."""
    folder = tmp_path / "a"
    shutil.copytree(two[0] / "a", folder)
    model = PeftModel.from_pretrained(models.net(2), str(folder))
    before = models.Snapshot(model)
    save_b_after(monkeypatch, two, folder, hotswap, "check_hotswap_configs_compatible")
    with pytest.raises(AdapterFileError, match=r"saved anew while it was read.*swap it again"):
        hotswap.hotswap_adapter(model, str(folder), adapter_name="default")
    before.assert_unchanged()


def test_a_name_keeps_its_configuration(two):
    """PEFT loads weights alone where the name exists: they must mean the same there."""
    model = PeftModel.from_pretrained(models.net(2), str(two[0] / "a"))
    before = models.Snapshot(model)
    with pytest.raises(AdapterError) as error:
        model.load_adapter(str(two[0] / "b"), "default")
    models.says(
        error, "'default'", "density=0.5", "0.25", "(2 such settings)", "name of its own",
        "Nothing was changed",
    )  # fmt: skip
    before.assert_unchanged()


@pytest.fixture(scope="module", params=sorted(fuzz.BANKS))
def case(request, tmp_path_factory):
    return fuzz.Case(tmp_path_factory.mktemp("fuzz"), request.param)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:The configuration file")
def test_damage_is_named_or_harmless(case, rng):
    how = case.damage(rng)
    assert not case.outcome().startswith("WRONG"), how


@settings(max_examples=300)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_one_altered_byte_is_named_or_harmless(case, data):
    name = data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(case.whole[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    for other, whole in case.whole.items():
        (case.folder / other).write_bytes(content if other == name else whole)
    assert not case.outcome().startswith("WRONG")


def test_the_fuzzer_damages_every_coding(case):
    for name, whole in case.whole.items():
        (case.folder / name).write_bytes(whole)
    stored = PemnConfig.from_pretrained(str(case.folder)).origin.file.headers
    found = {mask.coding for mask in stored.values()}
    assert found == {case.coding, "entropy", "bits"}
    assert {*fuzz.BANKS, "bits"} == set(get_args(CodingName))


def test_the_fuzzer_damages_codes_of_several_densities(tmp_path):
    tensors = fuzz.Case(tmp_path, "entropy").tensors
    stored = [bytes(value.tolist()) for key, value in tensors.items() if key.endswith(".bits")]
    densities = {int.from_bytes(content[6:8], "little") for content in stored if content[5] == 1}
    assert len(densities) > 1
    assert {content[5] for content in stored} == {0, 1}


def test_the_oracle_of_the_fuzzer_sees_other_adapters(case):
    """A float altered where nothing covers it is a wrong outcome, not an equal one."""
    for name, whole in case.whole.items():
        (case.folder / name).write_bytes(whole)
    assert case.outcome() == "equal"
    tensors = {**case.tensors}
    key = next(key for key in tensors if key.endswith("running_mean"))
    tensors[key] = tensors[key] + 1
    save_file(tensors, case.folder / WEIGHTS)
    models.forget_digest(case.folder)
    assert case.outcome() == "WRONG: other tensors"
    save_file(case.tensors, case.folder / WEIGHTS)
    edit(case.folder, scale="sqrt_density")
    assert case.outcome() == "WRONG: another meaning"


def test_a_file_with_a_digest_that_was_made_to_fit_is_one_of_its_own(case):
    """Against damage, not against forgery; the fuzzer knows the digest by the document alone."""
    for name, whole in case.whole.items():
        (case.folder / name).write_bytes(whole)
    assert fuzz.sealed_digest(case.whole[WEIGHTS]) == case.digest
    path, tensors = case.folder / WEIGHTS, {**case.tensors}
    key = next(key for key in tensors if key.endswith("running_mean"))
    tensors[key] = tensors[key] + 1
    save_file(tensors, path)
    assert fuzz.sealed_digest(path.read_bytes()) is None
    sealed = seal(path, json.loads(case.whole[CONFIG]))
    save_file(tensors, path, metadata={"pemn": json.dumps(sealed)})
    assert case.outcome() == "resealed"
    save_file(case.tensors, path, metadata={"pemn": json.dumps(sealed)})
    assert case.outcome() == "AdapterFileError"


@pytest.mark.parametrize("coding", sorted(fuzz.BANKS))
def test_the_fuzzer_runs_in_limited_memory(coding, tmp_path):
    result = tmp_path / "fuzz.json"
    command = ["-m", "tests.fuzz", "--files", "200", "--loads", "20", "--json", str(result)]
    command += ["--coding", coding]
    done = subprocess.run(
        [sys.executable, *command, "--seed", str(random.SystemRandom().randrange(2**32))],
        cwd=models.ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["read"]["cases"], found["loaded"]["cases"]) == (200, 20)
    assert len(found["read"]["outcomes"]) >= 12
