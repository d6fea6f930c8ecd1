"""A chat at the terminal: reads lines, streams answers, obeys commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pagewire.client import Client
from pagewire.commands.output import cost_line, one_line, show
from pagewire.errors import PagewireError
from pagewire.terminal.conversation import SETTINGS, Conversation, ConversationError
from pagewire.terminal.line_editor import LineEditor
from pagewire.types import Model

COMMANDS = {
    "/help": "this list",
    "/clear": "starts over; the system message stays",
    "/system": "TEXT gives the model its role and starts over; without TEXT: shows it; off: none",
    "/model": "NAME asks another model; without NAME: shows which there are",
    "/set": "NAME VALUE sets temperature, max_tokens, ...; VALUE off: the server's default; alone: shows them",
    "/retry": "asks the last question again",
    "/undo": "takes the last question and its answer back",
    "/save": "FILE writes the chat as JSON",
    "/load": "FILE goes on with a chat that was saved",
    "/stats": "what the chat has cost, and how full the context is",
    "/exit": "ends the chat, as Ctrl-D does",
}
HELP = "Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /help lists the commands."


class Chat:
    """One chat with one server.

    Args:
        history: file of earlier lines; None: none is kept.
    """

    def __init__(self, client: Client, conversation: Conversation, console: Console, history: Path | None) -> None:
        self._client = client
        self._conversation = conversation
        self._console = console
        self._models = client.models()
        arguments = {
            "/set": [*SETTINGS],
            "/model": [model.name for model in self._models],
            "/save": None,
            "/load": None,
        }
        self._editor = LineEditor(history, [*COMMANDS], arguments)
        self._done = False
        self._handlers: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/new": self._clear,  # its name in earlier versions
            "/system": self._system,
            "/model": self._model,
            "/set": self._set,
            "/retry": self._retry,
            "/undo": self._undo,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Until the end of input or /exit."""
        served = ", ".join(model.name for model in self._models)
        self._say(f"Chatting with {served}. {HELP}")
        if self._editor.complaint:
            self._say(self._editor.complaint)
        while not self._done:
            try:
                line = self._editor.read().strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:  # as in a shell: what was being typed is thrown away
                self._console.print()
                continue
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._ask(line)

    def _obey(self, line: str) -> None:
        word, _, argument = line.partition(" ")
        handler = self._handlers.get(word)
        try:
            if handler is None:
                raise ConversationError(f"{word} is no command: /help lists them")
            handler(argument.strip())
        except (ConversationError, PagewireError) as error:
            self._complain(one_line(error) if isinstance(error, PagewireError) else str(error))

    def _ask(self, question: str) -> None:
        """Streams the answer. What was said before Ctrl-C stays in the chat; a failure takes the question back."""
        conversation, parts = self._conversation, list[str]()
        conversation.ask(question)
        try:
            messages, options = conversation.messages, conversation.options
            _text, finish = show(lambda: self._client.chat(messages, **options), self._console, parts)
        except KeyboardInterrupt:
            conversation.answer("".join(parts))
            self._say("\n(stopped)")
            return
        except (PagewireError, TypeError, ValueError) as error:
            # The chat goes on: the next try may succeed, or a shorter history, or another setting.
            conversation.answer("")
            self._complain(one_line(error) if isinstance(error, PagewireError) else str(error))
            if getattr(error, "reason", "") == "PROMPT_TOO_LONG":
                self._say("The chat has outgrown the model's context: /clear starts over, /undo drops what was last.")
            return
        conversation.answer("".join(parts))
        if not any(parts):
            self._say("(an empty answer; the question is taken back)")
        if finish is not None:
            conversation.totals.add(finish.usage)
            self._say(cost_line(finish.usage, finish.reason))

    def _help(self, _argument: str) -> None:
        for word, what in COMMANDS.items():
            self._say(f"{word:<8} {what}")
        self._say("Ctrl-C stops an answer. A line that ends with a backslash goes on in the next.")

    def _clear(self, _argument: str) -> None:
        self._conversation.turns.clear()

    def _system(self, argument: str) -> None:
        if not argument:
            self._say(self._conversation.system or "no system message")
            return
        self._conversation.system = "" if argument == "off" else argument
        self._conversation.turns.clear()

    def _model(self, argument: str) -> None:
        self._models = self._client.models()
        names = [model.name for model in self._models]
        if not argument:
            for model in self._models:
                self._say(f"{model.name}: {model.dtype}, {model.max_model_len} tokens")
            return
        if argument not in names:
            raise ConversationError(f"{argument} is not served here: there is {', '.join(names)}")
        self._conversation.options["model"] = argument

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if value.strip():
            self._conversation.set(name, value.strip())
            return
        if name:
            raise ConversationError(f"/set {name} needs a value, or off")
        given = {name: value for name, value in self._conversation.options.items() if name in SETTINGS}
        self._say(", ".join(f"{name} {value}" for name, value in given.items()) or "nothing is set")
        self._say(f"there are {', '.join(SETTINGS)}")

    def _retry(self, _argument: str) -> None:
        self._ask(self._conversation.undo())

    def _undo(self, _argument: str) -> None:
        question = self._conversation.undo()
        self._say(f"taken back: {_short(question)}")

    def _save(self, argument: str) -> None:
        self._conversation.save(_path(argument, "/save"))
        self._say(f"{len(self._conversation.turns)} messages saved")

    def _load(self, argument: str) -> None:
        self._conversation.load(_path(argument, "/load"))
        turns = self._conversation.turns
        self._say(f"{len(turns)} messages loaded" + (f"; the last: {_short(turns[-1]['content'])}" if turns else ""))

    def _stats(self, _argument: str) -> None:
        self._say(self._conversation.totals.line())
        if self._conversation.messages:
            model = self._chosen_model()
            used = len(self._client.tokenize(self._conversation.messages, model=self._conversation.options["model"]))
            self._say(f"the chat fills {used} of {model.max_model_len} tokens of the context")

    def _exit(self, _argument: str) -> None:
        self._done = True

    def _chosen_model(self) -> Model:
        chosen = self._conversation.options.get("model")
        return next((model for model in self._models if model.name == chosen), self._models[0])

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)

    def _complain(self, text: str) -> None:
        self._console.print(text, style="red", markup=False, soft_wrap=True)


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise ConversationError(f"{command} needs a file's name")
    return Path(argument).expanduser()


def _short(text: str) -> str:
    first = " ".join(text.split())
    return first if len(first) <= 60 else f"{first[:59]}…"
