"""Checkpoints, and the model that a run starts from. sft.pt and dpo.pt hold a model's weights and
sizes, and facts about it: tokenizer, stage, the weights and the data it was trained from, and for a
policy its beta and a digest of its reference."""

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from model import GPT, GPTConfig
from runtime import hub
from runtime.cli import choose_row_length, warn_of_large_lr
from runtime.errors import UserError
from runtime.files import fingerprint, load_tensors, reading, replacing
from runtime.json_lines import check_is_a_file
from runtime.parallel import set_precision
from runtime.report import names_of
from tasks import task_of
from tasks.flags import flags_of_sft
from tasks.tokenizers import TOKENIZERS, get_tokenizer, tokenizer_of

# The hint if a checkpoint is missing, by its name.
WRITTEN_BY = {"sft.pt": "; python train_dpo.py or train_sft.py writes it",
              "dpo.pt": "; python train_dpo.py writes it",
              "reward.pt": "; python -m experiments.reward_model writes it",
              "ppo.pt": "; python -m experiments.ppo writes it"}


def save_checkpoint(path, model, reference=None, **facts):
    """Write weights, sizes and facts (plain values: tokenizer, stage, seed, ...) to one file, and a
    digest of the reference that a policy was trained against. Raises UserError instead of saving
    weights that are NaN or infinite."""
    if reference is not None:
        facts["reference"] = fingerprint(reference)
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
    if not Path(path).exists():
        raise UserError(f"{path}: no such file" + WRITTEN_BY.get(Path(path).name, ""))
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
        model, name = open_pretrained(args.init)
        if name != args.tokenizer:
            raise UserError(f"--init {args.init} was trained with the {name} tokenizer: it needs "
                            f"--tokenizer {name}")
    model = model.to(device)
    set_precision(model, args.precision)
    return model


def open_pretrained(name_or_dir):
    """(model, name of its tokenizer) of a released GPT-2 or of a folder in the layout of the
    Hugging Face hub. Raises UserError."""
    folder = Path(name_or_dir)
    name = "gpt2" if name_or_dir in hub.RELEASED else tokenizer_of(folder)
    model = GPT.from_pretrained(name_or_dir)
    found, wanted = model.config.vocab_size, get_tokenizer(name).n_vocab
    if found < wanted:
        raise UserError(f"{folder}: made for {found} ids, but the {name} tokenizer has {wanted}")
    if found > wanted:
        print(f"{folder}: has {found:,} ids; those beyond the {wanted:,} of the {name} tokenizer "
              "are dropped")
        weight = model.wte.weight.detach()[:wanted].clone()
        model.wte = torch.nn.Embedding.from_pretrained(weight, freeze=False)
        model.config.vocab_size = wanted
    return model, name


def open_checkpoint(path, device, args):
    """(model ready for use, tokenizer, facts) of a checkpoint, or of a folder in the layout of the
    Hugging Face hub. Raises UserError."""
    if path.is_dir():
        model, name = open_pretrained(path)
        model, facts = model.to(device), {"tokenizer": name, "init": str(path.resolve())}
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
    set_precision(model, args.precision)
    return model, tokenizer, facts


def open_policies(paths, device, args):
    """({name: model}, tokenizer, {name: facts}) of checkpoints; each file is opened once. Raises
    UserError if they cannot be used together."""
    policies, facts_of, tokenizers = {}, {}, set()
    for path, name in names_of(paths).items():
        if name in policies:
            continue
        policies[name], tokenizer, facts = open_checkpoint(path, device, args)
        facts_of[name] = facts
        wanted = args.data.name if args.data else args.task
        if facts.get("source", wanted) != wanted:
            print(f"warning: {path} was trained on {facts['source']}, not on {wanted}; name its "
                  "data with --task or --data", file=sys.stderr)
        tokenizers.add(facts["tokenizer"])
    if len(tokenizers) > 1:
        raise UserError(f"{' and '.join(map(str, paths))} have different tokenizers")
    return policies, tokenizer, facts_of


def open_with_reference(paths, reference_path, device, args):
    """({name: policy}, reference, tokenizer, {name: beta}) of checkpoints that are measured against
    a reference. Warns if a policy was trained from another reference. Raises UserError if they
    cannot be used together."""
    models, tokenizer, facts_of = open_policies([*paths, reference_path], device, args)
    sizes = sorted({model.config.block_size for model in models.values()})
    if len(sizes) > 1:
        raise UserError(f"checkpoints for {' and '.join(map(str, sizes))} tokens: to be measured "
                        "together they must have one block size")
    names = names_of([*paths, reference_path])
    reference, digest = models[names[reference_path]], fingerprint(models[names[reference_path]])
    policies, betas = {}, {}
    for path in paths:
        name = names[path]
        policies[name], facts = models[name], facts_of[name]
        if "beta" in facts:
            betas[name] = facts["beta"]
        if policies[name] is not reference and facts.get("reference", digest) != digest:
            print(f"warning: {path} was not trained from {reference_path}, so its KL, accuracy and "
                  "rewards here are not those of its training; name its own reference with "
                  "--reference", file=sys.stderr)
    return policies, reference, tokenizer, betas


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
    least = task_of(args).least_block_size
    if model.config.block_size < least:
        raise UserError(f"{path}: a block size of {model.config.block_size} has no room for "
                        f"{args.task}; train SFT with --block-size {least} or more")


def plan_sft(args):
    """(the flags of train_sft.py if train_dpo.py has to run it first, else None; what happens, in
    words)."""
    own = args.out / "sft.pt"
    unfinished = (args.out / "sft_state.pt").exists() and not args.sft
    flags = flags_of_sft(args)
    if args.fresh:
        return flags, "SFT again, as --fresh asks"
    if args.resume and unfinished:
        return flags, f"SFT, since {own} is from an unfinished run"
    if not args.sft and not own.exists():
        return flags, f"SFT, since there is no {own} yet"
    later = "; a later SFT run did not finish, and --resume would continue it"
    return None, f"no SFT: starting from {args.sft or own}" + (later if unfinished else "")


def open_start(args, device, usual_lr):
    """(model, tokenizer, facts for the checkpoints to come) of --sft, or of sft.pt of the run.
    Sets --sft, and --row-length to the block size, if they were not given. usual_lr: of pretrained
    weights. Raises UserError if the model does not fit the flags or the data."""
    path, source = args.sft or args.out / "sft.pt", data_source(args)
    model, tokenizer, facts = open_checkpoint(path, device, args)
    check_sft_checkpoint(path, model, facts, source, args)
    args.sft = path
    choose_row_length(args, model.config.block_size)
    init = facts.get("init", "random")
    warn_of_large_lr(args, usual_lr, init)
    return model, tokenizer, {"tokenizer": facts["tokenizer"], "init": init, "seed": args.seed,
                              **source}
