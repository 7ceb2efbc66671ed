"""`pemn merge --format gguf`: read back by gguf's own code, and run by stock llama.cpp."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pemn_surgery import from_masks, pemnify
from pemn_surgery.commands import gguf_export
from pemn_surgery.commands.cli import main
from pemn_surgery.commands.gguf_export import write_gguf
from pemn_surgery.errors import ConfigError, ExportError
from pemn_surgery.masks.masked_weight import MaskedWeight
from tests.adapters import models

WIDTH, WORDS, IDS = 256, 512, [5, 77, 130, 200, 33, 9, 250, 64]
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def network(kind="llama", tied=False):
    config, made = KINDS[kind]
    torch.manual_seed(0)
    net = made(
        config(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, head_dim=64,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=WORDS, rms_norm_eps=1e-6,
            max_position_embeddings=512, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    for name, parameter in net.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.08)
    return net.eval()


def write_base(net, kind, path):
    """What llama.cpp's converter writes, of this network: all floats, and words without meaning."""
    w = GGUFWriter(path, kind)
    w.add_block_count(2)
    w.add_context_length(512)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(2 * WIDTH)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_key_length(64)
    w.add_value_length(64)
    w.add_rope_dimension_count(64)
    w.add_rope_freq_base(1e4)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(WORDS)
    w.add_tokenizer_model("llama")
    letters = [b"<0x%02X>" % i for i in range(256)]
    w.add_token_list([b"<unk>", b"<s>", b"</s>", *letters, *(b"w%d" % i for i in range(253))])
    w.add_token_scores([0.0] * WORDS)
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * 253)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(False)
    for name, tensor in plain(net, kind).items():
        w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def interleaved(tensor, heads):
    """llama.cpp turns neighbours of a head's numbers, transformers a number of each half."""
    rows = []
    for head in np.split(tensor, heads):
        half = len(head) // 2
        rows += [head[half * (place % 2) + place // 2] for place in range(len(head))]
    return np.stack(rows)


def plain(net, kind):
    """All tensors by llama.cpp's names, in float32."""
    numbers = {name: p.detach().float().numpy() for name, p in net.named_parameters()}
    found = {
        "token_embd.weight": numbers["model.embed_tokens.weight"],
        "output_norm.weight": numbers["model.norm.weight"],
    }
    if "lm_head.weight" in numbers:
        found["output.weight"] = numbers["lm_head.weight"]
    for block in range(2):
        for part, called in PARTS.items():
            tensor = numbers.get(f"model.layers.{block}.{part}.weight")
            if tensor is None:
                continue
            if kind == "llama" and called in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, {"attn_q": 4, "attn_k": 2}[called])
            found[f"blk.{block}.{called}.weight"] = tensor
    return found


def masked_names(model):
    return {layer.target for layer in model.modules() if isinstance(layer, MaskedWeight)}


def read(path):
    """Type and numbers of every tensor, by gguf's own code; Q1_0 it cannot read."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        if tensor.tensor_type.name == "Q1_0":
            rows = tensor.data.reshape(-1, 18)
            scales = rows[:, :2].copy().view(np.float16).astype(np.float32)
            signs = np.unpackbits(rows[:, 2:], axis=1, bitorder="little").astype(np.float32)
            values = ((2 * signs - 1) * scales).reshape(len(tensor.data), -1)
        else:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = tensor.tensor_type.name, values
    return found


_SERVE = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 256, 1
params.warmup = False
server = xllamacpp.Server(params)
asked = {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "n_probs": 20, "temperature": 0.0}
asked["cache_prompt"] = False
request = urllib.request.Request(
    server.listening_address + "/completion", json.dumps(asked).encode(),
    {"Content-Type": "application/json"},
)
found = json.load(urllib.request.urlopen(request, timeout=60))
top = found["completion_probabilities"][0]["top_logprobs"]
print("RESULT" + json.dumps({one["id"]: one["logprob"] for one in top}))
import os; sys.stdout.flush(); os._exit(0)
"""


def assert_llama_cpp_agrees(path, model, most):
    """Its 20 likeliest next words have the chances that torch gives them, but for a little.

    llama.cpp rounds what layers of few bits get to 8 bits: in Q1_0 by blocks of 32, in TQ of 256.
    """
    pytest.importorskip("xllamacpp")
    words = [sys.executable, "-c", _SERVE, str(path), json.dumps(IDS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False)
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([IDS])).logits[0, -1].float(), -1)
    assert len(found) == 20
    assert max(found, key=found.get) == str(int(wanted.argmax()))
    assert max(abs(float(wanted[int(word)]) - value) for word, value in found.items()) < most


@pytest.mark.parametrize("kind", KINDS)
def test_masks_on_signed_constants_are_ternary(kind, tmp_path):
    base = write_base(network(kind), kind, tmp_path / "base.gguf")
    model = pemnify(network(kind), bank="mp", bank_init="signed_constant", seed=3).eval()
    names = masked_names(model)
    assert len(names) == 15  # seven of each block, and the head
    merged = model.merge_and_unload()
    said = write_gguf(merged, names, base, tmp_path / "task.gguf")
    assert said["tensors"]["TQ2_0"] == 15
    assert 0 < said["largest_rounding"] < 2**-11
    found, wanted = read(tmp_path / "task.gguf"), plain(merged, kind)
    assert set(found) == set(wanted)
    for name, (as_type, values) in found.items():
        scale = np.abs(wanted[name]).max()
        rounded = np.sign(wanted[name]) * np.float32(np.float16(scale))
        np.testing.assert_array_equal(values, rounded if as_type == "TQ2_0" else wanted[name])
    size = (tmp_path / "task.gguf").stat().st_size
    assert size < base.stat().st_size / 3
    assert_llama_cpp_agrees(tmp_path / "task.gguf", merged, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_flips_of_a_binary_base_are_one_bit_each(kind, tmp_path):
    """Blocks of the task are the base's XOR the flips."""
    net = network(kind)
    linear = [n for n, m in net.named_modules() if "_proj" in n]
    for name in linear:
        weight = net.get_submodule(name).weight
        blocks = weight.data.view(-1, 128)
        size = blocks.abs().mean(1, keepdim=True).half().float()
        weight.data = torch.where(blocks > 0, size, -size).view(weight.shape)
    base = write_base(net, kind, tmp_path / "base.gguf")
    binary = {f"{name}.weight" for name in linear}
    write_gguf(net, binary, base, tmp_path / "binary.gguf", "q1_0")
    before = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "binary.gguf").tensors}
    chance = torch.Generator().manual_seed(1)
    shapes = {name: net.get_parameter(name).shape for name in binary}
    masks = {n: torch.rand(s, generator=chance) > 0.03 for n, s in sorted(shapes.items())}
    merged = from_masks(net, masks, form="flip").merge_and_unload()
    said = write_gguf(merged, binary, base, tmp_path / "task.gguf")
    assert (said["tensors"]["Q1_0"], said["largest_rounding"]) == (14, 0.0)
    wanted = plain(merged, kind)
    for name, (as_type, values) in read(tmp_path / "task.gguf").items():
        np.testing.assert_array_equal(values, wanted[name])
        assert (as_type == "Q1_0") == ("blk" in name and "norm" not in name)
    for tensor in GGUFReader(tmp_path / "task.gguf").tensors:
        if tensor.tensor_type.name == "Q1_0":
            changed = (tensor.data ^ before[tensor.name]).reshape(-1, 18)
            assert not changed[:, :2].any()  # sizes stay
            assert 0.01 < np.unpackbits(changed[:, 2:]).mean() < 0.05
    assert_llama_cpp_agrees(tmp_path / "task.gguf", merged, 0.4)


def test_numbers_of_any_size_are_floats_unless_a_type_is_asked_for(tmp_path):
    base = write_base(network(), "llama", tmp_path / "base.gguf")
    model = pemnify(network(), bank="rp", seed=1).eval()
    names = masked_names(model)
    merged = model.merge_and_unload()
    said = write_gguf(merged, names, base, tmp_path / "task.gguf")
    assert set(said["tensors"]) == {"F32"}
    wanted = plain(merged, "llama")
    for name, (_, values) in read(tmp_path / "task.gguf").items():
        np.testing.assert_array_equal(values, wanted[name])
    for kind in ("tq1_0", "tq2_0", "q1_0"):
        with pytest.raises(ExportError) as error:
            write_gguf(merged, names, base, tmp_path / "no.gguf", kind)
        models.says(error, f"is not what {kind} holds", "different sizes", "Nothing was written")
    assert {file.name for file in tmp_path.iterdir()} == {"base.gguf", "task.gguf"}
    assert_llama_cpp_agrees(tmp_path / "task.gguf", merged, 0.02)


def test_a_head_of_its_own_joins_a_file_that_has_none(tmp_path):
    """The base's head was its embedding; the task's is a masked copy."""
    base = write_base(network(tied=True), "llama", tmp_path / "base.gguf")
    options = {"bank": "mp", "bank_init": "signed_constant", "tied": "untie"}
    model = pemnify(network(tied=True), **options).eval()
    names = masked_names(model)
    merged = model.merge_and_unload()
    said = write_gguf(merged, names, base, tmp_path / "task.gguf", "tq1_0")
    assert said["tensors"]["TQ1_0"] == 15
    found = read(tmp_path / "task.gguf")
    head = merged.lm_head.weight.detach().numpy()
    half = np.float32(np.float16(np.abs(head).max()))
    np.testing.assert_array_equal(found["output.weight"][1], np.sign(head) * half)
    assert_llama_cpp_agrees(tmp_path / "task.gguf", merged, 0.1)


def test_what_is_no_gguf_of_the_model_is_refused(tmp_path):
    net, path = network(), tmp_path / "base.gguf"
    out = tmp_path / "task.gguf"
    path.write_bytes(b"no gguf at all")
    with pytest.raises(ExportError, match="cannot be read as GGUF"):
        write_gguf(net, [], path, out)
    writer = GGUFWriter(path, "gpt2")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match="of the architecture 'gpt2'; known are llama, qwen2"):
        write_gguf(net, [], path, out)
    write_base(net, "llama", path)
    with pytest.raises(ExportError, match=r"no place for 4 tensors .*q_norm"):
        write_gguf(network("qwen3"), [], path, out)
    net.resize_token_embeddings(600, mean_resizing=False)
    with pytest.raises(ExportError, match=r"of shape \(512, 256\), the model .* of \(600, 256\)"):
        write_gguf(net, [], path, out)
    with pytest.raises(ConfigError, match="it needs one of auto, q1_0"):
        write_gguf(net, [], path, out, "q4_0")
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_command(tmp_path, capsys):
    base = write_base(network(), "llama", tmp_path / "base.gguf")
    network().save_pretrained(str(tmp_path / "base"))
    model = pemnify(
        LlamaForCausalLM.from_pretrained(str(tmp_path / "base")),
        bank="mp", bank_init="signed_constant", task_type="CAUSAL_LM",
    )  # fmt: skip
    model.save_pretrained(str(tmp_path / "task"))
    words = [
        "merge",
        str(tmp_path / "task"),
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--format", "gguf", "--like", str(base), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tensors"]["TQ2_0"] == 15
    assert (tmp_path / "out" / "model.gguf").stat().st_size < base.stat().st_size / 3
    words += ["--overwrite", "--format", "gguf"]
    assert main([*words, "--like", str(base), "--type", "tq1_0"]) == 0
    assert "15 TQ1_0" in capsys.readouterr().out
    assert main(words) == 2
    assert "it needs the base's GGUF file" in " ".join(capsys.readouterr().err.split())
    assert main([*words[:-2], "--type", "float"]) == 2
    assert "are for --format gguf" in " ".join(capsys.readouterr().err.split())


def test_without_gguf_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gguf_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        gguf_export.check_can_export()
