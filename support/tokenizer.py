"""Text on one side, token ids on the other: the tokenizer, chat templates, and streaming. Decoding
itself never sees text.

A model folder brings `tokenizer.model` (sentencepiece) or `tokenizer.json` (needs the optional
package `tokenizers`). Chat templates are the five common ones by name; the Jinja programs in
tokenizer_config.json are recognised, not run.
"""
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

from llama import UserError
from support.checkpoint import read_json


class ChatTemplate(NamedTuple):
    """`prefix` opens the conversation; `user` and `assistant` wrap a turn; `marker` betrays the
    template in a folder."""
    marker: str
    prefix: str
    user: str
    assistant: str


CHAT_TEMPLATES = {
    "chatml": ChatTemplate("<|im_start|>", "",
                           "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
                           "{}<|im_end|>\n"),
    "llama3": ChatTemplate(
        "<|start_header_id|>", "",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>"),
    "zephyr": ChatTemplate("<|assistant|>", "", "<|user|>\n{}</s>\n<|assistant|>\n", "{}</s>\n"),
    "llama2": ChatTemplate("[INST]", "", "[INST] {} [/INST]", " {} </s><s>"),
    "vicuna": ChatTemplate(
        "USER:",
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. ", "USER: {} ASSISTANT:", " {}</s>"),
    "none": ChatTemplate("", "", "{}", "{}"),
}


def find_chat_template(folder, name=None):
    """(name, ChatTemplate): the one called `name`, else the one that the model folder's own
    metadata shows."""
    if name is not None and name not in CHAT_TEMPLATES:
        raise UserError(f"--chat {name}: no such template, choose from {', '.join(CHAT_TEMPLATES)}")
    config, jinja = Path(folder) / "tokenizer_config.json", Path(folder) / "chat_template.jinja"
    source = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(source, list):  # several named templates
        if not all(isinstance(t, dict) for t in source):
            raise UserError(
                f"{config}: chat_template = {source!r}, must be a text or a list of objects")
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    if jinja.exists():
        try:
            source = jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{jinja}: cannot be read ({e})") from None
    source = source if isinstance(source, str) else ""
    name = name or next(
        (n for n, t in CHAT_TEMPLATES.items() if t.marker and t.marker in source), "none")
    template = CHAT_TEMPLATES[name]
    # A template may put a fixed system message before a conversation that has none (SmolLM2's
    # does).
    system = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>", source)
    if name == "chatml" and system:
        template = template._replace(prefix=f"<|im_start|>system\n{system[1]}<|im_end|>\n")
    return name, template


def render_chat(template, turns):
    """Turns of user, assistant, user, … (the last is the user's) -> the text that the assistant
    continues."""
    return template.prefix + "".join((template.assistant if i % 2 else template.user).format(turn)
                                     for i, turn in enumerate(turns))


class Tokenizer:
    """encode(text) -> ids, with the beginning-of-sequence token if the model wants it; decode(ids)
    -> text without special tokens; vocabulary() -> {token: id}. Special tokens such as </s> are
    recognised in the text, as Hugging Face does."""

    def __init__(self, folder, config):
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        self.metadata = read_json(path) if path.exists() else {}
        self.bos = config.bos_token_id
        if (folder / "tokenizer.model").exists():
            path = folder / "tokenizer.model"
            size = self.load_sentencepiece(path, config)
        elif (folder / "tokenizer.json").exists():
            path = folder / "tokenizer.json"
            size = self.load_tokenizers(path)
        else:
            raise UserError(f"{folder}: has neither tokenizer.model nor tokenizer.json")
        # Vocabularies are often padded to a round number, so that the matrix products are faster.
        if config.vocab_size not in {-(-size // pad) * pad for pad in (1, 8, 16, 32, 64, 128, 256)}:
            raise UserError(
                f"{path}: has {size} tokens, but config.json says vocab_size = {config.vocab_size}")

    def load_sentencepiece(self, path, config):
        try:
            processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{path}: not a sentencepiece model ({str(e).strip()})") from None
        special = {
            processor.id_to_piece(i): i
            for i in (processor.bos_id(), processor.eos_id())
            if i >= 0
        }
        try:
            for i, token in (self.metadata.get("added_tokens_decoder") or {}).items():
                if int(i) >= processor.vocab_size() or token.get("special"):
                    special[token["content"]] = int(i)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder must map ids to "
                "objects with `content`") from None
        self.bos = processor.bos_id() if self.bos is None else self.bos
        self.add_bos = self.metadata.get("add_bos_token", True)
        longest_first = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        split = re.compile(f"({longest_first})" if special else "$^")

        # sentencepiece begins every text with a space. Text that follows a special token begins no
        # word of its own, so it is encoded behind a guard, whose pieces are cut off again (as
        # transformers does).
        guards = {guard: processor.encode(guard) for guard in ("<unk>", "\u4e00", ".")}

        def encode_rest(text):
            for guard, head in guards.items():
                ids = processor.encode(guard + text)
                if ids[:len(head)] == head:  # else guard and text have merged
                    break
            return ids[len(head):]

        def encode(text):
            ids = []
            for i, part in enumerate(split.split(text)):
                if i % 2:
                    ids.append(special[part])
                else:
                    ids += encode_rest(part) if ids else processor.encode(part)
            return ids

        def decode(ids):
            return processor.decode(
                [i for i in ids if i < processor.vocab_size() and i not in special.values()])

        self.encode_text, self.decode = encode, decode
        self.vocabulary = lambda: {
            processor.id_to_piece(i): i for i in range(processor.vocab_size())} | special
        return max([processor.vocab_size() - 1, *special.values()]) + 1

    def load_tokenizers(self, path):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{path}: reading it needs the package tokenizers: pip install tokenizers"
            ) from None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the package raises plain Exception
            raise UserError(f"{path}: not a tokenizer ({e})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        begin = tokenizer.encode("").ids  # what the tokenizer itself puts around a text
        self.bos = begin[0] if begin and self.bos is None else self.bos
        self.add_bos = self.metadata.get("add_bos_token", self.bos in begin)
        self.encode_text = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.decode = lambda ids: tokenizer.decode(list(ids))
        self.vocabulary = tokenizer.get_vocab
        return tokenizer.get_vocab_size()

    def encode(self, text):
        ids = self.encode_text(text)
        return [self.bos, *ids
                ] if self.add_bos and self.bos is not None and ids[:1] != [self.bos] else ids


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
        self.window, self.shown = 0, len(
            self.ids)  # decode from `window` on; tokens before `shown` have been shown

    def push(self, token):
        """The text that `token` completes, perhaps none."""
        self.ids.append(token)
        return self.flush(wait=True)

    def flush(self, wait=False):
        """The text not shown yet, whether or not its last character is complete."""
        before = self.decode(self.ids[self.window:self.shown])
        text = self.decode(self.ids[self.window:])
        if wait and (text.endswith("\ufffd") or len(text) <= len(before)):
            return ""
        if text[len(before):].strip(
        ):  # a window that began with blanks would lose those that follow
            self.window = self.shown
        self.shown = len(self.ids)
        return text[len(before):]
