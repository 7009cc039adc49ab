"""Tokenizers of the kinds that are in use, built by the `tokenizers` library alone, and documents that are hard for them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog; it's 42 years old. Der schnelle Fuchs. "
    "\u041b\u0438\u0441\u0430 \u0431\u044b\u0441\u0442\u0440\u0430.\n"
)

DOCUMENTS = {
    "english": "It's the 1st of May,\tand  the quick fox doesn't   jump.\n",
    "russian": "\u0411\u044b\u0441\u0442\u0440\u0430\u044f \u043b\u0438\u0441\u0430 \u043f\u0440\u044b\u0433\u0430\u0435\u0442.",
    "japanese": "\u7d20\u65e9\u3044\u72d0\u304c\u6016\u3051\u8005\u306e\u72ac\u3092\u98db\u3073\u8d8a\u3048\u308b\u3002",
    "emoji": "\U0001f98a\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301",
    "empty": "",
    "long": (TEXT + "x1 = f(2)\n") * (5_000_000 // len((TEXT + "x1 = f(2)\n").encode())),
    "crlf": "one\r\ntwo\r\n\rthree\n\n\r\n",
    "bom": "\ufeffThe fox",
    "special": "a<|endoftext|>b</s>c[SEP]",
    "blanks": "  \u00a0 \u2028 \x00\x1b ",
}
"""By name; `long` has 5 MB."""
SHORT = {name: text for name, text in DOCUMENTS.items() if name != "long"}


def byte_level(folder: Path) -> Path:
    """As GPT-2: byte-level BPE, with an end token that has no entry beside it, and an added token beyond the vocabulary's size."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rules.train_from_iterator([TEXT] * 5, trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=alphabet))
    rules.add_special_tokens(["<|endoftext|>", "<|tool|>"])
    return _write(rules, folder)


def sentencepiece(folder: Path) -> Path:
    """As Llama 2: BPE over blanks shown as U+2581, bytes for unknown characters, a blank put before a text and taken away again."""
    rules = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, show_progress=False, special_tokens=pieces)
    rules.train_from_iterator(["\u2581".join(["", *TEXT.split()])] * 3, trainer)
    spec = json.loads(rules.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    rules = Tokenizer.from_str(json.dumps(spec))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rules.decoder = decoders.Sequence(steps)
    rules.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(rules, folder, eos_token={"content": "</s>", "lstrip": False})


def metaspace(folder: Path) -> Path:
    """As T5: pieces with a probability each, blanks shown as U+2581, the decoder takes the first one away."""
    letters = sorted({letter for text in (*DOCUMENTS.values(), TEXT) for letter in text[:2000] if not letter.isspace()})
    pieces = [("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581the", -3.0), ("\u2581fox", -3.5), ("ick", -4.0)]
    rules = Tokenizer(models.Unigram([*pieces, *((letter, -6.0) for letter in letters if letter != "\u2581")], 1))
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    rules.decoder = decoders.Metaspace()
    rules.add_special_tokens(["</s>"])
    return _write(rules, folder, eos_token="</s>")


def wordpiece(folder: Path) -> Path:
    """As BERT, whose file says to cut a text at 8 ids, to fill it up, and to put [CLS] and [SEP] around it."""
    rules = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rules.normalizer = normalizers.BertNormalizer()
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    rules.train_from_iterator([TEXT] * 5, trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=special))
    rules.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    rules.enable_truncation(8)
    rules.enable_padding(length=16)
    return _write(rules, folder)


KINDS = {
    "byte_level": (byte_level, "<|endoftext|>"),
    "sentencepiece": (sentencepiece, "</s>"),
    "metaspace": (metaspace, "</s>"),
    "wordpiece": (wordpiece, "[SEP]"),
}
"""Each with the token that ends its documents."""


def plain(folder: Path) -> Tokenizer:
    """The library's own reading of a folder's tokenizer, giving whole texts."""
    rules = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rules.no_truncation()
    rules.no_padding()
    return rules


def ids_of(rules: Tokenizer, text: str) -> list[int]:
    """What the library gives for a text by itself."""
    return rules.encode(text, add_special_tokens=False).ids


def _write(rules: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    rules.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
