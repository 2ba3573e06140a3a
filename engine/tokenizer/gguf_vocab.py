"""A tokenizer from the metadata of a GGUF file.

Byte-level BPE (``gpt2``), SentencePiece BPE (``llama``) and WordPiece (``bert``) vocabularies become the
``tokenizers.Tokenizer`` that the model had before its conversion. Two things follow llama.cpp rather than
transformers' reading of the same file, because they are what the models were trained with: the ``smollm`` family splits
digits before anything else, and Llama 3's vocabulary takes whole words before merging.

Source: ``src/llama-vocab.cpp`` of llama.cpp; transformers' ``integrations/gguf``. Reference:
tests/parity/test_gguf_loading.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import FormatError
from engine.loading.fields import Fields
from engine.loading.gguf_file import GGUFFile
from engine.tokenizer.hf_files import TokenizerParts
from engine.tokenizer.token_bytes import byte_alphabet

CONTROL, USER_DEFINED, BYTE = 3, 4, 6
MAX_TOKEN_CHARS = 512
SPACE_MARK = "▁"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "roberta-bpe", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
}
"""``tokenizer.ggml.pre`` to the patterns that split a text, one after the other."""

_TAKES_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_ADDS_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
    "mask_token": "mask_token_id",
    "cls_token": "cls_token_id",
}


class _Vocabulary:
    """The lists of the ``tokenizer.ggml`` keys, checked."""

    def __init__(self, path: Path) -> None:
        metadata = GGUFFile(path).metadata
        self.source = str(path)
        self.fields = Fields(_below(metadata, "tokenizer.ggml."), self.source)
        self.architecture = Fields(metadata, self.source).string("general.architecture")
        self.tokens = self._list("tokens", str)
        if not self.tokens or max(map(len, self.tokens)) > MAX_TOKEN_CHARS:
            raise FormatError(f"{path}: holds no vocabulary of tokens of at most {MAX_TOKEN_CHARS} characters")
        self.types = self._list("token_type", int) or [1] * len(self.tokens)
        self.scores = self._list("scores", float)
        for name, values in (("token_type", self.types), ("scores", self.scores)):
            if values and len(values) != len(self.tokens):
                self.fields.reject(name, f"a list of {len(values)}", f"one entry per token ({len(self.tokens)})")
        self.merges = [self._merge(merge) for merge in self._list("merges", str)]
        self.special: dict[str, str] = {}
        for name, key in _SPECIAL.items():
            token_id = self.fields.values.get(key)
            if isinstance(token_id, int) and 0 <= token_id < len(self.tokens):
                self.special[name] = self.tokens[token_id]
        template = Fields(metadata, self.source).values.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def of_type(self, kind: int) -> list[str]:
        """Tokens of one ggml token type."""
        return [token for token, other in zip(self.tokens, self.types, strict=True) if other == kind]

    def ids(self, spell: Callable[[str], str] = str) -> dict[str, int]:
        """Token text to id; of tokens that are spelled alike the last counts, as in the model's own tokenizer."""
        return {spell(token): token_id for token_id, token in enumerate(self.tokens)}

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self.fields.values.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values[:1]):
            self.fields.reject(name, values, f"a list of {kind.__name__}")
        return values

    def _merge(self, merge: str) -> tuple[str, str]:
        left, separator, right = merge.partition(" ")
        if not (left and separator and right) or " " in right:
            self.fields.reject("merges", merge, "two tokens with a space between them")
        return left, right


def read_gguf(path: Path) -> TokenizerParts:
    """The tokenizer of a GGUF file.

    Raises:
        FormatError: malformed, or of a vocabulary or pre-tokenizer kind that is not supported.
    """
    vocabulary = _Vocabulary(path)
    kind = vocabulary.fields.string("model")
    builder = _BUILDERS.get(kind)
    if builder is None:
        vocabulary.fields.reject("tokenizer.ggml.model", kind, ", ".join(_BUILDERS))
    try:
        backend, adds_bos = builder(vocabulary)
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"{path}: its vocabulary does not make a tokenizer: {error}") from error
    backend.add_special_tokens(_added(vocabulary.of_type(CONTROL), special=True))
    backend.add_tokens(_added(_in(backend, vocabulary.of_type(USER_DEFINED)), special=False))
    is_bert = kind == "bert"
    return TokenizerParts(
        backend=backend,
        special_tokens=vocabulary.special,
        chat_template=vocabulary.chat_template,
        add_bos=None if is_bert else vocabulary.fields.boolean("add_bos_token", adds_bos),
        add_eos=None if is_bert else vocabulary.fields.boolean("add_eos_token", False),
    )


def _byte_level(v: _Vocabulary) -> tuple[Tokenizer, bool]:
    pre = v.fields.string("pre", "gpt-2")
    patterns = _PRE_TOKENIZERS.get(pre)
    if patterns is None:
        v.fields.reject("tokenizer.ggml.pre", pre, ", ".join(_PRE_TOKENIZERS))
    alphabet = byte_alphabet()
    spelling = {byte: char for char, byte in alphabet.items()}
    letters = frozenset(alphabet)
    verbatim = {*v.of_type(CONTROL), *v.of_type(USER_DEFINED)}

    def spell(token: str) -> str:
        if token in verbatim or letters.issuperset(token):
            return token
        return "".join(spelling[byte] for byte in token.encode())

    backend = Tokenizer(
        models.BPE(vocab=v.ids(spell), merges=v.merges, fuse_unk=False, ignore_merges=pre in _TAKES_WHOLE_WORDS)
    )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _ADDS_BOS


def _sentencepiece(v: _Vocabulary) -> tuple[Tokenizer, bool]:
    is_gemma = v.architecture.startswith("gemma")
    # Gemma's converter writes runs of spaces as spaces, where its tokenizer has the mark.
    spell = _mark_spaces if is_gemma else str
    vocab = v.ids(spell)
    special = {*v.of_type(CONTROL), *v.of_type(BYTE)}
    # Gemma's scores do not follow the order of its merges; the order of its vocabulary does.
    ranks = (
        dict.fromkeys(vocab, 0.0) if not v.scores else {spell(t): s for t, s in zip(v.tokens, v.scores, strict=True)}
    )
    if is_gemma:
        ranks = {token: -float(token_id) for token, token_id in vocab.items()}
    merges = v.merges or merges_of(vocab, ranks, special)
    backend = Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=v.special.get("unk_token", "<unk>")
        )
    )
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if is_gemma:
        backend.normalizer = normalizers.Replace(" ", SPACE_MARK)
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        prefixed = v.fields.boolean("add_space_prefix", True)
        scheme = "first" if prefixed else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme=scheme, split=False)
        steps += [decoders.Strip(content=" ", left=1)] if prefixed else []
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _wordpiece(v: _Vocabulary) -> tuple[Tokenizer, bool]:
    """The converter marks what begins a word with U+2581, and takes the ## off what continues one."""
    control = {*v.of_type(CONTROL), *v.special.values()}

    def spell(token: str) -> str:
        if token in control or (token.startswith("[") and token.endswith("]")):
            return token
        return token[1:] if token.startswith(SPACE_MARK) else f"##{token}"

    v.special.setdefault("cls_token", v.special.get("bos_token", "[CLS]"))
    v.special.setdefault("sep_token", v.special.get("eos_token", "[SEP]"))
    vocab = v.ids(spell)
    unknown = v.special.setdefault("unk_token", "[UNK]")
    backend = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    begin, end = v.special["cls_token"], v.special["sep_token"]
    for token in (begin, end, unknown):
        if token not in vocab:
            raise FormatError(f"{v.source}: the vocabulary has no {token!r}, which BERT needs")
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{begin}:0", "$A:0", f"{end}:0"],
        pair=[f"{begin}:0", "$A:0", f"{end}:0", "$B:1", f"{end}:1"],
        special_tokens=[(begin, vocab[begin]), (end, vocab[end])],
    )
    return backend, False


_BUILDERS: dict[str, Callable[[_Vocabulary], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "bert": _wordpiece,
}


def merges_of(vocab: dict[str, int], ranks: dict[str, float], skip: Iterable[str] = ()) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies: every split of a token in two tokens.

    SentencePiece joins the neighbours whose token has the best score; a list of merges in order of falling score, and
    the leftmost first among equals, says the same.

    Args:
        ranks: token to score; higher merges first.
        skip: tokens that no merge makes or uses.
    """
    skipped = set(skip)
    merges: list[tuple[float, int, int, str, str]] = []
    for token, token_id in vocab.items():
        if token in skipped:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and left not in skipped and right not in skipped:
                merges.append((-ranks[token], -len(left), token_id, left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _mark_spaces(token: str) -> str:
    return SPACE_MARK * len(token) if token and not token.strip(" ") else token


def _added(tokens: Iterable[str], *, special: bool) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=special) for token in tokens]


def _in(backend: Tokenizer, tokens: Iterable[str]) -> list[str]:
    return [found for token in tokens if backend.token_to_id(found := token) is not None]


def _below(metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
