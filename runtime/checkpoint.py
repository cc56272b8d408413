"""The model that a run starts from, and checkpoints. sft.pt and dpo.pt hold a model's weights and
sizes, and facts about it: tokenizer, stage, the weights and the data it was trained from."""

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.files import load_tensors, reading, replacing
from runtime.json_lines import check_is_a_file
from runtime.parallel import set_compiled, set_precision
from runtime.report import names_of
from tasks.tokenizers import TOKENIZERS, get_tokenizer


def save_checkpoint(path, model, **facts):
    """Write weights, sizes and facts (plain values: tokenizer, stage, seed, ...) to one file.
    Raises UserError instead of saving weights that are NaN or infinite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{path}: some weights are NaN or infinite, so they are not saved; a lower "
                        "--lr may help")
    with replacing(path) as file:
        torch.save({"config": asdict(model.config), "facts": facts, "model": model.state_dict()},
                   file)


def load_checkpoint(path, device="cpu", kind=GPT):
    """Returns (model, facts) of a file that save_checkpoint wrote. kind: the class of the model.
    Raises UserError for other files."""
    written_by = "train_sft.py or train_dpo.py" if kind is GPT else "experiments.reward_model"
    with reading(path, f"a checkpoint of {written_by}"):
        saved = load_tensors(path, device)
        config, weights = GPTConfig(**saved["config"]), saved["model"]
        if len(weights) < config.n_layer:
            raise ValueError("there are more layers than weights")
        with torch.device("meta"):      # allocates nothing before the sizes are compared
            model = kind(config)
        model.load_state_dict(weights, assign=True)
        return model.float(), saved["facts"]


def initial_model(args, tokenizer, device):
    """The model that SFT starts from, on a device: random weights, or those of --init. Raises
    UserError."""
    if args.init == "random":
        torch.manual_seed(args.seed)
        config = GPTConfig(args.block_size, tokenizer.n_vocab, args.n_layer, args.n_head,
                           args.n_embd)
        model = GPT(config, args.init_std)
    else:
        model = GPT.from_pretrained(args.init)
    if model.config.vocab_size != tokenizer.n_vocab:
        raise UserError(f"--init {args.init} has {model.config.vocab_size} ids, but the "
                        f"{args.tokenizer} tokenizer has {tokenizer.n_vocab}")
    return prepared(model.to(device), args)


def prepared(model, args):
    """A model on its device, with the precision and, in training, the compilation of the flags."""
    set_precision(model, args.precision)
    set_compiled(model, getattr(args, "compile", "off"))
    return model


def open_checkpoint(path, device, args):
    """(model ready for use, tokenizer, facts) of a checkpoint, or of a folder in the layout of the
    Hugging Face hub, which has GPT-2's tokenizer. Raises UserError."""
    if path.is_dir():
        model = GPT.from_pretrained(path).to(device)
        facts = {"tokenizer": "gpt2", "init": str(path.resolve())}
    else:
        model, facts = load_checkpoint(path, device)
    name = facts.get("tokenizer") if isinstance(facts, dict) else None
    if name not in TOKENIZERS:
        raise UserError(f"{path}: a checkpoint that does not say which tokenizer it is for")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{path}: some of its weights are NaN or infinite")
    tokenizer = get_tokenizer(name)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"{path}: made for {model.config.vocab_size} ids, but the {name} tokenizer "
                        f"has {tokenizer.n_vocab}")
    return prepared(model, args), tokenizer, facts


def open_policies(paths, device, args):
    """({name: model}, tokenizer, {name: beta}) of checkpoints; each file is opened once. Raises
    UserError if they cannot be used together."""
    policies, betas, tokenizers = {}, {}, set()
    for path, name in names_of(paths).items():
        if name in policies:
            continue
        policies[name], tokenizer, facts = open_checkpoint(path, device, args)
        wanted = args.data.name if args.data else args.task
        if facts.get("source", wanted) != wanted:
            print(f"warning: {path} was trained on {facts['source']}, not on {wanted}; name its "
                  "data with --task or --data", file=sys.stderr)
        tokenizers.add(facts["tokenizer"])
        if "beta" in facts:
            betas[name] = facts["beta"]
    if len(tokenizers) > 1:
        raise UserError(f"{' and '.join(map(str, paths))} have different tokenizers")
    return policies, tokenizer, betas


def common_block_size(models):
    """The block size of models ({name: model}). Raises UserError if they differ."""
    sizes = sorted({model.config.block_size for model in models.values()})
    if len(sizes) > 1:
        raise UserError(f"checkpoints for {' and '.join(map(str, sizes))} tokens: to be measured "
                        "together they must have one block size")
    return sizes[0]


def data_source(args):
    """What a run trains on, for its checkpoint: the task, or the file's name and a digest of its
    content. Raises UserError."""
    if not args.data:
        return {"source": args.task}
    check_is_a_file(args.data)
    if args.data.is_fifo():
        raise UserError(f"{args.data}: a pipe; expected a regular file, because it is read more "
                        "than once")
    try:
        digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{args.data}: cannot be read: {error.strerror}") from error
    return {"source": args.data.name, "digest": digest}


def check_sft_checkpoint(path, model, facts, wanted, args):
    """Raise UserError if the SFT model at `path` does not fit the flags of train_dpo.py, or was
    trained on other data than `wanted`, the data_source of this run."""
    if args.tokenizer not in (None, facts["tokenizer"]):
        raise UserError(f"{path} was trained with --tokenizer {facts['tokenizer']}, "
                        f"not {args.tokenizer}")
    if not args.sft and {name: facts.get(name) for name in wanted} != wanted:
        other = "other content of " if facts.get("source") == wanted["source"] else ""
        raise UserError(f"{path} was trained on {other}{facts.get('source')}, not on "
                        f"{args.data or args.task}: name it with --sft to start from it anyway, or "
                        "train a new one with --fresh")
    init = facts.get("init", "random")
    if args.init and init not in (args.init, str(Path(args.init).resolve())):
        raise UserError(f"{path} was trained from {init} weights, not {args.init}: train a new one "
                        "with --fresh")
    if args.task == "reviews" and model.config.block_size < 64:
        raise UserError(f"{path}: a block size of {model.config.block_size} has no room for "
                        "reviews; train SFT with --block-size 64 or more")
