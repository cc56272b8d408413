"""GPT-2's weights in the layout of the Hugging Face hub: config.json and model.safetensors.

`find_or_download` and `read_state` serve GPT.from_pretrained, and `write_pretrained` serves
GPT.save_pretrained. Weights have the names of our own modules, with "transformer." in front in the
files.
"""

import json
from pathlib import Path

import torch

from runtime.errors import UserError
from runtime.files import (
    cache_folder,
    download,
    load_tensors,
    reading,
    replacing,
    write_json,
)

HUB = "https://huggingface.co"
RELEASED = {"gpt2": dict(n_layer=12, n_head=12, n_embd=768),
            "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
            "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
            "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}
SHA256 = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}

# What config.json says about the network besides its sizes. Any other value is another network.
GPT2_CONFIG = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
               "n_inner": None, "scale_attn_weights": True,
               "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
               "add_cross_attention": False, "tie_word_embeddings": True}
# The names of its activation, GELU by tanh.
TANH_GELU = ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"]
# {field of GPTConfig: key of config.json}
SIZES = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}


def find_or_download(name_or_dir):
    """(sizes, paths of the weights) of a released GPT-2, which is downloaded once, or of a folder.
    sizes are keyword arguments of GPTConfig. Raises UserError."""
    if name_or_dir in RELEASED:
        url = f"{HUB}/openai-community/{name_or_dir}/resolve/main/model.safetensors"
        path = cache_folder() / name_or_dir / "model.safetensors"
        return RELEASED[name_or_dir], [download(url, path, SHA256.get(name_or_dir))]
    folder = Path(name_or_dir)
    config = read_config(folder / "config.json")
    return {ours: config[theirs] for ours, theirs in SIZES.items()}, find_weights(folder)


def find_weights(folder):
    """The files of weights in a folder: one, or all shards of it. Raises UserError."""
    digits = "[0-9]" * 5
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (folder / f"{stem}.{suffix}").exists():
            return [folder / f"{stem}.{suffix}"]
        shards = sorted(folder.glob(f"{stem}-{digits}-of-{digits}.{suffix}"))
        if shards and len(shards) != int(shards[0].stem[-5:]):
            raise UserError(f"{folder}: {len(shards)} files like {shards[0].name}, expected "
                            f"{int(shards[0].stem[-5:])}")
        if shards:
            return shards
    raise UserError(f"{folder}: {has(folder)}, but no model.safetensors or pytorch_model.bin; save "
                    "the whole model with save_pretrained of transformers")


def has(folder):
    """What a folder has, in words."""
    names = sorted(path.name for path in folder.glob("*"))
    return f"has {', '.join(names[:6]) or 'no files'}{' and more' if len(names) > 6 else ''}"


def write_pretrained(folder, config, state):
    """Write a GPTConfig and a state dict as config.json, generation_config.json (how transformers
    samples: from the distribution that was trained, until end-of-text) and model.safetensors."""
    eot = min(config.vocab_size, 50257) - 1         # GPT-2's, even if its vocabulary is padded
    facts = GPT2_CONFIG | {
        "architectures": ["GPT2LMHeadModel"], "n_layer": config.n_layer,
        "n_head": config.n_head, "n_embd": config.n_embd, "n_positions": config.block_size,
        "n_ctx": config.block_size, "vocab_size": config.vocab_size,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as file:
        write_safetensors(file, {f"transformer.{name}": transpose_matrix(name, weight.cpu())
                                 for name, weight in state.items()})
    write_json(folder / "config.json", facts)
    write_json(folder / "generation_config.json", {
        "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "do_sample": True,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0})


def read_config(path):
    """The config.json of a GPT-2, as a dict. Raises UserError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = {key: [value] for key, value in GPT2_CONFIG.items()} | {
            "activation_function": TANH_GELU, "n_inner": [None, 4 * found["n_embd"]]}
        for name in SIZES.values():
            found[name]
    except OSError as error:
        there = f" (the folder {has(path.parent)})" if path.parent.is_dir() else ""
        raise UserError(f"{path}: cannot be read: {error.strerror}{there}; expected one of "
                        f"{', '.join(RELEASED)}, or a folder with config.json and "
                        "model.safetensors or pytorch_model.bin") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: expected the config.json of a GPT-2, with "
                        f"{', '.join(SIZES.values())}") from error
    for key, values in wanted.items():
        if found.get(key, values[0]) not in values:
            raise UserError(f"{path}: {key} is {json.dumps(found[key])}; this GPT-2 has "
                            f"{json.dumps(values[0])}")
    return found


def transpose_matrix(name, weight):
    """Convert a weight from our layout to that of the files, or back. GPT-2's files store matrices
    for x @ W, but nn.Linear computes x @ W.T, so a block's four matrices are transposed."""
    matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.t() if matrix else weight


def from_hub_layout(weights, wanted, path):
    """Convert the tensors of a weights file to a state dict of ours, in float32.

    weights: {name: tensor}, names with or without "transformer." in front. wanted: our state dict,
    for its names and shapes. Dropped are the causal mask, which early versions stored as attn.bias,
    and the output head, which is tied to the token embedding. Raises UserError, naming the tensor.
    """
    found = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()
             if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = found.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in found and not torch.equal(head, found["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight is not wte.weight; GPT-2's head is tied to it")
    for name in sorted(found.keys() - wanted.keys()):
        raise UserError(f"{path}: {name} is not a weight of a GPT-2 of this size")
    for name in sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path}: {name} is missing")
    state = {}
    for name, tensor in found.items():
        shape, expected = tuple(tensor.shape), tuple(transpose_matrix(name, wanted[name]).shape)
        if shape != expected:
            raise UserError(f"{path}: {name} has shape {shape}, expected {expected}")
        state[name] = transpose_matrix(name, tensor).to(
            torch.float32, copy=True, memory_format=torch.contiguous_format)
    return state


def read_state(paths, wanted):
    """The weights in files as a state dict of ours; wanted as in from_hub_layout."""
    weights = {}
    for path in paths:
        weights |= read_weights(path)
    return from_hub_layout(weights, wanted, paths[0] if len(paths) == 1 else paths[0].parent)


def read_weights(path):
    """{name: tensor} of model.safetensors or pytorch_model.bin. Raises UserError."""
    with reading(path, "a file of weights"):
        if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: only a pointer of Git LFS; git lfs pull fetches the file")
        found = read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
        if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
            raise ValueError("expected names and tensors, and nothing else")
        return found


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                     "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Read a safetensors file as {name: tensor}. The file has three parts:

        8 bytes    n, the length of the header, little-endian
        n bytes    JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
        the rest   the tensors' bytes, at their offsets, without gaps

    Raises ValueError, KeyError and the like for any other file, or for a truncated one. The file
    has no checksums, so a changed weight goes unnoticed.
    """
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    n = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    header = json.loads(raw[8:8 + n].numpy().tobytes())
    header.pop("__metadata__", None)
    data, tensors, end = raw[8 + n:], {}, 0
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = facts["data_offsets"]
        if first != end:
            raise ValueError(f"{name} begins at {first}, but the one before ends at {end}")
        tensor = data[first:last].clone().view(SAFETENSORS_TYPES[facts["dtype"]])
        tensors[name], end = tensor.view(facts["shape"]), last
    if end != len(data):
        raise ValueError(f"{len(data)} bytes of tensors, expected {end}")
    return tensors


def write_safetensors(file, tensors):
    """Write {name: float32 tensor on the CPU} to an open binary file."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # align the tensors
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().numpy().data)
