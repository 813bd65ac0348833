"""Where kangaroo.py begins as a program: what can be wrong with the command line is said before
PyTorch is imported, which takes a second."""
from pathlib import Path

from support.arguments import parse_arguments
from support.files import require_folder
from support.program import run_program
from support.prompts import read_conversations
from support.terminal import status


def main(argv=None):
    return run_program("kangaroo.py", lambda: run(parse_arguments(argv)))


def run(args):
    if args.model:
        require_folder(args.model, "--model")
    conversations = None if args.conversation else read_conversations(args.prompt, args.prompts)
    status(f"loading {Path(args.model).resolve().name if args.model else 'stories'} …")
    from support.command_line import decode_all
    return decode_all(args, conversations)
