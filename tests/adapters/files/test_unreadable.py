"""Files that are there and cannot be read are called what they are, never missing or truncated."""

import errno
import os
import pathlib
import shutil

import pytest
from peft import PeftModel

from pemn_surgery import PemnConfig, compare_adapters, pemnify, recode
from pemn_surgery.adapters.files import adapter_file, disk
from pemn_surgery.errors import AdapterFileError
from tests.adapters import models

pytestmark = models.ignore_peft_on_transformers

WEIGHTS, CONFIG = models.WEIGHTS_FILE, "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    pemnify(models.net(), bank="rp").save_pretrained(str(tmp_path / "a"))
    return tmp_path / "a"


def a_folder(path):
    path.unlink()
    path.mkdir()
    return "it is a folder: Is a directory", "lie in its folder"


def a_dangling_link(path):
    path.unlink()
    path.symlink_to("/nowhere/at/all")
    return "it is a link to '/nowhere/at/all', which is not there", "get the file again"


def a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path)
    return "it is a link to", "which is not there: Too many levels"


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)
    return "it is a pipe, a socket or a device", "let this process read it"


PLACES = [a_folder, a_dangling_link, a_link_to_itself, a_pipe]


def doors(folder):
    model = pemnify(models.net(), bank="rp")
    return {
        "configuration": lambda: PemnConfig.from_pretrained(str(folder)),
        "from_pretrained": lambda: PeftModel.from_pretrained(models.net(), str(folder)),
        "load_adapter": lambda: model.load_adapter(str(folder), "other"),
        "load in its place": lambda: model.load_adapter(str(folder), "default"),
        "recode": lambda: recode(folder, "entropy", folder.parent / "out"),
        "compare": lambda: compare_adapters(folder, folder),
    }


def assert_named(folder, name, *said):
    found = doors(folder)
    assert len(found) == 6
    for door in found.values():
        with pytest.raises(AdapterFileError) as error:
            door()
        message = models.says(error, repr(str(folder / name)), "cannot be read", *said)
        models.says(error, "Nothing was loaded")
        assert "truncated" not in message
        assert "No such file" not in message or "which is not there" in message
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("put", PLACES)
def test_what_is_no_file(put, name, folder):
    assert_named(folder, name, *put(folder / name))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    ("number", "said"), [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error")]
)
def test_what_the_system_refuses(number, said, name, folder, monkeypatch):
    """Root may read everything, so the system's answer is put in its place."""
    whole = pathlib.Path.open

    def refuse(self, *args, **kwargs):
        if self == folder / name:
            raise OSError(number, os.strerror(number), str(self))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    assert_named(folder, name, said, "let this process read it (permissions, the disk)")


def test_an_error_of_the_disk_while_the_weights_are_read(folder, monkeypatch):
    """safetensors has the system's number in its words alone."""

    from safetensors import SafetensorError

    def broken(*args, **kwargs):
        raise SafetensorError("I/O error: Input/output error (os error 5)")

    monkeypatch.setattr(adapter_file, "safe_open", broken)
    with pytest.raises(AdapterFileError) as error:
        PemnConfig.from_pretrained(str(folder))
    message = models.says(error, WEIGHTS, "cannot be read", "(os error 5)", "the disk")
    assert "truncated" not in message


def test_damage_is_still_called_damage(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterFileError, match=r"\(100 bytes\) cannot be read: .*truncated or alt"):
        PemnConfig.from_pretrained(str(folder))
    path.write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"\(0 bytes\) cannot be read: .*truncated or alt"):
        PemnConfig.from_pretrained(str(folder))


def test_what_is_not_there_is_still_missing(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=r"has no adapter_model\.safetensors"):
        PeftModel.from_pretrained(models.net(), str(folder))
    assert PemnConfig.from_pretrained(str(folder)).origin.file is None
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="Can't find"):
        PemnConfig.from_pretrained(str(folder))


def test_a_folder_that_the_system_does_not_show(folder, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(pathlib.Path, "lstat", denied)
    with pytest.raises(AdapterFileError, match=r"adapter_config.json' cannot be read: Permission"):
        disk.is_there(folder / CONFIG)
    assert disk.is_there(folder / "nowhere" / CONFIG) is False  # a name on the hub


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "a\x00b", ""])
def test_names_of_no_file_are_not_there(name):
    assert disk.is_there(pathlib.Path(name) / CONFIG) is False
