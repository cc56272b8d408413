"""The tokenizers: GPT-2's, its smaller version, and the small one of the reviews task. They are
written to folders in the layout of the Hugging Face hub, and recognised in them."""

import json
import math
import re

import tiktoken

from runtime import hub
from runtime.errors import UserError
from runtime.files import write_json
from tasks.reviews import FEELINGS, PLURAL, QUALITIES, SINGULAR, VERDICTS, WHEN, WHO

TOKENIZERS = ["reviews", "gpt2", "gpt2-8k"]
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
EOT = "<|endoftext|>"
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model",
                   "sentencepiece.bpe.model"]
OF_A_MODEL = {".json", ".txt", ".jinja", ".model", ".safetensors", ".bin", ".h5", ".msgpack"}


class Tokenizer(tiktoken.Encoding):
    """A byte-pair encoding that raises UserError for a text on which tiktoken gives up."""

    def encode_ordinary(self, text):
        """The ids of a text. What looks like end-of-text in it stays text. Raises UserError."""
        try:
            return super().encode_ordinary(text)
        except BaseException as error:      # a million blanks and a letter: PanicException, which
            if type(error).__name__ != "PanicException":        # is not an Exception
                raise
            raise UserError(f"tiktoken cannot encode this text of {len(text):,} characters: "
                            f"{text[:40]!r}...") from error


def get_tokenizer(name):
    """A Tokenizer, which can encode any text. Raises UserError.

    "gpt2": GPT-2's 50,257 tokens. "gpt2-8k": the first 8,192 of its merges only, for models from
    random weights on a CPU, which would spend most of their time on the output head of 50,257
    tokens. "reviews": the 256 bytes and the words of the reviews task.
    """
    if name == "reviews":
        return reviews_tokenizer()
    try:
        gpt2 = tiktoken.get_encoding("gpt2" if name == "gpt2-8k" else name)
    except Exception as error:      # any kind of network error, or a cache that is not writable
        raise UserError(
            f"--tokenizer {name}: tiktoken could not load it ({type(error).__name__}); it needs "
            "the network once, or its files in the folder that TIKTOKEN_CACHE_DIR names") from error
    if name == "gpt2-8k":
        return first_merges(gpt2, 8192)
    return byte_pairs(name, gpt2._mergeable_ranks, gpt2._pat_str)


def byte_pairs(name, ranks, pattern=GPT2_PATTERN):
    """A Tokenizer. ranks: {bytes of a token: its id}, in the order of the merges. End-of-text comes
    after them."""
    return Tokenizer(name, pat_str=pattern, mergeable_ranks=ranks,
                     special_tokens={EOT: len(ranks)})


def first_merges(gpt2, n):
    """The first n merges of GPT-2's tokenizer, a byte-pair encoding of their own: each merge joins
    two tokens of earlier merges. A token's rank is the order of its merge, after the 256 bytes."""
    ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < 256 + n}
    return byte_pairs(f"gpt2-{n}", ranks)


def reviews_tokenizer():
    phrases = [*SINGULAR, *PLURAL, *WHO, *WHEN, *QUALITIES, *FEELINGS, *VERDICTS,
               "the was were and but saw watched this"]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
    tokens = sorted({f" {word}" for word in words | {"The"}} | {"The", "My", "We"})
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    return byte_pairs("reviews", ranks)


# The id of end-of-text in each tokenizer, which is the last.
EOT_IDS = {"reviews": reviews_tokenizer().eot_token, "gpt2": 50256, "gpt2-8k": 256 + 8192}


# ------------------------------------------------------------------------------------------------
# Tokenizers in folders of the Hugging Face hub
# ------------------------------------------------------------------------------------------------


def tokenizer_of(folder):
    """The name of the tokenizer that the model in a folder was trained with. Raises UserError if
    its tokenizer files or its end-of-text are not those of one of ours. Without such files, its
    tokens are taken to be GPT-2's, and a line says so."""
    eos = hub.read_config(folder / "config.json").get("eos_token_id")
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        print(f"{folder}: no tokenizer files, so its tokens are taken to be GPT-2's")
    names = {name_of_vocabulary(path) for path in files} or {"gpt2"}
    if len(names) > 1:
        raise UserError(f"{folder}: {' and '.join(path.name for path in files)} are of two "
                        "tokenizers")
    name = names.pop()
    eot = EOT_IDS[name]
    if eos not in (None, eot, [eot]):
        raise UserError(f"{folder / 'config.json'}: eos_token_id is {json.dumps(eos)}, but answers "
                        f"end with {EOT} here, which is {eot} in the {name} tokenizer")
    return name


def name_of_vocabulary(path):
    """The name of our tokenizer that has the tokens and ids of a tokenizer file, which may have
    more (tokens that somebody added). Raises UserError."""
    found = {}                                      # {token: id}
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "tokenizer.json":
                added = {token["content"]: token["id"] for token in found.get("added_tokens") or []}
                found = dict(found["model"]["vocab"]) | added
            found.items()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a tokenizer's file, or a damaged one") from error
    for name, eot in EOT_IDS.items():
        if found.get(EOT) == eot and found.items() >= vocabulary_of(get_tokenizer(name)).items():
            return name
    raise UserError(f"{path}: the tokens of another tokenizer; a model can be used here only if it "
                    "was trained with GPT-2's")


def write_tokenizer(folder, tokenizer, block_size):
    """Write a tokenizer as tokenizer.json, for transformers' AutoTokenizer and for tokenizer_of. It
    begins every text with end-of-text, as our prompts do; GPT-2's own files do not."""
    ranks, eot, letters = tokenizer._mergeable_ranks, tokenizer.eot_token, byte_letters()
    merges = [[spell(part, letters) for part in merge_of(token, ranks)]
              for token in sorted(ranks, key=ranks.get)[256:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    first = {"SpecialToken": {"id": EOT, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": eot, "content": EOT, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [first, a],
                           "pair": [first, a, b],
                           "special_tokens": {EOT: {"id": EOT, "ids": [eot], "tokens": [EOT]}}},
        # ignore_merges: a word that is a token is that token, even if no merges lead to it.
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary_of(tokenizer),
                  "merges": [parts for parts in merges if len(parts) == 2]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": EOT,
        "eos_token": EOT, "model_max_length": block_size, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]})      # no token types


def check_export_folder(folder):
    """Raise UserError if a folder has files of a model that an export does not replace, so that
    what is opened later would be a mixture."""
    written = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
               "tokenizer_config.json"}
    for path in sorted(folder.glob("*")):
        if path.suffix in OF_A_MODEL and path.name not in written:
            raise UserError(f"--export {folder}: has {path.name}, which may be another model's; "
                            "choose a new folder")


def merge_of(token, ranks):
    """The two tokens that a token's own merge joins: what its bytes become by all earlier merges.
    More than two if no merges lead to it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        if pairs[i] == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def vocabulary_of(tokenizer):
    """{token: id} as in the files of the hub, where each byte of a token is a printable letter."""
    letters = byte_letters()
    return ({spell(token, letters): rank for token, rank in tokenizer._mergeable_ranks.items()}
            | {EOT: tokenizer.eot_token})


def byte_letters():
    """GPT-2's alphabet for the 256 bytes: printable characters of Latin-1 stand for themselves, the
    others are written as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def spell(token, letters):
    return "".join(letters[b] for b in token)
