"""The recipe on compressed masks: sizes, code lengths and a small run against slow oracles."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pemn_surgery.coding import bits, codec
from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe import load, networks
from pemn_surgery.recipe.options import ImageOptions
from pemn_surgery.recipe.pretrained import pretrained
from pemn_surgery.report.tables import as_markdown
from tests import reader

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "mask_compression"
RECIPE = load(FOLDER)
RUN = RECIPE.module("run")
DATA, NETWORKS, CODERS, STRUCTURE = RUN.DATA, RUN.NETWORKS, RUN.CODERS, RUN.STRUCTURE
GZIP = {"gzip": lambda data: gzip.compress(data, 9, mtime=0)}


class Block(nn.Module):
    """A basic block with an option-A shortcut (He et al. 2016, section 4.2)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.grows = inputs != outputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2 if self.grows else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grows:
            side = out.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return F.relu(out + x)


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


# -- bytes -----------------------------------------------------------------------------------------


def packed_by_hand(masks):
    """One bit a mask, the first lowest, layer after layer."""
    flat = [int(bit) for mask in masks for bit in mask.reshape(-1).tolist()]
    flat += [0] * (-len(flat) % 8)
    return bytes(sum(b << i for i, b in enumerate(flat[n : n + 8])) for n in range(0, len(flat), 8))


def known_masks():
    """1,000 weights of which 900 are kept, and 24 that are all kept."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(1000, dtype=torch.bool)
    mask[torch.randperm(1000, generator=generator)[:100]] = False
    return {"a": mask.view(10, 100), "b": torch.ones(2, 12, dtype=torch.bool)}


def test_sizes_and_reductions_of_a_known_mask():
    masks = known_masks()
    tools = GZIP | {"bz2": lambda data: bz2.compress(data, 9)}
    found = CODERS.of_masks(masks, tools)
    flat = bytes(int(b) for mask in masks.values() for b in mask.reshape(-1).tolist())
    assert found["weights"] == 1024
    assert found["layers"] == {"a": (1000, 900), "b": (24, 24)}
    assert found["density"] == {"all": 924 / 1024, "min": 0.9, "max": 1.0}
    bound = 1000 * (0.9 * math.log2(1 / 0.9) + 0.1 * math.log2(1 / 0.1)) / 8
    stored = [codec.encode(bits.pack(mask)).numel() for mask in masks.values()]
    assert stored[1] == 35  # 32 + 24 / 8: all ones, but too few to code
    expected = {
        "ours": stored[0] + 35,
        "payload": stored[0] - 32 + 3,
        "bound": pytest.approx(bound),
        "packed": {
            "gzip": len(gzip.compress(packed_by_hand(masks.values()), 9)),
            "bz2": len(bz2.compress(packed_by_hand(masks.values()))),
        },
        "unpacked": {"gzip": len(gzip.compress(flat, 9)), "bz2": len(bz2.compress(flat))},
    }
    assert found["bytes"] == expected
    for key in ("ours", "payload"):
        saved = 100 * (128 - expected[key]) / 128
        assert found["reduction"][key] == pytest.approx(saved, abs=6e-4)
    saved = 100 * (128 - expected["unpacked"]["bz2"]) / 128
    assert found["reduction"]["unpacked"]["bz2"] == pytest.approx(saved, abs=6e-4)


def test_floats_are_measured_as_they_lie_in_memory():
    tensors = {"a": torch.arange(300.0).view(3, 100), "b": torch.zeros(700)}
    data = np.concatenate([np.arange(300, dtype="<f4"), np.zeros(700, "<f4")]).tobytes()
    found = CODERS.of_floats(tensors, GZIP)
    size = len(gzip.compress(data, 9))
    assert found["bytes"] == {"raw": 4000, "gzip": size}
    assert found["reduction"] == {"gzip": pytest.approx(100 * (1 - size / 4000), abs=6e-4)}


def test_tools_give_back_what_they_were_given():
    cramjam = pytest.importorskip("cramjam")
    data = np.random.default_rng(0).choice([255, 254, 127], 5000).astype("u1").tobytes()
    back = {
        "gzip": gzip.decompress,
        "bz2": bz2.decompress,
        "lzma": lzma.decompress,
        "lz4": lambda code: bytes(cramjam.lz4.decompress_block(code, output_len=5000)),
        "snappy": lambda code: bytes(cramjam.snappy.decompress_raw(code)),
        "zstd": lambda code: bytes(cramjam.zstd.decompress(code)),
        "brotli": lambda code: bytes(cramjam.brotli.decompress(code)),
    }
    tools = CODERS.tools()
    assert set(tools) == set(back) == set(RECIPE.module("tables").TOOLS)
    for name, tool in tools.items():
        assert back[name](tool(data)) == data, name
        assert len(tool(data)) < 5000


def test_lz4_adds_to_noise_what_the_paper_found():
    pytest.importorskip("cramjam")
    noise = np.random.default_rng(0).integers(0, 256, 100_000, dtype="u1").tobytes()
    saved = 100 * (1 - len(CODERS.tools()["lz4"](noise)) / len(noise))
    assert round(saved, 2) == RECIPE.published["fine-tuned"]["lz4"]


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(CODERS.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"zstd and brotli need cramjam: pip install cramjam"):
        CODERS.tools()


# -- structure -------------------------------------------------------------------------------------


def layer(seed=0, shape=(6, 5, 3, 3), density=0.8, with_other=True):
    random = np.random.default_rng(seed)
    other = random.random(shape) < 0.7 if with_other else None
    return STRUCTURE.Layer(random.random(shape) < density, random.normal(size=shape), other)


def sequential_lengths(mask, context):
    """Count bit by bit: shares of all, and Krichevsky and Trofimov's estimate of the next."""
    pairs = list(zip(context.reshape(-1).tolist(), mask.reshape(-1).tolist(), strict=True))
    whole = {c: [b for d, b in pairs if d == c] for c, _ in pairs}
    seen = {c: [0, 0] for c in whole}
    ideal = adaptive = 0.0
    for place, bit in pairs:
        ideal -= math.log2(whole[place].count(bit) / len(whole[place]))
        adaptive -= math.log2((seen[place][bit] + 0.5) / (sum(seen[place]) + 1))
        seen[place][bit] += 1
    return ideal, adaptive


@pytest.mark.parametrize("name", list(STRUCTURE.CONTEXTS))
def test_lengths_are_those_of_a_coder_that_goes_bit_by_bit(name):
    given = layer()
    context = STRUCTURE.CONTEXTS[name](given)
    assert context.shape == given.mask.shape
    assert context.min() >= 0
    found = STRUCTURE.lengths(given.mask, context)
    assert found == pytest.approx(sequential_lengths(given.mask, context))


def test_contexts_that_look_at_neighbours_are_those_of_loops():
    given = layer()
    near = STRUCTURE.CONTEXTS["left and upper neighbour"](given)
    before = STRUCTURE.CONTEXTS["tap and ones before it in the kernel"](given)
    for o, i, y, x in np.ndindex(given.mask.shape):
        left = int(given.mask[o, i, y, x - 1]) if x else 2
        up = int(given.mask[o, i, y - 1, x]) if y else 2
        assert near[o, i, y, x] == 3 * left + up
        ones = int(given.mask[o, i].reshape(-1)[: 3 * y + x].sum())
        assert before[o, i, y, x] == 10 * (3 * y + x) + ones


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 7, 1, 1)])
def test_places_and_quantiles(shape):
    given = layer(shape=shape)
    found = {name: context(given) for name, context in STRUCTURE.CONTEXTS.items()}
    order = np.sort(np.abs(given.weight).reshape(-1))
    for o, i, y, x in np.ndindex(shape):
        assert found["output filter"][o, i, y, x] == o
        assert found["input channel"][o, i, y, x] == i
        assert found["tap"][o, i, y, x] == shape[3] * y + x
        rank = np.searchsorted(order, abs(given.weight[o, i, y, x]))
        assert found["|weight|"][o, i, y, x] == rank * 16 // order.size
        other = int(given.other[o, i, y, x])
        assert found["another task's mask"][o, i, y, x] == other
        both = found["another task's mask and |weight|"][o, i, y, x]
        assert both == 2 * found["|weight|"][o, i, y, x] + other


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 7, 1, 1)])
def test_a_decoder_has_the_features_before_the_bit(shape):
    """Bits from a place on are turned around: no feature up to that place may change."""
    given = layer(shape=shape)
    for place in range(0, given.mask.size, 7):
        flat = given.mask.copy().reshape(-1)
        flat[place:] = np.random.default_rng(place).permutation(flat[place:])  # the density stays
        other = dataclasses.replace(given, mask=flat.reshape(shape))
        for part in STRUCTURE.SETS["decoded bits, weights, another task's mask"]:
            for one, two in zip(part(given), part(other), strict=True):
                first, second = one.reshape(-1)[: place + 1], two.reshape(-1)[: place + 1]
                np.testing.assert_array_equal(first, second)


def test_counts_so_far_are_those_of_loops():
    given = layer(shape=(4, 3, 2, 2))
    mask, share = given.mask, given.mask.mean()
    in_filter, kernel, channel, place, tap, left, up = STRUCTURE._counts(given)

    def deviation(seen):
        ones, zeros = np.sum(seen) + 4 * share, np.size(seen) - np.sum(seen) + 4 * (1 - share)
        return pytest.approx(math.log(ones / zeros) - math.log(share / (1 - share)), abs=1e-9)

    for n, (o, i, y, x) in enumerate(np.ndindex(mask.shape)):
        row = mask[o].reshape(-1)
        assert in_filter.reshape(-1)[n] == deviation(row[: n % 12])
        assert kernel.reshape(-1)[n] == deviation(mask[o, i].reshape(-1)[: 2 * y + x])
        assert channel.reshape(-1)[n] == deviation(mask[:o, i])
        assert place.reshape(-1)[n] == deviation(mask[:o, i, y, x])
        assert tap.reshape(-1)[n] == deviation(mask.reshape(12, 2, 2)[: 3 * o + i, y, x])
        assert left[o, i, y, x] == (mask[o, i, y, x - 1] - share if x else 0)
        assert up[o, i, y, x] == (mask[o, i, y - 1, x] - share if y else 0)


def test_ones_by_magnitude_are_counted():
    layers = [layer(0), layer(1, shape=(4, 7, 1, 1))]
    ones, total = [0] * 16, [0] * 16
    for given in layers:
        pairs = zip(np.abs(given.weight).reshape(-1), given.mask.reshape(-1), strict=True)
        for rank, (_, bit) in enumerate(sorted(pairs)):
            ones[16 * rank // given.mask.size] += int(bit)
            total[16 * rank // given.mask.size] += 1
    expected = [one / all_ for one, all_ in zip(ones, total, strict=True)]
    assert STRUCTURE.ones_by_magnitude(layers) == pytest.approx(expected)


def planted(seed, linked):
    """A layer whose bits have log odds 2 - 3 (|weight| in its upper half), or 2."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(32, 32, 3, 3))
    large = np.abs(weight) > np.median(np.abs(weight))
    share = 1 / (1 + np.exp(-(2 - 3 * large * linked)))
    true = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum() / 8
    return STRUCTURE.Layer(random.random(weight.shape) < share, weight), true


def test_what_was_planted_is_found_and_paid_for():
    layers, lengths = zip(*(planted(seed, linked=True) for seed in (0, 1)), strict=True)
    found = STRUCTURE.combined(layers)
    true = sum(lengths)
    alone = STRUCTURE.alone(layers)["layer"]["ideal"]
    assert true < 0.9 * alone
    paid = {"decoded bits": 2 * (8 + 2), "decoded bits, weights": 2 * (38 + 2)}  # coefficients
    lengths = {name: found[name]["adaptive"] - numbers for name, numbers in paid.items()}
    assert lengths["decoded bits, weights"] == pytest.approx(true, rel=0.01)
    assert lengths["decoded bits"] == pytest.approx(alone, rel=0.01)


def test_independent_bits_have_no_structure():
    layers = [planted(seed, linked=False)[0] for seed in (0, 1)] + [layer(density=2.0)]
    bound = STRUCTURE.alone(layers)["layer"]["ideal"]
    found = STRUCTURE.combined(layers)
    assert len(found) == 3
    for coefficients, length in zip((8, 38, 40), found.values(), strict=True):
        content = length["adaptive"] - 2 * (coefficients + 3)
        assert 0.98 * bound < content <= bound


# -- networks and tasks ----------------------------------------------------------------------------


def published_like(blocks):
    """A network of the published weights' names and shapes, with random weights and statistics."""
    torch.manual_seed(0)
    model = ResNet20()
    for name in ("layer1", "layer2", "layer3"):
        setattr(model, name, getattr(model, name)[:blocks])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def save_published(folder, blocks):
    model = published_like(blocks)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / f"resnet{6 * blocks + 2}-12fca82f.th")
    return model


@pytest.mark.parametrize("blocks", [1, 3])
def test_published_weights_are_read_as_meant(tmp_path, blocks):
    model, depth = save_published(tmp_path, blocks), 6 * blocks + 2
    ours = pretrained(f"resnet{depth}", depth, tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))
    assert model(x).std() > 0.1


def test_missing_and_other_weights_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"needs one file resnet8-\*\.th; it has \[\]"):
        pretrained("resnet8", 8, tmp_path)
    save_published(tmp_path, 1)
    with pytest.raises(RecipeError, match="does not fit a ResNet of depth 20"):
        pretrained("resnet8", 20, tmp_path)


def test_a_new_head_has_no_bias_and_follows_its_seed():
    heads = [NETWORKS.with_head(networks.resnet(8), 4, seed)[-1].weight for seed in (3, 3, 4)]
    assert heads[0].shape == (4, 64)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_rotation_turns_each_image_by_its_label(images, tmp_path):
    given = ImageOptions(case="resnet20", work=tmp_path, data=str(images))
    pictures = RECIPE.images("resnet20").load(given)
    splits = DATA.task("rotation").splits(lambda: pictures)
    assert list(splits) == ["train", "test"]
    for (name, (turned, labels)), count in zip(splits.items(), (40, 12), strict=True):
        plain, _ = pictures[name]
        assert turned.shape == plain.shape == (count, 3, 32, 32)
        assert {0, 1, 3} <= set(labels.tolist()) <= {0, 1, 2, 3}
        for image, before, quarters in zip(turned, plain, labels.tolist(), strict=True):
            expected = np.rot90(before.numpy(), quarters, (1, 2))
            np.testing.assert_array_equal(image.numpy(), expected)


def test_digits_are_grey_and_enlarged(tmp_path):
    (train, labels), (test, others) = DATA.task("digits").splits(None).values()
    assert (train.shape, test.shape) == ((1347, 3, 16, 16), (450, 3, 16, 16))
    assert set(labels.tolist()) == set(others.tolist()) == set(range(10))
    assert torch.equal(train[:, 0], train[:, 2])
    from sklearn.datasets import load_digits

    given = load_digits().images / 16
    means = torch.cat([train, test])[:, 0].float().mean((1, 2)).sort().values / 255
    np.testing.assert_allclose(means.numpy(), np.sort(given.mean((1, 2))), atol=0.02)


def test_an_unknown_task_is_refused_before_anything_is_trained(small):
    _, recipe, options = small
    wrong = dataclasses.replace(options, tasks=("faces",))
    with pytest.raises(RecipeError, match=r"'faces' is unknown; give one of \['digits', 'rot"):
        run(recipe, wrong)


def test_images_are_normalised_as_the_weights_expect():
    found = RECIPE.images("resnet20").normalise(
        torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    )
    expected = [
        [-0.485 / 0.229, 0.515 / 0.229],
        [-0.456 / 0.224, 0.544 / 0.224],
        [-0.406 / 0.225, 0.594 / 0.225],
    ]
    torch.testing.assert_close(found[0, :, 0], torch.tensor(expected))


# -- a small run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(images, tmp_path_factory):
    """Both arms on both tasks and masks at a further rate, on a few images: result and options."""
    weights, work = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("work")
    save_published(weights, 1)
    given = RECIPE.cases["resnet20"]
    case = dataclasses.replace(given, arguments={"depth": 8}, rule=given.rule | {"batch": 8})
    recipe = dataclasses.replace(RECIPE, cases={"resnet8": case})
    given = {"work": work, "weights": weights, "data": str(images), "rates": (500.0,)}
    options = RUN.Options(case="resnet8", epochs=2, limit=24, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CODERS, "tools", quick_tools)
        yield run(recipe, options), recipe, options


def run(recipe, options):
    ((label, found),) = RUN.run(recipe, options, quiet())
    assert label == found["case"] == "resnet8-e2-limit24"
    return found


def quick_tools():
    """A fast tool under each name, with another size for each: gzip at its levels."""
    names = RECIPE.module("tables").TOOLS
    return {name: partial(gzip.compress, compresslevel=i, mtime=0) for i, name in enumerate(names)}


def quiet():
    return Console(file=io.StringIO(), width=200)


def folder_of(options, task):
    return options.work / task / "resnet8-e2-s0-limit24"


def test_rows_are_all_jobs(small):
    result, *_ = small
    assert [(row["task"], row["arm"], row["rate"]) for row in result["rows"]] == [
        ("digits", "masks", 50.0),
        ("digits", "finetuned", 0.05),
        ("rotation", "masks", 50.0),
        ("rotation", "finetuned", 0.05),
        ("digits", "masks", 500.0),
        ("rotation", "masks", 500.0),
    ]
    assert json.loads(json.dumps(result))["rows"][0]["epochs"] == 2
    assert all(len(row["history"]) == 2 for row in result["rows"])


def test_mask_rows_are_what_the_files_hold(small):
    result, _, options = small
    rows = [row for row in result["rows"] if row["arm"] == "masks"]
    assert len(rows) == 4
    assert any(row["density"]["min"] < 1 for row in rows)
    for row in rows:
        folder = folder_of(options, row["task"])
        stored = reader.read(folder / f"masks_lr{row['rate']:g}" / "adapter_model.safetensors")
        coded = reader.read(folder / f"masks_lr{row['rate']:g}-small" / "adapter_model.safetensors")
        masks = {key: value for key, value in stored.items() if key.endswith(".bits")}
        order = ["0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "5.conv1", "5.conv2", "8"]
        assert list(row["layers"]) == [f"{name}.weight" for name in order]
        assert len(masks) == 8
        weights = sum(mask.size for mask in masks.values())
        head = 64 * {"digits": 10, "rotation": 4}[row["task"]]
        assert row["weights"] == weights == 432 + 2 * 2304 + 4608 + 9216 + 18432 + 36864 + head
        assert sorted(k for _, k in row["layers"].values()) == sorted(
            m.sum() for m in masks.values()
        )
        assert all(np.array_equal(coded[key], mask) for key, mask in masks.items())
        contexts = row["structure"]["decoded bits, weights"]["adaptive"]
        saved = 100 * (1 - 8 * contexts / weights)
        assert row["reduction"]["contexts"] == pytest.approx(saved, abs=6e-4)


def test_finetuned_rows_are_what_the_files_hold(small):
    result, _, options = small
    for row in (row for row in result["rows"] if row["arm"] == "finetuned"):
        folder = folder_of(options, row["task"])
        base = load_file(folder / "base.safetensors")
        tuned = load_file(folder / "finetuned_lr0_05" / "model.safetensors")
        names = [name for name in base if base[name].dim() in (2, 4)]
        assert len(names) == 8
        data = b"".join(tuned[name].numpy().tobytes() for name in names)
        change = b"".join((tuned[name] - base[name]).numpy().tobytes() for name in names)
        assert row["finetuned"]["bytes"]["raw"] == len(data)
        for name, tool in quick_tools().items():
            assert row["finetuned"]["bytes"][name] == len(tool(data))
            assert row["change"]["bytes"][name] == len(tool(change))
        assert len(data) == 4 * row["weights"]
        small_file = folder / "finetuned_lr0_05-small" / "model.safetensors"
        assert row["files"]["float16"] == small_file.stat().st_size
        half = load_file(small_file)
        assert torch.equal(half[names[0]], tuned[names[0]].half())


def test_both_arms_start_from_the_same_network_and_tasks_share_all_but_the_head(small):
    _, recipe, options = small
    starts = [load_file(folder_of(options, task) / "base.safetensors") for task in DATA.TASKS]
    differing = [
        name
        for name, value in starts[0].items()
        if value.shape != starts[1][name].shape or not torch.equal(value, starts[1][name])
    ]
    assert differing == ["8.weight"]
    job = RUN.Job("digits", 0, "finetuned", 0.05)
    again = RUN.start(recipe, options, job).state_dict()
    assert all(torch.equal(again[key], value) for key, value in starts[0].items())


def test_a_finished_run_is_measured_again_and_not_overwritten(small):
    result, recipe, options = small
    with pytest.raises(RecipeError, match="exists; resume that run"):
        run(recipe, options)
    again = run(recipe, dataclasses.replace(options, resume=True))
    assert again == result


def test_tables_show_the_numbers(small):
    result, recipe, _ = small
    tables, out = RECIPE.module("tables"), io.StringIO()
    table = tables.tabulate(result, recipe.published)
    Console(file=out, width=250).print(table)
    row, files = result["rows"][0], result["rows"][1]["files"]
    shown = [f"{row['reduction'][key]:.1f}" for key in tables.OURS]
    shown += [f"{saved:.1f}" for saved in row["reduction"]["packed"].values()]
    shown += [f"{row['files']['adapter_coded']:,}", f"{files['float32']:,}", "78.32", "177"]
    shown += [f"{files['float32'] / row['files']['adapter_coded']:.1f}"]
    length = row["structure"]["|weight|"]
    shown += [f"{length[key] / row['bytes']['bound']:.3f}" for key in ("adaptive", "ideal")]
    assert len(shown) == 18
    cells = out.getvalue().replace("│", " ").split()
    assert all(value in cells for value in shown), [v for v in shown if v not in cells]


def test_plot_is_drawn(small, tmp_path):
    pytest.importorskip("matplotlib")
    result, *_ = small
    file = tmp_path / "plot.png"
    RECIPE.module("plot").draw([result], file)
    from matplotlib.image import imread

    assert imread(file).shape[:2] == (440, 1540)


def test_spread_is_mean_and_sample_deviation():
    spread = RECIPE.module("tables").spread
    assert spread([1.0, 4.0], lambda x: x) == f"2.50 ({math.sqrt(4.5):.2f})"
    assert spread([7.0], lambda x: x, 1) == "7.0"


def test_figures_in_documents_are_those_of_the_results():
    tables, readme = RECIPE.module("tables"), (FOLDER / "README.md").read_text(encoding="utf-8")
    found = [json.loads(file.read_text()) for file in (FOLDER / "results").glob("*.json")]
    results = sorted(found, key=lambda result: result["case"])
    cases = [result["case"] for result in results]
    assert cases == ["resnet20", "resnet20-e12", "resnet32", "resnet56"]
    assert len(results[0]["seeds"]) >= 2
    for name, columns in (("saved", tables.SAVED), ("smaller", tables.SMALLER)):
        rows = [row for result in results for row in getattr(tables, name)(result)]
        rows += getattr(tables, f"published_{name}")(RECIPE.published)
        assert as_markdown(columns, rows) in readme
    for result in results:
        assert as_markdown(*tables.structure(result)) in readme
