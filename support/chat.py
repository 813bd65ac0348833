"""Turns of a chat -> the text that the model goes on from, as the model's authors meant it.

A model folder says how in a Jinja program: `chat_template` in tokenizer_config.json, or the file
chat_template.jinja. It is rendered as transformers does, in jinja2's sandbox. A folder without one
gets one of the common templates by its name, or the text as it is.

    find_chat_template -> render_chat -> text;  encode_chat -> ids

A folder's own template writes BOS, or leaves it out; with the named ones the tokenizer adds it.
"""
import json
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

from support.errors import UserError
from support.files import read_json
from support.tokenizer import read_metadata

SOURCES = {
    "chatml": r"""
{% for m in messages %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama3": r"""
{% set end = '<|end_header_id|>\n\n' %}
{% for m in messages %}
{{ '<|start_header_id|>' + m.role + end + m.content + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant' + end }}{% endif %}""",
    "zephyr": r"""
{% for m in messages %}
{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    "llama2": r"""
{% for m in messages %}
{% if m.role == 'system' %}
{{ '[INST] <<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}
{%- elif m.role == 'user' %}
{{ '' if loop.previtem and loop.previtem.role == 'system' else '[INST] ' }}
{{- m.content + ' [/INST]' }}
{%- else %}
{{ ' ' + m.content + ' </s>' + ('' if loop.last else '<s>') }}
{%- endif %}
{% endfor %}""",
    "vicuna": r"""
{% if messages[0].role != 'system' %}
{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives " }}
{{- "helpful, detailed, and polite answers to the user's questions. " }}
{%- endif %}
{% for m in messages %}
{% if m.role == 'system' %}
{{ m.content + ' ' }}
{%- elif m.role == 'user' %}
{{ 'USER: ' + m.content + ' ASSISTANT:' }}
{%- else %}
{{ ' ' + m.content + '</s>' }}
{%- endif %}
{% endfor %}"""}


@dataclass(frozen=True)
class ChatTemplate:
    """name: a key of CHAT_TEMPLATES, or "own" for the folder's. where: the file that errors name.
    tokens: what the program calls bos_token and so on. note: what to tell who did not choose."""
    name: str
    source: str
    where: str
    tokens: dict = field(default_factory=dict)
    system: str | None = None
    note: str | None = None

    @cached_property
    def program(self):
        """The compiled Jinja program; UserError if it is none."""
        environment = jinja_environment()
        try:
            return environment.from_string(self.source)
        except Exception as e:  # of a program that is not ours
            raise UserError(f"{self.where}: not a chat template ({one_line(e)})") from None

    def with_system(self, system):
        """The template with a system message before all turns, if there is one."""
        if not system:
            return self
        template = replace(self, system=system)
        template.__dict__["program"] = self.program  # compiling takes long
        return template


CHAT_TEMPLATES = {name: ChatTemplate(name, source.removeprefix("\n"), f"--chat {name}")
                  for name, source in SOURCES.items()}
CHAT_TEMPLATES["none"] = ChatTemplate("none", "", "--chat none")  # the text as it is


def jinja_environment():
    """jinja2 as transformers sets it up for chat templates."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("a chat template needs the package jinja2: pip install jinja2 (or give "
                        "--chat none)") from None

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says; it is text."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json  # jinja2's own escapes what HTML would need
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    return environment


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------
# Which template

def find_chat_template(folder, name=None, system=None):
    """(name, ChatTemplate): the one called `name`, else the folder's own, else that of a family
    that the folder's names show, else none. system: a message that comes before all turns."""
    if name is not None and name not in CHAT_TEMPLATES:
        raise UserError(f"--chat {name}: no such template, choose from {', '.join(CHAT_TEMPLATES)}")
    metadata = read_metadata(folder)
    template = CHAT_TEMPLATES[name] if name else own_template(folder, metadata) or guess(folder)
    tokens = {key: token for key, token in metadata.items() if key.endswith("_token") and token}
    template = replace(template, tokens=tokens, system=system)
    if template.name != "none":
        _ = template.program  # what is wrong with it is said before anything else is done
    if system is not None:
        refuse_unheard(template)
    return template.name, template


def own_template(folder, metadata):
    """The folder's, or None."""
    path, source = Path(folder) / "tokenizer_config.json", metadata.get("chat_template")
    if isinstance(source, list):  # several named templates
        if not all(isinstance(t, dict) for t in source):
            raise UserError(
                f"{path}: chat_template = {source!r}, must be a text or a list of objects")
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    if (Path(folder) / "chat_template.jinja").exists():
        path = Path(folder) / "chat_template.jinja"
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None
    return ChatTemplate("own", source, str(path)) if isinstance(source, str) else None


def guess(folder):
    """Of a folder without a template: Vicuna's if a name shows it, else none; with a note."""
    folder, names = Path(folder), [Path(folder).resolve().name]
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        data = read_json(path) if path.exists() else {}
        names += [str(data.get(key)) for key in ("_name_or_path", "name_or_path")]
    shown = next((name for name in names if "vicuna" in name.lower()), None)
    choose = f"--chat {'|'.join(CHAT_TEMPLATES)} chooses"
    if shown:
        return replace(CHAT_TEMPLATES["vicuna"], note=f"{folder}: has no chat template, the name "
                       f"{shown} shows Vicuna's; {choose} another")
    return replace(CHAT_TEMPLATES["none"], note=f"{folder}: has no chat template, so text is "
                   f"decoded as it is; {choose} one")


def refuse_unheard(template):
    """UserError if the template has no place for its system message, or leaves it out."""
    try:
        heard = template.system.strip() in render_chat(template, ["Hello"])
    except UserError as e:
        raise UserError(f"--system: {e}") from None
    if not heard:
        raise UserError(f"--system: the chat template of {template.where} takes no system message")


def takes_system(template):
    """Whether the template has a place for system messages."""
    try:
        refuse_unheard(template.with_system("Be brief."))
    except UserError:
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Turns -> text -> ids

def render_chat(template, turns, answer=True):
    """Turns of user, assistant, user, … -> the text of the chat; `answer`: up to where the
    assistant's begins."""
    if template.name == "none":
        return "".join(turns)
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn}
                for i, turn in enumerate(turns)]
    if template.system is not None:
        messages.insert(0, {"role": "system", "content": template.system})
    try:
        return template.program.render(messages=messages, tools=None, documents=None,
                                       add_generation_prompt=answer, **template.tokens)
    except UserError:
        raise
    except Exception as e:  # the program may do anything
        raise UserError(f"{template.where}: the chat template says: {one_line(e)}") from None


def encode_chat(tokenizer, template, turns):
    """Turns of user, assistant, user, … (the last is the user's) -> the ids that decoding starts
    from."""
    return encode_rendered(tokenizer, template, render_chat(template, turns))


def encode_rendered(tokenizer, template, text):
    """The ids of a chat's text from its beginning."""
    if template.name == "none":
        return tokenizer.encode(text)
    ids = tokenizer.encode_part(text)
    return ids if template.name == "own" else tokenizer.with_bos(ids)
