"""Figures in the README are those of committed result files."""

import json
import re
import statistics
from pathlib import Path

import pytest

from pemn_surgery import plan
from pemn_surgery.commands.cli import main
from pemn_surgery.commands.quickstart_run import network
from tests.bench import memory

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = json.loads((ROOT / "docs/results/quickstart.json").read_text(encoding="utf-8"))
CIFAR = {
    path.name: json.loads(path.read_text(encoding="utf-8"))
    for path in (ROOT / "recipes/pemn/results").glob("*.json")
}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


ROWS = [cells(line) for line in README.splitlines() if line.startswith("|")]


PAGES = sorted((ROOT / "docs").glob("*.md"))
READMES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*/README.md"))]


def prose(page):
    """A page without its code, where # begins a comment and brackets are brackets."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`|^    .*", "code", text, flags=re.M)


def links(page):
    """The relative links of a page: file ("" is the page itself) and anchor."""
    found = re.findall(r"\]\(\s*(?!https?:|mailto:)([^)\s]+?)\s*\)", prose(page))
    return [link.partition("#")[::2] for link in found]


def anchors(page):
    """What the site and GitHub call the headings of a page; a link needs a name of both."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    heads = [re.sub(r"[`*]", "", head) for head in re.findall(r"^#+ (.+?)\s*$", text, re.M)]
    bare = [re.sub(r"[^\w\s-]", "", head).strip().lower() for head in heads]
    site = {re.sub(r"[-\s]+", "-", head) for head in bare}
    return site & {re.sub(r"\s", "-", head) for head in bare}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_the_site_has(page):
    """Files of the docs folder, which the site has as they are, and headings of its pages."""
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), file
        assert target.is_relative_to(ROOT / "docs"), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"
    assert "exclude_docs" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.parent.name)
def test_links_of_readmes_lead_to_what_the_project_has(page):
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def test_there_are_links_and_anchors_to_check():
    assert len(PAGES) >= 17
    assert len(READMES) >= 5
    found = [link for page in PAGES for link in links(page)]
    assert len(found) > 40
    assert sum(bool(anchor) for _, anchor in found) >= 10
    assert {file for file, _ in links(ROOT / "docs/saving.md")} >= {"results/load.json"}
    assert {"one-stored-mask-version-1", "at-run-time"} < anchors(ROOT / "docs/format.md")


def test_every_page_is_in_the_index_and_in_the_menu():
    names = {page.name for page in PAGES}
    listed = [file for file, _ in links(ROOT / "docs/index.md") if file.endswith(".md")]
    assert sorted(listed) == sorted(names - {"index.md"})
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r"^  - (\S+\.md)$", menu, re.M)) == sorted(names)


def test_quickstart_table():
    dense = {o["task"]: o["nbytes"] for o in QUICKSTART["outcomes"] if o["method"] == "dense"}
    outcomes = QUICKSTART["outcomes"]
    assert len(outcomes) == 6
    for outcome in outcomes:
        row = [
            outcome["task"],
            outcome["method"],
            f"{100 * outcome['accuracy']:.2f} %",
            f"{outcome['nbytes']:,}",
            f"{dense[outcome['task']] / outcome['nbytes']:.1f} x",
        ]
        assert row in [found[:5] for found in ROWS], row


def test_a_mask_adapter_is_one_bit_a_weight_and_its_other_tensors():
    made = plan(network(0), bank="rp", ratio=QUICKSTART["ratio"])
    sizes = [o["nbytes"] for o in QUICKSTART["outcomes"] if o["method"] == "masks"]
    assert len(sizes) == 2
    assert max(sizes) <= made.masked_weights / 8 * 1.02 + made.other_bytes


def test_masks_are_within_three_points_of_dense():
    accuracy = {(o["method"], o["task"]): o["accuracy"] for o in QUICKSTART["outcomes"]}
    assert QUICKSTART["verified_in_new_process"] is True
    for task in ("digit", "parity"):
        assert accuracy["masks", task] > accuracy["dense", task] - 0.03


def test_cifar_table():
    """ResNet-32's rows; how long each was trained stands in every one."""
    found = [one for one in CIFAR.values() if one["case"] == "resnet32"]
    arms = [(result, *item) for result in found for item in result["arms"].items()]
    assert len(arms) >= 2
    for result, name, arm in arms:
        published = arm["published"]
        row = [
            name,
            f"{result['epochs']['run']} of {result['epochs']['paper']}",
            f"{arm['best']['test_accuracy']:.2f} %",
            f"{arm['last']['test_accuracy']:.2f} %",
            f"{arm['bytes']['total']:,}",
            f"{published['accuracy']:.2f} %" if published else "-",
        ]
        assert row in ROWS, row


def test_the_report_is_made_of_the_committed_results(tmp_path):
    assert main(["report", str(ROOT / "recipes/pemn"), "--out", str(tmp_path)]) == 0
    made = sorted(file.name for file in tmp_path.iterdir())
    assert made == sorted(file.name for file in (ROOT / "docs/pemn").iterdir())
    page, committed = (folder / "report.html" for folder in (tmp_path, ROOT / "docs/pemn"))
    assert page.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


def test_planning_figures():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "docs/results/planning.json").read_text(encoding="utf-8"))
    rows = {row["model"]: row for row in result["rows"]}
    vit, llama = rows["vit_base_patch16_224"], rows["llama 7 B shape, meta"]
    said = [
        f"took {vit['plan']:.2f} s for ViT-B beside {vit['meta_forward']:.2f} s",
        f"{llama['plan']:.2f} s for a 7 B Llama",
        f"pemnifying ViT-B took {vit['pemnify']:.2f} s",
    ]
    shown = " ".join(page.split())
    for text in said:
        assert text.replace("0.", ".") in shown, text
    timed = [row for row in rows.values() if "meta_forward" in row]
    assert len(timed) == 3
    assert all(row["plan"] < row["meta_forward"] for row in timed)


FINETUNED = json.loads((ROOT / "docs/results/from_finetuned.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", sorted(FINETUNED["cases"]))
def test_finetuned_table(case):
    page = (ROOT / "docs/from_finetuned.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    found = FINETUNED["cases"][case]
    assert len(found["runs"]) == len(FINETUNED["seeds"]) >= 3
    assert len(found["summary"]) == 8
    for name, figures in found["summary"].items():
        accuracy = figures["accuracy"]
        error = figures.get("error_of_difference")
        row = [
            case,
            name,
            f"{100 * accuracy['mean']:.1f} ({100 * accuracy['std']:.1f}) %",
            f"{100 * error['mean']:.1f} %" if error else "",
            f"{figures['bytes']['mean']:,.0f}",
        ]
        assert row in rows, row
    assert all(
        figures["others_differing"]["mean"] == 0
        for figures in found["summary"].values()
        if "others_differing" in figures
    )


LOAD = json.loads((ROOT / "docs/results/load.json").read_text(encoding="utf-8"))["results"]


def times(bank, step):
    """Milliseconds of the processor."""
    return LOAD[bank]["steps"][step]["processor_ms"]["median"]


def test_load_table():
    page = (ROOT / "docs/saving.md").read_text(encoding="utf-8")
    rows = [cells(line)[1:] for line in page.splitlines() if line.startswith("|")]
    assert set(LOAD) == {"rp", "own", "coded"}
    for step in ("load_file", "read and check", "load_adapter", "set_adapter"):
        medians = [
            LOAD[bank]["steps"][step]["processor_ms"]["median"] for bank in ("rp", "own", "coded")
        ]
        assert [f"{median:.1f}" for median in medians] in rows
    assert all(bank["masked_weights"] > 86e6 for bank in LOAD.values())
    loads = {bank: one["steps"]["load_adapter"]["clock_ms"]["median"] for bank, one in LOAD.items()}
    assert max(loads["rp"], loads["own"]) < 500  # by the clock
    assert loads["coded"] < 800


CODING = json.loads((ROOT / "docs/results/coding.json").read_text(encoding="utf-8"))


def test_coding_tables():
    page = (ROOT / "docs/coding.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    found = {(row["weights"], row["density"]): row for row in CODING["rows"]}
    densities = (0.5, 0.6, 0.7, 0.8, 0.9, 0.93, 0.94, 0.95, 0.975, 0.99)
    counts = (10_000, 100_000, 1_000_000, 10_000_000)
    assert set(found) == {(weights, density) for weights in counts for density in densities}
    for weights in counts:
        sizes = [f"{found[weights, density]['size_to_entropy']:.4f}" for density in densities]
        assert [f"{weights:,}", *sizes] in rows
    for density in densities:
        speeds = []
        for way in ("encode", "decode"):
            figures = found[10_000_000, density][way]
            low, high = figures["mb_per_s_quartiles"]
            speeds += [f"{figures['mb_per_s']:.0f} ({low:.0f}-{high:.0f})"]
            speeds += [f"{figures['times_numpy']:.1f}"]
        assert [str(density), *speeds] in rows
    for (weights, _), row in found.items():
        payload = (row["bytes"] - 32) / row["bytes"] * row["size_to_entropy"]
        assert payload <= 1.001 or weights < 10**6


CONTEXT = json.loads((ROOT / "docs/results/context.json").read_text(encoding="utf-8"))["contexts"]


def test_context_table():
    page = (ROOT / "docs/coding.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    assert len(CONTEXT) == 16
    for one in CONTEXT:
        shown = [f"{one['weights']:,}", f"{one['entropy_a_weight']:.2f}"]
        shown += [f"{one['size_to_entropy']:.4f}"]
        for way in ("encode", "decode"):
            low, high = one[way]["mb_per_s_quartiles"]
            shown += [f"{one[way]['mb_per_s']:.1f} ({low:.1f}-{high:.1f})"]
        assert shown in rows, shown


def test_coding_comparison():
    page = (ROOT / "docs/coding.md").read_text(encoding="utf-8")
    rows = [cells(line.replace("`", "")) for line in page.splitlines() if line.startswith("|")]
    ways = {row["way"] for row in CODING["compared"]}
    assert len(ways) == 2
    found = {(row["way"], row["density"]): row for row in CODING["compared"]}
    for way in ways:
        figures = [found[way, density] for density in (0.6, 0.8, 0.9, 0.975)]
        shown = [
            f"{row['encode']['mb_per_s']:.1f}, {row['decode']['mb_per_s']:.1f}" for row in figures
        ]
        assert [way, *shown] in rows
    same = {(row["density"], row["bytes"]) for row in CODING["compared"]}
    assert len(same) == len(found) / 2  # both write the same bytes


CODINGS = ["entropy", "context", "base"]
LEARNED = json.loads((ROOT / "docs/results/learned_masks.json").read_text(encoding="utf-8"))


def test_learned_masks_table():
    """And what is said of it."""
    page = (ROOT / "docs/coding.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    assert len(LEARNED["rows"]) == 6
    ratios = {}
    for one in LEARNED["rows"]:
        keys = [f"{name}_payload" for name in CODINGS] + CODINGS
        ratios[one["adapter"]] = {key: one[key] / one["bound"] for key in keys}
        shown = [
            one["adapter"].replace("masks_", ""),
            f"{one['weights']:,}",
            str(one["masks"]),
            f"{8 * one['bound'] / one['weights']:.3f}",
            f"{one['bound']:,.0f}",
            *(f"{ratios[one['adapter']][key]:.4f}" for key in keys),
        ]
        assert shown in rows, shown
    for one in ratios.values():
        assert one["base"] <= one["context"] <= one["entropy"]
    assert 0.88 < ratios["wide/masks_lr3"]["base_payload"] < 0.89


COMPARED = json.loads((ROOT / "docs/results/coders.json").read_text(encoding="utf-8"))["masks"]


def test_no_file_is_longer_than_the_earlier_coders():
    assert len(COMPARED) > 80
    assert all(one["bytes"] <= 1.002 * one["bytes_before"] for one in COMPARED)


TRAINING = json.loads((ROOT / "docs/results/training.json").read_text(encoding="utf-8"))
MEMORY = json.loads((ROOT / "docs/results/memory.json").read_text(encoding="utf-8"))


def test_training_table():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    steps = [row for row in TRAINING["rows"] if "sort" in row["ratio"] and "dense" in row["ratio"]]
    assert len(steps) == 16
    ways = ("top-k mp", "top-k rp", "threshold own", "LoRA r16", "sort")
    for step in steps:
        ratios = [f"{step['ratio'][way]['of_medians']:.2f}" for way in ways]
        assert [f"{step['row']}, {step['precision']}", *ratios] in rows
    others = [row for row in TRAINING["rows"] if row not in steps]
    assert len(others) == 3
    said = ("top-k", "top-k mp", "switch to another task")
    for row, way in zip(others, said, strict=True):
        assert f"{row['ratio'][way]['of_medians']:.2f}" in page


def test_what_is_said_of_training_without_compiled_kernels():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    plain = json.loads((ROOT / "docs/results/training_python.json").read_text(encoding="utf-8"))
    assert plain["kernels"] == "numpy and torch"
    found = {(row["row"], row["precision"]): row["ratio"] for row in plain["rows"]}
    for name in ("Linear 768x3072, 256 tokens", "ViT-S/16, batch 8"):
        both = (found[name, kind]["top-k mp"]["of_medians"] for kind in ("fp32", "bf16 autocast"))
        assert ", ".join(f"{one:.2f}" for one in both) in page
    assert f"takes {plain['rows'][0]['ratio']['top-k']['of_medians']:.2f} times the comp" in page


def test_what_is_said_of_the_limit():
    page = " ".join((ROOT / "docs/training.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs/results/limits.json").read_text(encoding="utf-8"))
    rows = {row["row"]: row["limit"] for row in found["rows"]}
    assert f"At the {found['bytes_a_second'] / 1e9:.1f} GB/s of one thread" in page
    assert f"makes {rows['Linear 768x3072, 256 tokens']:.2f} of the linear layer" in page
    llama, small = rows["Llama shape 4 x 512, 256 tokens"], rows["ResNet-32, batch 1"]
    assert f"{llama:.2f} of the Llama shape and {small:.2f} of ResNet-32 at batch 1" in page


def test_memory_table():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    dense = statistics.median(MEMORY["rows"][0]["bytes_a_weight"])
    assert len(MEMORY["rows"]) == 15
    for row in MEMORY["rows"]:
        taken = statistics.median(row["bytes_a_weight"])
        right = [100 * one for one in row["accuracy"]]
        accuracy = f"{statistics.mean(right):.2f} ({statistics.stdev(right):.2f}) %"
        assert [row["way"], f"{taken:.1f}", f"{taken / dense:.2f}", accuracy] in rows
    assert f"{8 / dense:.2f} of dense; with both ways together 6, {6 / dense:.2f}." in page
    tokens, width, each = memory.TOKENS, memory.WIDTH, 2  # what a layer and its ReLU take, in bytes
    assert f"the activations ({2 * tokens * each / width:.1f} here)" in page


def test_what_is_said_of_reading_small_layers():
    page = " ".join((ROOT / "docs/training.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs/results/reads.json").read_text(encoding="utf-8"))
    ways = ("mp", "rp", "own")
    now, before = (
        [found[tree]["step"][way]["median"] for way in ways] for tree in ("here", "against")
    )
    said = "takes {:.2f} (mp), {:.2f} (rp) and {:.2f} (own) times dense, where the library took "
    assert (said + "{:.2f}, {:.2f} and {:.2f} before").format(*now, *before) in page
    assert all(2 * (a - 1) < b - 1 for a, b in zip(now[:2], before[:2], strict=True))  # halved
    layer = [found["here"]["layer_us"][way]["median"] for way in ("dense", "masked", "merged")]
    assert "{:.1f} microseconds dense, {:.1f} masked and {:.1f} merged".format(*layer) in page


def test_what_is_said_of_freed_memory():
    page = " ".join((ROOT / "recipes/pemn/README.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs/results/allocator.json").read_text(encoding="utf-8"))
    assert [row["threads"] for row in found["rows"]] == [1, 2]
    assert all(row["same_loss"] for row in found["rows"])

    def medians(row, key):
        return [row["ways"][way][key]["median"] for way in ("kept", "glibc's defaults")]

    one, two = found["rows"]
    assert "faults in {:.0f} pages in place of {:,.0f}".format(*medians(one, "faults")) in page
    seconds = "takes {:.2f} s in place of {:.2f} in one thread, {:.2f} in place of {:.2f} in two"
    assert seconds.format(*medians(one, "seconds"), *medians(two, "seconds")) in page


def test_what_is_said_of_steps_on_a_support():
    page = " ".join((ROOT / "docs/methods.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs/results/support.json").read_text(encoding="utf-8"))
    (row,) = found["rows"]
    ways = ("flips on .1", "flips on .02", "full")
    ratios = [row["ratio"][way]["of_medians"] for way in ways]
    said = "takes {:.2f} times a step of LoRA r8 (on .02: {:.2f}; full training: {:.2f})"
    assert said.format(*ratios) in page


def test_what_is_said_of_packed_layers():
    page = (ROOT / "docs/big_models.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs/results/inference.json").read_text(encoding="utf-8"))
    rows = [cells(line) for line in page.splitlines() if line.startswith("|")]
    shown = [row for row in found["layers"] if row["inputs"] in (1, 8)]
    assert len(shown) == 10
    for row in shown:
        taken = {way: one["median"] for way, one in row["ways"].items()}
        times = [f"{1e3 * taken[way]:.2f}" for way in ("float32", "bfloat16", "avx2", "avx512")]
        ratios = [f"{taken[way] / taken['avx512']:.1f}" for way in ("float32", "bfloat16")]
        assert [row["bank"], str(row["inputs"]), *times, *ratios] in rows
    words = found["words"]
    a_second = {way: 1 / one["median"] for way, one in words["seconds_a_word"].items()}
    said = (
        f"{words['masked_weights']:,} masked weights, an aligned bank of one row of 2,048 and a "
        f"key-value cache makes {a_second['packed']:.1f} words a second packed, "
        f"{a_second['float32']:.1f} dense in float32 and {a_second['bfloat16']:.1f} in bfloat16"
    )
    assert said in " ".join(page.split())
    held = words["float32_bytes"] / words["held_bytes"]
    assert f"hold 1/{held:.1f} of float32's bytes" in " ".join(page.split())
