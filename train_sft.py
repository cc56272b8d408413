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

from data import Batches, batches_in_order
from runtime.cli import begin_run, choose_row_length, command, warn_of_large_lr
from runtime.parallel import set_compiled, sum_gradients
from runtime.run import Run
from tasks import task_of
from tasks.checkpoint import data_source, initial_model, save_checkpoint
from tasks.flags import parse_sft_flags
from tasks.tokenizers import get_tokenizer

# The numbers that decide the result. lr is the peak rate for GPT-2's weights. RANDOM has what
# differs from random weights, the default for reviews; a task may have other ones (`random`).
DEFAULTS = {"batch": 32, "epochs": 1.0, "lr": 2e-5, "warmup": 30, "clip": 1.0, "weight_decay": 0.0}
RANDOM = {"lr": 5e-3, "block_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64, "init_std": 0.085}
BETAS = (0.9, 0.99)     # of Adam. Not 0.999: a run from random weights must soon forget the large
                        # gradients of its first steps

COLUMNS = {"loss": ("loss", ".4f"), "held_out_loss": ("held out", ".4f"),
           "grad_norm": ("grad norm", ".2f"), "lr": ("lr", ".1e")}


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(model, examples, held_out, args):
    """Maximise the likelihood of examples, a list of Encoded (the token ids of a prompt and its
    answers; see data.py) with one answer each. Trains the model in place. held_out: more examples,
    for evaluation only. args: the flags of parse_args."""
    batches = Batches(examples, args.batch, args.seed, whole=True)  # batches of texts, not of pairs
    optimizer, scaler = model.optimizer(args.lr, args.weight_decay, BETAS), grad_scaler(model)
    run = Run("sft", COLUMNS, args, batches, held_out, model=model, optimizer=optimizer,
              scaler=scaler)

    def evaluate():
        evaluate_examples(model, held_out, args, run.log)
    for step in run.steps(evaluate):                                # evaluates, logs, saves
        n_tokens = sum(len(item.answers[0]) for item in batches[step])
        for batch in run.micro_batches(step):                       # their gradients add up
            logps = model.logps(batch)                              # (N,) log pi(y|x)
            loss = -logps.sum() / n_tokens                          # its share of the batch mean
            scaler.scale(loss).backward()
            run.log.add(len(batch.target), loss=-logps.detach().sum())      # a sum, and its count
        lr = args.lr * min(warmup(step, run.n_warmup), cosine(step, run.n_steps))
        grad_norm = update(model, optimizer, scaler, lr, args.clip)
        run.log.note_update(step, grad_norm, lr)


@torch.no_grad()
def evaluate_examples(model, held_out, args, log):
    """Log the loss per token of all held-out answers."""
    for batch in batches_in_order(held_out, args.row_length, model):
        log.add(len(batch.target), held_out_loss=-model.logps(batch).sum())


# ------------------------------------------------------------------------------------------------
# The update, which DPO shares
# ------------------------------------------------------------------------------------------------


def warmup(step, n_warmup):
    """The factor of a linear warm-up: 1 / n_warmup at step 0, and 1 from step n_warmup - 1 on. With
    n_warmup = 0 it is always 1."""
    return min(1.0, (step + 1) / max(1, n_warmup))


def cosine(step, n_steps):
    """The factor of a cosine decay, from 1 to 0.1."""
    return 0.55 + 0.45 * math.cos(math.pi * step / n_steps)


def update(model, optimizer, scaler, lr, clip):
    """One optimizer step at learning rate lr, with the gradients that backward() accumulated; they
    are summed over all processes and clipped to the norm `clip` first, and cleared afterwards.
    Returns their norm before clipping, a tensor. If float16 overflowed, the norm is not finite, the
    scaler skips the step and lowers its scale."""
    sum_gradients(model)
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
    device = begin_run(args, reads=["data"], writes=["sft.pt", "sft_metrics.csv"])
    task, source = task_of(args), data_source(args)
    splits = task.sft_examples(args)                        # before the weights: it may be missing
    tokenizer = get_tokenizer(args.tokenizer)
    model = initial_model(args, tokenizer, device)
    choose_row_length(args, model.config.block_size)
    examples, held_out = task.encoded(splits, args.data or args.task, tokenizer, args)
    set_compiled(model, examples, args)
    warn_of_large_lr(args, DEFAULTS["lr"], args.init)
    print(f"SFT of {sum(p.numel() for p in model.parameters()):,} parameters ({args.init}) on "
          f"{len(examples):,} texts, {device}")
    train(model, examples, held_out, args)
    save_checkpoint(args.out / "sft.pt", model, tokenizer=args.tokenizer, stage="sft",
                    init=args.init, seed=args.seed, **source)
    (args.out / "sft_state.pt").unlink(missing_ok=True)     # the run has finished
    print(f"wrote {args.out / 'sft.pt'}")


def parse_args(argv):
    return parse_sft_flags(__doc__, argv, DEFAULTS, RANDOM)


if __name__ == "__main__":
    main()
