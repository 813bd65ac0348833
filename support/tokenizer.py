"""Text on one side, token ids on the other, and streaming. Decoding itself never sees text.

A model folder brings `tokenizer.model` (sentencepiece) or `tokenizer.json` (needs the optional
package `tokenizers`). The ids are those that transformers makes. Where its versions 4 and 5
disagree, version 4 is followed: folders older than version 5 were made and used with it.

    `legacy` absent, null or true       ▁ after every special token; 5: for Llamas not
    tokenizer.model and tokenizer.json  the latter says where ▁ goes; 5 does not ask it
    two blanks in a row                 split as sentencepiece does; 5: for Llamas not
    no tokenizer_config.json            BOS before plain text; 5: none

Where version 4 reads tokenizer.model in two ways, added tokens are those of its AutoTokenizer (its
LlamaTokenizer shows blanks round them).

Chats are `support/chat.py`. Left out on purpose: truncation, padding, pairs of texts,
clean_up_tokenization_spaces.
"""
import hashlib
import re
from dataclasses import replace
from pathlib import Path

from support.errors import UserError
from support.files import read_json

from sentencepiece import SentencePieceProcessor

NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
FLAGS = {"lstrip", "rstrip", "single_word", "normalized", "special"}


# --------------------------------------------------------------------------------------------------
# What a folder says

def read_metadata(folder):
    """tokenizer_config.json with what special_tokens_map.json adds; a named token is its text, and
    those that say how a text is split are `added`: {text: {"id", "lstrip", …}}. `named` are the
    texts of all that have a name or a role."""
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    data = read_json(path) if path.exists() else {}
    if "added_tokens_decoder" not in data and (folder / "special_tokens_map.json").exists():
        data |= read_json(folder / "special_tokens_map.json")  # newer folders repeat it
    data["names_eos"] = bool(data.get("eos_token"))
    if (folder / "tokenizer.model").exists() or "LlamaTokenizer" in str(
            data.get("tokenizer_class")):
        data = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | data
    for name in NAMED:
        token = data.get(name)
        data[name] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(data[name], str | None):
            raise UserError(f"{path}: {name} = {token!r}, must be a text or an object with "
                            "`content`")
    extra = [token.get("content") if isinstance(token, dict) else token
             for token in data.get("additional_special_tokens") or []]
    named = [text for text in [*map(data.get, NAMED), *extra] if text]
    return data | {"named": named, "added": added_tokens(folder, data)}


def added_tokens(folder, metadata):
    """{text: {"id", "special", "lstrip", …}} of the tokens that are cut out of a text before the
    rest is split."""
    added = by_text(metadata, "added_tokens_decoder", folder / "tokenizer_config.json")
    path = folder / "added_tokens.json"
    if not added and path.exists():
        data = read_json(path)
        if not all(isinstance(i, int) for i in data.values()):
            raise UserError(f"{path}: must map texts to ids")
        added = {text: {"id": i} for text, i in data.items() if text}
    return added


def by_text(data, name, path):
    """{text: token} of the field `name` of a file: {id: token}, or a list of tokens with `id`."""
    try:
        tokens = data.get(name) or {}
        pairs = tokens.items() if isinstance(tokens, dict) else ((t["id"], t) for t in tokens)
        return {token["content"]: token | {"id": int(i)} for i, token in pairs if token["content"]}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: {name} must give an id and `content` for each token") from None


def with_named_tokens(metadata, added, processor):
    """The added tokens of a sentencepiece folder, and all that have a name or a role of their own;
    those that sentencepiece does not know come behind its last."""
    added, size = dict(added), processor.vocab_size()
    for text, token in metadata["added"].items():
        added[text] = added.get(text, {}) | token
    for i in filter(processor.is_control, range(size)):
        added.setdefault(processor.id_to_piece(i), {"id": i, "special": True})
    for text in metadata["named"]:
        i = processor.piece_to_id(text)
        size = max([size, *(token["id"] + 1 for token in added.values())])
        known = processor.id_to_piece(i) == text
        added.setdefault(text, {"id": i if known else size})["special"] = True
    return added


def writes_prefixes(data):
    """Whether tokenizer.json puts ▁ before every part of a text, or only (False) at its beginning;
    None if it does not say."""
    normalizer = data.get("normalizer") or {}
    steps = [normalizer, *(normalizer.get("normalizers") or [])]
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    scheme = (data.get("pre_tokenizer") or {}).get("prepend_scheme")
    return {"always": True, "first": False}.get(scheme)


# --------------------------------------------------------------------------------------------------
# Ids

class Tokenizer:
    """encode(text) -> ids of a plain text, with the tokens that the model wants around it;
    encode_part(text) -> ids of the text alone; decode(ids) -> text without special tokens;
    vocabulary() -> {token: id}.

    Special tokens such as </s> are recognised in a text, as transformers does.
    """

    def __init__(self, folder, config):
        folder = Path(folder)
        self.metadata, self.vocab_size = read_metadata(folder), config.vocab_size
        self.path = folder / "tokenizer.model"
        if self.path.exists():
            self.load_sentencepiece()
        elif (folder / "tokenizer.json").exists():
            self.path = folder / "tokenizer.json"
            self.load_tokenizers(config)
        else:
            raise UserError(f"{folder}: has neither tokenizer.model nor tokenizer.json")

    def encode(self, text):
        """The ids of a plain text; BOS is not doubled where the text writes it itself."""
        ids = self.with_bos(self.encode_part(text))
        return self.within([*ids, self.eos]) if self.add_eos and self.eos is not None else ids

    def with_bos(self, ids):
        """The ids with BOS before them, if the model wants it and they have none."""
        wanted = self.add_bos and self.bos is not None and ids[:1] != [self.bos]
        return self.within([self.bos, *ids]) if wanted else ids

    def with_ends(self, config):
        """The LlamaConfig, whose texts also end with the EOS that the tokenizer's own files name:
        for a chat it may be another than config.json's."""
        named = self.metadata["names_eos"] and self.eos in range(self.vocab_size)
        ids = {*config.eos_token_ids} | ({self.eos} if named else set())
        return replace(config, eos_token_ids=tuple(sorted(ids)))

    def encode_part(self, text, after=None):
        """The ids of a text that follows the token `after`; None: that begins."""
        return self.within(self.split(text, after))

    def within(self, ids):
        """The ids; UserError if the model's embedding has no row for one."""
        beyond = max(ids, default=0)
        if beyond >= self.vocab_size:
            raise UserError(
                f"{self.path}: the text has the token {self.text_of(beyond)!r}, which is {beyond}, "
                f"but config.json says vocab_size = {self.vocab_size}; leave it out of the text")
        return ids

    def load_sentencepiece(self):
        try:
            data = self.path.read_bytes()
            processor, bare = SentencePieceProcessor(), SentencePieceProcessor()
            processor.LoadFromSerializedProto(data)
            # With add_dummy_prefix false behind it: in a protobuf, the later field counts.
            bare.LoadFromSerializedProto(data + b"\x1a\x02\x18\x00")
        except (RuntimeError, OSError) as e:
            raise UserError(
                f"{self.path}: not a sentencepiece model ({str(e).strip()})") from None
        beside = self.path.with_name("tokenizer.json")
        data = read_json(beside) if beside.exists() else {}
        metadata, added = self.metadata, with_named_tokens(
            self.metadata, by_text(data, "added_tokens", beside), processor)
        self.bos, self.eos = (added[metadata[name]]["id"] if metadata.get(name) else None
                              for name in ("bos_token", "eos_token"))
        self.bos = processor.bos_id() if self.bos is None and processor.bos_id() >= 0 else self.bos
        self.add_bos = metadata.get("add_bos_token", True)
        self.add_eos = metadata.get("add_eos_token", False)
        texts = dict(enumerate(processor.id_to_piece(list(range(processor.vocab_size())))))
        self.text_of = (texts | {token["id"]: text for text, token in added.items()}).get
        self.vocabulary = lambda: {text: i for i, text in texts.items()} | {
            text: token["id"] for text, token in added.items()}
        self.split = SentencePieceSplitter(processor, bare, added, self.prefix(data))
        pieces = {i: [piece] for i, piece in texts.items()}
        for text, token in added.items():  # spelt, since to sentencepiece it may be control or new
            pieces[token["id"]] = [] if token.get("special") else [*text]
        self.decode = lambda ids: processor.decode(
            [piece for i in ids for piece in pieces.get(i, [])])

    def prefix(self, data):
        """Where ▁ goes: "every" part of a text between special tokens, its "first", or "none"."""
        every = writes_prefixes(data)
        if every is None:
            every = self.metadata.get("legacy") is not False
        wanted = self.metadata.get("add_prefix_space") is not False
        return "every" if every else "first" if wanted else "none"

    def load_tokenizers(self, config):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{self.path}: reading it needs the package tokenizers: pip install "
                            "tokenizers") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as e:  # the package raises plain Exception
            raise UserError(f"{self.path}: not a tokenizer ({e})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        metadata = self.metadata
        tokens = []
        for text, token in sorted(metadata["added"].items(), key=lambda item: item[1]["id"]):
            flags = {name: bool(token[name]) for name in FLAGS & token.keys()}
            flags |= {"special": True} if text in metadata["named"] else {}
            tokens.append(tokenizers.AddedToken(text, **flags))
        tokenizer.add_tokens(tokens)  # those that it has already stay, with these flags
        around = tokenizer.encode("").ids  # what the tokenizer itself puts around a text
        bos, self.eos = (tokenizer.token_to_id(metadata.get(name) or "")
                         for name in ("bos_token", "eos_token"))
        self.bos = bos if bos is not None else around[0] if around else config.bos_token_id
        default = self.bos in around or "LlamaTokenizer" in str(metadata.get("tokenizer_class"))
        self.add_bos = metadata.get("add_bos_token", default)
        self.add_eos = metadata.get("add_eos_token", self.eos in around and self.eos != self.bos)
        self.text_of, self.vocabulary = tokenizer.id_to_token, tokenizer.get_vocab
        self.split = JoiningSplitter(tokenizer)
        self.decode = lambda ids: tokenizer.decode(list(ids))


class SentencePieceSplitter:
    """Text -> ids: added tokens are cut out, sentencepiece splits what is between them."""

    def __init__(self, processor, bare, added, prefix):
        self.processor, self.bare, self.added, self.prefix = processor, bare, added, prefix
        # Of those that begin at one place the longest; a `single_word` not within a word.
        patterns = [rf"(?<!\w){re.escape(text)}(?!\w)" if token.get("single_word") else
                    re.escape(text) for text, token in sorted(added.items(), reverse=True,
                                                              key=lambda item: len(item[0]))]
        self.pattern = re.compile(f"({'|'.join(patterns)})" if patterns else "($^)")
        self.by_id = {token["id"]: token for token in added.values()}
        self.by_id.pop(processor.unk_id(), None)  # most often a character that is in no piece

    def __call__(self, text, after=None):
        parts, ids = self.pattern.split(text), []
        before = self.by_id.get(after)
        for part, special in zip(parts[::2], [*parts[1::2], None]):
            token = self.added.get(special)
            if before and before.get("rstrip"):
                part = part.lstrip()
            if token and token.get("lstrip"):
                part = part.rstrip()
            if part:
                ids += self.split(part, not ids and after is None, before is not None)
            if token:
                ids.append(token["id"])
            before = token
        return ids

    def split(self, text, begins, follows_special):
        """The ids of a text without added tokens."""
        if self.prefix == "every":
            if begins or follows_special:
                return self.processor.encode(text)
        else:
            text = text.replace("▁", " ")
            text = " " + text if begins and self.prefix == "first" else text
        if not text.startswith((" ", "▁")):
            return self.bare.encode(text)
        # Models that drop blanks at the beginning must not drop these.
        return self.bare.encode("<unk>" + text)[len(self.bare.encode("<unk>")):]


class JoiningSplitter:
    """Text -> ids by the package tokenizers, also of a text that goes on from another."""
    GUARDS = "\u4e00", ".", "a"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        unknown = getattr(tokenizer.model, "unk_token", None)  # most often no special token
        self.special = {i: token.content for i, token
                        in tokenizer.get_added_tokens_decoder().items() if token.content != unknown}
        first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        self.prefixes = first != ["a"]

    def __call__(self, text, after=None):
        if after in self.special:
            return self.ids(self.special[after] + text)[1:]
        if after is not None and self.prefixes:
            for guard in self.GUARDS:
                ids = self.behind(guard, text)
                if ids is not None:  # else guard and text have merged
                    return ids
        return self.ids(text)

    def behind(self, guard, text):
        """The ids of a text that follows another, or None if that changes the other's."""
        head, ids = self.ids(guard), self.ids(guard + text)
        return ids[len(head):] if ids[:len(head)] == head else None

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids


# --------------------------------------------------------------------------------------------------
# Streaming

def vocabulary_digest(tokenizer):
    """16 hex digits that tell one mapping of tokens to ids from another."""
    return hashlib.sha256(repr(sorted(tokenizer.vocabulary().items())).encode(
        "utf-8", "replace")).hexdigest()[:16]


def difference(here, there):
    """What tells the tokenizer `there` from the one `here`, in words; None if nothing does."""
    here, there = here.vocabulary(), there.vocabulary()
    differ = [token for token in here | there if here.get(token) != there.get(token)]
    if not differ:
        return None
    token = min(differ, key=lambda token: here.get(token, there.get(token)))
    return (f"{len(differ)} tokens have other ids, as {token!r}: {there.get(token, 'none')} in "
            f"place of {here.get(token, 'none')}")


class TextStream:
    """Turns tokens into text as they come, and never shows half a character: a token may end in the
    middle of one.

    Decodes a short window that starts at an earlier break, because the first token decoded loses
    its leading space.
    """

    def __init__(self, tokenizer, prompt_ids):
        self.decode, self.ids = tokenizer.decode, list(prompt_ids)[-8:]
        # Decode from `window` on; tokens before `shown` have been shown.
        self.window, self.shown = 0, len(self.ids)

    def push(self, token):
        """The text that `token` completes, perhaps none."""
        self.ids.append(token)
        return self.flush(wait=True)

    def preview(self, tokens):
        """The text that tokens would add to what has been shown."""
        before = self.decode(self.ids[self.window:self.shown])
        return self.decode([*self.ids[self.window:], *tokens])[len(before):]

    def flush(self, wait=False):
        """The text not shown yet, whether or not its last character is complete."""
        before = self.decode(self.ids[self.window:self.shown])
        text = self.decode(self.ids[self.window:])
        if wait and (text.endswith("\ufffd") or len(text) <= len(before)):
            return ""
        new = text[len(before):]
        if new.strip():  # a window that began with blanks would lose those that follow
            self.window = self.shown
        self.shown = len(self.ids)
        return new
