"""Prompts as a chat model sees them: the template is named by the user, applied in one place, and recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mech_align.errors import BadPrompts

Message = tuple[str, str]  # role, content
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """How a plain prompt becomes a chat: as one user turn, after an optional system prompt.

    Args:
        system: The system prompt; None leaves it to the template.
        template: A Jinja template; None uses the tokenizer's own.
        add_generation_prompt: Open the assistant's turn, so that the next token is the model's first word.
        prefill: Text that the assistant is made to have begun with.
        options: Further settings of the template, such as ``{"enable_thinking": False}``.
    """

    system: str | None = None
    template: str | None = field(default=None, repr=False)
    add_generation_prompt: bool = True
    prefill: str = ""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.prefill and not self.add_generation_prompt:
            raise BadPrompts(
                "A chat template with prefill but without add_generation_prompt.",
                why="The prefill would be written after the user's turn and not as the beginning of the assistant's.",
                hint="Leave out add_generation_prompt=False, or the prefill.",
            )

    def describe(self) -> str:
        """What was done to the prompts, in one line for reports; of the system prompt, only its length."""
        parts = ["chat template: " + ("the tokenizer's own" if self.template is None else "given by the user")]
        if self.system is not None:
            parts.append(f"system prompt of {len(self.system.split())} words")
        parts.append("assistant's turn opened" if self.add_generation_prompt else "assistant's turn not opened")
        if self.prefill:
            parts.append(f"assistant begins with {self.prefill!r}")
        parts.extend(f"{name}={value!r}" for name, value in self.options.items())
        return ", ".join(parts)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the rendered text, as plain data for fingerprints and manifests."""
        return {
            "system": self.system,
            "template": self.template,
            "add_generation_prompt": self.add_generation_prompt,
            "prefill": self.prefill,
            "options": dict(self.options),
        }

    def render(self, prompt: Prompt, tokenizer: Any) -> str:
        """What text does the model read for this prompt?

        A list of messages that ends with the assistant's own turn is continued there.

        Raises:
            BadPrompts: The tokenizer has no chat template, or the template refuses these messages.
        """
        messages: list[Message] = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if self.system is not None:
            if messages[0][0] == "system":
                raise BadPrompts(
                    "Two system prompts: the messages begin with one, and the chat template names another.",
                    hint="Leave out system=... of ChatTemplate, or the first message.",
                )
            messages.insert(0, ("system", self.system))
        prefill, opened = self.prefill, self.add_generation_prompt
        if messages[-1][0] == "assistant":
            if prefill:
                raise BadPrompts(
                    "The messages end with the assistant's turn, and the chat template has a prefill as well.",
                    hint="Leave out prefill=... of ChatTemplate, or the last message.",
                )
            prefill, opened = messages.pop()[1], True
        self._require_template(tokenizer)
        chat = [{"role": role, "content": content} for role, content in messages]
        given: dict[str, Any] = {} if self.template is None else {"chat_template": self.template}
        try:
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=opened, **given, **dict(self.options)
            )
        except Exception as error:  # templates raise what they like: Jinja errors, TypeError, ImportError without Jinja
            hints = ["Check the roles and their order: most templates want user and assistant in turn, user first."]
            if self.system is not None or messages[0][0] == "system":
                hints.append("Some models (Gemma) know no system role: put that text at the start of the user's turn.")
            raise BadPrompts("The chat template refused a prompt.", why=str(error), hint=hints) from error
        return str(text) + prefill

    def _require_template(self, tokenizer: Any) -> None:
        if tokenizer is None or not hasattr(tokenizer, "apply_chat_template"):
            raise BadPrompts(
                "A chat template was asked for, and the model has no tokenizer that can apply one.",
                hint="Load the model with its Hugging Face tokenizer, or leave out with_chat(...).",
            )
        if self.template is None and not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise BadPrompts(
                f"The tokenizer {name!r} has no chat template.",
                why="It probably belongs to a base model, which was never trained on chats.",
                hint=[
                    "Use the plain prompts: leave out with_chat(...).",
                    "Or write the template yourself: ChatTemplate(template='{% for m in messages %}...').",
                ],
            )


def as_prompt(value: object) -> Prompt:
    """A prompt from what the user wrote: text, or messages as dicts with role and content or as (role, content).

    Raises:
        TypeError: It is neither; the message says what was found and what to write.
    """
    if isinstance(value, str):
        if not value.strip():
            raise TypeError("found only white space; write the text of the prompt" if value else "found an empty text")
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise TypeError(f"found {_kind(value)}; write a text, or a list of messages with role and content")
    messages = tuple(_message(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if not messages:
        raise TypeError("found an empty list; write a text, or a list of messages with role and content")
    return messages


def prompt_text(prompt: Prompt) -> str:
    """The words of a prompt without its turns, for counting and comparing."""
    return prompt if isinstance(prompt, str) else "\n".join(content for _, content in prompt)


def _message(item: object) -> Message:
    if isinstance(item, Mapping):
        role, content = item.get("role"), item.get("content")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:  # pyright: ignore[reportUnknownArgumentType]
        role, content = item  # pyright: ignore[reportUnknownVariableType]
    else:
        raise TypeError(f"found a message that is {_kind(item)}; write {{'role': 'user', 'content': '...'}}")
    if not isinstance(role, str) or not isinstance(content, str) or not role:
        raise TypeError("found a message without a text for role and content; write {'role': 'user', 'content': '...'}")
    return role, content


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__}"
