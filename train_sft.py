"""Supervised fine-tuning (SFT): maximum likelihood on given answers. DPO starts from the resulting
model; train_dpo.py has the same loop with a different loss and no learning rate decay.

    python train_sft.py                                # reviews, written by the task's own grammar
    python train_sft.py --task imdb                    # GPT-2, on real film reviews
    python train_sft.py --task hh                      # GPT-2, on Anthropic's chosen answers
    python train_sft.py --data pairs.jsonl             # the best answers of your own preferences
    torchrun --nproc_per_node 8 train_sft.py --task hh # on eight GPUs

    loss = -sum(log pi(y|x) of each answer y to its prompt x) / (number of answer tokens)

Writes sft.pt and sft_metrics.csv to out/<task>/.
"""

import math

import torch

from data import Batches, batches_in_order, micro_batches
from runtime.checkpoint import data_source, initial_model, save_checkpoint
from runtime.cli import choose_row_length, command, set_up, warn_of_large_lr
from runtime.files import claim_folder
from runtime.flags import parse_sft_flags
from runtime.parallel import compiled_logps, sum_gradients
from runtime.run import Log, TrainingState, is_due
from tasks import encode_splits, evaluated, task_of
from tasks.tokenizers import get_tokenizer

# Defaults that depend on the initial weights: GPT-2's, or random ones, of the sizes below.
LR = {"pretrained": 2e-5, "random": 5e-3, "imdb-small": 2e-3}
SIZES = {"random": {"block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "init_std": 0.085},
         "imdb-small": {"block_size": 256, "n_layer": 6, "n_head": 8, "n_embd": 256,
                        "init_std": 0.03}}

COLUMNS = {"loss": ".4f", "grad_norm": ".2f", "lr": ".1e", "held_out_loss": ".4f"}


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(model, examples, held_out, args):
    """Maximise the likelihood of examples, a list of Encoded (the token ids of a prompt and its
    answers; see data.py) with one answer each. Trains the model in place. held_out: more examples,
    for evaluation only. args: the flags of parse_args."""
    batches = Batches(examples, args.batch, args.seed, whole=True)  # batches of texts, not of pairs
    n_steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
    # beta2 0.99 instead of Adam's 0.999, because a run from random weights must soon forget the
    # large gradients of its first steps. (DPO, which starts from trained weights, keeps 0.999.)
    optimizer = model.optimizer(args.lr, args.weight_decay, betas=(0.9, 0.99))
    scaler = grad_scaler(model)
    # The log needs batches and scaler to report a gradient that is not finite. The state is saved
    # for --resume, which needs the data to check that it is still the same.
    log = Log(args.out / "sft_metrics.csv", COLUMNS, batches, scaler)
    state = TrainingState(args.out / "sft_state.pt", args, model, optimizer, scaler, log, batches,
                          held_out)
    logps_of = compiled_logps(model)                                # model.logps, perhaps compiled
    for step in state.steps(n_steps, "SFT"):                        # from 0, or with --resume later
        # At some steps, evaluate on held-out texts, with the weights that this step starts from.
        evaluating = held_out and is_due(step, n_steps, args.eval_every)
        if evaluating:
            evaluate_examples(model, held_out, args, log)
        # One batch of args.batch answers, forward and backward. The gradients of its micro-batches
        # (state.n_micro_batches of them, --accumulate or as few as fit in memory) add up.
        batch = batches[step]                                       # a list of Encoded
        n_tokens = sum(len(item.answers[0]) for item in batch)
        for micro_batch in micro_batches(batch, state.n_micro_batches, args.row_length, model):
            logps = logps_of(micro_batch)                           # (N,) log pi(y|x)
            loss = -logps.sum() / n_tokens                          # its share of the batch mean
            scaler.scale(loss).backward()
            log.add(len(micro_batch.target), loss=-logps.detach().sum())    # a sum, and its count
        # One update.
        sum_gradients(model)                                        # of all processes
        lr = args.lr * min(warmup(step, args.warmup), cosine(step, n_steps))    # the lower one
        grad_norm = update(model, optimizer, scaler, lr, args.clip)
        log.note_update(step, grad_norm, lr)
        # At some steps, the same for all processes, write a line of the log or save the state.
        if evaluating or is_due(step, n_steps, args.log_every):
            log.write(step)
        state.save_if_due(step)


@torch.no_grad()
def evaluate_examples(model, held_out, args, log):
    """Log the loss per token of all held-out answers."""
    logps_of = compiled_logps(model)
    for batch in batches_in_order(held_out, args.row_length, model):
        log.add(len(batch.target), held_out_loss=-logps_of(batch).sum())


# ------------------------------------------------------------------------------------------------
# The update, which DPO shares
# ------------------------------------------------------------------------------------------------


def warmup(step, n_warmup):
    """The factor of a linear warm-up: 1 / n_warmup at step 0, and 1 from step n_warmup - 1 on."""
    return min(1.0, (step + 1) / max(1, n_warmup))


def cosine(step, n_steps):
    """The factor of a cosine decay, from 1 to 0.1."""
    return 0.55 + 0.45 * math.cos(math.pi * step / n_steps)


def update(model, optimizer, scaler, lr, clip):
    """One optimizer step with the accumulated gradients. Returns their norm before clipping, a
    tensor. If float16 overflowed, the norm is not finite and the scaler skips the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)          # gradients must have their true size before clipping
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def grad_scaler(model):
    """A GradScaler, which is active only in float16, where small gradients would underflow to 0."""
    return torch.amp.GradScaler(model.device.type, enabled=model.precision == torch.float16)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    claim_folder(args.out)
    tokenizer = get_tokenizer(args.tokenizer)
    model = initial_model(args, tokenizer, device)
    choose_row_length(args, model.config.block_size)
    source = data_source(args)              # before training: the file may change meanwhile
    splits = task_of(args).sft_examples(args)
    examples, held_out = encode_splits(splits, args.data or args.task, tokenizer, args)
    warn_of_large_lr(args, LR["pretrained"], args.init)
    print(f"SFT of {sum(p.numel() for p in model.parameters()):,} parameters ({args.init}) on "
          f"{device}")
    train(model, examples, evaluated(held_out), args)
    save_checkpoint(args.out / "sft.pt", model, tokenizer=args.tokenizer, stage="sft",
                    init=args.init, seed=args.seed, **source)
    (args.out / "sft_state.pt").unlink(missing_ok=True)     # the run has finished
    print(f"wrote {args.out / 'sft.pt'}")


def parse_args(argv):
    return parse_sft_flags(__doc__, argv, LR, SIZES)


if __name__ == "__main__":
    main()
