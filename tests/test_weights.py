"""Released weights: GPT-2 and its tokenizer in the layout of the Hugging Face hub, loaded, saved
and downloaded.

    pytest tests/test_weights.py

The loader is compared with two things that are written out here: a reader of the file format that
parses bytes with struct, and a GPT-2 in NumPy that multiplies x @ W, as the files store W.
Downloads come from a server on this machine. That transformers opens what we write is tested where
it is installed; it is not a required package.
"""

import http.server
import json
import math
import pickle
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings, strategies as st

import runtime.hub
import sample
import tasks.checkpoint
import tasks.tokenizers
import train_sft
from data import Preference, encode, pack
from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.files import download
from runtime.hub import read_weights
from sample import encode_prompt
from tasks.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from tasks.tokenizers import (
    GPT2_PATTERN,
    byte_letters,
    byte_pairs,
    get_tokenizer,
    name_of_vocabulary,
    vocabulary_of,
    write_tokenizer,
)

for_all = settings(deadline=None, max_examples=25, derandomize=True)


def random_gpt(config, seed=0):
    """A GPT with random parameters, biases and layer norms too, so it shows if one is left out."""
    torch.manual_seed(seed)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


SMALL = GPTConfig(block_size=24, vocab_size=13, n_layer=2, n_head=2, n_embd=8)


@st.composite
def configs(draw):
    n_head = draw(st.integers(1, 3))
    return GPTConfig(draw(st.integers(4, 20)), draw(st.integers(2, 30)), draw(st.integers(1, 3)),
                     n_head, n_head * draw(st.integers(1, 5)))


def tensors_by_hand(path):
    """{name: array} of a safetensors file of float32, read byte by byte."""
    content = path.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + n])
    tensors = {}
    for name, facts in header.items():
        if name != "__metadata__":
            assert facts["dtype"] == "F32"
            start, end = (8 + n + offset for offset in facts["data_offsets"])
            values = struct.unpack(f"<{(end - start) // 4}f", content[start:end])
            tensors[name] = np.array(values, dtype=np.float64).reshape(facts["shape"])
    return tensors


def gpt2_from_the_file(folder, tokens):
    """Logits (T, V) of one sequence, computed from the folder alone. Matrices multiply from the
    right, as GPT-2 was released."""
    config = json.loads((folder / "config.json").read_text())
    w = tensors_by_hand(folder / "model.safetensors")
    w = {name.removeprefix("transformer."): value for name, value in w.items()}
    T, D = len(tokens), config["n_embd"] // config["n_head"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + config["layer_norm_epsilon"])
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(config["n_layer"]):
        h = f"h.{layer}."
        q, k, v = np.split(linear(layer_norm(x, h + "ln_1"), h + "attn.c_attn"), 3, axis=-1)
        y = np.zeros_like(q)
        for start in range(0, config["n_embd"], D):
            head = slice(start, start + D)
            for t in range(T):
                scores = np.exp(k[:t + 1, head] @ q[t, head] / math.sqrt(D))
                y[t, head] = scores / scores.sum() @ v[:t + 1, head]
        x = x + linear(y, h + "attn.c_proj")
        z = linear(layer_norm(x, h + "ln_2"), h + "mlp.c_fc")
        z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = x + linear(z, h + "mlp.c_proj")
    return layer_norm(x, "ln_f") @ w["wte.weight"].T


# ------------------------------------------------------------------------------------------------
# Saving and loading
# ------------------------------------------------------------------------------------------------


@for_all
@given(configs(), st.integers(0, 99))
def test_what_is_saved_is_read_back_to_the_last_bit(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("model")
    model = random_gpt(config, seed)
    model.save_pretrained(folder)
    back = GPT.from_pretrained(folder)
    assert back.config == config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@for_all
@given(configs(), st.data())
def test_the_files_are_a_gpt2_that_multiplies_from_the_right(tmp_path_factory, config, data):
    """The four matrices of a block are transposed relative to nn.Linear's. A square one would load
    either way, so logits are compared."""
    folder = tmp_path_factory.mktemp("model")
    model = random_gpt(config)
    model.save_pretrained(folder)
    tokens = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1,
                                max_size=config.block_size))
    expected = gpt2_from_the_file(folder, tokens)
    got = GPT.from_pretrained(folder).double()(torch.tensor([tokens]))[0]
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=1e-10)


def test_the_files_have_the_names_and_shapes_of_the_hub(tmp_path):
    """gpt2 stores c_attn as (768, 2304), so a block with 8 channels stores it as (8, 24)."""
    random_gpt(SMALL).save_pretrained(tmp_path)
    shapes = {name: value.shape for name, value in
              tensors_by_hand(tmp_path / "model.safetensors").items()}
    block = {"ln_1.weight": (8,), "ln_1.bias": (8,), "attn.c_attn.weight": (8, 24),
             "attn.c_attn.bias": (24,), "attn.c_proj.weight": (8, 8), "attn.c_proj.bias": (8,),
             "ln_2.weight": (8,), "ln_2.bias": (8,), "mlp.c_fc.weight": (8, 32),
             "mlp.c_fc.bias": (32,), "mlp.c_proj.weight": (32, 8), "mlp.c_proj.bias": (8,)}
    expected = {"wte.weight": (13, 8), "wpe.weight": (24, 8), "ln_f.weight": (8,),
                "ln_f.bias": (8,)}
    expected |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert shapes == {f"transformer.{name}": shape for name, shape in expected.items()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["n_positions"], config["vocab_size"], config["eos_token_id"]) == (24, 13, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]


def as_the_hub(model):
    """A state dict as in older files of the hub: no prefix, causal masks, no head."""
    state = {name: runtime.hub.transpose_matrix(name, value).clone() for name, value in
             model.state_dict().items()}
    for layer in range(model.config.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def written(folder, state):
    """Write config.json and a state dict, as pytorch_model.bin, to a folder. Returns the folder."""
    random_gpt(SMALL).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("change", ["as it is", "prefix and tied head", "float16"])
def test_older_files_of_the_hub_are_read(tmp_path, change):
    model = random_gpt(SMALL)
    state = as_the_hub(model)
    if change == "prefix and tied head":
        state = {f"transformer.{name}": value for name, value in state.items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
    if change == "float16":
        state = {name: value.half() for name, value in state.items()}
    back = GPT.from_pretrained(written(tmp_path, state))
    for name, weight in model.state_dict().items():
        expected = weight.half().float() if change == "float16" else weight
        assert back.state_dict()[name].dtype == torch.float32
        assert torch.equal(back.state_dict()[name], expected), name


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_one_model_and_a_missing_one_is_counted(tmp_path, suffix):
    """Large models are saved in several files, each with some of the tensors."""
    model = random_gpt(SMALL)
    names = sorted(model.state_dict())
    (written(tmp_path, {}) / "pytorch_model.bin").unlink()
    stem, save = "pytorch_model", lambda file, part: torch.save(part, file)
    if suffix == "safetensors":
        stem, save = "model", runtime.hub.write_safetensors
    for i in range(3):
        part = {name: as_the_hub(model)[name].contiguous() for name in names[i::3]}
        with open(tmp_path / f"{stem}-0000{i + 1}-of-00003.{suffix}", "wb") as file:
            save(file, part)
    back = GPT.from_pretrained(tmp_path)
    assert all(torch.equal(back.state_dict()[name], model.state_dict()[name]) for name in names)
    shard = tmp_path / f"{stem}-00002-of-00003.{suffix}"
    content = shard.read_bytes()
    shard.unlink()
    assert f"2 files like {stem}-00001-of-00003.{suffix}, expected 3" in refusal(tmp_path)
    shard.write_bytes(content[:100])
    assert f"{shard.name}: not a file of weights" in refusal(tmp_path)


def test_a_model_that_was_loaded_trains_and_samples_like_any_other(tmp_path):
    """Weights that still pointed into the file would be read-only, or training would change it."""
    random_gpt(SMALL).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(tmp_path)
    optimizer = model.optimizer(1e-2)
    model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    assert all(not torch.equal(old[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(model.generate([[1, 2]], 5)[0]) == 5


# ------------------------------------------------------------------------------------------------
# What is refused, in one sentence that names the file
# ------------------------------------------------------------------------------------------------


def refusal(folder):
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(random_gpt(SMALL).state_dict()))
def test_every_shape_is_checked_and_named(tmp_path, name):
    state = as_the_hub(random_gpt(SMALL))
    shape = tuple(state[name].shape)
    state[name] = torch.zeros(*shape[:-1], shape[-1] + 1)
    wrong = (*shape[:-1], shape[-1] + 1)
    assert f"{name} has shape {wrong}, expected {shape}" in refusal(written(tmp_path, state))


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"])
def test_a_weight_that_is_missing_or_too_much_is_named(tmp_path, name):
    state = as_the_hub(random_gpt(SMALL))
    value = state.pop(name)
    assert f"{name} is missing" in refusal(written(tmp_path, state))
    state |= {name: value, "h.2.ln_1.bias": value}
    message = refusal(written(tmp_path, state))
    assert "h.2.ln_1.bias is not a weight of a GPT-2 of this size" in message


def test_a_head_of_its_own_is_refused(tmp_path):
    """It would be dropped, which would make it a different model."""
    state = as_the_hub(random_gpt(SMALL))
    state["lm_head.weight"] = state["wte.weight"] + 1
    assert "lm_head.weight is not wte.weight" in refusal(written(tmp_path, state))


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, 'model_type is "llama"; this GPT-2 has "gpt2"'),
    ({"activation_function": "relu"}, "activation_function"),
    ({"activation_function": "gelu"}, 'is "gelu"; this GPT-2 has "gelu_new"'),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; this GPT-2 has 1e-05"),
    ({"n_inner": 33}, "n_inner"), ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"n_layer": None}, "whole number above 0 for n_layer"),
    ({"n_layer": True}, "whole number above 0 for n_layer"),
    ({"n_embd": "8"}, "whole number above 0 for n_embd"), ({"n_head": 3}, "not a multiple"),
])
def test_the_configuration_of_another_network_is_refused(tmp_path, change, words):
    random_gpt(SMALL).save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("change", [{"n_inner": 32}, {"activation_function": "gelu_pytorch_tanh"}])
def test_other_words_for_the_same_network_are_accepted(tmp_path, change):
    """Four times the channels may be written out, and GELU by tanh has several names."""
    random_gpt(SMALL).save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    assert GPT.from_pretrained(tmp_path).config == SMALL


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


class Hostile:
    def __reduce__(self):
        return open, ("pwned", "w")


DAMAGED = {
    "empty": lambda good: b"", "cut short": lambda good: good[:-1],
    "cut in the header": lambda good: good[:100], "too long": lambda good: good + b"\0",
    "a web page": lambda good: b"<!doctype html><html></html>",
    "an endless header": lambda good: b"\xff" * 8 + good[8:],
    "no JSON": lambda good: good[:8] + b"[" * (len(good) - 8),
    "another dtype": lambda good: good.replace(b'"F32"', b'"I64"'),
    "offsets outside": lambda good: good.replace(b"[0, ", b"[9, "),
}


# Three tensors of one float32 each follow one another as [0, 4], [4, 8] and [8, 12] in 12 bytes.
OFFSETS = {
    "an overlap": [[0, 8], [4, 12]], "a whole overlap": [[0, 4], [0, 4], [4, 12]],
    "an overlap and a hole": [[0, 4], [0, 4], [8, 12]], "a hole": [[0, 4], [8, 12], [8, 12]],
    "a hole at the beginning": [[4, 8], [4, 8], [8, 12]],
    "negative": [[-12, -8], [4, 8], [8, 12]], "backwards": [[0, 4], [8, 4], [8, 12]],
    "unused bytes at the end": [[0, 4], [4, 8]], "too many": [[0, 4], [4, 8], [8, 16]],
}


def three_numbers(path, offsets):
    """Write a safetensors file with the numbers 1, 2 and 3 under a, b and c."""
    header = json.dumps({name: {"dtype": "F32", "shape": [(last - first) // 4],
                                "data_offsets": [first, last]}
                         for name, (first, last) in zip("abc", offsets)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<3f", 1, 2, 3))
    return path


@pytest.mark.parametrize("offsets", OFFSETS)
def test_tensors_that_do_not_follow_one_another_are_refused(tmp_path, offsets):
    """As the library that made the format does: each byte belongs to one tensor. Their order in the
    header does not matter."""
    good = three_numbers(tmp_path / "a.safetensors", [[8, 12], [0, 4], [4, 8]])
    found = {name: value.item() for name, value in read_weights(good).items()}
    assert found == {"b": 1, "c": 2, "a": 3}
    with pytest.raises(UserError, match="not a file of weights, or a damaged one"):
        read_weights(three_numbers(tmp_path / "a.safetensors", OFFSETS[offsets]))


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_of_weights_is_refused(tmp_path, damage):
    random_gpt(SMALL).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    assert "model.safetensors: not a file of weights" in refusal(tmp_path)


@for_all
@given(st.integers(0, 3000), st.integers(1, 255))
def test_any_changed_byte_is_another_weight_or_is_refused(tmp_path_factory, at, change):
    """Whatever the damage, it is never a traceback."""
    folder = tmp_path_factory.mktemp("model")
    random_gpt(SMALL).save_pretrained(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= change
    path.write_bytes(content)
    try:
        GPT.from_pretrained(folder)
    except UserError as error:
        assert str(path) in str(error)


def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    assert "not a file of weights" in refusal(tmp_path)
    assert not (tmp_path / "pwned").exists()
    torch.save({"wte.weight": [1, 2]}, "pytorch_model.bin")
    assert "not a file of weights" in refusal(tmp_path)


def test_a_folder_without_the_files_says_which_and_what_else_there_is(tmp_path):
    message = refusal(tmp_path)
    assert "config.json: cannot be read: No such file" in message and "gpt2-medium" in message
    random_gpt(SMALL).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    assert ("has config.json, generation_config.json, tf_model.h5, but no model.safetensors or "
            "pytorch_model.bin") in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors: only a pointer of Git LFS; git lfs pull" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "expected the config.json of a GPT-2" in refusal(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    assert "(the folder has adapter_model.safetensors)" in refusal(adapter)


# ------------------------------------------------------------------------------------------------
# The tokenizer of a folder
# ------------------------------------------------------------------------------------------------

REVIEWS = get_tokenizer("reviews")
ARGS = SimpleNamespace(precision="float32", compile="off")


def reviews_folder(folder, surplus=0):
    """A folder with a model for the reviews tokenizer, with `surplus` more ids, and the tokenizer.
    Returns the model."""
    model = random_gpt(GPTConfig(64, REVIEWS.n_vocab + surplus, 1, 2, 8))
    model.save_pretrained(folder)
    write_tokenizer(folder, REVIEWS, 64)
    change_config(folder, eos_token_id=REVIEWS.eot_token)
    return model


def opened(folder):
    """The refusal of a folder, or the name of its tokenizer."""
    try:
        return open_checkpoint(folder, "cpu", ARGS)[2]["tokenizer"]
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return str(error)


@pytest.fixture
def gpt2_tokens(monkeypatch):
    """In place of GPT-2's tokenizer, which needs a file: 256 bytes, and as many others."""
    ranks = {i.to_bytes(1 if i < 256 else 3, "big"): i for i in range(50256)}
    gpt2 = byte_pairs("gpt2", ranks)
    for module in (tasks.tokenizers, tasks.checkpoint):
        monkeypatch.setattr(module, "get_tokenizer",
                            lambda name: gpt2 if name == "gpt2" else get_tokenizer(name))
    return gpt2


def test_a_folder_says_which_of_our_tokenizers_it_has(tmp_path, gpt2_tokens, capsys):
    """Without tokenizer files it is taken to be GPT-2's, and that is said. End-of-text stays the
    same when a vocabulary is padded, as this one is."""
    reviews_folder(tmp_path / "a")
    assert opened(tmp_path / "a") == "reviews"
    model = random_gpt(GPTConfig(8, 50304, 1, 1, 2))
    model.save_pretrained(tmp_path / "b")
    assert opened(tmp_path / "b") == "gpt2"
    assert "no tokenizer files, so its tokens are taken to be GPT-2's" in capsys.readouterr().out
    vocabulary = vocabulary_of(gpt2_tokens)
    (tmp_path / "b/vocab.json").write_text(json.dumps(vocabulary | {"[PAD]": 50257}))
    assert opened(tmp_path / "b") == "gpt2"
    assert "no tokenizer files" not in capsys.readouterr().out
    model.save_pretrained(tmp_path / "a")
    assert "end with <|endoftext|> here, which is 338 in the reviews tokenizer" in opened(
        tmp_path / "a")
    (tmp_path / "a/vocab.json").write_text(json.dumps(vocabulary))
    assert "tokenizer.json and vocab.json are of two tokenizers" in opened(tmp_path / "a")


def test_tokens_of_another_language_are_refused_though_there_are_as_many(tmp_path, gpt2_tokens):
    """Weights for the tokens of another tokenizer would be trained on ids that mean other text. One
    token in another place is enough."""
    random_gpt(GPTConfig(8, 50257, 1, 1, 2)).save_pretrained(tmp_path)
    vocabulary = vocabulary_of(gpt2_tokens)
    shifted = {token: (i + 1) % 50257 for token, i in vocabulary.items()}       # end-of-text is 0
    swapped = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    for wrong in (shifted, swapped, {}):
        (tmp_path / "vocab.json").write_text(json.dumps(wrong))
        assert "vocab.json: the tokens of another tokenizer" in opened(tmp_path)
    for damaged in ("", "[1]", "{", "[" * 10**5):
        (tmp_path / "vocab.json").write_text(damaged)
        assert "vocab.json: not a tokenizer's file" in opened(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "spiece.model").touch()
    assert "spiece.model: the tokens of another tokenizer" in opened(tmp_path)
    (tmp_path / "spiece.model").unlink()
    for eos in (0, 50257, [50256, 50257]):
        change_config(tmp_path, eos_token_id=eos)
        assert f"eos_token_id is {json.dumps(eos)}, but answers end" in opened(tmp_path)


def test_surplus_ids_change_no_log_prob_and_are_never_sampled(tmp_path, capsys):
    """Some tools pad the vocabulary or add tokens. The surplus rows are dropped: logits of zero
    would lie far above GPT-2's."""
    padded = reviews_folder(tmp_path, surplus=5)
    model, tokenizer, _ = open_checkpoint(tmp_path, "cpu", ARGS)
    assert "has 344 ids; those beyond the 339 of the reviews tokenizer" in capsys.readouterr().out
    item = encode(Preference("The plot was", [" good.", " dull."], [(0, 1)]), tokenizer, 64)
    batch = pack([item], 64)
    hidden = padded.hidden(batch.tokens, batch.positions, batch.mask()).flatten(0, 1)
    logits = (hidden[batch.source] @ padded.wte.weight.T)[:, :339]
    expected = logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    torch.testing.assert_close(model.token_logps(batch), expected)
    answers = model.generate([[338]] * 200, 20, temperature=100.0)
    assert max(map(max, answers)) < 339
    model.logps(batch).sum().backward()
    assert model.wte.weight.grad.shape == (339, 8)


def encode_by_hand(folder, text):
    """The ids of a text by tokenizer.json alone: byte-pair encoding as GPT-2's files describe it,
    except for words that are tokens."""
    found = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    merges = [tuple(pair) for pair in found["model"]["merges"]]
    assert found["model"]["ignore_merges"] and found["pre_tokenizer"]["type"] == "ByteLevel"
    [first, _] = found["post_processor"]["single"]
    ids = list(found["post_processor"]["special_tokens"][first["SpecialToken"]["id"]]["ids"])
    for word in regex.findall(GPT2_PATTERN, text):
        parts = [byte_letters()[b] for b in word.encode()]
        if "".join(parts) in vocabulary:
            parts = ["".join(parts)]
        while possible := [pair for pair in zip(parts, parts[1:]) if pair in merges]:
            i = list(zip(parts, parts[1:])).index(min(possible, key=merges.index))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocabulary[part] for part in parts]
    return ids


TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(
    "The| plot| was|My|An| an|Theory| Mya| good|\n\n|  |'s|é|12|?!".split("|"))).map("".join)


@for_all
@given(TEXTS)
def test_the_written_tokenizer_begins_every_text_with_end_of_text(tmp_path_factory, text):
    """After it come the ids that training saw. Without it, transformers would condition an answer
    on another prompt than training did."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, REVIEWS, 64)
    assert encode_by_hand(folder, text) == [REVIEWS.eot_token, *REVIEWS.encode_ordinary(text)]


def test_the_tokens_and_merges_of_gpt2_are_written_as_they_were_published(tmp_path):
    """encoder.json and vocab.bpe, which tiktoken downloads, are GPT-2's vocab.json and merges.txt.
    Each tokenizer made of them is recognised when it is read back."""
    try:
        gpt2 = get_tokenizer("gpt2")
    except UserError:
        pytest.skip("GPT-2's tokenizer is not in tiktoken's cache")
    write_tokenizer(tmp_path, gpt2, 1024)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert model["vocab"] == vocabulary_of(gpt2) and len(model["merges"]) == 50000
    assert ["Ġ", "t"] == model["merges"][0] and model["vocab"]["Ġthe"] == 262
    assert name_of_vocabulary(tmp_path / "tokenizer.json") == "gpt2"
    write_tokenizer(tmp_path, get_tokenizer("gpt2-8k"), 1024)
    assert name_of_vocabulary(tmp_path / "tokenizer.json") == "gpt2-8k"


def test_an_export_opens_here_and_answers_as_the_checkpoint_did(tmp_path, capsys):
    model = random_gpt(GPTConfig(64, REVIEWS.n_vocab, 1, 2, 8))
    save_checkpoint(tmp_path / "export.pt", model, tokenizer="reviews")
    there, asked = ["--device", "cpu", "--checkpoint"], ["--prompt", "The plot", "--top-k", "5"]
    folder = str(tmp_path / "export")
    for _ in range(2):                  # a second export replaces the first
        sample.main([*there, str(tmp_path / "export.pt"), "--export", folder])
        assert "Every prompt begins with <|endoftext|>" in capsys.readouterr().out
    sample.main([*there, str(tmp_path / "export.pt"), *asked])
    expected = capsys.readouterr().out
    sample.main([*there, folder, *asked])
    assert "The plot" in expected and capsys.readouterr().out == expected
    (tmp_path / "export/vocab.json").write_text("{}")
    with pytest.raises(SystemExit):
        sample.main([*there, str(tmp_path / "export.pt"), "--export", folder])
    assert "has vocab.json, which may be another model's" in capsys.readouterr().err


def test_sft_continues_from_a_folder_with_the_tokenizer_of_the_run(tmp_path, gpt2_tokens, capsys):
    quick = ["--task", "reviews", "--reviews", "40", "--steps", "1", "--device", "cpu", "--out"]
    reviews_folder(tmp_path / "reviews")
    train_sft.main([*quick, str(tmp_path / "a"), "--init", str(tmp_path / "reviews")])
    assert load_checkpoint(tmp_path / "a/sft.pt")[1]["tokenizer"] == "reviews"
    random_gpt(GPTConfig(64, 50257, 1, 1, 2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SystemExit):
        train_sft.main([*quick, str(tmp_path / "b"), "--init", str(tmp_path / "gpt2")])
    assert "trained with the gpt2 tokenizer: it needs --tokenizer gpt2" in capsys.readouterr().err


def test_transformers_opens_an_export_and_answers_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    reviews_folder(tmp_path)
    ours, tokenizer, _ = open_checkpoint(tmp_path, "cpu", ARGS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    settings_of = theirs.generation_config
    assert settings_of.do_sample and settings_of.temperature == 1 and not settings_of.top_k
    for prompt in ("", "The plot was", "My sister and I saw it twice. Theory\n\n  é"):
        ids = their_tokenizer(prompt, return_tensors="pt")
        assert ids["input_ids"].tolist() == [encode_prompt(prompt, tokenizer)]
        greedy = theirs.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist()
        answer = ours.generate([encode_prompt(prompt, tokenizer)], 12, 0, eot=338)[0]
        assert greedy == encode_prompt(prompt, tokenizer) + answer
        assert their_tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True) == prompt


# ------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A web server on the loopback address. `server.files`: {path: bytes}; `server.asked`: the
    paths of all GET requests; `server.cut`: how many bytes at the end of each answer are lost."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = here.files.get(self.path)
            if self.command == "GET":
                here.asked.append(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content:
                self.wfile.write(content[:len(content) - here.cut])

        do_HEAD = do_GET

        def log_message(self, *words):
            pass
    here = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.files, here.asked, here.cut = {}, [], 0
    here.url = f"http://127.0.0.1:{here.server_port}"
    threading.Thread(target=here.serve_forever, daemon=True).start()
    yield here
    here.shutdown()
    here.server_close()


def refused_download(url, path, sha256=None):
    """The message of a download that fails, which must leave nothing behind."""
    with pytest.raises(UserError) as caught:
        download(url, path, sha256)
    assert list(path.parent.iterdir()) == []
    message = str(caught.value)
    assert url in message and str(path) in message and "by hand" in message
    return message


def test_a_file_is_downloaded_once(server, tmp_path):
    server.files["/a"] = b"hello"
    for _ in range(2):
        path = download(f"{server.url}/a", tmp_path / "folder" / "a")
        assert path.read_bytes() == b"hello"
    assert server.asked == ["/a"]
    assert [path.name for path in path.parent.iterdir()] == ["a"]


def test_a_wrong_checksum_a_broken_connection_and_a_web_page_leave_nothing(server, tmp_path):
    server.files |= {"/a": b"hello" * 100, "/page": b"\n<!DOCTYPE html><html>Please log in"}
    # 2cf24d... is the SHA-256 of "hello", not of this file.
    assert "hash" in refused_download(f"{server.url}/a", tmp_path / "a", "2cf24dba5fb0a30e26e83b2a")
    assert "web page" in refused_download(f"{server.url}/page", tmp_path / "a")
    assert "404" in refused_download(f"{server.url}/none", tmp_path / "a")
    server.cut = 7
    assert "broke after 493 of 500 bytes" in refused_download(f"{server.url}/a", tmp_path / "a")
    server.cut = 0
    assert download(f"{server.url}/a", tmp_path / "a").read_bytes() == b"hello" * 100


def test_without_a_network_one_sentence_says_what_to_fetch_and_where_to_put_it(tmp_path):
    # Nothing listens on port 9 of this machine.
    assert "refused" in refused_download("http://127.0.0.1:9/a", tmp_path / "a").lower()


def test_without_a_home_folder_torch_home_is_asked_for(tmp_path, monkeypatch):
    """Under an unknown user id, as in some containers, ~ stays as it is: a folder of that name
    would appear wherever the command runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match="no home folder; set TORCH_HOME"):
        GPT.from_pretrained("gpt2")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "a file"))
    with pytest.raises(UserError, match="a file.*cannot make this folder.*TORCH_HOME"):
        GPT.from_pretrained("gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_gpt2_is_downloaded_by_name_and_kept(server, tmp_path, monkeypatch):
    """This is how "gpt2" is loaded, with fewer layers: sizes from its name, one download."""
    sizes = dict(n_layer=1, n_head=1, n_embd=2)
    model = random_gpt(GPTConfig(**sizes))
    model.save_pretrained(tmp_path / "there")
    name = "/openai-community/gpt2-medium/resolve/main/model.safetensors"
    server.files[name] = (tmp_path / "there/model.safetensors").read_bytes()
    monkeypatch.setattr(runtime.hub, "HUB", server.url)
    monkeypatch.setitem(runtime.hub.RELEASED, "gpt2-medium", sizes)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        loaded = GPT.from_pretrained("gpt2-medium")
        assert loaded.config == GPTConfig(1024, 50257, 1, 1, 2)
        assert torch.equal(loaded.wte.weight, model.wte.weight)
    assert server.asked == [name]
    # "gpt2" has a published checksum, which is not that of this file.
    server.files[name.replace("gpt2-medium", "gpt2")] = server.files[name]
    with pytest.raises(UserError, match="invalid hash value"):
        GPT.from_pretrained("gpt2")


def test_the_released_sizes_have_as_many_parameters_as_their_names_say():
    """124M, 355M, 774M and 1.6B are V C + T C + L (12 C^2 + 13 C) + 2 C parameters."""
    for name, millions in [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0),
                           ("gpt2-xl", 1557.6)]:
        with torch.device("meta"):
            model = GPT(GPTConfig(**runtime.hub.RELEASED[name]))
        C, L = model.config.n_embd, model.config.n_layer
        n = 50257 * C + 1024 * C + L * (12 * C * C + 13 * C) + 2 * C
        assert sum(p.numel() for p in model.parameters()) == n
        assert n / 1e6 == pytest.approx(millions, abs=0.06)


def test_safetensors_of_other_precisions_are_read(tmp_path):
    """1.5 and -2 are exact in all: bfloat16 has float32's exponent and 7 bits of mantissa."""
    values = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    for dtype, kind in values.items():
        data = torch.tensor([[1.5, -2.0]], dtype=kind).view(torch.uint8).numpy().tobytes()
        header = json.dumps({"a": {"dtype": dtype, "shape": [1, 2],
                                   "data_offsets": [0, len(data)]}}).encode()
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)    # not aligned
        assert torch.equal(read_weights(path)["a"].float(), torch.tensor([[1.5, -2.0]]))
